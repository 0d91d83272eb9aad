"""Decoding: how a model writes text, with drafts that it checks in blocks or without (docs/decoding.md)."""
