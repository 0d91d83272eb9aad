"""Folders of runs and ablations: listed, held against each other, removed."""
