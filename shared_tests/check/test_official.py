"""Checkpoints of the official scripts, imported by `skc import-official`: losses theirs, nothing else's. Budget: 20 s.

The losses in golden/official_losses.json are those of the official GPT classes (scripts/official_losses, which has the
weights' recipe too); the files are made here, as the official scripts make them.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.cli import main
from core.engine.loading import load_engine
from core.engine.protocol import EngineOptions
from core.official import checkpoint as official
from core.official.checkpoint import EPS, model_of, read_official, swap_halves, to_ours
from core.presets.transformers import BASELINE
from core.training.run import Run, config_digest
from shared_tests.support.killed import small_data
from shared_tests.support.official_files import (
    CONTROL,
    EMBEDDING,
    RECIPE,
    ROOT,
    drawn,
    int8,
    packed,
    saved,
    small,
    state,
)

GOLDEN = json.loads((ROOT / "shared_tests/golden/official_losses.json").read_text())["losses"]
CLOSE, FAR = 1e-5, 1e-4


class Files(dict[tuple[str, str], Path]):
    """Files as the official scripts write them, by size and kind, made when a test first asks for their size."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: tuple[str, str]) -> Path:
        """Write the files of a size; MLX writes its own."""
        import mlx.core as mx

        name, path = key[0], self.folder / key[0]
        self[name, "cuda"] = saved(path.with_suffix(".pt"), state(name))
        self[name, "cuda_int8"] = packed(path.with_suffix(".int8.ptz"), int8(name))
        self[name, "mlx"] = path.with_suffix(".npz")
        arrays = {key: mx.array(value) for key, value in drawn(name).items()}
        mx.savez(str(self[name, "mlx"]), **arrays | {EMBEDDING: arrays[EMBEDDING].astype(mx.bfloat16)})
        return self[key]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of both sizes."""
    return Files(tmp_path_factory.mktemp("official"))


def loss(path: Path, name: str, backend: str, *, swap: bool = False, **settings: Any) -> float:
    """Return the float32 loss of an imported file on a size's tokens; `swap` turns q and k back: a planted fault."""
    found = read_official(path)
    settings = {"rope_base": 10_000.0, "softcap": 30.0, "norm_eps": None, "bos": 1, **settings}
    model = model_of(path, found, **settings)
    weights = to_ours(found, model)
    for key in weights:
        if swap and key.endswith(official.TURNED):
            weights[key] = swap_halves(weights[key], model.attention.width(model))
    config = dataclasses.replace(BASELINE, model=model)
    engine = load_engine(backend, config, weights, EngineOptions(dtype="float32", compile=False))
    return float(engine.nll(*RECIPE.tokens(name)).astype(np.float64).mean())


@pytest.mark.pair
@pytest.mark.parametrize("backend", ["cuda", "mlx"])
@pytest.mark.parametrize("kind", ["cuda", "cuda_int8", "mlx"])
@pytest.mark.parametrize("name", ["mini", pytest.param("full", marks=pytest.mark.long)])
def test_an_imported_file_has_the_loss_of_the_official_model(name: str, kind: str, backend: str, files: dict) -> None:
    assert abs(loss(files[name, kind], name, backend) - GOLDEN[name][kind]) < CLOSE


@pytest.mark.parametrize("kind", ["cuda", "mlx"])
@pytest.mark.parametrize(
    "fault",
    [
        {"swap": True}, {"norm_eps": 1e-2}, {"norm_eps": "other"}, {"rope_base": 9e3}, {"softcap": 29.0},
    ],
)  # fmt: skip
def test_the_loss_tells_a_wrong_turn_and_a_wrong_setting(fault: dict[str, Any], kind: str, files: dict) -> None:
    """The epsilon of the other script, 1.19e-7 against 1e-6, moves it too: rows of the embedding are that small."""
    if fault.get("norm_eps") == "other":
        fault = {"norm_eps": EPS["train_gpt.py" if kind == "mlx" else "train_gpt_mlx.py"]}
    assert abs(loss(files["mini", kind], "mini", "cuda", **fault) - GOLDEN["mini"][kind]) > FAR


def test_the_goldens_tell_the_scripts_and_the_rounding_apart() -> None:
    assert abs(GOLDEN["full"]["cuda_int8"] - GOLDEN["full"]["cuda"]) > FAR
    for losses in GOLDEN.values():
        assert abs(losses["mlx"] - losses["cuda"]) > FAR


