"""The verbs of `skc`: each is a dataclass of options and a function from options to an Outcome."""
