"""The published FineWeb shards of the challenge: fetched, checked, and made a folder that `open_dataset` opens.

A source holds PREFIX/manifest.json, PREFIX/datasets/fineweb10B_VARIANT/fineweb_{train,val}_%06d.bin and
PREFIX/tokenizers/. What it says is input from outside. huggingface_hub downloads, retries and resumes.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from core.data.adopt import adopt_shards
from core.data.corpus import library
from core.data.making import find_manifest, making
from core.data.manifest import MANIFEST, MAX_MANIFEST, MAX_SHARDS, TEXT
from core.data.prepare import Progress
from core.data.published import TRAIN_SHARDS
from core.data.shards import DataError, file_sha256, open_shard
from core.data.tokenizer import Tokenizer
from core.files import FileError, new_file, open_file, place_file, read_json
from core.formats.kinds import ANYTHING, COUNT, Leaf, check_value, whole

REPO = "willdepueoai/parameter-golf"
ELSEWHERE = "others publish some: kevclark/parameter-golf (sp4096, sp8192), sproos/parameter-golf-tokenizers (sp8192)"
SPARE = 1 << 26
"""Bytes of disk that a download leaves free."""
STAGING = "source"
"""Where files lie until they are checked, in the part of the data folder."""
OWN_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of this machine's disk; every other one is the network's or the hub's."""
SHARDS = whole(f"a number from 1 to {MAX_SHARDS}", 1, MAX_SHARDS)
PATH = Leaf(
    "a relative path without '..'",
    lambda value: isinstance(value, str) and len(value) <= 300 and re.fullmatch(r"[\w./ -]+", value) is not None
    and not {"", ".", ".."} & set(value.split("/")),  # an absolute path begins with ""
)  # fmt: skip
NAMED = [{"name": TEXT, "*": ANYTHING}]
LISTS = {"datasets": NAMED, "tokenizers": NAMED, "*": ANYTHING}
STATS = {"files_train": SHARDS, "files_val": SHARDS, "tokens_val??": COUNT, "*": ANYTHING}
DATASET = {"tokenizer_name": TEXT, "stats": STATS, "*": ANYTHING}
MADE = {"train_shards": {"taken": COUNT, "published": COUNT}, "manifest_sha256": TEXT, "*": ANYTHING}
CURE = "take another source"


class Remote(NamedTuple):
    """One file of a source: its size, and its SHA-256 where the source knows it."""

    size: int
    sha256: str | None


class Folder:
    """A folder of this machine that is laid out like a dataset repository."""

    revision: str | None = None

    def __init__(self, folder: str) -> None:
        self.folder, self.name = folder, f"folder {os.path.basename(os.path.abspath(folder))}"
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder")

    def find(self, paths: Iterable[str]) -> dict[str, Remote]:
        """Return those of `paths` that exist."""
        places = {path: os.path.join(self.folder, path) for path in paths}
        return {
            path: Remote(os.path.getsize(place), file_sha256(place))
            for path, place in places.items() if os.path.isfile(place)
        }  # fmt: skip

    def fetch(self, paths: Iterable[str], into: Path) -> None:
        """Copy files below the folder `into`: a link would change with whatever is done to the original."""
        for path in paths:
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            with open_file(os.path.join(self.folder, path)) as original, new_file(into / path) as copy:
                shutil.copyfileobj(original, copy, 1 << 20)


