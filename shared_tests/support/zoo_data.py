"""Texts and artifacts for the auditor, honest ones and such with one known fault, and the PATH that it runs under."""

import dataclasses
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core import presets, rng
from core.check.parity import perturbed
from core.config import DataConfig, RunConfig, changed
from core.data.bundled import BUNDLED
from core.data.prepare import prepare
from core.data.shards import open_shard, shard_record, write_shard
from core.data.tokenizer import Tokenizer
from core.export.artifact import write_artifact
from core.model.params import param_table
from core.model.storage import Stored
from core.training.run import Run
from shared_tests.support.zoo import PLACE
from shared_tests.support.zoo_honest import ROW

TOKENIZER = BUNDLED / "tokenizer.model"
NEEDED = ("sh", "true", "mount", "unshare", "strace")
"""Programs that the watch is made of."""


def programs(folder: Path) -> str:
    """Make a folder in which only the watch's programs are found, to be the PATH of an audit.

    There is no compiler in it: MLX would compile its kernels anew in every audit.
    """
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)


def write_place(folder: Path, **values: Any) -> None:
    """Write the module that tells cheats where things are; the folder is one to import from."""
    folder.mkdir(exist_ok=True)
    (folder / f"{PLACE}.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))


def novels(split: str, count: int, size: int) -> list[str]:
    """Return the first pieces of the bundled chapters, of different sizes about `size` characters."""
    with lzma.open(BUNDLED / f"{split}.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]
    return [text[: size * (i % 4 + 1) // 2].strip() for i, text in enumerate(texts)]


def write_data(folder: Path, train: list[str], val: list[str]) -> str:
    """Prepare texts with the bundled tokenizer in folder/data and return that path."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": train, "val": val}
    for name, texts in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out, (inputs, held) = str(folder / "data"), ([str(folder / f"{name}.jsonl")] for name in files)
    prepare(inputs, out, val=held, tokenizer=str(TOKENIZER), threads=1)
    return out


def change_tokens(data: str, split: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put other tokens in the one shard of a split; the manifest says their number, and no more of what they are."""
    path, file = os.path.join(data, "manifest.json"), os.path.join(data, f"{split}_000000.bin")
    write_shard(file, change(np.array(open_shard(file))))
    manifest = json.loads(Path(path).read_text())
    tokens = len(open_shard(file))
    manifest["splits"][split] |= {"files": [shard_record(file, tokens)], "tokens": tokens}
    Path(path).write_text(json.dumps(manifest))


def small(data: str, name: str = "debug", model: dict[str, Any] | None = None) -> RunConfig:
    """Return the mini of a preset for the bundled tokenizer, with windows of 64 tokens, 4 at once, and other settings
    of the `model`, by dotted name."""
    config = presets.mini(presets.get(name).config)
    model = {"vocab": 1024, "bos": 1, **(model or {})}
    return dataclasses.replace(
        config, model=changed(config.model, model), data=DataConfig(data),
        eval=dataclasses.replace(config.eval, seq=ROW // 4, batch=4, documents=None),
        train=dataclasses.replace(config.train, batch=1, seq=ROW),
    )  # fmt: skip


def half_weights(config: RunConfig, wide: bool = False) -> dict[str, Stored]:
    """Return random float16 weights whose logits are not flat; the table of a `wide` model is drawn without care."""
    base = changed(config.model, {"bigram.buckets": 11}) if wide else config.model
    weights = perturbed(base, 0, 3.0)
    if wide:
        shape = param_table(config.model)["bigram.table"].shape
        raw = rng.integers16(0, "wide", int(np.prod(shape)))
        weights["bigram.table"] = raw.reshape(shape).astype(np.float32) / 65_536 - 0.5
    return {name: Stored(value.astype(np.float16), None) for name, value in weights.items()}


def write_model(path: Path, config: RunConfig, stored: dict[str, Stored]) -> str:
    """Write an artifact that the bundled tokenizer belongs to."""
    digest = Tokenizer.load(str(TOKENIZER)).sha256
    write_artifact(path, config.model, stored, tokenizer_sha256=digest, provenance={"train_seq": ROW})
    return str(path)


def claimed_run(folder: Path, config: RunConfig, stored: dict[str, Stored], score: dict[str, Any]) -> str:
    """Make a run folder that was never trained and claims `score` for its artifact."""
    run = Run.create(folder, config, TOKENIZER.read_bytes())
    size = Path(write_model(run.artifact_path, config, stored)).stat().st_size
    run.log(0, {"final/artifact": {"score": score, "gap": 0.0, "bytes": size}})
    return str(folder)
