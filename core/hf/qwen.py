"""Qwen3.5's text model in our parts: settings out of config.json, and our weights out of its tensors.

The equations are the same (docs/model.md: attention, delta, mlp, layer); what differs is how tensors are cut:
q_proj has each head's queries and, below them, the head's gate; in_proj_qkv is q, k and v; a convolution has its taps
in the order of time, ours begins with the current token. No number is changed, so every type keeps its bits.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from core.checks import ConfigError, in_words
from core.files import FileError
from core.formats.kinds import ANYTHING, FLAG, Leaf, among, check_value, number, whole
from core.formats.tensors import Entry
from core.hf.files import CONFIG, CURE, HFError, Tensors, fail_hf
from core.model.attention import Attention
from core.model.config import MOST_LAYERS, ModelConfig
from core.model.delta import Delta
from core.model.embedding import Embedding
from core.model.head import Head
from core.model.mlp import MLP
from core.model.params import param_table
from core.model.table import TAPS

TYPES = {"linear_attention": "delta", "full_attention": "attention"}
"""Their kind of layer -> ours."""
PREFIXES = ("model.language_model.", "model.", "")
"""What stands in front of the text model's names: in a multimodal checkpoint, in one of text, in one without a head."""
LEFT_OUT = ("model.visual.", "visual.", "mtp.", "model.mtp.")
"""Tensors of other models in a checkpoint: pictures, and drafts of further tokens."""
SIZE = whole(f"a whole number from 1 to {1 << 20}", 1, 1 << 20)
FALSE = Leaf("false or null", lambda value: value in (None, False))
TRUE = Leaf("true", lambda value: value is True)
BASE, SHARE = number("a number from 1 to 1e12", 1, 1e12), number("a number from 0 to 1", 0, 1)
NO_EXPERTS = Leaf("none: a mixture of experts is not read", lambda value: value == 0)
ROPE = {
    "rope_type?": among("default"), "type?": among("default"), "rope_theta?": BASE, "partial_rotary_factor?": SHARE,
    "mrope_section?": ANYTHING, "mrope_interleaved?": ANYTHING,
}  # fmt: skip
TEXT = {
    "model_type": among("qwen3_5_text"), "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": SIZE,
    "num_hidden_layers": whole(f"a whole number from 1 to {MOST_LAYERS}", 1, MOST_LAYERS),
    "num_attention_heads": SIZE, "num_key_value_heads": SIZE, "head_dim": SIZE, "hidden_act": among("silu"),
    "rms_norm_eps": number("a number from 1e-12 to 1", 1e-12, 1), "tie_word_embeddings?": FLAG,
    "attention_bias??": FALSE, "attn_output_gate??": TRUE, "rope_scaling??": FALSE, "quantization_config??": FALSE,
    "use_sliding_window??": FALSE, "sliding_window??": FALSE, "num_experts??": NO_EXPERTS,
    "rope_theta??": BASE, "rope_parameters??": ROPE,
    "partial_rotary_factor??": SHARE, "max_position_embeddings??": SIZE,
    "linear_conv_kernel_dim": whole(f"{TAPS}", TAPS, TAPS), "linear_key_head_dim": SIZE, "linear_value_head_dim": SIZE,
    "linear_num_key_heads": SIZE, "linear_num_value_heads": SIZE, "layer_types??": [among(*TYPES)],
    "full_attention_interval??": SIZE, "*": ANYTHING,
}  # fmt: skip
HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "initializer_range", "transformers_version", "use_cache", "mamba_ssm_dtype", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings", "mlp_only_layers",
}  # fmt: skip
"""Settings that change no logit of text."""


class QwenText(NamedTuple):
    """A text model's settings."""

    model: ModelConfig
    context: int
    """Tokens that it was trained to look back on."""
    unread: tuple[str, ...]
    """Settings that this project does not know; if one of them changes the model, the import is wrong."""


def read_settings(config: dict[str, Any], where: str, bos: int) -> QwenText:
    """Return what config.json of a qwen3_5 model says; HFError names what we do not have, and what was found."""
    kind, text = config.get("model_type"), config
    if kind == "qwen3_5":
        text = config.get("text_config")
        where = f"{where}: text_config"
    elif kind != "qwen3_5_text":
        fail_hf(where, f"model_type: {in_words(kind)}, expected qwen3_5 or qwen3_5_text: no other model is read")
    try:
        check_value(text, TEXT, where, CURE)
    except FileError as error:
        raise HFError(str(error)) from error
    assert isinstance(text, dict)
    ties = [each["tie_word_embeddings"] for each in (config, text) if "tie_word_embeddings" in each]
    if not ties or not all(tie is True for tie in ties):
        fail_hf(
            where,
            f"tie_word_embeddings: {in_words(all(ties) and ties != [])}, expected true: no head of its own is read",
        )
    try:
        return QwenText(_model(text, where, bos), text.get("max_position_embeddings") or 4096, _unread(text))
    except ConfigError as error:
        raise HFError(f"{where}: {error}") from error


