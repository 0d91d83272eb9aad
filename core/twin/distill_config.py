"""The settings of `skc distill`: the docstring under a field is its help text."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from core.checks import require, require_least, require_limits
from core.model.config import ModelConfig
from core.train_config import MOST_ROWS, MOST_STEPS, MOST_TOKENS, TrainConfig
from core.twin.params import twin_rows
from core.twin.settings import TwinConfig

MOST_ANCHORS = 1 << 16
"""Most blocks of a row."""


@dataclass(frozen=True)
class DistillConfig:
    """How a twin learns to say what its frozen model would say."""

    twin: TwinConfig = field(default_factory=TwinConfig)
    steps: int = 600
    """Number of AdamW steps (with distill.seconds: at most this many)."""
    seconds: float | None = None
    """Wall-clock budget; the schedule is then measured by the clock."""
    text: Literal["own", "training"] = "own"
    """own: what the model writes greedily after some tokens of training text; training: the training text itself."""
    own_rows: int = 256
    """Rows of own text, each distill.seq tokens."""
    prompt: int = 16
    """Tokens of training text, BOS among them, that a row of own text begins with."""
    batch: int = 4
    """Rows of a step."""
    seq: int | None = None
    """Tokens of a row; None: as many as the model was trained with."""
    anchors: int = 16
    """Blocks of a row: one pass of the frozen model gives the states that all of them begin with."""
    loss: Literal["kl", "cross_entropy"] = "kl"
    """kl: KL(model || twin) over the whole vocabulary; cross_entropy: against the text's next token."""
    weights: tuple[float, ...] = ()
    """Weight of each of the block's first K - 1 places, whose guesses are drafts; none: all alike. With an exact anchor
    the first is the model's own and counts nothing."""
    lr: float = 1e-3
    """Learning rate."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises linearly from 0."""
    warmdown: float = 0.4
    """Share of the run, at its end, in which it falls linearly to distill.floor."""
    floor: float = 0.0
    """Learning-rate scale at the very end."""
    clip: float | None = 1.0
    """Largest norm of all gradients together; None: no clipping."""
    seed: int = 1337
    """Seed of the rows' order, of the prompts and of where blocks begin."""
    log_every: int = 10
    """Steps between log lines."""
    save_every: int | None = 100
    """Steps between checkpoints; None: only at the end."""
    report_texts: int = 8
    """Texts of either kind that the report at the end is over."""
    report_tokens: int = 96
    """Tokens that each of them is written on for."""

    def __post_init__(self) -> None:
        limits = {"steps": MOST_STEPS, "batch": MOST_ROWS, "seq": MOST_TOKENS, "anchors": MOST_ANCHORS}
        require_limits("distill", self, 2**31 - 1, **limits, own_rows=MOST_ROWS, report_texts=16, prompt=MOST_TOKENS)
        require_least("distill", self, 1, "own_rows", "anchors", "report_texts", "report_tokens", "prompt")
        require_least("distill", self, 0, "lr", "seed")
        require(self.twin.block >= 2, f"distill.twin.block={self.twin.block}: expected at least 2")
        places = self.twin.block - 1
        where = f"distill.weights={', '.join(map(str, self.weights))}"
        expected = f"expected none, or {places} numbers from 0 up, of which some place that learns has more than 0"
        first = int(self.twin.exact_anchor)
        good = len(self.weights) == places and min(self.weights) >= 0 and sum(self.weights[first:]) > 0
        require(self.weights == () or good, f"{where}: {expected}")
        own, given = self.text == "own", (self.own_rows, self.prompt)
        where = "distill.own_rows and distill.prompt change nothing with distill.text=training: leave them out"
        require(own or given == (DistillConfig.own_rows, DistillConfig.prompt), where)
        block, alone = self.twin.block, "the first draft is the model's own, and no other is left to learn"
        require(block > 2 or not first, f"distill.twin.block={block} with distill.twin.exact_anchor: {alone}")
        self.schedule(1)

    def schedule(self, seq: int) -> TrainConfig:
        """Return what a training loop goes by, for rows of `seq` tokens unless distill.seq says otherwise."""
        seq = self.seq or seq
        try:
            return TrainConfig(
                steps=self.steps, seconds=self.seconds, batch=self.batch, seq=seq,
                lr_matrix=self.lr, warmup=self.warmup, warmdown=self.warmdown, floor=self.floor, decay="linear",
                clip=self.clip, log_every=self.log_every, eval_every=None, save_every=self.save_every,
            )  # fmt: skip
        except ValueError as error:
            message = str(error).replace("train.lr_matrix", "distill.lr").replace("train.", "distill.")
            raise type(error)(message) from None

    def place_weights(self) -> np.ndarray:
        """Return the weight of every place of a block, (K,): of the last nobody reads the guess."""
        return np.array([*(self.weights or (1.0,) * (self.twin.block - 1)), 0.0])

    def check(self, model: ModelConfig, seq: int) -> None:
        """Raise ConfigError for settings that cannot be used with a model that was trained on rows of `seq` tokens."""
        try:
            twin_rows(model, self.twin)
        except ValueError as error:
            raise type(error)(str(error).replace("twin.", "distill.twin.")) from None
        rows = self.seq or seq
        require(
            not model.mixes("attention") or rows <= seq,
            f"distill.seq={rows}: attention looks back on the {seq} tokens that it was trained with; expected at most "
            "that",
        )
        least = self.twin.block + 1 + (self.prompt if self.text == "own" else 0)
        require(rows >= least, f"distill.seq={rows}: expected at least {least}, so that blocks fit behind the prompt")
