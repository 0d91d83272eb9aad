"""Small byte-level BPE tokenizers, as the library `tokenizers` writes them into a tokenizer.json."""

import functools
import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from shared_tests.support.harness import LINES

TEXT = [
    *LINES,
    *["It is a truth universally acknowledged, that a single man in possession of a good fortune must be"] * 3,
]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen's tokenizer cuts a text before the merges."""


@functools.cache
def qwen_like(vocab: int = 320) -> bytes:
    """Return the tokenizer.json of a BPE with Qwen's steps and control tokens, trained on a few lines."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab - 3, show_progress=False, initial_alphabet=letters)
    tokenizer.train_from_iterator(TEXT, trainer)
    assert tokenizer.get_vocab_size() == vocab - 3
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer.to_str().encode()


def changed_json(*path: Any, value: Any) -> bytes:
    """Return such a file with another value at a path of keys."""
    file = json.loads(qwen_like())
    inner = file
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(file).encode()