def _model(text: dict[str, Any], where: str, bos: int) -> ModelConfig:
    rope = text.get("rope_parameters") or {}
    named = [(rope.get(key), text.get(key), unset) for key, unset in ROPE_UNSET]
    share, base = (next(value for value in values if value is not None) for values in named)
    width = text["head_dim"]
    return ModelConfig(
        vocab=text["vocab_size"], dim=text["hidden_size"], layers=text["num_hidden_layers"],
        blocks=_blocks(text, where), residual_scales=False, norm_gains=True, norm_eps=float(text["rms_norm_eps"]),
        documents="packed", bos=bos, embedding=Embedding(norm=False),
        attention=Attention(
            heads=text["num_attention_heads"], kv_heads=text["num_key_value_heads"], head_width=width,
            rope_dims=int(width * share), rope_base=float(base), output_gate=True,
        ),
        delta=Delta(
            heads=text["linear_num_value_heads"], key_heads=text["linear_num_key_heads"],
            key_dim=text["linear_key_head_dim"], value_dim=text["linear_value_head_dim"],
        ),
        mlp=MLP(hidden=text["intermediate_size"], activation="swiglu"), head=Head(softcap=None),
    )  # fmt: skip


ROPE_UNSET = (("partial_rotary_factor", 0.25), ("rope_theta", 10_000.0))
"""Where config.json leaves them out, transformers takes these."""


