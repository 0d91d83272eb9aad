"""The flip test: change one token of a text and see which predictions notice, through the whole scoring path.

A prediction may change only if the changed token was in its context (an earlier input of its window or stream), or if
what it is made with may have learned from it by then: plug-ins from an earlier forward pass, adapters from an earlier
chunk of their own document (core/audit/turns.py). Every other prediction, that of the changed target itself and those
of the other rows included, must have the same bits, over the whole vocabulary. Documents are ended early as well: what
is predicted there must not know whether BOS comes next, which the cut of the windows or a learning rate may tell.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from core import rng
from core.audit.fingerprints import (
    HARMLESS,
    RESHAPED,
    ChangeEffect,
    Fingerprints,
    Predictions,
    effect_of,
    effect_of_end,
    predictions_from,
)
from core.audit.rules import Progress
from core.config import PhasesConfig, RunConfig
from core.data.dataset import Split
from core.engine.protocol import Engine
from core.scoring.adapt.documents import documents_of
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.score import score_text

TEXTS = 2
"""Places of the text that are tested."""
PASSES = 3
"""Forward passes of each run: plug-ins must have learned something by the last one."""
ROWS = 2
"""Documents side by side, where adapters learn: as many as it takes for a row to have a neighbour."""
LONG, MOST = 18, 8
"""Chunks of a text in which adapters learn, if documents of that length are there; times that it may be longer."""
TRIES = 3
"""Ends of documents that are tried until one can be compared."""


def predict(engine: Engine, text: Split, config: RunConfig, plugins: bool, places: Sequence[int] = ()) -> Predictions:
    """Score a piece of text in one pass, with the plug-ins of `config` or without, and return what was predicted.

    The whole distribution is kept of the targets at `places`.
    """
    ledger, prints = Ledger(len(text)), Fingerprints(len(text), places)
    score_text(engine, Evaluation.of(text, config, plugins=plugins), ledger, watch=prints)
    return predictions_from(prints, ledger.entries, text, config)


def flip_test(
    engine: Engine, split: Split, config: RunConfig, flips: int, seed: int, bound: float, progress: Progress
) -> dict[str, Any]:
    """Flip `flips` tokens at random places, and ends of documents, and return what noticed, as plain JSON values.

    `bound`: nats that rounding may make (ROUNDING).
    """
    config = _small(config)
    pieces = _pieces(split, config, seed)
    test = _FlipTest(engine, config, seed, bound)
    value, done = test.value, 0
    value["tokens"] = [int(stop - start) for start, stop in pieces]
    try:
        for number, piece in enumerate(pieces):
            text = split.changed(*piece)
            test.config = _with_phase(config, text)
            others = _others(text, test.config, seed, number)
            draws = [_flip(text, config, seed, f"{number}/{i}") for i in range(number, flips, len(pieces))]
            base = test.predict(text, [*(place for place, _ in draws), *others.firsts])
            if number == 0:
                test.repeat(base, text)
            if len(others.places):
                test.others(text, base, others, piece[0])
            for place, token in draws:
                test.flip(text, base, place, token, piece[0])
                done += 1
                progress(done, flips)
            test.end(text, number, piece[0])
    except LedgerError as error:
        if error.rule is None:
            raise
        value["broken"] = {"rule": error.rule, "message": str(error)}
    return value


class _FlipTest:
    """Texts that an engine scores with a change; `value` says what noticed."""

    def __init__(self, engine: Engine, config: RunConfig, seed: int, bound: float) -> None:
        self._engine, self.config, self._seed = engine, config, seed
        self._learns, self._reshaped = config.eval.learns, config.eval.windows == "stateful"
        self.value: dict[str, Any] = {
            "flips": 0, "documents": 0, "ends": 0, "compared": 0, "noticed": 0, "wrong": [],
            "wrong_count": 0, "largest_wrong": 0.0, "differ": 0, "explained": 0.0, "by_plugins": False,
            "repeatable": True, "repeat_gap": 0.0, "rounding": bound, "broken": None, "learns": self._learns,
            "reshaped": self._reshaped,
        }  # fmt: skip

    def predict(self, text: Split, places: Sequence[int] = (), plugins: bool | None = None) -> Predictions:
        """Return what is predicted of a text, with the plug-ins unless `plugins` is False."""
        return predict(self._engine, text, self.config, self._learns if plugins is None else plugins, places)

    def repeat(self, once: Predictions, text: Split) -> None:
        """Note whether a text gives the same bits twice, and how far apart it is."""
        again = self.predict(text)
        self.value["repeatable"] &= bool((again.predicted == once.predicted).all())
        self.value["repeat_gap"] = max(self.value["repeat_gap"], float(once.gap(again).max(initial=0.0)))

    def flip(self, text: Split, base: Predictions, place: int, token: int, start: int) -> None:
        """Score a text with another token at `place` and note what noticed; `start`: where the text is from."""
        value, other = self.value, text.changed(0, len(text), place, token)
        value["flips"] += 1
        self._judge(text, base, other, self.predict(other, [place]), np.array([place]), start)

    def _judge(
        self, text: Split, base: Predictions, other: Split, changed: Predictions, places: np.ndarray, start: int
    ) -> None:
        """Note what a change of the tokens at `places` did, from `base` to `changed`."""
        value, shown = self.value, changed.places
        effect = effect_of(base, changed, places, self._learns)
        small = not len(effect.beyond(value["rounding"]).wrong)
        if small and len(effect.beyond(HARMLESS).wrong) and value["repeatable"]:
            self.repeat(changed, other)  # is it rounding after all?
        effect = self._add(effect, int(places[0]), start, False)
        if len(effect.wrong) and self._learns and not value["by_plugins"]:  # the model alone may pass the same change
            plain = [self.predict(one, shown.tolist(), plugins=False) for one in (text, other)]
            alone = effect_of(plain[0], plain[1], places, False)
            value["by_plugins"] = not len(alone.beyond(self._limit(False)).wrong)

    def others(self, text: Split, base: Predictions, others: "OtherDocuments", start: int) -> None:
        """Score documents beside other ones, and after other ones, than those of the text, and note what noticed."""
        changed = self.predict(others.text, others.firsts)
        self.value["documents"] += others.documents
        self._judge(text, base, others.text, changed, others.places, start)

    def end(self, text: Split, number: int, start: int) -> None:
        """Score a text that ends with the start of a document, and the same going on, and note what noticed."""
        value, config = self.value, _ending(self.config)
        self.config = config
        for begin, place in _ends(text, config, self._seed, number):
            ended = text.changed(begin, place + 1, place - begin, config.model.bos)
            later = text.document_starts[text.document_starts > place]
            stop = int(later[0]) + 1 if _own_rows(config) and len(later) else len(text)
            went_on = text.changed(begin, min(stop, place + 1 + 2 * config.eval.seq))

            def judged(plugins: bool) -> ChangeEffect | None:
                both = [self.predict(one, [place - begin], plugins) for one in (ended, went_on)]  # noqa: B023
                return effect_of_end(both[0], both[1], plugins)

            effect = judged(self._learns)
            if effect is None:
                continue
            value["ends"] += 1
            effect = self._add(effect, place - begin, start + begin, True)
            if len(effect.wrong) and self._learns and not value["by_plugins"]:
                alone = judged(False)
                value["by_plugins"] = alone is not None and not len(alone.beyond(self._limit(True)).wrong)
            return

    def _limit(self, end: bool) -> float:
        """Return how far in nats a prediction may be moved; texts that end may be cut to other shapes."""
        value = self.value
        if end and self._reshaped:
            return value["rounding"] * RESHAPED
        return min(value["rounding"], HARMLESS) if value["repeatable"] else value["rounding"]

    def _add(self, effect: ChangeEffect, place: int, start: int, end: bool) -> ChangeEffect:
        """Note what a change at `place` did, of a text from `start` on; return it without what is rounding."""
        value = self.value
        value["compared"] += effect.compared
        value["noticed"] += effect.noticed
        limit = self._limit(end)
        near = effect.gaps[effect.gaps <= limit]
        value["differ"] += len(near)
        value["explained"] = max(value["explained"], float(near.max(initial=0.0)))
        effect = effect.beyond(limit)
        value["wrong_count"] += len(effect.wrong)
        value["largest_wrong"] = max(value["largest_wrong"], float(np.minimum(effect.gaps, 1e9).max(initial=0.0)))
        for target in effect.wrong[: max(0, 3 - len(value["wrong"]))].tolist():
            value["wrong"].append({"token": start + place, "target": start + target, "end": end})
        return effect


def _pieces(split: Split, config: RunConfig, seed: int) -> list[tuple[int, int]]:
    """Return ranges of the text, each from the start of a document on, long enough for PASSES forward passes.

    Where adapters learn it is PASSES batches of documents, of which most have more than one chunk.
    """
    settings, starts = config.eval, split.document_starts
    stride = settings.stride or settings.seq
    length = PASSES * settings.batch * stride + settings.seq - stride
    if settings.adapt.kind == "sgd":
        length = PASSES * settings.adapt.chunk + settings.seq - stride
    if settings.adapt.kind == "lora":
        count = min(PASSES * ROWS, len(starts))
        edges, length = np.append(starts, len(split) - 1), LONG * settings.adapt.chunk
        far = np.abs(edges[count:] - edges[:-count] - length)
        good = np.flatnonzero(far <= max(length // 2, far.min()))
        picks = good[rng.choose(seed, "audit/pieces", len(good), min(TEXTS, len(good)))]
        stops = np.minimum(edges[picks + count], edges[picks] + MOST * length)
        return sorted(zip(edges[picks].tolist(), (stops + 1).tolist(), strict=True))
    last = max(1, int(np.searchsorted(starts, max(len(split) - length, 0), "right")))
    picks = rng.choose(seed, "audit/pieces", last, min(TEXTS, last))
    return [(int(starts[i]), min(len(split), int(starts[i]) + length + 1)) for i in sorted(picks.tolist())]


class OtherDocuments(NamedTuple):
    """A text in which half of the documents are others, of the same lengths."""

    text: Split
    places: np.ndarray
    """(count,) int64: the tokens that are others."""
    firsts: list[int]
    """The first of them in each document: nothing in the model's context tells of these."""
    documents: int


