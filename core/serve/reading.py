"""What a served model makes of a given text: bits token by token, and its score against two compressors."""

import bz2
import math
from typing import Any

import brotli
import numpy as np

from core.data.dataset import Split
from core.scoring.accounting import bits_per_byte, count_bytes
from core.scoring.evaluation import Evaluation, one_document
from core.scoring.ledger import Ledger
from core.scoring.plugins import log_softmax
from core.scoring.score import score
from core.serve.guards import Refused
from core.serve.models import Served
from core.serve.surprise import describe_tokens, offsets, predictions
from core.serve.work import Client

POINTS = 400
"""Points of a curve over the bytes of a text, at most."""


def document(model: Served, text: str) -> Split:
    """Return a text as one document of tokens; Refused if there are none."""
    split = one_document(model.tokenizer, text)
    if len(split) < 2:
        raise Refused(400, "text: has no tokens; expected at least one letter", "text")
    return split


def tokens_of(model: Served, text: str, without: str | None, client: Client) -> dict[str, Any]:
    """Return the tokens of a text with what they cost the model, and what more they cost it without a part of it.

    `start` and `end` are places in `read_as`, the text as its tokens spell it.
    """
    split = document(model, text)
    ids = split.read(0, len(split))
    read_as, rows = model.tokenizer.decode(ids), []
    for logits in predictions(model.engine, ids, model.limit, client):
        rows += describe_tokens(model.tokenizer, ids[len(rows) + 1 :][: len(logits)].tolist(), logits)
    ends = offsets(model.tokenizer, ids[1:].tolist(), read_as)
    for row, start, end in zip(rows, [0, *ends[:-1]], ends, strict=True):
        row |= {"start": start, "end": end}
    if without is not None:
        place = 0
        for logits in predictions(model.without(without), ids, model.limit, client):
            said = np.take_along_axis(log_softmax(logits), ids[place + 1 :][: len(logits), None], axis=1)[:, 0]
            for row, bits in zip(rows[place:], (said / -math.log(2.0)).tolist(), strict=False):
                row["without"] = round(bits - row["bits"], 4)
            place += len(logits)
    bits, count = sum(row["bits"] for row in rows), _bytes(split)
    return {"read_as": read_as, "tokens": rows, "bits": bits, "bytes": count, "bpb": bits / count}


def _bytes(split: Split) -> int:
    """Return the bytes of a document, as its score counts them."""
    return int(count_bytes(split, np.array([0]), np.array([len(split) - 1]), None).counted.sum())


def score_of_text(model: Served, text: str, client: Client) -> dict[str, Any]:
    """Return what a text costs the model as one document, as `skc.load(...).score(text)` has it, along the text too."""
    split = document(model, text)
    ledger = Ledger(len(split))

    def progress(done: int, total: int) -> None:
        client.require_time()

    found = score(model.engine, Evaluation.of(split, model.config), ledger, progress=progress)
    data = text.encode()
    value = {"bpb": found.bpb, "bytes": found.bytes, "byte_rule": found.byte_rule, "windows": found.windows}
    value["series"] = series(ledger.entries["nats"], split.costs(1, len(split)), found.bytes)
    for name, compress in (("bz2", bz2.compress), ("brotli", brotli.compress)):
        client.require_time()
        value[name] = 8 * len(compress(data)) / len(data)
    return value


def series(nats: np.ndarray, costs: np.ndarray, total: int) -> list[dict[str, float]]:
    """Return points along a text, POINTS at most: the byte, bits per byte up to there, and since the last point.

    `costs`: the bytes of each token by the tokenizer's table. Where the score counts the text's own bytes, `total` of
    them, each token gets its share.
    """
    places = np.cumsum(costs) * (total / costs.sum())
    spent = np.cumsum(nats)
    last = np.unique(np.linspace(0, len(nats) - 1, min(POINTS, len(nats))).round().astype(int))
    last = last[np.diff(places[last], prepend=0.0) > 0]  # a token may cost nothing
    rows, byte, before = [], 0.0, 0.0
    for place, cost in zip(places[last].tolist(), spent[last].tolist(), strict=True):
        here = bits_per_byte(cost - before, 1) / (place - byte)
        rows.append({"byte": round(place), "bpb": bits_per_byte(cost, 1) / place, "here": here})
        byte, before = place, cost
    return rows
