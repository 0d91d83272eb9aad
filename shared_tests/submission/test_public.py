"""Folders and logs in the habits of the public records: what is odd is named, and nothing is a crash. Budget: 3 s."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.submission.checks.answers import Answer, Checked
from core.submission.checks.fourteen import CHECKS
from core.submission.folder import read_folder
from core.submission.public_logs import read_log

LOG = """import os
def main(seed: int) -> None:
    print(f"val_loss:{loss} val_bpb:{bpb}")
Hyperparameters:
  matrix_lr: 0.026
  qk_gain_init: 5.0
  seed: 42
  train_seq_len: 2048
  world_size: 8
train_shards: 80
val_tokens: 40540160
model_params:35945671
1/20000 train_loss: 9.0105 train_time: 0.0m tok/s: 12596538
step:4931/20000 train_loss:2.3 train_time:599433ms step_avg:121.56ms
4931/20000 val_loss: 2.7900 val_bpb: 1.0801
stopping_early: wallclock_cap train_time: 599433ms step: 4931/20000
diagnostic pre-quantization post-ema val_loss:2.78000000 val_bpb:1.07622900 eval_time:6737ms
Code size (uncompressed): 157868 bytes
Code size (compressed): 31999 bytes
GPTQ:collected 67 Hessians in 4.9s
Serialized model quantized+brotli: 15868948 bytes
Total submission size quantized+brotli: 15900947 bytes
Deserialize: decompression done in 18.2s
quantized val_loss:2.80000000 val_bpb:1.08397250 eval_time:11612ms
Deserialize: decompression done in 17.0s
ttt_lora:compile warmup done (88.8s)
quantized_ttt val_loss:2.79000000 val_bpb:1.08010117 eval_time:508812ms
"""
RESULT = {"val_bpb": 1.08010117, "val_loss": 2.79, "artifact_bytes": 15868948, "steps": 4931}
VALUES: dict[str, Any] = {
    "author": "A", "github_id": "a", "name": "N", "date": "2026-04-30", "track": "10min_16mb", "val_bpb": 1.08010117,
    "val_loss": 2.79, "seeds": [42], "seed_results": {"42": RESULT}, "bytes_total": 15900947, "bytes_code": 31999,
}  # fmt: skip


def folder_of(place: Path, values: Any, log: str = LOG, log_name: str = "train_seed42.log", **files: bytes) -> Path:
    folder = place / "records" / "track_10min_16mb" / "2026-04-30_N"
    folder.mkdir(parents=True)
    (folder / log_name).write_text(log)
    (folder / "README.md").write_text("# N\n\n    QK_GAIN_INIT=5.0 SEED=42 torchrun train_gpt.py\n")
    (folder / "train_gpt.py").write_bytes(files.get("program", b"def forward(x):\n    return x\n" * 100))
    if values is not None:
        (folder / "submission.json").write_text(json.dumps(values))
    return folder


def ask(folder: Path, number: int) -> Answer:
    return CHECKS[number - 1][1](Checked(read_folder(folder)))


def test_a_public_log_is_read_by_its_last_lines(tmp_path: Path) -> None:
    log = read_log(folder_of(tmp_path, VALUES) / "train_seed42.log")
    assert (log.seed, log.parameters, log.val_tokens, log.stop_step) == (42, 35_945_671, 40_540_160, 4931)
    assert (log.code_bytes, log.artifact_bytes, log.total_bytes) == (31_999, 15_868_948, 15_900_947)
    assert (log.val_bpb, log.weights_val_bpb, log.eval_seconds) == (1.08010117, 1.076229, 508.812)
    assert log.closed_seconds == pytest.approx(604.333) and log.eval_strict_seconds == pytest.approx(614.612)
    assert log.hyper["qk_gain_init"] == "5.0" and log.losses == ((1, "9.0105"), (4931, "2.3")) and not log.problems


def test_times_that_a_timer_leaves_out_count(tmp_path: Path) -> None:
    answer = ask(folder_of(tmp_path, VALUES), 7)
    assert answer.verdict == "FAIL" and len(answer.problems) == 2
    assert "calibration ended at 604.3 s" in answer.words() and "614.6 s strictly" in answer.words()


def test_a_fitting_folder_passes_where_it_can(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, VALUES)
    assert [ask(folder, n).verdict for n in (3, 4, 6, 8)] == ["PASS"] * 4, [ask(folder, n) for n in (3, 4, 6, 8)]
    assert [ask(folder, n).verdict for n in (5, 10, 11, 12)] == ["NOT CHECKED"] * 4


ODD: list[tuple[str, dict[str, Any], int, str]] = [
    ("logs as text files", {"log_name": "train_v0.txt"}, 1, "expected train_seed<N>.log"),
    ("log only", {"values": None}, 2, "no submission.json"),
    ("no bytes", {"program": b""}, 9, "train_gpt.py: is empty"),
    ("a stub", {"program": b'exec(open("a.py").read())\n'}, 9, "a stub"),
    ("a null score", {"values": {**VALUES, "val_bpb": None}}, 2, "val_bpb: null, expected a number"),
    ("seeds as an object", {"values": {**VALUES, "seeds": {"42": RESULT}, "seed_results": None}}, 2,
     "seeds is an object"),
    ("a score of another digit", {"values": {**VALUES, "seed_results": {"42": {**RESULT, "val_bpb": 1.0800}}}}, 3,
     "seed 42: val_bpb 1.08, train_seed42.log says 1.08010117"),
    ("another size", {"values": {**VALUES, "bytes_total": 15_910_554}}, 3, "bytes_total 15,910,554"),
    ("over", {"log": LOG.replace("15900947", "16059704")}, 4, "seed 42: 16,059,704 bytes"),
    ("another text", {"log": LOG.replace("val_tokens: 40540160", "val_tokens: 9662464")}, 8, "9,662,464 targets"),
    ("other bytes", {"log": LOG.replace("1.08010117", "0.97210117")}, 8, "bytes per token, published 3.72663"),
    ("README", {"log": LOG.replace("qk_gain_init: 5.0", "qk_gain_init: 4.0")}, 6, "QK_GAIN_INIT=5.0, the logs have"),
    ("raw, packed claimed", {}, 9, "bytes_code 31,999, train_gpt.py has 2,900 bytes: what is shipped counts"),
    ("a size that is none", {"log": LOG.replace("model_params:35945671", "model_params:1e999")}, 3,
     "parameters: '1e999', expected a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "number", "words"), ODD, ids=[case[0] for case in ODD])
def test_what_is_odd_is_named(name: str, changes: dict[str, Any], number: int, words: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, **{"values": VALUES, **changes})
    answer = ask(folder, number)
    assert answer.verdict == "FAIL" and words in answer.words(), answer
    for other in range(1, len(CHECKS) + 1):
        if other != 9:  # which starts a process
            assert ask(folder, other).verdict in ("PASS", "FAIL", "NOT CHECKED")


def test_totals_where_artifacts_are_asked_for_are_named(tmp_path: Path) -> None:
    values = {**VALUES, "seed_results": {"42": {**RESULT, "artifact_bytes": 15900947}}}
    answer = ask(folder_of(tmp_path, values), 3)
    assert answer.verdict == "PASS" and "artifact_bytes are totals with the code" in answer.words()


def test_a_spread_that_divides_by_n_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {**VALUES, "seeds": [42, 7], "val_bpb": 1.08005, "val_bpb_std": 0.00005117})
    (folder / "train_seed7.log").write_text(LOG.replace("1.08010117", "1.07999883"))
    assert "divides by n, that of the logs (n - 1) is 0.000072" in ask(folder, 3).words()
