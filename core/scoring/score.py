"""Scoring, the only path: windows go through the engine, nats into the ledger, and bits per byte comes from that."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from core import rng
from core.config import ConfigError, EvalConfig
from core.data.dataset import Dataset, Split
from core.engine.ranks import Alone, Ranks, only_rank_0
from core.scoring.accounting import Bytes, bits_per_byte, count_bytes, ratio_error
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import Plugin
from core.scoring.session import Session, Watch
from core.scoring.stateful import score_streams
from core.scoring.windows import Windows, cut, document_ranges, document_windows, sliding

FEWEST = 256
"""Rows of a pass at least, where eval.batch has as many: a shorter text is scored in the same shape."""
OFTEN = 2000
"""Passes from which on it pays to compile for them, which takes half a minute, also where eight ranks share them."""


class Scorer(Protocol):
    """What scoring needs of an engine; windows with carry also need it to be a Carrier."""

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return -log p(target) in nats for every position: (rows, seq) int32 -> (rows, seq) float."""
        ...


@dataclass(frozen=True)
class Score:
    """What the validation text cost."""

    bpb: float
    """Bits per byte under `byte_rule`."""
    byte_rule: Literal["table", "raw"]
    """table: the official byte table; raw: UTF-8 bytes of the original text."""
    nats: float
    """Sum over the scored targets."""
    targets: int
    bytes: int
    loss: float
    """Mean nats per target."""
    documents: int
    total_documents: int
    full: bool
    """The whole validation text, every target once."""
    error: float | None
    """Standard error of `bpb` in an estimate; None for a score, and where one document says nothing about spread."""
    bpb_raw: float | None
    """Bits per raw byte, where the raw bytes are known."""
    windows: str
    """How the text was cut."""
    plugins: tuple[str, ...] = ()
    """What else had a part in the predictions."""

    @property
    def label(self) -> str:
        """`score` for the whole validation text, else `estimate`."""
        return "score" if self.full else "estimate"

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the label as plain JSON values."""
        return {"label": self.label, **dataclasses.asdict(self), "plugins": list(self.plugins)}


def score(
    engine: Scorer,
    dataset: Dataset,
    config: EvalConfig,
    *,
    documents: int | None,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    ledger: Ledger | None = None,
    isolated: bool = True,
    plugins: Sequence[Plugin] = (),
    watch: Watch | None = None,
    ranks: Ranks | None = None,
) -> Score:
    """Score the validation text: all of it as `config` says, or `documents` documents drawn by `seed` as an estimate.

    An estimate scores each drawn document by itself (windows inside documents, whatever `config.windows` says), and
    stays an estimate even if the draw takes them all. Windows that are already in `ledger` are not scored again, so a
    killed evaluation goes on. `isolated`: whether the model's documents are; windows with carry then begin anew with
    each document, else the text is one stream. `plugins` are those of config.plugins, made for this pass. `progress`
    gets (windows done, windows in all). Each of `ranks` scores its share and all return the same; with plug-ins, which
    learn in the order of the text, rank 0 works alone. ConfigError if there is nothing to score or no byte rule
    applies; DataError if all documents are asked for and a shard is not what its checksum says; LedgerError if the
    engine's numbers are not finite, a rule is broken, or `ledger` is of another text.
    """
    ranks = ranks or Alone()
    if plugins and ranks.world > 1:
        choices = {"documents": documents, "seed": seed, "progress": progress, "ledger": ledger, "isolated": isolated}
        choices |= {"plugins": plugins, "watch": watch}
        found = only_rank_0(ranks, lambda: alone(engine, lambda: score(engine, dataset, config, **choices).to_json()))
        return Score(**{k: v for k, v in found.items() if k not in ("label", "plugins")}, plugins=config.plugins)
    split = dataset.val
    if documents is None:
        split.verify()  # a score is of the text that was prepared, an estimate may be of less
    if len(split) < 2:
        raise ConfigError(f"data {dataset.name}: {len(split)} validation tokens; scoring needs at least 2")
    total = len(split.document_starts)
    drawn = None if documents is None else rng.choose(seed, "eval/documents", total, min(documents, total))
    begins, ends, _ = _select(split, config, drawn)
    counted = count_bytes(dataset, begins, ends, drawn)  # first, so that a missing byte rule costs no forward pass
    ledger = Ledger(len(split)) if ledger is None else ledger
    if ledger.tokens != len(split):
        raise LedgerError(f"the ledger is for {ledger.tokens} tokens, the text has {len(split)}: start a new one")
    vocab = dataset.tokenizer.vocab
    score_text(engine, split, config, ledger, drawn, isolated, plugins, vocab, watch, progress, ranks)
    return score_of(dataset, config, ledger, drawn, plugins=bool(plugins), counted=counted)


def score_of(
    dataset: Dataset,
    config: EvalConfig,
    ledger: Ledger,
    drawn: np.ndarray | None = None,
    *,
    plugins: bool,
    counted: Bytes | None = None,
) -> Score:
    """Return what the validation text, or its documents `drawn`, cost by what is in a ledger.

    `plugins`: those of config.plugins had a part; `counted`: the bytes, if they are known. LedgerError for a target
    that is not scored, ConfigError if no byte rule applies.
    """
    begins, ends, _ = _select(dataset.val, config, drawn)
    total = len(dataset.val.document_starts)
    counted = counted or count_bytes(dataset, begins, ends, drawn)
    nats = np.array([ledger.total(a + 1, b + 1) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)])
    targets, all_nats, all_bytes = int((ends - begins).sum()), float(nats.sum()), int(counted.counted.sum())
    raw_bytes = 0 if counted.raw is None else int(counted.raw.sum())
    error = None if drawn is None else ratio_error(nats, counted.counted, total)
    return Score(
        bpb=bits_per_byte(all_nats, all_bytes),
        byte_rule=counted.rule,
        nats=all_nats,
        targets=targets,
        bytes=all_bytes,
        loss=all_nats / targets,
        documents=total if drawn is None else len(drawn),
        total_documents=total,
        full=drawn is None,
        error=None if error is None else bits_per_byte(error, 1),
        bpb_raw=bits_per_byte(all_nats, raw_bytes) if raw_bytes else None,
        windows=described(config, ledger.entries["order"], drawn is not None, plugins),
        plugins=config.plugins if plugins else (),
    )


def alone(engine: Any, act: Callable[[], Any]) -> Any:
    """Do something with this rank's engine that the other ranks do not: what adapts must not wait for them."""
    together, engine.ranks = engine.ranks, Alone()
    try:
        return act()
    finally:
        engine.ranks = together


