"""SentencePiece tokenizers: loading, encoding, and the byte table that bits per byte rests on."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from core.files import open_input, read_bounded

MAX_VOCAB = 65_535
MAX_MODEL = 1 << 24
"""Bytes of a .model file."""
SPACE = "\u2581"


class TokenizerError(ValueError):
    """The tokenizer cannot be used or trained: the message says why."""


class ByteTable(NamedTuple):
    """What a token costs in bytes, by id."""

    base: np.ndarray  # (V,) int32: bytes of the piece without its leading space
    leading: np.ndarray  # (V,) bool: the piece starts with a space, which costs one byte unless it follows a boundary
    boundary: np.ndarray  # (V,) bool: control, unknown and unused pieces


class Tokenizer:
    """A SentencePiece model; TokenizerError if it is not one, has no BOS id or too many pieces for uint16 shards."""

    model: bytes
    sha256: str
    vocab: int
    bos: int
    unknown: int
    byte_pieces: bool
    """All 256 byte pieces are there: no text becomes unknown."""

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        try:
            if not model:
                raise RuntimeError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, TypeError) as error:
            raise TokenizerError(f"{name}: not a SentencePiece model; give the .model file of a tokenizer") from error
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

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Read a `.model` file; OSError, FileError or TokenizerError."""
        with open_input(path, MAX_MODEL) as file:
            return cls(read_bounded(path, file, MAX_MODEL), path)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of `text` (int32), without BOS."""
        return np.array(self._processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return `encode` of every text, computed on `threads` threads."""
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts), num_threads=threads)]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids, without control ids such as BOS or a space in front of the first piece.

        ValueError for an id that no piece has.
        """
        plain = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).ravel()
        outside = plain[(plain < 0) | (plain >= self.vocab)]
        if outside.size:
            raise ValueError(f"token id {outside[0]}: expected from 0 to {self.vocab - 1}")
        return self._processor.decode(plain.tolist())

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
        for i, text in zip(plain.tolist(), self._processor.decode([[letter, i] for i in plain.tolist()]), strict=True):
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
        return ByteTable(base, leading, boundary)


def token_bytes(table: ByteTable, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the bytes that each target costs after its previous token (same shapes, int32)."""
    return table.base[targets] + (table.leading[targets] & ~table.boundary[previous])
