"""The torch engine's update as a device sees it: launches, graphs, rounding of what is compiled. Budget: 40 s.

Launches are operations that torch dispatches and that compute or copy something, counted on tensors without values.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends.cuda import banks, optim, storage
from core import presets
from core.check.tolerances import relative_rms
from core.config import ModelConfig, RunConfig, TrainConfig
from core.data.batch import Batch
from core.engine.plan import NUMBERS
from core.model import params
from core.model.storage import KINDS, Storage, storage_class
from core.training import schedule
from shared_tests.support.harness import BACKENDS, batches, call, draw, engine, mini, module, to_device, to_numpy


class Launches(TorchDispatchMode):
    """Counts what is launched while it is on: every operation but views."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if not func.is_view and packet not in (torch.ops.aten._unsafe_view, torch.ops.aten.detach):
            self.by_name[packet.__name__] += 1
        return func(*args, **(kwargs or {}))


def launches(config: RunConfig) -> dict[str, int]:
    """Return how many launches an update takes, and how many the quantisers do."""
    weights = {name: np.zeros(row.shape, np.float32) for name, row in params.param_table(config.model).items()}
    made: Any = engine("cuda", config, weights, dtype="float32")
    held, state = (own.map(lambda whole: whole.to("meta")) for own in (made._params, made._state))
    grads = {name: torch.empty_like(value) for name, value in held.items()}
    numbers = [torch.zeros(shape, device="meta") for shape in ((), (len(NUMBERS),), ())]
    found = {}
    with Launches() as counted:
        made._finish(held, state, grads, *numbers)
    found["update"] = counted.by_name.total()
    with Launches() as counted:
        made._trained(held, True)
    return {**found, "quantisers": counted.by_name.total()}


def deeper(config: RunConfig, times: int) -> RunConfig:
    """Return a run with the same layers several times over, and averages."""
    model = config.model
    blocks = tuple(map(model.kind, range(model.layers))) * times
    model = dataclasses.replace(model, layers=len(blocks), blocks=blocks)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, average_from=0.1))


@pytest.mark.parametrize("name", ["baseline", "skc_8xh100"])
def test_launches_do_not_grow_with_depth(name: str) -> None:
    once, thrice = (deeper(mini(name), times) for times in (1, 3))
    assert len(params.param_table(thrice.model)) > 2 * len(params.param_table(once.model)) - 10
    assert launches(once) == launches(thrice)