def _blocks(text: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return our kinds of layers, as few as can be repeated."""
    layers, every = text["num_hidden_layers"], text.get("full_attention_interval") or 4
    types = text.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    if len(types) != layers or len(set(types)) < 2:
        fail_hf(where, f"layer_types: {len(types)} of {len(set(types))} kinds, expected {layers} layers of both kinds")
    kinds = [TYPES[each] for each in types]
    period = next(p for p in range(1, layers + 1) if all(kinds[i] == kinds[i % p] for i in range(layers)))
    return tuple(kinds[:period])


def _unread(text: dict[str, Any]) -> tuple[str, ...]:
    known = {name.rstrip("?") for name in TEXT} | HARMLESS
    return tuple(sorted(ascii(name)[1:41] for name in text.keys() - known if text[name] is not None))


class Source(NamedTuple):
    """Where one of our weights comes from."""

    tensor: str
    """Their name, without the prefix."""
    shape: tuple[int, ...]
    """Shape of their tensor."""
    cut: Literal["whole", "rows", "queries", "gates", "taps"] = "whole"
    """Which part of it is ours."""
    at: tuple[int, int] = (0, 0)
    """rows: the first and the one behind the last; queries and gates: heads and their channels."""


def sources(model: ModelConfig) -> dict[str, Source]:
    """Return our name -> where it comes from, of every weight of a model that `read_settings` made."""
    attention, delta, dim, hidden = model.attention, model.delta, model.dim, model.mlp.hidden
    whole, keys = attention.whole(model), attention.kv_heads * attention.width(model)
    heads = attention.heads, attention.width(model)
    rows = {"embed.weight": Source("embed_tokens.weight", (model.vocab, dim))}
    entering, wide = delta.entering, delta.values_wide
    mixers = {
        "attention": {
            "q.weight": Source("self_attn.q_proj.weight", (2 * whole, dim), "queries", heads),
            "gate.weight": Source("self_attn.q_proj.weight", (2 * whole, dim), "gates", heads),
            "k.weight": Source("self_attn.k_proj.weight", (keys, dim)),
            "v.weight": Source("self_attn.v_proj.weight", (keys, dim)),
            "o.weight": Source("self_attn.o_proj.weight", (dim, whole)),
            "q_norm_gain": Source("self_attn.q_norm.weight", heads[1:]),
            "k_norm_gain": Source("self_attn.k_norm.weight", heads[1:]),
        },
        "delta": {
            "q.weight": Source("linear_attn.in_proj_qkv.weight", (entering, dim), "rows", (0, delta.keys)),
            "k.weight": Source("linear_attn.in_proj_qkv.weight", (entering, dim), "rows", (delta.keys, 2 * delta.keys)),
            "v.weight": Source("linear_attn.in_proj_qkv.weight", (entering, dim), "rows", (2 * delta.keys, entering)),
            "gate.weight": Source("linear_attn.in_proj_z.weight", (wide, dim)),
            "beta.weight": Source("linear_attn.in_proj_b.weight", (delta.heads, dim)),
            "decay.weight": Source("linear_attn.in_proj_a.weight", (delta.heads, dim)),
            "decay_bias": Source("linear_attn.dt_bias", (delta.heads,)),
            "decay_rate": Source("linear_attn.A_log", (delta.heads,)),
            "conv": Source("linear_attn.conv1d.weight", (entering, 1, TAPS), "taps"),
            "read_gain": Source("linear_attn.norm.weight", (delta.value_dim,)),
            "o.weight": Source("linear_attn.out_proj.weight", (dim, wide)),
        },
    }
    layer = {
        "mixer_norm_gain": Source("input_layernorm.weight", (dim,)),
        "mlp.gate.weight": Source("mlp.gate_proj.weight", (hidden, dim)),
        "mlp.up.weight": Source("mlp.up_proj.weight", (hidden, dim)),
        "mlp.down.weight": Source("mlp.down_proj.weight", (dim, hidden)),
        "mlp_norm_gain": Source("post_attention_layernorm.weight", (dim,)),
    }
    for i in range(model.layers):
        mixer = {f"mixer.{name}": source for name, source in mixers[model.kind(i)].items()}
        for name, source in (mixer | layer).items():
            rows[f"blocks.{i}.{name}"] = source._replace(tensor=f"layers.{i}.{source.tensor}")
    rows["head.norm_gain"] = Source("norm.weight", (dim,))
    return {name: rows[name] for name in param_table(model)}


class QwenWeights:
    """Our weights of a checkpoint, each cut out of its tensor when it is asked for, in the type that it has there."""

    entries: dict[str, Entry]
    """Kind and shape of each, by our names in the order of the table."""
    left_out: int
    """Tensors of other models than the one of text."""

    def __init__(self, tensors: Tensors, model: ModelConfig) -> None:
        """Hold the names and shapes of a checkpoint to a model's; HFError names what is missing, extra or misshapen."""
        self._tensors, self._sources, there = tensors, sources(model), tensors.entries
        table = param_table(model)
        self._prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in there), PREFIXES[1])
        wanted = {f"{self._prefix}{source.tensor}": source.shape for source in self._sources.values()}
        for name, shape in wanted.items():
            if name not in there:
                fail_hf(tensors.folder, f"{name} is missing; {CURE}")
            if there[name].shape != shape:
                fail_hf(tensors.path(name), f"{name} has shape {there[name].shape}, expected {shape}, as {CONFIG} says")
        extra = [name for name in there if name not in wanted and not name.startswith(LEFT_OUT)]
        self.left_out = len(there) - len(wanted) - len(extra)
        for name in extra:
            if name != "lm_head.weight" or not self._is_embedding(name):
                fail_hf(
                    tensors.path(name),
                    f"{ascii(name)[:80]} is no tensor of a qwen3_5 text model with the settings of {CONFIG}",
                )
        kinds = {name: there[f"{self._prefix}{source.tensor}"].kind for name, source in self._sources.items()}
        self.entries = {name: Entry(kind, table[name].shape) for name, kind in kinds.items()}

    def _is_embedding(self, name: str) -> bool:
        embedding = f"{self._prefix}embed_tokens.weight"
        same = self._tensors.entries[name]._replace(begin=0) == self._tensors.entries[embedding]._replace(begin=0)
        return same and np.array_equal(self._tensors.read(name), self._tensors.read(embedding))

    def read(self, name: str) -> np.ndarray:
        """Return one of our weights, bfloat16 as its bits; HFError."""
        source = self._sources[name]
        return cut_tensor(self._tensors.read(f"{self._prefix}{source.tensor}"), source)


def cut_tensor(tensor: np.ndarray, source: Source) -> np.ndarray:
    """Return our part of one of their tensors."""
    if source.cut == "rows":
        return tensor[slice(*source.at)]
    if source.cut in ("queries", "gates"):
        heads, width = source.at
        part = tensor.reshape(heads, 2, width, -1)[:, int(source.cut == "gates")]
        return part.reshape(heads * width, -1)
    return np.ascontiguousarray(tensor[:, 0, ::-1]) if source.cut == "taps" else tensor
