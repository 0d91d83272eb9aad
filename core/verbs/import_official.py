"""The verb import-official: a checkpoint of the official scripts becomes a run folder of our `baseline`."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from core.config import ConfigError, DataConfig, RunConfig
from core.data.bundled import open_data
from core.data.dataset import Dataset, identity
from core.engine.loading import choose_backend, load_engine
from core.engine.protocol import Engine
from core.export.artifact import check_limits
from core.model.params import count
from core.official.checkpoint import OfficialCheckpoint, model_of, read_official, to_ours
from core.presets.transformers import BASELINE
from core.training.environment import environment
from core.training.run import config_digest
from core.verbs.common import Backend, Context, Outcome, check_data
from core.verbs.imported import check_new, new_run


@dataclass(frozen=True)
class Import:
    """Options of `skc import-official`."""

    file: Positional[str]
    """final_model.pt or final_model.int8.ptz of train_gpt.py, or the .npz of train_gpt_mlx.py."""
    out: str
    """Run folder to make."""
    data: str = "sample"
    """Prepared folder with the tokenizer that the model was trained with; weights do not say which that was."""
    rope_base: float = BASELINE.model.attention.rope_base
    """ROPE_BASE of the training."""
    softcap: float = 30.0
    """LOGIT_SOFTCAP of the training."""
    norm_eps: float | None = None
    """Epsilon of the norms; None: what float32 gives in the script (train_gpt.py 1.19e-7, train_gpt_mlx.py 1e-6)."""
    seq: int = BASELINE.train.seq
    """TRAIN_SEQ_LEN of the training: the window that is scored."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def import_official(options: Import, context: Context) -> Outcome:
    """Make a run folder of step 0 out of an official checkpoint; nothing is left in --out if it cannot be."""
    say, out = context.say, Path(options.out)
    check_new(out)
    checkpoint = read_official(options.file)
    config, dataset = _configured(options, checkpoint)
    engine = load_engine(choose_backend(options.backend), config, to_ours(checkpoint, config.model))
    loss, uniform = _first_loss(engine, dataset, options.seq), math.log(config.model.vocab)
    model = config.model
    lines = [
        context.command,
        f"settings sha256 {config_digest(config)} (all that decides the weights, but the seed)",
        f"{options.file}: {checkpoint.kind} of {checkpoint.script}, {count(model):,} parameters: {model.layers} layers "
        f"of {model.dim}, {model.attention.heads} heads, {model.attention.kv_heads} key heads, MLP {model.mlp.hidden}, "
        f"vocabulary {model.vocab}",
        f"taken as given, for weights do not say it: rope_base {model.attention.rope_base:g}, "
        f"softcap {model.head.softcap:g}, "
        f"norm_eps {model.norm_eps:.3g}, seq {options.seq}, tokenizer {dataset.tokenizer.sha256[:12]} of "
        f"{dataset.path}",
        f"first window of the validation text: {loss:.4f} nats per token (all tokens alike: {uniform:.4f})",
    ]
    if not loss < uniform:
        lines.append("WARNING: no better than no model: was it trained with this tokenizer? Give its data with --data")
    env = _environment(options, checkpoint, engine, dataset, context)
    with new_run(out, config, dataset.tokenizer.model, env, lines, identity(dataset)) as run:
        run.save(engine, 0, 0.0)
    for line in [*lines[2:], f"wrote {out}, a run for skc eval, sample, export, and after that audit"]:
        say(line)
    value = {
        "run": str(out), "script": checkpoint.script, "kind": checkpoint.kind, "sha256": checkpoint.sha256,
        "parameters": count(model),
        "model": dataclasses.asdict(model), "backend": engine.backend, "first_window": loss, "uniform": uniform,
    }  # fmt: skip
    return Outcome(True, value)


def _configured(options: Import, checkpoint: OfficialCheckpoint) -> tuple[RunConfig, Dataset]:
    """Return `baseline` with what the file and the options say, and the data, once they fit each other."""
    dataset = open_data(options.data)
    model = model_of(
        options.file, checkpoint, rope_base=options.rope_base, softcap=options.softcap, norm_eps=options.norm_eps,
        bos=dataset.tokenizer.bos,
    )  # fmt: skip
    if model.vocab != dataset.tokenizer.vocab:
        raise ConfigError(
            f"{options.file}: has {model.vocab} tokens, but the tokenizer of {options.data} has "
            f"{dataset.tokenizer.vocab}: give the data it was trained on with --data PATH"
        )
    config = dataclasses.replace(
        BASELINE,
        preset="baseline",
        model=model,
        data=DataConfig(options.data),
        train=dataclasses.replace(BASELINE.train, seq=options.seq),
        eval=dataclasses.replace(BASELINE.eval, seq=options.seq),
    )
    check_data(config, dataset, "give the data it was trained on with --data PATH")
    check_limits(model)
    return config, dataset


def _environment(
    options: Import, checkpoint: OfficialCheckpoint, engine: Engine, dataset: Dataset, context: Context
) -> dict:
    """Return env.json: this process, and the file that the weights are from."""
    source = {
        "file": os.path.basename(options.file), "sha256": checkpoint.sha256, "bytes": checkpoint.size,
        "script": checkpoint.script, "kind": checkpoint.kind,
    }  # fmt: skip
    note = "weights of an official checkpoint; its optimizer state is not known, and steps are counted from 0"
    env = environment(engine, dataset, context.command, 0)
    return {**env, "notes": [*env["notes"], note], "imported": source}


def _first_loss(engine: Engine, dataset: Dataset, seq: int) -> float:
    row = dataset.val.read(0, min(seq + 1, len(dataset.val)))
    return float(engine.nll(row[None, :-1], row[None, 1:]).mean())
