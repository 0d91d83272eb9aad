"""What only a GPU runs, as far as a CPU can show it: forms of attention, the staging of batches, the loop's warning.

FlashAttention is emulated by a small variable-length attention in a module of its name, which engines find and use.
On a GPU every form that is there is held to ours. Budget: 20 s.
"""

import dataclasses
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backends.cuda import attention, ops
from backends.cuda.staging import SLOTS, Staging
from core import rng, schedule
from core.checks import ConfigError
from core.train import Meter
from shared_tests.harness import EVERYTHING, batches, engine, mini, tokens, working_weights
from shared_tests.tolerances import P1_FAST, P2_BFLOAT16, P2_FLOAT64, relative_rms

BOS = 1
HOPPER, AMPERE, OLD = (9, 0), (8, 0), (7, 5)
ATTENDS = ("debug", "ablate_float", "baseline", "skc_8xh100", EVERYTHING)
"""Minis with attention: documents apart and whole rows, heads shared, layers repeated, recurrences between."""


# Where documents begin.


def rows_of_tokens(kind: str) -> np.ndarray:
    """Return rows (3, 16) of tokens with BOS in odd places."""
    made = tokens(f"spans/{kind}", 3, 16, 50, BOS, documents=False)
    if kind == "middle":  # no row begins with a document of its own
        made[0, 5] = made[1, 9] = made[2, 15] = BOS
    if kind == "adjacent":
        made[1, 3:6] = made[2, :2] = BOS
    if kind == "first":
        made[:, 0] = BOS
    if kind == "all":
        made[:] = BOS
    return made


KINDS = ("none", "middle", "adjacent", "first", "all")


def begins(made: np.ndarray, most: int) -> np.ndarray:
    """Return what `attention.spans` promises, token by token."""
    flat = [i for i, t in enumerate(made.reshape(-1)) if t == BOS or i % made.shape[1] == 0]
    return np.array(flat + [made.size] * (most + 1 - len(flat)), np.int32)


def without_rows(documents: torch.Tensor, most: int) -> torch.Tensor:
    """A faulty `spans`: a row that goes on in the middle of a document is joined to the row before."""
    flat = documents.reshape(-1)
    places = torch.nonzero(torch.cat([torch.ones(1, dtype=torch.bool), flat[1:] != flat[:-1]])).reshape(-1)
    return torch.cat([places, torch.full((most + 1,), flat.numel())])[: most + 1]


