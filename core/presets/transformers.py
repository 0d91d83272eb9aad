"""Transformers: the smallest runs, the bases of ablations, the official baseline and the ternary record's shape."""

from core.config import EvalConfig, ModelConfig, RunConfig, TrainConfig, changed
from core.model.attention import Attention
from core.model.embedding import Embedding
from core.model.head import Head
from core.model.mlp import MLP
from core.model.skips import Skips

DEBUG = RunConfig(
    model=ModelConfig(
        dim=32, layers=2, embedding=Embedding(dim=16), attention=Attention(heads=2, kv_heads=1, rope_dims=8),
        mlp=MLP(hidden=64), head=Head(bias=True),
    ),
    train=TrainConfig(
        steps=20, batch=4, seq=64, z_loss=1e-4, log_every=5, eval_every=10, sample_every=10, save_every=10
    ),
    eval=EvalConfig(seq=64, train_documents=2, documents=4),
)  # fmt: skip
"""Uses the options that no other small preset uses, so that every one of them is trained by some test."""

TINY = RunConfig(
    model=ModelConfig(
        dim=128, layers=4, residual_mix=True, depth_damping=True, skips=Skips(on=True),
        attention=Attention(heads=4, kv_heads=2, rope_dims=16), mlp=MLP(hidden=512, activation="leaky_relu2"),
    ),
    train=TrainConfig(steps=400, batch=16, seq=256, eval_every=100, sample_every=100, save_every=100),
    eval=EvalConfig(seq=256, batch=16, train_documents=8),
)  # fmt: skip

ABLATE_FLOAT = RunConfig(
    model=ModelConfig(dim=256, layers=4, attention=Attention(heads=4, kv_heads=2, rope_dims=64), mlp=MLP(hidden=1024)),
    train=TrainConfig(steps=1000, batch=8, seq=512, matrix_rule="muon", lr_matrix=0.02, muon_momentum_steps=100),
    eval=EvalConfig(seq=512),
)

ABLATE = changed(ABLATE_FLOAT, {
    "model.matrix_storage": "ternary/128", "model.embedding.storage": "int6/row", "model.output_norm": "plain",
    "train.quantise": "always",
})  # fmt: skip
"""Differs from `ablate_float` in what is stored only (and in the norm that ternary output projections need)."""

TERNARY_74M = RunConfig(
    model=ModelConfig(
        vocab=8192, dim=768, layers=10, residual_mix=True, documents="packed", matrix_storage="ternary/128",
        output_norm="plain", embedding=Embedding(dim=240, storage="int6/row"), skips=Skips(on=True),
        attention=Attention(heads=8, kv_heads=4, rope_dims=96, rope_base=5000.0, q_gain=2.25), mlp=MLP(hidden=3072),
        head=Head(bias=True, softcap=10.0),
    ),
    train=TrainConfig(
        steps=20_000, seconds=599.0, batch=512, seq=1024, micro_batch=64, lr_embed=0.02, lr_matrix=0.04, lr_vector=0.02,
        matrix_rule="muon", muon_rows=True, muon_iterations=3, warmup=0.0, warmdown=0.2, floor=0.0, weight_decay=0.0,
        clip=None, z_loss=1e-4, quantise="always", eval_every=None, save_every=1000,
    ),
    eval=EvalConfig(seq=1024),
)  # fmt: skip
"""The ternary record's shape and optimizer (spec of the record: docs/log.md), with tanh softcap and plain RoPE.

Its embedding is 240 wide, the record's 254: so the artifact fits beside our code even if nothing can be compressed.
"""

BASELINE = RunConfig(
    model=ModelConfig(
        dim=512, layers=9, residual_mix=True, documents="packed", matrix_init="uniform", matrix_storage="int8/row",
        norm_eps=2.0**-23, embedding=Embedding(std=0.005, storage="int8/row"), skips=Skips(on=True),
        attention=Attention(heads=8, kv_heads=4, rope_dims=64), mlp=MLP(hidden=1024),
    ),
    train=TrainConfig(
        steps=20_000, seconds=600.0, batch=512, seq=1024, micro_batch=64, lr_embed=0.05, lr_matrix=0.04,
        lr_vector=0.04, matrix_rule="muon", warmup=0.0, warmdown=0.087, floor=0.0, weight_decay=0.0, clip=None,
        eval_every=None, save_every=1000,
    ),
    eval=EvalConfig(seq=1024),
)  # fmt: skip
"""The settings of the official `train_gpt.py`; docs/launch.md compares them field by field."""

PRESETS = {
    "debug": ("seconds on any machine: a small float model, for tests and first looks", DEBUG, 32_900),
    "tiny": ("minutes on a laptop: learns the bundled text well enough to look at", TINY, 854_288),
    "ablate_float": ("the float base of ablations: 4 layers, 256 wide", ABLATE_FLOAT, 3_147_792),
    "ablate": ("the ternary base of ablations: 4 layers, 256 wide", ABLATE, 3_147_792),
    "baseline": (
        "the official baseline: its model and optimizer, int8 after training as it does",
        BASELINE,
        17_059_912,
    ),
    "ternary_74m": (
        "the ternary record's shape: 64,880,640 ternary weights of 67,258,192, for the full budget",
        TERNARY_74M,
        67_258_192,
    ),
}
