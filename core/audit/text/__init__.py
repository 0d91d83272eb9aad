"""Rules about the text."""