class Hub:
    """A dataset repository of the Hugging Face hub at the commit that `revision` (branch, tag, commit) names now."""

    def __init__(self, repo: str, revision: str = "main") -> None:
        self._library = library("huggingface_hub", f"{repo}: downloading")
        self.name, self.revision = repo, revision
        with self._blamed():
            self.revision = self._library.HfApi().dataset_info(repo, revision=revision).sha
        self._commit = {"repo_id": repo, "repo_type": "dataset", "revision": self.revision}

    def find(self, paths: Iterable[str]) -> dict[str, Remote]:
        """Return those of `paths` that exist."""
        with self._blamed():
            tree = {entry.path: entry for entry in self._library.HfApi().list_repo_tree(recursive=True, **self._commit)}
        files = {path: tree[path] for path in paths if hasattr(tree.get(path), "size")}  # a folder has none
        return {path: Remote(file.size, file.lfs.sha256 if file.lfs else None) for path, file in files.items()}

    def fetch(self, paths: Iterable[str], into: Path) -> None:
        """Download files below the folder `into`; what an earlier start has brought there is taken up."""
        with self._blamed("; what is complete is kept, the same command goes on"):
            self._library.snapshot_download(allow_patterns=list(paths), local_dir=into, **self._commit)

    @contextmanager
    def _blamed(self, cure: str = "") -> Iterator[None]:
        """Raise DataError for whatever goes wrong outside: the library raises errors of its own, httpx and hf_xet."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OWN_ERRNO:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = next((line for line in lines if not line.startswith("(Request ID")), lines[0])[:300]
            raise DataError(f"{self.name} at {self.revision}: {reason}{cure}") from error


Source = Folder | Hub


def fetch_fineweb(
    source: Source,
    out: str,
    *,
    variant: str = "sp1024",
    prefix: str | None = None,
    train_shards: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fetch all of validation and the first `train_shards` shards of training; return the manifest of `out`.

    `train_shards` None: the challenge's 80, or all if there are fewer. `out` may hold fewer shards of the same source:
    they are kept, if they are sound. `prefix` None: `datasets`, or the folder itself where a local one has its manifest
    at the top. DataError if the source lacks or contradicts something, or differs from the one that was begun with.
    """
    if re.fullmatch(r"sp[1-9][0-9]{0,5}", variant) is None:
        raise DataError(
            f"variant {variant}: expected sp1024, sp4096 or sp8192; byte260 is listed in the published manifest, but "
            "its shards are not there, and it has no SentencePiece model"
        )
    if train_shards is not None and train_shards < 1:
        raise DataError(f"train_shards={train_shards}: expected at least 1")
    before = find_manifest(out)
    if before is not None:
        _check(before.get("made_from"), MADE, f"{os.path.join(out, MANIFEST)}: made_from", "choose another folder")
    with making(out, lambda: _busy(out), keep=STAGING) as part:
        prefix = _top(source, prefix)
        listing = read_listing(source, prefix, variant, part)
        stats = listing["stats"]
        wanted = min(TRAIN_SHARDS, stats["files_train"]) if train_shards is None else train_shards
        if wanted > stats["files_train"]:
            raise DataError(f"train_shards={wanted}: {source.name} has {stats['files_train']} of {variant}; ask fewer")
        origin = {
            "repo": source.name, "revision": source.revision, "prefix": prefix, "variant": variant,
            "manifest_sha256": listing["sha256"],
        }  # fmt: skip
        if before is not None:
            _same_source(out, before["made_from"], origin)
        paths = _paths(prefix, variant, listing, wanted)
        for stray in {file.name for file in Path(out).glob("fineweb_*.bin")} - paths.keys():
            raise DataError(f"{out}: holds {stray}, which was not asked for; ask for as many shards, or delete it")
        fetched = _fetch(source, paths, part / STAGING, out)
        taken = {"taken": wanted, "published": stats["files_train"]}
        if before is None or fetched or before["made_from"]["train_shards"] != taken:
            model = os.path.join(out, "tokenizer.model")
            if f"sp{Tokenizer.load(model).vocab}" != variant:
                raise DataError(f"{source.name}: the tokenizer of {variant} has other pieces; it mixes two variants")
            made_from = origin | {"train_shards": taken, "val_tokens_listed": stats.get("tokens_val")}
            name = f"fineweb10B_{variant}"
            before = adopt_shards(out, model, name=name, made_from=made_from, again=True, progress=progress)
        shutil.rmtree(part / STAGING, ignore_errors=True)
        return before


def notes(manifest: dict[str, Any]) -> list[str]:
    """Return what a user must know of a folder that `fetch_fineweb` made, as lines."""
    origin = manifest["made_from"]
    taken, there = origin["train_shards"]["taken"], origin["train_shards"]["published"]
    text = f"training text: {taken} of {there} published shards"
    usual = min(TRAIN_SHARDS, there)
    if taken < usual:
        text = f"WARNING: {text}; the challenge trains on {usual}, and one shard instead of 80 cost 0.1 bits per byte"
    listed, stored = origin.get("val_tokens_listed"), manifest["splits"]["val"]["tokens"]
    if listed in (None, stored):
        return [text]
    return [text, f"WARNING: the source's manifest says {listed:,} validation tokens, its shards hold {stored:,}"]


def _busy(out: str) -> None:
    raise DataError(f"{out}: another process is writing to it; wait for it, or stop it")


