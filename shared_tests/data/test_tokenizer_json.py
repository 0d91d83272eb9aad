"""tokenizer.json: exact bytes of every token, round trips, files that must be refused, int32 shards. Budget: 10 s."""

import json
import random
import struct
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from core.data.dataset import DataError, Split, open_dataset, open_shard, write_shard
from core.data.prepare import prepare
from core.data.shards import MAGICS, shard_type
from core.data.tokenizer import Tokenizer, TokenizerError, token_bytes
from core.data.tokenizer_json import LETTERS, JsonTokenizer
from core.files import FileError
from core.scoring.accounting import count_bytes
from shared_tests.support.json_tokenizers import changed_json, qwen_like

QWEN: Any = JsonTokenizer(qwen_like())
WIDE: Any = QWEN.widened(70_000)
"""Of more entries than uint16 can number, as Qwen's own."""


def test_letters_are_those_of_the_library() -> None:
    assert sorted(LETTERS) == sorted(pre_tokenizers.ByteLevel.alphabet()) and sorted(LETTERS.values()) == [*range(256)]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for letter in map(chr, range(0x800)):
        (spelled, _), *rest = level.pre_tokenize_str(letter)
        assert bytes(LETTERS[each] for each in spelled) == letter.encode() and not rest


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["the", " sea", "é", "<think>", "<|endoftext|>", "\u0338"])).map("".join)
)
@settings(max_examples=100, deadline=None)
def test_tokens_cost_the_bytes_that_they_spell(text: str) -> None:
    ids = QWEN.encode(text)
    plain = unicodedata.normalize("NFC", QWEN.decode(ids))
    assert plain == unicodedata.normalize("NFC", text) and QWEN.bos not in ids
    stream = np.array([QWEN.bos, *ids])
    costs = token_bytes(QWEN.table, stream[:-1], stream[1:])
    assert costs.sum() == len(QWEN.decode(ids).encode())
    for i, cost in zip(ids.tolist(), costs.tolist(), strict=True):
        assert b"\xef\xbf\xbd" in QWEN.decode([i]).encode() or len(QWEN.decode([i]).encode()) == cost


def test_control_tokens_are_no_text() -> None:
    file = json.loads(QWEN.model)
    by_content = {added["content"]: added["id"] for added in file["added_tokens"]}
    assert QWEN.bos == by_content["<|endoftext|>"] and QWEN.unknown == -1 and QWEN.byte_pieces
    assert QWEN.table_fault is None and not QWEN.table.leading.any()
    assert np.flatnonzero(QWEN.table.boundary).tolist() == [QWEN.bos, by_content["<|im_end|>"]]
    assert by_content["<think>"] in QWEN.encode("a <think>") and QWEN.bos not in QWEN.encode("a <|endoftext|>")
    assert QWEN.decode([QWEN.bos, *QWEN.encode("the café"), QWEN.bos]) == "the café"
    with pytest.raises(ValueError, match=f"token id {QWEN.vocab}"):
        QWEN.decode([QWEN.vocab])


