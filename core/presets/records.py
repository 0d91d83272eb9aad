"""The systems of pull requests of the official challenge: their models, optimizers and data (docs/presets.md)."""

from core.config import (
    POLAR_EXPRESS,
    AdaptConfig,
    EvalConfig,
    ModelConfig,
    PhasesConfig,
    RunConfig,
    TrainConfig,
    changed,
)
from core.model.attention import Attention
from core.model.bigram import Bigram
from core.model.deviations import Deviations
from core.model.embedding import Embedding
from core.model.mlp import MLP
from core.model.skips import Skips
from core.model.smear import Smear
from core.model.value_embed import ValueEmbed

ELEVEN = RunConfig(
    model=ModelConfig(
        dim=512, layers=11, residual_mix=True, depth_damping=True, documents="packed", matrix_init="orthogonal",
        matrix_storage="int6/row", norm_eps=2.0**-23, embedding=Embedding(std=0.005, storage="int8/row"),
        attention=Attention(heads=8, kv_heads=4, rope_dims=16), skips=Skips(on=True),
        mlp=MLP(hidden=1536, activation="leaky_relu2"),
    ),
    train=TrainConfig(
        steps=20_000, seconds=600.0, batch=384, seq=2048, micro_batch=48, warmup=0.0, floor=0.0, matrix_rule="muon",
        muon_momentum=0.99, muon_momentum_start=0.92, muon_momentum_steps=1500, clip=0.3, average_from=0.0,
        eval_every=None, save_every=1000,
    ),
    eval=EvalConfig(seq=2048, stride=64, windows="sliding"),
)  # fmt: skip
"""What the five have in common: eleven layers, 512 wide, trained for ten minutes on 8xH100."""

PR401 = changed(ELEVEN, {
    "model.mlp.activation": "relu2", "model.attention.rope_base": 22_082.0, "model.attention.xsa": "projected",
    "model.attention.xsa_layers": 4, "model.value_embed": ValueEmbed(dim=128, layers=(9, 10)),
    "model.smear": Smear(on=True, form="lerp"), "model.bigram": Bigram(buckets=2048, dim=128, hash="xor", scale=0.05),
    "train.lr_embed": 0.035, "train.lr_matrix": 0.025, "train.lr_vector": 0.025, "train.lr_hash": 0.035,
    "train.weight_decay": 0.04, "train.weight_decay_embed": 0.04, "train.weight_decay_vector": 0.04,
    "train.weight_decay_hash": 0.04, "train.warmdown": 0.5, "train.quantise": "late", "train.quantise_below": 0.15,
    "train.snapshot_every": 50,
})  # fmt: skip
"""The record of EMA and late rounding."""

PR550 = changed(ELEVEN, {
    "model.depth_damping": False, "model.attention.rope_dims": 64, "model.smear": Smear(on=True, form="lerp"),
    "model.bigram": Bigram(buckets=4096, dim=128, scale=0.05), "train.batch": 48, "train.lr_embed": 0.035,
    "train.lr_matrix": 0.025, "train.lr_vector": 0.025, "train.lr_hash": 0.035, "train.weight_decay": 0.04,
    "train.weight_decay_embed": 0.04, "train.weight_decay_vector": 0.04, "train.weight_decay_hash": 0.04,
    "train.warmdown": 0.5, "train.quantise": "late", "train.quantise_below": 0.04, "train.quantise_soft": (1.0, 16.0),
    "train.mtp_heads": 2, "eval.windows": "documents", "eval.stride": None,
    "eval.adapt": AdaptConfig(
        kind="lora", sites=("q", "v"), chunk=2048, steps=3, lr=0.01, schedule="cosine", reset="never", documents=1,
    ),
})  # fmt: skip
"""The int6 system that adapts by LoRA: for one GPU, with two heads for the tokens behind the next."""

PR1619 = changed(PR401, {
    "model.vocab": 8192, "model.mlp.activation": "leaky_relu2", "model.attention.q_gain": 5.25,
    "model.attention.xsa_layers": None, "model.bigram.buckets": 3072, "model.bigram.dim": 112,
    "model.blocks": ("attention",) * 7 + ("attention_gated",) * 4, "model.repeat_layers": (3, 4, 5),
    "model.repeat_order": "at_once", "model.repeat_scales": "shared", "model.repeat_blend": True,
    "train.lr_matrix": 0.022, "train.muon_momentum": 0.97, "train.weight_decay": 0.095, "train.warmdown": 0.75,
    "train.snapshot_every": None, "eval.windows": "documents", "eval.stride": None,
    "model.deviations": Deviations(mlp=11.0, attention=11.0, table=20.0),
    "eval.adapt": AdaptConfig(kind="lora", sites=("o",), chunk=64, lr=0.001),
})  # fmt: skip
"""The stack of vocabulary 8,192 whose middle layers run twice at once."""

PR1394 = changed(ELEVEN, {
    "model.vocab": 8192, "model.mlp.hidden": 2048, "model.attention.q_gain": 4.0, "model.attention.xsa": "projected",
    "model.skips": Skips(on=True, gates=True, over="passes"), "model.repeat_layers": (4, 5), "model.repeat_times": 2,
    "model.repeat_scales": "shared", "train.repeat_from": 0.5, "train.lr_embed": 0.03, "train.lr_matrix": 0.02,
    "train.lr_vector": 0.02, "train.muon_rows": True, "train.weight_decay": 0.085, "train.weight_decay_embed": 0.085,
    "train.weight_decay_vector": 0.02, "train.warmdown": 0.667, "train.reserve_seconds": 4.0,
    "model.deviations": Deviations(mlp=12.85, attention=12.85, table=20.0), "export.method": "gptq", "export.fit": True,
})  # fmt: skip
"""The best record that does not adapt while it is scored."""

