"""The byte-level vocabulary, and tokenizer.json files, from a text to its audit. Budget: 10 s, long 60 s."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from core.cli import main
from core.data.dataset import open_dataset
from core.data.prepare import named_tokenizer
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_json import JsonTokenizer, byte_tokenizer
from core.training.run import Run
from shared_tests.support.command_line import SHORT, Capture, call, refuse
from shared_tests.support.json_tokenizers import qwen_like

TEXTS = [f"Chapter {i}: Zürich, 東京 \U0001f642\r\n\tand <|endoftext|> {i * i}\x00 times." for i in range(60)]


def test_every_token_is_one_byte() -> None:
    tokenizer = named_tokenizer("bytes")
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.unknown, tokenizer.table_fault) == (257, 256, -1, None)
    assert tokenizer.table.base.tolist() == [1] * 256 + [0]
    assert np.flatnonzero(tokenizer.table.boundary).tolist() == [256] and not tokenizer.table.leading.any()
    for text in ("", *TEXTS, bytes(range(128)).decode()):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.decode([256, 0x48, 0xFF, 256]) == "H\ufffd"
    assert tokenizer.encode_batch(TEXTS, threads=2)[7].tolist() == list(TEXTS[7].encode())


def test_the_library_reads_the_file_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    library = tokenizers.Tokenizer.from_str(byte_tokenizer().decode())
    library.encode_special_tokens = True
    ours = Tokenizer.of(byte_tokenizer())
    for text in TEXTS:
        assert library.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()
        assert library.decode(ours.encode(text).tolist()) == text
    monkeypatch.setattr("importlib.import_module", None)  # and nothing but Python is needed for single bytes
    assert JsonTokenizer(byte_tokenizer()).encode("é").tolist() == [0xC3, 0xA9]
    with pytest.raises(TypeError):
        JsonTokenizer(qwen_like())


def test_what_is_neither_kind_is_told_so(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    for content in (b"[1, 2]", b"", b"x"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        argv = ("data", "prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"))
        line = refuse(capsys, *argv, "--tokenizer", str(tmp_path / "tokenizer.json"))
        assert "tokenizer.json: neither a SentencePiece .model nor a tokenizer.json; give one of them" in line
    assert "--vocab 300 is for a tokenizer that is trained" in refuse(
        capsys, *argv, "--tokenizer", "bytes", "--vocab", "300"
    )


@pytest.mark.parametrize(
    "kind, audited",
    [
        ("bytes", False),
        pytest.param("bytes", True, marks=pytest.mark.long),
        pytest.param("tokenizer.json", True, marks=pytest.mark.long),
    ],
)
def test_a_run_from_text_to_audit(
    kind: str, audited: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    if kind != "bytes":
        Path(kind).write_bytes(qwen_like())
    made = call(capsys, "data", "prepare", "text.jsonl", "--out", "data", "--tokenizer", kind)
    sides = made["splits"].values()
    assert sum(side["raw_bytes"] for side in sides) == sum(len(text.encode()) for text in TEXTS)
    assert all(side["table_bytes"] == side["raw_bytes"] for side in sides), "every token costs exactly its bytes"
    val = open_dataset("data").val
    assert val.costs(0, len(val)).sum() == made["splits"]["val"]["raw_bytes"]
    value = call(capsys, "train", "debug", "--data", "data", *SHORT[:-1], "mlx", "--out", "run")
    assert Run.open("run").config.model.vocab == made["tokenizer"]["vocab"] == {"bytes": 257}.get(kind, 320)
    again = call(capsys, "eval", "run/artifact.skc", "--data", "data", "--documents", "2", "--backend", "mlx")
    assert again["score"]["bpb"] == value["artifact"]["score"]["bpb"] and again["score"]["byte_rule"] == "table"
    first = Path("run/artifact.skc").read_bytes()
    assert call(capsys, "export", "run", "--backend", "mlx")["artifact"]["within"]
    assert Path("run/artifact.skc").read_bytes() == first
    assert main(["sample", "run", "--prompt", "東京", "--tokens", "8", "--backend", "mlx"]) == 0
    assert capsys.readouterr().out.startswith("東京")
    if not audited:
        return
    findings = call(capsys, "audit", "run", "--backend", "mlx")["findings"]
    verdicts = {finding["rule"]: finding["verdict"] for finding in findings}
    assert verdicts["D13"] == verdicts["D14"] == "PASS" and "FAIL" not in verdicts.values()
