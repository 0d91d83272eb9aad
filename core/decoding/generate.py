"""Text from a model, from its exact state: token by token, or in blocks of drafts of which it keeps what it says."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from core import rng
from core.config import RunConfig, require
from core.data.tokenizer import Tokenizer
from core.decoding.drafters import DRAFTERS, Drafter, RowDrafter
from core.decoding.samplers import choose, guess, say
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from core.engine.protocol import Engine, State, step

PROMPTS = ("", "The")
SAMPLE_TOKENS = 64
TEMPERATURE = 0.8
"""Of samples and of text that a model writes for itself."""
CHUNK = 512
"""Tokens that are read at once, in all rows together."""
ROWS = 16
"""Texts that are written side by side."""


def context_limit(config: RunConfig) -> int | None:
    """Return how many tokens the model may look back on: attention no more than it was trained with, else all."""
    return config.train.seq if config.model.mixes("attention") else None


class Text:
    """A text that a model writes after a prompt; `number` tells the samples of one prompt apart."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, number: int = 0) -> None:
        self.prompt, self.number, self.done = prompt, number, False
        self.ids = [tokenizer.bos, *tokenizer.encode(prompt).tolist()]
        self.begin = len(self.ids)
        self._tokenizer, self._read_as = tokenizer, tokenizer.decode(self.ids)

    def __str__(self) -> str:
        """Return the prompt as it was given, whatever the tokenizer made of it (`read_as`), and what follows so far."""
        return self.prompt + self._tokenizer.decode(self.ids).removeprefix(self._read_as)

    def whole(self) -> str:
        """Return the text so far without the first bytes of a letter whose rest is to come."""
        text = str(self)
        return text if self.done else self.prompt + text[len(self.prompt) :].rstrip("\ufffd")

    def go_on(self, number: int) -> None:
        """Let the text be written on from where it is, with the draws of another number."""
        self.begin, self.number, self.done = len(self.ids), number, False

    @property
    def said(self) -> int:
        """Return how many tokens it has behind the prompt: the place of the next one."""
        return len(self.ids) - self.begin

    def take(self, token: int, tokens: int) -> None:
        """Add a token; the text is done when it has `tokens` of them, or where another document begins."""
        if token != self._tokenizer.bos:
            self.ids.append(token)
        self.done = token == self._tokenizer.bos or len(self.ids) == self.begin + tokens


def write(
    engine: Engine,
    texts: Sequence[Text],
    how: Decoding,
    limit: int | None,
    drafter: Callable[[Text], Drafter] | None = None,
    statistics: DraftStatistics | None = None,
    twin: RowDrafter | None = None,
) -> Iterator[Text]:
    """Let a model write texts, and yield a text whenever it has more or is done.

    ROWS texts are written side by side, in order; the next one takes the row of one that is done. In every turn each
    row reads what it has not read yet: some of its prompt, or the token that it said last, and behind that what was
    drafted. It keeps drafts up to the first that the model does not say, and has one token more than it keeps.
    A model that may look back on `limit` tokens only begins anew with the later half of them when it has read so many;
    a block ends there too. Draws follow from the seed, the text's number and the place in it: the same text comes, to
    rounding, whatever is written beside it and (but for the sampler `speculative`) whatever is drafted.
    `drafter`: what makes the drafter of a text, if it is not the one of `how`. `twin` drafts for all rows in a pass of
    its own, where a row has read all but its last token. `statistics` are added to.
    """
    how.check()
    drafted = drafter is not None or twin is not None or how.draft != "none"
    if drafter is None:
        kind = "none" if twin is not None else how.draft
        require(kind in DRAFTERS, f"draft={kind}: is a model's, which was not given; expected {', '.join(DRAFTERS)}")
        drafter = lambda text: DRAFTERS[kind]()  # noqa: E731
    yield from _Writer(engine, how, limit, drafter, how.block if drafted else 1, statistics, twin).run(texts)


