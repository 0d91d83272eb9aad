"""Text from a model: full forwards over one fixed window, and numpy sampling that is the same on every backend."""

import numpy as np

from core import rng
from core.config import require
from core.engine import Engine
from core.tokenizer import Tokenizer

PROMPTS = ("", "The")
SAMPLE_TOKENS = 64


def sample(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    seq: int,
) -> str:
    """Return `prompt` and what the model writes after it: at most `tokens` tokens, up to the end of the document.

    Every forward pass has the shape (1, seq), so nothing is compiled twice; the model sees the last `seq` tokens.
    Temperature 0 takes the likeliest token; `top_k` keeps that many candidates (None: all).
    """
    require(tokens >= 1, f"tokens={tokens}: expected at least 1")
    require(temperature >= 0, f"temperature={temperature}: expected 0 or more")
    require(top_k is None or top_k >= 1, f"top_k={top_k}: expected at least 1, or None")
    ids = [tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    for i in range(tokens):
        context = ids[-seq:]
        window = np.zeros((1, seq), np.int32)
        window[0, : len(context)] = context  # the padding lies in the future: a causal model cannot see it
        row = engine.logits(window)[0, len(context) - 1]
        chosen = choose(row, temperature, top_k, rng.uniform(seed, f"sample/{i}", 1)[0])
        if chosen == tokenizer.bos:
            break
        ids.append(chosen)
    return tokenizer.decode(ids)


def choose(logits: np.ndarray, temperature: float, top_k: int | None, draw: float) -> int:
    """Return the token that a uniform `draw` in (-1, 1) falls on, among (V,) logits."""
    values = np.asarray(logits, np.float64)
    order = np.argsort(-values, kind="stable")[:top_k]
    if temperature == 0:
        return int(order[0])
    weights = np.exp((values[order] - values[order[0]]) / temperature)
    ends = np.cumsum(weights)
    return int(order[min(np.searchsorted(ends, (draw + 1) / 2 * ends[-1], "right"), len(order) - 1)])


def samples(engine: Engine, tokenizer: Tokenizer, seq: int, seed: int) -> list[str]:
    """Return the texts that are shown during training and in the report."""
    return [sample(engine, tokenizer, prompt, SAMPLE_TOKENS, 0.8, 40, seed, seq) for prompt in PROMPTS]
