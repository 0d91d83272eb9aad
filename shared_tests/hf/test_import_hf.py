"""`skc import-hf`: checkpoints of transformers become runs of the same logits; all others are refused. Budget: 20 s."""

import dataclasses
import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import core.hf.qwen
from core.cli import main
from core.config import ConfigError, ModelConfig
from core.engine.loading import load_engine
from core.formats.tensors import read_array, read_tensors_header, widened
from core.hf.files import HFError, Tensors, read_config
from core.hf.qwen import QwenWeights, Source, cut_tensor, read_settings
from core.model.params import count, param_table
from core.training import schedule
from core.training.checkpoint import write_weights
from core.training.records import RunError
from core.training.run import Run
from core.twin.params import scale, twin_rows
from core.twin.recipes import RECIPES, recipe
from core.twin.sidecar import artifact_sha256
from core.verbs.common import open_subject
from shared_tests.support.harness import BACKENDS
from shared_tests.support.hf_checkpoints import ODD, TINY, as_multimodal, change, logits_of, random_model, save

TOKENS = np.random.default_rng(24).integers(0, 320, (2, 70)).astype(np.int32)
"""Longer than two chunks of the delta rule."""
BOUND = 1e-5
"""Of the largest logit, in float32."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file, of float32."""
    return save(random_model(TINY), tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return shutil.copytree(tiny, tmp_path / "tiny")


def imported(folder: Path, out: Path) -> Path:
    """Import a checkpoint through the command line and return the run folder."""
    assert main(["import-hf", str(folder), "--out", str(out), "--seq", "128"]) == 0
    return out


def refusal(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which an import is refused; nothing is left in its place."""
    capsys.readouterr()
    assert main(["import-hf", str(folder), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and not out.exists()
    return lines[0]


def distance(run: Path, backend: str, expected: np.ndarray) -> float:
    """Return by how much a run's logits differ, of the largest."""
    subject = open_subject(str(run), None)
    engine = load_engine(backend, subject.config, subject.weights, quantise=subject.quantise)
    assert engine.dtype == "float32"
    return float(np.abs(np.asarray(engine.logits(TOKENS)) - expected).max() / np.abs(expected).max())


@pytest.mark.pair
def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], torch.dtype, dict[str, Any]]] = [
        ("float32", TINY, torch.float32, {}),
        ("bfloat16, several files", ODD, torch.bfloat16, {"max_shard_size": "20KB"}),
        ("float16, multimodal", TINY, torch.float16, {}),
    ]
    for number, (name, settings, dtype, options) in enumerate(cases):
        model = random_model(settings, dtype, number)
        folder = save(model, tmp_path / name, dtype, **options)
        assert len(list(folder.glob("*.safetensors"))) > 1 or not options
        if name.endswith("multimodal"):
            as_multimodal(folder)
        run, expected = imported(folder, tmp_path / f"run {number}"), logits_of(model, TOKENS)
        assert np.ptp(expected) > 1
        for backend in BACKENDS:
            assert distance(run, backend, expected) < BOUND, (name, backend)


