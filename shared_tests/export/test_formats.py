"""`skc export --format`: modelling files of one module, folders that others load, refusals. Budget: 15 s."""

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import core.weights.forms as forms
from core.config import to_json
from core.data.tokenizer import Tokenizer
from core.export.artifact import read_artifact, write_artifact
from core.formats.tensors import read_tensors
from core.weights.folder import write_folder
from core.weights.modelling import modelling_file
from shared_tests.support import exported, harness
from shared_tests.support.command_line import call, refuse

Capture = pytest.CaptureFixture[str]
SOME = (harness.EVERYTHING, "delta_ablate", "skc_1609_mac")
"""One of everything, the delta rule, experts."""
BOUND = 1e-5


@pytest.fixture(scope="module", params=harness.BACKENDS)
def modelling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModuleType]:
    """A backend's modelling file, imported."""
    backend = request.param
    path = tmp_path_factory.mktemp("modelling") / f"modelling_{backend}.py"
    path.write_text(modelling_file(backend))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return backend, made


def built(backend: str, made: ModuleType, model: Any, weights: Any) -> Any:
    """Return the model of a modelling file with weights."""
    if backend == "mlx":
        import mlx.core as mx

        net = made.Model(made.ModelArgs.from_dict({"model_type": "skc", "spec": to_json(model), "more": 1}))
        net.load_weights([(f"model.{name}", mx.array(value)) for name, value in weights.items()], strict=True)
        return net
    import torch

    net = made.SKCForCausalLM(made.SKCConfig(spec=to_json(model))).eval()
    net.load_state_dict({f"model.{name}": torch.tensor(value) for name, value in weights.items()}, strict=True)
    return net