def test_what_an_int8_artifact_keeps_in_float_is_rounded_as_there(files: dict) -> None:
    """A mini is all passthrough: float16, but for the control tensors; the rounding is seen bit for bit."""
    found = read_official(files["mini", "cuda_int8"])
    assert found.kind == "int8"
    for key, value in drawn("mini").items():
        kept = any(part in key for part in CONTROL)
        rounded = torch.tensor(value.astype(np.float16))
        rounded = rounded.bfloat16() if key == EMBEDDING else rounded
        np.testing.assert_array_equal(found.arrays[key], value if kept else rounded.float().numpy(), err_msg=key)


def test_a_passthrough_gets_its_type_back(tmp_path: Path) -> None:
    """1 + 2^-10 is a float16, and 1 in bfloat16; a scale of a whole tensor is a number of its own."""
    made = int8("mini")
    made["passthrough"]["skip_weights"] = torch.full((1, 64), 1 + 2**-10).half()
    made["passthrough_orig_dtypes"]["skip_weights"] = "bfloat16"
    key = "blocks.0.attn_scale"
    del made["passthrough"][key]
    made["quantized"][key], made["dtypes"][key] = torch.arange(64, dtype=torch.int8), "float32"
    made["scales"][key] = torch.tensor(0.5)
    found = read_official(packed(tmp_path / "x.ptz", made)).arrays
    assert (found["skip_weights"] == 1.0).all() and found[key].tolist() == [n / 2 for n in range(64)]


def test_arrays_are_read_in_either_order(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "x.npz", a=rows, b=np.asfortranarray(rows))
    found = read_official(tmp_path / "x.npz").arrays
    assert found["a"].tolist() == found["b"].tolist() == rows.tolist()


def test_prefixes_of_wrappers_are_taken_off_all_names_or_none(files: dict, tmp_path: Path) -> None:
    plain = read_official(files["mini", "cuda"]).arrays
    wrapped = {f"module._orig_mod.{key}": value for key, value in state("mini").items()}
    assert read_official(saved(tmp_path / "b.pt", wrapped)).arrays.keys() == plain.keys()
    half = {("module." if key < "c" else "") + key: value for key, value in state("mini").items()}
    assert read_official(saved(tmp_path / "c.pt", half)).arrays.keys() == half.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a prepared folder of 60 short documents, cut by the bundled tokenizer."""
    return small_data(tmp_path_factory.mktemp("text"), 60)


def test_a_run_folder_comes_out_that_the_other_verbs_take(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, out = saved(tmp_path / "final_model.pt", small()), tmp_path / "imported"
    options = [str(path), "--out", str(out), "--data", data, "--seq", "64", "--rope-base", "5000", "--json"]
    assert main(["import-official", *options]) == 0
    printed = capsys.readouterr()
    value = json.loads(printed.out)
    assert value["kind"] == "state dict" and value["model"]["layers"] == 2
    assert "WARNING: no better" in printed.err  # random weights know nothing of this text
    assert {p.name for p in tmp_path.iterdir()} == {path.name, out.name}
    run = Run.open(out)
    kept = run.checkpoint()
    assert kept is not None and kept.step == 0 and not any(values.any() for values in kept.optimizer.values())
    assert run.environment()["imported"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert run.logged_configs() == {config_digest(run.config)}
    model = run.config.model
    assert (run.config.preset, model.attention.rope_base, model.norm_eps) == ("baseline", 5000.0, EPS["train_gpt.py"])
    assert run.config.eval.seq == 64
    for backend in ("cuda", "mlx"):
        assert main(["eval", str(out), "--backend", backend, "--json"]) == 0
    scores = [json.loads(line)["score"]["bpb"] for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert len(scores) == 2 and abs(scores[0] - scores[1]) < 1e-5
    assert main(["sample", str(out), "--tokens", "4"]) == 0
    assert main(["export", str(out)]) == 0
    assert main(["import-official", *options]) == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.long
def test_an_imported_run_is_audited(data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, out = saved(tmp_path / "final_model.pt", small()), tmp_path / "imported"
    assert main(["import-official", str(path), "--out", str(out), "--data", data, "--seq", "64"]) == 0
    assert main(["export", str(out)]) == 0
    assert main(["audit", str(out), "--flips", "1"]) == 0
    assert "broken" in capsys.readouterr().out


def test_one_layer_has_no_skips(data: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "final_model.pt", small(1))
    assert main(["import-official", str(path), "--out", str(tmp_path / "run"), "--data", data, "--seq", "64"]) == 0
    model = Run.open(tmp_path / "run").config.model
    assert model.layers == 1 and not model.skips.on
