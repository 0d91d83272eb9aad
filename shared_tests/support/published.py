"""A small source of published shards, for the tests of core/data/fineweb.py: the layout of the hub, in a folder."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from core.data.bundled import BUNDLED
from core.data.dataset import write_shard
from core.data.fineweb import Folder
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


class FakeHub:
    """What core/data/fineweb.py calls of huggingface_hub, for one repository that lies in a folder.

    `fetched` lists the names of downloaded files, manifests left out; a file named in `meddle` is spoilt on its way.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: str) -> None:
        self.folder, self.commit, self.fetched = Folder(root), "a" * 40, []
        self.meddle: dict[str, Any] = {}
        patch.setattr(huggingface_hub, "HfApi", lambda: self)
        patch.setattr(huggingface_hub, "snapshot_download", self.download)

    def dataset_info(self, repo: str, revision: str) -> SimpleNamespace:
        """Return the commit of `main`."""
        assert revision == "main"
        return SimpleNamespace(sha=self.commit)

    def list_repo_tree(self, repo_id: str, **options: Any) -> list[SimpleNamespace]:
        """Return folders and files; of shards the SHA-256, as the hub keeps them in LFS."""
        assert options == {"recursive": True, "repo_type": "dataset", "revision": self.commit}
        entries = []
        for place in Path(self.folder.folder).rglob("*"):
            entry = SimpleNamespace(path=str(place.relative_to(self.folder.folder)))
            if place.is_file():
                sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
                entry.size, entry.lfs = place.stat().st_size, None
                if place.suffix == ".bin":
                    entry.lfs = SimpleNamespace(sha256=sha256)
            entries.append(entry)
        return entries

    def download(self, repo_id: str, *, allow_patterns: list[str], local_dir: Path, **options: Any) -> None:
        """Copy the files that are there."""
        assert options == {"repo_type": "dataset", "revision": self.commit}
        for path in allow_patterns:
            place = Path(local_dir, path)
            self.folder.fetch([path], Path(local_dir))
            if place.name != "manifest.json":
                self.fetched.append(place.name.replace("fineweb_1024_bpe.model", "tokenizer.model"))
            if place.name in self.meddle:
                self.meddle[place.name](place)
