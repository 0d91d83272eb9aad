"""Texts to prepare, and what came of them."""

import json
from pathlib import Path

from core.data.bundled import BUNDLED
from core.data.dataset import Dataset

MODEL = str(BUNDLED / "tokenizer.model")


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def words(start: int, stop: int) -> list[str]:
    return [f"This is document number {i}, and it says {i * i}." for i in range(start, stop)]


def documents(dataset: Dataset, name: str) -> list[str]:
    split = dataset.train if name == "train" else dataset.val
    starts = [*split.document_starts.tolist(), len(split)]
    return [dataset.tokenizer.decode(split.read(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
