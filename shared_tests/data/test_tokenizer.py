"""Tokenizers: the byte table against hand-counted bytes, round trips, and models that must be refused. Budget: 10 s."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import core.data.tokenizer
from core.data.tokenizer import SPACE, Tokenizer, TokenizerError, token_bytes
from core.data.tokenizer_training import train_tokenizer
from shared_tests.support.harness import LINES, tiny_tokenizer

BUNDLED = Path(core.data.tokenizer.__file__).parent / "bundled" / "tokenizer.model"


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.load(str(BUNDLED))


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


def stream_bytes(tokenizer: Tokenizer, ids: list[int] | np.ndarray) -> list[int]:
    """Return what every token after a leading BOS costs."""
    stream = np.array([tokenizer.bos, *ids])
    return token_bytes(tokenizer.table, stream[:-1], stream[1:]).tolist()


def piece_ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Return the ids of pieces that must exist."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = [processor.piece_to_id(piece) for piece in pieces]
    assert all(processor.id_to_piece(i) == piece for i, piece in zip(ids, pieces, strict=True))
    return ids


def test_bundled_model(bundled: Tokenizer) -> None:
    assert (bundled.vocab, bundled.bos, bundled.unknown, bundled.byte_pieces) == (1024, 1, 3, True)
    assert bundled.sha256 == "1c7fd329f9f8e09422b18bea006ce9f9428948a60a0db98884ca30a27a9400f9"
    ids = bundled.encode("It is a truth")
    assert ids.dtype == np.int32 and bundled.bos not in ids
    assert bundled.decode(ids) == "It is a truth"
    assert bundled.decode([bundled.bos, *ids]) == "It is a truth"


@pytest.mark.parametrize(
    ("piece", "base", "leading", "boundary"),
    [
        ("<pad>", 0, False, True),
        ("<s>", 0, False, True),
        ("</s>", 0, False, True),
        ("<unk>", 0, False, True),
        ("<0x00>", 1, False, False),
        ("<0xFF>", 1, False, False),
        ("e", 1, False, False),
        ("▁", 0, True, False),
        ("▁the", 3, True, False),
    ],
)
def test_byte_table(bundled: Tokenizer, piece: str, base: int, leading: bool, boundary: bool) -> None:
    (i,) = piece_ids(bundled, piece)
    table = bundled.table
    assert (table.base[i], table.leading[i], table.boundary[i]) == (base, leading, boundary)


def test_leading_space_costs_a_byte_except_after_a_boundary(bundled: Tokenizer) -> None:
    the, e = piece_ids(bundled, "▁the", "e")
    assert stream_bytes(bundled, [the, the, e]) == [3, 4, 1]
    assert stream_bytes(bundled, [bundled.unknown, the]) == [0, 3]
    assert stream_bytes(bundled, [e, bundled.bos, the]) == [1, 0, 3]


def test_byte_fallback_counts_every_byte_once(bundled: Tokenizer) -> None:
    ids = bundled.encode("☃")
    assert stream_bytes(bundled, ids) == [1, 1, 1]
    assert bundled.decode(ids) == "☃"


def test_multi_byte_piece(plain: Tokenizer) -> None:
    (e_acute,) = piece_ids(plain, "é")
    assert stream_bytes(plain, [e_acute]) == [2]


def test_without_byte_pieces_unknown_text_costs_nothing(plain: Tokenizer) -> None:
    assert not plain.byte_pieces
    text = "the ☃ sea"
    ids = plain.encode(text)
    assert np.count_nonzero(ids == plain.unknown) == 1
    # The snowman's 3 bytes, and the space after the unknown token, which is a boundary.
    assert sum(stream_bytes(plain, ids)) == len(text.encode()) - 4


def test_unused_pieces_are_boundaries() -> None:
    symbols: dict[str, Any] = {"control_symbols": ["<ctl>"], "user_defined_symbols": ["<usr>"]}
    with_unused = Tokenizer(tiny_tokenizer(**symbols))
    control, user = piece_ids(with_unused, "<ctl>", "<usr>")
    table = with_unused.table
    assert table.boundary[control] and table.base[control] == 0
    assert not table.boundary[user] and table.base[user] == 5


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=60))
def test_table_charges_the_bytes_of_the_normalised_text(text: str) -> None:
    tokenizer = Tokenizer.load(str(BUNDLED))
    ids = tokenizer.encode(text)
    assert sum(stream_bytes(tokenizer, ids)) == len(tokenizer.decode(ids).encode())


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("None", {}),
    "no space": ("no piece for a space alone: it would cost 3 bytes", {"sentences": ["你好世界"] * 9}),
    "suffix": ("piece '.*' would cost", {"treat_whitespace_as_suffix": True}),
    "inside": (
        r"piece 'old\\u2581sea' would cost 9 bytes and stands for 7",
        {"user_defined_symbols": ["old\u2581sea"]},
    ),
    "dummy prefix": ("None", {"add_dummy_prefix": True}),
    "not normalised": ("None", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
    "no byte pieces": ("no byte pieces", {"byte_fallback": False, "vocab_size": 40}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_table_is_believed_where_it_holds(name: str) -> None:
    """From the tokenizer alone, and true of texts: where it says nothing, each text is charged its own bytes."""
    said, options = FAULTS[name]
    made = {"byte_fallback": True, "vocab_size": 285, "hard_vocab_limit": False, **options}
    tokenizer = Tokenizer(tiny_tokenizer(**made))
    assert re.search(said, str(tokenizer.table_fault))
    texts = ["the old sea", "a ☃ b", "你 好", "  two  spaces ", "café \u2581 ☃☃ \t x", "old sea old sea"]
    wrong = []
    for text in texts:
        normalised = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).normalize(text)
        own = normalised.replace(SPACE, " ").removeprefix(" ")  # the first of all costs nothing after BOS
        wrong.append(sum(stream_bytes(tokenizer, tokenizer.encode(text))) != len(own.encode()))
    assert any(wrong) == (tokenizer.table_fault is not None)


def test_official_tokenizers_keep_their_rule(bundled: Tokenizer) -> None:
    """The published ones that lie beside the checkout, where they do."""
    assert bundled.table_fault is None
    for path in (BUNDLED.parents[3] / "shared" / "data" / "tokenizers").glob("*.model"):
        tokenizer = Tokenizer.load(str(path))
        assert (tokenizer.table_fault is None) == tokenizer.byte_pieces, path


def test_batch_encoding_equals_single(bundled: Tokenizer) -> None:
    texts = ["one", "", "two words", "☃"]
    for single, batched in zip(map(bundled.encode, texts), bundled.encode_batch(texts, 2), strict=True):
        np.testing.assert_array_equal(single, batched)
        assert batched.dtype == np.int32


@pytest.mark.parametrize("cut", [0, 10, 100_000])
def test_not_a_model(cut: int) -> None:
    with pytest.raises(TokenizerError, match="mine.model: neither a SentencePiece .model nor a tokenizer.json"):
        Tokenizer(BUNDLED.read_bytes()[:cut], "mine.model")


def test_model_without_bos() -> None:
    with pytest.raises(TokenizerError, match="no BOS id"):
        Tokenizer(tiny_tokenizer(bos_id=-1))


def test_vocabulary_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core.data.tokenizer.MAX_VOCAB == 65_535
    monkeypatch.setattr(core.data.tokenizer, "MAX_VOCAB", 1023)
    with pytest.raises(TokenizerError, match="1024 pieces; shards hold at most 1023"):
        Tokenizer.load(str(BUNDLED))


@pytest.mark.parametrize("i", [-1, 1024])
def test_decode_refuses_ids_outside(bundled: Tokenizer, i: int) -> None:
    with pytest.raises(ValueError, match=f"token id {i}"):
        bundled.decode(np.array([5, i]))


def test_training_with_the_official_settings() -> None:
    long_line = "abc def " * 60_000
    tokenizer = Tokenizer(train_tokenizer([long_line, "12345 " * 20_000], 278))
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.unknown, tokenizer.byte_pieces) == (278, 1, 3, True)
    # The long line was not dropped, digits stay apart, no space is put in front.
    (abc,) = piece_ids(tokenizer, "▁abc")
    assert abc in tokenizer.encode("x abc")
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


@pytest.mark.parametrize("vocab", [0, 10, 5000, 70_000])
def test_training_refuses_an_impossible_vocabulary(vocab: int) -> None:
    with pytest.raises(TokenizerError, match=f"vocab={vocab}") as caught:
        train_tokenizer(LINES, vocab)
    assert "\n" not in str(caught.value)
