"""Reads a program as it is shipped, packed or not: never runs it."""

import base64
import binascii
import bz2
import io
import itertools
import json
import lzma
import re
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from core import PYTHON

MAX_UNPACKED = 32 << 20
MAX_MEMBERS = 500
MAX_LITERALS = 20
MAX_LEVELS = 3
COMPILE_SECONDS = 60
LITERAL = re.compile(r"""(["'])([^\s"']{200,})\1""")
"""A long text without spaces: what packed programs hold their source in."""
SEAM = re.compile(r"""(["'])\s{0,8}\1""")
"""Where one text goes on in the next."""
ESCAPED = re.compile(r"\\([\\\"'])")
COMPILE = """
import json, resource, sys, warnings
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
warnings.simplefilter("ignore")
for name, text in json.load(sys.stdin):
    try:
        compile(text, name, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        line = getattr(error, "lineno", None)
        sys.exit(f"{name}: {type(error).__name__}: {getattr(error, 'msg', None) or error} (line {line})"[:300])
"""


@dataclass(frozen=True)
class Unpacked:
    """What a program's file holds."""

    form: str
    """text, packed text or zip."""
    texts: tuple[str, ...]
    """Sources, the outermost first."""
    names: tuple[str, ...]
    problems: tuple[str, ...] = ()


def unpack_program(data: bytes) -> Unpacked:
    """Return the sources in a program's file: a script, one that unpacks itself, or a zip that Python runs."""
    if zipfile.is_zipfile(io.BytesIO(data)) and b"PK\x03\x04" in data[: 1 << 16]:
        return _unzip(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Unpacked("text", (), (), (f"is not UTF-8 (byte {error.start})",))
    texts, names, inner = [text], ["train_gpt.py"], [text]
    for level in range(MAX_LEVELS):
        inner = _inner(inner)
        if sum(map(len, texts)) + sum(map(len, inner)) > MAX_UNPACKED:
            return Unpacked("packed text", (), (), (f"unpacks to over {MAX_UNPACKED:,} letters",))
        texts += inner
        names += [f"unpacked {level + 1}.{i + 1}" for i in range(len(inner))]
    return Unpacked("packed text" if len(texts) > 1 else "text", tuple(texts), tuple(names))


def _unzip(data: bytes) -> Unpacked:
    """Return the sources of a zip, with bounds on their number and sizes."""
    texts, names, left = [], [], MAX_UNPACKED
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(archive.infolist()) > MAX_MEMBERS:
                return Unpacked("zip", (), (), (f"over {MAX_MEMBERS} members",))
            for info in sorted(members, key=lambda info: info.filename != "__main__.py"):
                with archive.open(info) as file:
                    content = file.read(left + 1)
                if len(content) > left or left < 0:
                    return Unpacked("zip", (), (), (f"unpacks to over {MAX_UNPACKED:,} bytes",))
                sources = [content.decode("utf-8-sig")] if info.filename.endswith(".py") else _decompressed(content)
                left -= max(len(content), sum(map(len, sources)))
                texts += sources
                names += [info.filename[:200]] * len(sources)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, ValueError, OSError, EOFError,
            NotImplementedError, RuntimeError, KeyError) as error:  # fmt: skip
        return Unpacked("zip", (), (), (f"is a damaged zip: {error}"[:200],))
    problems = () if "__main__.py" in names else ("has no __main__.py, so that Python cannot run it",)
    return Unpacked("zip", tuple(texts), tuple(names), problems)


def _inner(texts: list[str]) -> list[str]:
    """Return the sources that texts hold, compressed, in long literals; a little over MAX_UNPACKED letters at most."""
    sources: list[str] = []
    literals = itertools.chain.from_iterable(LITERAL.finditer(SEAM.sub("", text)) for text in texts)
    for match in itertools.islice(literals, MAX_LITERALS):
        if sum(map(len, sources)) > MAX_UNPACKED:
            break
        literal = ESCAPED.sub(r"\1", match[2]).encode("ascii", "replace")
        for decode in (base64.b85decode, _base64, base64.a85decode):
            try:
                inner = _decompressed(decode(literal))
            except (ValueError, binascii.Error):
                continue
            if inner:
                sources += inner
                break
    return sources


def _base64(data: bytes) -> bytes:
    return base64.b64decode(data, validate=True)


def _decompressed(data: bytes) -> list[str]:
    """Return the texts of a compressed stream, by whichever method it was, or none."""
    raw = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}]
    methods: list[Callable[[], bytes]] = [
        lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=1 << 28).decompress(data, MAX_UNPACKED),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw).decompress(data, MAX_UNPACKED),
        lambda: zlib.decompressobj().decompress(data, MAX_UNPACKED),
        lambda: zlib.decompressobj(-15).decompress(data, MAX_UNPACKED),
        lambda: bz2.BZ2Decompressor().decompress(data, MAX_UNPACKED),
    ]
    for method in methods:
        try:
            text = method().decode("utf-8")
        except (lzma.LZMAError, zlib.error, OSError, ValueError, EOFError):
            continue
        if len(text) > 100:
            return text.split("\0")[:MAX_MEMBERS]  # several modules in one stream, as our programs have them
    return []


def compile_problem(unpacked: Unpacked) -> str:
    """Return why some source does not compile, or an empty text; a process of its own compiles, none is run."""
    sources = json.dumps(list(zip(unpacked.names, unpacked.texts, strict=True)))
    try:
        done = subprocess.run(
            [*PYTHON, "-I", "-S", "-c", COMPILE], input=sources, capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"did not compile in {COMPILE_SECONDS} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.strip().split("\n") if line.strip()]
    return lines[-1][:300] if lines else f"the compiler ended with {done.returncode}"
