"""Text from a model, token by token from its exact state, and numpy sampling that is the same on every backend."""

from collections.abc import Sequence

import numpy as np

from core import rng
from core.config import RunConfig, require
from core.data.tokenizer import Tokenizer
from core.engine.protocol import Engine, State, step

PROMPTS = ("", "The")
SAMPLE_TOKENS = 64
CHUNK = 512
"""Tokens of a prompt that are read at once."""


def context_limit(config: RunConfig) -> int | None:
    """Return how many tokens the model may look back on: attention no more than it was trained with, else all."""
    return config.train.seq if config.model.mixes("attention") else None


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
    """Return `prompt` and what the model writes after it: at most `tokens` tokens, up to the end of the document.

    The prompt stands as it was given, whatever the tokenizer made of it (`read_as`).
    Each token is one step from the state of those before it. A model that may look back on `limit` tokens only begins
    anew with the later half of them when it has seen so many. Temperature 0 takes the likeliest token; `top_k` keeps
    that many candidates (None: all).
    """
    require(tokens >= 1, f"tokens={tokens}: expected at least 1")
    require(temperature >= 0, f"temperature={temperature}: expected 0 or more")
    require(top_k is None or top_k >= 1, f"top_k={top_k}: expected at least 1, or None")
    ids = [tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    begins = tokenizer.decode(ids)
    logits, state, seen = _read(engine, ids if limit is None else ids[-limit:])
    for i in range(tokens):
        chosen = choose(logits, temperature, top_k, rng.uniform(seed, f"sample/{i}", 1)[0])
        if chosen == tokenizer.bos:
            break
        ids.append(chosen)
        if i + 1 == tokens:
            break
        if limit is not None and seen >= limit:
            logits, state, seen = _read(engine, ids[-max(1, limit // 2) :])
        else:
            row, state = step(engine, state, np.array([chosen], np.int32))
            logits, seen = row[0], seen + 1
    return prompt + tokenizer.decode(ids).removeprefix(begins)


def read_as(tokenizer: Tokenizer, prompt: str) -> str:
    """Return the text that a model gets to read of `prompt`: normalised, as its tokenizer does."""
    return tokenizer.decode(tokenizer.encode(prompt))


def _read(engine: Engine, ids: list[int]) -> tuple[np.ndarray, State, int]:
    """Return the logits (V,) after a text, the state, and how many tokens that was."""
    state, logits = engine.start(1), np.empty(0)
    for i in range(0, len(ids), CHUNK):
        tape = engine.chunk(state, np.array([ids[i : i + CHUNK]], np.int32))
        logits, state = tape.logits()[0, -1], engine.commit(tape, len(ids[i : i + CHUNK]))
    return logits, state, len(ids)


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
    choices = (SAMPLE_TOKENS, 0.8, 40, config.seed, context_limit(config))
    return [sample(engine, tokenizer, prompt, *choices) for prompt in PROMPTS]


def sample_lines(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return `samples` in one line each, with what they go on from in words."""
    words = [f"after {prompt!r}" if prompt else "from nothing" for prompt in PROMPTS]
    return [(word, " ".join(text.split())) for word, text in zip(words, texts, strict=False)]
