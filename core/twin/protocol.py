"""What a twin of an engine answers: only numpy arrays, numbers and frozen dataclasses cross this border."""

from typing import Protocol

import numpy as np

from core.engine.protocol import Arrays, State, StepResult, Tape
from core.twin.report import TwinReport
from core.twin.settings import TwinConfig


class Twin(Protocol):
    """A second set of mixer weights of an engine's scored weights of now, which it never changes.

    Blocks have config.block = K places: a token (the anchor) and K - 1 masks. What stands at place i says what follows
    it. With config.exact_anchor the first place is the frozen model's own, which nothing here learns from.
    """

    config: TwinConfig

    def draft(self, state: State, anchors: np.ndarray, block: int | None = None) -> Tape:
        """Draft the blocks that begin with `anchors` (rows,) int behind `state`, which stays as it is.

        The tape's logits are (rows, K, vocab), K = `block` or config.block; it has no `nll` and cannot be committed.
        """
        ...

    def gradients(
        self, tokens: np.ndarray, anchors: np.ndarray, weights: np.ndarray, loss: str = "kl"
    ) -> tuple[float, Arrays]:
        """Return the loss of blocks at places `anchors` (rows, count) of `tokens` (rows, seq), and its gradients.

        The loss is the mean over blocks of the mean over places, weighted by `weights` (K,): kl, KL(frozen || twin) at
        the same places of the text; cross_entropy, of the text's own next tokens. ValueError for an anchor that is not
        followed by K tokens.
        """
        ...

    def step(
        self, tokens: np.ndarray, anchors: np.ndarray, weights: np.ndarray, loss: str, lr: float, clip: float | None
    ) -> StepResult:
        """Take one step of AdamW (0.9, 0.95, no decay), gradients clipped to the norm `clip`; see `gradients`.

        A loss or gradients that are not finite leave the twin as it was.
        """
        ...

    def report(self, tokens: np.ndarray, anchors: np.ndarray) -> TwinReport:
        """Return how near the twin is to the frozen model in blocks of a text."""
        ...

    def alike(self, tokens: np.ndarray, anchors: np.ndarray) -> Arrays:
        """Return by pass through a layer the cosine of what both mixers put out at every place of blocks, (K,).

        The blocks hold the text's own tokens in place of masks; with an exact anchor the first place is left out.
        """
        ...

    def params(self) -> Arrays:
        """Return the twin's weights in the order of core.twin.params.twin_rows, float32 (float64 in float64)."""
        ...

    def load_params(self, params: Arrays) -> None:
        """Replace every weight and begin the optimizer anew; a missing, extra or misshapen one is a ValueError."""
        ...

    def optimizer(self) -> Arrays:
        """Return both moments as `<param>.m` and `<param>.v`, and `steps` (1,) int."""
        ...

    def load_optimizer(self, state: Arrays) -> None:
        """Replace the optimizer's state; strict like `load_params`."""
        ...
