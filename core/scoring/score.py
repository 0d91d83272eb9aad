"""Scoring, the only path: windows go through the engine, nats into the ledger, and bits per byte comes from that."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from core.config import ConfigError, EvalConfig
from core.engine.ranks import Alone, Ranks, only_rank_0
from core.scoring.accounting import Bytes, bits_per_byte, count_bytes, ratio_error
from core.scoring.adapt.session import Adaptation
from core.scoring.adapt.stream import StreamPass
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import Plugin, load_plugins
from core.scoring.predictions import Predictor
from core.scoring.session import Progress, Session, Watch
from core.scoring.stateful import score_streams
from core.scoring.windows import Windows

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
    adaptation: str = ""
    """What learned while the text was scored, in words; nothing: nothing did."""

    @property
    def label(self) -> str:
        """`score` for the whole validation text, else `estimate`."""
        return "score" if self.full else "estimate"

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the label as plain JSON values."""
        return {"label": self.label, **dataclasses.asdict(self), "plugins": list(self.plugins)}


def score(
    engine: Scorer,
    evaluation: Evaluation,
    ledger: Ledger | None = None,
    *,
    plugins: Sequence[Plugin | Predictor] | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    say: Callable[[str], None] | None = None,
) -> Score:
    """Score a text as `evaluation` says; an estimate stays one even if the draw takes all documents.

    Windows that are already in `ledger` are not scored again, so a killed evaluation goes on. `plugins`: made for this
    pass; None: those that `evaluation` names. `progress` gets (windows done, windows in all). Each of `ranks` scores
    its share and all return the same; with a user's plug-ins, which learn from pass to pass, rank 0 works alone. `say`
    gets what the user is to know beside the score.
    ConfigError if there is nothing to score or no byte rule applies; DataError if all documents are asked for and a
    shard is not what its checksum says; LedgerError if the engine's numbers are not finite, a rule is broken, or
    `ledger` is of another text.
    """
    ranks = ranks or Alone()
    if plugins is None:
        plugins = load_plugins(evaluation.config.plugins) if evaluation.plugins and evaluation.config.plugins else ()
    if ranks.world > 1 and any(isinstance(plugin, Plugin) for plugin in plugins):
        act = functools.partial(score, engine, evaluation, ledger, plugins=plugins, watch=watch, progress=progress)
        value = only_rank_0(ranks, lambda: rank_alone(engine, lambda: act().to_json()))
        names = tuple(value["plugins"])
        return Score(**{k: v for k, v in value.items() if k not in ("label", "plugins")}, plugins=names)
    split = evaluation.split
    if evaluation.documents is None:
        split.verify()  # a score is of the text that was prepared, an estimate may be of less
    if len(split) < 2:
        raise ConfigError(f"{split.name}: {len(split)} tokens; scoring needs at least 2")
    counted = count_bytes(split, *evaluation.ranges(), evaluation.drawn)  # first: without a rule no pass is worth it
    ledger = Ledger(len(split)) if ledger is None else ledger
    if ledger.tokens != len(split):
        raise LedgerError(f"the ledger is for {ledger.tokens} tokens, the text has {len(split)}: start a new one")
    score_text(engine, evaluation, ledger, plugins=plugins, watch=watch, progress=progress, ranks=ranks, say=say)
    return score_of(evaluation, ledger, counted)


def score_of(evaluation: Evaluation, ledger: Ledger, counted: Bytes | None = None) -> Score:
    """Return what the text of an evaluation cost by what is in a ledger; `counted`: its bytes, if they are known.

    LedgerError for a target that is not scored, ConfigError if no byte rule applies.
    """
    begins, ends = evaluation.ranges()
    drawn, total = evaluation.drawn, len(evaluation.split.document_starts)
    counted = counted or count_bytes(evaluation.split, begins, ends, drawn)
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
        windows=windows_in_words(evaluation, ledger.entries["order"]),
        plugins=evaluation.config.plugins if evaluation.plugins else (),
        adaptation=adaptation_in_words(evaluation.config) if evaluation.adapts else "",
    )


def rank_alone(engine: Any, act: Callable[[], Any]) -> Any:
    """Do something with this rank's engine that the other ranks do not: what adapts must not wait for them."""
    together, engine.ranks = engine.ranks, Alone()
    try:
        return act()
    finally:
        engine.ranks = together


