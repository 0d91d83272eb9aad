"""tokenizer.json of our tokenizers: the same ids on any text, or none is written. Budget: 8 s."""

import functools
import importlib
import io
import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from core.data.bundled import BUNDLED
from core.data.tokenizer import Tokenizer
from core.weights.converting import ODD, ConversionError, bundled_texts, check_ids, converted, sample_texts
from shared_tests.support.exported import run_client
from shared_tests.support.harness import LINES, tiny_tokenizer
from shared_tests.support.json_tokenizers import qwen_like

AUTO = """
import json, sys
from transformers import AutoTokenizer
folder, texts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = [tokenizer(text)["input_ids"] for text in texts]
print("RESULT", json.dumps([[row, tokenizer.decode(row[1:])] for row in ids]))
"""


MORE = sorted(map(str, Path(os.environ.get("SKC_TOKENIZERS", os.devnull)).glob("*.model")))
"""Further tokenizers for the long run, the official ones, say."""


@functools.cache
def bundled() -> Tokenizer:
    """The tokenizer of the bundled text."""
    return Tokenizer((BUNDLED / "tokenizer.model").read_bytes())


def trained(**options: Any) -> Tokenizer:
    """A tokenizer of the bundled text, with the official settings unless `options` say otherwise."""
    model, official = io.BytesIO(), {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True}
    settings = {**official, "model_type": "bpe", "add_dummy_prefix": False, "vocab_size": 600, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(bundled_texts()).splitlines()), model_writer=model, minloglevel=2, **settings
    )
    return Tokenizer(model.getvalue())


def read_by(made: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer of a converted file, as `AutoTokenizer` sets it up."""
    tokenizer = tokenizers.Tokenizer.from_str(made.decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


def nasty(count: int) -> list[str]:
    """Random texts of letters, marks in any order, spaces, kana, syllables, emoji and control characters."""
    dice = random.Random(24)
    marks = [*map(chr, range(0x300, 0x370)), "\u3099", "\u309a", "\uff9e", "\uff9f", "\u093c", "\u200d", "\ufe0f"]
    spans = [
        (0x41, 0x7B), (0xC0, 0x180), (0xAC00, 0xAC40), (0x1100, 0x1113), (0x1161, 0x1176), (0x3040, 0x3100),
        (0x900, 0x950), (0xFF00, 0xFFA0), (0x1F600, 0x1F650), (0x2460, 0x2480), (0, 0x21), (0x2000, 0x2030),
    ]  # fmt: skip
    letters = [chr(one) for begin, end in spans for one in range(begin, end)]

    def marked() -> str:
        return "".join([dice.choice(letters), *dice.choices(marks, k=dice.choice((0, 0, 1, 2)))])

    return ["".join(marked() for _ in range(4)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bundled", "unigram", "bpe", "prefix", "identity", "no bytes", "json"])
def test_ids_are_the_same_on_any_text(kind: str) -> None:
    made = {
        "bundled": bundled, "unigram": lambda: trained(model_type="unigram"), "bpe": trained,
        "prefix": lambda: trained(add_dummy_prefix=True),
        "identity": lambda: trained(normalization_rule_name="identity", remove_extra_whitespaces=False),
        "no bytes": lambda: Tokenizer(tiny_tokenizer()), "json": lambda: Tokenizer.of(qwen_like()),
    }  # fmt: skip
    tokenizer = made[kind]()
    theirs = read_by(converted(tokenizer))
    check_ids(theirs, tokenizer, [*nasty(300 if kind == "bundled" else 60), *LINES])
    assert theirs.encode("the sea").ids == [tokenizer.bos, *tokenizer.encode("the sea").tolist()]


def test_decomposed_texts_are_composed_as_sentencepiece_does() -> None:
    """What the library's own step for these rules loses or fails on."""
    theirs, ours = read_by(converted(bundled())), bundled()
    letters = [chr(one) for one in (*range(0xC0, 0x250), *range(0x3041, 0x30FF), *range(0xAC00, 0xAC80))]
    check_ids(theirs, ours, [unicodedata.normalize("NFD", letter) for letter in letters])
    plain = tokenizers.normalizers.Precompiled(_charsmap(ours))
    assert plain.normalize_str("\u304b\u3099") != "\u304c" and ours.normalise("\u304b\u3099") == "\u304c"
    assert theirs.normalizer is not None and theirs.normalizer.normalize_str("\u304b\u3099") == "\u304c"


def _charsmap(tokenizer: Tokenizer) -> bytes:
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto
    return proto.FromString(tokenizer.model).normalizer_spec.precompiled_charsmap


def test_what_has_no_form_is_refused() -> None:
    case = Tokenizer((BUNDLED / "tokenizer_case.model").read_bytes())
    symbols = trained(user_defined_symbols=["<here>"])
    words = trained(model_type="word")
    for tokenizer, why in ((case, "--transform case"), (symbols, "<here>"), (words, "neither a BPE nor a unigram")):
        with pytest.raises(ConversionError, match=why):
            converted(tokenizer)


def test_a_tokenizer_that_differs_anywhere_is_refused() -> None:
    made, ours = json.loads(converted(bundled())), bundled()
    texts = sample_texts(ours)
    assert len(texts) > ours.vocab and set(ODD) < set(texts)
    for change in ("merges", "normalizer", "decoder"):
        other = json.loads(json.dumps(made))
        if change == "merges":
            last = "".join(other["model"]["merges"][-1])
            other["model"]["merges"] = [pair for pair in other["model"]["merges"] if "".join(pair) != last]
        elif change == "normalizer":
            other["normalizer"]["normalizers"].pop(0)  # what sets characters apart
        else:
            other["decoder"]["decoders"].pop(0)
        with pytest.raises(ConversionError, match="it would"):
            check_ids(read_by(json.dumps(other).encode()), ours, texts)


@pytest.mark.long
@pytest.mark.parametrize("place", ["bundled", *MORE])
def test_the_real_client_reads_the_same_ids(place: str, tmp_path: Path) -> None:
    tokenizer = bundled() if place == "bundled" else Tokenizer.load(place)
    made = converted(tokenizer)
    (tmp_path / "tokenizer.json").write_bytes(made)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "split_special_tokens": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = [text for text in (*ODD, *nasty(2000)) if "\0" not in text]
    (results,) = run_client(AUTO, [str(tmp_path), texts], tmp_path)
    for text, (ids, spelled) in zip(texts, results, strict=True):
        ours = tokenizer.encode(text)
        assert ids == [tokenizer.bos, *ours.tolist()], ascii(text)
        assert tokenizer.unknown in ours or spelled == tokenizer.decode(ours), ascii(text)