def _others(text: Split, config: RunConfig, seed: int, number: int) -> OtherDocuments:
    """Return other documents beside, and before, those that stay; none where documents do not learn for themselves.

    Of two batches of two, the first and the last stay: a neighbour of each is another, and so is what its row had
    before.
    """
    if not _own_rows(config):
        return OtherDocuments(text, np.empty(0, np.int64), [], 0)
    documents = documents_of(Evaluation.of(text, config, plugins=True))
    moved = documents.take(np.isin(documents.number % (2 * ROWS), (1, 2)))
    tokens = text.read(0, len(text))
    firsts: list[int] = []
    places: list[int] = []
    for begin, end in zip(moved.begin.tolist(), moved.end.tolist(), strict=True):
        own = begin + 1 + np.flatnonzero(tokens[begin + 1 : end] != config.model.bos)
        firsts += own[:1].tolist()
        places += own.tolist()
    others = [_other(int(tokens[place]), config, seed, f"{number}/{place}") for place in places]
    at = np.array(places, np.int64)
    return OtherDocuments(text.changed(0, len(text), at, np.array(others, np.int32)), at, firsts, len(firsts))


def _small(config: RunConfig) -> RunConfig:
    """Return settings under which what a token taught shows in few passes: rounds, batches and chunks are small."""
    settings = config.eval
    adapt, stride = settings.adapt, settings.stride or settings.seq
    if adapt.kind == "lora":
        adapt = dataclasses.replace(adapt, documents=min(adapt.documents, ROWS))
    elif adapt.kind == "sgd":  # of two passes: the second one must not know what the first one scored
        adapt = dataclasses.replace(adapt, chunk=min(adapt.chunk, 2 * settings.batch * stride))
    if settings.learns:
        config = dataclasses.replace(config, eval=dataclasses.replace(settings, round=1, adapt=adapt))
    return config


