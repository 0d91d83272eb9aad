"""`skc export PATH --format FORMAT`: the weights of an artifact in a form that others read."""

import os
from pathlib import Path
from typing import Any, NoReturn

from core.config import ConfigError, ModelConfig
from core.verbs.common import Context, Outcome, open_artifact, open_tokenizer
from core.weights.folder import check_folder, write_folder
from core.weights.forms import folder_files
from core.weights.subject import artifact_path, read_exported

GGUF = (
    "--format gguf: a gguf file names one of the architectures that llama.cpp has built in, and none has {what}; "
    "use --format hf or mlx-lm, whose folders bring their own modelling file"
)


def export_weights(path: str, form: str, out: str | None, data: str | None, context: Context) -> Outcome:
    """Write the artifact of a run, or a bare one, as a folder of `form`; ConfigError, ArtifactError, RunError."""
    artifact = artifact_path(path)
    subject = open_artifact(artifact, data)
    if form == "gguf":
        refuse_gguf(subject.config.model)
    folder = Path(out) if out is not None else Path(artifact).parent / form
    check_folder(folder)
    tokenizer = open_tokenizer(subject, artifact, data)
    source = read_exported(artifact, tokenizer, subject.config.train.seq)
    files, config, unconverted = folder_files(source, form)
    if unconverted is not None:
        context.say(f"no tokenizer.json: {unconverted}; tokenizer.model is written instead")
    if not write_folder(folder, files, config):
        context.say(f"{folder / 'README.md'} was changed since it was written: it is kept as it is")
    sizes = {name: os.path.getsize(folder / name) for name in sorted(os.listdir(folder))}
    context.say(f"wrote {folder}: {', '.join(f'{name} ({size:,} bytes)' for name, size in sizes.items())}")
    value: dict[str, Any] = {"path": str(folder), "format": form, "files": sizes, "unconverted": unconverted}
    return Outcome(True, {**value, "score": source.score, "audit": source.audit})


def refuse_gguf(model: ModelConfig) -> NoReturn:
    """Raise ConfigError, which names what of a model no architecture of llama.cpp has."""
    kinds = sorted(set(model.blocks[: model.layers]) - {"attention"})
    parts = [stage.part for stage in model.stages(True) if stage.part not in ("layer", "embedding", "head")]
    named = [*(f"layers of kind {kind}" for kind in kinds), *dict.fromkeys(parts)]
    own = "documents that see nothing before their BOS" if model.documents == "isolated" else "its attention"
    raise ConfigError(GGUF.format(what=", ".join([*named, own])))