def in_pieces(backend: str, net: Any, rows: np.ndarray, ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of whole rows, and of rows that are read in pieces from a state."""
    pieces = np.split(rows, ends, axis=1)
    if backend == "mlx":
        import mlx.core as mx

        cache = net.make_cache()
        read = [np.array(net(mx.array(piece), cache=cache)) for piece in pieces]
        assert cache[0].offset == rows.shape[1] and cache[0].nbytes > 0
        return np.array(net(mx.array(rows))), np.concatenate(read, axis=1)
    import torch

    with torch.no_grad():
        whole, read, state = net(torch.tensor(rows)).logits.numpy(), [], None
        for piece in pieces:
            out = net(torch.tensor(piece), state=state, use_cache=True)
            read, state = [*read, out.logits.numpy()], out.state
    return whole, np.concatenate(read, axis=1)


@pytest.mark.pair
@pytest.mark.parametrize("name", SOME)
def test_a_modelling_file_computes_what_the_engine_does(name: str, modelling: tuple[str, ModuleType]) -> None:
    backend, made = modelling
    config = harness.mini(name)
    engine = harness.engine(backend, config, harness.working_weights(config.model, 1.0))
    rows = exported.rows_of(config.model.vocab, config.model.bos)
    wanted = engine.logits(rows)
    whole, pieces = in_pieces(backend, built(backend, made, config.model, engine.weights()), rows, (13, 14, 15, 31))
    assert np.abs(whole - wanted).max() <= BOUND and np.abs(pieces - wanted).max() <= BOUND
    assert np.abs(wanted).max() > 0.1


@pytest.mark.pair
def test_a_modelling_file_imports_nothing_of_ours(modelling: tuple[str, ModuleType]) -> None:
    backend, _ = modelling
    text = modelling_file(backend)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert roots == ({"mlx", "numpy"} if backend == "mlx" else {"torch", "numpy", "transformers"})
    tops = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(tops) - tops.count("_") == len({*tops} - {"_"})
    assert "# Normalised queries and keys bound the scores" in text and '"""Return the softmax' in text


def test_padding_on_either_side_is_not_read(modelling: tuple[str, ModuleType]) -> None:
    backend, made = modelling
    if backend == "mlx":  # mlx-lm pads nothing
        return
    import torch

    model = harness.mini(harness.EVERYTHING).model
    net = built(backend, made, model, harness.working_weights(model, 1.0))
    rows = torch.tensor(exported.rows_of(model.vocab, model.bos)[:, :21], dtype=torch.int64)
    pad = torch.full((2, 5), 3)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 21)], dim=1)
    with torch.no_grad():
        wanted, left = net(rows, use_cache=True), net(torch.cat([pad, rows], 1), mask, use_cache=True)
        right = net(torch.cat([rows, pad], 1), mask.flip(1), use_cache=True)
        following = torch.tensor([[5], [6]])
        steps = [
            net(following, torch.cat([mask, torch.ones(2, 1)], 1), state=o.state, use_cache=True).logits
            for o in (left, right, wanted)
        ]
    torch.testing.assert_close(left.logits[:, 5:], wanted.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(right.logits[:, :21], wanted.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(steps[0], steps[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(steps[1], steps[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(right.logits[:, -1], wanted.logits[:, -1], atol=1e-6, rtol=0)  # what `generate` reads
    with torch.no_grad():
        loss = net(rows, labels=rows).loss
        padded = net(torch.cat([pad, rows], 1), mask, labels=torch.cat([pad - 103, rows], 1)).loss
        summed = net(rows, labels=rows, num_items_in_batch=4).loss  # Trainer's number for its accumulated batches
    torch.testing.assert_close(padded, loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(summed, loss * 10, atol=1e-5, rtol=0)
    assert net._reorder_cache(None, torch.tensor([1, 1])) is None
    beams = net._reorder_cache(wanted.state, torch.tensor([1, 1]))
    again = net(following[1:].repeat(2, 1), state=beams, use_cache=True).logits
    torch.testing.assert_close(again[0], steps[2][1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_16_bits_gives_logits_of_32(dtype: str, modelling: tuple[str, ModuleType]) -> None:
    backend, made = modelling
    if backend == "mlx":  # its weights become float32 as they are loaded
        return
    import torch

    model = harness.mini(harness.EVERYTHING).model
    net = built(backend, made, model, harness.working_weights(model, 1.0))
    rows = torch.tensor(exported.rows_of(model.vocab, model.bos), dtype=torch.int64)
    with torch.no_grad():
        wanted, narrow = net(rows).logits, net.to(getattr(torch, dtype))
        logits, state = narrow(rows).logits, narrow(rows[:, :9], use_cache=True).state
        following = narrow(rows[:, 9:10], state=state, use_cache=True).logits[:, 0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, atol=0.1, rtol=0)
    torch.testing.assert_close(following, logits[:, 9], atol=0.1, rtol=0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with its tokenizer beside it."""
    return exported.artifact_of(harness.mini("skc_mac"), tmp_path_factory.mktemp("exported") / "model")


def test_safetensors_hold_the_decoded_weights(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "weights"
    value = call(capsys, "export", str(artifact), "--format", "safetensors", "--out", str(out))
    assert value["format"] == "safetensors" and set(value["files"]) == {*os.listdir(out)}
    _, arrays = read_tensors(out / "model.safetensors", 1 << 24)
    weights = read_artifact(artifact).weights
    assert arrays.keys() == weights.keys() and {array.dtype.name for array in arrays.values()} == {"float16", "float32"}
    assert all((arrays[name].astype(np.float32) == weight).all() for name, weight in weights.items())
    assert json.loads((out / "config.json").read_text())["spec"] == json.loads(
        json.dumps(to_json(read_artifact(artifact).model))
    )
    assert (out / "tokenizer.model").read_bytes() == artifact.with_name("tokenizer.model").read_bytes()


def test_folders_of_clients_hold_what_these_ask_for(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    call(capsys, "export", str(artifact), "--format", "hf", "--out", str(tmp_path / "hf"))
    call(capsys, "export", str(artifact), "--format", "mlx-lm", "--out", str(tmp_path / "mlx"))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "mlx"))
    assert ours["auto_map"]["AutoModelForCausalLM"] == "modeling_skc.SKCForCausalLM" and ours["eos_token_id"] == 1
    assert theirs["model_file"] == "model.py" and (tmp_path / "mlx" / "model.py").read_text() == modelling_file("mlx")
    card = (tmp_path / "hf" / "README.md").read_text()
    size, count = artifact.stat().st_size, sum(w.size for w in read_artifact(artifact).weights.values())
    for words in (f"{size:,} bytes", f"{count:,}", "not audited", "not recorded", "ternary", "trust_remote_code=True"):
        assert words in card, words
    assert str(tmp_path) not in card


def test_a_card_shows_no_words_of_a_stranger(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    made, path = read_artifact(artifact), tmp_path / "artifact.skc"
    (tmp_path / "tokenizer.model").write_bytes(artifact.with_name("tokenizer.model").read_bytes())
    about: dict[str, str | int | float] = {"preset": "a <img src=//x>", "seed": "[b](//x)", "train_seq": 64}
    write_artifact(path, made.model, made.stored, tokenizer_sha256=made.tokenizer_sha256, provenance=about)
    call(capsys, "export", str(path), "--format", "safetensors")
    card = (tmp_path / "safetensors" / "README.md").read_text()
    assert "\n# model\n" in card and "//x" not in card


def test_a_folder_of_someone_else_is_left_alone(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ("export", str(artifact), "--format", "safetensors", "--out", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    assert "was not written by skc export" in refuse(capsys, *argv)
    (tmp_path / "out" / "config.json").unlink()
    call(capsys, *argv)
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text().replace("yours to choose", "MIT"))
    assert call(capsys, *argv)["files"] and "MIT" in card.read_text()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds notes.txt too" in refuse(capsys, *argv)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    (tmp_path / "out" / "notes.txt").unlink()
    card.unlink()
    card.symlink_to(tmp_path / "elsewhere")  # what a link shows would travel as a card that was changed
    (tmp_path / "elsewhere").write_text("mine")
    assert "is no plain file" in refuse(capsys, *argv)
    assert "names no folder" in refuse(capsys, *argv[:-1], str(tmp_path / "new" / ".."))


def test_a_write_that_fails_leaves_the_folder_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    write_folder(folder, {"README.md": b"one"}, {"model_type": "skc"})
    before = (folder / "config.json").read_bytes()

    calls: list[str] = []

    def place(source: Path, target: Path) -> None:
        calls.append(target.name)
        if len(calls) == 2:  # the old folder is away, the new one not yet there
            raise OSError("no room")
        os.replace(source, target)

    monkeypatch.setattr("core.weights.folder.place_file", place)
    with pytest.raises(OSError, match="no room"):
        write_folder(folder, {"README.md": b"two"}, {"model_type": "skc"})
    assert (folder / "config.json").read_bytes() == before and os.listdir(tmp_path) == ["out"]
    assert calls[1] == calls[2] == "out"


def test_what_cannot_be_written_is_refused_in_one_line(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    path, form = str(artifact), ("--format", "hf")
    line = refuse(capsys, "export", path, "--format", "gguf")
    assert "layers of kind koopman" in line and "bank" in line and "hf or mlx-lm" in line
    assert "--method" in refuse(capsys, "export", path, *form, "--method", "gptq")
    assert "--out" in refuse(capsys, "export", path, "--out", str(tmp_path / "x"))
    assert "does not exist" in refuse(capsys, "export", str(tmp_path / "none"), *form)
    (tmp_path / "file").write_text("")
    assert "is no folder" in refuse(capsys, "export", path, *form, "--out", str(tmp_path / "file"))


def test_nothing_of_this_machine_travels(artifact: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any) -> None:
    monkeypatch.setattr(forms, "card", lambda *given: "made in /home/someone/models")
    line = refuse(capsys, "export", str(artifact), "--format", "safetensors", "--out", str(tmp_path / "out"))
    assert "README.md: line 1 has a home folder" in line and not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.pair
@pytest.mark.parametrize("form", exported.CLIENTS)
def test_real_clients_write_our_tokens(form: str, tmp_path: Path, capsys: Capture) -> None:
    tokenizer, folders = Tokenizer.load(str(exported.BUNDLED / "tokenizer.model")), []
    for name in harness.minis():
        artifact = exported.artifact_of(harness.mini(name), tmp_path / name)
        call(capsys, "export", str(artifact), "--format", form)
        folders.append(artifact.parent / form)
    results = exported.client(form, folders, tmp_path)
    assert len(results) == len(folders)
    for folder, (logits, texts, alone, ids) in zip(folders, results, strict=True):
        engine = exported.engine_of(folder.parent / "artifact.skc", exported.CLIENTS[form][1])
        rows = exported.rows_of(tokenizer.vocab, tokenizer.bos)
        assert np.abs(np.array(logits) - engine.logits(rows)).max() <= BOUND, folder
        assert ids == [[tokenizer.bos, *tokenizer.encode(prompt).tolist()] for prompt in exported.PROMPTS]
        wanted = exported.greedy_of(engine, tokenizer)
        assert [exported.until(text, tokenizer.bos) for text in texts] == wanted, folder
        assert alone is None or exported.until(alone, tokenizer.bos) == wanted[0], folder