def test_launches_that_grow_with_depth_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank for every parameter is what there was."""

    def apart(model: ModelConfig, owner: dict[str, int], scaffolding: Any) -> list[params.ParamBank]:
        rows = params.param_table(model).items()
        return [params.ParamBank(r.group, r.storage, r.group != "vector", (name,), (r.shape,)) for name, r in rows]

    monkeypatch.setattr(module("cuda", "masters"), "banks", apart)
    once, thrice = (launches(deeper(mini("baseline"), times)) for times in (1, 3))
    assert all(thrice[part] > 1.5 * count for part, count in once.items())


FULL_SIZE = {"baseline": (101, 6, 363, 72), "ternary_74m": (115, 8, 463, 128), "skc_8xh100": (179, 14, 1038, 247)}
"""Preset -> parameters, banks, launches of an update and of the quantisers: what docs/performance.md says."""


@pytest.mark.long
@pytest.mark.parametrize("name", FULL_SIZE)
def test_launches_at_full_size(name: str) -> None:
    config = presets.get(name).config
    found = launches(config)
    sizes = len(params.param_table(config.model)), len(params.banks(config.model))
    assert (*sizes, found["update"], found["quantisers"]) == FULL_SIZE[name]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[RunConfig], Any]]:
    """Return engines that compile, by a compiler that runs what it gets as it is; forget what it made."""
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs, **options: graph.forward)
    monkeypatch.setattr(module("cuda", "engine"), "SPARE", 1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        yield lambda config: engine("cuda", config, dtype="float32", compile=True)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_an_update_is_a_graph_for_every_bank_and_another_micro_batch_is_none(
    traced: Callable[[RunConfig], Any],
) -> None:
    """The averages are one graph more. The number of micro-batches, once a constant, would have been one again.

    A second engine finds no limit used up, though one function makes the graphs of both.
    """
    for name in ("baseline", "skc_8xh100"):
        train = dataclasses.replace(mini(name).train, average_from=0.1)
        made = traced(dataclasses.replace(mini(name), train=train))
        grads = {name: torch.ones_like(value) for name, value in made._params.items()}
        plan, loss = schedule.plan(0, 0.5, train), torch.ones(())
        seen = []
        for step, count in enumerate((1.0, 8.0, 2.5)):
            hyper = made._numbers([value * (step + 1) for value in dataclasses.replace(plan, decay_embed=0.1).numbers])
            made._finish(made._params, made._state, grads, loss, hyper, made._numbers(count))
            seen.append(made.stats()["traces"])
        assert seen == [len(params.banks(mini(name).model)) + 1] * 3
    made._finish(made._params, made._state, grads, loss, made._numbers(plan.numbers), 4.0)
    assert made.stats()["traces"] > seen[-1], "a number of the host's is a constant of the graph"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_last_batch_of_fewer_rows_compiles_the_loss_again_and_nothing_else(
    traced: Callable[[RunConfig], Any],
) -> None:
    config = mini("debug")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=2, micro_batch=2, seq=8))
    made, seen = traced(config), []
    whole = batches(config, 1)[0]
    for rows in (2, 1):
        made.train_step(Batch(whole.tokens[:rows], whole.targets[:rows], rows), schedule.plan(0, 0.5, config.train))
        seen.append(made.stats()["traces"])
    assert seen == [1 + len(params.banks(config.model)), 2 + len(params.banks(config.model))]


# Quantisers.


def hard_weights(storage: str) -> torch.Tensor:
    """Return a stack of two matrices, (2, 9, 189): normals, ties and neighbours of ties, zeros, tiny and large rows."""
    weight = draw(f"hard/{storage}", 2, 9, 189).astype(np.float32) * 0.02
    weight[0, 0] = 0.0
    weight[0, 1] = 1e-7
    weight[0, 2] = np.float32(0.25) * np.round(4 * draw("grid", 189)).astype(np.float32)
    weight[0, 3] = np.where(np.arange(189) % 2, 1.0, 0.5)  # half of a scale of 1
    top = {"int4": 7, "int6": 31, "int8": 127, "fp8": 448}.get(storage.partition("/")[0], 1)
    weight[0, 4] = (np.arange(189) % (2 * top)) / 2  # every code, and half-way to the next
    weight[0, 4, ::64] = top
    weight[0, 5] = np.nextafter(weight[0, 4], np.float32(9e9))
    weight[0, 6] = np.nextafter(weight[0, 4], np.float32(-9e9))
    weight[0, 7] *= 1e5
    weight[0, 8, ::2] *= -1.0
    return torch.tensor(weight)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_quantisers_keep_every_bit() -> None:
    """Of every class and grouping that is not one of the others' code, in one graph, with ties."""
    kinds: list[Storage] = ["float16", "ternary/64", "ternary/128", "int8/64", "int6/row", "int4/128", "fp8/row"]
    assert {storage_class(kind) for kind in kinds} == {*KINDS}
    weights = [hard_weights(name) for name in kinds]
    options: Any = banks.compiler_options()
    compiled = banks.Quantiser(lambda function: torch.compile(function, dynamic=False, options=options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = compiled(weights, kinds)
    assert compiled.note.startswith("compiled (float16, ternary, int8, int6, int4, fp8)")
    for name, weight, value in zip(kinds, weights, found, strict=True):
        apart = torch.stack([storage.stored(matrix, name) for matrix in weight])
        assert torch.equal(value.view(torch.int32), apart.view(torch.int32)), name


def test_a_quantiser_that_rounds_otherwise_is_not_used() -> None:
    """It is found out at its first use, said, and the eager one goes on."""
    weights, kinds = [hard_weights("ternary/64"), hard_weights("int4/64")], ["ternary/64", "int4/64"]

    def compiler(function: Any) -> Any:
        return lambda weights, kinds: [
            value + (kind == "int4/64") * 1e-9 for value, kind in zip(function(weights, kinds), kinds, strict=True)
        ]

    made = banks.Quantiser(compiler)
    with pytest.warns(UserWarning, match=r"compiled quantisers give other bits \(int4/64\): eager ones are used"):
        first = made(weights, kinds)
    for found in (first, made(weights, kinds)):
        assert all(torch.equal(a, storage.stored(w, kind)) for a, w, kind in zip(found, weights, kinds, strict=True))
    assert made.note == "eager"


# Precision.


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)], ids=str)
def test_newton_schulz_in_bfloat16_stays_near(shape: tuple[int, int], backend: str) -> None:
    """Its singular values too; float32 comes out, and it is not the float32 result."""
    settings, rule = TrainConfig(), module(backend, "optim").newton_schulz
    narrow = to_dtype(backend, "bfloat16")
    given = (draw(f"ns/{shape}", 2, *shape), settings.muon_iterations, settings.muon_coefficients)
    (wide,), (near,) = (call(backend, rule, (*given, dtype), "float32") for dtype in (None, narrow))
    assert near.dtype == np.float32 and 1e-4 < relative_rms(near, wide) < 0.1
    values = np.linalg.svd(near, compute_uv=False)
    assert values.max() < 1.3 and np.median(values) > 0.65


