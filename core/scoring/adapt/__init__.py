"""What learns while a text is scored: on scored targets alone, under the ledger (docs/legality.md)."""
