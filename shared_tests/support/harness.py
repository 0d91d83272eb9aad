"""What the pair tests share: both backends' modules, ops on numpy arrays with gradients, minis with working weights."""

import dataclasses
import functools
import importlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import sentencepiece

from backends.mlx.blas import load_fast_blas
from core import presets, rng
from core.check.parity import perturbed
from core.config import ModelConfig, RunConfig, changed
from core.data.batch import Batch
from core.engine.measured import Measured, load_measured
from core.engine.protocol import Arrays, EngineOptions
from shared_tests.oracle import everything

load_fast_blas()  # before anything imports MLX
BACKENDS = ("mlx", "cuda")


def module(backend: str, name: str) -> Any:
    """Return `backends.<backend>.<name>`."""
    return importlib.import_module(f"backends.{backend}.{name}")


def to_device(backend: str, value: Any, dtype: str) -> Any:
    """Return a numpy array on the backend (floats in `dtype`); anything else unchanged."""
    if not isinstance(value, np.ndarray):
        return value
    kind = dtype if value.dtype.kind == "f" else str(value.dtype)
    if backend == "mlx":
        import mlx.core as mx

        return mx.array(value, getattr(mx, "bool_" if kind == "bool" else kind))
    import torch

    return torch.tensor(value, dtype=getattr(torch, kind))


def to_numpy(value: Any) -> np.ndarray:
    """Return a backend's array as numpy, of bfloat16 as float32."""
    narrow = str(value.dtype).endswith("bfloat16")
    if hasattr(value, "detach"):
        return (value.float() if narrow else value).detach().cpu().numpy()
    if narrow:
        import mlx.core as mx

        value = value.astype(mx.float32)
    return np.array(value)


def rounded(value: Any, dtype: str) -> Any:
    """Return a numpy array of floats rounded to bfloat16, ties to even, if that is `dtype`; anything else unchanged."""
    if dtype != "bfloat16" or not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    bits = value.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def call(backend: str, function: Callable, arguments: tuple, dtype: str) -> list[np.ndarray]:
    """Call a backend's function on numpy arguments and return its outputs as numpy arrays."""
    out = function(*(to_device(backend, a, dtype) for a in arguments))
    return [to_numpy(o) for o in (out if isinstance(out, tuple) else (out,))]


def gradients(backend: str, function: Callable, arguments: tuple, cotangents: list[np.ndarray], dtype: str) -> Arrays:
    """Return d(sum(outputs * cotangents)) / d(argument), by position, for every float array argument."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    values = [to_device(backend, a, dtype) for a in arguments]
    weights = [to_device(backend, c, dtype) for c in cotangents]

    def objective(*floats: Any) -> Any:
        full = list(values)
        for place, value in zip(places, floats, strict=True):
            full[place] = value
        out = function(*full)
        out = out if isinstance(out, tuple) else (out,)
        return sum((o * w).sum() for o, w in zip(out, weights, strict=True))

    if backend == "mlx":
        import mlx.core as mx

        grads = mx.grad(objective, argnums=list(range(len(places))))(*(values[p] for p in places))
        grads = [grads] if isinstance(grads, mx.array) else grads
    else:
        import torch

        inputs = [values[p].requires_grad_() for p in places]
        grads = torch.autograd.grad(objective(*inputs), inputs)
    return {str(place): to_numpy(g) for place, g in zip(places, grads, strict=True)}


def draw(name: str, *shape: int) -> np.ndarray:
    """Return standard normals named after the test that uses them."""
    return rng.normal(0, name, int(np.prod(shape))).reshape(shape)


def tokens(name: str, rows: int, seq: int, vocab: int, bos: int, documents: bool = True) -> np.ndarray:
    """Return random token rows (int32), with a BOS about every 11 tokens and two adjacent ones if `documents`."""
    flat = np.array([v % vocab for v in rng.integers16(0, name, rows * seq)], np.int32).reshape(rows, seq)
    flat[flat == bos] = (bos + 1) % vocab
    if documents:
        flat[rng.integers16(0, name + "/bos", rows * seq).reshape(rows, seq) % 11 == 0] = bos
        flat[:, seq // 2 : seq // 2 + 2] = bos
    return flat


def batches(config: RunConfig, count: int) -> list[Batch]:
    """Return `count` batches of random documents for a mini."""
    train, model = config.train, config.model
    made = []
    for step in range(count):
        rows = tokens(f"batch/{step}", train.batch, train.seq + 1, model.vocab, model.bos)
        made.append(Batch(rows[:, :-1], rows[:, 1:]))
    return made


@functools.cache
def working_weights(config: ModelConfig, scale: float) -> Arrays:
    """Return `core.check.parity.perturbed` weights of seed 0, made once per test process."""
    return perturbed(config, 0, scale)


LINES = ["the café in the old town", "a café and the sea", "the sea, the old café"] * 5
"""What `tiny_tokenizer` learns from."""


def tiny_tokenizer(**options: Any) -> bytes:
    """Train a tiny model that lacks what the official settings have, byte pieces above all, unless `options` say so."""
    model = io.BytesIO()
    made: dict[str, Any] = {
        "vocab_size": 40, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": False,
        "add_dummy_prefix": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(options.pop("sentences", LINES)),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **(made | options),
    )
    return model.getvalue()


EVERYTHING = "everything"
"""A model that no preset is: all examples of the oracle's parts together."""


