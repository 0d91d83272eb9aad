"""One self-contained program of a preset: it trains, exports and scores without a checkout."""

import base64
import io
import json
import lzma
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from core import ROOT
from core.config import RunConfig, to_json
from core.files import read_text
from core.model import trunk
from core.submission.bare import bare
from core.submission.shaking import ENTRY, Shaken

Form = Literal["text", "zip"]
LOADER = Path(ROOT, "core", "submission", "loader.py")
HEAD = "# Trains, exports and scores: torchrun --standalone --nproc_per_node=8 train_gpt.py\n"
ENTRIES = {
    "cuda": "from backends.cuda.engine import build\nfrom backends.cuda.distributed import join\n",
    "mlx": "from backends.mlx.blas import load_fast_blas\nload_fast_blas()\n"
    "from backends.mlx.engine import build\nfrom backends.mlx.distributed import join\n",
}
STORED = zipfile.ZipInfo("p", (1980, 1, 1, 0, 0, 0))


def pack(config: RunConfig, backend: str, form: Form = "text", **options: Any) -> bytes:
    """Return the program that runs `config` on a backend (cuda or mlx), as a file; `options`: of EngineOptions."""
    settings = json.dumps({"config": to_json(config), "options": options}, separators=(",", ":"))
    texts = sources(entry(backend, settings, form), absent(config, backend))
    parts = [minified(bare(parsed(read_text(LOADER)))), texts.pop(ENTRY)]
    for name, text in texts.items():
        parts += [name, text]
    data = compressed("\0".join(parts).encode())
    return zipped(data) if form == "zip" else written(data)