class _Writer:
    """One call of `write`.

    A pass is over one token of every row, over `block` of them, or over more while prompts are read: few shapes, as a
    device may prepare for each.
    """

    def __init__(
        self,
        engine: Engine,
        how: Decoding,
        limit: int | None,
        drafter: Callable[[Text], Drafter],
        block: int,
        statistics: DraftStatistics | None,
        twin: RowDrafter | None,
    ) -> None:
        self._engine, self._how, self._limit, self._drafter, self._block = engine, how, limit, drafter, block
        self._twin = twin
        self._statistics = DraftStatistics() if statistics is None else statistics

    def run(self, texts: Sequence[Text]) -> Iterator[Text]:
        """Write; yield what grows."""
        limit, statistics, clock = self._limit, self._statistics, time.perf_counter
        rows, waiting = list(texts[:ROWS]), deque(texts[ROWS:])
        drafters, state = [self._drafter(text) for text in rows], self._engine.start(len(rows))
        unread = [text.ids[-limit:] if limit else text.ids for text in rows]
        while any(unread):
            times = [clock()]
            rooms = list(map(self._room, rows, unread, state.position.tolist()))
            if self._twin is not None:
                drafts = self._twin_drafts(self._twin, state, rows, unread, rooms)
            else:
                drafts = [
                    drafter.draft(text.ids, room)[:room] if room > 0 else []
                    for text, drafter, room in zip(rows, drafters, rooms, strict=True)
                ]
            chunk, n = self._chunk(unread, drafts)
            times.append(clock())
            tape = self._engine.chunk(state, chunk)
            said = tape.best() if self._how.temperature == 0 else tape.logits()
            times.append(clock())
            unread, grown = [ids[count:] for ids, count in zip(unread, n, strict=True)], []
            for row, text in enumerate(rows):
                if not text.done and not unread[row]:
                    n[row] += self._keep(text, drafters[row], drafts[row], said[row, n[row] - 1 :])
                    grown.append((row, text))
            times.append(clock())
            state, anew = self._engine.commit(tape, n), np.zeros(len(rows), bool)
            for row, text in grown:
                if not text.done:
                    anew[row] = limit is not None and state.position[row] >= limit
                    unread[row] = text.ids[-max(1, limit // 2) :] if limit and anew[row] else text.ids[-1:]
                elif waiting:
                    rows[row], anew[row] = waiting.popleft(), True
                    drafters[row] = self._drafter(rows[row])
                    unread[row] = rows[row].ids[-limit:] if limit else rows[row].ids
            if anew.any():
                state = self._engine.forget(state, anew)
            statistics.add_pass(*times, clock())
            yield from (text for _, text in grown)

    def _room(self, text: Text, unread: list[int], position: int) -> int:
        """Return how many drafts may stand behind what a text has not read yet: the last place is the model's own."""
        if text.done:
            return 0
        room = min(self._block - len(unread), self._how.tokens - text.said - 1)
        return room if self._limit is None else min(room, self._limit - position - len(unread))

    def _twin_drafts(
        self, twin: RowDrafter, state: State, rows: list[Text], unread: list[list[int]], rooms: list[int]
    ) -> list[list[int]]:
        """Return what the twin drafts for every row that has room and one token to read: one pass over all of them."""
        rooms = [room if len(ids) == 1 else 0 for ids, room in zip(unread, rooms, strict=True)]
        if max(rooms) < 1:
            return [[] for _ in rows]
        tape = twin.draft(state, np.array([text.ids[-1] for text in rows], np.int32), self._block)
        said = tape.best() if self._how.temperature == 0 else tape.logits()
        self._statistics.draft_passes += 1
        return [
            [self._guess(said[row, i], text, text.said + i) for i in range(max(0, room))]
            for row, (text, room) in enumerate(zip(rows, rooms, strict=True))
        ]

    def _guess(self, said: np.ndarray, text: Text, place: int) -> int:
        return guess(said, place, text.number, self._how) if said.ndim else int(said)

    def _chunk(self, unread: list[list[int]], drafts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return what the next pass is over, (rows, width), and how many first tokens of each row are no drafts."""
        given = [ids + more for ids, more in zip(unread, drafts, strict=True)]
        longest, width = max(map(len, given)), 1
        if longest > 1:
            width = self._block if longest <= self._block else min(longest, max(self._block, CHUNK // len(given), 1))
        chunk = np.zeros((len(given), width), np.int32)
        for row, ids in enumerate(given):
            chunk[row, : len(ids)] = ids[:width]
        return chunk, np.array([min(len(ids), width) for ids in unread])

    def _keep(self, text: Text, drafter: Drafter, drafts: list[int], said: np.ndarray) -> int:
        """Add what the model says to a text, up to the first token that was not drafted; return how many drafts it is
        to read for good. `said`: of each place the likeliest token, or logits."""
        kept = 0
        for kept, draft in enumerate([*drafts, None]):
            token = self._say(said[kept], draft, text, text.said)
            text.take(token, self._how.tokens)
            if token != draft or text.done:
                break
        passes = 2 if self._twin is not None and drafts else 1
        self._statistics.add_cycle(len(drafts), kept, passes)
        if drafter.guesses:
            behind = said[kept + 1 : len(drafts) + 1]
            drafter.see([self._say(row, None, text, text.said + i) for i, row in enumerate(behind)])
        return kept

    def _say(self, said: np.ndarray, draft: int | None, text: Text, place: int) -> int:
        return say(said, draft, place, text.number, self._how) if said.ndim else int(said)


def sample(
    engine: Engine, tokenizer: Tokenizer, prompt: str, how: Decoding, limit: int | None, twin: RowDrafter | None = None
) -> str:
    """Return `prompt` and what the model writes after it; see `write`."""
    return prompt + "".join(streamed(engine, Text(tokenizer, prompt), how, limit, twin=twin))


def streamed(
    engine: Engine, text: Text, how: Decoding, limit: int | None, statistics: DraftStatistics | None = None,
    twin: RowDrafter | None = None,
) -> Iterator[str]:  # fmt: skip
    """Yield what a model adds to a text as it comes, in whole letters; see `write`."""
    shown = text.whole()
    for _ in write(engine, [text], how, limit, statistics=statistics, twin=twin):
        now = text.whole()
        if now != shown:
            yield now.removeprefix(shown)
            shown = now


def read_as(tokenizer: Tokenizer, prompt: str) -> str:
    """Return the text that a model gets to read of `prompt`: normalised, as its tokenizer does."""
    return tokenizer.decode(tokenizer.encode(prompt))


def written_rows(engine: Engine, total: int, seq: int, bos: int, seed: int, part: slice) -> np.ndarray:
    """Let a model write `total` rows of `seq` tokens from a BOS on, and return rows `part` of them, (rows, seq) int32.

    A row goes on after the end of a document. Draws follow from the seed and the place, whoever writes which rows.
    """
    tokens = np.full((len(range(total)[part]), seq), bos, np.int32)
    state = engine.start(len(tokens))
    for place in range(1, seq):
        logits, state = step(engine, state, tokens[:, place - 1])
        draws = rng.uniform(seed, f"calibration/{place}", total)[part]
        tokens[:, place] = [choose(row, TEMPERATURE, None, draw) for row, draw in zip(logits, draws, strict=True)]
    return tokens


def samples(engine: Engine, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    """Return the texts that are shown during training and in the report, one for each of PROMPTS."""
    texts = [Text(tokenizer, prompt) for prompt in PROMPTS]
    for _ in write(engine, texts, Decoding(SAMPLE_TOKENS, TEMPERATURE, 40, seed=config.seed), context_limit(config)):
        pass
    return [str(text) for text in texts]


def sample_lines(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return `samples` in one line each, with what they go on from in words."""
    words = [f"after {prompt!r}" if prompt else "from nothing" for prompt in PROMPTS]
    return [(word, " ".join(text.split())) for word, text in zip(words, texts, strict=False)]