def _join(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path


def _top(source: Source, prefix: str | None) -> str:
    """Return the folder of everything: None is `datasets`, or "" where a local folder has its manifest at the top."""
    if prefix is None:
        top = isinstance(source, Folder) and not source.find(["datasets/manifest.json"])
        return "" if top else "datasets"
    if prefix.strip("/"):
        _check(prefix.strip("/"), PATH, "--prefix", "give the folder that holds manifest.json")
    return prefix.strip("/")


def read_listing(source: Source, prefix: str, variant: str, scratch: Path) -> dict[str, Any]:
    """Return what the source's manifest says of a variant: stats, model (a path below the prefix), sha256 (its own).

    DataError if it is no manifest, has no such variant, or names an odd path.
    """
    path = _join(prefix, "manifest.json")
    where, remote = f"{source.name}: {path}", source.find([path]).get(path)
    if remote is None:
        raise DataError(f"{where}: not there; give the source's --repo and --prefix, or --from a folder laid out so")
    if remote.size > MAX_MANIFEST:
        raise DataError(f"{where}: {remote.size} bytes, expected at most {MAX_MANIFEST}; this is no manifest")
    source.fetch([path], scratch)
    try:
        manifest = read_json(scratch / path, MAX_MANIFEST)
    except FileError as error:
        raise DataError(f"{source.name}: {error}"[:300]) from error
    _check(manifest, LISTS, where)
    dataset = _named(manifest["datasets"], f"fineweb10B_{variant}", f"{where}: datasets")
    _check(dataset, DATASET, f"{where}: {dataset['name']}")
    tokenizer = _named(manifest["tokenizers"], dataset["tokenizer_name"], f"{where}: tokenizers")
    _check(tokenizer, {"model_path": PATH, "*": ANYTHING}, f"{where}: {tokenizer['name'][:80]!a}")
    return {"stats": dataset["stats"], "model": tokenizer["model_path"], "sha256": file_sha256(str(scratch / path))}


def _check(value: Any, kind: Any, where: str, cure: str = CURE) -> None:
    try:
        check_value(value, kind, where, cure)
    except FileError as error:
        raise DataError(str(error)) from error


def _named(entries: list[dict[str, Any]], name: str, where: str) -> dict[str, Any]:
    """Return the entry of a name; DataError lists the names that there are."""
    names = [entry["name"] for entry in entries]
    if name not in names:
        raise DataError(f"{where}: no {ascii(name)[:80]}; it has {ascii(names)[1:-1][:300]}; {ELSEWHERE}")
    return entries[names.index(name)]


def _paths(prefix: str, variant: str, listing: dict[str, Any], train: int) -> dict[str, str]:
    """Return the name that each wanted file gets here -> its path at the source."""
    folder = _join(prefix, f"datasets/fineweb10B_{variant}")
    counts = {"val": listing["stats"]["files_val"], "train": train}
    names = [f"fineweb_{split}_{i:06d}.bin" for split, count in counts.items() for i in range(count)]
    return {"tokenizer.model": _join(prefix, listing["model"]), **{name: f"{folder}/{name}" for name in names}}


def _same_source(out: str, before: dict[str, Any], origin: dict[str, Any]) -> None:
    """Raise DataError if a finished folder came from another source."""
    for key, value in origin.items():
        if before.get(key) != value:
            raise DataError(
                f"{out}: holds files of another source ({key}: {str(before.get(key))[:80]}, now {str(value)[:80]}); "
                "give the same source and --revision, choose another --out, or delete it"
            )


def _fetch(source: Source, paths: dict[str, str], staging: Path, out: str) -> int:
    """Bring every file into `out` that is not there as the source has it, checked; return how many those were."""
    remote = source.find(paths.values())
    missing = [path for path in paths.values() if path not in remote]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise DataError(
            f"{source.name}: {missing[0]}{more}: the manifest lists it, but it is not published; take another variant "
            f"or repository; {ELSEWHERE}"
        )
    needed = {name: path for name, path in paths.items() if _fault(Path(out, name), remote[path])}
    size, free = sum(remote[path].size for path in needed.values()), shutil.disk_usage(out).free
    if needed and size + SPARE > free:
        raise DataError(f"{out}: {size:,} bytes to fetch, {free:,} free on its disk; free some space, or take less")
    source.fetch(needed.values(), staging)
    for name, path in needed.items():
        if fault := _fault(staging / path, remote[path]):
            (staging / path).unlink(missing_ok=True)
            raise DataError(f"{path}: {fault}: damaged on its way; the same command fetches it again")
        if name.endswith(".bin"):
            open_shard(str(staging / path))
        place_file(staging / path, Path(out, name))
    return len(needed)


def _fault(file: Path, remote: Remote) -> str | None:
    """Return in what a file differs from the source's; None: in nothing."""
    if not file.is_file():
        return "not there"
    if (size := file.stat().st_size) != remote.size:
        return f"size: {size} bytes, the source says {remote.size}"
    if remote.sha256 is not None and (sha256 := file_sha256(str(file))) != remote.sha256:
        return f"sha256: {sha256[:12]}, the source says {remote.sha256[:12]}"
    return None
