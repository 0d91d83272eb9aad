"""`skc compare`: runs held against each other."""
