"""A tokenizer of ours as a tokenizer.json of the library tokenizers: the same ids, or none is written."""

import importlib
import json
import lzma
import re
from collections.abc import Sequence
from typing import Any

from core.data.bundled import BUNDLED
from core.data.tokenizer import SPACE, Tokenizer
from core.files import read_file
from core.weights.normalising import normaliser_steps

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
"""SentencePiece's kinds of pieces."""
UNIGRAM, BPE = 1, 2
"""SentencePiece's kinds of models that are converted."""
ODD = (
    "", " ", "  two  spaces  ", "a\ttab", "lines\n\nand\r\nlines\n", "Zu\u0308rich, na\u00efve, \u1ec7, e\u0323\u0302",
    "\u304b\u3099\uff76\uff9e",
    "\uff21\u0308 \u2460\u0301 \ufb01", "\u1112\u1161\u11ab\uae00",
    "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea \u270c\U0001f3fd",
    "\x00\x07\x7f\u200b\ufeff", "\u2028\u3000\u00a0.", "<s> </s> <unk> <pad> <0x41>", "\u2581x\u2581",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u4e2d\u6587 \U00020000",
    "1234567890 3.14159", "don't  CAN'T", "\u0301at the start, \u00ca\u0300 x\u0301\u031b", "x" * 300,
)  # fmt: skip
"""Texts in which tokenizers differ."""
MAX_BUNDLED = 1 << 22
LETTERS = 5000
"""Of each of the bundled documents that both tokenizers read."""


class ConversionError(ValueError):
    """A tokenizer cannot be written as tokenizer.json: the message says why."""


def converted(tokenizer: Any) -> bytes:
    """Return a tokenizer.json that gives the same ids, with BOS in front; ConversionError says what it cannot have.

    It is held to the tokenizer on ODD, on text of the bundled documents and on the spelling of every piece.
    """
    library = _library("tokenizers", "tokenizers")
    if isinstance(tokenizer, Tokenizer):
        made, start = _of_sentencepiece(library, tokenizer)
    else:
        made, start = _of_json(library, tokenizer)
    check_ids(made, tokenizer, sample_texts(tokenizer))
    made.post_processor = library.processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B:1", special_tokens=[(start, tokenizer.bos)]
    )
    return made.to_str(pretty=False).encode()


def sample_texts(tokenizer: Any) -> list[str]:
    """Return the texts that two tokenizers are compared on."""
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab)]
    return [*ODD, *bundled_texts(), *pieces, " ".join(pieces)]


def bundled_texts() -> list[str]:
    """Return the beginnings of the bundled text's documents."""
    lines = lzma.decompress(read_file(BUNDLED / "val.jsonl.xz", MAX_BUNDLED)).splitlines()
    return [json.loads(line)["text"][:LETTERS] for line in lines]


def check_ids(made: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise ConversionError unless a tokenizer of the library gives every text the ids and the text of ours."""
    made.encode_special_tokens = True  # a text that spells a control token out is no end of a document
    for text in texts:
        ours = tokenizer.encode(text).tolist()
        try:
            theirs = made.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # the library's panics derive from no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            theirs = [f"{type(error).__name__}"]
        if ours != theirs:
            raise ConversionError(f"of {ascii(text[:30])} it would make {str(theirs)[:60]}, not {str(ours)[:60]}")
        # What nobody knows has no text: SentencePiece writes a sign of its own.
        if tokenizer.unknown not in ours and made.decode(ours) != tokenizer.decode(ours):
            raise ConversionError(
                f"it would write {ascii(made.decode(ours)[:40])}, not {ascii(tokenizer.decode(ours)[:40])}"
            )


def _library(module: str, package: str) -> Any:
    """Return a module of a package that is an extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = "pip install -c constraints.txt -e '.[hf]'"
        raise ConversionError(f"{package} is not installed (run: {command})") from error


def _of_sentencepiece(library: Any, tokenizer: Tokenizer) -> tuple[Any, str]:
    """Return the library's tokenizer of a SentencePiece model, and its BOS."""
    if tokenizer.transform != "none":
        raise ConversionError(
            f"its text is transformed first (--transform {tokenizer.transform}), for which it has no step"
        )
    proto = _library("sentencepiece.sentencepiece_model_pb2", "protobuf").ModelProto()
    proto.ParseFromString(tokenizer.model)
    pieces, kind, rules = proto.pieces, proto.trainer_spec.model_type, proto.normalizer_spec
    odd = next((piece for piece in pieces if piece.type in (DEFINED, UNUSED)), None)
    if odd is not None:
        raise ConversionError(f"its piece {ascii(odd.piece)[:40]} is user-defined or unused, of which it has no kind")
    if kind not in (UNIGRAM, BPE) or proto.trainer_spec.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise ConversionError("it is neither a BPE nor a unigram model with spaces in front of words")
    unknown = pieces[tokenizer.unknown].piece
    made = library.Tokenizer(
        _bpe(library, proto, unknown, tokenizer) if kind == BPE else _unigram(library, proto, tokenizer)
    )
    try:
        steps = normaliser_steps(rules.precompiled_charsmap, rules.add_dummy_prefix, rules.remove_extra_whitespaces)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    made.normalizer = library.normalizers.Sequence(steps)
    if kind == UNIGRAM:
        made.pre_tokenizer = _between_names(library, proto)
    parts, decoders = library.decoders, []
    decoders += [parts.Replace(SPACE, " "), parts.ByteFallback(), parts.Fuse()]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        decoders.append(parts.Strip(" ", 1, 0))
    made.decoder = parts.Sequence(decoders)
    control = [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    made.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in control])
    return made, pieces[tokenizer.bos].piece


def _bpe(library: Any, proto: Any, unknown: str, tokenizer: Tokenizer) -> Any:
    """Return a BPE model: SentencePiece joins two pieces wherever it has the joined one, the best first."""
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    plain = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(plain, key=lambda piece: -plain[piece])
        for i in range(1, len(piece))
        if piece[:i] in plain and piece[i:] in plain
    ]
    return library.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=tokenizer.byte_pieces)


def _unigram(library: Any, proto: Any, tokenizer: Tokenizer) -> Any:
    """Return a unigram model."""
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    return library.models.Unigram(scores, unk_id=tokenizer.unknown, byte_fallback=tokenizer.byte_pieces)


def _between_names(library: Any, proto: Any) -> Any:
    """Return the step that cuts a text inside what spells the name of a piece that no text becomes.

    The library's unigram model would take the name for the piece.
    """
    names = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, BYTE)]
    places = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names]
    return library.pre_tokenizers.Split(library.Regex("|".join([*places, "<(?=0x[0-9A-F]{2}>)"])), "isolated")


def _of_json(library: Any, tokenizer: Any) -> tuple[Any, str]:
    """Return the library's tokenizer of a tokenizer.json, and its BOS."""
    file = json.loads(tokenizer.model)
    file.pop("skc", None)
    made = library.Tokenizer.from_str(json.dumps(file))
    made.decoder = library.decoders.ByteLevel()
    return made, made.id_to_token(tokenizer.bos)
