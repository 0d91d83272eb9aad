"""What a source publishes, by its manifest.json: input from outside, so sizes, types and paths are checked."""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from core.data.hub import Folder, Remote, Source, check_file
from core.data.shards import DataError
from core.files import FileError, decode, parse_json, read_file

PREFIX = "datasets"
ELSEWHERE = "others publish some: kevclark/parameter-golf (sp4096, sp8192), sproos/parameter-golf-tokenizers (sp8192)"
MAX_MANIFEST = 1 << 24
"""Bytes, of the tokenizer too."""
MAX_SHARDS = 100_000


class Listing(NamedTuple):
    """What a source's manifest says of one variant."""

    train: int
    """Training shards that are published."""
    val: int
    model: str
    """Path of the SentencePiece model, below the prefix."""
    val_tokens: int | None
    sha256: str
    """Of the manifest itself."""


def _safe(path: Any, what: str) -> str:
    """Return a path of a manifest or an option if it stays below the folder that it is joined to."""
    parts = path.split("/") if isinstance(path, str) else []
    odd = (
        not parts or len(path) > 300 or any(part in ("", ".", "..") for part in parts)
    )  # an absolute one begins with ""
    if odd or not re.fullmatch(r"[\w./ -]+", path):
        raise DataError(f"{what}: {str(path)[:80]!r}: expected a relative path without '..'")
    return path


def top_folder(source: Source, prefix: str | None) -> str:
    """Return the folder that everything lies in: None is `datasets`, or "" where a local folder has its manifest at the
    top.
    """
    if prefix is None:
        top = isinstance(source, Folder) and not source.find([f"{PREFIX}/manifest.json"])
        return "" if top else PREFIX
    return _safe(prefix.strip("/"), "prefix") if prefix.strip("/") else ""


def _join(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path


def read_listing(source: Source, prefix: str, variant: str) -> Listing:
    """Read a source's manifest; DataError if it is none, has no such variant, or names an odd path."""
    path = _join(prefix, "manifest.json")
    where = f"{source.name}: {path}"
    remote = source.find([path]).get(path)
    if remote is None:
        raise DataError(f"{where}: not there; give the source's --repo and --prefix, or --from a folder laid out so")
    if remote.size > MAX_MANIFEST:
        raise DataError(f"{where}: {remote.size} bytes, expected at most {MAX_MANIFEST}; this is no manifest")
    with tempfile.TemporaryDirectory() as scratch:
        file = source.fetch(path, Path(scratch))
        sha256 = check_file(file, remote, source.name)
        try:
            manifest = parse_json(where, decode(where, read_file(file, MAX_MANIFEST)))
        except FileError as error:
            raise DataError(str(error)[:300]) from error
    names, dataset = _named(manifest, "datasets", f"fineweb10B_{variant}", where)
    if dataset is None:
        raise DataError(f"{where}: no variant {variant}; it has {names}; {ELSEWHERE}")
    stats = dataset.get("stats")
    counts = []
    for key in ("files_train", "files_val"):
        count = stats.get(key) if isinstance(stats, dict) else None
        if type(count) is not int or not 1 <= count <= MAX_SHARDS:
            shown = str(count)[:40]
            raise DataError(f"{where}: {dataset['name']}: stats.{key}: {shown}, expected from 1 to {MAX_SHARDS}")
        counts.append(count)
    tokens = stats.get("tokens_val") if isinstance(stats, dict) else None
    names, entry = _named(manifest, "tokenizers", dataset.get("tokenizer_name"), where)
    if entry is None:
        raise DataError(
            f"{where}: tokenizer_name: {str(dataset.get('tokenizer_name'))[:80]!r}: expected one of {names}"
        )
    model = _safe(entry.get("model_path"), f"{where}: {entry['name']}: model_path")
    return Listing(counts[0], counts[1], model, tokens if type(tokens) is int else None, sha256)


def _named(manifest: Any, key: str, name: Any, where: str) -> tuple[str, dict[str, Any] | None]:
    """Return the names in a list of the manifest, for a message, and the entry that has the name asked for."""
    entries = manifest.get(key) if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise DataError(f"{where}: {key}: expected a list of objects with a name")
    names = ", ".join(entry["name"] for entry in entries)[:300] or "none"
    return names, next((entry for entry in entries if entry["name"] == name), None)


def listed_files(source: Source, prefix: str, variant: str, listing: Listing, train: int) -> dict[str, Remote]:
    """Return the name that each file gets here -> the file at the source; DataError if one is listed but not there."""
    folder = _join(prefix, f"datasets/fineweb10B_{variant}")
    paths = {"tokenizer.model": _join(prefix, listing.model)}
    for split, count in (("val", listing.val), ("train", train)):
        for i in range(count):
            paths[f"fineweb_{split}_{i:06d}.bin"] = f"{folder}/fineweb_{split}_{i:06d}.bin"
    there = source.find(list(paths.values()))
    missing = [path for path in paths.values() if path not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise DataError(
            f"{source.name}: {missing[0]}{more}: the manifest lists it, but it is not published; take another variant "
            f"or repository; {ELSEWHERE}"
        )
    files = {local: there[path] for local, path in paths.items()}
    if files["tokenizer.model"].size > MAX_MANIFEST:
        raise DataError(f"{source.name}: {listing.model}: over {MAX_MANIFEST} bytes; this is no tokenizer")
    return files
