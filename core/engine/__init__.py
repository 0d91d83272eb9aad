"""What the lab asks of a backend, how one is loaded, and what several ranks tell each other."""
