"""The changed text in a process of its own: what was scored must not know what it had not been shown.

The flip test runs inside the evaluation's process, where the whole text is, and after the score. So the start of the
text is scored once more by a fresh process that gets it in a folder of its own, with a few tokens changed, and nothing
after it; the real text is hidden. Predictions that could not have seen a change must have the first process's bits.
"""

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core import rng
from core.audit.flips import PASSES, Predictions, compare
from core.config import RunConfig
from core.data import Dataset
from core.files import replace_file
from core.shards import shard_record, write_shard

CHANGES = 4
"""Tokens that are changed, all scored by one forward pass."""


def start_length(config: RunConfig, tokens: int, passes: int) -> int:
    """Return how many tokens of a text the first `passes` forward passes score, about, and one more."""
    settings = config.eval
    stride = settings.stride or settings.seq
    return min(tokens, passes * settings.batch * stride + settings.seq - stride + 1)


def draw_passes(config: RunConfig, tokens: int) -> int:
    """Return how many passes the changed text takes: nobody can know it before.

    Without plug-ins a forward pass knows nothing of those before it, and PASSES are as good as all. With them it is a
    random part of the whole, at least half of it: what they do may depend on what they have seen.
    """
    settings = config.eval
    total = tokens // (settings.batch * (settings.stride or settings.seq))
    return max(PASSES, total - secrets.randbelow(max(1, total // 2))) if settings.plugins else PASSES


def write_start(dataset: Dataset, length: int, changes: dict[int, int], folder: Path) -> None:
    """Write the first `length` validation tokens, some of them changed, as a prepared folder without training text."""
    folder.mkdir(parents=True)
    tokens = dataset.val.read(0, length)
    for place, token in changes.items():
        tokens[place] = token
    write_shard(str(folder / "val_000000.bin"), tokens)
    shutil.copyfile(Path(dataset.path) / dataset.manifest["tokenizer"]["file"], folder / "tokenizer.model")
    entry = {
        **dataset.manifest["splits"]["val"],
        "files": [shard_record(str(folder / "val_000000.bin"), length)],
        "document_bytes": None,
    }
    if dataset.val.document_bytes is not None:
        count = int((dataset.val.document_starts < length).sum())
        np.save(folder / "val_document_bytes.npy", np.asarray(dataset.val.document_bytes[:count], "<i8"))
        entry["document_bytes"] = "val_document_bytes.npy"
    manifest = {
        **dataset.manifest,
        "tokenizer": {**dataset.manifest["tokenizer"], "file": "tokenizer.model"},
        "splits": {**dataset.manifest["splits"], "val": entry},
    }
    replace_file(folder / "manifest.json", json.dumps(manifest).encode())


def draw_changes(dataset: Dataset, base: Predictions, config: RunConfig, seed: int) -> dict[int, int]:
    """Return places, scored by one of the later of the first passes, and other tokens for them."""
    bos, vocab = config.model.bos, config.model.vocab
    tokens = dataset.val.read(0, len(base.order))
    last = int(base.order.max(initial=0))
    chosen = max(1, last - 1)
    places = np.flatnonzero((base.order == chosen) & (tokens != bos))
    places = places[places > 0]
    if not len(places):
        return {}
    changes = {}
    for place in places[rng.choose(seed, "audit/again", len(places), min(CHANGES, len(places)))].tolist():
        token = rng.below(seed, f"audit/again/{place}", vocab)
        while token in (bos, dataset.tokenizer.unknown, int(tokens[place])):
            token = (token + 1) % vocab
        changes[place] = token
    return changes


def check_again(
    score: Callable[[Path], Predictions | None],
    dataset: Dataset,
    config: RunConfig,
    first: Predictions | None,
    folder: Path,
    seed: int,
    near: float,
    passes: int,
) -> dict[str, Any]:
    """Score the start of the text again with tokens changed and return what noticed, as plain JSON values.

    `score` scores a prepared folder in a fresh process (None: it failed). `first`: the first predictions of the
    evaluation itself; None, or in another order: the start is scored unchanged as well. `near`: nats that rounding may
    make. `passes`: that of `draw_passes`.
    """
    learns = bool(config.eval.plugins)
    length = start_length(config, len(dataset.val), passes)
    value: dict[str, Any] = {
        "tokens": length, "changed": [], "error": False, "alone": None,
        "compared": 0, "noticed": 0, "wrong": [], "wrong_count": 0,
    }  # fmt: skip

    def scored(changes: dict[int, int]) -> Predictions | None:
        place = folder / secrets.token_hex(8)  # a name that told the test from the evaluation would help a cheat
        write_start(dataset, length, changes, place)
        return score(place)

    def judged(base: Predictions, changed: Predictions) -> dict[str, Any]:
        effect = compare(base, changed, sorted(changes), learns, False)
        return {
            "compared": effect.compared,
            "noticed": effect.noticed,
            "wrong": effect.wrong[:3].tolist(),
            "wrong_count": len(effect.wrong),
        }

    base = first if first is not None else scored({})
    if base is None:
        return {**value, "error": True}
    base = base.first(length)
    changes = draw_changes(dataset, base, config, seed)
    changed = scored(changes)
    if changed is None or not changes:
        return {**value, "error": changed is None}
    changed, value["changed"] = changed.first(length), sorted(changes)
    found = judged(base, changed)
    if first is not None and (found["wrong"] or not found["compared"]):
        alone = scored({})  # is it the change, or that the text ends?
        if alone is None:
            return {**value, "error": True}
        alone = alone.first(length)
        same = base.like(alone)
        gap = float(np.abs(base.nats - alone.nats)[same].max(initial=0.0))
        value["alone"] = {
            "targets": int(same.sum()),
            "largest_gap": gap,
            "rounding": gap <= near,
            "same_bits": bool((base.predicted == alone.predicted)[same].all()),
        }
        found = judged(alone, changed)
    return {**value, **found}