OPPOSITE = "opposite"
"""Recurrent layers with what EVERYTHING has on off, and documents that do not end."""


HYBRID = "hybrid"
"""Koopman, SKC and attention layers in one ternary model without memories."""


def minis() -> list[str]:
    """Return the names of all presets, EVERYTHING, OPPOSITE and HYBRID."""
    return [*presets.PRESETS, EVERYTHING, OPPOSITE, HYBRID]


SIBLINGS = (
    "ablate_float", "ablate", "skc_ablate", "skc_600", "skc_8xh100_int6", "skc_proxy", "pr401", "pr550",
    "pr1394", *(f"{name}_mac" for name in ("pr401", "pr550", "pr1619", "pr1394", "pr1855")), "skc_1609_mac", "skc_1609",
)  # fmt: skip
"""Presets whose minis have no option that another mini lacks (test_minis.py), or that has a test file of its own: their
cases wait for the long run."""


def shortened(names: Iterable[str]) -> list[Any]:
    """Return names of minis as parameters of a test; SIBLINGS are marked long."""
    import pytest  # here: a device is checked without it

    return [pytest.param(name, marks=pytest.mark.long) if name in SIBLINGS else name for name in names]


def mini(name: str) -> RunConfig:
    """Return the mini of preset `name`, or EVERYTHING, OPPOSITE or HYBRID."""
    if name in presets.PRESETS:
        return presets.mini(presets.get(name).config)
    if name == HYBRID:
        config = presets.get("skc_mac").config
        layers = ("koopman", "skc_parallel", "koopman", "attention")
        model = changed(config.model, {"blocks": layers, "bank.at": "none", "engram.orders": 0})
        return presets.mini(dataclasses.replace(config, preset=HYBRID, model=model))
    config = presets.mini(presets.get("debug").config)
    if name == OPPOSITE:
        model = changed(config.model, {
            "layers": 2, "blocks": ("skc", "koopman"), "koopman.dim": 16, "skc.capsules": 4, "skc.block": 8,
            "skc.shift": False, "skc.bands": False, "documents": "packed",
        })  # fmt: skip
        return dataclasses.replace(config, preset=OPPOSITE, model=model)
    assert name == EVERYTHING, name
    model = changed(config.model, everything())
    # At rates of 0.003 so many parts at once are chaotic: rounding grows a hundredfold in ten steps (docs/log.md).
    rates: dict[str, Any] = dict.fromkeys(("lr_embed", "lr_matrix", "lr_vector", "lr_hash"), 1e-3)
    train = dataclasses.replace(config.train, repeat_from=0.5, **rates)
    return dataclasses.replace(config, preset=EVERYTHING, model=model, train=train)


def engine(backend: str, config: RunConfig, weights: Arrays | None = None, **options: Any) -> Measured:
    """Build an eager engine (compiling costs a minute here); with stored weights if the run trains so."""
    quantise = config.train.quantise == "always"
    return load_measured(backend, config, weights, EngineOptions(**{"compile": False, **options}), quantise)


@functools.lru_cache(maxsize=48)
def reader(backend: str, config: RunConfig, scale: float, **options: Any) -> Measured:
    """Return an engine with working weights, built once per process: nobody trains it, loads into it or plants a fault.

    An engine keeps tables for every row length that it saw, so one that met a planted fault may hold it for good.
    """
    return engine(backend, config, working_weights(config.model, scale), **options)
