"""How a tokenizer is refused, of whichever kind."""


class TokenizerError(ValueError):
    """The tokenizer cannot be used or trained: the message says why."""
