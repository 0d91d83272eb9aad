"""The case transforms: undone exactly, and each token charged the bytes that it stands for. Budget: 12 s."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import core.data.dataset
import core.scoring.accounting
from core.cli import main
from core.data.bundled import BUNDLED, TOKENIZERS, open_data, prepare_sample
from core.data.corpus import read_documents
from core.data.dataset import DataError, Dataset, Split, identity, open_dataset
from core.data.prepare import prepare
from core.data.tokenizer import TRANSFORMED, Tokenizer, TokenizerError
from core.data.tokenizer_training import train_tokenizer
from core.data.transform import (
    ALL,
    ESCAPE,
    MARKERS,
    NEXT,
    TITLE,
    Transform,
    TransformError,
    apply_transform,
    invert_transform,
    restore_text,
)
from core.decoding.generate import Text, read_as
from core.scoring.accounting import count_bytes
from shared_tests.support.harness import tiny_tokenizer
from shared_tests.support.texts import MODEL, documents, jsonl

CASE = Tokenizer.load(str(BUNDLED / TOKENIZERS["sample-case"]))
ORDERS: tuple[Transform, ...] = ("case", "caseops")
LETTERS = "aBc D éÉ\n" + "".join(MARKERS)
TRICKY = "aA hH Bﬁ™ Ａ\u0301\u0331\u2581½  \n" + "".join(MARKERS)
"""Letters that normalisation joins, cuts, widens or makes capital, and markers."""


@pytest.fixture(scope="module")
def ops() -> Tokenizer:
    """A tokenizer for `caseops`, of few pieces, as the published ones are: their files do not say so."""
    texts = list(read_documents([str(BUNDLED / "val.jsonl.xz")]))[:2]
    return Tokenizer(train_tokenizer(texts, 400, "caseops").removesuffix(TRANSFORMED["caseops"]))


SPELLED = {
    "the old sea": ("the old sea", "the old sea"),
    "Hello World": (f"{TITLE}hello{TITLE} world", f"{TITLE}hello {TITLE}world"),
    "a NASA, I": (f"a{ALL} nasa,{TITLE} i", f"a {ALL}nasa, {TITLE}i"),
    "my iPhone McKay ABc": (
        f"my i{NEXT}phone{TITLE} mc{NEXT}kay{TITLE} a{NEXT}bc", f"my i{NEXT}phone {TITLE}mc{NEXT}kay {TITLE}a{NEXT}bc",
    ),
    "x  Y\nZ": (f"x {TITLE} y\n{TITLE}z", f"x  {TITLE}y\n{TITLE}z"),
    "ÉCOLE Éa": (f"É{ALL}cole Éa", f"É{ALL}cole Éa"),
    f"{TITLE} A{ESCAPE}": (f"{ESCAPE}{TITLE}{TITLE} a{ESCAPE}{ESCAPE}", f"{ESCAPE}{TITLE} {TITLE}a{ESCAPE}{ESCAPE}"),
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
def test_how_words_are_spelled(text: str) -> None:
    assert tuple(apply_transform(text, order) for order in ORDERS) == SPELLED[text]
    assert apply_transform(text, "none") == invert_transform(text, "none") == text


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(LETTERS), st.sampled_from(ORDERS))
def test_any_text_comes_back(text: str, order: Transform) -> None:
    marked = apply_transform(text, order)
    assert invert_transform(marked, order) == restore_text(marked, order) == text
    assert not re.search("[A-Z]", marked)


@settings(max_examples=150, deadline=None)
@given(st.text("ab C" + "".join(MARKERS), max_size=8), st.sampled_from(ORDERS))
def test_what_comes_back_was_written_so(marked: str, order: Transform) -> None:
    """No two texts are spelled alike and no text in two ways: whatever is not refused is what the transform writes."""
    try:
        text = invert_transform(marked, order)
    except TransformError:
        assert not any(apply_transform(text, order) == marked for text in (marked, restore_text(marked, order)))
    else:
        assert apply_transform(text, order) == marked


REFUSED = {
    f"a{TITLE}": "a", f"{TITLE}.": ".", f"{TITLE}{TITLE}a": "A", f"{ALL}a": "A", f"{ALL} 1": " 1", f"{NEXT}": "",
    f"a{NEXT}1": "a1", f"a{ESCAPE}": "a", f"{ESCAPE}a": "a", "aB": "aB", f"{NEXT}a": "A", f"a{TITLE}b": "aB",
    f"{TITLE}A": "A", f"{TITLE}a{NEXT}": "A", f"{TITLE}é": "é",
}  # fmt: skip


@pytest.mark.parametrize("marked", REFUSED)
def test_data_is_held_to_the_transform_and_a_model_is_not(marked: str) -> None:
    """A marker without its letters is an error in data; in what a model writes it is dropped."""
    for order in ORDERS:
        with pytest.raises(TransformError, match=r"^character \d+, '.*a marker without its letters") as caught:
            invert_transform(marked, order)
        assert "\n" not in str(caught.value)
        assert restore_text(marked, order) == REFUSED[marked]


def test_the_space_is_where_the_order_has_it() -> None:
    for order, marked in zip(ORDERS, (f"a {TITLE}b", f"a{TITLE} b"), strict=True):
        with pytest.raises(TransformError):
            invert_transform(marked, order)


def stream_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    split = Split([np.append(tokenizer.bos, ids).astype("<u2")], tokenizer)
    return int(split.costs(1, len(split)).sum())


@settings(max_examples=100, deadline=None)
@given(st.text(TRICKY) | st.text())
@example(text="H\u0331 A\u0301 Ａ\u0301")
@example(text=f"{ESCAPE}{ESCAPE}{TITLE} Bob{ESCAPE}")
def test_tokens_spell_the_normalised_text_and_cost_its_bytes(text: str) -> None:
    """Normalised before it is transformed: so the bytes are those that a tokenizer without a transform charges."""
    plain = Tokenizer.load(MODEL)
    wanted = plain.decode(plain.encode(text))
    ids = CASE.encode(text)
    assert CASE.decode(ids, strict=True) == CASE.decode(ids) == CASE.normalise(text) == wanted
    assert stream_bytes(CASE, ids) == len(wanted.encode())
    assert CASE.identity(text) == plain.identity(text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(TRICKY) | st.text())
def test_the_same_in_the_published_order(ops: Tokenizer, text: str) -> None:
    tokenizer = ops.transformed("caseops")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, strict=True) == tokenizer.normalise(text)
    assert stream_bytes(tokenizer, ids) == len(tokenizer.normalise(text).encode())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(4, 1023).filter(lambda i: i != 0xEE + 8) | st.integers(4, 7), max_size=12))
def test_what_a_model_writes_costs_what_it_prints(ids: list[int]) -> None:
    """Whatever markers stand where; 0xEE is the byte that all of them begin with, should they be spelled in bytes."""
    text = CASE.decode([ord("x") + 8, *ids])
    assume("\ufffd" not in text)
    assert stream_bytes(CASE, np.array([ord("x") + 8, *ids])) == len(text.encode())


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_costs_do_not_depend_on_where_they_are_read_from(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """A run of escapes is read back to its start, however the stream and the reading are cut."""
    monkeypatch.setattr(core.data.dataset, "SCAN", block)
    ids = CASE.encode(f"A{ESCAPE * 5}{TITLE} Bob {ESCAPE}{ALL}{NEXT * 2} the NASA")
    stream = np.concatenate([[CASE.bos], ids, [CASE.bos], ids]).astype("<u2")
    split = Split(np.split(stream, [3, 6, 7]), CASE)
    whole = split.costs(0, len(split))
    assert whole.sum() == 2 * len(CASE.decode(ids).encode()) and whole[0] == 0
    for start in range(len(split)):
        for stop in range(start, len(split) + 1):
            assert split.costs(start, stop).tolist() == whole[start:stop].tolist()


def test_the_table_and_its_faults() -> None:
    """Markers are ids 4 to 7 and cost nothing; a table that charges them, or a letter too many, is known as wrong."""
    assert CASE.table.markers == (4, 5, 6, 7) and CASE.bos == 1 and CASE.table_fault is None
    assert not CASE.table.base[:8].any()
    wrong = Tokenizer(CASE.model)
    wrong.table.base[4] = 3
    assert wrong.table_fault == "the tokenizer's piece '\\ue001' would cost 3 bytes and stands for 0"
    wrong = Tokenizer(CASE.model)
    piece = int(CASE.encode("the")[0])
    wrong.table.base[piece] += 1
    assert "'the' would cost 4 bytes and stands for 3" in str(wrong.table_fault)


def test_one_tokenizer_is_of_one_transform(ops: Tokenizer) -> None:
    assert ops.transform == "none" and ops.transformed("none") is ops
    stamped = ops.transformed("caseops")
    assert stamped.transform == "caseops" and stamped.sha256 != ops.sha256 != ops.transformed("case").sha256
    assert (stamped.vocab, stamped.bos) == (ops.vocab, ops.bos)
    assert ops.encode("the sea").tolist() == stamped.encode("the sea").tolist()
    with pytest.raises(TokenizerError, match="was made for text with --transform caseops, not case; give that"):
        stamped.transformed("case")
    with pytest.raises(TokenizerError, match="was made for text with --transform case, not none"):
        CASE.transformed("none")
    with pytest.raises(TokenizerError, match="no pieces for the case markers U.E001 to U.E004"):
        Tokenizer.load(MODEL).transformed("case")


def test_pieces_that_hold_a_marker_and_letters_do_not_go_by_the_table() -> None:
    """What such a piece costs would depend on the escape before it; then raw bytes count, and it is said why."""
    symbols = [*MARKERS, f"{TITLE}the"]
    mixed = Tokenizer(tiny_tokenizer(vocab_size=320, byte_fallback=True, user_defined_symbols=symbols))
    mixed = mixed.transformed("case")
    assert mixed.decode(mixed.encode("The old"), strict=True) == "The old"
    assert mixed.table_fault == "the tokenizer's piece '\\ue001the' would cost 6 bytes and stands for 3"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The bundled text by its name, prepared on first use."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        dataset = open_data("sample-case")
    assert dataset.path == str(cache / "skc" / "sample-case")
    return dataset


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = str(tmp_path_factory.mktemp("data") / "plain")
    prepare_sample(path)
    return open_dataset(path)


def test_the_bundled_text_has_the_same_bytes_in_both_forms(sample: Dataset, plain: Dataset) -> None:
    """A text has its bytes whichever the tokenizer (docs/challenge.md, 4); tokens are 2.2 % more than without."""
    for name, tokens in (("train", 745_651), ("val", 41_213)):
        ours, theirs = sample.manifest["splits"][name], plain.manifest["splits"][name]
        assert ours["table_bytes"] == theirs["table_bytes"] and ours["raw_bytes"] == theirs["raw_bytes"]
        assert ours["tokens"] == tokens and ours["unknown_tokens"] == 0
        assert documents(sample, name) == documents(plain, name)
    assert (sample.manifest["transform"], "transform" in plain.manifest) == ("case", False)
    assert sample.tokenizer.sha256 == CASE.sha256
    whole = count_bytes(sample.val, np.zeros(1, np.int64), np.array([len(sample.val) - 1]), None)
    assert (whole.rule, int(whole.counted.sum())) == ("table", ours["table_bytes"])


def test_the_transform_names_the_data(sample: Dataset) -> None:
    tokenizer = SimpleNamespace(transform="caseops")
    other: Any = SimpleNamespace(name=sample.name, manifest=sample.manifest, tokenizer=tokenizer)
    assert identity(other) != identity(sample)


def test_a_manifest_that_says_another_transform_is_refused(tmp_path: Path) -> None:
    text, out = jsonl(tmp_path / "t.jsonl", ["The one.", "An OTHER.", "and a third"]), tmp_path / "out"
    prepare([text], str(out), tokenizer=str(BUNDLED / TOKENIZERS["sample-case"]), transform="case")
    manifest = out / "manifest.json"
    written = manifest.read_text()
    for value, message in (('"caseops"', "transform: caseops, but its tokenizer is for text with"), ("5", "expected")):
        manifest.write_text(written.replace('"transform": "case",\n "splits"', f'"transform": {value},\n "splits"'))
        with pytest.raises(DataError, match=message):
            open_dataset(str(out))


def test_documents_are_transformed_one_by_one(tmp_path: Path) -> None:
    """Nothing crosses from one document into the next, whatever the shards are cut into."""
    texts = ["ends in AN", "Begins so", f"odd {ESCAPE}", f"{TITLE}Bob", "all the SAME", "X"]
    source = jsonl(tmp_path / "t.jsonl", texts)
    manifest = prepare(
        [source], str(tmp_path / "out"), val=[jsonl(tmp_path / "v.jsonl", ["Other text"])], transform="case",
        tokenizer=str(BUNDLED / TOKENIZERS["sample-case"]), shard_tokens=7,
    )  # fmt: skip
    dataset = open_dataset(str(tmp_path / "out"))
    assert documents(dataset, "train") == texts
    split, starts = dataset.train, [*dataset.train.document_starts.tolist(), len(dataset.train)]
    costs = [int(split.costs(a, b).sum()) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert costs == [len(text.encode()) for text in texts]
    assert sum(costs) == manifest["splits"]["train"]["table_bytes"]


def test_training_a_tokenizer_is_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"The {word} of Old {word.upper()} IS {i}" for i, word in enumerate(["man", "sea", "sun", "cat"] * 9)]
    source, out = jsonl(tmp_path / "t.jsonl", texts), str(tmp_path / "out")
    words = ["data", "prepare", source, "--out", out, "--vocab", "300", "--transform", "caseops"]
    assert main(words) == 0 and main(words) == 0
    dataset = open_dataset(out)
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(texts)
    assert dataset.tokenizer.table.markers == (4, 5, 6, 7)
    assert main([*words[:-1], "case"]) == 2
    assert "holds data made from other inputs" in capsys.readouterr().err
    given = ["data", "prepare", source, "--out", str(tmp_path / "b")]
    for more in ((MODEL, "case"), (f"{out}/tokenizer.model", "none"), (f"{out}/tokenizer.model", "case")):
        assert main([*given, "--tokenizer", more[0], "--transform", more[1]]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert "case markers" in said[-1] or "--transform caseops, not" in said[-1]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("prompt", ["", "The NASA", "Bob said I", "iPhone"])
def test_generated_text_is_shown_as_plain_text(prompt: str) -> None:
    """A text grows at its end alone, and one that ends within a marker is printed without it."""
    assert read_as(CASE, prompt) == prompt
    text = Text(CASE, prompt)
    shown = str(text)
    assert shown == prompt
    for token in [*CASE.encode(", and The OLD sea").tolist(), 5, 6, int(CASE.encode("x")[0]), 4, 7]:
        text.take(token, 99)
        now = str(text)
        assert now.startswith(shown) and not set(MARKERS) & set(now)
        shown = now
    assert shown == f"{prompt}, and The OLD seaX"


def test_scoring_goes_by_the_costs_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """By sidecar as by table, read in chunks of any size."""
    ids = CASE.encode(f"The {ESCAPE * 3}{ALL} NASA and Bob {TITLE}")
    stream = np.concatenate([[CASE.bos], ids] * 2).astype("<u2")
    table = Split([stream], CASE, unknown_tokens=0)
    costs = table.costs(0, len(table)).astype("<u2")
    sidecar = Split([stream], CASE, unknown_tokens=0, sidecar=Split(np.split(costs, [4]), CASE))
    half = len(ids) + 1
    begins, ends = np.array([0, half]), np.array([half - 1, 2 * half - 1])
    for chunk in (1, 3, 1 << 20):
        monkeypatch.setattr(core.scoring.accounting, "CHUNK", chunk)
        for split in (table, sidecar):
            assert (
                count_bytes(split, begins, ends, np.arange(2)).counted.tolist() == [len(CASE.decode(ids).encode())] * 2
            )
