"""The original SKC system's settings, in causal form: its best hour on a laptop, and the node setting that fits
(docs/presets.md)."""

from typing import Any

from core.config import EvalConfig, ModelConfig, RunConfig, TrainConfig
from core.model.attention import Attention
from core.model.bank import Bank
from core.model.embedding import Embedding
from core.model.engram import Engram
from core.model.experts import Experts
from core.model.head import Head
from core.model.koopman import Koopman
from core.model.mlp import MLP
from core.model.skc import SKC
from core.model.skips import Skips

SKC_1609_MAC = RunConfig(
    model=ModelConfig(
        dim=128, layers=8, blocks=("attention", "koopman"), shared_blocks=4, residual_mix=True, depth_damping=True,
        documents="packed", matrix_storage="ternary/128", output_norm="plain", embedding=Embedding(std=0.005),
        engram=Engram(orders=3, buckets=4093, dim=60, layer=4),
        attention=Attention(heads=4, kv_heads=2, rope_dims=16, rope_base=5000.0, q_gain=2.25), koopman=Koopman(dim=64),
        mlp=MLP(hidden=512, activation="leaky_relu2"), bank=Bank(at="middle", heads=1, gate=0.0), skips=Skips(on=True),
        head=Head(bias=True), experts=Experts(count=3, hidden=512, start=0.0),
    ),
    train=TrainConfig(
        steps=100_000, seconds=3600.0, batch=16, seq=1024, seq_stages=(256, 512), seq_until=(0.15, 0.4),
        lr_embed=0.052, lr_matrix=0.035, lr_vector=0.035, lr_hash=0.035, warmup=0.0, warmdown=0.35, floor=0.0,
        matrix_rule="muon", weight_decay=0.04, clip=0.3, z_loss=1e-4, quantise="always", average_from=0.4,
        eval_every=500, save_every=500,
    ),
    eval=EvalConfig(seq=1024, batch=16),
)  # fmt: skip
"""Attention and Koopman layers in turn, two of each, each used twice, with three experts; a bank between the halves and
4-grams behind it."""

SKC_1609 = RunConfig(
    model=ModelConfig(
        vocab=8192, dim=512, layers=11, blocks=("skc_parallel",), shared_blocks=4, repeat_layers=(2, 3, 4, 5),
        repeat_scales="shared", repeat_order="at_once", residual_mix=True, depth_damping=True, documents="packed",
        matrix_storage="ternary/128", output_norm="gain", embedding=Embedding(dim=256, std=0.005, storage="int4/row"),
        koopman=Koopman(dim=64), skc=SKC(block=64), mlp=MLP(hidden=2048, activation="leaky_relu2"),
        skips=Skips(on=True), head=Head(bias=True),
    ),
    train=TrainConfig(
        steps=20_000, seconds=570.0, batch=256, seq=1024, micro_batch=32, repeat_from=0.35, lr_embed=0.025,
        lr_matrix=0.022, lr_vector=0.001, warmup=0.01, warmdown=0.72, floor=0.0, matrix_rule="muon", muon_rows=True,
        muon_iterations=3, weight_decay=0.095, weight_decay_embed=0.04, clip=0.3, quantise="always", average_from=0.2,
        eval_every=None, save_every=1000,
    ),
    eval=EvalConfig(windows="sliding", seq=1024, stride=64, batch=32),
)  # fmt: skip
"""SKC layers alone, MLPs beside them: four blocks for eleven layers, of which four run twice."""

PRESETS: dict[str, tuple[Any, ...]] = {
    "skc_1609_mac": (
        "the original's best hour on a laptop, causal: attention and Koopman layers, experts, bank, EngramHash",
        SKC_1609_MAC,
        2_140_280,
    ),
    "skc_1609": (
        "the original's node setting that fits, causal: eleven SKC layers of four blocks",
        SKC_1609,
        11_388_040,
    ),
}
