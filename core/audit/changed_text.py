"""The changed text in a process of its own: what was scored must not know what it had not been shown.

The flip test runs inside the evaluation's process, where the whole text is, and after the score. So fresh processes get
the text once more in folders of their own, while the real one is hidden, and what they predict is held to what the
evaluation said when it could not know what would be changed:

* up to a forward pass that is drawn after the evaluation has ended; some of its targets are other tokens then, and so
  is all that is scored after it. Predictions that could not have seen a change must be those of the evaluation;
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
from core.data.shards import shard_record, write_shard
from core.files import new_file, read_file, replace_file
from core.training.run import MAX_TOKENIZER

CUTS = 3
"""Forward passes that are drawn where there are plug-ins, one in each of as many parts of the text."""
CHANGES = 64
"""Targets of the drawn pass that are changed, at most; as many others are asked for their whole distributions too."""
SHARE = 1 / 16
"""Random tokens among all."""
STAKE = 0.05
"""Share of its money that the bet on the random tokens stakes on each."""
SURE = float(np.log(1e6))
"""Logarithm of what a bet must have made of 1 to be no luck: it does so once in a million honest audits."""


class Asked(NamedTuple):
    """What a fresh process is given to score and what it is asked for."""

    folder: Path
    """Prepared folder."""
    stop: int | None
    """The last forward pass to make; None: all."""
    places: tuple[int, ...]
    """Targets whose whole distribution is to be kept."""


Score = Callable[[Asked], Predictions | None]
"""Scores in a fresh process; None: it failed."""


def write_changed(dataset: Dataset, tokens: np.ndarray, folder: Path) -> None:
    """Write other validation tokens, with the same BOS, as a prepared folder without training text."""
    folder.mkdir(parents=True)
    write_shard(str(folder / "val_000000.bin"), tokens)
    tokenizer = Path(dataset.path) / dataset.manifest["tokenizer"]["file"]
    replace_file(folder / "tokenizer.model", read_file(tokenizer, MAX_TOKENIZER))
    entry = {
        **dataset.manifest["splits"]["val"],
        "files": [shard_record(str(folder / "val_000000.bin"), len(tokens))],
        "document_bytes": None,
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
    """Return the forward passes, of `total`, up to which the text is scored again; nobody can know them before.

    Without plug-ins a pass knows nothing of those before it, and PASSES are as good as all. What was in the ledger when
    the evaluation went on from it is scored again as a whole where there are plug-ins.
    """
    if not learns:
        return [min(PASSES, total)]
    bounds = [total * i // CUTS for i in range(CUTS + 1)]
    bounds[-2] = max(bounds[-2], min(resumed, total - 1))
    return [1 + a + secrets.randbelow(b - a) for a, b in itertools.pairwise(bounds) if a < b]


def check_again(
    score: Score,
    dataset: Dataset,
    config: RunConfig,
    first: Predictions,
    folder: Path,
    bound: float,
    agree: float,
    resumed: int,
) -> dict[str, Any]:
    """Score the text again with tokens changed and return what noticed, as plain JSON values.

    `first`: what the evaluation predicted; `bound`: nats that rounding may make, `agree`: the same between a cost and
    its distribution; `resumed`: forward passes that the evaluation found in its ledger.
    """
    learns = bool(config.eval.plugins)
    value: dict[str, Any] = {
        "tokens": len(dataset.val), "rounding": bound, "error": False, "stops": [], "changed": [], "compared": 0,
        "noticed": 0, "differ": 0, "explained": 0.0, "largest_gap": 0.0, "wrong": None, "repeatable": True,
        "guesses": None, "rows": {"count": 0, "sum": 0.0, "cost": 0.0, "limit": agree, "genuine": True},
    }  # fmt: skip
    tokens, bos = dataset.val.read(0, len(dataset.val)), config.model.bos
    dice = np.random.default_rng(secrets.randbits(128))
    chances = token_chances(tokens, dataset.tokenizer.vocab, [bos, dataset.tokenizer.unknown])

    def scored(text: np.ndarray, stop: int | None, places: np.ndarray) -> Predictions | None:
        place = folder / secrets.token_hex(8)  # a name that told the test from the evaluation would help a cheat
        write_changed(dataset, text, place)
        found = score(Asked(place, stop, tuple(places.tolist())))
        value["error"] |= found is None
        return found

    for stop in draw_passes(int(first.order.max()), learns, resumed):
        drawn = draw_targets(first, tokens, bos, stop, dice)
        random = dice.choice(len(chances), len(tokens), p=chances).astype(tokens.dtype)
        text = np.where((first.order > stop) & (tokens != bos), random, tokens)
        for place in drawn.tolist():
            while text[place] == tokens[place]:
                text[place] = dice.choice(len(chances), p=chances)
        others = dice.permutation(np.flatnonzero(first.order == stop))[: len(drawn)]
        found = scored(text, stop, np.union1d(drawn, others))
        if found is None:
            return value
        value["stops"].append(stop)
        value["changed"] += drawn.tolist()
        _open(value, first, found, tokens)
        held = _hold(value, first, found, tokens, text, stop, learns, resumed > 0 and not learns)
        if value["wrong"] is None and value["explained"] > HARMLESS and value["repeatable"]:
            same = scored(tokens, stop, np.zeros(0, np.int64))  # is it rounding, which comes without a change as well?
            if same is None:
                return value
            value["repeatable"] = bool((same.predicted == first.predicted)[held].all())
            if value["repeatable"]:
                value["wrong"] = {"by": "bits", "count": value["differ"], "target": int(np.flatnonzero(held)[-1])}
        if value["wrong"] is not None:
            return value
    if learns:
        put = (dice.random(len(tokens)) < SHARE) & (tokens != bos) & (np.arange(len(tokens)) > 0)
        random = dice.choice(len(chances), len(tokens), p=chances).astype(tokens.dtype)
        found = scored(np.where(put, random, tokens), None, np.zeros(0, np.int64))
        if found is not None:
            put &= found.order > 0
            value["guesses"] = guesses(found.nats[put], chances[random[put]])
    return value


def draw_targets(first: Predictions, tokens: np.ndarray, bos: int, stop: int, dice: np.random.Generator) -> np.ndarray:
    """Return which targets of pass `stop` are changed: one of each of some of its windows, at random."""
    places = np.flatnonzero((first.order == stop) & (tokens != bos))
    places = dice.permutation(places[places > 0])
    if not (first.first_input[places] < 0).any():
        places = dice.permutation(places[np.unique(first.first_input[places], return_index=True)[1]])
    return places[:CHANGES]


def token_chances(tokens: np.ndarray, vocab: int, never: Sequence[int]) -> np.ndarray:
    """Return the chances of each token but `never` to be put in, (vocab,): half as in the text, to surprise nobody."""
    counts, even = np.bincount(tokens, minlength=vocab).astype(np.float64), np.ones(vocab)
    counts[never] = even[never] = 0
    chances = counts / max(counts.sum(), 1) + even / even.sum()
    return chances / chances.sum()


def guesses(nats: np.ndarray, chances: np.ndarray) -> dict[str, Any]:
    """Return what betting on the prediction of random tokens makes of 1, as plain JSON values.

    A token is drawn with its chance whatever came before, so that the probability that it was given, divided by the
    chance, is 1 on average, or less, for everybody who does not know it: a fair bet. By Ville's inequality the money
    ever exceeds 1 / a with a probability of a at most.
    """
    odds = np.exp(-nats) / chances
    return {"tokens": len(nats), "log_money": float(np.log1p(STAKE * (odds - 1)).sum()), "sure": SURE}


def _open(value: dict[str, Any], first: Predictions, found: Predictions, tokens: np.ndarray) -> None:
    """Look at whole distributions: are they normalised, those that were announced, and what the ledger's costs are of?

    The evaluation gave their checksums before anybody knew which would be asked for.
    """
    rows, places, seen = found.rows.astype(np.float64), found.places, value["rows"]
    if rows.shape != (len(places), seen.setdefault("vocabulary", rows.shape[-1])):
        seen["genuine"] = False
        return
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.abs(np.log(np.exp(rows).sum(-1)))
    costs = np.abs(-rows[np.arange(len(places)), tokens[places]] - first.nats[places])
    held = (found.predicted == first.predicted)[places]  # others may have changed with what they could see
    seen["count"] += len(places)
    seen["sum"] = max(seen["sum"], float(np.nan_to_num(sums, nan=np.inf).max(initial=0.0)))
    seen["cost"] = max(seen["cost"], float(np.nan_to_num(costs[held], nan=np.inf).max(initial=0.0)))
    seen["genuine"] &= bool((checksums(found.rows) == found.predicted[places]).all())


def _hold(
    value: dict[str, Any],
    first: Predictions,
    found: Predictions,
    tokens: np.ndarray,
    text: np.ndarray,
    stop: int,
    learns: bool,
    reordered: bool,
) -> np.ndarray:
    """Compare the predictions up to pass `stop` that could not see a change; return which had bits to be compared.

    `reordered`: passes may have other numbers, as the evaluation was killed between them.
    """
    places = np.flatnonzero(tokens != text)
    scored, known = (first.order > 0) & (first.order <= stop), first.first_input >= 0
    allowed = found.may_notice(places, learns)
    same = ((first.order == found.order) | reordered) & (found.order > 0)
    same &= ~known | (first.first_input == found.first_input)
    gap = np.abs(first.nats - found.nats)
    limit = np.full(len(tokens), value["rounding"])
    for place in places[first.order[places] <= stop].tolist():  # the cost of what was there before
        row = found.row(place)
        gap[place] = np.inf if row is None else abs(-row[tokens[place]] - first.nats[place])
        limit[place] = max(value["rounding"], value["rows"]["limit"])
    held = scored & ~allowed & ((found.order > 0) | (not reordered))
    gap = np.where(same, gap, np.inf)
    wrong = np.flatnonzero(held & ~(gap <= limit))
    differs = known & (first.predicted != found.predicted)
    value["compared"] += int(held.sum())
    noticed = np.where(known, differs, np.abs(first.nats - found.nats) > value["rounding"])
    value["noticed"] += int((scored & allowed & (found.order > 0) & noticed).sum())
    value["differ"] += int((held & differs).sum())
    value["largest_gap"] = max(value["largest_gap"], float(np.minimum(gap[held], 1e9).max(initial=0.0)))
    near = held & (gap <= value["rounding"]) & (limit == value["rounding"])
    value["explained"] = max(value["explained"], float(gap[near].max(initial=0.0)))
    if len(wrong):
        value["wrong"] = {"by": "size", "count": len(wrong), "target": int(wrong[0])}
    return held & known
