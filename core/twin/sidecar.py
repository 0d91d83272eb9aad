"""The file of a twin, twin.safetensors beside the artifact: its weights, and which artifact it belongs to."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.config import from_json, to_json
from core.data.shards import file_sha256
from core.engine.protocol import Arrays
from core.files import FileError, open_file, parse_json
from core.formats.kinds import ANYTHING, COUNT, check_value, text, whole
from core.formats.tensors import read_tensors, read_tensors_header, write_tensors
from core.model.config import ModelConfig
from core.model.params import check_arrays, param_table
from core.training.checkpoint import digest
from core.twin.params import twin_rows
from core.twin.settings import TwinConfig

NAME = "twin.safetensors"
SCHEMA = 1
CURE = "the file is damaged: make it again with skc distill"
SHA256 = text(64)
HEADER = {
    "schema": whole("1", SCHEMA, SCHEMA), "twin": {"*": ANYTHING}, "artifact_sha256": SHA256,
    "weights_sha256": SHA256, "sha256": SHA256, "steps": COUNT,
}  # fmt: skip
SLACK = 1 << 20
"""Bytes that the file may have beside its arrays."""


class SidecarError(ValueError):
    """A twin's file cannot be used: the message names the file and what is wrong with it."""


class Sidecar(NamedTuple):
    """What a twin's file holds."""

    twin: TwinConfig
    params: Arrays
    artifact_sha256: str
    weights_sha256: str
    """`digest` of the artifact's decoded weights."""
    steps: int
    """Steps that the twin has learned for."""


def artifact_sha256(path: str | Path) -> str:
    """Return the SHA-256 of an artifact's file, or of an import's checkpoint; FileError, OSError."""
    return file_sha256(str(path))


def beside(path: str | Path) -> Path:
    """Return where the twin of a run or of an artifact lies."""
    return Path(path if os.path.isdir(path) else os.path.dirname(path)) / NAME


def check_place(path: str | Path, artifact: str | Path) -> None:
    """Raise SidecarError unless the twin of `artifact` may be written to `path`: no folder is made for it, and no file
    is lost but a twin, or what lies where twins do.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise SidecarError(f"{path}: there is no folder {folder} for the twin: make it, or choose another --twin")
    if os.path.isdir(path):
        raise SidecarError(f"{path}: is a folder, expected the name of a file for the twin; choose another --twin")
    if os.path.exists(path) and (
        os.path.samefile(path, artifact) or (os.path.basename(path) != NAME and not _is_twin(path))
    ):
        raise SidecarError(f"{path}: is there and no twin, and would be written over; choose another --twin")


def _is_twin(path: str | Path) -> bool:
    try:
        with open_file(path) as file:
            metadata = read_tensors_header(path, file).metadata
        return "artifact_sha256" in parse_json(path, str(metadata.get("skc", "")))
    except (FileError, TypeError):
        return False


def write_sidecar(path: str | Path, sidecar: Sidecar) -> None:
    """Write a twin's file in place of `path`; OSError."""
    head: dict[str, Any] = {"schema": SCHEMA, "twin": to_json(sidecar.twin), "steps": sidecar.steps}
    head |= {"artifact_sha256": sidecar.artifact_sha256, "weights_sha256": sidecar.weights_sha256}
    text = json.dumps({**head, "sha256": digest(sidecar.params)}, separators=(",", ":"), sort_keys=True)
    write_tensors(path, sidecar.params, {"skc": text})


def read_sidecar(path: str | Path, model: ModelConfig, artifact: str | Path) -> Sidecar:
    """Return the twin of `artifact`, which holds `model`; SidecarError for another's, or a damaged file, OSError.

    No more is read than a twin that is a clone in full, in float64, can have.
    """
    numbers = sum(row.size for row in param_table(model).values())
    try:
        metadata, params = read_tensors(path, SLACK + 16 * numbers)  # two factors may have twice what they stand for
        head = parse_json(f"{path}: skc", str(metadata.get("skc", "")))
        check_value(head, HEADER, f"{path}: skc", CURE)
    except FileError as error:
        raise SidecarError(str(error)) from error
    belongs, given = head["artifact_sha256"], artifact_sha256(artifact)
    if belongs != given:
        raise SidecarError(
            f"{path}: is the twin of artifact {belongs[:12]}, but {artifact} is {given[:12]}: make its own with "
            f"skc distill {artifact}, or give the one that belongs to it with --twin"
        )
    try:
        twin = from_json(TwinConfig, head["twin"], "twin")
        check_arrays(params, {name: row.shape for name, row in twin_rows(model, twin).items()}, "weights")
    except ValueError as error:
        raise SidecarError(f"{path}: {error}; {CURE}") from error
    for name, value in params.items():
        if value.dtype not in (np.float32, np.float64) or not np.isfinite(value).all():
            raise SidecarError(f"{path}: {name}: expected finite numbers in float32 or float64; {CURE}")
    if head["sha256"] != digest(params):
        raise SidecarError(f"{path}: sha256: the tensors are not the ones that were saved; {CURE}")
    return Sidecar(twin, params, belongs, head["weights_sha256"], head["steps"])
