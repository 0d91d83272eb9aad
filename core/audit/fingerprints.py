"""Fingerprints of predictions, and the comparison of two: of a text, and of the same text with a change."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.audit.turns import Turns, turns_of
from core.config import RunConfig
from core.data.dataset import Split
from core.files import new_file, open_file
from core.scoring.plugins import View

BLOCK = 1 << 22
"""Values that a checksum takes at once."""


ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Nats by which rounding may change a prediction that is computed twice, by compute type; more is not rounding."""
HARMLESS = 1e-4
"""Nats that decide no claim, even if they came from the future in every prediction: a fiftieth of what a record must
gain (D15). A larger difference is rounding only if the same text, scored twice, does not repeat its bits."""
RESHAPED = 10
"""Times ROUNDING that rounding may change a prediction where the forward passes have other shapes."""
FAINT = -50.0
"""Lower log-probabilities are taken for this value: what is so unlikely decides nothing."""


class Fingerprints:
    """Keeps a checksum of every prediction of a text of `tokens`, and the first token that the prediction could see.

    For the targets at `places` it keeps the whole distribution.
    """

    def __init__(self, tokens: int, places: Sequence[int] = ()) -> None:
        self.predicted = np.zeros(tokens, np.uint64)
        self.first_input = np.full(tokens, -1, np.int64)
        self.places = np.unique(np.asarray(places, np.int64))
        self.rows = np.zeros((0, 0), np.float32)

    def wants(self, number: int) -> bool:
        """Return that every pass is looked at."""
        return True

    def see(self, view: View, targets: np.ndarray, nats: np.ndarray, logprobs: np.ndarray) -> None:
        """Take the checksums of a pass."""
        scored = view.kept & (view.positions < len(self.predicted))
        places, values = view.positions[scored], logprobs[scored]
        self.predicted[places] = checksums(values)
        firsts = np.broadcast_to(view.positions[:, :1] - 1, view.positions.shape)
        self.first_input[places] = firsts[scored]
        if len(self.places):
            if not len(self.rows):
                self.rows = np.full((len(self.places), values.shape[1]), np.nan, values.dtype)
            asked = np.isin(places, self.places)
            self.rows[np.searchsorted(self.places, places[asked])] = values[asked]

    def save(self, path: Path) -> None:
        """Write the fingerprints as one .npz file."""
        positions = np.flatnonzero(self.first_input >= 0)
        sides = {"predicted": self.predicted[positions], "first_input": self.first_input[positions]}
        with new_file(path, synced=False) as file:
            np.savez(file, positions=positions, places=self.places, rows=self.rows, **sides)

    @classmethod
    def load(cls, path: Path, tokens: int) -> "Fingerprints":
        """Read what `save` wrote of a text of `tokens`; ValueError if the file is of another text."""
        with open_file(path) as file, np.load(file, allow_pickle=False) as sides:
            positions, predicted, firsts, places, rows = (
                sides[n] for n in ("positions", "predicted", "first_input", "places", "rows")
            )
        prints = cls(tokens, places)
        if not (len(positions) == len(predicted) == len(firsts) and rows.ndim == 2 and rows.dtype.kind == "f"):
            raise ValueError(f"{path}: not what was predicted")
        if len(positions) and not 0 <= positions.min() <= positions.max() < tokens:
            raise ValueError(f"{path}: of a text of another length")
        prints.predicted[positions], prints.first_input[positions], prints.rows = predicted, firsts, rows
        return prints


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
    """The predictions of a text, by target position; order 0: not scored, or not looked at."""

    predicted: np.ndarray  # (tokens,) uint64: checksums
    order: np.ndarray  # (tokens,) int64: number of the pass
    first_input: np.ndarray  # (tokens,) int64: the first token that the prediction could see; -1: not looked at
    nats: np.ndarray  # (tokens,) float64
    places: np.ndarray = np.zeros(0, np.int64)  # (places,) int64: targets whose whole distribution was kept
    rows: np.ndarray = np.zeros((0, 0), np.float32)  # (places, V) log-probabilities
    turns: Turns | None = None

    def row(self, place: int) -> np.ndarray | None:
        """Return the log-probabilities (V,) for the target at `place`; None where they were not kept."""
        i = int(np.searchsorted(self.places, place))
        return self.rows[i] if i < len(self.places) and self.places[i] == place else None

    def like(self, other: "Predictions") -> np.ndarray:
        """Return which targets were scored by the same pass and from the same first token on in both, (tokens,)."""
        return (self.order > 0) & (self.order == other.order) & (self.first_input == other.first_input)

    def may_notice(self, places: Sequence[int] | np.ndarray, learns: bool) -> np.ndarray:
        """Return which targets may be predicted otherwise when the tokens at `places` are changed, (tokens,) bool."""
        places = np.asarray(places, np.int64)
        before = np.zeros(len(self.order) + 1, np.int64)  # changed tokens before each
        before[places + 1] = 1
        before = np.cumsum(before)[:-1]
        allowed = before > before[np.maximum(self.first_input, 0)]
        if learns:
            assert self.turns is not None
            allowed |= self.turns.learned(places[self.order[places] > 0])
        return allowed

    def gap(self, other: "Predictions", places: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """Return how far apart two predictions of each target are, in nats, (tokens,).

        The distance is the difference of the target's costs. At `places` the targets themselves differ: there it is
        the largest difference over the vocabulary, inf where the distributions were not kept.
        """
        far = np.abs(self.nats - other.nats)
        for place in np.asarray(places, np.int64).tolist():
            mine, theirs = self.row(place), other.row(place)
            far[place] = np.inf
            if mine is not None and theirs is not None:
                far[place] = np.abs(np.maximum(mine, FAINT) - np.maximum(theirs, FAINT)).max()
        return far


SIDES = ("predicted", "order", "first_input", "nats")
"""Fields of Predictions that have an entry for every target."""


class ChangeEffect(NamedTuple):
    """What a change of some tokens did to the predictions."""

    compared: int
    """Number of predictions that must not change."""
    noticed: int
    """Number of predictions that changed and were free to."""
    wrong: np.ndarray
    """Targets whose prediction changed though it must not, (count,) int64."""
    gaps: np.ndarray
    """Nats by which each of these predictions changed, (count,) float64."""

    def beyond(self, bound: float) -> "ChangeEffect":
        """Return the effect without the predictions that changed by at most `bound` nats."""
        far = ~(self.gaps <= bound)
        return self._replace(wrong=self.wrong[far], gaps=self.gaps[far])


def effect_of(
    base: Predictions, changed: Predictions, places: Sequence[int] | np.ndarray, learns: bool
) -> ChangeEffect:
    """Return what a change of the tokens at `places` did to the predictions of a text.

    A target that is scored in another pass counts as changed: the order must not depend on the tokens.
    """
    same = base.like(changed)
    allowed = base.may_notice(places, learns) & same
    differs = (base.predicted != changed.predicted) | ~same
    scored = (base.order > 0) | (changed.order > 0)
    fixed = scored & ~allowed
    wrong = np.flatnonzero(fixed & differs)
    gaps = np.where(same, base.gap(changed, places), np.inf)[wrong]
    return ChangeEffect(int(fixed.sum()), int((scored & differs & allowed).sum()), wrong, gaps)


def effect_of_end(ended: Predictions, went_on: Predictions, learns: bool) -> ChangeEffect | None:
    """Return what changed where a document goes on instead of ending; `ended` ends with the last target in question.

    None if the two cannot be compared: with plug-ins the passes before must be the same, or the plug-ins have learned
    something else.
    """
    place = len(ended.order) - 1
    end, rest = ended.order[place], went_on.order[place + 1 :]
    went_on = went_on._replace(**{name: getattr(went_on, name)[: place + 1] for name in SIDES})
    fixed = (ended.order > 0) & (went_on.order > 0) & (ended.first_input == went_on.first_input)
    if learns:
        early = (ended.order < end) | (went_on.order < end)
        if (ended.order != went_on.order)[early].any() or (rest < end).any():
            return None
        fixed &= (ended.order <= end) & (went_on.order <= end)
    if not fixed[place]:
        return None
    wrong = np.flatnonzero(fixed & (ended.predicted != went_on.predicted))
    return ChangeEffect(int(fixed.sum()), 0, wrong, ended.gap(went_on, [place])[wrong])


def predictions_from(prints: Fingerprints, entries: np.ndarray, text: Split, config: RunConfig) -> Predictions:
    """Return the predictions that a scoring pass left in the fingerprints and in the ledger."""
    order, nats = (np.append(0, entries[name]) for name in ("order", "nats"))
    firsts, order = first_inputs(prints.first_input, text, config), order.astype(np.int64)
    turns = turns_of(text, config, order)
    return Predictions(prints.predicted, order, firsts, nats, prints.places, prints.rows, turns)


def first_inputs(of_windows: np.ndarray, text: Split, config: RunConfig) -> np.ndarray:
    """Return the first token that each prediction could see: of its window or, with carry, of its document."""
    if config.eval.windows != "stateful":
        return of_windows
    starts = text.document_starts if config.model.documents == "isolated" else np.zeros(1, np.int64)
    inputs = np.maximum(np.arange(len(of_windows)) - 1, 0)
    return np.where(of_windows >= 0, starts[np.searchsorted(starts, inputs, "right") - 1], -1)
