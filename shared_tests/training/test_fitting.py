"""What is reckoned before a run: rows that fit in memory, and room for the documents of a batch. Budget: 15 s."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from core import presets, rng
from core.check.tolerances import P2_FLOAT64, relative_rms
from core.config import RunConfig, changed
from core.data.batch import Batch
from core.data.batches import batch
from core.data.bundled import open_data
from core.data.dataset import Dataset, Split
from core.engine.fitting import fitting, halves, usable, values_per_token
from core.engine.ranks import Alone
from core.model.params import param_table
from core.training import schedule
from core.training.spans import documents, room, rooms
from shared_tests.support.harness import BACKENDS, batches, engine, mini, module, working_weights

GB = 1e9


# Rows that fit.


def kept(config: RunConfig) -> float:
    """Return how many float32 numbers a token keeps for the backward pass in eager PyTorch, weights left out."""
    made: Any = engine(
        "cuda",
        config,
        {name: np.full(row.shape, 0.01, np.float32) for name, row in param_table(config.model).items()},
        dtype="float32",
    )
    rows = np.full((1, config.train.seq), 5, np.int32)
    objective, (weights, *arguments) = made.trace(Batch(rows, rows))
    own, sizes = {w.untyped_storage().data_ptr() for w in weights.values()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = objective(weights, *arguments)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in sizes.values()) / 4 / config.train.seq


@pytest.mark.parametrize("name", ["ablate_float", "baseline", "ternary_74m", "skc_mac", "skc_8xh100", "skc_600"])
def test_the_estimate_is_what_pytorch_keeps(name: str) -> None:
    """At full width, with fewer layers: what a layer keeps does not depend on how many there are."""
    config = presets.get(name).config
    model = changed(config.model, {"layers": 4, "engram.buckets": 101})
    train = dataclasses.replace(config.train, batch=1, micro_batch=None, seq=64, quantise="never")
    config = dataclasses.replace(config, model=model, train=train)
    assert values_per_token(model, 64) == pytest.approx(kept(config), rel=0.15)


@pytest.mark.parametrize(
    "name, dtype, memory, rows",
    [
        ("skc_8xh100", "bfloat16", 0.8 * 80 * GB, 64),  # an H100
        ("ternary_74m", "bfloat16", 0.8 * 80 * GB, 64),
        ("skc_8xh100", "bfloat16", 0.8 * 24 * GB, 16),
        ("skc_8xh100", "bfloat16", 0.5 * 16 * GB, 8),  # a laptop
        ("skc_8xh100", "float32", 0.5 * 16 * GB, 4),
        ("skc_8xh100", "float32", 1 * GB, 1),  # not even one: tried all the same
        ("baseline", "bfloat16", 0.5 * 16 * GB, 32),
        ("tiny", "float32", 0.5 * 8 * GB, 16),
    ],
)
def test_node_presets_shrink_to_the_machine(name: str, dtype: str, memory: float, rows: int) -> None:
    config = presets.get(name).config
    assert fitting(config, config.train.seq, dtype, memory) == rows


def test_more_memory_never_takes_fewer_rows() -> None:
    config = presets.get("skc_8xh100").config
    for seq in (64, 1024, 4096):
        found = [fitting(config, seq, "float32", memory * GB) for memory in range(1, 200, 3)]
        assert found == sorted(found) and found[-1] == config.train.rows_of(seq)[1] and found[0] >= 1
        composed = [fitting(config, seq, "float32", memory * GB, True) for memory in range(1, 200, 3)]
        assert all(a <= b for a, b in zip(composed, found, strict=True))
    assert halves(64) == [64, 32, 16, 8, 4, 2, 1] and halves(6) == [6, 3, 2, 1] and halves(1) == [1]


def test_ranks_take_what_the_smallest_of_them_may() -> None:
    ranks: Any = SimpleNamespace(world=2, gather=lambda row: [row, np.array([3.0])])
    assert usable(80e9, ranks) == 3.0
    assert usable(80e9, Alone()) == 0.8 * 80e9
    other: Any = SimpleNamespace(world=4, gather=lambda row: [row])
    assert usable(None, Alone()) == 4 * usable(None, other) > 1e8


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_that_fits_itself_trains_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini("tiny")
    small = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=1))
    sides, used, cut = [], [], module(backend, "engine").micro_batches
    monkeypatch.setattr(
        module(backend, "engine"), "micro_batches", lambda run, most, world: used.append(most) or cut(run, most, world)
    )
    for fits in (False, True):
        if fits:
            place = module(backend, "device" if backend == "mlx" else "engine")
            monkeypatch.setattr(place, "usable", lambda own, ranks: 1e6)
        made: Any = engine(backend, config, working_weights(config.model, 1.0), dtype="float64")
        assert made._rows(config.train.seq) == (1 if fits else 4)
        assert fits == any(note.startswith("micro-batches: 1 of 4 rows, to fit in") for note in made.notes)
        for step, data in enumerate(batches(config, 2)):
            made.train_step(data, schedule.plan(step, 0.5, config.train)).result()
        sides.append(made.params())
    assert used == [4, 4, 1, 1]
    for name, value in sides[0].items():
        assert relative_rms(sides[1][name], value) <= P2_FLOAT64, name
    asked: Any = engine(backend, small, working_weights(config.model, 1.0), dtype="float64")
    assert not any(note.startswith("micro-batches") for note in asked.notes), "what was asked for is not worth a word"


# Room for documents.


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


def stream(name: str, length: int, one_in: int) -> Split:
    """Return a stream of `length` tokens in which about one in so many begins a document."""
    drawn = rng.integers16(0, name, length)
    tokens = np.where(drawn % one_in == 0, 1, 2 + drawn % 40).astype("<u2")
    tokens[0] = 1
    tokenizer: Any = SimpleNamespace(vocab=50, bos=1)
    return Split([tokens], tokenizer)


def test_documents_are_counted_window_by_window() -> None:
    split = stream("documents", 1000, 7)
    tokens = split.read(0, 1000)
    wanted = [1 + int((tokens[i * 16 + 1 : (i + 1) * 16] == 1).sum()) for i in range(999 // 16)]
    assert documents(split, 16, 1).tolist() == wanted and len(set(wanted)) > 3


def test_long_texts_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    split, begun = stream("documents", 4001, 7), []
    gather = split.gather
    monkeypatch.setattr(split, "gather", lambda starts, length: begun.extend(starts.tolist()) or gather(starts, length))
    monkeypatch.setattr("core.training.spans.SAMPLE", 160)
    assert len(documents(split, 16, 1)) == 10 and begun == [16 * 25 * i for i in range(10)]


@pytest.mark.parametrize("one_in", [5, 30, 400])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_no_batch_of_the_text_needs_more_room_and_little_is_wasted(rows: int, one_in: int) -> None:
    split = stream(f"room/{one_in}", 60_000, one_in)
    found = room(documents(split, 64, 1), rows)
    needed = []
    for step in range(400):
        made = batch(split, step, rows, 64, 7).tokens
        needed.append(rows + int((made[:, 1:] == 1).sum()))
    assert max(needed) <= found <= 1.5 * max(needed) + 64 and found % 64 == 0


def test_rare_batches_are_what_the_bound_allows() -> None:
    """Of sums of draws, at most the declared share is beyond it; a bound of means alone would be passed by half."""
    draws = np.random.default_rng(0)
    counts = 1 + draws.poisson(1.5, 4096)
    sums = counts[draws.integers(0, 4096, (200_000, 64))].sum(axis=1)
    found = room(counts, 64)
    assert sums.max() <= found and np.mean(sums > 64 * counts.mean()) > 0.4
    assert [room(np.ones(5, int), 64), room(np.array([1024]), 1), room(np.full(3, 1024), 64)] == [64, 1024, 65_536]


def test_every_shape_of_a_run_has_its_room(dataset: Dataset) -> None:
    config = presets.get("ablate_float").config
    train = dataclasses.replace(config.train, batch=8, seq=256, seq_stages=(64,), seq_until=(0.5,))
    config = dataclasses.replace(config, train=train)
    shapes = [(rows, seq) for rows, seq, _ in rooms(dataset.train, config, 1)]
    assert shapes == [*((n, 64) for n in (1, 2, 4, 8, 16, 32)), *((n, 256) for n in (1, 2, 4, 8))]
    assert max((rows, seq) for rows, seq, _ in rooms(dataset.train, config, 2) if seq == 256) == (4, 256)
    for changes in ({"documents": "packed"}, {"blocks": ("koopman",)}):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        assert rooms(dataset.train, other, 1) == (), "no form of attention asks where documents begin"
