"""Tokenizers: loading, encoding, and the byte table that bits per byte rests on.

`Tokenizer` is SentencePiece's, `core.data.tokenizer_json` has that of a tokenizer.json; `Tokenizer.load` opens either.

Where text is transformed before it becomes tokens (`core.data.transform`), the tokenizer does that and undoes it. Its
file says so in a field of our own behind SentencePiece's, so its copies in run folders and beside artifacts do too.
"""

import functools
import hashlib
import importlib
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np
import sentencepiece

from core.data.byte_table import ByteTable as ByteTable
from core.data.byte_table import TokenizerError as TokenizerError
from core.data.byte_table import checked_ids
from core.data.transform import MARKERS, Transform, apply_transform, invert_transform, restore_text
from core.files import open_input, read_bounded

MAX_VOCAB = 65_535
MAX_MODEL = 1 << 24
"""Bytes of a .model file."""
MAX_FILE = 1 << 26
"""Bytes of a tokenizer of any kind."""
SPACE = "\u2581"
SHOWN = ("<title>", "<all>", "<next>", "<escape>")
"""What stands for each of MARKERS where tokens are shown one by one."""
MARKER_BYTES = len(MARKERS[0].encode())
TRANSFORMED = {name: b"\xc2\x0c" + bytes([len(name)]) + name.encode() for name in get_args(Transform)[1:]}
"""Field 200 of the model, the first of those that SentencePiece leaves to others, at its end."""
AS_IT_IS = b"\x1a\x10" + b"\x0a\x08identity\x12\x00\x18\x00\x20\x00"
"""A normaliser_spec that, behind a model, takes the place of its own: no rules, no space in front, all spaces kept."""


