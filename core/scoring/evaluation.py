"""What is scored, as one value: the text, how it is cut, and which documents lie in which rows of a forward pass."""

import functools
from dataclasses import dataclass

import numpy as np

from core import rng
from core.config import EvalConfig, RunConfig
from core.data.dataset import Split
from core.data.tokenizer import Tokenizer
from core.model.adapters import chosen_sites
from core.model.scopes import loose_names
from core.scoring.ledger import Ledger
from core.scoring.windows import Windows, cut, document_ranges, document_windows, sliding


def one_document(tokenizer: Tokenizer, text: str) -> Split:
    """Return a text as a stream of one document: BOS and its tokens, if it has any."""
    ids = tokenizer.encode(text)
    return Split(
        [np.append(tokenizer.bos, ids).astype(np.int32)],
        tokenizer,
        "text",
        document_bytes=np.array([len(text.encode())]),
        unknown_tokens=int((ids == tokenizer.unknown).sum()),
    )


@dataclass(frozen=True)
class Evaluation:
    """A text and how it is scored."""

    split: Split
    config: EvalConfig
    documents: int | None = None
    """Score only so many documents, drawn by config.seed, each by itself: an estimate. None: the whole text."""
    isolated: bool = True
    """Whether the model's documents are: windows with carry begin anew with each; else the text is one stream."""
    plugins: bool = False
    """Whether the plug-ins of config.plugins have a part."""
    adapts: bool = False
    """Whether the adaptation of config.adapt has a part."""
    sites: tuple[str, ...] = ()
    """Where adapters are, if they have a part."""
    loose: tuple[str, ...] = ()
    """Weights that learn: by SGD, or in phases."""

    @classmethod
    def of(cls, split: Split, run: RunConfig, documents: int | None = None, plugins: bool = False) -> "Evaluation":
        """Return the evaluation of `split` that a run's settings describe; `plugins`: with all that learns in it."""
        adapt, isolated = run.eval.adapt, run.model.documents == "isolated"
        adapts = plugins and adapt.kind != "none"
        sites = chosen_sites(run.model, adapt) if adapts and adapt.kind == "lora" else ()
        loose, phases = (), run.eval.phases
        if adapts and adapt.kind == "sgd":
            loose = loose_names(run.model, adapt.params, adapt.frozen)
        elif adapts and phases.at:
            loose = loose_names(run.model, phases.params, where="eval.phases")
        return cls(split, run.eval, documents, isolated, plugins and bool(run.eval.plugins), adapts, sites, loose)

    @property
    def carries(self) -> bool:
        """Whether a row is a stream that goes through the model window by window, with its state carried on."""
        return self.config.windows == "stateful"

    @property
    def stride(self) -> int:
        """Targets that a window scores after the first."""
        return self.config.stride or self.config.seq

    @functools.cached_property
    def drawn(self) -> np.ndarray | None:
        """(count,) int64: the documents of an estimate; None: all."""
        if self.documents is None:
            return None
        total = len(self.split.document_starts)
        return rng.choose(self.config.seed, "eval/documents", total, min(self.documents, total))

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (begins, ends) of the input ranges whose costs are summed, int64: the whole text, or each document."""
        if self.drawn is None:
            return np.zeros(1, np.int64), np.array([len(self.split) - 1], np.int64)
        begins, ends = document_ranges(len(self.split), self.split.document_starts)
        return begins[self.drawn], ends[self.drawn]

    def rows(self) -> Windows:
        """Return what each row of a forward pass reads, in the order of scoring: a window, or with carry a stream.

        Streams come longest first, so that those of like length go side by side.
        """
        tokens, starts, config = len(self.split), self.split.document_starts, self.config
        if self.carries:
            begins, ends = self.ranges()
            if self.drawn is None and self.isolated:
                begins, ends = document_ranges(tokens, starts)
            streams = Windows(begins, ends - begins, np.zeros_like(begins))
            streams = streams.take(streams.length > 0)
            return streams.take(np.argsort(-streams.length, kind="stable"))
        if self.drawn is not None:
            return cut(*self.ranges(), config.seq, self.stride)
        if config.windows == "documents":
            return document_windows(tokens, starts, config.seq, self.stride)
        return sliding(tokens, config.seq, self.stride)

    def passes(self, rows: Windows) -> np.ndarray:
        """Return how many windows each row takes, (rows,) int64."""
        return -(-rows.length // self.config.seq)

    def turns(self, rows: Windows, size: int, ledger: Ledger | None) -> list[Windows]:
        """Return the rows that go through the model side by side, `size` in a turn, without what `ledger` holds.

        Ranks share the turns, so that a row has the same neighbours however many ranks there are. A row is scored from
        left to right: the ledger holds all of it if it holds the last target.
        """
        if ledger is not None:
            rows = rows.take(~ledger.written(rows.start + rows.length))
        return [rows.take(slice(i, i + size)) for i in range(0, len(rows.start), size)]