FAULTS: dict[str, Callable[[np.ndarray, Source], np.ndarray]] = {
    "gates for queries": lambda t, s: cut_tensor(
        t, s._replace(cut={"queries": "gates", "gates": "queries"}.get(s.cut, s.cut))
    ),  # type: ignore[arg-type]
    "queries above all gates": lambda t, s: t[: len(t) // 2] if s.cut == "queries" else cut_tensor(t, s),
    "taps in the order of time": lambda t, s: t[:, 0] if s.cut == "taps" else cut_tensor(t, s),
    "keys for queries": lambda t, s: t[s.at[1] : 2 * s.at[1]] if s.cut == "rows" and not s.at[0] else cut_tensor(t, s),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_cut_wrongly_is_seen(
    fault: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_of(random_model(TINY), TOKENS)
    monkeypatch.setattr(core.hf.qwen, "cut_tensor", FAULTS[fault])
    assert distance(imported(tiny, tmp_path / "run"), "cuda", expected) > 100 * BOUND


def test_the_run_writes_text_and_is_scored(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = imported(tiny, tmp_path / "run")
    assert "320 tokens; texts begin with id 317" in capsys.readouterr().out
    options = ["--tokens", "9", "--temperature", "0", "--json"]
    texts = []
    for backend in BACKENDS:
        assert main(["sample", str(run), "--prompt", "It is a", "--backend", backend, *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"][0]["text"])
    assert texts[0] == texts[1] and texts[0].startswith("It is a") and len(texts[0]) > len("It is a")
    assert main(["info", str(run)]) == 0
    assert main(["eval", str(run), "--documents", "2", "--backend", "cuda"]) == 2
    assert "was made with tokenizer" in capsys.readouterr().err  # the bundled text has another one
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the sea and {i} cafés"}) + "\n" for i in range(60))
    )
    tokenizer = ["--tokenizer", str(run / "tokenizer.model")]
    assert main(["data", "prepare", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "data"), *tokenizer]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(tmp_path / "data"), "--backend", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["bpb"] > 1


def test_data_that_the_run_cannot_be_scored_on_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, message in (("nowhere", "nowhere: no such folder"), ("sample", "--data sample: has tokenizer ")):
        assert main(["import-hf", str(tiny), "--out", str(tmp_path / "out"), "--data", data]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "text.txt").write_text("\f".join(f"the sea and {i} cafés" for i in range(60)))
    argv = ["data", "prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data")]
    assert main([*argv, "--tokenizer", str(imported(tiny, tmp_path / "first") / "tokenizer.model")]) == 0
    out = tmp_path / "second"
    assert main(["import-hf", str(tiny), "--out", str(out), "--data", str(tmp_path / "data")]) == 0
    assert Run.open(out).config.data.path == str(tmp_path / "data")


def test_the_run_keeps_bits_and_types_and_says_where_they_are_from(tmp_path: Path) -> None:
    folder = save(random_model(TINY, torch.bfloat16), tmp_path / "hf", torch.bfloat16)
    change(folder, **{"model.layers.0.linear_attn.A_log": torch.tensor([0.1, 0.2, 0.3, 0.4])})
    run = Run.open(imported(folder, tmp_path / "run"))
    source = safetensors.torch.load_file(folder / "model.safetensors")
    with open(run.checkpoint_path, "rb") as file:
        header = read_tensors_header(run.checkpoint_path, file)
        stored = {name: read_array(run.checkpoint_path, file, header, name) for name in header.entries}
    kinds = {name: entry.kind for name, entry in header.entries.items()}
    assert kinds.pop("param/blocks.0.mixer.decay_rate") == "F32" and set(kinds.values()) == {"BF16"}
    theirs = source["model.layers.1.linear_attn.in_proj_qkv.weight"].view(torch.int16).numpy().view(np.uint16)
    ours = [stored[f"param/blocks.1.mixer.{name}.weight"] for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(ours), theirs)
    weights = open_subject(str(run.path), None).weights
    for name, value in stored.items():
        np.testing.assert_array_equal(weights[name.removeprefix("param/")], widened(value, header.entries[name].kind))
    assert run.environment()["imported"]["tensors"] == len(param_table(run.config.model)) == len(weights)


def test_a_fresh_checkpoint_can_be_trained_and_must_be_whole(tiny: Path, tmp_path: Path) -> None:
    run = Run.open(imported(tiny, tmp_path / "run"))
    saved = run.checkpoint()
    assert saved is not None and saved.step == 0 and not saved.quantise
    engine = load_engine("cuda", run.config, saved.params)
    engine.load_optimizer(saved.optimizer)
    assert all(not value.any() for value in saved.optimizer.values()) and len(saved.optimizer) == 2 * len(saved.params)
    whole = run.checkpoint_path.read_bytes()
    data = bytearray(whole)
    data[-5] ^= 1
    run.checkpoint_path.write_bytes(data)
    with pytest.raises(RunError, match="the tensors are not the ones that were saved"):
        run.checkpoint()
    run.checkpoint_path.write_bytes(whole.replace(b'\\"fresh\\": true'.replace(b" ", b""), b'\\"fresh\\":false'[:14]))
    with pytest.raises(RunError):
        run.checkpoint()


def test_no_more_than_a_few_tensors_are_held(tmp_path: Path) -> None:
    wide = TINY | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 24, "layer_types": None}
    folder = save(random_model(wide), tmp_path / "hf")
    size = (folder / "model.safetensors").stat().st_size
    text = read_settings(read_config(folder), "config.json", 0)
    tracemalloc.start()
    with Tensors(folder) as tensors:
        write_weights(tmp_path / "checkpoint.safetensors", QwenWeights(tensors, text.model))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * wide["intermediate_size"] * wide["hidden_size"]
    assert peak < 4 * largest + 1e6 < size / 8


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "llama"}, "model_type: 'llama', expected qwen3_5"),
    "mixture of experts": ({"model_type": "qwen3_5_moe_text"}, "model_type: 'qwen3_5_moe_text', expected qwen3_5"),
    "experts": ({"num_experts": 8}, "num_experts: 8, expected none: a mixture of experts is not read"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings: False, expected true"),
    "rope": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_parameters: rope_type: 'yarn', expected default",
    ),
    "rope factor": ({"rope_parameters": {"factor": 4.0}}, "rope_parameters: 'factor': unknown name"),
    "old rope": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: {'type': 'linear'}, expected false or null"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu', expected silu"),
    "bias": ({"attention_bias": True}, "attention_bias: True, expected false or null"),
    "no gate": ({"attn_output_gate": False}, "attn_output_gate: False, expected true"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}, expected false"),
    "kernel": ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim: 3, expected 4"),
    "kind of layer": (
        {"layer_types": ["sliding_attention"] * 4},
        "layer_types[0]: 'sliding_attention', expected linear",
    ),
    "layers": ({"layer_types": ["full_attention"]}, "layer_types: 1 of 1 kinds, expected 4 layers of both kinds"),
    "one kind": ({"layer_types": ["full_attention"] * 4}, "layer_types: 4 of 1 kinds, expected 4 layers of both kinds"),
    "too many layers": (
        {"num_hidden_layers": 1 << 40},
        "num_hidden_layers: 1099511627776, expected a whole number",
    ),
    "heads": ({"num_key_value_heads": 3}, "model.attention.heads=4 is not divisible by model.attention.kv_heads=3"),
    "far too large": (
        {"hidden_size": 1 << 20, "intermediate_size": 1 << 20},
        "parameters, expected at most 1,073,741,824",
    ),
    "vocabulary": ({"vocab_size": 319}, "tokenizer.json: has 320 tokens, the model 319"),
    "no width": ({"head_dim": None}, "head_dim: None, expected a whole number"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_we_do_not_have_are_refused(
    what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    changes, message = SETTINGS[what]
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert message in refusal(folder, tmp_path / "out", capsys)


def test_a_rotation_of_nothing_is_none(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    for share, dims in ((0.0, 0), (0.5, 8), (None, 4)):  # None: what transformers takes, a quarter
        config["rope_parameters"]["partial_rotary_factor"] = share
        if share is None:
            del config["rope_parameters"]["partial_rotary_factor"]
        assert read_settings(config, "config.json", 0).model.attention.rope_dims == dims


def test_settings_that_nobody_knows_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sparkle": 3}))
    imported(folder, tmp_path / "run")
    assert "WARNING: settings that are not known here, and not used: sparkle" in capsys.readouterr().out


NAME = "model.layers.0.linear_attn.A_log"
ARRAYS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": ({NAME: None}, f"{NAME} is missing"),
    "no embedding": ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
    "extra": (
        {"model.layers.4.mlp.up_proj.weight": torch.ones(3)},
        "'model.layers.4.mlp.up_proj.weight' is no tensor of",
    ),
    "misshapen": ({NAME: torch.ones(5)}, f"{NAME} has shape (5,), expected (4,), as config.json says"),
    "NaN": ({NAME: torch.tensor([1.0, torch.nan, 1, 1])}, f"{NAME} holds NaN or infinity"),
    "infinity in bfloat16": ({NAME: torch.tensor([1.0, -torch.inf, 1, 1]).bfloat16()}, f"{NAME} holds NaN or infinity"),
    "whole numbers": ({NAME: torch.ones(4, dtype=torch.int32)}, f"{NAME}: dtype I32, expected one of BF16, F16, F32"),
    "float64": ({NAME: torch.ones(4, dtype=torch.float64)}, f"{NAME}: dtype F64, expected one of BF16, F16, F32"),
    "float8": ({NAME: torch.ones(4).to(torch.float8_e4m3fn)}, "dtype 'F8_E4M3', expected one of"),
    "another head": ({"lm_head.weight": torch.ones(330, 32)}, "'lm_head.weight' is no tensor of"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_tensors_that_do_not_fit_are_refused_by_name(
    what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = ARRAYS[what]
    change(folder, **changes)
    assert message in refusal(folder, tmp_path / "out", capsys)


def test_a_head_that_is_the_embedding_is_taken(folder: Path, tmp_path: Path) -> None:
    embedding = safetensors.torch.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embedding.clone()})
    imported(folder, tmp_path / "run")


def test_files_that_are_not_there_or_lie_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, index = tmp_path / "out", folder / "model.safetensors.index.json"

    def indexed(names: dict[str, Any]) -> str:
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return refusal(folder, out, capsys)

    assert "no-such.safetensors: no such file" in indexed({NAME: "no-such.safetensors"})
    assert f"{NAME}: '../x', expected the name of a file in this folder" in indexed({NAME: "../x"})
    assert "weight_map" in indexed({NAME: 5}) and "0 files, expected 1 to 256" in indexed({})
    assert "'model.strange' is missing" in indexed({"model.strange": "model.safetensors"}).replace(
        "model.strange is", "'model.strange' is"
    )
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    assert "is in" in indexed({NAME: "model.safetensors", "model.norm.weight": "b.safetensors"})
    index.unlink()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in refusal(folder, out, capsys)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, out, capsys)
    assert "no such folder" in refusal(folder / "nowhere", out, capsys)
    out.mkdir()
    (out / "x").touch()
    assert main(["import-hf", str(folder), "--out", str(out)]) == 2
    assert "an import makes a folder of its own" in capsys.readouterr().err and (out / "x").exists()


def test_mutated_files_are_imported_or_refused_in_one_line(tiny: Path, folder: Path) -> None:
    dice, refused = random.Random(24), 0
    for number in range(240):
        name = ("config.json", "model.safetensors")[number % 2]
        data = bytearray((tiny / name).read_bytes())
        length = len(data) if name == "config.json" else 8 + int.from_bytes(data[:8], "little")
        at, size = dice.randrange(length), dice.choice([1, 1, 1, 4, 40])
        data[at : at + size] = bytes(dice.randrange(256) for _ in range(dice.choice([0, size])))
        (folder / name).write_bytes(data)
        try:
            text = read_settings(read_config(folder), "config.json", 0)
            with Tensors(folder) as tensors:
                weights = QwenWeights(tensors, text.model)
                for each in weights.entries:
                    weights.read(each)
        except HFError as error:
            refused += 1
            assert "\n" not in str(error)
        shutil.copy(tiny / name, folder / name)
    assert 100 < refused < 240


def original() -> ModelConfig:
    """Return the text model of Qwen3.5-0.8B, by its config.json."""
    settings = json.loads((Path(__file__).parent / "qwen35_08b.json").read_text())
    text = read_settings(settings, "config.json", 0)
    assert text.unread == () and text.context == 262_144
    return text.model


def test_counts_of_the_original_and_of_its_twin_without_a_weight() -> None:
    model, twin = original(), recipe("orthrus_qwen35").twin
    assert count(model) == 752_393_024 and model.blocks == ("delta", "delta", "delta", "attention")
    tracemalloc.start()
    size = sum(row.size for row in twin_rows(model, twin).values())
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert size == 106_417_152 and count(model) + size == 858_810_176
    half = sum(row.size for row in twin_rows(model, dataclasses.replace(twin, rank=128)).values())
    assert half == 75_746_304 and scale(twin) == 32 / 256**0.5


def test_the_recipe_is_the_seeds() -> None:
    settings = recipe("orthrus_qwen35")
    assert (settings.twin.block, settings.twin.rank, settings.lr, settings.batch, settings.anchors) == (
        8,
        256,
        2e-4,
        1,
        1,
    )
    assert settings.twin.rule == "first_order" and not settings.twin.exact_anchor and settings.loss == "kl"
    scales = [schedule.lr_scale(share, settings.schedule(64)) for share in (0.025, 0.05, 0.5, 0.6, 0.8, 1.0)]
    np.testing.assert_allclose(scales, [0.5, 1.0, 1.0, 1.0, 0.5, 0.0])
    assert RECIPES.keys() == {"orthrus_qwen35"}
    with pytest.raises(ConfigError, match="recipe='orthrus': expected one of orthrus_qwen35"):
        recipe("orthrus")


def test_from_import_to_distilled_drafts(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = tmp_path / "run", str(tmp_path / "data")
    assert main(["import-hf", str(tiny), "--out", str(run), "--seq", "32"]) == 0
    lines = (json.dumps({"text": f"the sea and {i} cafés, the old town by the sea " * 2}) + "\n" for i in range(60))
    (tmp_path / "text.jsonl").write_text("".join(lines))
    tokenizer = ["--tokenizer", str(run / "tokenizer.model")]
    assert main(["data", "prepare", str(tmp_path / "text.jsonl"), "--out", data, *tokenizer]) == 0
    small = [
        "--distill.twin.rank",
        "4",
        "--distill.twin.block",
        "4",
        "--distill.steps",
        "2",
        "--distill.report-texts",
        "1",
    ]
    options = [
        "--recipe",
        "orthrus_qwen35",
        *small,
        "--distill.report-tokens",
        "2",
        "--data",
        data,
        "--backend",
        "cuda",
    ]
    assert main(["distill", str(run), *options]) == 0  # a model may be too large for an artifact
    assert "rank 4; block of 4, rule first_order, anchor of its own" in capsys.readouterr().out
    texts = []
    for draft in ([], ["--draft", "twin"]):
        arguments = ["--temperature", "0", "--tokens", "6", "--prompt", "the", "--backend", "cuda", "--json", *draft]
        assert main(["sample", str(run), *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"][0]["text"])
    assert texts[0] == texts[1] and len(texts[0]) > 3
    assert main(["export", str(run), "--data", data, "--backend", "cuda"]) == 0
    capsys.readouterr()
    arguments = [str(run / "artifact.skc"), "--draft", "twin", "--tokens", "2", "--backend", "cuda"]
    assert main(["sample", *arguments]) == 2  # whose weights are in float16: not those that the twin was made of
    assert (
        f"is the twin of artifact {artifact_sha256(run / 'state' / 'checkpoint.safetensors')[:12]}"
        in capsys.readouterr().err
    )
