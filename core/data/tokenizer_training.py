"""SentencePiece tokenizers made from a text: with all byte pieces, so that any text can be written."""

import functools
import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from core.data.tokenizer import MAX_VOCAB, SPACE, TRANSFORMED, TokenizerError
from core.data.transform import MARKERS, Transform, apply_transform

MAX_LINE = 100_000
"""Characters of one training line; SentencePiece drops lines over its `max_sentence_length`, so longer ones are cut."""
NORMALISATION = "nmt_nfkc"
"""What trained tokenizers do to a text first."""


class VocabularyError(TokenizerError):
    """The text allows no vocabulary of the size that was asked for: `most` is the largest that it allows."""

    def __init__(self, vocab: int, most: int) -> None:
        super().__init__(f"vocab={vocab}: this text gives at most {most} pieces; use --vocab {most}, or more text")
        self.most = most


@functools.cache
def _normaliser() -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(rule_name=NORMALISATION, remove_extra_whitespaces=True)


def trained_identity(text: str) -> bytes:
    """Return `Tokenizer.identity` of any tokenizer that `train_tokenizer` makes."""
    return _normaliser().normalize(text).encode()


def train_tokenizer(texts: Iterable[str], vocab: int, transform: Transform = "none") -> bytes:
    """Train a BPE model with the official settings and return its bytes; TokenizerError if the text does not allow it.

    The settings are those of the published tokenizers (docs/challenge.md, 2). All of `texts` is held in memory. For
    text that is transformed the case markers are pieces of their own, ids 4 to 7.
    """
    if not 0 < vocab <= MAX_VOCAB:
        raise TokenizerError(f"vocab={vocab}: expected from 1 to {MAX_VOCAB}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, transform),
            user_defined_symbols=list(MARKERS) if transform != "none" else [],
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=NORMALISATION,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * MAX_LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if most := re.search(r"too high .*<= (\d+)", reason):
            raise VocabularyError(vocab, int(most[1])) from error
        if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", reason):
            raise TokenizerError(
                f"vocab={vocab}: the letters of this text and the byte pieces alone are {least[1]} pieces; use a "
                f"--vocab above {least[1]}"
            ) from error
        if "sentences_.empty()" in reason:
            raise TokenizerError("training a tokenizer: there is no text to train it on") from error
        if "all_chars_count" in reason:
            raise TokenizerError(
                "training a tokenizer: the text has no letters to train it on; is it text at all?"
            ) from error
        raise TokenizerError(f"vocab={vocab}: training a tokenizer on this text failed: {reason}") from error
    return model.getvalue() + TRANSFORMED.get(transform, b"")


def _lines(texts: Iterable[str], transform: Transform) -> Iterator[str]:
    for text in texts:
        if transform != "none":
            text = apply_transform(_normaliser().normalize(text).replace(SPACE, " "), transform)
        for line in text.splitlines():
            for start in range(0, len(line), MAX_LINE):
                yield line[start : start + MAX_LINE]
