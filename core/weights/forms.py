"""The files of each format: safetensors, a Hugging Face folder, an mlx-lm folder."""

import json
from typing import Any, NamedTuple

import safetensors.numpy

from core.config import to_json
from core.data.tokenizer import Tokenizer
from core.submission.checks.form import secrets_in
from core.submission.folder import SubmissionError
from core.weights.card import card
from core.weights.converting import ConversionError, converted
from core.weights.folder import CARD, CONFIG
from core.weights.modelling import modelling_file
from core.weights.subject import Exported, narrowed

WEIGHTS = "model.safetensors"
MODELLING = {"hf": ("modeling_skc.py", "cuda"), "mlx-lm": ("model.py", "mlx")}
"""Format -> the modelling file, and the backend that it is made of."""
WHAT = {
    WEIGHTS: "the weights, float16 where that has all their values, else float32", CONFIG: "the settings of the model",
    "modeling_skc.py": "the model in PyTorch, one file", "model.py": "the model in MLX, one file",
    "tokenizer.json": "the tokenizer, held to the original on a sample", "tokenizer_config.json": "how it is loaded",
    "tokenizer.model": "the tokenizer as it was trained, for SentencePiece",
    "generation_config.json": "how generate ends a text", CARD: "this page",
}  # fmt: skip


class Files(NamedTuple):
    """What a folder will hold beside config.json."""

    files: dict[str, bytes]
    config: dict[str, Any]
    """The object of config.json."""
    unconverted: str | None
    """Why there is no tokenizer.json; None: there is one, or none is part of the format."""


def folder_files(subject: Exported, form: str) -> Files:
    """Return the files of a format; SubmissionError if one would tell something of this machine."""
    model = to_json(subject.model)
    prefix = "" if form == "safetensors" else "model."
    weights = {prefix + name: value for name, value in narrowed(subject.weights).items()}
    about = {"format": "pt" if form == "hf" else "mlx" if form == "mlx-lm" else "np"}
    files, unconverted = {WEIGHTS: safetensors.numpy.save(weights, about)}, None
    config: dict[str, Any] = {"model_type": "skc", "spec": model}
    if form == "safetensors":
        files["tokenizer.model"] = subject.tokenizer.model
    else:
        name, backend = MODELLING[form]
        files[name] = modelling_file(backend).encode()
        own, unconverted = _tokenizer_files(subject)
        files |= own
        config |= _client_config(subject, form)
        if form == "hf":
            ends = {"bos_token_id": model["bos"], "eos_token_id": model["bos"], "pad_token_id": model["bos"]}
            files["generation_config.json"] = _json(ends)
    told = {name: WHAT[name] for name in (*files, CONFIG, CARD)}
    if "tokenizer.model" in files and not isinstance(subject.tokenizer, Tokenizer):
        told["tokenizer.model"] = "the tokenizer, a tokenizer.json"
    files[CARD] = card(subject, form, told, unconverted).encode()
    for name in (CARD, *(name for name in files if name.endswith(".py"))):
        for what in secrets_in(files[name].decode()):
            raise SubmissionError(f"{name}: {what}, which must not travel: nothing was written")
    return Files(files, config, unconverted)


def _client_config(subject: Exported, form: str) -> dict[str, Any]:
    """Return what config.json says to the library that loads the folder."""
    model = subject.model
    ends = {"bos_token_id": model.bos, "eos_token_id": model.bos}
    sizes = {
        "vocab_size": model.vocab, "hidden_size": model.dim, "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention.heads, "max_position_embeddings": subject.seq,
    }  # fmt: skip
    if form == "mlx-lm":
        return {"model_file": MODELLING[form][0], **sizes, **ends}
    module = MODELLING[form][0].removesuffix(".py")
    places = {"AutoConfig": f"{module}.SKCConfig", "AutoModelForCausalLM": f"{module}.SKCForCausalLM"}
    whole = {"architectures": ["SKCForCausalLM"], "auto_map": places, "dtype": "float32", "tie_word_embeddings": False}
    return {**whole, **sizes, **ends, "pad_token_id": model.bos}


def _tokenizer_files(subject: Exported) -> tuple[dict[str, bytes], str | None]:
    """Return the tokenizer's files, and why it is not a tokenizer.json if it is none."""
    tokenizer = subject.tokenizer
    try:
        data = converted(tokenizer)
    except ConversionError as error:
        return {"tokenizer.model": tokenizer.model}, str(error)
    start = next(row["content"] for row in json.loads(data)["added_tokens"] if row["id"] == tokenizer.bos)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": start, "pad_token": start,
        "model_max_length": subject.seq, "clean_up_tokenization_spaces": False, "split_special_tokens": True,
    }  # fmt: skip
    return {"tokenizer.json": data, "tokenizer_config.json": _json(config)}, None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
