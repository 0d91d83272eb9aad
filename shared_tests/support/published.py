"""A small source of published shards, for the tests of core/data/fineweb.py: the layout of the hub, in a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from core.data.bundled import BUNDLED
from core.data.dataset import write_shard
from core.data.hub import Folder
from core.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(str(BUNDLED / "tokenizer.model"))
NAME = "fineweb10B_sp1024"
SHARDS = f"datasets/datasets/{NAME}"
MODEL = "tokenizers/fineweb_1024_bpe.model"


def tokens(first: int) -> np.ndarray:
    """Return the (count,) tokens of five documents."""
    texts = [f"It is a truth universally acknowledged, that {i} is a number." for i in range(first, first + 5)]
    return np.concatenate([np.append(TOKENIZER.bos, TOKENIZER.encode(text)) for text in texts])


def listing(train: int = 3) -> dict[str, Any]:
    """Return the manifest of `layout`."""
    stats = {"files_train": train, "files_val": 1, "tokens_val": len(tokens(0))}
    tokenizer = {"name": "sp_bpe_1024", "model_path": MODEL, "vocab_path": MODEL.replace(".model", ".vocab")}
    byte260 = {"name": "pure_byte_260", "path": "tokenizers/byte260.json"}
    datasets = [
        {"name": NAME, "tokenizer_name": "sp_bpe_1024", "stats": stats},
        {"name": "fineweb10B_sp512", "tokenizer_name": "sp_bpe_1024", "stats": stats},
        {"name": "fineweb10B_byte260", "tokenizer_name": "pure_byte_260", "stats": stats},
    ]
    return {"datasets": datasets, "tokenizers": [tokenizer, byte260]}


def layout(root: Path, train: int = 3, shift: int = 0) -> str:
    """Write one validation shard and `train` training shards below `root`; `shift` gives other training text."""
    folder = root / SHARDS
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(str(folder / "fineweb_val_000000.bin"), tokens(0))
    for i in range(train):
        write_shard(str(folder / f"fineweb_train_{i:06d}.bin"), tokens(100 * (i + 1) + shift))
    model = root / "datasets" / MODEL
    model.parent.mkdir(exist_ok=True)
    model.write_bytes(TOKENIZER.model)
    (root / "datasets" / "manifest.json").write_text(json.dumps(listing(train)))
    return str(root)


class Watched(Folder):
    """A folder that notes what is fetched, and does something on the way with the file of a name."""

    def __init__(self, folder: str, meddle: dict[str, Any] | None = None, revision: str | None = None) -> None:
        super().__init__(folder)
        self.fetched: list[str] = []
        self.meddle, self.revision = meddle or {}, revision

    def fetch(self, path: str, scratch: Path) -> Path:
        """Copy, note, meddle."""
        file = super().fetch(path, scratch)
        if not path.endswith("manifest.json"):
            self.fetched.append(file.name)
        if file.name in self.meddle:
            self.meddle[file.name](file)
        return file
