"""The SKC family: Koopman mixers and capsules, alone and beside attention."""

import dataclasses

from core.config import EvalConfig, ModelConfig, RunConfig, TrainConfig, changed
from core.model.attention import Attention
from core.model.bank import Bank
from core.model.deviations import Deviations
from core.model.embedding import Embedding
from core.model.engram import Engram
from core.model.koopman import Koopman
from core.model.mlp import MLP
from core.model.smear import Smear
from core.presets.transformers import ABLATE

SKC_ABLATE = changed(ABLATE, {"model.blocks": ("koopman", "skc"), "model.mlp.hidden": 880})
"""`ablate` with other mixers: same stream, storage, optimizer and data, and as many parameters within 0.1 percent."""

DELTA_ABLATE = changed(ABLATE, {"model.blocks": ("delta", "delta", "delta", "attention"), "model.mlp.hidden": 824})
"""`ablate` with the layers of Qwen3-Next: three of the gated delta rule, one of attention."""

SKC_MAC = RunConfig(
    model=ModelConfig(
        dim=128, layers=8, blocks=("koopman", "skc"), matrix_storage="ternary/128", output_norm="plain",
        embedding=Embedding(storage="int6/row"), engram=Engram(orders=2, dim=64, storage="int4/row"),
        attention=Attention(rope_dims=16), koopman=Koopman(dim=128), mlp=MLP(hidden=384), bank=Bank(at="head"),
    ),
    train=TrainConfig(
        steps=600, batch=8, seq=256, matrix_rule="muon", lr_matrix=0.02, lr_vector=0.01, muon_momentum_steps=100,
        quantise="always", eval_every=200, sample_every=200, save_every=200,
    ),
    eval=EvalConfig(seq=256, batch=16, train_documents=8),
)  # fmt: skip
"""Layers and memories that came out best in the study (docs/log.md). attention is for layers put in by an option."""

FULL = ModelConfig(
    dim=768, layers=12, blocks=("koopman", "skc"), matrix_storage="ternary/128", output_norm="plain",
    embedding=Embedding(storage="int6/row"), smear=Smear(on=True),
    engram=Engram(orders=3, heads=4, buckets=16_381, dim=384, keep=(0.5, 0.35, 0.25), storage="int4/row"),
    attention=Attention(heads=12, kv_heads=4, rope_dims=32), koopman=Koopman(dim=512), mlp=MLP(hidden=2304),
    bank=Bank(at="head"),
)  # fmt: skip
"""The whole family at 768 wide: Koopman and SKC layers, bank, packed EngramHash, smear."""

NODE = TrainConfig(
    steps=20_000, seconds=599.0, batch=512, seq=1024, micro_batch=64, lr_embed=0.02, lr_matrix=0.03, lr_vector=0.01,
    matrix_rule="muon", muon_rows=True, warmup=0.0, warmdown=0.3, floor=0.0, weight_decay=0.0, z_loss=1e-4,
    quantise="always", eval_every=None, save_every=1000,
)  # fmt: skip
"""Ten minutes on a node: 524,288 tokens a step."""

SKC_600 = RunConfig(model=FULL, train=NODE, eval=EvalConfig(seq=1024))

HYBRID = ("koopman", "skc", "koopman", "attention")

SKC_8XH100 = RunConfig(
    model=changed(FULL, {
        "vocab": 8192, "layers": 11, "blocks": HYBRID, "embedding.dim": 256, "mlp.hidden": 2688,
        "engram.orders": 2, "engram.dim": 128, "engram.keep": (0.5, 0.35),
    }),
    train=NODE,
    eval=EvalConfig(seq=1024),
)  # fmt: skip

SKC_8XH100_INT6 = changed(SKC_8XH100, {
    "model.dim": 576, "model.attention.heads": 9, "model.attention.kv_heads": 3,
    "model.mlp.hidden": 1568, "model.matrix_storage": "int6/row", "model.embedding.storage": "int8/row",
    "model.deviations": Deviations(mlp=12.85, attention=12.85, table=20.0),
    "train.quantise": "never", "train.reserve_seconds": 4.0, "export.method": "gptq", "export.fit": True,
})  # fmt: skip
"""Fewer weights of more bits, to be held against `skc_8xh100`: which is better is open (docs/log.md)."""

SKC_PROXY = RunConfig(
    model=changed(FULL, {
        "dim": 640, "layers": 8, "blocks": HYBRID, "attention.heads": 10, "attention.kv_heads": 5,
        "mlp.hidden": 2560, "engram.buckets": 3067, "engram.dim": 192,
    }),
    train=dataclasses.replace(NODE, batch=128),
    eval=EvalConfig(seq=1024),
)  # fmt: skip

PRESETS = {
    "skc_ablate": ("the SKC base of ablations: `ablate` with Koopman and SKC layers", SKC_ABLATE, 3_147_076),
    "delta_ablate": (
        "the same with three layers of the gated delta rule and one of attention",
        DELTA_ABLATE,
        3_146_972,
    ),
    "skc_mac": ("minutes on a laptop: ternary Koopman and SKC layers with bank and EngramHash", SKC_MAC, 1_698_642),
    "skc_600": (
        "the whole family for 600 s on a node, vocabulary 1,024: Koopman, SKC, bank, EngramHash",
        SKC_600,
        69_317_334,
    ),
    "skc_8xh100": ("the budget filled at vocabulary 8,192: a hybrid for 600 s on 8xH100", SKC_8XH100, 67_711_240),
    "skc_8xh100_int6": (
        "the same hybrid with fewer weights of more bits: trained in float, GPTQ fills the budget",
        SKC_8XH100_INT6,
        37_066_498,
    ),
    "skc_proxy": ("a smaller hybrid for 2 GPUs, to try on what skc_8xh100 will do", SKC_PROXY, 38_165_538),
}