def score_text(
    engine: Scorer,
    evaluation: Evaluation,
    ledger: Ledger,
    *,
    plugins: Sequence[Plugin | Predictor] | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Bring every target of an evaluation into `ledger`: the one scoring path.

    The arguments are those of `score`, which makes a figure of what is in the ledger then.
    """
    if plugins is None:
        plugins = load_plugins(evaluation.config.plugins) if evaluation.plugins and evaluation.config.plugins else ()
    check_plugins(evaluation.config, plugins)
    if evaluation.adapts:
        predictors = [plugin for plugin in plugins if isinstance(plugin, Predictor)]
        kind = StreamPass if evaluation.config.adapt.kind == "sgd" else Adaptation
        scoring = kind(engine, evaluation, ledger, predictors, watch, ranks)
        try:
            scoring.run(progress)
        except LedgerError as error:
            if error.rule != "D8" or not ledger.writes:
                raise
            raise LedgerError(f"{error}; if what learned went too far, take a smaller learning rate", "D8") from error
        if scoring.skipped and say is not None:
            say(
                f"WARNING: {scoring.skipped:,} updates were left out, since loss or gradients were not finite: take a "
                "smaller learning rate"
            )
        return
    session, rows = Session(engine, evaluation, ledger, plugins, watch, ranks), evaluation.rows()
    try:
        if evaluation.carries:
            score_streams(session, rows, progress)
        else:
            _score_windows(session, session.order(rows, 1, len(evaluation.split) - 1), progress)
    finally:
        session.close()


def score_sample(
    engine: Scorer, evaluation: Evaluation, book: Ledger, passes: int, dice: np.random.Generator
) -> Ledger:
    """Return a ledger with a sample of the targets that are in `book`, scored again without plug-ins.

    The sample is of windows, enough for `passes` forward passes, or with carry of streams of about as much text.
    """
    sample = Ledger(len(evaluation.split))
    session, rows = Session(engine, evaluation, sample), evaluation.rows()
    if evaluation.carries and not evaluation.isolated:  # one stream, of which the beginning is there
        rows = rows._replace(length=1 + np.flatnonzero(book.entries["order"])[-1:])
    drawn = dice.permutation(np.flatnonzero(book.written(rows.start + rows.length)))
    wanted = passes * evaluation.config.batch
    drawn = drawn[: 1 + int((np.cumsum(evaluation.passes(rows)[drawn]) < wanted).sum())]
    run = score_streams if evaluation.carries else _score_windows
    run(session, rows.take(np.sort(drawn)), None)
    return sample


def check_plugins(config: EvalConfig, plugins: Sequence[Plugin | Predictor]) -> None:
    """Raise ConfigError for a plug-in that windows with carry cannot honour."""
    for plugin in plugins if config.windows == "stateful" else ():
        if isinstance(plugin, Plugin) and (plugin.kind == "adaptation" or type(plugin).order is not Plugin.order):
            raise ConfigError(
                f"eval.windows=stateful with plug-in {type(plugin).__name__}: the state comes from earlier weights, "
                "and documents have an order of their own: take sliding windows or documents"
            )


def windows_in_words(evaluation: Evaluation, order: np.ndarray) -> str:
    """Return in words how a text was cut, and that plug-ins changed the order if `order`, of its ledger, says so.

    Windows with carry take the longest document first, as they always do; plug-ins have no say in that.
    """
    config, drawn = evaluation.config, evaluation.drawn is not None
    if evaluation.adapts and config.adapt.kind == "lora":
        longest = ", longest document first" if config.adapt.order == "length" else ""
        return f"{config.windows} seq={config.seq} chunk={config.adapt.chunk}{longest}"
    if evaluation.carries:
        return f"stateful seq={config.seq}"
    moved = evaluation.plugins and not drawn and bool((np.diff(order) < 0).any())
    how = f"{'documents' if drawn else config.windows} seq={config.seq} stride={evaluation.stride}"
    return f"{how}, documents in the order of plug-ins" if moved else how


def adaptation_in_words(config: EvalConfig) -> str:
    """Return in words what learns while a text is scored."""
    adapt, at = config.adapt, config.phases.at
    words = f"lr={adapt.lr:g} steps={adapt.steps} chunk={adapt.chunk}, reset={adapt.reset}"
    if adapt.kind == "sgd":
        return f"sgd of {', '.join(adapt.params) or 'all weights'}, {words}"
    kind = f"lora rank={adapt.rank} alpha={adapt.alpha:g} on {', '.join(adapt.sites)}, {adapt.rule} {words}"
    kind += ", warm A" if adapt.warm_a else ""
    return kind + (f"; phases at {', '.join(f'{share:g}' for share in at)} of the documents" if at else "")


def _score_windows(session: Session, windows: Windows, progress: Progress | None) -> None:
    """Score every window that has to be."""
    total = len(windows.start)
    session.rows = size = min(session.rows, max(total, FEWEST))  # not memory for windows that are not there
    session.often = total >= OFTEN * size  # however many are left, and whoever makes them: each pass gives the same
    skipped = total - int(session.todo(windows.start + windows.length).sum())
    for number, turn in session.turns(windows, size):
        if not session.skip(1):
            session.windows(turn)
        if progress is not None:
            progress(skipped + number * size + len(turn.start), total)
