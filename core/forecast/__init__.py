"""The plan of a run before it starts, and what this machine needs for it."""
