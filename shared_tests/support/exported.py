"""Artifacts of minis with a tokenizer beside them, what our engines make of them, and the real clients of folders."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from core.config import RunConfig, changed
from core.data.bundled import BUNDLED
from core.data.tokenizer import Tokenizer
from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.export.artifact import read_artifact, write_artifact
from shared_tests.support import harness

PROMPTS = ("She was", "It is a truth universally acknowledged, that")
TOKENS = 64
HF = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, rows, count, folders = json.loads(sys.argv[1])
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.padding_side = "left"
    with torch.no_grad():
        logits = model(torch.tensor(rows)).logits.tolist()
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**given, max_new_tokens=count, do_sample=False)
    one = tokenizer(prompts[0], return_tensors="pt")
    alone = model.generate(**one, max_new_tokens=count, do_sample=False, use_cache=False)
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    texts = [row[given["input_ids"].shape[1]:].tolist() for row in out]
    print("RESULT", json.dumps([logits, texts, alone[0][one["input_ids"].shape[1]:].tolist(), ids]), flush=True)
"""
MLX = """
import json, sys
import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import stream_generate
prompts, rows, count, folders = json.loads(sys.argv[1])
for folder in folders:
    model, tokenizer = load(folder, trust_remote_code=True)
    logits = np.array(model(mx.array(rows))).tolist()
    ids = [tokenizer.encode(text) for text in prompts]
    texts = [[one.token for one in stream_generate(model, tokenizer, row, max_tokens=count)] for row in ids]
    print("RESULT", json.dumps([logits, texts, None, ids]), flush=True)
"""
CLIENTS = {"hf": (HF, "cuda"), "mlx-lm": (MLX, "mlx")}
"""Format -> what a client does with folders, and the backend whose code the folder has."""


def artifact_of(config: RunConfig, folder: Path) -> Path:
    """Write the artifact of a mini, widened to the bundled tokenizer, with that tokenizer beside it."""
    model = (BUNDLED / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer(model)
    settings = changed(config.model, {"vocab": tokenizer.vocab, "bos": tokenizer.bos})
    config = dataclasses.replace(config, model=settings)
    engine = harness.engine("cuda", config, harness.working_weights(settings, 1.0))
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    about = {"preset": config.preset, "seed": 0, "step": 0, "train_seq": config.train.seq}
    sha256 = hashlib.sha256(model).hexdigest()
    write_artifact(folder / "artifact.skc", settings, engine.quantised(), tokenizer_sha256=sha256, provenance=about)
    return folder / "artifact.skc"


def engine_of(artifact: Path, backend: str) -> Any:
    """Return an engine with an artifact's weights, as they are."""
    read = read_artifact(artifact)
    config = dataclasses.replace(harness.mini("debug"), model=read.model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, quantise="never"))
    return harness.engine(backend, config, read.weights)


def rows_of(vocab: int, bos: int) -> np.ndarray:
    """Return random rows in which documents begin."""
    rows = np.random.default_rng(8).integers(0, vocab, (2, 40)).astype(np.int32)
    rows[:, 0], rows[1, 17] = bos, bos
    return rows


def greedy_of(engine: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens that our decoding writes greedily after PROMPTS."""
    texts = [Text(tokenizer, prompt) for prompt in PROMPTS]
    for _ in write(engine, texts, Decoding(tokens=TOKENS, temperature=0), None):
        pass
    return [text.ids[text.begin :] for text in texts]


def client(form: str, folders: list[Path], home: Path) -> list[Any]:
    """Return what a format's real client makes of folders, in a process of its own, without a network."""
    read = json.loads((folders[0] / "config.json").read_text())
    rows = rows_of(read["vocab_size"], read["bos_token_id"]).tolist()
    return run_client(CLIENTS[form][0], [PROMPTS, rows, TOKENS, list(map(str, folders))], home)


def run_client(program: str, given: Any, home: Path) -> list[Any]:
    """Return what a program prints behind RESULT, in a process of its own, which gets `given` and no network."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", program, json.dumps(given)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def until(tokens: list[int], bos: int) -> list[int]:
    """Return the tokens before a BOS, which ends a text."""
    return tokens[: tokens.index(bos)] if bos in tokens else tokens
