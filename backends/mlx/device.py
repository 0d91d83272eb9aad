"""MLX's device: which chip it is, and what the engine makes of that. MLX only: Macs of several generations run it.

What is known of a chip is in `Chip` alone: tests put chips that are not here in the place of `chip`.
"""

import math
import os
import re
import weakref
from typing import Any, NamedTuple

import mlx.core as mx

from core.config import ConfigError
from core.engine.fitting import needed, usable
from core.engine.memory import gigabytes

LOSS_SCALE = {"float16": 1024.0}
"""What gradients are multiplied by on their way back: the small ones of float16 would vanish. A power of 2: exact."""
FILLED = 0.7
"""Share of the working set that an estimate may reach: beyond it a Mac swaps, and MLX fails at 1.5 of it only."""
BFLOAT16_FROM = 15
"""Generation of Apple's GPUs: g13 is M1, g14 M2, g15 M3. Those before it emulate bfloat16."""


class Chip(NamedTuple):
    """What runs MLX's ops by default."""

    gpu: bool
    metal: bool
    name: str
    architecture: str = ""
    """applegpu_g16s of an M4, for one."""
    working_set: float = 0.0
    """Bytes that a GPU may fill: what Metal recommends, or a card's memory."""
    memory: float = 0.0
    """Bytes of all memory that a GPU reaches."""
    capability: int = 0
    """Major compute capability of an NVIDIA GPU."""

    @property
    def words(self) -> str:
        """What it is, in words."""
        return f"{self.name} (GPU)" if self.gpu else "CPU"

    @property
    def dtype(self) -> str:
        """Compute type where nobody asks for one: bfloat16 where the chip has it."""
        if not self.gpu:
            return "float32"
        generation = re.match(r"applegpu_g(\d+)", self.architecture)
        if self.metal:
            return "float32" if generation and int(generation[1]) < BFLOAT16_FROM else "bfloat16"
        return "bfloat16" if self.capability >= 8 else "float32"


def chip() -> Chip:
    """Return what MLX says of its default device."""
    device = mx.default_device()
    gpu = device.type == mx.gpu
    facts = mx.device_info(device) if gpu else {}
    memory = float(facts.get("memory_size", facts.get("total_memory", 0)))
    return Chip(
        gpu,
        gpu and mx.metal.is_available(),
        str(facts.get("device_name", "CPU")),
        str(facts.get("architecture", "")),
        float(facts.get("max_recommended_working_set_size", memory)),
        memory,
        int(facts.get("compute_capability_major", 0)),
    )


def products(gpu: bool) -> str:
    """Return how this device multiplies float32, in words: on a GPU it is tried with a number that 10 bits lack."""
    x = mx.full((512, 512), 1 + 2.0**-12)
    switch = f"MLX_ENABLE_TF32={os.environ.get('MLX_ENABLE_TF32', '1')}"
    if not gpu or mx.all(mx.matmul(x, mx.eye(512)) == x).item():
        return f"in full ({switch})"
    late = ", but MLX had computed before this program could set it" if switch.endswith("=0") else ""
    return f"to about 10 bits ({switch}{late})"


def value_and_grad(losses, dtype):
    """Return mx.value_and_grad of the first of `losses`, which go back through values of `dtype` scaled by LOSS_SCALE.

    What overflows on the way stays infinite in the gradients: the engine's guard leaves the weights as they were then.
    """
    scale = LOSS_SCALE.get(dtype, 1.0)
    if scale == 1.0:
        return mx.value_and_grad(losses)

    def larger(*arguments):
        objective, loss = losses(*arguments)
        return objective * scale, loss

    def undone(*arguments):
        (objective, loss), grads = mx.value_and_grad(larger)(*arguments)
        return (objective / scale, loss), {name: grad / scale for name, grad in grads.items()}

    return undone


def micro_batch(chip, tokens, ranks):
    """Return how many tokens a micro-batch may have (None: any number), and the bytes that it is fitted to.

    On a GPU rows that someone asked for, `tokens` None, are not made fewer: they are taken, or refused.
    """
    if not chip.gpu:
        return None, usable(None, ranks)
    return tokens, math.inf if tokens is None else usable(chip.working_set, ranks, FILLED)


def check_memory(chip, config, rows, seq, dtype, composed):
    """Raise ConfigError where a GPU should fill more than FILLED of its working set with micro-batches of `rows`."""
    takes, most = needed(config, rows, seq, dtype, composed), FILLED * chip.working_set
    if not chip.gpu or takes <= most:
        return
    lower = "--train.micro-batch" if rows > 1 else "--train.seq, or the model"
    raise ConfigError(
        f"{rows:,} rows of {seq:,} tokens in a micro-batch take {gigabytes(takes)} in {dtype} by estimate, more than "
        f"{gigabytes(most)}, which is {FILLED} of the {gigabytes(chip.working_set)} that {chip.name} may fill: "
        f"lower {lower}"
    )


def keep_resident(engine, chip) -> bool:
    """Keep MLX's memory resident while `engine` lives, where more than half of a Mac's is in use; True: it does now.

    macOS else takes pages away from what a step needs again. It has no such limit before version 15.
    """
    if not chip.metal or mx.get_active_memory() <= chip.memory / 2:
        return False
    try:
        before = mx.set_wired_limit(int(chip.working_set))
    except (RuntimeError, ValueError):
        return True
    weakref.finalize(engine, mx.set_wired_limit, before)
    return True


class OnTheCPU:
    """An engine that computes on the CPU in a process whose default device is a GPU, and leaves that as it is.

    MLX: a GPU has no float64. Every call goes through here, so that every op of the engine gets the CPU's stream.
    """

    def __init__(self, build):
        with mx.stream(mx.cpu):
            self._engine = build()

    def __getattr__(self, name) -> Any:
        value = getattr(self.__dict__["_engine"], name)
        if not callable(value):
            return value

        def on_the_cpu(*arguments, **options):
            with mx.stream(mx.cpu):
                out = value(*arguments, **options)
            computes = any(hasattr(out, name) for name in ("nll", "best", "draft"))  # a tape, a twin
            return OnTheCPU(lambda: out) if computes else out

        return on_the_cpu
