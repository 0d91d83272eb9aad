"""The SKC family: Koopman mixers and capsules, alone and beside attention."""

import dataclasses

from core.config import EvalConfig, ModelConfig, RunConfig, TrainConfig
from core.presets.transformers import ABLATE

SKC_ABLATE = dataclasses.replace(
    ABLATE,
    model=dataclasses.replace(ABLATE.model, blocks=("koopman", "skc"), mixer_dim=256, mlp_hidden=880),
)
"""`ablate` with other mixers: same stream, storage, optimizer and data, and as many parameters within 0.1 percent."""

SKC_MAC = RunConfig(
    model=ModelConfig(
        dim=128, layers=8, blocks=("koopman", "skc_parallel", "koopman", "attention"), heads=4, kv_heads=2,
        mlp_hidden=384, rope_dims=16, mixer_dim=128, matrix_storage="ternary/128", table_storage="int6/row",
        output_norm="plain",
    ),
    train=TrainConfig(
        steps=300, batch=16, seq=256, matrix_rule="muon", lr_matrix=0.02, lr_vector=0.01, muon_momentum_steps=100,
        quantise="always", eval_every=100, sample_every=100, save_every=100,
    ),
    eval=EvalConfig(seq=256, batch=16, train_documents=8),
)  # fmt: skip

PRESETS = {
    "skc_ablate": ("the SKC base of ablations: `ablate` with Koopman and SKC layers", SKC_ABLATE, 3_147_076),
    "skc_mac": ("minutes on a laptop: a ternary hybrid of Koopman, SKC and attention layers", SKC_MAC, 1_431_116),
}
