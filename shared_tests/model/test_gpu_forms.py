"""What only a GPU runs, as far as a CPU can show it: forms of attention.

FlashAttention is emulated by a small variable-length attention in a module of its name, which engines find and use.
On a GPU every form that is there is held to ours. Budget: 20 s.
"""

import contextlib
import dataclasses
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backends.cuda import attention
from core import rng
from core.check.tolerances import P1_FAST, P2_BFLOAT16, P2_FLOAT64, relative_rms
from core.checks import ConfigError
from core.config import changed
from core.decoding import generate
from core.decoding.settings import Decoding
from core.model import trunk
from core.training import schedule
from shared_tests.support.harness import EVERYTHING, batches, engine, mini, tokens, working_weights

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


def without_rows(made: np.ndarray, most: int) -> np.ndarray:
    """A faulty `spans`: a row that goes on in the middle of a document is joined to the row before."""
    places = np.flatnonzero(made.reshape(-1) == BOS)
    return np.concatenate([places, np.full(most + 1, made.size)])[: most + 1]


@pytest.mark.parametrize("most", [48, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_begin_where_documents_and_rows_do(kind: str, most: int) -> None:
    made = rows_of_tokens(kind)
    found = attention.spans(made, BOS, most)
    assert found.dtype == np.int32 and np.array_equal(found, begins(made, min(most, made.size)))


def test_spans_that_join_rows_would_be_seen() -> None:
    made = rows_of_tokens("none")
    assert not np.array_equal(without_rows(made, 48), begins(made, 48))


def test_there_is_room_for_every_batch_in_few_sizes() -> None:
    sizes = set()
    for step in range(200):
        made = tokens(f"room/{step}", 4, 64, 50, BOS, documents=False)
        made[rng.integers16(0, f"room/bos/{step}", 256).reshape(4, 64) % 200 < step] = BOS
        spans = len(begins(made, 0))
        found = attention.spans(made, BOS)
        sizes.add(room := len(found) - 1)
        assert spans <= room <= made.size and np.array_equal(found, begins(made, room))
    assert sorted(sizes) == [5, 10, 20, 40, 80, 160, 256]
    assert len(attention.spans(rows_of_tokens("all"), BOS)) == 49


def test_more_documents_than_kernels_take_are_refused() -> None:
    made = np.full((64, 1024), BOS, np.int32)
    with pytest.raises(ConfigError, match="65536 documents in one micro-batch of 65536 tokens.*micro_batch"):
        attention.spans(made, BOS)
    made[0, 1] = BOS + 1
    assert len(attention.spans(made, BOS)) == 65_536


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
    layers = sum(mini(name).model.kind(step.layer) == "attention" for step in trunk.layers(mini(name).model, True))
    used = {key: fake.called[key] - tried[key] for key in tried}
    whole = 0 if isolated else 1  # a first chunk without documents is a whole row
    assert used == {"spans": 5 * layers * isolated, "rows": (5 + whole) * layers * (not isolated)}


def test_a_batch_of_many_documents_gets_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = built("debug")
    install(monkeypatch, HOPPER, flash_attn_interface=Fake())
    made, seen = built("debug"), []
    move = made._move
    monkeypatch.setattr(made, "_move", lambda array: seen.append(array.shape) or move(array))
    for kind in KINDS:
        rows = rows_of_tokens(kind)
        assert relative_rms(made.logits(rows), wanted.logits(rows)) <= P2_FLOAT64, kind
    assert sorted({shape[0] - 1 for shape in seen if len(shape) == 1}) == [3, 6, 12, 48]


def test_an_engine_makes_the_room_that_it_was_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, HOPPER, flash_attn_interface=Fake())
    config, rows = mini("debug"), rows_of_tokens("adjacent")
    made: Any = engine("cuda", config, dtype="float64", exact=False, spans=((3, 16, 5), (4, 16, 7)))
    assert [len(made._begins(r)) - 1 for r in (rows_of_tokens("middle"), rows, rows[:2])] == [10, 10, 8]
    assert np.array_equal(made._begins(rows).numpy(), begins(rows, 10))


# cuDNN, by a stand-in for torch's attention where it is restricted to it.


class CuDNN:
    """sdpa_kernel and scaled_dot_product_attention: while restricted, a single key is refused, as cuDNN does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.restricted, self.lengths = False, []
        self._attend = torch.nn.functional.scaled_dot_product_attention
        patch.setattr(torch.nn.attention, "sdpa_kernel", self._restrict)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", self._attention)

    @contextlib.contextmanager
    def _restrict(self, backends: Any) -> Any:
        assert backends == torch.nn.attention.SDPBackend.CUDNN_ATTENTION
        self.restricted = True
        try:
            yield
        finally:
            self.restricted = False

    def _attention(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        if self.restricted:
            self.lengths.append((q.shape[2], k.shape[2]))
            if k.shape[2] == 1:
                raise RuntimeError("No available kernel. Aborting execution.")
        return self._attend(q, k, v, **options)


@pytest.mark.parametrize("name", ["baseline", "ablate_float"])
def test_cudnn_is_asked_for_whole_rows_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini(name)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, seq=64), model=changed(config.model, {"head.softcap": None})
    )
    weights, text = working_weights(config.model, 1.0), SimpleNamespace(
        bos=BOS, encode=lambda text: np.arange(5, 5 + len(text)), decode=str
    )  # fmt: skip

    def outcome(made: Any) -> list[Any]:
        drawn = [
            generate.sample(made, text, prompt, Decoding(tokens), 64)  # type: ignore[arg-type]
            for prompt, tokens in (("", 4), ("abc", 4), ("", 70))
        ]
        rows = tokens("cudnn", 2, 65, config.model.vocab, BOS)
        windows = [rows[:, :-1], rows[:1, 63:64], rows[:, :7]]  # the last plain window of a text may be one token
        return [drawn, [made.logits(window) for window in windows]]

    wanted = outcome(engine("cuda", config, weights, dtype="float64", exact=False))
    fake = CuDNN(monkeypatch)
    install(monkeypatch, AMPERE)
    made = engine("cuda", config, weights, dtype="float64", exact=False)
    assert made.notes[1].startswith("attention: cuDNN"), made.notes[1]
    tried = len(fake.lengths)
    found = outcome(made)
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert relative_rms(ours, theirs) <= P2_FLOAT64
    used = fake.lengths[tried:]
    assert len(used) == config.model.layers and set(used) == {(64, 64)}, "a whole row goes there, nothing else"


# Shared heads in torch's own variable-length attention.


def varlen(kind: str) -> Any:
    """Return a `varlen_attn` as torch has, has had, or might have it, by FlashAttention's meaning."""

    def old(q: Any, k: Any, v: Any, a: Any, b: Any, m: int, n: int, *, scale: float, window_size: tuple) -> Any:
        assert a is b and m == n and window_size == (-1, 0)
        if kind == "equal heads only" and q.shape[1] != k.shape[1]:
            raise RuntimeError("Number of heads must be equal")
        if kind == "wrong gradient" and q.shape[1] != k.shape[1]:
            k = k + (k.detach() - k) / 2
        at = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), a) | dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), m)
        return Fake().spans(q, k, v, softmax_scale=scale, causal=True, **at)

    def new(*given: Any, scale: float, window_size: tuple, enable_gqa: bool = False) -> Any:
        if not enable_gqa and given[0].shape[1] != given[1].shape[1]:
            raise ValueError("needs enable_gqa=True")
        return old(*given, scale=scale, window_size=window_size)

    return new if kind == "asks" else old


