"""Qwen3.5's text model as one of ours: equal to transformers' on random weights, with every option that it takes seen.

Beside it what no EXAMPLE shows: gated MLPs, layers that add their branches as they are, an embedding without a norm.
Budget: 15 s, 5 of them transformers' own import.
"""

import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from core import presets
from core.check.tolerances import P2_FLOAT64, relative_rms
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.model.params import count, param_table, start_values
from core.model.shares import shares
from shared_tests import oracle
from shared_tests.support.harness import BACKENDS, draw, engine, tokens
from shared_tests.support.one_layer import check_reading_back
from shared_tests.support.twins import assert_same, outcome

pytestmark = pytest.mark.pair
NEAR = 1e-5
"""Largest relative RMS from transformers' logits in float32; they are as far from float64 as ours are."""
PLAIN: dict[str, Any] = {
    "norm_gains": True, "residual_scales": False, "embedding.norm": False, "attention.output_gate": True,
    "mlp.activation": "swiglu", "head.softcap": None, "documents": "packed",
}  # fmt: skip
"""What all its sizes have in common."""
SMALL: dict[str, Any] = PLAIN | {
    "vocab": 29, "dim": 16, "layers": 4, "blocks": ("delta", "attention"), "attention.heads": 3,
    "attention.kv_heads": 1, "attention.head_width": 10, "attention.rope_dims": 4, "mlp.hidden": 20,
    "delta.heads": 4, "delta.key_heads": 2, "delta.key_dim": 5, "delta.value_dim": 7,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "more value heads": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
    "odd": {
        "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12,
        "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 5, "linear_value_head_dim": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "layer_types": ["full_attention", "linear_attention", "full_attention"], "rms_norm_eps": 1e-3,
    },
    "a head of its own": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 1, "linear_num_value_heads": 3, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "tie_word_embeddings": False,
    },
}  # fmt: skip
LARGE: dict[str, Any] = {
    "vocab_size": 248_320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip
"""Qwen3.5-0.8B, where it differs from transformers' defaults."""


@functools.cache
def library() -> Any:
    """Return transformers, imported for the tests that need it; of its imports' warnings none is ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig  # noqa: F401

    return transformers


def config_of(size: dict[str, Any]) -> Any:
    """Return transformers' settings of a size."""
    return library().Qwen3_5TextConfig(**{"tie_word_embeddings": True} | size)


def settings_of(theirs: Any) -> ModelConfig:
    """Return our settings of the model that transformers' are of."""
    rope, names = theirs.rope_parameters, {"linear_attention": "delta", "full_attention": "attention"}
    kinds = tuple(names[kind] for kind in theirs.layer_types)
    period = next(n for n in range(1, 1 + len(kinds)) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return changed(ModelConfig(), PLAIN | {
        "vocab": theirs.vocab_size, "dim": theirs.hidden_size, "layers": theirs.num_hidden_layers,
        "blocks": kinds[:period],
            "norm_eps": theirs.rms_norm_eps,
        "mlp.hidden": theirs.intermediate_size, "head.untied": not theirs.tie_word_embeddings,
        "attention.heads": theirs.num_attention_heads, "attention.kv_heads": theirs.num_key_value_heads,
        "attention.head_width": theirs.head_dim, "attention.rope_base": rope["rope_theta"],
        "attention.rope_dims": int(theirs.head_dim * rope["partial_rotary_factor"]),
        "delta.heads": theirs.linear_num_value_heads, "delta.key_heads": theirs.linear_num_key_heads,
        "delta.key_dim": theirs.linear_key_head_dim, "delta.value_dim": theirs.linear_value_head_dim,
    })  # fmt: skip


def mixer_of(model: ModelConfig, w: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Return our weights of one layer's mixer, of transformers' by their names in the layer."""
    if kind == "attention":
        made = {f"{name}.weight": w[f"self_attn.{name}_proj.weight"] for name in "kvo"}
        both = w["self_attn.q_proj.weight"].reshape(model.attention.heads, 2, -1, model.dim)
        made["q.weight"], made["gate.weight"] = (both[:, i].reshape(-1, model.dim) for i in (0, 1))
        return made | {f"{name}_norm_gain": w[f"self_attn.{name}_norm.weight"] for name in "qk"}
    keys = model.delta.keys
    places = {"q": slice(keys), "k": slice(keys, 2 * keys), "v": slice(2 * keys, None)}
    made = {f"{name}.weight": w["linear_attn.in_proj_qkv.weight"][place] for name, place in places.items()}
    for name, theirs in {"gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a", "o": "out_proj"}.items():
        made[f"{name}.weight"] = w[f"linear_attn.{theirs}.weight"]
    others = {"decay_bias": "dt_bias", "decay_rate": "A_log", "read_gain": "norm.weight"}
    made |= {name: w[f"linear_attn.{theirs}"] for name, theirs in others.items()}
    return made | {"conv": w["linear_attn.conv1d.weight"][:, 0, ::-1]}  # ours begins with the token itself


def weights_of(model: ModelConfig, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return our weights of transformers', by their names in the text model."""
    made = {"embed.weight": w["model.embed_tokens.weight"], "head.norm_gain": w["model.norm.weight"]}
    if model.head.untied:  # ours are what the head has beside the embedding's
        made["head.weight"] = w["lm_head.weight"] - w["model.embed_tokens.weight"]
    for i in range(model.layers):
        own = oracle.below(w, f"model.layers.{i}.")
        mixer = {f"mixer.{name}": value for name, value in mixer_of(model, own, model.kind(i)).items()}
        mlp = {f"mlp.{name}.weight": own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        gains = {"mixer": own["input_layernorm.weight"], "mlp": own["post_attention_layernorm.weight"]}
        layer = mixer | mlp | {f"{name}_norm_gain": value for name, value in gains.items()}
        made |= {f"blocks.{i}.{name}": value for name, value in layer.items()}
    return {name: np.ascontiguousarray(value) for name, value in made.items()}


@functools.cache
def theirs_of(name: str) -> tuple[ModelConfig, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return our settings and weights of a size, rows of tokens, and transformers' logits of them."""
    config = config_of(SIZES[name] | {"vocab_size": 61, "intermediate_size": 44})
    model = library().Qwen3_5ForCausalLM(config).eval()
    for key, value in model.named_parameters():  # none at a value at which it does nothing
        wide = value.shape[-1] if value.ndim == 2 else 16 if value.ndim == 1 else 4
        value.data = torch.tensor(draw(f"{name}/{key}", *value.shape) * wide**-0.5, dtype=torch.float32)
    rows = tokens(name, 2, 83, 61, 1)  # more than a chunk of theirs, and two of ours
    with torch.no_grad():
        logits = model(torch.tensor(rows, dtype=torch.int64), use_cache=False).logits.numpy()
    ours = settings_of(config)
    return ours, weights_of(ours, {k: v.numpy() for k, v in model.state_dict().items()}), rows, logits


def of(model: ModelConfig) -> RunConfig:
    """Return a run of a model."""
    return dataclasses.replace(presets.mini(presets.get("debug").config), model=model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_of_transformers(name: str, backend: str) -> None:
    model, weights, rows, logits = theirs_of(name)
    ours = engine(backend, of(model), weights, dtype="float32", exact=False).logits(rows)
    assert np.abs(logits).mean() > 0.3 and relative_rms(ours, logits) <= NEAR


FAULTS: dict[str, dict[str, Any]] = {
    "frequencies": {"attention.rope_base": 1e4}, "rotated channels": {"attention.rope_dims": 16},
    "embedding": {"embedding.norm": True}, "softcap": {"head.softcap": 30.0}, "eps": {"norm_eps": 1e-5},
}  # fmt: skip
TURNED = {
    "taps": ("blocks.0.mixer.conv", lambda w: w[:, ::-1]),
    "gain of the mixer": ("blocks.2.mixer_norm_gain", lambda w: 0 * w),
    "gain of the MLP": ("blocks.3.mlp_norm_gain", lambda w: w - 1),
    "gain of queries": ("blocks.3.mixer.q_norm_gain", lambda w: 0 * w),
    "gain of keys": ("blocks.3.mixer.k_norm_gain", lambda w: 0 * w),
    "gain of the head": ("head.norm_gain", lambda w: 0 * w),
    "output gate": ("blocks.3.mixer.gate.weight", lambda w: 0 * w),
    "rate": ("blocks.1.mixer.decay_rate", lambda w: 0 * w),
    "heads of values": ("blocks.1.mixer.beta.weight", lambda w: w[[0, 2, 1, 3]]),
}


@pytest.mark.parametrize("name", [*FAULTS, *TURNED, "gate and up"])
def test_whatever_differs_is_seen(name: str) -> None:
    model, weights, rows, logits = theirs_of("more value heads")
    weights = dict(weights)
    if name in TURNED:
        key, turn = TURNED[name]
        weights[key] = np.ascontiguousarray(turn(weights[key]))
    if name == "gate and up":
        up, gate = (weights[f"blocks.0.mlp.{name}.weight"] for name in ("up", "gate"))
        weights |= {"blocks.0.mlp.gate.weight": up, "blocks.0.mlp.up.weight": gate}
    changed_model = changed(model, FAULTS.get(name, {}))
    ours = engine("cuda", of(changed_model), weights, dtype="float32", exact=False).logits(rows)
    assert relative_rms(ours, logits) > 10 * NEAR


def test_parameters_are_counted_without_any_weights() -> None:
    """752,393,024, part by part; transformers' own model says the same."""
    config = config_of(LARGE)
    model = settings_of(config)
    table = param_table(model)

    def size(prefix: str) -> int:
        return sum(row.size for name, row in table.items() if name.startswith(prefix))

    assert [size(f"blocks.{i}.mixer.") for i in range(4)] == [10_543_264] * 3 + [7_340_544]
    assert size("blocks.0.mlp.") == 11_010_048
    with torch.device("meta"):
        theirs = library().Qwen3_5ForCausalLM(config)
    assert count(model) == sum(value.numel() for value in theirs.parameters()) == 752_393_024
    assert sum(share.parameters for share in shares(model, 64).values()) == 752_393_024
    with pytest.raises(ConfigError, match="752,393,024 parameters, at most 268,435,456 are drawn"):
        start_values(model, 0)


def test_its_mini_has_what_it_has() -> None:
    small = presets.mini(of(settings_of(config_of(LARGE)))).model
    assert (small.dim, small.layers, small.blocks) == (64, 4, ("delta", "delta", "delta", "attention"))
    attention = small.attention
    assert (attention.heads, attention.kv_heads, attention.head_width, attention.rope_dims) == (4, 1, 16, 4)
    assert attention.output_gate and small.norm_gains and small.mlp.activation == "swiglu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", ["isolated", "packed"])
def test_it_reads_back_alone(documents: str, backend: str) -> None:
    """Equal to the oracle in float64; documents, flips, prefixes, and token by token."""
    check_reading_back(SMALL | {"documents": documents}, f"qwen35/{documents}", backend)


BESIDE = {"blocks": ("delta", "attention_parallel"), "output_norm": "gain"}


@pytest.mark.parametrize("more", [{}, BESIDE], ids=["behind", "beside"])
def test_the_twins_agree(more: dict[str, Any]) -> None:
    """Logits and gradients in float64."""
    config = of(changed(ModelConfig(), SMALL | more))
    ours, theirs = (outcome(b, config, 5.0, dtype="float64") for b in BACKENDS)
    assert_same(ours, theirs, P2_FLOAT64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention.head_width": 0}, "head_width=0: expected at least 1"),
        ({"attention.rope_dims": 12}, "from 0 to 10, the width of a head"),
        ({"attention.q_gain": 2.0}, "q_gain=2.0: model.norm_gains=True has no use for it"),
        ({"blocks": ("delta",), "attention.head_width": 10, "attention.output_gate": False}, "head_width=10: no layer"),
        ({"blocks": ("delta",), "attention.head_width": None, "attention.heads": 1}, "output_gate=True: no layer"),
        ({"bigram.buckets": 7}, "bigrams stand in front of that norm"),
        ({"experts.count": 2, "experts.hidden": 4, "residual_scales": True}, "swiglu: experts have no gates"),
        ({"experts.count": 2, "experts.hidden": 4, "mlp.activation": "relu2"}, "experts begin at small scales"),
        ({"repeat_layers": (1,)}, "repeats begin at scales of 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(ModelConfig(), SMALL | changes)
