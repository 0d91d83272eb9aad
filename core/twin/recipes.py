"""Named settings of `skc distill`: what `--recipe` takes in place of the defaults."""

from core.checks import ConfigError
from core.twin.distill_config import DistillConfig
from core.twin.settings import TwinConfig

ORTHRUS_QWEN35 = DistillConfig(
    twin=TwinConfig(
        rank=256, alpha=32.0, full=("attention",), vectors=False, rule="first_order", exact_anchor=False, block=8,
        learned_mask=False,
    ),
    text="training", batch=1, anchors=1, loss="kl", lr=2e-4, warmup=0.05, warmdown=0.4,
)  # fmt: skip
"""The seed's twin of Qwen3.5-0.8B: 106,417,152 numbers beside 752,393,024 that are frozen. One block of a row, behind
a prefix of random length. AdamW with moments in float32 takes the place of its 8-bit GaLore."""

RECIPES: dict[str, tuple[str, DistillConfig]] = {
    "orthrus_qwen35": (
        "the seed's twin: rank 256, first-order rule, one block a row; AdamW, not GaLore",
        ORTHRUS_QWEN35,
    ),
}
"""Name -> one line of purpose, and the settings."""


def recipe(name: str) -> DistillConfig:
    """Return the settings of a name; ConfigError lists the known ones."""
    if name not in RECIPES:
        raise ConfigError(f"recipe={name!r}: expected one of {', '.join(RECIPES)}, or leave it out")
    return RECIPES[name][1]
