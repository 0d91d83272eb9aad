"""tokenizer.json of Hugging Face: byte-level BPE (GPT-2, Llama 3, Qwen), of which every token has exact bytes.

The library `tokenizers` gets a file that is written anew from the parts that were checked here, and what it makes of a
text is compared with the text: tokens that spell anything else are an error.
"""

import functools
import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from core.data.byte_table import ByteTable, TokenizerError, checked_ids
from core.data.column import DataError
from core.data.transform import Transform
from core.files import FileError, decode_text, parse_json
from core.formats.kinds import ANYTHING, FLAG, Kind, check_value, whole
from core.formats.kinds import text as text_of

MOST = 1 << 20
"""Largest vocabulary, as of a model."""
MOST_VALUES = 1 << 22
"""Values of such a file: merges of two texts each for every entry of a vocabulary."""
STARTS = ("<|endoftext|>", "<|begin_of_text|>")
"""Control tokens that stand between documents, the first of these that a tokenizer has."""
FIELD = b', "skc": {"vocab": %d}}'
"""How a file of ours says that the model's vocabulary is larger: at its end, where it is found again."""
PROBE = "It's 1234\r\n\n  \tZürich → 東京 е́ \U0001f642\x00\x7f<|>\u2028ﬁ  "
CURE = "give the tokenizer.json of a byte-level BPE model"
ID = whole(f"a whole number from 0 to {MOST - 1}", 0, MOST - 1)
ADDED = {"id": ID, "content": text_of(1024), "special": FLAG, "lstrip?": FLAG, "rstrip?": FLAG, "single_word?": FLAG,
         "normalized?": FLAG}  # fmt: skip
MODEL = {"type?": text_of(64), "vocab": {"*": ID}, "merges": [ANYTHING], "ignore_merges?": FLAG, "*": ANYTHING}
UNUSED = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
"""What a byte-level BPE has no use for, and what would make tokens of something else than bytes."""
WHOLE = {
    "model": MODEL, "added_tokens??": [ADDED], "normalizer??": {"type": text_of(64), "*": ANYTHING},
    "pre_tokenizer": {"type": text_of(64), "*": ANYTHING}, "skc?": {"vocab": whole(f"1 to {MOST}", 1, MOST)},
    "*": ANYTHING,
}  # fmt: skip
SPLIT: Kind = {"type": text_of(64), "pattern": {"Regex": text_of(4096)}, "behavior": text_of(64), "invert": FLAG}
LEVEL: Kind = {"type": text_of(64), "add_prefix_space": FLAG, "trim_offsets?": FLAG, "use_regex?": FLAG}