@pytest.mark.parametrize(
    "kind, chosen",
    [
        ("asks", ""),
        ("knows groups", ""),
        ("equal heads only", ", heads repeated"),
        ("wrong gradient", ", heads repeated"),
    ],
)
def test_heads_are_repeated_only_where_they_must_be(kind: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = results(built("ablate_float"), "ablate_float")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen(kind))
    install(monkeypatch, AMPERE)
    made = built("ablate_float")
    assert made.notes[1].startswith(f"attention: torch's FlashAttention 2{chosen}, varlen ("), made.notes[1]
    found = results(made, "ablate_float")
    for key, value in wanted.items():
        assert relative_rms(found[key], value) <= P2_FLOAT64, key


# torch imports its compiler's parts under names it has itself deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_form_that_cannot_be_traced_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel may hold the kernel and lack what its fake needs, which only torch.compile calls."""
    fake = Fake()

    @torch.library.custom_op("skc_tests::rows", mutates_args=())
    def rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fake.rows(q, k, v, q.shape[-1] ** -0.5, True)

    @rows.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise ModuleNotFoundError("No module named 'flash_attn_config'")

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            out = fake.rows(q, k, v, q.shape[-1] ** -0.5, True)
        return torch.autograd.grad(out, (q, k, v), grad)

    rows.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    install(monkeypatch, HOPPER, flash_attn_interface=Fake(), flash_attn=Fake())
    monkeypatch.setattr(
        sys.modules["flash_attn_interface"], "flash_attn_func", lambda q, k, v, softmax_scale, causal: rows(q, k, v)
    )
    model = dataclasses.replace(mini("ablate_float").model, documents="packed")
    given = (model, "float64", False, torch.device("cpu"), 16)
    assert attention.choose(*given).note == "attention: FlashAttention 3"
    traced = attention.choose(*given, traced=True).note
    assert traced.startswith("attention: FlashAttention 2 (passed over: FlashAttention 3: does not run: "), traced
    assert "fake tensor" in traced


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
    assert none.count("not for compute capability 7.5") == 5


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
