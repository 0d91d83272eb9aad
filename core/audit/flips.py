"""The flip test: change one token of a text and see which predictions notice, through the whole scoring path.

A prediction may change only if the changed token was in its context (an earlier input of its window or stream), or was
scored in an earlier forward pass, from which plug-ins may have learned. Every other prediction, that of the changed
target itself included, must have the same bits, over the whole vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from core import rng
from core.config import RunConfig
from core.data import Split
from core.engine import Engine
from core.scoring import score_text
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import View, load_plugins

TEXTS = 2
"""Places of the text that are tested."""
PASSES = 3
"""Forward passes of each run: plug-ins must have learned something by the last one."""
BLOCK = 1 << 22
"""Values that a checksum takes at once."""


class Prints:
    """Remembers a checksum of the predictions for the targets before `tokens`, and what each of them could see."""

    def __init__(self, tokens: int) -> None:
        self.predicted = np.zeros(tokens, np.uint64)
        self.first_input = np.full(tokens, -1, np.int64)

    def wants(self, number: int) -> bool:
        """Look at every pass."""
        return True

    def see(self, view: View, targets: np.ndarray, nats: np.ndarray, logprobs: np.ndarray) -> None:
        """Take the checksums of a pass."""
        kept = view.kept & (view.positions < len(self.predicted))
        places = view.positions[kept]
        self.predicted[places] = checksums(logprobs[kept])
        firsts = np.broadcast_to(view.positions[:, :1] - 1, view.positions.shape)
        self.first_input[places] = firsts[kept]


def checksums(values: np.ndarray) -> np.ndarray:
    """Return a 64-bit checksum of the bits of every row of (rows, V)."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    columns = np.arange(1, bits.shape[1] + 1, dtype=np.uint64)
    factors = (columns * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    out = np.empty(len(bits), np.uint64)
    step = max(1, BLOCK // bits.shape[1])
    for i in range(0, len(bits), step):
        mixed = bits[i : i + step].astype(np.uint64) * factors
        out[i : i + step] = (mixed ^ (mixed >> np.uint64(29))).sum(1, dtype=np.uint64)
    return out


class Run:
    """One scoring pass over a piece of text: what was predicted, and when each target was scored."""

    def __init__(self, engine: Engine, text: Split, config: RunConfig, plugins: bool) -> None:
        ledger, prints = Ledger(len(text)), Prints(len(text))
        isolated, vocab = config.model.documents == "isolated", config.model.vocab
        used = load_plugins(config.eval.plugins) if plugins else []
        score_text(engine, text, config.eval, ledger, None, isolated, used, vocab, prints)
        self.predicted = prints.predicted
        self.order = np.append(0, ledger.entries["order"])
        self.nats = np.append(0.0, ledger.entries["nats"])
        self.first_input = first_inputs(prints.first_input, text, config)


def first_inputs(of_windows: np.ndarray, text: Split, config: RunConfig) -> np.ndarray:
    """Return the first token that each prediction could see: of its window or, with carry, of its document."""
    if config.eval.windows != "stateful":
        return of_windows
    starts = text.document_starts if config.model.documents == "isolated" else np.zeros(1, np.int64)
    inputs = np.maximum(np.arange(len(of_windows)) - 1, 0)
    return starts[np.searchsorted(starts, inputs, "right") - 1]


def may_notice(run: Run, place: int, learns: bool) -> np.ndarray:
    """Return which targets of `run` may be predicted otherwise when the token at `place` is changed, (tokens,) bool."""
    targets = np.arange(len(run.order))
    in_context = (run.first_input <= place) & (place < targets)
    learned = (run.order > run.order[place]) if learns else np.zeros(len(targets), bool)
    return in_context | learned


def flip_test(
    engine: Engine, split: Split, config: RunConfig, flips: int, seed: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Flip `flips` tokens at random places and return what noticed, as plain JSON values."""
    learns = bool(config.eval.plugins)
    pieces = _pieces(split, config, seed)
    value: dict[str, Any] = {
        "flips": 0, "compared": 0, "noticed": 0, "wrong": [], "wrong_count": 0, "by_plugins": False, "repeatable": True,
        "broken": None, "tokens": [int(stop - start) for start, stop in pieces], "learns": learns,
    }  # fmt: skip
    total = flips + len(pieces) + 1
    done = 0
    try:
        for number, (start, stop) in enumerate(pieces):
            text = split.changed(start, stop)
            base = Run(engine, text, config, learns)
            done += 1
            if number == 0:
                again = Run(engine, text, config, learns)
                value["repeatable"] = bool((again.predicted == base.predicted).all())
                done += 1
            progress(done, total)
            for i in range(number, flips, len(pieces)):
                place, token = _flip(text, base, config, seed, f"{number}/{i}")
                changed = Run(engine, split.changed(start, stop, place, token), config, learns)
                _compare(value, base, changed, place, start, learns)
                done += 1
                progress(done, total)
                if value["wrong"] and learns and not value["by_plugins"]:
                    value["by_plugins"] = _clean_without(engine, split, config, (start, stop), place, token)
    except LedgerError as error:
        if error.rule is None:
            raise
        value["broken"] = {"rule": error.rule, "message": str(error)}
    return value


def _pieces(split: Split, config: RunConfig, seed: int) -> list[tuple[int, int]]:
    """Return ranges of the text, each from the start of a document on, long enough for PASSES forward passes."""
    settings = config.eval
    stride = settings.stride or settings.seq
    length = PASSES * settings.batch * stride + settings.seq - stride
    starts = split.document_starts
    last = max(1, int(np.searchsorted(starts, max(len(split) - length, 0), "right")))
    picks = rng.choose(seed, "audit/pieces", last, min(TEXTS, last))
    return [(int(starts[i]), min(len(split), int(starts[i]) + length + 1)) for i in sorted(picks.tolist())]


def _flip(text: Split, base: Run, config: RunConfig, seed: int, name: str) -> tuple[int, int]:
    """Return a place, away from the end and not a document's start, and another token for it."""
    tokens, bos, vocab = text.read(0, len(text)), config.model.bos, config.model.vocab
    places = np.flatnonzero(tokens[: max(2, 3 * len(tokens) // 4)] != bos)
    places = places[places > 0]
    place = int(places[rng.below(seed, f"audit/place/{name}", len(places))])
    for draw in range(100):
        token = rng.below(seed, f"audit/token/{name}/{draw}", vocab)
        if token not in (bos, int(tokens[place])):
            break
    return place, token


def _compare(value: dict[str, Any], base: Run, changed: Run, place: int, start: int, learns: bool) -> None:
    """Add to `value` what a flip did."""
    differs = base.predicted != changed.predicted
    differs[0] = False
    allowed = may_notice(base, place, learns)
    if (base.order != changed.order).any():  # the order of scoring itself must not depend on the text that is scored
        allowed &= base.order == changed.order
        differs |= base.order != changed.order
    wrong = np.flatnonzero(differs & ~allowed)
    value["flips"] += 1
    value["compared"] += int((~allowed).sum()) - 1
    value["noticed"] += int((differs & allowed).sum())
    value["wrong_count"] += len(wrong)
    for target in wrong[: max(0, 3 - len(value["wrong"]))].tolist():
        value["wrong"].append({"token": start + place, "target": start + target})


def _clean_without(
    engine: Engine, split: Split, config: RunConfig, piece: tuple[int, int], place: int, token: int
) -> bool:
    """Return whether the model alone, without plug-ins, passes this flip."""
    base = Run(engine, split.changed(*piece), config, False)
    changed = Run(engine, split.changed(*piece, place, token), config, False)
    differs = base.predicted != changed.predicted
    differs[0] = False
    return not (differs & ~may_notice(base, place, False)).any()
