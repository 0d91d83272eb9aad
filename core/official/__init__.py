"""Checkpoints of the official scripts."""
