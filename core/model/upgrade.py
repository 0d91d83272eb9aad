"""What settings and parameters were called in config.json and checkpoints of schema 2, before each part had its own."""

from typing import Any

from core.checks import ConfigError

MOVED = {
    **{name: f"attention.{name}" for name in ("heads", "kv_heads", "rope_dims", "rope_base", "q_gain")},
    **{f"bank_{name}": f"bank.{name}" for name in ("heads", "capsules", "times", "gate")},
    **{f"bigram_{name}": f"bigram.{name}" for name in ("buckets", "dim")},
    **{f"capsule_{name}": f"skc.{name}" for name in ("heads", "block", "times", "gain", "shift", "intra", "bands")},
    **{f"embed_{name}": f"embedding.{name}" for name in ("dim", "std")},
    **{f"engram_{name}": f"engram.{name}" for name in ("orders", "heads", "buckets", "dim", "layer", "keep")},
    **{f"mixer_{name}": f"koopman.{name}" for name in ("dim", "times")},
    "activation": "mlp.activation", "attention_conv": "attention.conv", "bank": "bank.at", "capsules": "skc.capsules",
    "hash_storage": "engram.storage", "mlp_hidden": "mlp.hidden", "smear": "smear.on", "softcap": "head.softcap",
    "table_storage": "embedding.storage", "unet_skips": "skips.on", "vocab_bias": "head.bias",
}  # fmt: skip
"""A setting of the model in schema 2, and its place now."""
RENAMED = {"smear": "smear.share", "skip_weights": "skips.weight", "vocab_bias": "head.bias"}
"""A parameter in schema 2, and its name now."""


def moved(field: str) -> str | None:
    """Return where a setting such as `model.bank_heads` is now; None if it has not moved."""
    section, _, name = field.partition(".")
    return f"model.{MOVED[name]}" if section == "model" and name in MOVED else None


def model_settings(old: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a model's settings of schema 2 under their names of today; ConfigError for a name that it did not have."""
    parts: dict[str, dict[str, Any]] = {}
    for name in sorted(MOVED.keys() & old.keys()):
        part, _, key = MOVED[name].partition(".")
        parts.setdefault(part, {})[key] = old[name]
    plain = {name: value for name, value in old.items() if name not in MOVED}
    for name in sorted(plain.keys() & {place.partition(".")[0] for place in MOVED.values()}):
        raise ConfigError(f"{where}.{name}: unknown key of schema 2")
    return plain | parts


def parameter(side: str, old: str) -> str:
    """Return the name today of a parameter of schema 2 (`side`: param), or of a slot of its optimizer state (optim)."""
    name, dot, slot = old.rpartition(".") if side == "optim" else (old, "", "")
    return f"{RENAMED.get(name, name)}{dot}{slot}"
