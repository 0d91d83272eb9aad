"""Tiny Qwen3.5 checkpoints, as transformers writes them, of random weights and a tokenizer that was trained here."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from shared_tests.support.json_tokenizers import qwen_like

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
TINY: dict[str, Any] = {
    "vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "tie_word_embeddings": True, "rope_parameters": ROPE,
}  # fmt: skip
ODD = TINY | {
    "vocab_size": 320, "hidden_size": 40, "num_hidden_layers": 5, "full_attention_interval": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12, "linear_num_key_heads": 3,
    "linear_num_value_heads": 3, "linear_key_head_dim": 12, "linear_value_head_dim": 6, "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE | {"rope_theta": 1e6, "partial_rotary_factor": 1 / 3, "mrope_section": [1, 1, 0]},
}  # fmt: skip
"""Five layers of the pattern 1:1, a rotation of a third of a head, as many value heads as key heads."""


def random_model(settings: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen3_5ForCausalLM:
    """Return a model of random weights that `dtype` holds, gains and rates too, computed in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**settings)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(
                    torch.randn_like(weight) * (0.1 if weight.ndim > 1 else 0.3)
                    + name.endswith("linear_attn.norm.weight")
                )
                weight.copy_(weight.to(dtype))
    return model


def save(model: Qwen3_5ForCausalLM, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a model and a tokenizer as a checkpoint and return its folder."""
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights, **options)
    (folder / "tokenizer.json").write_bytes(qwen_like())
    return folder


def as_multimodal(folder: Path) -> None:
    """Give a checkpoint the names and the settings of one that reads pictures too, and drafts further tokens."""
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen3_5", "text_config": config, "vision_config": {"depth": 1}, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(whole))
    arrays = safetensors.torch.load_file(folder / "model.safetensors")
    arrays = {name.replace("model.", "model.language_model.", 1): value for name, value in arrays.items()}
    others = {"model.visual.merger.weight": torch.ones(3), "mtp.fc.weight": torch.full((2, 2), torch.nan)}
    safetensors.torch.save_file(arrays | others, folder / "model.safetensors")


def change(folder: Path, **arrays: torch.Tensor | None) -> None:
    """Replace arrays of a checkpoint in one file; None: take it away."""
    whole = safetensors.torch.load_file(folder / "model.safetensors") | arrays
    safetensors.torch.save_file({k: v for k, v in whole.items() if v is not None}, folder / "model.safetensors")


def logits_of(model: Qwen3_5ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Return what transformers computes, (rows, seq, vocab)."""
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


os.environ.setdefault("HF_HUB_OFFLINE", "1")