def _with_phase(config: RunConfig, text: Split) -> RunConfig:
    """Return settings with one phase, after the first batch of a text; without one if it can have none."""
    phases, settings = config.eval.phases, config.eval
    if phases.at:
        targets = documents_of(Evaluation.of(text, config, plugins=True)).targets
        first = min(ROWS, settings.adapt.documents)
        size = int(targets[:first].sum()) - 1
        fits = first < len(targets) and size > 0
        at = first / len(targets)
        phases = dataclasses.replace(phases, at=(at,), chunk=min(phases.chunk, size)) if fits else PhasesConfig()
    return dataclasses.replace(config, eval=dataclasses.replace(settings, phases=phases))


def _ending(config: RunConfig) -> RunConfig:
    """Return settings for texts that end early: how long the whole text is, phases and a stream's rate may know."""
    adapt = config.eval.adapt
    adapt = dataclasses.replace(adapt, schedule=adapt.schedule if adapt.reset == "document" else "constant")
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, adapt=adapt, phases=PhasesConfig()))


def _own_rows(config: RunConfig) -> bool:
    """Whether documents learn side by side, so that one is compared by itself."""
    return config.eval.adapt.kind == "lora" and config.eval.adapt.reset == "document"


def _flip(text: Split, config: RunConfig, seed: int, name: str) -> tuple[int, int]:
    """Return a place, away from the end and not a document's start, and another token for it."""
    tokens, bos = text.read(0, len(text)), config.model.bos
    places = np.flatnonzero(tokens[: max(2, 3 * len(tokens) // 4)] != bos)
    places = places[places > 0]
    place = int(places[rng.below(seed, f"audit/place/{name}", len(places))])
    return place, _other(int(tokens[place]), config, seed, name)


def _ends(text: Split, config: RunConfig, seed: int, number: int) -> list[tuple[int, int]]:
    """Return (begin, place): ranges of the text at whose last token, in the middle of a document, it may end.

    With carry the document that ends must be the longest, or the state of others comes before it: it is alone then.
    """
    tokens, bos = text.read(0, len(text)), config.model.bos
    inside = (tokens[1:-1] != bos) & (tokens[2:] != bos)
    places = 1 + np.flatnonzero(inside)
    if _own_rows(config):  # at the end of a chunk, or the window that goes on begins later; and after two updates
        begins = np.flatnonzero(tokens == bos)
        place_in = places - begins[np.maximum(np.searchsorted(begins, places, "right") - 1, 0)]
        good = (place_in % config.eval.adapt.chunk == 0) & (place_in > 2 * config.eval.adapt.chunk)
        places = places[good] if good.any() else places
    picks = rng.choose(seed, f"audit/ends/{number}", len(places), min(TRIES, len(places)))
    ends = []
    for place in places[picks].tolist():
        starts = np.flatnonzero(tokens[:place] == bos)
        longest = place - starts[-1] >= np.diff(np.append(starts, place)).max()
        alone = _own_rows(config) or (config.eval.windows == "stateful" and not longest)
        ends.append((int(starts[-1]) if alone else 0, place))
    return ends


def _other(token: int, config: RunConfig, seed: int, name: str) -> int:
    """Return a random token that is neither `token` nor BOS."""
    for draw in range(100):
        other = rng.below(seed, f"audit/token/{name}/{draw}", config.model.vocab)
        if other not in (config.model.bos, token):
            break
    return other
