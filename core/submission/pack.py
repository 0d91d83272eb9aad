"""One self-contained program of a preset: it trains, exports and scores without a checkout."""

import ast
import base64
import bz2
import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import python_minifier

from core import ROOT
from core.config import ExportConfig, RunConfig, chosen
from core.files import read_text
from core.submission.bare import bare
from core.submission.folding import Folding
from core.submission.known import absent, known_values
from core.submission.linking import linked
from core.submission.shaking import ENTRY, Shaken

Form = Literal["text", "zip"]
LOADER = Path(ROOT, "core", "submission", "loader.py")
HEAD = (
    "# Trains, exports and scores: torchrun --standalone --nproc_per_node=8 train_gpt.py (DATA_PATH, TOKENIZER_PATH)\n"
)
ENTRIES = {
    "cuda": "from backends.cuda.engine import build\nfrom backends.cuda.distributed import join\n",
    "mlx": "from backends.mlx.blas import load_fast_blas\nload_fast_blas()\n"
    "from backends.mlx.engine import build\nfrom backends.mlx.distributed import join\n",
}
"""What a program begins with, by backend: before MLX comes a fast BLAS."""
SPEAKING = ("core.submission.program", "core.data.unlisted", "core.training.loop")
"""Modules whose errors keep their words: what a user of the program can mend."""


def pack_program(config: RunConfig, backend: str, form: Form = "text", **options: Any) -> bytes:
    """Return the program that runs `config` on a backend (cuda or mlx), as a file; `options`: of EngineOptions."""
    # The program knows its own size: here stands what every program has alike.
    code = min(ExportConfig.code_bytes, config.export.budget - 1)
    export = dataclasses.replace(config.export, code_bytes=code)
    data = type(config.data)()  # a place of this machine: the program reads DATA_PATH
    texts = program_sources(dataclasses.replace(config, export=export, data=data), backend, form, options)
    start = texts.pop(ENTRY)
    texts, alone = linked(texts)
    parts = [minified(bare(ast.parse(read_text(LOADER)))), start, alone]
    parts += [part for name, text in texts.items() if text for part in (name, text)]
    data = bz2.compress("\0".join(parts).encode())
    return _zipped(data) if form == "zip" else _written(data)


def program_sources(config: RunConfig, backend: str, form: Form, options: dict[str, Any]) -> dict[str, str]:
    """Return module -> what a program needs of its text; its entry is one of them."""
    settings = json.dumps({"config": chosen(config), "options": options}, separators=(",", ":"))
    call = f"start_program(build, join, FILE, {form!r}, {settings!r})\n"
    entry = f"from core.submission.program import start_program\n{call}"
    folder = Folding(config, known_values(config, backend))

    def changed(name: str, tree: ast.Module) -> ast.Module:
        return folder.folded(name, bare(tree, name in SPEAKING))

    shaken = Shaken(ENTRIES[backend] + entry, absent(config, backend), changed)
    return {name: minified(shaken.text(name)) for name in sorted(shaken.modules)}


def minified(tree: ast.Module) -> str:
    """Return a module's text with short names of local variables; Triton's kernels keep theirs."""
    text = ast.unparse(tree)
    return python_minifier.minify(
        text,
        remove_annotations=False,
        remove_literal_statements=True,
        hoist_literals=False,
        rename_locals="triton" not in text,
        rename_globals=False,
    )


def _written(data: bytes) -> bytes:
    """Return the program as text: its line holds everything in base85."""
    text = base64.b85encode(data).decode()
    unpack = 'import base64,bz2\nFILE=__file__\nPARTS=bz2.decompress(base64.b85decode(DATA)).decode().split("\\0")'
    return f'{HEAD}DATA="{text}"\n{unpack}\nexec(PARTS[0])\n'.encode()


def _zipped(data: bytes) -> bytes:
    """Return the program as a zip file, which Python runs as well; the same settings give the same bytes."""
    unpack = 'import bz2,zipfile\nFILE=__file__[:-12]\nPARTS=bz2.decompress(zipfile.ZipFile(FILE).read("p"))'
    members = {"__main__.py": f'{unpack}.decode().split("\\0")\nexec(PARTS[0])\n'.encode(), "p": data}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, member in members.items():
            file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), member)
    return buffer.getvalue()
