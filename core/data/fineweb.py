"""The published FineWeb shards of the challenge: downloaded, checked, and made a folder that `open_dataset` opens.

A source (spec/challenge.md A.4) holds PREFIX/manifest.json, PREFIX/datasets/fineweb10B_VARIANT/fineweb_{train,val}_
%06d.bin and PREFIX/tokenizers/. What it says is input from outside. Each file is put into the folder once it has been
checked, and noted in its source.json, so that a killed download goes on; the manifest comes last.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.data.adopt import adopt_shards
from core.data.hub import Remote, Source, check_file
from core.data.listing import listed_files, read_listing, top_folder
from core.data.making import PART, making
from core.data.manifest import COUNT, MANIFEST, NAME, TEXT, check, read_manifest
from core.data.prepare import Progress
from core.data.published import TRAIN_SHARDS
from core.data.shards import DataError, open_shard
from core.data.tokenizer import Tokenizer
from core.files import FileError, place_file, read_json, replace_file

REPO = "willdepueoai/parameter-golf"
SPARE = 1 << 26
"""Bytes of disk that a download leaves free."""
STATE = "source.json"
"""What a download has brought so far."""
FILES = (NAME, {"size": COUNT, "sha256": TEXT})
MADE = {"train_shards": {"taken": COUNT, "published": COUNT}, "manifest_sha256": TEXT, "files": FILES}
BEGUN = {"origin": {}, "files": FILES}


def fetch_fineweb(
    source: Source,
    out: str,
    *,
    variant: str = "sp1024",
    prefix: str | None = None,
    train_shards: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Download all of validation and the first `train_shards` shards of training; return the manifest of `out`.

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
    prefix = top_folder(source, prefix)
    listing = read_listing(source, prefix, variant)
    wanted = min(TRAIN_SHARDS, listing.train) if train_shards is None else train_shards
    if wanted > listing.train:
        raise DataError(f"train_shards={wanted}: {source.name} has {listing.train} of {variant}; ask for fewer")
    origin = {
        "repo": source.name,
        "revision": source.revision,
        "prefix": prefix,
        "variant": variant,
        "manifest_sha256": listing.sha256,
    }
    existing = _existing(out, origin, wanted)
    files = listed_files(source, prefix, variant, listing, wanted)
    with making(out, lambda: _busy(out)) as part:
        recorded = _files(existing) | _begun(out, origin)
        fetched = _fetch(source, files, part, out, recorded, origin, progress or _silent)
        if existing is None or fetched or existing["made_from"]["train_shards"]["taken"] != wanted:
            model = os.path.join(out, "tokenizer.model")
            _check_tokenizer(model, variant, source.name)
            made_from = origin | {
                "train_shards": {"taken": wanted, "published": listing.train},
                "val_tokens_listed": listing.val_tokens,
                "files": {local: {"file": files[local].path, **record} for local, record in sorted(recorded.items())},
            }
            title = name or f"fineweb10B_{variant}"
            existing = adopt_shards(out, model, name=title, made_from=made_from, again=True, progress=progress)
        Path(out, STATE).unlink(missing_ok=True)
        return existing


def _busy(out: str) -> None:
    raise DataError(f"{out}: another download is writing to it; wait for it, or stop it")


def notes(manifest: dict[str, Any]) -> list[str]:
    """Return what a user must know of a folder that `fetch_fineweb` made, as lines."""
    made = manifest["made_from"]
    taken, there = made["train_shards"]["taken"], made["train_shards"]["published"]
    text = f"training text: {taken} of {there} published shards"
    usual = min(TRAIN_SHARDS, there)
    if taken < usual:
        text = f"WARNING: {text}; the challenge trains on {usual}, and one shard instead of 80 cost 0.1 bits per byte"
    listed, held = made.get("val_tokens_listed"), manifest["splits"]["val"]["tokens"]
    if listed in (None, held):
        return [text]
    return [text, f"WARNING: the source's manifest says {listed:,} validation tokens, its shards hold {held:,}"]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _existing(out: str, origin: dict[str, Any], wanted: int) -> dict[str, Any] | None:
    """Return the manifest of a folder that is there already; DataError unless it is of this source and no larger."""
    if not os.path.lexists(out):
        return None
    if not os.path.isdir(out):
        raise DataError(f"{out}: is no folder; choose another --out")
    there = set(os.listdir(out)) - {PART}
    if not there or (MANIFEST not in there and STATE in there):
        return None
    try:
        manifest = read_manifest(out)
        made = manifest.get("made_from") or {}
        check(os.path.join(out, MANIFEST), "made_from", made, MADE)
    except DataError as error:
        raise DataError(f"{out}: exists and holds no downloaded data of this kind; choose another folder") from error
    _same_source(out, made, origin)
    held = made["train_shards"]["taken"]
    if held > wanted:
        raise DataError(f"{out}: holds {held} training shards, {wanted} were asked for; choose another folder for them")
    return manifest


def _files(manifest: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the name of each downloaded file -> its size and hash, as a finished folder's manifest says."""
    files = manifest["made_from"]["files"] if manifest else {}
    return {local: {"size": record["size"], "sha256": record["sha256"]} for local, record in files.items()}


