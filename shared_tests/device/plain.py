"""The official baseline's model and optimizer in plain PyTorch, as a measure of ours: same sizes, nothing of our code.

Facts of the model: the public train_gpt.py of the challenge (docs/launch.md compares the settings).
"""

import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from core import presets
from core.config import RunConfig
from shared_tests.device.child import Child
from shared_tests.device.speed import built, sized, timed

OFFICIAL = 43.54
"""Milliseconds a step of the official script on 8 H100, 65,536 tokens on each."""


class Layer(nn.Module):
    """Attention and an MLP of squared ReLUs, with the layer's mix of stream and embedding."""

    def __init__(self, m):
        super().__init__()
        self.heads, self.shared = m.attention.heads, m.attention.kv_heads
        wide = m.attention.kv_heads * m.attention.width(m)
        self.q, self.k = nn.Linear(m.dim, m.dim, False), nn.Linear(m.dim, wide, False)
        self.v, self.o = nn.Linear(m.dim, wide, False), nn.Linear(m.dim, m.dim, False)
        self.up, self.down = nn.Linear(m.dim, m.mlp.hidden, False), nn.Linear(m.mlp.hidden, m.dim, False)
        self.mix = nn.Parameter(torch.stack([torch.ones(m.dim), torch.zeros(m.dim)]))
        self.scales, self.gain = nn.Parameter(torch.ones(2, m.dim)), nn.Parameter(torch.full((m.attention.heads,), 1.5))

    def forward(self, x, first, cos, sin):
        mix, scales = self.mix.to(x.dtype), self.scales.to(x.dtype)
        x = mix[0] * x + mix[1] * first
        n = F.rms_norm(x, (x.shape[-1],))
        q, k, v = (
            F.linear(n, w.weight.to(x.dtype)).unflatten(-1, (count, -1)).transpose(1, 2)
            for w, count in ((self.q, self.heads), (self.k, self.shared), (self.v, self.shared))
        )
        q, k = (turned(F.rms_norm(h, (h.shape[-1],)), cos, sin) for h in (q, k))
        q = q * self.gain.to(x.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + scales[0] * F.linear(y, self.o.weight.to(x.dtype))
        h = F.linear(F.rms_norm(x, (x.shape[-1],)), self.up.weight.to(x.dtype)).relu().square()
        return x + scales[1] * F.linear(h, self.down.weight.to(x.dtype))


def turned(x, cos, sin):
    """Return heads turned by their positions' angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Plain(nn.Module):
    """Tokens and targets to the loss."""

    def __init__(self, m, seq, dtype):
        super().__init__()
        self.m, self.dtype = m, dtype
        self.embed = nn.Embedding(m.vocab, m.dim)
        self.layers = nn.ModuleList([Layer(m) for _ in range(m.layers)])
        self.skips = nn.Parameter(torch.ones(m.layers // 2, m.dim))
        angles = torch.outer(
            torch.arange(seq), m.attention.rope_base ** -torch.linspace(0, 1, m.attention.width(m) // 2)
        )
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    def forward(self, tokens, targets):
        x = first = F.rms_norm(self.embed(tokens).to(self.dtype), (self.m.dim,))
        half, kept = self.m.layers // 2, []
        for i, layer in enumerate(self.layers):
            if i >= half and kept:
                x = x + self.skips[i - half].to(x.dtype) * kept.pop()
            x = layer(x, first, self.cos, self.sin)
            if i < half:
                kept.append(x)
        logits = F.linear(F.rms_norm(x, (self.m.dim,)), self.embed.weight.to(x.dtype)).float()
        return F.cross_entropy(
            (self.m.head.softcap * torch.tanh(logits / self.m.head.softcap)).flatten(0, 1), targets.flatten()
        )


class PlainStep:
    """A step: a compiled loss, Muon in the compute type on one rank's matrices, torch's fused Adam on the rest."""

    def __init__(self, config: RunConfig, device: torch.device, world: int, compiled: bool):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = Plain(config.model, config.train.seq, dtype).to(device)
        self.loss = torch.compile(self.model, dynamic=False) if compiled else self.model
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2 and p.shape[0] > 2]
        ours = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in ours]
        self.adam = torch.optim.Adam(rest, lr=0.04, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.mine, self.matrices, self.dtype = matrices[::world], matrices, dtype
        self.momentum = [torch.zeros_like(p) for p in self.mine]
        self.orthogonal = torch.compile(orthogonal, dynamic=False) if compiled else orthogonal

    def __call__(self, tokens, targets):
        self.loss(tokens, targets).backward()
        self.adam.step()
        with torch.no_grad():
            for p, m in zip(self.mine, self.momentum, strict=True):
                assert p.grad is not None
                m.mul_(0.95).add_(p.grad)
                p.sub_(0.04 * self.orthogonal((p.grad + 0.95 * m).to(self.dtype)))
        for p in self.model.parameters():
            p.grad = None


def orthogonal(x):
    """Return a matrix with its singular values near 1, times the root of rows over columns where that is above 1."""
    tall = x.shape[0] > x.shape[1]
    y = (x.T if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.T if tall else y) * max(1.0, x.shape[0] / x.shape[1]) ** 0.5


def run(child: Child) -> None:
    """Time both in alternating rounds."""
    device = torch.device("cuda" if child.gpu else "cpu")
    config = sized(presets.get("baseline").config, 64, child)
    engine, batch = built(child, config)
    step = PlainStep(config, device, engine.ranks.world, child.gpu)
    given = [torch.tensor(x, device=device).long() for x in batch[:2]]

    def plain(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step(*given)
        if child.gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / steps

    def pair(steps: int) -> tuple[float, float]:
        return timed(engine, batch, config, steps), plain(steps)

    pair(1)
    child.turn()
    with child.alone():
        pair(1)
        rounds = [pair(10 if child.gpu else 1) for _ in range(5)]
    ours, theirs = (statistics.median(of) for of in zip(*rounds, strict=True))
    ratios = sorted(a / b for a, b in rounds)
    child.figure("ours, a step of 64 rows", ours, "ms")
    child.figure("plain PyTorch, the same", theirs, "ms")
    child.figure("ours over plain, median of rounds", ratios[len(ratios) // 2], "")
    child.text("smallest and largest ratio of a round", f"{ratios[0]:.3f} to {ratios[-1]:.3f}")
    if child.gpu:
        child.figure("ours over the official script's step on 8 H100", ours / OFFICIAL, "")
