"""Where published data files come from: a dataset repository of the Hugging Face hub, or a folder laid out like one."""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from core.data.corpus import library
from core.data.shards import DataError, file_sha256
from core.files import new_file, open_file

ASKED_AT_ONCE = 200
"""Paths in one question to the hub."""
OWN_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of this machine's disk; every other one is the network's or the hub's."""


class Remote(NamedTuple):
    """One file of a source, with what the source says of it."""

    path: str
    size: int
    sha256: str | None
    blob: str | None
    """Git's hash, which the hub gives of a file that it does not keep as LFS."""


class Source(Protocol):
    """What files are downloaded from."""

    name: str
    revision: str | None
    """What stays the same while the files do."""

    def find(self, paths: Sequence[str]) -> dict[str, Remote]:
        """Return those of `paths` that exist."""
        ...

    def fetch(self, path: str, scratch: Path) -> Path:
        """Fetch a file into the folder `scratch` and return where it lies; it may be damaged."""
        ...


class Folder:
    """A folder on this machine; its files' hashes are computed as they are found."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.revision: str | None = None
        self.name = f"folder {os.path.basename(os.path.abspath(folder))}"
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder")

    def find(self, paths: Sequence[str]) -> dict[str, Remote]:
        """Return those of `paths` that exist."""
        places = {path: os.path.join(self.folder, path) for path in paths}
        return {
            path: Remote(path, os.path.getsize(place), file_sha256(place), None)
            for path, place in places.items()
            if os.path.isfile(place)
        }

    def fetch(self, path: str, scratch: Path) -> Path:
        """Copy a file: a link would change with whatever is done to the original."""
        copy = scratch / os.path.basename(path)
        with open_file(os.path.join(self.folder, path)) as original, new_file(copy) as file:
            shutil.copyfileobj(original, file, 1 << 20)
        return copy


class Hub:
    """A dataset repository at one commit, which `revision` (a branch, tag or commit) names when the object is made.

    Resuming, retries and transport are huggingface_hub's. DataError says in one line what the hub or the network said.
    """

    def __init__(self, repo: str, revision: str = "main", endpoint: str | None = None) -> None:
        self._library = library("huggingface_hub", f"{repo}: downloading")
        library("huggingface_hub.utils", repo).disable_progress_bars()
        self.name, self._endpoint = repo, endpoint
        self.revision: str | None = revision
        self._api = self._library.HfApi(endpoint=endpoint)
        try:
            commit = self._api.dataset_info(repo, revision=revision).sha
        except Exception as error:
            raise self._error(error) from error
        if not isinstance(commit, str):
            raise DataError(f"{repo}: the hub names no commit for revision {revision}")
        self.revision = commit

    def find(self, paths: Sequence[str]) -> dict[str, Remote]:
        """Return those of `paths` that exist."""
        found = {}
        for start in range(0, len(paths), ASKED_AT_ONCE):
            asked = list(paths[start : start + ASKED_AT_ONCE])
            try:
                infos = self._api.get_paths_info(self.name, asked, revision=self.revision, repo_type="dataset")
            except Exception as error:
                raise self._error(error) from error
            for info in infos:
                if info.path not in asked or not hasattr(info, "size"):
                    continue  # a folder
                if type(info.size) is not int or info.size < 0:
                    raise DataError(f"{self.name}: {info.path}: size: {info.size!r}, expected a count of bytes")
                found[info.path] = Remote(info.path, info.size, info.lfs.sha256 if info.lfs else None, info.blob_id)
        return found

    def fetch(self, path: str, scratch: Path) -> Path:
        """Download a file."""
        try:
            done = self._library.hf_hub_download(
                self.name,
                path,
                repo_type="dataset",
                revision=self.revision,
                local_dir=scratch,
                endpoint=self._endpoint,
            )
        except Exception as error:
            raise self._error(error, path) from error
        return Path(done)

    def _error(self, error: Exception, path: str = "") -> Exception:
        """Return a DataError for whatever went wrong outside: the library raises its own, httpx's and hf_xet's."""
        if isinstance(error, OSError) and error.errno in OWN_ERRNO:
            return error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if not line.startswith("(Request ID")), lines[0])[:300]
        if not path:
            return DataError(f"{self.name} at {self.revision}: {reason}")
        return DataError(f"{self.name}: {path}: {reason}; what is complete is kept, the same command goes on")


def check_file(file: Path, remote: Remote, source: str) -> str:
    """Return the SHA-256 of a fetched file; DataError unless size and hash are those of the source."""
    size = file.stat().st_size
    again = "damaged on its way, or the source has changed; the same command fetches it again"
    if size != remote.size:
        raise DataError(f"{remote.path}: size: {size} bytes, {source} says {remote.size}: {again}")
    found = file_sha256(str(file))
    if remote.sha256 is not None and found != remote.sha256:
        raise DataError(f"{remote.path}: sha256: {found[:12]}, {source} says {remote.sha256[:12]}: {again}")
    if remote.sha256 is None and remote.blob is not None and _blob(file) != remote.blob:
        raise DataError(f"{remote.path}: git hash: {_blob(file)[:12]}, {source} says {remote.blob[:12]}: {again}")
    return found


def _blob(file: Path) -> str:
    """Return git's hash of a file's content."""
    sha1 = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with open_file(file) as content:
        while chunk := content.read(1 << 20):
            sha1.update(chunk)
    return sha1.hexdigest()
