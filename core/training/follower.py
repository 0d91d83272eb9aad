"""A run as other ranks than the first see it."""

from typing import Any

from core.engine.protocol import Arrays, Engine
from core.training.checkpoint import share_checkpoint
from core.training.run import Run


class Follower(Run):
    """A run as ranks other than 0 see it: its settings. They write nothing, and read what rank 0 read."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Leave it to rank 0."""

    def save(self, engine: Engine, step: int, seconds: float, tokens: int | None = None) -> None:
        """Give rank 0 what this rank knows of the optimizer's state."""
        engine.optimizer()

    def keep_moments(self, moments: Arrays, of: str) -> None:
        """Leave it to rank 0."""

    def kept_moments(self, of: str) -> Arrays | None:
        """Return nothing: rank 0 has them."""

    def ledger_path(self, name: str) -> None:
        """Return nothing: rank 0 writes."""

    def restore(self, engine: Engine) -> tuple[int, float, int]:
        """Load the checkpoint that rank 0 read."""
        saved = share_checkpoint(engine.ranks, None)
        if saved is None:
            return 0, 0.0, 0
        engine.load_params(saved.params, saved.quantise)
        engine.load_optimizer(saved.optimizer)
        return saved.step, saved.seconds, saved.tokens
