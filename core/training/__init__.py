"""Training: the loop, the schedule, the run folder and what ends a run."""