def _letters() -> dict[str, int]:
    """Return the letter that byte-level BPE writes for each byte: itself if it is printable Latin-1, else U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _letters()


def byte_tokenizer() -> bytes:
    """Return the tokenizer.json of the byte-level vocabulary: token i is byte i, and <|endoftext|> is token 256."""
    start = {"id": 256, "content": STARTS[0], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = dict(sorted(LETTERS.items(), key=lambda pair: pair[1]))
    file = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [start], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    return json.dumps(file).encode()


class JsonTokenizer:
    """A byte-level BPE out of a tokenizer.json; TokenizerError in one line for a file that is anything else.

    One whose tokens are single bytes needs no library. It has the methods and fields of
    `core.data.tokenizer.Tokenizer`. `bos`, which stands in front of every document, is its <|endoftext|> or
    <|begin_of_text|>. Nothing is unknown, and `unknown` is -1. A control token that a text spells
    out is text.
    """

    spaced = False

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        file = parse_tokenizer(model, name)
        self._bytes, self._control = token_spellings(file, name)
        self.model, self.sha256 = model, hashlib.sha256(model).hexdigest()
        self.transform: Transform = "none"
        self.vocab = file.get("skc", {}).get("vocab", len(self._bytes))
        if self.vocab < len(self._bytes):
            refuse_tokenizer(name, f"skc: vocab: {self.vocab}, but it has tokens up to {len(self._bytes) - 1}")
        by_content = {added["content"]: added["id"] for added in file.get("added_tokens") or () if added["special"]}
        starts = [by_content[start] for start in STARTS if start in by_content]
        if not starts:
            refuse_tokenizer(name, f"no control token {' or '.join(STARTS)}, so documents have no start")
        self.bos, self.unknown, self.byte_pieces = starts[0], -1, True
        self._single = single_bytes(file, self._bytes, self._control)
        self._tokenizer: Any = None if self._single is not None else build_tokenizer(file, name)
        self.encode(PROBE)

    def transformed(self, transform: Transform, name: str = "tokenizer") -> "JsonTokenizer":
        """Return it for `none`; TokenizerError for a transform, for whose markers it has no pieces."""
        if transform == "none":
            return self
        raise TokenizerError(f"{name}: a tokenizer.json has no markers for --transform {transform}: leave that out")

    def widened(self, vocab: int, name: str = "tokenizer") -> "JsonTokenizer":
        """Return the tokenizer of a model with `vocab` entries, the last of which no text becomes; TokenizerError."""
        if self.vocab == vocab:
            return self
        if b'"skc"' in self.model[-64:] or vocab < self.vocab:
            refuse_tokenizer(name, f"has {self.vocab:,} tokens, the model {vocab:,}: it is not the model's own")
        return JsonTokenizer(self.model.rstrip()[:-1] + FIELD % vocab, name)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of `text` (int32), without BOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return the token ids of every text (int32); TokenizerError if they spell another text."""
        if self._single is not None:
            return [self._single[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        try:
            if threads == 1:
                ids = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            else:
                encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
                ids = [each.ids for each in encoded]
        except Exception as error:  # tokenizers has no type of its own: a pattern that cannot be matched, say
            raise TokenizerError(f"tokenizer.json: {' '.join(str(error).split())[:200]}; {CURE}") from error
        for text, row in zip(texts, ids, strict=True):
            spelled = b"".join(self._bytes[i] for i in row)
            if spelled != text.encode() and self._same(spelled) != self._same(text.encode()):
                raise TokenizerError(f"tokenizer.json: does not spell {ascii(text[:40])} as it is written; {CURE}")
        return [np.array(row, np.int32) for row in ids]

    def _same(self, spelled: bytes) -> str:
        return self.normalise(spelled.decode("utf-8", "replace"))

    def normalise(self, text: str) -> str:
        """Return what the tokens of a text spell: the text, in Unicode's form NFC where the file asks for that."""
        normaliser = self._tokenizer and self._tokenizer.normalizer
        return text if normaliser is None else normaliser.normalize_str(text)

    def decode(self, ids: Iterable[int] | np.ndarray, *, strict: bool = False) -> str:
        """Return the text of token ids, without control tokens; bytes that are no UTF-8 become U+FFFD. ValueError."""
        plain = checked_ids(ids, self.vocab)
        spelled = b"".join(self._bytes[i] for i in plain.tolist() if i < len(self._bytes) and not self._control[i])
        return spelled.decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """Return a token as it is shown: its letters, or the names of its bytes where they are no UTF-8."""
        spelled = self._bytes[token] if token < len(self._bytes) else b""
        letters = spelled.decode("utf-8", "surrogateescape")
        return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in letters)

    def identity(self, text: str) -> bytes:
        """Return bytes that are equal for texts that become the same tokens."""
        return self.normalise(text).encode()

    @functools.cached_property
    def table_fault(self) -> str | None:
        """None: a token costs the bytes that it is made of."""
        return None

    @functools.cached_property
    def table(self) -> ByteTable:
        """The bytes of every token; control tokens, and entries that no text becomes, cost nothing."""
        base, boundary = np.zeros(self.vocab, np.int32), np.ones(self.vocab, bool)
        boundary[: len(self._bytes)] = self._control
        base[: len(self._bytes)] = list(map(len, self._bytes))
        base[boundary] = 0
        return ByteTable(base, np.zeros(self.vocab, bool), boundary)


def refuse_tokenizer(name: str, problem: str) -> NoReturn:
    """Raise TokenizerError."""
    raise TokenizerError(f"{name}: {problem}; {CURE}")


def parse_tokenizer(model: bytes, name: str) -> dict[str, Any]:
    """Return what a file says, once all that is read of it has its type and means bytes."""
    try:
        file = parse_json(name, decode_text(name, model), MOST_VALUES)
        check_value(file, WHOLE, name, CURE)
        pretokenisers = _steps(file["pre_tokenizer"])
        for step in pretokenisers[:-1]:
            check_value(step, SPLIT, f"{name}: pre_tokenizer", CURE)
        check_value(pretokenisers[-1], LEVEL, f"{name}: pre_tokenizer", CURE)
    except FileError as error:
        raise TokenizerError(str(error)) from error
    kind, normaliser = file["model"].get("type", "BPE"), (file.get("normalizer") or {}).get("type", "NFC")
    if kind != "BPE":
        refuse_tokenizer(name, f"model: type: {ascii(kind)[:40]}, expected BPE")
    for key in UNUSED:
        if file["model"].get(key) not in (None, "", False):
            refuse_tokenizer(name, f"model: {key}: {ascii(file['model'][key])[:40]}, expected none")
    if normaliser != "NFC":
        refuse_tokenizer(name, f"normalizer: {ascii(normaliser)[:40]}, expected none or NFC")
    level = pretokenisers[-1]
    if level["type"] != "ByteLevel" or level["add_prefix_space"]:
        refuse_tokenizer(name, "pre_tokenizer: expected ByteLevel as its last step, without add_prefix_space")
    for step in pretokenisers[:-1]:
        if step["type"] != "Split" or step["behavior"] == "Removed":
            what = ascii((step["type"], step["behavior"]))[:60]
            refuse_tokenizer(name, f"pre_tokenizer: {what}, expected Split steps that remove nothing")
    for merge in file["model"]["merges"]:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if type(halves) is not list or len(halves) != 2 or not all(type(half) is str for half in halves):
            refuse_tokenizer(name, f"model: merges: {ascii(merge)[:40]}, expected two texts")
    for added in file.get("added_tokens") or ():
        if not added["special"] and (added.get("lstrip") or added.get("rstrip") or added.get("single_word")):
            refuse_tokenizer(
                name, f"added_tokens: {ascii(added['content'])[:40]}: takes spaces away, expected none that does"
            )
    return file


def _steps(pretokeniser: dict[str, Any]) -> list[Any]:
    steps = pretokeniser.get("pretokenizers") if pretokeniser["type"] == "Sequence" else [pretokeniser]
    return steps if type(steps) is list and steps else [None]


def token_spellings(file: dict[str, Any], name: str) -> tuple[list[bytes], list[bool]]:
    """Return the bytes of every token, by id, and whether it is a control token or no token at all."""
    vocab, added = file["model"]["vocab"], file.get("added_tokens") or []
    contents = {each["id"]: each["content"] for each in added}
    size = 1 + max([*vocab.values(), *contents], default=-1)
    spelled, control = [b""] * size, [True] * size
    for token, i in vocab.items():
        if not control[i]:
            refuse_tokenizer(name, f"model: vocab: {ascii(token)[:40]}: id {i} is another token's too")
        control[i] = False
        if i in contents:
            continue
        try:
            spelled[i] = bytes(LETTERS[letter] for letter in token)
        except KeyError:
            refuse_tokenizer(name, f"model: vocab: {ascii(token)[:40]} is not in the letters of byte-level BPE")
    missing = [byte for letter, byte in LETTERS.items() if letter not in vocab]
    if missing:
        refuse_tokenizer(name, f"model: vocab: no token for the byte {missing[0]:#04x}")
    for each in added:
        i, content = each["id"], each["content"]
        if (
            not content
            or contents[i] != content
            or vocab.get(content, i) != i
            or (not control[i] and content not in vocab)
        ):
            refuse_tokenizer(name, f"added_tokens: {ascii(content)[:40]}: id {i} is another token's too")
        spelled[i], control[i] = content.encode("utf-8", "replace"), each["special"]
    return spelled, control


def single_bytes(file: dict[str, Any], spelled: list[bytes], control: list[bool]) -> np.ndarray | None:
    """Return the token of every byte, (256,) int32, where no token is of several bytes: nothing is left to merge."""
    tokens = {spelled[i]: i for i in range(len(spelled)) if not control[i]}
    if file.get("normalizer") or len(tokens) != 256 or max(map(len, tokens)) > 1:
        return None
    return np.array([tokens[bytes([byte])] for byte in range(256)], np.int32)


def build_tokenizer(file: dict[str, Any], name: str) -> Any:
    """Return the library's tokenizer of the parts of a file that were checked."""
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        command = "pip install -c constraints.txt -e '.[hf]'"
        raise DataError(f"{name}: a tokenizer.json needs tokenizers, which is not installed; run: {command}") from error
    model = {key: file["model"][key] for key in ("vocab", "merges", "ignore_merges") if key in file["model"]}
    parts = {key: file.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}
    parts["added_tokens"] = [
        {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **each}
        for each in parts["added_tokens"] or ()
    ]
    whole = {"version": "1.0", "truncation": None, "padding": None, **parts, "post_processor": None, "decoder": None}
    try:
        tokenizer = library.Tokenizer.from_str(json.dumps({**whole, "model": {"type": "BPE", **model}}))
    except Exception as error:  # tokenizers has no type of its own
        refuse_tokenizer(name, " ".join(str(error).split())[:200])
    tokenizer.encode_special_tokens = True  # a text that spells a control token out is no end of a document
    for each in parts["added_tokens"]:
        if tokenizer.id_to_token(each["id"]) != each["content"]:
            refuse_tokenizer(
                name, f"added_tokens: {ascii(each['content'])[:40]}: id {each['id']}, expected the next free one"
            )
    return tokenizer
