"""The twin: a second set of mixer weights, with which a frozen model drafts for itself (docs/orthrus.md)."""
