"""Every engine does everything once: a step, scoring, writing from a prompt, a text in chunks: crashes show soon."""

import numpy as np

from core import presets
from core.check.tolerances import P2_BFLOAT16, P2_FLOAT32, relative_rms
from core.config import RunConfig
from core.decoding import generate
from core.decoding.settings import Decoding
from core.engine.protocol import Engine
from core.training import schedule
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
        if name.endswith("_mac") and name.removesuffix("_mac") in presets.PRESETS:
            continue  # the mini of its large sibling, but for a few sizes
        with child.part(name):
            config = mini(name)
            made = engine(child.backend, config, working_weights(config.model, 1.0), dtype="bfloat16")
            for note in made.notes if name in ("baseline", "skc_8xh100") else ():
                child.text(f"{name}, note", note)
            child.check(f"{name}: a text in chunks against the whole", everything(made, config), P2_BFLOAT16)
    if child.backend == "mlx":
        with child.part("float64"):
            beside(child)


def beside(child: Child) -> None:
    """Compare float32 with float64, which MLX computes on the CPU: what comes after that is on the GPU again."""
    import mlx.core as mx

    before, config = mx.default_device(), mini("skc_mac")
    weights, batch = working_weights(config.model, 1.0), batches(config, 1)[0]
    wide = engine("mlx", config, weights, dtype="float64")
    everything(wide, config)
    wide = engine("mlx", config, weights, dtype="float64")
    narrow = engine("mlx", config, weights, dtype="float32")
    same = mx.default_device() == before and narrow.device.endswith("GPU)") == child.gpu
    child.check("float64: engines that are elsewhere after it", float(not same), 0)
    ours, theirs = (made.gradients(batch)[1] for made in (narrow, wide))
    flat = (np.concatenate([of[name].ravel() for name in theirs]) for of in (ours, theirs))
    child.check(
        "float64: logits of float32", relative_rms(narrow.logits(batch.tokens), wide.logits(batch.tokens)), P2_FLOAT32
    )
    child.check("float64: gradients of float32", relative_rms(*flat), P2_FLOAT32)


def everything(made: Engine, config: RunConfig) -> float:
    """Use every method of an engine; return the gap between the logits of a text in three chunks and of the whole.

    RuntimeError if a step or a score is not finite.
    """
    batch = batches(config, 1)[0]
    result = made.train_step(batch, schedule.plan(0, 0.5, config.train)).result()
    if not result.finite or not np.isfinite(made.nll(*batch[:2])).all():
        raise RuntimeError(f"not finite: {result}")
    for prompt in generate.PROMPTS:
        generate.sample(made, Words(), prompt, Decoding(4), generate.context_limit(config))  # type: ignore[arg-type]
    rows = batch.tokens
    whole, state, parts = made.logits(rows), made.start(len(rows)), []
    for begin, end in ((0, 1), (1, 10), (10, rows.shape[1])):
        tape = made.chunk(state, rows[:, begin:end])
        parts.append(tape.logits())
        state = made.commit(tape, end - begin)
    for copied in (made.weights, made.quantised, made.optimizer):
        copied()
    return relative_rms(np.concatenate(parts, axis=1), whole)