def score_text(
    engine: Scorer,
    split: Split,
    config: EvalConfig,
    ledger: Ledger,
    drawn: np.ndarray | None = None,
    isolated: bool = True,
    plugins: Sequence[Plugin] = (),
    vocab: int = 0,
    watch: Watch | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Bring every target of `split`, or of the documents `drawn`, into `ledger`: the one scoring path.

    The arguments are those of `score`, which makes a figure of what is in the ledger then.
    """
    check_plugins(config, plugins)
    session = Session(engine, split, config, ledger, plugins, vocab, watch, ranks)
    try:
        if config.windows == "stateful":
            score_streams(session, _streams(split, drawn, isolated), progress)
        else:
            _run(session, session.order(_select(split, config, drawn)[2], 1, len(split) - 1), progress)
    finally:
        session.close()


def score_sample(
    engine: Scorer,
    split: Split,
    config: EvalConfig,
    book: Ledger,
    isolated: bool,
    passes: int,
    dice: np.random.Generator,
) -> Ledger:
    """Return a ledger with a sample of the targets that are in `book`, scored again without plug-ins.

    The sample is of windows, enough for `passes` forward passes, or with carry of streams of about as much text.
    """
    sample = Ledger(len(split))
    session = Session(engine, split, config, sample)
    written = book.written(np.arange(1, len(split)))
    if config.windows == "stateful":
        streams = [(a, b) for a, b in _streams(split, None, isolated) if written[a:b].all()]
        if not isolated:  # one stream, of which the beginning is there
            streams = [(0, 1 + int(np.flatnonzero(written)[-1]))]
        streams = [streams[i] for i in dice.permutation(len(streams))]
        size = np.cumsum([b - a for a, b in streams])
        score_streams(session, streams[: 1 + int((size < passes * config.batch * config.seq).sum())], None)
    else:
        cuts = _select(split, config, None)[2]
        done = dice.permutation(np.flatnonzero(written[cuts.start + cuts.length - 1]))
        _run(session, cuts.take(np.sort(done[: passes * config.batch])), None)
    return sample


def check_plugins(config: EvalConfig, plugins: Sequence[Plugin]) -> None:
    """Raise ConfigError for a plug-in that windows with carry cannot honour."""
    for plugin in plugins if config.windows == "stateful" else ():
        if plugin.kind == "adaptation" or type(plugin).order is not Plugin.order:
            raise ConfigError(
                f"eval.windows=stateful with plug-in {type(plugin).__name__}: the state comes from earlier weights, "
                "and documents have an order of their own: take sliding windows or documents"
            )


def _stride(config: EvalConfig) -> int:
    return config.stride or config.seq


def described(config: EvalConfig, order: np.ndarray, drawn: bool = False, plugins: bool = True) -> str:
    """Return in words how a text was cut, and that plug-ins changed the order if `order`, of its ledger, says so.

    Windows with carry take the longest document first, as they always do; plug-ins have no say in that.
    """
    if config.windows == "stateful":
        return f"stateful seq={config.seq}"
    moved = plugins and not drawn and bool((np.diff(order) < 0).any())
    how = f"{'documents' if drawn else config.windows} seq={config.seq} stride={_stride(config)}"
    return f"{how}, documents in the order of plug-ins" if moved else how


def _streams(split: Split, drawn: np.ndarray | None, isolated: bool) -> list[tuple[int, int]]:
    """Return the input ranges that are scored with carry."""
    if drawn is None and not isolated:
        return [(0, len(split) - 1)]
    begins, ends = document_ranges(len(split), split.document_starts)
    chosen = range(len(begins)) if drawn is None else drawn.tolist()
    return [(int(begins[i]), int(ends[i])) for i in chosen if ends[i] > begins[i]]


def _select(split: Split, config: EvalConfig, drawn: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, Windows]:
    """Return (begins, ends) of the input ranges that are scored and summed, and the windows that cover them."""
    starts = split.document_starts
    if drawn is not None:
        begins, ends = (side[drawn] for side in document_ranges(len(split), starts))
        return begins, ends, cut(begins, ends, config.seq, _stride(config))
    whole = np.zeros(1, np.int64), np.array([len(split) - 1], np.int64)
    if config.windows == "documents":
        return *whole, document_windows(len(split), starts, config.seq, _stride(config))
    return *whole, sliding(len(split), config.seq, _stride(config))


def _run(session: Session, cuts: Windows, progress: Callable[[int, int], None] | None) -> None:
    """Score every window that has to be."""
    total = len(cuts.start)
    session.rows = size = min(session.rows, max(total, FEWEST))  # not memory for windows that are not there
    session.often = total >= OFTEN * size  # however many are left, and whoever makes them: each pass gives the same
    todo = cuts.take(session.todo(cuts.start + cuts.length))
    skipped = total - len(todo.start)
    for i in session.turns(range(0, len(todo.start), size)):
        part = todo.take(slice(i, i + size))
        if not session.skip(1):
            session.windows(part)
        if progress is not None:
            progress(skipped + i + len(part.start), total)
