"""`skc ablate`: named variants of one preset, several seeds, and what can be believed of their differences."""