class Tokenizer:
    """A SentencePiece model; TokenizerError if it is not one, has no BOS id or too many pieces for uint16 shards.

    A tokenizer.json is one of the same methods.

    TokenizerError also for one whose text is transformed that has no pieces for the markers.
    """

    model: bytes
    sha256: str
    vocab: int
    bos: int
    unknown: int
    """The id of what it does not know; -1: it knows everything."""
    spaced = True
    """Whether pieces hold the space in front of them, which costs nothing behind a boundary."""
    byte_pieces: bool
    """All 256 byte pieces are there: no text becomes unknown."""
    transform: Transform
    """What is done to a text before it becomes tokens, and undone behind them."""

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        try:
            if not model:
                raise RuntimeError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, TypeError) as error:
            raise TokenizerError(
                f"{name}: neither a SentencePiece .model nor a tokenizer.json; give one of them"
            ) from error
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab = self._processor.vocab_size()
        self.bos = self._processor.bos_id()
        self.unknown = self._processor.unk_id()
        if self.vocab > MAX_VOCAB:
            raise TokenizerError(
                f"{name}: {self.vocab} pieces; shards hold at most {MAX_VOCAB}, use a smaller vocabulary"
            )
        if self.bos < 0:
            raise TokenizerError(f"{name}: no BOS id, so documents have no start; train one with bos_id=1")
        self.byte_pieces = sum(map(self._processor.is_byte, range(self.vocab))) == 256
        self.transform = next((kind for kind, field in TRANSFORMED.items() if model.endswith(field)), "none")
        if self.transform == "none":
            return
        # A text is normalised before it is transformed, and never after: that could join a letter and an accent that
        # belong to different cases, and the marker between them would be lost.
        self._spell = sentencepiece.SentencePieceProcessor(model_proto=model + AS_IT_IS)
        self._markers = tuple(map(self._processor.piece_to_id, MARKERS))
        if self._spell.encode("".join(MARKERS)) != list(self._markers):
            raise TokenizerError(
                f"{name}: has no pieces for the case markers U+E001 to U+E004, so each would be spelled in bytes: give "
                "one that was trained with them as user_defined_symbols, or leave out --tokenizer to train one"
            )

    def transformed(self, transform: Transform, name: str = "tokenizer") -> "Tokenizer":
        """Return the tokenizer of the same pieces for text that is transformed; TokenizerError.

        One that was made for transformed text is no other's.
        """
        if self.transform == transform:
            return self
        if self.transform != "none":
            raise TokenizerError(
                f"{name}: was made for text with --transform {self.transform}, not {transform}; give that transform, "
                "or another tokenizer"
            )
        return Tokenizer(self.model + TRANSFORMED[transform], name)

    @staticmethod
    def load(path: str) -> "Tokenizer":
        """Read a `.model` file or a tokenizer.json; OSError, FileError or TokenizerError."""
        with open_input(path) as file:
            json = file.peek(1)[:1] == b"{"
        limit = MAX_FILE if json else MAX_MODEL
        with open_input(path, limit) as file:
            return Tokenizer.of(read_bounded(path, file, limit), path)

    @staticmethod
    def of(model: bytes, name: str = "tokenizer") -> "Tokenizer":
        """Return the tokenizer that the bytes of a file are, of whichever kind; TokenizerError."""
        if model[:1] != b"{":  # which no SentencePiece model begins with
            return Tokenizer(model, name)
        # By name, as backends are: what scores an artifact of the challenge has no use for it.
        return importlib.import_module("core.data.tokenizer_json").JsonTokenizer(model, name)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of `text` (int32), without BOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return `encode` of every text, computed on `threads` threads."""
        if self.transform == "none":
            encoded = self._processor.encode(list(texts), num_threads=threads)
        else:
            encoded = self._spell.encode([self._transform(text) for text in texts], num_threads=threads)
        return [np.array(ids, np.int32) for ids in encoded]

    def _transform(self, text: str) -> str:
        return apply_transform(self.normalise(text), self.transform)

    def normalise(self, text: str) -> str:
        """Return what the tokens of a text spell: the text as the model's normalisation leaves it."""
        return self._processor.normalize(text).replace(SPACE, " ").removeprefix(" ")

    def decode(self, ids: Iterable[int] | np.ndarray, *, strict: bool = False) -> str:
        """Return the text of token ids, without control ids such as BOS or a space in front of the first piece.

        The transform is undone. `strict`: TransformError for tokens that no text becomes, as a model may write them.
        ValueError for an id that no piece has.
        """
        plain = checked_ids(ids, self.vocab).tolist()
        return (invert_transform if strict else restore_text)(self._processor.decode(plain), self.transform)

    def piece(self, token: int) -> str:
        """Return a token as it is shown: its letters with their space, or its name: bytes, control tokens, markers."""
        if self.transform != "none" and token in self._markers:
            return SHOWN[self._markers.index(token)]
        return self._processor.id_to_piece(token).replace(SPACE, " ")

    def identity(self, text: str) -> bytes:
        """Return bytes that are equal for texts that become the same tokens, and empty for one that becomes none."""
        if self.byte_pieces:  # tokens spell the normalised text out, which is found ten times faster
            return self._processor.normalize(text).encode()
        return self.encode(text).tobytes()

    @functools.cached_property
    def table_fault(self) -> str | None:
        """Why bytes by the table are not those of the text that tokens spell; None: they are, whatever the text."""
        if not self.byte_pieces:
            return "the tokenizer has no byte pieces: what it does not know would cost nothing"
        spaced = "\ue000 \ue000"  # no model has a piece for it, nor one of the space and it
        charged = self._charged(self.encode(spaced))
        if charged != len(spaced.encode()):
            return f"the tokenizer has no piece for a space alone: it would cost {charged - 6} bytes"
        plain = np.flatnonzero(~self.table.boundary & ~np.array(list(map(self._processor.is_byte, range(self.vocab)))))
        letter = self._processor.piece_to_id("<0x41>")
        spelled = self._processor.decode([[letter, i] for i in plain.tolist()])
        for i, text in zip(plain.tolist(), (restore_text(text, self.transform) for text in spelled), strict=True):
            charged, own = self._charged([letter, i]) - 1, len(text.encode()) - 1
            if charged != own:
                piece = ascii(self._processor.id_to_piece(i))[:40]
                return f"the tokenizer's piece {piece} would cost {charged} bytes and stands for {own}"
        return None

    def _charged(self, ids: Sequence[int] | np.ndarray) -> int:
        stream = np.array([self.bos, *ids])
        return int(token_bytes(self.table, stream[:-1], stream[1:]).sum())

    @functools.cached_property
    def table(self) -> ByteTable:
        """The byte table of the official scripts (docs/challenge.md, 2)."""
        processor = self._processor
        base = np.zeros(self.vocab, np.int32)
        leading = np.zeros(self.vocab, bool)
        boundary = np.zeros(self.vocab, bool)
        for i in range(self.vocab):
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                boundary[i] = True
            elif processor.is_byte(i):
                base[i] = 1
            else:
                piece = processor.id_to_piece(i)
                leading[i] = piece.startswith(SPACE)
                base[i] = len(piece.removeprefix(SPACE).encode())
        if self.transform == "none":
            return ByteTable(base, leading, boundary)
        base[list(self._markers)] = 0
        return ByteTable(base, leading, boundary, self._markers)


def token_bytes(table: ByteTable, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the bytes that each target of consecutive ones costs after its previous token (same shapes, int32).

    An escape that is itself escaped escapes nothing: a run of them counts from the first previous token on.
    """
    charged = table.base[targets] + (table.leading[targets] & ~table.boundary[previous])
    if table.markers:
        place = np.arange(len(previous))
        run = place - np.maximum.accumulate(np.where(previous == table.markers[-1], -1, place))
        charged[(run % 2 == 1) & np.isin(targets, table.markers)] = MARKER_BYTES
    return charged
