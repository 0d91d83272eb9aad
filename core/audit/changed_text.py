"""Scores a changed text in fresh processes: no prediction may depend on text that it had not been shown.

The flip test runs inside the evaluation's process, where the whole text is, and after the score. So fresh processes
score the text once more, changed, in folders of their own, while the real text is hidden. Their predictions are
compared with those of the evaluation, which could not know what would be changed:

* up to a forward pass that is drawn after the evaluation has ended: some targets of that pass are other tokens, and so
  is everything that is scored after it. Predictions that no change could reach must be those of the evaluation;
* with plug-ins, random tokens all over the text: nobody can predict them, in whatever passes they are (`guesses`).
"""

import itertools
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.audit.fingerprints import HARMLESS, Predictions, checksums
from core.audit.flips import PASSES
from core.config import RunConfig
from core.data.dataset import Dataset
from core.data.shards import shard_record, shard_type, write_shard
from core.files import new_file, read_file, replace_file
from core.training.run import MAX_TOKENIZER

CUTS = 3
"""Forward passes that are drawn where there are plug-ins, one in each of as many parts of the text."""
CHANGES = 64
"""Most targets of the drawn pass that are changed; of as many others the whole distribution is asked for too."""
SHARE = 1 / 16
"""Share of the tokens that are random in the last text."""
STAKE = 0.05
"""Share of its money that the bet stakes on each random token."""
SURE = float(np.log(1e6))
"""Logarithm of the money that is no luck: of one million honest audits, one bet turns 1 into so much."""


class Rescoring(NamedTuple):
    """What a fresh process is to score, and what it is to answer."""

    folder: Path
    """Prepared folder."""
    stop: int | None
    """The last forward pass to compute; None: all."""
    places: tuple[int, ...]
    """Targets whose whole distribution is to be written down."""


Score = Callable[[Rescoring], Predictions | None]
"""Scores in a fresh process and returns the predictions, or None if that failed."""


def write_changed(dataset: Dataset, tokens: np.ndarray, folder: Path) -> None:
    """Write other validation tokens, with the same BOS, as a prepared folder without training text."""
    folder.mkdir(parents=True)
    write_shard(str(folder / "val_000000.bin"), tokens, shard_type(dataset.tokenizer.vocab))
    tokenizer = Path(dataset.path) / dataset.manifest["tokenizer"]["file"]
    replace_file(folder / "tokenizer.model", read_file(tokenizer, MAX_TOKENIZER))
    entry = {
        **dataset.manifest["splits"]["val"],
        "files": [shard_record(str(folder / "val_000000.bin"), len(tokens))],
        "document_bytes": None,
        "token_bytes": None,
    }
    if dataset.val.document_bytes is not None:
        with new_file(folder / "val_document_bytes.npy") as file:
            np.save(file, np.asarray(dataset.val.document_bytes, "<i8"))
        entry["document_bytes"] = "val_document_bytes.npy"
    manifest = {
        **dataset.manifest,
        "tokenizer": {**dataset.manifest["tokenizer"], "file": "tokenizer.model"},
        "splits": {**dataset.manifest["splits"], "val": entry},
    }
    replace_file(folder / "manifest.json", json.dumps(manifest).encode())


