"""What a twin is worth: how near its rows are to the model's, and what its drafts come to in the decoding loop."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from core.data.dataset import Split
from core.data.tokenizer import Tokenizer
from core.decoding.follow import Follow
from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from core.engine.protocol import Engine
from core.training.records import RunError
from core.twin.anchors import draw_anchors
from core.twin.distill_config import DistillConfig
from core.twin.own_text import continued, distinct

KINDS = ("own", "corpus")
DRAFTS = ("plain", "twin", "ngram")
SHOWN = ("tokens_per_cycle", "tpf", "accepted_per_cycle", "empty", "cycles", "passes", "draft_passes", "tokens")


class Texts(NamedTuple):
    """Texts of one kind that no twin has learned from."""

    kind: str
    """own: what the model writes greedily after held-out tokens; corpus: held-out text itself."""
    rows: np.ndarray
    """(texts, seq) int32, each from a BOS on."""
    begin: int
    """Tokens that a text is given before it is written on."""


def held_out_rows(val: Split, bos: int, settings: DistillConfig, seq: int) -> np.ndarray:
    """Return rows of validation text without an end of a document, (texts, seq) int32, each from a BOS on; RunError
    where it is too short for them.
    """
    span = min(2 * seq, len(val))
    rows = []
    for i in range(settings.report_texts):
        start = i * (len(val) - span) // settings.report_texts
        tokens = val.read(start, start + span)
        rows.append([bos, *tokens[tokens != bos][: seq - 1].tolist()])
    if min(map(len, rows)) < seq:
        raise RunError(f"{val.name}: {len(val)} tokens, too few for texts of {seq}: lower distill.seq")
    return np.array(rows, np.int32)


def held_out(engine: Engine, given: np.ndarray, settings: DistillConfig) -> list[Texts]:
    """Return both kinds of text, from the same places of the validation text: `given`, rows of `held_out_rows`."""
    seq = given.shape[1]
    begin = max(1, min(settings.prompt, seq - settings.twin.block - 1))  # a text is the BOS at least
    own = continued(engine, given[:, :begin], seq, lambda done, total: None)
    return [Texts("own", own, begin), Texts("corpus", given, begin)]


def nearness(twin: Any, texts: Texts, bos: int, settings: DistillConfig) -> dict[str, Any]:
    """Return agreement and divergence by place of a block, and the cosine of every layer."""
    count = min(4 * settings.anchors, texts.rows.shape[1])
    anchors = draw_anchors(texts.rows, bos, settings.twin.block, count, 0, f"report/{texts.kind}")
    report = twin.report(texts.rows, anchors)
    cosine = {label: float(np.mean(value)) for label, value in report.cosine.items()}
    return {"agreement": report.agreement.tolist(), "kl": report.kl.tolist(), "cosine": cosine}


def decoding(
    engine: Engine, tokenizer: Tokenizer, twin: Any, texts: Texts, settings: DistillConfig, limit: int | None
) -> dict[str, dict[str, float]]:
    """Return what each of DRAFTS comes to on texts, one at a time and greedily: counts, and seconds of all texts.

    On corpus text the model reads on as if it had written it. `same`: texts that equal the undrafted ones.
    """
    room = texts.rows.shape[1] if limit is None else min(limit, texts.rows.shape[1])
    tokens = min(settings.report_tokens, room - texts.begin - 1)
    found: dict[str, dict[str, float]] = {}
    plain: list[list[int]] = []
    for draft in DRAFTS:
        name: Any = "ngram" if draft == "ngram" else "none"
        how = Decoding(tokens, 0.0, draft=name, block=settings.twin.block)
        statistics, ids, began = DraftStatistics(), [], time.perf_counter()
        for number, row in enumerate(texts.rows.tolist()):
            text = _text(tokenizer, row[: texts.begin], number)
            reader: Any = engine if texts.kind == "own" else Follow(engine, [row])
            for _ in write(reader, [text], how, limit, None, statistics, twin if draft == "twin" else None):
                pass
            ids.append(text.ids)
        seconds = time.perf_counter() - began
        plain = plain or ids
        values = {name: value for name, value in statistics.to_json().items() if name in SHOWN}
        same = sum(a == b for a, b in zip(ids, plain, strict=True))
        found[draft] = {**values, "seconds": seconds, "same": same, "texts": len(ids)}
        found[draft]["distinct"] = distinct([text[texts.begin :] for text in ids])
    return found


def _text(tokenizer: Tokenizer, ids: Sequence[int], number: int) -> Text:
    text = Text(tokenizer, "", number)
    text.ids, text.begin = list(ids), len(ids)
    return text