def to_dtype(backend: str, name: str) -> Any:
    return module(backend, "engine").DTYPES[name]


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_newton_schulzs_alone(backend: str) -> None:
    """Momentum keeps its bits, masters move by nearly the same; AdamW's parameters by the same."""
    config, steps = mini("baseline"), []
    for kind in (None, "bfloat16"):
        made: Any = engine(backend, config, dtype="float32", newton_schulz=kind)
        before = made.params()
        made.train_step(batches(config, 1)[0], schedule.plan(0, 0.5, config.train)).result()
        moved = {name: value - before[name] for name, value in made.params().items()}
        steps.append((moved, made.optimizer()))
        assert sum("Newton-Schulz in " + (kind or "float32") in note for note in made.notes) == 1
    (wide, state), (near, other) = steps
    assert all(np.array_equal(value, other[name]) for name, value in state.items())
    for name, row in params.param_table(config.model).items():
        gap = relative_rms(near[name], wide[name])
        assert 0 < gap < 0.1 if row.group == "matrix" and wide[name].any() else gap == 0, (name, gap)


def test_tf32_is_off_whatever_an_image_says() -> None:
    """NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which torch reads as `high` when it starts."""
    torch.set_float32_matmul_precision("high")
    try:
        made = engine("cuda", mini("debug"), dtype="float32")
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
        assert any(note.startswith("float32 products: in full, TF32 off") for note in made.notes)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_inductors_advice_on_tf32_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors here: without the filter the second half of this test would be the first."""
    from torch._inductor.compile_fx import _warn_tf32_disabled

    made: Any = engine("cuda", mini("debug"), dtype="float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    advise = _warn_tf32_disabled.__wrapped__
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs: advise())
    made._count(None, [])
    with pytest.raises(UserWarning, match="TensorFloat32"):
        advise()


# Norms.


def test_the_norm_on_the_cpu_is_right_at_many_values() -> None:
    """torch's own norm adds one value after the other there; on a device it is used, for its few launches."""
    value = torch.tensor(draw("norm", 1 << 20).astype(np.float32)).repeat(4)
    exact = float(torch.linalg.vector_norm(value.double()))
    assert abs(float(optim.global_norm([value])) / exact - 1) < 1e-6
    assert abs(float(torch.nn.utils.get_total_norm([value])) / exact - 1) > 1e-6, "then one path would do"
    assert to_numpy(optim.global_norm([to_device("cuda", np.ones(4), "float64")] * 4)) == 4.0