def draw_passes(total: int, learns: bool, resumed: int) -> list[int]:
    """Draw the forward passes, of `total`, up to which the text is scored again: nobody can know them beforehand.

    Without plug-ins a pass knows nothing of the passes before it, so that PASSES are as good as all. With plug-ins all
    that was in the ledger when the evaluation went on from it (`resumed` passes) is scored again.
    """
    if not learns:
        return [min(PASSES, total)]
    bounds = [total * i // CUTS for i in range(CUTS + 1)]
    bounds[-2] = max(bounds[-2], min(resumed, total - 1))
    return [1 + a + secrets.randbelow(b - a) for a, b in itertools.pairwise(bounds) if a < b]


def check_again(
    score: Score, dataset: Dataset, config: RunConfig, first: Predictions, folder: Path, bound: float, agree: float,
    resumed: int,
) -> dict[str, Any]:  # fmt: skip
    """Score the text again with tokens changed and return which predictions noticed, as plain JSON values.

    `first`: what the evaluation predicted; `bound`: nats by which rounding may change a prediction; `agree`: nats by
    which rounding may part a cost and its distribution; `resumed`: forward passes that were in the ledger already.
    """
    learns = config.eval.learns
    test = _ChangedText(score, dataset, config.model.bos, learns, first, folder, resumed > 0 and not learns)
    test.value |= {"rounding": bound, "rows": {"count": 0, "sum": 0.0, "cost": 0.0, "limit": agree, "genuine": True}}
    if all(test.change_from(stop) for stop in draw_passes(int(first.order.max()), learns, resumed)) and learns:
        test.change_at_random()
    return test.value


class _ChangedText:
    """A text that fresh processes score with tokens changed; `value` says what came out."""

    def __init__(
        self, score: Score, dataset: Dataset, bos: int, learns: bool, first: Predictions, folder: Path, reordered: bool
    ) -> None:
        """`reordered`: passes may have other numbers than in `first`, as the evaluation was killed between them."""
        self._score, self._dataset, self._bos, self._folder = score, dataset, bos, folder
        self._learns, self._first, self._reordered = learns, first, reordered
        self._tokens = dataset.val.read(0, len(dataset.val))
        self._dice = np.random.default_rng(secrets.randbits(128))
        self._chances = token_chances(self._tokens, dataset.tokenizer.vocab, [bos, dataset.tokenizer.unknown])
        self.value: dict[str, Any] = {
            "tokens": len(dataset.val), "error": False, "stops": [], "changed": [], "compared": 0, "noticed": 0,
            "differ": 0, "explained": 0.0, "largest_gap": 0.0, "wrong": None, "repeatable": True, "guesses": None,
        }  # fmt: skip

    def change_from(self, stop: int) -> bool:
        """Change targets of pass `stop` and all after it; return whether the predictions before did not notice."""
        value, first, tokens = self.value, self._first, self._tokens
        drawn = draw_targets(first, tokens, self._bos, stop, self._dice)
        text = np.where((first.order > stop) & (tokens != self._bos), self._random(), tokens)
        for place in drawn.tolist():
            while text[place] == tokens[place]:
                text[place] = self._dice.choice(len(self._chances), p=self._chances)
        others = self._dice.permutation(np.flatnonzero(first.order == stop))[: len(drawn)]
        again = self._scored(text, stop, np.union1d(drawn, others))
        if again is None:
            return False
        value["stops"].append(stop)
        value["changed"] += drawn.tolist()
        self._check_rows(again)
        comparable = self._compare(again, text, stop)
        if value["wrong"] is None and value["explained"] > HARMLESS and value["repeatable"]:
            same = self._scored(tokens, stop)  # is it rounding, which comes without a change as well?
            if same is None:
                return False
            value["repeatable"] = bool((same.predicted == first.predicted)[comparable].all())
            if value["repeatable"]:
                value["wrong"] = {"by": "bits", "count": value["differ"], "target": int(np.flatnonzero(comparable)[-1])}
        return value["wrong"] is None

    def change_at_random(self) -> None:
        """Put random tokens all over the text, and see whether anybody could predict them."""
        tokens, random = self._tokens, self._random()
        put = (self._dice.random(len(tokens)) < SHARE) & (tokens != self._bos) & (np.arange(len(tokens)) > 0)
        again = self._scored(np.where(put, random, tokens), None)
        if again is not None:
            put &= again.order > 0
            self.value["guesses"] = guesses(again.nats[put], self._chances[random[put]])

    def _random(self) -> np.ndarray:
        """Draw as many tokens as the text has."""
        return self._dice.choice(len(self._chances), len(self._tokens), p=self._chances).astype(self._tokens.dtype)

    def _scored(self, text: np.ndarray, stop: int | None, places: np.ndarray | None = None) -> Predictions | None:
        folder = self._folder / secrets.token_hex(8)  # a name that told the test from the evaluation would help a cheat
        write_changed(self._dataset, text, folder)
        again = self._score(Rescoring(folder, stop, () if places is None else tuple(places.tolist())))
        self.value["error"] |= again is None
        return again

    def _check_rows(self, again: Predictions) -> None:
        """Check whole distributions: each is normalised, has the evaluation's checksum, and gives the ledger's cost.

        The evaluation gave the checksums before anybody knew which distributions would be asked for.
        """
        first, tokens, totals = self._first, self._tokens, self.value["rows"]
        rows, places = again.rows.astype(np.float64), again.places
        if rows.shape != (len(places), totals.setdefault("vocabulary", rows.shape[-1])):
            totals["genuine"] = False
            return
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.abs(np.log(np.exp(rows).sum(-1)))
        costs = np.abs(-rows[np.arange(len(places)), tokens[places]] - first.nats[places])
        same = (again.predicted == first.predicted)[places]  # others may have changed with what they could see
        totals["count"] += len(places)
        totals["sum"] = max(totals["sum"], float(np.nan_to_num(sums, nan=np.inf).max(initial=0.0)))
        totals["cost"] = max(totals["cost"], float(np.nan_to_num(costs[same], nan=np.inf).max(initial=0.0)))
        totals["genuine"] &= bool((checksums(again.rows) == again.predicted[places]).all())

    def _compare(self, again: Predictions, text: np.ndarray, stop: int) -> np.ndarray:
        """Compare the predictions up to pass `stop` that no change could reach; return those with bits, (tokens,)."""
        value, first, tokens = self.value, self._first, self._tokens
        places = np.flatnonzero(tokens != text)
        scored, known = (first.order > 0) & (first.order <= stop), first.first_input >= 0
        allowed = again.may_notice(places, self._learns)
        same = ((first.order == again.order) | self._reordered) & (again.order > 0)
        same &= ~known | (first.first_input == again.first_input)
        gap = np.abs(first.nats - again.nats)
        limit = np.full(len(tokens), value["rounding"])
        for place in places[first.order[places] <= stop].tolist():  # the cost of what was there before
            row = again.row(place)
            gap[place] = np.inf if row is None else abs(-row[tokens[place]] - first.nats[place])
            limit[place] = max(value["rounding"], value["rows"]["limit"])
        fixed = scored & ~allowed & ((again.order > 0) | (not self._reordered))
        gap = np.where(same, gap, np.inf)
        wrong = np.flatnonzero(fixed & ~(gap <= limit))
        differs = known & (first.predicted != again.predicted)
        value["compared"] += int(fixed.sum())
        noticed = np.where(known, differs, np.abs(first.nats - again.nats) > value["rounding"])
        value["noticed"] += int((scored & allowed & (again.order > 0) & noticed).sum())
        value["differ"] += int((fixed & differs).sum())
        value["largest_gap"] = max(value["largest_gap"], float(np.minimum(gap[fixed], 1e9).max(initial=0.0)))
        near = fixed & (gap <= value["rounding"]) & (limit == value["rounding"])
        value["explained"] = max(value["explained"], float(gap[near].max(initial=0.0)))
        if len(wrong):
            value["wrong"] = {"by": "size", "count": len(wrong), "target": int(wrong[0])}
        return fixed & known


def draw_targets(first: Predictions, tokens: np.ndarray, bos: int, stop: int, dice: np.random.Generator) -> np.ndarray:
    """Draw the targets of pass `stop` that are changed: one of each window where windows are known, at most CHANGES."""
    places = np.flatnonzero((first.order == stop) & (tokens != bos))
    places = dice.permutation(places[places > 0])
    if not (first.first_input[places] < 0).any():
        places = dice.permutation(places[np.unique(first.first_input[places], return_index=True)[1]])
    return places[:CHANGES]


def token_chances(tokens: np.ndarray, vocab: int, never: Sequence[int]) -> np.ndarray:
    """Return the chance of each token to be put in, (vocab,): half as in the text, half even; 0 for `never`."""
    counts, even = np.bincount(tokens, minlength=vocab).astype(np.float64), np.ones(vocab)
    never = [token for token in never if token >= 0]  # nothing is unknown to a tokenizer of bytes
    counts[never] = even[never] = 0
    chances = counts / max(counts.sum(), 1) + even / even.sum()
    return chances / chances.sum()


def guesses(nats: np.ndarray, chances: np.ndarray) -> dict[str, Any]:
    """Return how much money a bet on the predictions of random tokens makes of 1, as plain JSON values.

    A token is drawn with its chance whatever came before. So the probability that a prediction gave it, divided by its
    chance, is at most 1 on average for everybody who does not know the token: a fair bet. By Ville's inequality the
    money ever exceeds 1 / a with a probability of a at most.
    """
    odds = np.exp(-nats) / chances
    return {"tokens": len(nats), "log_money": float(np.log1p(STAKE * (odds - 1)).sum()), "sure": SURE}
