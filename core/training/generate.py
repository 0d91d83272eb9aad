"""Text from a model, token by token from its exact state, and numpy sampling that is the same on every backend."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from core import rng
from core.config import RunConfig, require
from core.data.tokenizer import Tokenizer
from core.engine.protocol import Engine, step

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

    def take(self, token: int, tokens: int) -> None:
        """Add a token; the text is done when it has `tokens` of them, or where another document begins."""
        if token != self._tokenizer.bos:
            self.ids.append(token)
        self.done = token == self._tokenizer.bos or len(self.ids) == self.begin + tokens


def write(
    engine: Engine,
    texts: Sequence[Text],
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    limit: int | None,
) -> Iterator[Text]:
    """Let a model write texts of at most `tokens` tokens each, and yield a text whenever it has one more or is done.

    ROWS texts are written side by side, in order; the next one takes the row of one that is done. In every turn each
    row reads what it has not read yet: some of its prompt, or the token that was drawn last.
    A model that may look back on `limit` tokens only begins anew with the later half of them when it has read so many.
    Temperature 0 takes the likeliest token; `top_k` keeps that many candidates (None: all). Draws follow from the seed,
    the text's number and the place in it: the same text comes, to rounding, whatever is written beside it.
    """
    require(tokens >= 1, f"tokens={tokens}: expected at least 1")
    require(temperature >= 0, f"temperature={temperature}: expected 0 or more")
    require(top_k is None or top_k >= 1, f"top_k={top_k}: expected at least 1, or None")
    rows, waiting = list(texts[:ROWS]), deque(texts[ROWS:])
    unread, state = [text.ids[-limit:] if limit else text.ids for text in rows], engine.start(len(rows))
    while any(unread):
        width = min(max(map(len, unread)), max(1, CHUNK // len(rows)))
        n, chunk = np.array([min(len(ids), width) for ids in unread]), np.zeros((len(rows), width), np.int32)
        for row, ids in enumerate(unread):
            chunk[row, : n[row]] = ids[:width]
        tape = engine.chunk(state, chunk)
        logits, state = tape.logits(), engine.commit(tape, n)
        unread, anew = [ids[width:] for ids in unread], np.zeros(len(rows), bool)
        for row, text in enumerate(rows):
            if text.done or unread[row]:
                continue
            draw = rng.uniform(seed, f"sample/{len(text.ids) - text.begin}", text.number + 1)[-1]
            text.take(choose(logits[row, n[row] - 1], temperature, top_k, draw), tokens)
            yield text
            if not text.done:
                anew[row] = limit is not None and state.position[row] >= limit
                unread[row] = text.ids[-max(1, limit // 2) :] if limit and anew[row] else text.ids[-1:]
            elif waiting:
                rows[row], anew[row] = waiting.popleft(), True
                unread[row] = rows[row].ids[-limit:] if limit else rows[row].ids
        if anew.any():
            state = engine.forget(state, anew)


def sample(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    limit: int | None,
) -> str:
    """Return `prompt` and what the model writes after it; see `write`."""
    text = Text(tokenizer, prompt)
    for _ in write(engine, [text], tokens, temperature, top_k, seed, limit):
        pass
    return str(text)


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


def choose(logits: np.ndarray, temperature: float, top_k: int | None, draw: float) -> int:
    """Return the token that a uniform `draw` in (-1, 1) falls on, among (V,) logits."""
    values = np.asarray(logits, np.float64)
    order = np.argsort(-values, kind="stable")[:top_k]
    if temperature == 0:
        return int(order[0])
    weights = np.exp((values[order] - values[order[0]]) / temperature)
    ends = np.cumsum(weights)
    return int(order[min(np.searchsorted(ends, (draw + 1) / 2 * ends[-1], "right"), len(order) - 1)])


def samples(engine: Engine, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    """Return the texts that are shown during training and in the report, one for each of PROMPTS."""
    choices = (SAMPLE_TOKENS, TEMPERATURE, 40, config.seed, context_limit(config))
    texts = [Text(tokenizer, prompt) for prompt in PROMPTS]
    for _ in write(engine, texts, *choices):
        pass
    return [str(text) for text in texts]


def sample_lines(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return `samples` in one line each, with what they go on from in words."""
    words = [f"after {prompt!r}" if prompt else "from nothing" for prompt in PROMPTS]
    return [(word, " ".join(text.split())) for word, text in zip(words, texts, strict=False)]
