"""Scoring: windows, ledger, bytes, plug-ins."""
