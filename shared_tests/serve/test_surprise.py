"""How tokens are shown, and where in a text they end. Budget: 1 s."""

import pytest

from core import rng
from core.data.bundled import BUNDLED
from core.data.tokenizer import TRANSFORMED, Tokenizer
from core.data.tokenizer_json import JsonTokenizer
from core.data.transform import Transform
from core.serve.surprise import offsets
from shared_tests.support.json_tokenizers import qwen_like
from shared_tests.support.serving import bundled_tokenizer


def test_where_tokens_end_is_a_letters_last_token() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode("a東b").tolist()
    ends = offsets(tokenizer, ids, "a東b")
    assert [tokenizer.piece(i)[:3] for i in ids] == ["a", "<0x", "<0x", "<0x", "b"] and ends == [1, 1, 1, 2, 3]


def cut_by(transform: Transform) -> Tokenizer:
    """Return the bundled tokenizer of texts that are transformed."""
    if transform == "none":
        return bundled_tokenizer()
    model = (BUNDLED / "tokenizer_case.model").read_bytes()
    return Tokenizer(model.removesuffix(TRANSFORMED["case"])).transformed(transform)


def test_a_token_is_shown_by_its_letters_or_its_name() -> None:
    tokenizer = cut_by("case")
    assert list(map(tokenizer.piece, tokenizer.encode("The CAT é").tolist())) == [
        "<title>", "the", "<all>", " c", "at", " ", "<0xC3>", "<0xA9>"]  # fmt: skip
    assert bundled_tokenizer().piece(bundled_tokenizer().bos) == "<s>"
    own = JsonTokenizer(qwen_like())
    shown = [own.piece(i) for i in own.encode("a é\x80").tolist()]
    assert "".join(shown).replace("<0xC3><0xA9>", "é").replace("<0xC2><0x80>", "\x80") == "a é\x80"
    assert own.piece(own.bos) == "<|endoftext|>"


@pytest.mark.parametrize("transform", ["none", "case", "caseops"])
def test_where_tokens_end_does_not_hang_on_what_came_long_before(transform: Transform) -> None:
    """Against whole prefixes, on text that is hard to cut: letters of several tokens, capitals, markers, no spaces."""
    tokenizer = cut_by(transform)
    words = [
        "THE CAT",
        "naïve",
        "東京タワー",
        " ",
        "\n\n",
        "McDonald",
        "\ue001x",
        "🙂🙂",
        "a\ufffdb",
        "WWWWWWWW",
        "don't",
        "  ",
    ]
    text = "".join(words[i % len(words)] + " " * (i % 3 == 0) for i in rng.integers16(0, "offsets", 150).tolist())
    ids = tokenizer.encode(text).tolist()
    read = tokenizer.decode(ids)
    whole = [len(tokenizer.decode(ids[:count]).rstrip("\ufffd")) for count in range(1, len(ids) + 1)]
    ends = offsets(tokenizer, ids, read)
    assert len(ids) > 300 and ends[-1] == len(read) and ends == sorted(ends)
    far = [place for place, (ours, theirs) in enumerate(zip(ends, whole, strict=True)) if ours != theirs]
    allowed = {place for place in range(len(ids)) if read[whole[place] :].startswith("\ufffd")}
    assert set(far) <= allowed, [(tokenizer.piece(ids[place]), ends[place], whole[place]) for place in far[:5]]