def test_batches_on_threads_are_the_same() -> None:
    texts = ["the café", "", "a\r\n\n b", "日本"] * 5
    for one, other in zip(QWEN.encode_batch(texts), QWEN.encode_batch(texts, 2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_may_have_more_entries_than_its_tokenizer() -> None:
    again = Tokenizer.of(WIDE.model)
    assert (again.vocab, again.bos, again.sha256) == (70_000, QWEN.bos, WIDE.sha256) and WIDE.sha256 != QWEN.sha256
    assert QWEN.widened(QWEN.vocab) is QWEN and again.decode([69_999]) == "" and again.table.base[69_999] == 0
    for tokenizer, vocab in ((QWEN, QWEN.vocab - 1), (WIDE, 70_001)):
        with pytest.raises(TokenizerError, match=f"has {tokenizer.vocab:,} tokens, the model {vocab:,}"):
            tokenizer.widened(vocab)


STEPS = ("pre_tokenizer", "pretokenizers")
REFUSED: dict[str, bytes] = {
    "not JSON": b"{",
    "pre_tokenizer: missing": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "model: vocab: missing": changed_json("model", value={"type": "BPE", "merges": []}),
    "model: type: 'WordPiece', expected BPE": changed_json("model", "type", value="WordPiece"),
    "model: byte_fallback: True": changed_json("model", "byte_fallback", value=True),
    "model: unk_token: '<unk>'": changed_json("model", "unk_token", value="<unk>"),
    "model: dropout: 0.5": changed_json("model", "dropout", value=0.5),
    "normalizer: 'Lowercase', expected none or NFC": changed_json("normalizer", value={"type": "Lowercase"}),
    "expected ByteLevel as its last step": changed_json(*STEPS, 1, "add_prefix_space", value=True),
    "Split steps that remove nothing": changed_json(*STEPS, 0, "behavior", value="Removed"),
    "pre_tokenizer: pattern: Regex: 7, expected a text": changed_json(*STEPS, 0, "pattern", "Regex", value=7),
    "no token for the byte 0x21": changed_json("model", "vocab", value={"a": 0}),
    "id 0 is another token's too": changed_json("model", "vocab", "zz", value=0),
    "is not in the letters of byte-level BPE": changed_json("model", "vocab", "日", value=1000),
    "model: merges: 'abc', expected two texts": changed_json("model", "merges", value=["abc"]),
    "takes spaces away": changed_json("added_tokens", 2, "lstrip", value=True),
    "no control token <|endoftext|>": changed_json("added_tokens", value=[]),
    "'<think>': id 5 is another token's too": changed_json("added_tokens", 2, "id", value=5),
    "id 900, expected the next free one": changed_json("added_tokens", 2, "id", value=900),
    "expected a whole number": changed_json("added_tokens", 2, "id", value=1 << 40),
    "skc: vocab: 5, but it has tokens up to 319": changed_json("skc", value={"vocab": 5}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_tokenizer_that_is_not_byte_level_is_refused_in_one_line(message: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.of(REFUSED[message], "here.json")
    said = str(caught.value)
    assert said.startswith("here.json: ") and "\n" not in said
    assert message in said


def test_tokens_that_spell_another_text_are_an_error() -> None:
    tokenizer = JsonTokenizer(qwen_like())
    tokenizer._bytes[int(tokenizer.encode("the")[0])] = b"tha"
    with pytest.raises(TokenizerError, match="does not spell 'the sea' as it is written"):
        tokenizer.encode("the sea")


def test_mutated_files_open_and_spell_every_text_or_are_refused() -> None:
    dice, whole = random.Random(24), qwen_like()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        at = dice.randrange(len(data))
        kind = dice.randrange(3)
        data[at : at + (kind == 1) * 40 + (kind > 0)] = bytes(dice.randrange(256) for _ in range(1 + 3 * (kind == 2)))
        try:
            tokenizer = Tokenizer.of(b"{" + bytes(data)[1:])
            text = "the café\n12 <think>"
            assert unicodedata.normalize("NFC", tokenizer.decode(tokenizer.encode(text))) == text
        except TokenizerError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 20 < refused < 150


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs tokenizers, which is not installed; run: pip install .*\[hf\]"):
        Tokenizer.of(qwen_like())


def test_files_are_known_by_their_first_letter(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(qwen_like())
    assert isinstance(Tokenizer.load(str(tmp_path / "a")), JsonTokenizer)
    with open(tmp_path / "b", "wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(FileError, match="expected at most 16,777,216"):
        Tokenizer.load(str(tmp_path / "b"))


def prepared(folder: Path, tokenizer: JsonTokenizer) -> dict[str, Any]:
    """Prepare a few documents with a tokenizer.json and return the manifest."""
    (folder / "tokenizer.json").write_bytes(tokenizer.model)
    lines = [json.dumps({"text": f"the old café {i} <|endoftext|> e\u0301"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    text = [str(folder / "text.jsonl")]
    return prepare(text, str(folder / "data"), tokenizer=str(folder / "tokenizer.json"), shard_tokens=200)


@pytest.mark.parametrize("tokenizer", [QWEN, WIDE], ids=["uint16", "int32"])
def test_prepared_text_comes_back_and_its_bytes_count(tmp_path: Path, tokenizer: JsonTokenizer) -> None:
    manifest = prepared(tmp_path, tokenizer)
    dataset = open_dataset(str(tmp_path / "data"))
    assert dataset.tokenizer.sha256 == tokenizer.sha256 == manifest["tokenizer"]["sha256"]
    assert manifest["tokenizer"]["unknown"] is None and manifest["splits"]["train"]["unknown_tokens"] == 0
    assert len(manifest["splits"]["train"]["files"]) > 2, "shards that follow each other are not tried"
    magic, size = (20240520, 2) if tokenizer is QWEN else (20261124, 4)
    for split in manifest["splits"].values():
        for file in split["files"]:
            data = (tmp_path / "data" / file["file"]).read_bytes()
            assert struct.unpack_from("<3i", data) == (magic, 1, file["tokens"])
            assert len(data) == 1024 + size * file["tokens"]
    starts = dataset.train.document_starts.tolist()
    texts = [
        dataset.tokenizer.decode(dataset.train.read(a, b))
        for a, b in zip(starts, [*starts[1:], len(dataset.train)], strict=True)
    ]
    assert {text.rpartition("<|")[0].rstrip("0123456789 ") for text in texts} == {"the old café"}
    val = dataset.val
    count = count_bytes(val, np.zeros(1, np.int64), np.array([len(val) - 1]), None)
    assert count.rule == "table" and count.raw is not None
    shorter = 1 * manifest["splits"]["val"]["documents"]  # NFC joins e and the accent: 2 bytes instead of 3
    assert int(count.counted[0]) == manifest["splits"]["val"]["table_bytes"] == int(count.raw[0]) - shorter
    changed = val.changed(0, len(val), 3, 319)
    assert changed.read(3, 4).tolist() == [319]


def test_shards_fit_their_vocabulary(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    assert [shard_type(vocab) for vocab in (1024, 65_536, 65_537)] == ["<u2", "<u2", "<i4"]
    write_shard(path, np.array([0, 69_999]), "<i4")
    assert open_shard(path, dtype="<i4")[:].tolist() == [0, 69_999]
    with pytest.raises(DataError, match="magic: 20261124: tokens of type <i4, expected <u2 for the vocabulary"):
        open_shard(path)
    for tokens in ([], [-1], [1 << 31]):
        with pytest.raises(DataError, match="all from 0 to 2147483647"):
            write_shard(path, np.array(tokens, np.int64), "<i4")
    prepared(tmp_path, QWEN)
    manifest = tmp_path / "data" / "manifest.json"
    shard = tmp_path / "data" / "val_000000.bin"
    wide = json.loads(manifest.read_text())
    wide["tokenizer"]["sha256"] = WIDE.sha256
    manifest.write_text(json.dumps(wide))
    (tmp_path / "data" / "tokenizer.model").write_bytes(WIDE.model)
    with pytest.raises(DataError, match="magic: 20240520: tokens of type <u2, expected <i4"):
        open_dataset(str(tmp_path / "data"))
    assert struct.unpack_from("<i", shard.read_bytes())[0] == MAGICS["<u2"]


HEADERS = {
    "magic: 20261125, expected 20261124": (20261125, 1, 3, 12),
    "version: 2": (20261124, 2, 3, 12),
    "count: 0 tokens": (20261124, 1, 0, 0),
    "count: -1 tokens": (20261124, 1, -1, 0),
    "size: 1030 bytes, expected 1036": (20261124, 1, 3, 6),
    "size: 1040 bytes, expected 1036": (20261124, 1, 3, 16),
    f"expected {1024 + 4 * (2**31 - 1)} for 2147483647 tokens": (20261124, 1, 2**31 - 1, 12),
}


@pytest.mark.parametrize("field", HEADERS)
def test_malformed_int32_shard(tmp_path: Path, field: str) -> None:
    *header, size = HEADERS[field]
    (tmp_path / "a.bin").write_bytes(struct.pack("<3i", *header).ljust(1024, b"\0") + bytes(size))
    with pytest.raises(DataError, match=field):
        open_shard(str(tmp_path / "a.bin"), dtype="<i4")


@pytest.mark.parametrize("token", [-1, -(2**31), 70_000, 2**31 - 1])
def test_int32_ids_outside_the_vocabulary_are_refused_when_read(token: int) -> None:
    split = Split([np.array([1, token, 5], np.int32)], WIDE, "here/train")
    for read in (lambda: split.read(0, 3), lambda: split.gather(np.array([1]), 2)):
        with pytest.raises(DataError, match=f"here/train: token id {token} is outside the vocabulary of 70000"):
            read()
