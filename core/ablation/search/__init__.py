"""Searches: which settings are tried, and the rounds of trials."""