@pytest.mark.parametrize("most", [48, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_begin_where_documents_and_rows_do(kind: str, most: int) -> None:
    made = rows_of_tokens(kind)
    found = attention.spans(ops.document_ids(torch.tensor(made), BOS), most)
    assert found.dtype == torch.int32 and np.array_equal(found.numpy(), begins(made, most))


def test_spans_that_join_rows_would_be_seen() -> None:
    made = rows_of_tokens("none")
    found = without_rows(ops.document_ids(torch.tensor(made), BOS), 48)
    assert not np.array_equal(found.numpy(), begins(made, 48))


def test_there_is_room_for_every_batch_in_few_sizes() -> None:
    sizes = set()
    for step in range(200):
        made = tokens(f"room/{step}", 4, 64, 50, BOS, documents=False)
        made[rng.integers16(0, f"room/bos/{step}", 256).reshape(4, 64) % 200 < step] = BOS
        spans = len(begins(made, 0))
        sizes.add(found := attention.room(made, BOS))
        assert spans <= found <= made.size
    assert sorted(sizes) == [12, 24, 48, 96, 192, 256]
    assert attention.room(rows_of_tokens("all"), BOS) == 48


def test_more_documents_than_kernels_take_are_refused() -> None:
    made = np.full((64, 1024), BOS, np.int32)
    with pytest.raises(ConfigError, match="65536 documents in one micro-batch of 65536 tokens.*micro_batch"):
        attention.room(made, BOS)
    made[0, 1] = BOS + 1
    assert attention.room(made, BOS) == 65_535


# The choice.


class Fake:
    """FlashAttention's two functions by their documented meaning, one span after the other, in any float type."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.called = fault, {"rows": 0, "spans": 0}

    def rows(self, q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        """flash_attn_func: (B, T, heads, K)."""
        self.called["rows"] += 1
        return torch.stack([self._span(q[i], k[i], v[i], softmax_scale, causal) for i in range(len(q))])

    def spans(self, q: Any, k: Any, v: Any, softmax_scale: float, causal: bool, **at: Any) -> Any:
        """flash_attn_varlen_func: (N, heads, K); what no span covers is left as it was."""
        self.called["spans"] += 1
        if self.fault == "breaks":
            raise RuntimeError("an undefined symbol,\nas kernels of another build say")
        places, longest = at.pop("cu_seqlens_q"), at.pop("max_seqlen_q")
        assert at.pop("cu_seqlens_k") is places and at.pop("max_seqlen_k") == longest and not at
        assert places.dtype == torch.int32 and places[-1] == len(q) and max(torch.diff(places)) <= longest
        ends = [0, *range(longest, len(q) + 1, longest)] if self.fault == "whole rows" else places.tolist()
        spans = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]
        return torch.cat([self._span(q[s], k[s], v[s], softmax_scale, causal) for s in spans])

    def _span(self, q: Any, k: Any, v: Any, scale: float, causal: bool) -> Any:
        assert causal and q.shape[1] % k.shape[1] == 0
        groups = q.shape[1] // k.shape[1]
        k, v = (torch.repeat_interleave(x, groups, dim=1) for x in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) * scale
        hidden = torch.triu(torch.ones(len(q), len(q), dtype=torch.bool), 1)
        return torch.einsum("hts,shk->thk", torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), v)


def install(patch: pytest.MonkeyPatch, capability: tuple[int, int], **fakes: Fake) -> None:
    """Let engines on the CPU find these modules and take the processor for a GPU whose kernels know float64."""
    for name in ("flash_attn_interface", "flash_attn"):
        made: Any = ModuleType(name)
        if name in fakes:
            made.flash_attn_func, made.flash_attn_varlen_func = fakes[name].rows, fakes[name].spans
        patch.setitem(sys.modules, name, made if name in fakes else None)  # None: it cannot be imported
    patch.setattr(attention, "capability_of", lambda device: capability)
    patch.setattr(attention, "DTYPES", {"float64": torch.float64})


def built(name: str) -> Any:
    config = mini(name)
    return engine("cuda", config, working_weights(config.model, 1.0), dtype="float64", exact=False)


def results(made: Any, name: str) -> dict[str, np.ndarray]:
    """Return what an engine computes: whole rows, gradients, steps, and a text in two chunks from a state."""
    config = mini(name)
    run = batches(config, 2)
    found: dict[str, Any] = {"logits": made.logits(run[0].tokens), "nll": made.nll(*run[0][:2])}
    tape = made.chunk(made.start(len(run[0].tokens)), run[0].tokens[:, :9])
    found |= {"first": tape.logits(), "second": made.chunk(made.commit(tape, 9), run[0].tokens[:, 9:]).logits()}
    found |= made.gradients(run[0])[1]
    plans = (schedule.plan(step, 0.5, config.train) for step in range(2))
    found["losses"] = np.array([made.train_step(b, p).result().loss for b, p in zip(run, plans, strict=True)])
    return found


@pytest.mark.parametrize("name", ATTENDS)
def test_engines_with_flash_attention_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real path: the module is found, tried, chosen, called in every layer, with documents apart."""
    wanted, fake = results(built(name), name), Fake()
    install(monkeypatch, HOPPER, flash_attn_interface=fake)
    made, tried = built(name), dict(fake.called)
    isolated = mini(name).model.documents == "isolated"
    assert made.notes[1] == "attention: FlashAttention 3" + (", varlen" if isolated else "")
    found = results(made, name)
    for key, value in wanted.items():
        assert relative_rms(found[key], value) <= P2_FLOAT64, key
    layers = sum(mini(name).model.kinds[step.layer] == "attention" for step in mini(name).model.passes(True))
    used = {key: fake.called[key] - tried[key] for key in tried}
    whole = 0 if isolated else 1  # a first chunk without documents is a whole row
    assert used == {"spans": 5 * layers * isolated, "rows": (5 + whole) * layers * (not isolated)}


def test_a_batch_of_many_documents_gets_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = built("debug")
    install(monkeypatch, HOPPER, flash_attn_interface=Fake())
    made, seen = built("debug"), []
    room = made._room
    monkeypatch.setattr(made, "_room", lambda tokens: seen.append(room(tokens)) or seen[-1])
    for kind in KINDS:
        rows = rows_of_tokens(kind)
        assert relative_rms(made.logits(rows), wanted.logits(rows)) <= P2_FLOAT64, kind
    assert sorted(set(seen)) == [4, 8, 48]


def test_the_first_form_that_runs_is_taken_and_the_note_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini("ablate_float").model
    absent = "not installed"

    def note(capability: tuple[int, int], dtype: str = "float64", packed: bool = False, **fakes: Fake) -> str:
        with monkeypatch.context() as patch:
            install(patch, capability, **fakes)
            asked = dataclasses.replace(model, documents="packed") if packed else model
            return attention.choose(asked, dtype, False, torch.device("cpu"), 16).note

    assert note(HOPPER, flash_attn=Fake(), flash_attn_interface=Fake()) == "attention: FlashAttention 3, varlen"
    assert note(AMPERE, flash_attn=Fake(), flash_attn_interface=Fake()) == (
        "attention: FlashAttention 2, varlen (passed over: FlashAttention 3: not for compute capability 8.0)"
    )
    assert f"FlashAttention 3: {absent}" in (found := note(HOPPER, flash_attn=Fake())) and "FlashAttention 2," in found
    broken = note(HOPPER, flash_attn=Fake(), flash_attn_interface=Fake("breaks"))
    assert "FlashAttention 3: does not run: an undefined symbol, as kernels" in broken and "\n" not in broken
    wrong = note(HOPPER, flash_attn=Fake(), flash_attn_interface=Fake("whole rows"))
    assert wrong.startswith("attention: FlashAttention 2, varlen (passed over: FlashAttention 3: wrong here, by ")
    assert note(HOPPER, "float32", flash_attn=Fake()).endswith("(kernels compute in float64, not float32)")
    none = note(OLD, packed=True)
    assert none.startswith("attention: torch scaled_dot_product_attention (passed over: FlashAttention 3: not for ")
    assert none.count("not for compute capability 7.5") == 4


def test_torch_has_the_variable_length_attention_that_is_called() -> None:
    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(0, 0, 0, 0, 0, 0, 0, scale=1.0, window_size=(-1, 0))


@pytest.mark.parametrize("name", ["ablate_float", "baseline"])
def test_every_form_that_is_here_agrees_with_ours(name: str) -> None:
    model, gpu = mini(name).model, torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    for seq in (7, 17, 64):  # of one key all gradients are 0
        assert max(attention.gaps(None, model, torch.float32, device, seq=seq).values()) <= P1_FAST
    if gpu:
        for candidate in attention.CANDIDATES:
            form, found = attention.trial(candidate, model, "bfloat16", device, 64)
            assert form is None or max(found.values()) <= P2_BFLOAT16, (candidate, found)  # type: ignore[union-attr]


# Batches on their way to a device.


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


# The loop's warning.


def test_a_compilation_after_the_warm_up_is_said_once() -> None:
    config, said, traces = mini("debug"), [], [2.0, 2.0, 3.0, 5.0]
    run: Any = SimpleNamespace(config=config, log=lambda step, values: None, checkpoint_path="-")
    dataset: Any = SimpleNamespace(train=[], val=[])
    counting: Any = SimpleNamespace(stats=lambda: {"traces": traces.pop(0)})
    pending: Any = SimpleNamespace(result=lambda: SimpleNamespace(loss=1.0, grad_norm=1.0, finite=True))
    clock: Any = SimpleNamespace(seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.train.training_bytes", lambda dataset: None)
        meter = Meter(run, counting, dataset, clock, said.append)
    for step in range(3):
        meter.add(step, 0.5, pending)
        meter.read(step + 1)
    warnings = [line for line in said if line.startswith("compiled again")]
    assert warnings == [
        "compiled again by step 2 (1 more): 4 rows of 37 tokens, in a shape that the warm-up had not seen (said once)"
    ]
