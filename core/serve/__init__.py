"""Serving: trained models behind a local address, for a page, for programs, and for whoever watches (docs/serve.md)."""
