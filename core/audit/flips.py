"""The flip test: change one token of a text and see which predictions notice, through the whole scoring path.

A prediction may change only if the changed token was in its context (an earlier input of its window or stream), or was
scored in an earlier forward pass, from which plug-ins may have learned. Every other prediction, that of the changed
target itself included, must have the same bits, over the whole vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import rng
from core.audit.rules import Progress
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


class Predictions(NamedTuple):
    """What was predicted of a text and when, by target position; order 0: not scored, or not looked at."""

    predicted: np.ndarray  # (tokens,) uint64: checksums
    order: np.ndarray  # (tokens,) int64: number of the pass
    first_input: np.ndarray  # (tokens,) int64: the first token that the prediction could see
    nats: np.ndarray  # (tokens,) float64

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(*(file[name] for name in cls._fields))

    def save(self, path: Path) -> None:
        """Write the arrays as one .npz file."""
        np.savez(path, **self._asdict())

    def first(self, tokens: int) -> "Predictions":
        """Return the predictions of the first `tokens` tokens, filled up if there are fewer."""
        kept = [np.concatenate([side[:tokens], np.zeros(max(0, tokens - len(side)), side.dtype)]) for side in self]
        return Predictions(*kept)

    def like(self, other: "Predictions") -> np.ndarray:
        """Return which targets were scored by the same pass and from the same first token on in both, (tokens,)."""
        return (self.order > 0) & (self.order == other.order) & (self.first_input == other.first_input)

    def may_notice(self, places: list[int], learns: bool) -> np.ndarray:
        """Return which targets may be predicted otherwise when the tokens at `places` are changed, (tokens,) bool."""
        targets = np.arange(len(self.order))
        allowed = np.zeros(len(targets), bool)
        for place in places:
            allowed |= (self.first_input <= place) & (place < targets)
        if learns:
            allowed |= self.order > min(int(self.order[place]) for place in places)
        return allowed


class Effect(NamedTuple):
    """What a change of some tokens did to the predictions."""

    compared: int
    """Predictions that had to keep their bits."""
    noticed: int
    """Predictions that changed, and could."""
    wrong: np.ndarray
    """Targets whose prediction changed and must not, (count,) int64."""


def compare(base: Predictions, changed: Predictions, places: list[int], learns: bool, whole: bool) -> Effect:
    """Return what changing the tokens at `places` did.

    `whole`: both are of one text from end to end, so a target that is scored at another time is wrong as well: the
    order of scoring must not depend on the text that is scored. Otherwise such targets are left out.
    """
    same, allowed = base.like(changed), base.may_notice(places, learns)
    differs = base.predicted != changed.predicted
    if whole:
        scored = (base.order > 0) | (changed.order > 0)
        allowed, differs = allowed & same, differs | ~same
    else:
        scored = same
    held = scored & ~allowed
    return Effect(int(held.sum()), int((scored & differs & allowed).sum()), np.flatnonzero(held & differs))


def predict(engine: Engine, text: Split, config: RunConfig, plugins: bool) -> Predictions:
    """Score a piece of text in one pass, with the plug-ins of `config` or without, and return what was predicted."""
    ledger, prints = Ledger(len(text)), Prints(len(text))
    isolated, vocab = config.model.documents == "isolated", config.model.vocab
    used = load_plugins(config.eval.plugins) if plugins else []
    score_text(engine, text, config.eval, ledger, None, isolated, used, vocab, prints)
    order, nats = (np.append(0, ledger.entries[name]) for name in ("order", "nats"))
    return Predictions(prints.predicted, order, first_inputs(prints.first_input, text, config), nats)


def first_inputs(of_windows: np.ndarray, text: Split, config: RunConfig) -> np.ndarray:
    """Return the first token that each prediction could see: of its window or, with carry, of its document."""
    if config.eval.windows != "stateful":
        return of_windows
    starts = text.document_starts if config.model.documents == "isolated" else np.zeros(1, np.int64)
    inputs = np.maximum(np.arange(len(of_windows)) - 1, 0)
    return starts[np.searchsorted(starts, inputs, "right") - 1]


def flip_test(
    engine: Engine, split: Split, config: RunConfig, flips: int, seed: int, progress: Progress
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
            base = predict(engine, text, config, learns)
            done += 1
            if number == 0:
                again = predict(engine, text, config, learns)
                value["repeatable"] = bool((again.predicted == base.predicted).all())
                done += 1
            progress(done, total)
            for i in range(number, flips, len(pieces)):
                place, token = _flip(text, base, config, seed, f"{number}/{i}")
                changed = predict(engine, split.changed(start, stop, place, token), config, learns)
                _add(value, compare(base, changed, [place], learns, True), place, start)
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


def _flip(text: Split, base: Predictions, config: RunConfig, seed: int, name: str) -> tuple[int, int]:
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


def _add(value: dict[str, Any], effect: Effect, place: int, start: int) -> None:
    """Add to `value` what a flip at `place`, of a piece that begins at `start`, did."""
    value["flips"] += 1
    value["compared"] += effect.compared
    value["noticed"] += effect.noticed
    value["wrong_count"] += len(effect.wrong)
    for target in effect.wrong[: max(0, 3 - len(value["wrong"]))].tolist():
        value["wrong"].append({"token": start + place, "target": start + target})


def _clean_without(
    engine: Engine, split: Split, config: RunConfig, piece: tuple[int, int], place: int, token: int
) -> bool:
    """Return whether the model alone, without plug-ins, passes this flip."""
    base = predict(engine, split.changed(*piece), config, False)
    changed = predict(engine, split.changed(*piece, place, token), config, False)
    return not len(compare(base, changed, [place], False, True).wrong)
