"""CUDA: the form of attention, chosen once when an engine is built: from what is installed, the device and the type.

MLX has one form. The reference of every form here is ops.attention with a mask.
Shapes: B rows, T positions, H heads, G key/value heads, K channels of a head, N = B * T positions end to end, M spans.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from backends.cuda import ops
from core.checks import ConfigError
from core.console import one_line

DTYPES = {"bfloat16": torch.bfloat16}
"""Compute types of the kernels."""
AGREES = 0.02
"""Largest relative RMS of a kernel in bfloat16 against ours in float32, of the output and each gradient."""
LENGTH = 256
"""Mean length of documents that there is room for where nothing is known of the text (EngineOptions.spans)."""
SHORTEST = 64
"""Fewest positions that cuDNN is asked for: it refuses a single key, and makes a plan for every length."""
MOST = 65_535
"""Most spans of one call: FlashAttention 2 has a place of its launch grid for each."""


class Spans(NamedTuple):
    """What a query sees, in place of a mask: the keys up to its own place in its span of one document."""

    begins: Any  # (M + 1,) int32: where each span begins, rows end to end; N for those that are not there
    longest: int


class Form(NamedTuple):
    """One way to compute attention."""

    attend: Callable  # called like ops.attention
    spans: bool  # it takes Spans in place of the mask of isolated documents


class Choice(NamedTuple):
    """The form of an engine's attention."""

    form: Form | None  # None: ops.attention
    note: str


def spans(tokens: np.ndarray, bos: int, known: int | None = None) -> np.ndarray:
    """Return where each run of one document begins in a batch (B, T), rows end to end: (M + 1,) int32.

    A row's first position begins one. M is `known`, or reckoned from LENGTH, and is doubled until all fit: few
    different sizes, so that few shapes are compiled; places that are left over hold N. ConfigError if there are more
    documents than the kernels take.
    """
    first = np.ones((len(tokens), 1), np.bool_)
    begins = np.flatnonzero(np.concatenate([first, tokens[:, 1:] == bos], axis=1))
    most, count = known or len(tokens) + tokens.size // LENGTH, len(begins)
    while most < count:
        most *= 2
    if count > MOST:
        raise ConfigError(
            f"{count} documents in one micro-batch of {tokens.size} tokens: attention kernels take at most {MOST}; "
            "lower train.micro_batch (or eval.batch)"
        )
    made = np.full(min(most, tokens.size, MOST) + 1, tokens.size, np.int32)
    made[:count] = begins
    return made


def _from_kernels(rows: Callable | None, pieces: Callable | None) -> Callable:
    """Return kernels as one function that is called like ops.attention, with Spans in place of a mask.

    Positions come before heads: `rows` gets (q, k, v) as (B, T, heads, K), causal; `pieces` as (N, heads, K) and Spans.
    Scoring that goes on from a state, with more keys than queries, has a mask: it takes ops.attention.
    """

    def attend(q, k, v, mask, exact):
        count, _, seq, _ = q.shape
        if pieces is not None and isinstance(mask, Spans):
            flat = (torch.swapaxes(x, 1, 2).reshape(count * seq, x.shape[1], x.shape[3]) for x in (q, k, v))
            return torch.swapaxes(pieces(*flat, mask).reshape(count, seq, q.shape[1], q.shape[3]), 1, 2)
        if rows is not None and mask is None:
            return torch.swapaxes(rows(*(torch.swapaxes(x, 1, 2) for x in (q, k, v))), 1, 2)
        return ops.attention(q, k, v, mask, exact)

    return attend


def _only(out):
    """Return the output of a kernel; early releases of FlashAttention 3 give the logsumexp beside it."""
    return out[0] if isinstance(out, tuple) else out


def _flash(module: str) -> Form:
    kernels = importlib.import_module(module)

    def rows(q, k, v):
        return _only(kernels.flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=True))

    def pieces(q, k, v, at):
        given: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), at.begins)
        given |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), at.longest)
        return _only(kernels.flash_attn_varlen_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=True, **given))

    return Form(_from_kernels(rows, pieces), True)


