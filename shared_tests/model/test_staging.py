"""What only a GPU does around a step, shown on a CPU: staged batches, compiled scoring, a warning. Budget: 8 s."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backends.cuda.staging import SLOTS, Staging
from core import rng
from core.check.tolerances import P2_FLOAT32, relative_rms
from core.training.loop import Meter
from shared_tests.support.harness import batches, engine, mini, working_weights


# torch imports its compiler's parts under names it has itself deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_scoring_is_compiled_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, without gradients, beside the training step's; the compiler's slow last part is left out."""
    config, compiler, called = mini("debug"), torch.compile, []
    weights, data = working_weights(config.model, 1.0), batches(config, 2)

    def compiled(function: Any, **options: Any) -> Any:
        made = compiler(function, dynamic=False, fullgraph=True, backend="aot_eager")
        return lambda *given, **named: called.append(function.__name__) or made(*given, **named)

    eager = engine("cuda", config, weights, dtype="float32")
    monkeypatch.setattr(torch, "compile", compiled)
    made = engine("cuda", config, weights, dtype="float32", compile=True)
    for run in data:
        wanted = eager.nll(run.tokens, run.targets)
        assert made.nll(run.tokens, run.targets).tobytes() == wanted.tobytes()
        later = [made.nll_later(run.tokens, run.targets, often) for often in (False, True)]
        assert later[0]().tobytes() == wanted.tobytes()
        assert relative_rms(later[1](), wanted) <= P2_FLOAT32
    assert called == ["_costs"] * 2, "once a batch: where it was asked for"
    assert eager.nll_later(*data[0][:2], True)().tobytes() == eager.nll(*data[0][:2]).tobytes(), "eager stays eager"
    assert made.stats()["traces"] == 0, "not a part of the training step"


class LateDevice:
    """A device that copies a buffer as late as it may: when its event is waited for, or when results are read."""

    def __init__(self, heeds: bool = True) -> None:
        self.heeds, self.waiting, self.buffers = heeds, [], 0

    def allocate(self, size: int) -> torch.Tensor:
        self.buffers += 1
        return torch.empty(size, dtype=torch.int32)

    def copy(self, buffer: torch.Tensor) -> tuple[torch.Tensor, Any]:
        made = torch.zeros_like(buffer)
        self.waiting.append((made, buffer))
        index = len(self.waiting)
        return made, SimpleNamespace(synchronize=lambda: self.run(index) if self.heeds else None)

    def run(self, upto: int) -> None:
        """Make the first copies, in order."""
        for made, buffer in self.waiting[:upto]:
            made.copy_(buffer)
        self.waiting[:upto] = [(made, made) for made, _ in self.waiting[:upto]]


@pytest.mark.parametrize("heeds", [True, False])
def test_no_buffer_is_overwritten_before_its_copy_ended(heeds: bool) -> None:
    """1,000 batches keep their checksums on a device that lags as far as it can; without its events they do not."""
    device = LateDevice(heeds)
    stage = Staging(device.allocate, device.copy)
    given = [
        rng.integers16(0, f"stage/{i}", 6 * n).astype(np.int32).reshape(6, n)[:, ::1]
        for i, n in enumerate([8] * 500 + [16] * 500)
    ]
    moved = [stage(array) for array in given]
    device.run(len(moved))
    same = [np.array_equal(b.numpy(), a) for a, b in zip(given, moved, strict=True)]
    assert sum(same) == (1000 if heeds else SLOTS * 2), "the last copies of each size of buffer, if events are ignored"
    assert device.buffers == 2 * SLOTS, "a buffer is made anew when it is too small, and only then"


def test_a_compilation_after_the_warm_up_is_said_once() -> None:
    config, said, traces = mini("debug"), [], [2.0, 2.0, 3.0, 5.0]
    run: Any = SimpleNamespace(config=config, log=lambda step, values: None, checkpoint_path="-")
    dataset: Any = SimpleNamespace(train=[], val=[])
    counting: Any = SimpleNamespace(stats=lambda: {"traces": traces.pop(0)})
    pending: Any = SimpleNamespace(result=lambda: SimpleNamespace(loss=1.0, grad_norm=1.0, finite=True))
    clock: Any = SimpleNamespace(seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.training.loop.training_bytes", lambda dataset: None)
        meter = Meter(run, counting, dataset, clock, said.append)
    for step in range(3):
        meter.add(step, 0.5, pending, 148 * (step + 1))
        meter.read(step + 1)
    warnings = [line for line in said if line.startswith("compiled again")]
    assert warnings == [
        "compiled again by step 2 (1 more): 4 rows of 37 tokens, in a shape that the warm-up had not seen (said once)"
    ]
