"""What the tests of twins share: a small artifact with its data, and a distillation that kills itself."""

import hashlib
import sys
from pathlib import Path

from core.cli import main
from core.config import RunConfig, changed
from core.data.bundled import BUNDLED
from core.export.artifact import write_artifact
from core.presets import get
from shared_tests.support.harness import engine, working_weights
from shared_tests.support.killed import arm, fix_threads, small_data

SHORT = (
    "--distill.steps", "6", "--distill.own-rows", "4", "--distill.prompt", "6", "--distill.batch", "2",
    "--distill.anchors", "3", "--distill.twin.block", "4", "--distill.seq", "24", "--distill.save-every", "2",
    "--distill.log-every", "1", "--distill.report-texts", "2", "--distill.report-tokens", "8",
)  # fmt: skip


def small_config() -> RunConfig:
    """Return a run of two small layers, delta and attention, that reads the bundled tokenizer's ids."""
    config = get("debug").config
    model = changed(config.model, {"blocks": ("delta", "attention"), "layers": 2, "matrix_storage": "int8/row"})
    return changed(config, {"model": model, "train.seq": 32})


def small_artifact(folder: Path, scale: float = 1.0) -> str:
    """Write an artifact with working weights in `folder`, and return its path."""
    config = small_config()
    stored = engine("cuda", config, working_weights(config.model, scale), dtype="float32").quantised()
    tokenizer = hashlib.sha256((BUNDLED / "tokenizer.model").read_bytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "artifact.skc"
    write_artifact(path, config.model, stored, tokenizer_sha256=tokenizer, provenance={"train_seq": 32})
    return str(path)


def data_of(folder: Path) -> str:
    """Prepare a small text in `folder` and return its path."""
    return small_data(folder / "text", 200)


def kill_while_saving(backend: str, out: str, *arguments: str) -> None:
    """Distil until the third checkpoint is to take its place, and die there as by kill -9."""
    fix_threads(backend)
    arm("rename", 3, str(Path(out) / "state" / "checkpoint.safetensors"))
    main(["distill", *arguments, "--backend", backend, "--out", out])


def state_of(out: str) -> bytes:
    """Return the bytes of a distillation's checkpoint, all that goes on from it."""
    return (Path(out) / "state" / "checkpoint.safetensors").read_bytes()


if __name__ == "__main__":
    kill_while_saving(*sys.argv[1:])