def _torch_flash(repeat: bool) -> Form:
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # torch 2.11 does not ask whether heads are shared; later versions refuse it unless they are told
    more = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen).parameters else {}

    def pieces(q, k, v, at):
        if repeat:
            k, v = (torch.repeat_interleave(x, q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        limits = (at.begins, at.begins, at.longest, at.longest)
        return varlen(q, k, v, *limits, scale=q.shape[-1] ** -0.5, window_size=(-1, 0), **more)

    return Form(_from_kernels(None, pieces), True)


def _cudnn() -> Form:
    def attend(q, k, v, mask, exact):
        if not q.shape[2] == k.shape[2] >= SHORTEST:  # a state grows by a token at a time
            return ops.attention(q, k, v, mask, exact)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return ops.attention(q, k, v, mask, exact)

    return Form(attend, False)


class Candidate(NamedTuple):
    """A form that there may be."""

    make: Callable[[], Form]  # raises if it is not there
    fits: Callable[[tuple[int, int]], bool]  # of the device's compute capability
    packed: bool = True  # whether it is of use where rows are whole


CANDIDATES = {
    "FlashAttention 3": Candidate(lambda: _flash("flash_attn_interface"), lambda c: c == (9, 0)),
    "FlashAttention 2": Candidate(lambda: _flash("flash_attn"), lambda c: c >= (8, 0)),
    "torch's FlashAttention 2": Candidate(lambda: _torch_flash(False), lambda c: c >= (8, 0), packed=False),
    "torch's FlashAttention 2, heads repeated": Candidate(
        lambda: _torch_flash(True), lambda c: c >= (8, 0), packed=False
    ),
    "cuDNN": Candidate(_cudnn, lambda c: c >= (8, 0)),
}
"""The best first. Whole rows go through torch's own FlashAttention 2 in ops.attention."""


def gaps(
    form: Form | None, model, dtype, device, rows: int = 2, seq: int = 64, traced: bool = False
) -> dict[str, float]:
    """Return the relative RMS of a form's output and gradients against ops.attention's exact form, in float32 or wider.

    On random heads of the shapes of `model` (a ModelConfig), a few documents in each row; None: ops.attention's fast
    form. `traced`: called as torch.compile calls it, by its fakes first, but with nothing compiled.
    """
    attend, takes_spans = (ops.attention, False) if form is None else form
    random = torch.Generator(device).manual_seed(0)
    heads = (model.attention.heads, model.attention.kv_heads, model.attention.kv_heads, model.attention.heads)
    draws = [
        torch.randn(rows, n, seq, model.attention.width(model), generator=random, device=device).to(dtype)
        for n in heads
    ]
    wide = torch.promote_types(dtype, torch.float32)
    mask = ours = None
    if model.documents == "isolated":
        begins = torch.rand(rows, seq, generator=random, device=device) < 0.1
        mask = ours = ops.causal_mask(seq, seq, torch.cumsum(begins, dim=1, dtype=torch.int32))
        if takes_spans:
            ours = Spans(torch.from_numpy(spans(begins.cpu().numpy(), True)).to(device), seq)
    if traced:
        attend = torch.compile(attend, backend="aot_eager", dynamic=False)

    def outcome(function, given, mask, exact):
        leaves = [x.detach().requires_grad_() for x in given[:3]]
        out = function(*leaves, mask, exact)
        return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]

    with torch.enable_grad():
        found = outcome(attend, draws, ours, False)
        wanted = outcome(ops.attention, [x.to(wide) for x in draws], mask, True)
    pairs = zip(("output", "dq", "dk", "dv"), found, wanted, strict=True)
    return {name: float(torch.linalg.norm(a.to(wide) - b) / torch.linalg.norm(b)) for name, a, b in pairs}


def trial(
    name: str, model, dtype: str, device, seq: int, traced: bool = False
) -> tuple[Form | None, str | dict[str, float]]:
    """Return a candidate and its gaps, or None and why it is passed over; `traced`: it will be compiled, too."""
    candidate, capability = CANDIDATES[name], capability_of(device)
    if capability is None:
        return None, "no CUDA device"
    if not candidate.fits(capability):
        return None, f"not for compute capability {capability[0]}.{capability[1]}"
    if not candidate.packed and model.documents == "packed":
        return None, "rows are whole"
    try:
        form = candidate.make()
        given = (model, DTYPES[dtype], device, 2, max(seq, SHORTEST))  # of one key gradients are 0
        found = gaps(form, *given)
        if traced and max(found.values()) <= AGREES:
            found = gaps(form, *given, traced=True)
    except ModuleNotFoundError:
        return None, "not installed"
    except Exception as error:  # whatever another project's kernel raises: it is said, and the next form is tried
        return None, f"does not run: {one_line(error)[:120]}"
    if not max(found.values()) <= AGREES:
        return None, f"wrong here, by {max(found.values()):.1e}"
    return form, found


def capability_of(device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device; None: it is another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose(model, dtype: str, exact: bool, device, seq: int, traced: bool = False) -> Choice:
    """Return the first form that is there, runs on rows of `seq` and agrees with ours; the note says why not others.

    `traced`: it must run when torch.compile traces it, too.
    """
    ours = "torch scaled_dot_product_attention"
    if exact:
        return Choice(None, "attention: exact, composed")
    if capability_of(device) is None or not model.mixes("attention"):
        return Choice(None, f"attention: {ours}")
    if dtype not in DTYPES:
        return Choice(None, f"attention: {ours} (kernels compute in {', '.join(DTYPES)}, not {dtype})")
    form, chosen, passed = None, ours, []
    for name in CANDIDATES:
        form, found = trial(name, model, dtype, device, seq, traced)
        if form is not None:
            chosen = name
            break
        passed.append(f"{name}: {found}")
    manner = "" if model.documents == "packed" else ", varlen" if form is not None and form.spans else ", with a mask"
    return Choice(form, f"attention: {chosen}{manner}" + (f" (passed over: {'; '.join(passed)})" if passed else ""))
