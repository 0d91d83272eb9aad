"""Every engine does everything once: a step, scoring, writing from a prompt, a text in chunks: crashes show soon."""

import numpy as np

from core import presets
from core.check.tolerances import P2_BFLOAT16, relative_rms
from core.config import RunConfig
from core.engine.protocol import Engine
from core.training import generate, schedule
from shared_tests.device.child import Child
from shared_tests.support.harness import batches, engine, mini, working_weights


class Words:
    """A tokenizer's three methods that writing needs."""

    bos = 1

    def encode(self, text: str) -> np.ndarray:
        """Return three tokens for any text, none for none."""
        return np.arange(5, 8) if text else np.empty(0, np.int64)

    def decode(self, ids: list[int]) -> str:
        """Return the numbers."""
        return " ".join(map(str, ids))


def run(child: Child) -> None:
    """Build the mini of every preset in bfloat16 and use all of it."""
    for name in presets.PRESETS:
        with child.part(name):
            config = mini(name)
            made = engine(child.backend, config, working_weights(config.model, 1.0), dtype="bfloat16")
            for note in made.notes if name in ("baseline", "skc_8xh100") else ():
                child.text(f"{name}, note", note)
            child.check(f"{name}: a text in chunks against the whole", everything(made, config), P2_BFLOAT16)


def everything(made: Engine, config: RunConfig) -> float:
    """Use every method of an engine; return the gap between the logits of a text in three chunks and of the whole.

    RuntimeError if a step or a score is not finite.
    """
    batch = batches(config, 1)[0]
    result = made.train_step(batch, schedule.plan(0, 0.5, config.train)).result()
    if not result.finite or not np.isfinite(made.nll(*batch[:2])).all():
        raise RuntimeError(f"not finite: {result}")
    for prompt in generate.PROMPTS:
        generate.sample(made, Words(), prompt, 4, 0.8, 40, 0, generate.context_limit(config))  # type: ignore[arg-type]
    rows = batch.tokens
    whole, state, parts = made.logits(rows), made.start(len(rows)), []
    for begin, end in ((0, 1), (1, 10), (10, rows.shape[1])):
        tape = made.chunk(state, rows[:, begin:end])
        parts.append(tape.logits())
        state = made.commit(tape, end - begin)
    for copied in (made.weights, made.quantised, made.optimizer):
        copied()
    return relative_rms(np.concatenate(parts, axis=1), whole)
