"""Shards whose stream is 0, 1, 2 ... modulo 1000."""

from pathlib import Path

import numpy as np

from core.data.bundled import BUNDLED
from core.data.dataset import Split
from core.data.shards import _header, open_shard
from core.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(str(BUNDLED / "tokenizer.model"))


def shards(folder: Path, count: int, each: int) -> Split:
    """Write shards whose stream is 0, 1, 2 ... modulo 1000."""
    paths = [str(folder / f"{i:06d}.bin") for i in range(count)]
    for i, path in enumerate(paths):
        tokens = (np.arange(i * each, (i + 1) * each) % 1000).astype("<u2")
        Path(path).write_bytes(_header(each) + tokens.tobytes())
    return Split([open_shard(path) for path in paths], TOKENIZER, "text")
