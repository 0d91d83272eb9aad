"""An evaluation in a process of its own, and what it opened, reached and started."""
