"""File formats, each with one bounded reader."""
