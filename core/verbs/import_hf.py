"""The verb import-hf: a Qwen3.5 text model in the form of Hugging Face becomes a run folder."""

import dataclasses
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from core.config import ConfigError, DataConfig, EvalConfig, RunConfig, TrainConfig
from core.data.bundled import open_data
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_json import JsonTokenizer
from core.files import read_file
from core.hf.files import CONFIG, MAX_CONFIG, Tensors, fail_hf, read_config
from core.hf.qwen import QwenText, QwenWeights, read_settings
from core.model.params import count
from core.training.environment import made_by
from core.training.run import config_digest
from core.verbs.common import Context, Outcome
from core.verbs.imported import check_new, new_run

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ImportHF:
    """Options of `skc import-hf`."""

    folder: Positional[str]
    """Folder of a checkpoint: config.json, model.safetensors or its parts with their index, tokenizer.json."""
    out: str
    """Run folder to make."""
    data: str | None = None
    """Prepared folder that the run is to be scored on, made with the tokenizer of the run; None: say it at each use."""
    seq: int | None = None
    """Tokens that text is written and scored with; None: 4096, or fewer where the model was trained with fewer."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def import_hf(options: ImportHF, context: Context) -> Outcome:
    """Make a run folder of step 0 out of a checkpoint, weight by weight; nothing is left in --out if it cannot be."""
    out, folder = Path(options.out), Path(options.folder)
    check_new(out)
    settings = read_config(folder)
    tokenizer = _tokenizer(folder)
    text = read_settings(settings, str(folder / CONFIG), tokenizer.bos)
    own = tokenizer.vocab
    tokenizer = tokenizer.widened(text.model.vocab, str(folder / TOKENIZER))
    config = _configured(options, text)
    _check_data(options.data, tokenizer)
    with Tensors(folder) as tensors:
        weights = QwenWeights(tensors, text.model)
        lines = [context.command, *_lines(options, text, config, weights, own, tokenizer)]
        env = {**made_by(context.command, 0), "imported": _origin(folder, settings, weights)}
        with new_run(out, config, tokenizer.model, env, lines) as run:
            run.import_weights(weights)
    for line in [*lines[2:], f"wrote {out}, a run for skc sample, eval, distill, info"]:
        context.say(line)
    value = {
        "run": str(out), "parameters": count(text.model), "model": dataclasses.asdict(text.model),
        "tokenizer_sha256": tokenizer.sha256, "left_out": weights.left_out, "unread": list(text.unread),
    }  # fmt: skip
    return Outcome(True, value)


def _tokenizer(folder: Path) -> JsonTokenizer:
    path = str(folder / TOKENIZER)
    try:
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError:
        fail_hf(path, "no such file; give the folder of a whole checkpoint")
    if not isinstance(tokenizer, JsonTokenizer):
        fail_hf(path, "a SentencePiece model, expected the tokenizer.json of a byte-level BPE")
    return tokenizer


def _check_data(data: str | None, tokenizer: JsonTokenizer) -> None:
    """Raise ConfigError or DataError unless the data that config.json will name is there and the tokenizer's own."""
    if data is None:
        return
    theirs = open_data(data, train=False).tokenizer.sha256
    if theirs != tokenizer.sha256:
        raise ConfigError(
            f"--data {data}: has tokenizer {theirs[:12]}, the run will have {tokenizer.sha256[:12]}: leave it out, and "
            "prepare text with the tokenizer.model of the run"
        )


def _configured(options: ImportHF, text: QwenText) -> RunConfig:
    seq = min(4096, text.context) if options.seq is None else options.seq
    data = DataConfig() if options.data is None else DataConfig(options.data)
    return RunConfig(
        preset="import-hf", model=text.model, data=data, train=TrainConfig(batch=1, seq=seq), eval=EvalConfig(seq=seq)
    )


def _lines(
    options: ImportHF, text: QwenText, config: RunConfig, weights: QwenWeights, own: int, tokenizer: JsonTokenizer
) -> list[str]:
    model = text.model
    kinds = Counter(model.kind(i) for i in range(model.layers))
    types = Counter(entry.kind for entry in weights.entries.values())
    lines = [
        f"settings sha256 {config_digest(config)} (all that decides the weights, but the seed)",
        f"{options.folder}: a qwen3_5 text model, {count(model):,} parameters: {kinds['delta']} layers of delta and "
        f"{kinds['attention']} of attention, {model.dim} wide, vocabulary {model.vocab:,}; "
        f"{', '.join(f'{number} tensors {kind}' for kind, number in sorted(types.items()))}, kept as they are",
        f"tokenizer {tokenizer.sha256[:12]}: {own:,} tokens; texts begin with id {tokenizer.bos}, as they end",
    ]
    if weights.left_out:
        lines.append(f"{weights.left_out} tensors of pictures and of further tokens' drafts are left out")
    if text.unread:
        lines.append(f"WARNING: settings that are not known here, and not used: {', '.join(text.unread)}")
    return lines


def _origin(folder: Path, settings: dict[str, Any], weights: QwenWeights) -> dict[str, Any]:
    """Return what env.json says of the checkpoint."""
    digest = hashlib.sha256(read_file(folder / CONFIG, MAX_CONFIG)).hexdigest()
    return {
        "folder": os.path.basename(os.path.abspath(folder)), "model_type": str(settings["model_type"]),
        "config_sha256": digest, "tensors": len(weights.entries), "left_out": weights.left_out,
    }  # fmt: skip