PR1855 = changed(PR1394, {
    "model.documents": "isolated", "model.attention.q_gain": 5.0, "model.attention.head_gate": "sigmoid",
    "model.attention.head_gate_scale": 0.5, "model.smear": Smear(on=True, form="window"), "model.lanes.start": 8,
    "model.repeat_layers": (3, 4, 5), "train.repeat_from": 0.35, "train.lr_matrix": 0.026,
    "train.muon_momentum": 0.97, "train.muon_coefficients": POLAR_EXPRESS, "train.weight_decay": 0.095,
    "train.beta2": 0.99, "train.warmdown": 0.85, "train.floor": 0.1, "train.floor_rule": "clip",
    "train.average_decay": 0.9965, "eval.windows": "documents", "eval.stride": 48,
    "model.embedding.storage": "int7/row", "model.deviations": Deviations(mlp=11.5, attention=13.0, table=14.0),
    "eval.adapt": AdaptConfig(
        kind="lora", rank=80, alpha=144.0, sites=("q", "k", "v", "mixer", "block_mlp", "head"), chunk=48, lr=1e-4,
        beta1=0.0, beta2=0.99, eps=1e-10, decay=0.5, warm_a=True, documents=64, order="length",
    ),
    "eval.phases": PhasesConfig(at=(0.01666, 0.03332, 0.05), lr=1e-3, momentum=0.9, chunk=32_768, clip=1.0),
})  # fmt: skip
"""The top record: lanes, gates, smear and case operators (`skc data prepare --transform caseops`)."""

SMALL = {
    "model.vocab": 1024, "model.dim": 128, "model.attention.heads": 4, "model.attention.kv_heads": 2,
    "train.steps": 300, "train.seconds": None, "train.reserve_seconds": 0.0, "train.batch": 16, "train.seq": 256,
    "train.micro_batch": None, "export.fit": False,
    "train.muon_momentum_steps": 100, "train.average_decay": 0.97, "train.eval_every": 100,
    "train.save_every": 100, "eval.seq": 256, "eval.batch": 16, "eval.train_documents": 8,
    "eval.windows": "plain", "eval.stride": None,
}  # fmt: skip
"""What makes a laptop's run of a record: the same eleven layers, narrow, on the bundled text."""
# 3 hidden values a channel: 144 channels make as many parameters as 128 with 4.
NARROW = {"model.dim": 144, "model.mlp.hidden": 432, "model.attention.rope_dims": 8}
WIDE = {"model.mlp.hidden": 512, "model.attention.rope_dims": 8}

PR401_MAC = changed(PR401, SMALL | NARROW | {
    "model.bigram.buckets": 1024, "model.bigram.dim": 32, "model.value_embed.dim": 32, "train.snapshot_every": 5,
})  # fmt: skip
PR550_MAC = changed(PR550, SMALL | NARROW | {
    "model.attention.rope_dims": 36, "model.bigram.buckets": 1024, "model.bigram.dim": 32,
    "eval.windows": "documents", "eval.adapt.chunk": 256,
})  # fmt: skip
PR1619_MAC = changed(PR1619, SMALL | NARROW | {
    "model.bigram.buckets": 1024, "model.bigram.dim": 32, "model.value_embed.dim": 32,
    "eval.windows": "documents", "eval.adapt.documents": 8,
})  # fmt: skip
PR1394_MAC = changed(PR1394, SMALL | WIDE)
PR1855_MAC = changed(PR1855, SMALL | WIDE | {
    "data.path": "sample-case", "eval.windows": "documents", "eval.stride": 64, "eval.adapt.rank": 8,
    "eval.adapt.alpha": 14.4, "eval.adapt.chunk": 64, "eval.adapt.documents": 2, "eval.round": 1,
    "eval.phases.at": (0.25, 0.5), "eval.phases.chunk": 4096,
})  # fmt: skip

LARGE = "five or six bits by the trace of second moments (here six, rounded late)"

PRESETS = {
    "pr401": ("pull request 401: averages, late rounding; vocabulary 1,024", PR401, 26_993_756),
    "pr550": (
        "pull request 550: soft late rounding, heads for later tokens; one GPU",
        PR550,
        27_092_057,
    ),
    "pr1619": (
        "pull request 1619: vocabulary 8,192, gated parallel layers, three that run twice",
        PR1619,
        31_655_011,
        LARGE,
    ),
    "pr1394": ("pull request 1394: the best record without adaptation", PR1394, 35_943_512),
    "pr1855": (
        "pull request 1855: the top record, on text with case operators",
        PR1855,
        35_945_671,
    ),
    "pr401_mac": ("pr401 for a laptop, narrow, on the bundled text", PR401_MAC, 2_280_016),
    "pr550_mac": ("pr550 for a laptop", PR550_MAC, 2_244_941),
    "pr1619_mac": ("pr1619 for a laptop", PR1619_MAC, 2_280_023, LARGE),
    "pr1394_mac": ("pr1394 for a laptop", PR1394_MAC, 2_121_004),
    "pr1855_mac": (
        "pr1855 for a laptop: bundled text with case operators",
        PR1855_MAC,
        2_121_867,
    ),
}