def _begun(out: str, origin: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the same of a download that was begun; DataError if it was of another source."""
    state = os.path.join(out, STATE)
    try:
        before = read_json(state)
        check(state, "", before, BEGUN)
    except FileNotFoundError:
        return {}
    except (FileError, DataError) as error:
        raise DataError(f"{state}: damaged; delete {out} to begin anew") from error
    _same_source(out, before["origin"], origin)
    return before["files"]


def _same_source(where: Any, before: Mapping[str, Any], origin: dict[str, Any]) -> None:
    """Raise DataError if files of two sources would come together."""
    for key, value in origin.items():
        if before.get(key) != value:
            raise DataError(
                f"{where}: holds files of another source ({key}: {str(before.get(key))[:80]}, now {str(value)[:80]}); "
                "give the same source and --revision, choose another --out, or delete it"
            )


def _fetch(
    source: Source,
    files: dict[str, Remote],
    part: Path,
    out: str,
    recorded: dict[str, dict[str, Any]],
    origin: dict[str, Any],
    progress: Progress,
) -> int:
    """Bring every file into `out`, checked, recording each; return how many were fetched."""
    scratch = part / "fetching"
    for local in recorded:
        if local not in files:
            raise DataError(f"{out}: holds {local}, which was not asked for; ask for as many shards, or delete it")
    needed = [local for local in files if not _kept(out, local, files[local], recorded.get(local), source)]
    size, free = sum(files[local].size for local in needed), shutil.disk_usage(part).free
    if needed and size + SPARE > free:
        raise DataError(f"{out}: {size:,} bytes to fetch, {free:,} free on its disk; free some space, or take less")
    total = sum(remote.size for remote in files.values())
    done = total - size
    for local in needed:
        progress("downloading", done, total)
        try:
            scratch.mkdir()
            place = source.fetch(files[local].path, scratch)
            sha256 = check_file(place, files[local], source.name)
            if local.endswith(".bin"):
                open_shard(str(place))
            place_file(place, os.path.join(out, local))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        recorded[local] = {"size": files[local].size, "sha256": sha256}
        replace_file(os.path.join(out, STATE), json.dumps({"origin": origin, "files": recorded}).encode())
        done += files[local].size
    progress("downloading", total, total)
    return len(needed)


def _kept(out: str, local: str, remote: Remote, record: dict[str, Any] | None, source: Source) -> bool:
    """Return whether a file is there, complete and sound; DataError if the source has another one by now."""
    if record is None:
        return False
    if remote.size != record["size"] or remote.sha256 not in (None, record["sha256"]):
        raise DataError(
            f"{remote.path}: {source.name} has another file by now ({remote.size} bytes, it had {record['size']}), and "
            f"files of two sources do not go together; delete {out}, or choose another --out"
        )
    try:
        check_file(Path(out, local), remote._replace(sha256=record["sha256"]), source.name)
    except (DataError, FileError, FileNotFoundError):
        return False
    return True


def _check_tokenizer(path: str, variant: str, source: str) -> None:
    vocab = Tokenizer.load(path).vocab
    if f"sp{vocab}" != variant:
        raise DataError(f"{source}: the tokenizer of {variant} has {vocab} pieces; the source mixes two variants")
