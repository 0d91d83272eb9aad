"""Hostile files against every reader: `python -m shared_tests.support.mutations --before N --after M --seed S`.

Every index makes one file of each kind (artifacts, shards, checkpoints: `support.mutants`; what a run, prepared
data, a ledger and an ablation are described by: `support.record_mutants`) and reads it: the first N are changed
before compression and framing, the next M are changes of the finished file's bytes. A read must end in its
reader's own error or in a sane result, in 2 s of processor time and 256 MB of address space; the first that does not is
named by seed and index, and `--only INDEX` does it again. Returns 0, or 1 after a failure. numpy and core only.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy loads its BLAS, whose threads reserve address space
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import collections
import functools
import hashlib
import json
import mmap
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.data.shards import DataError, open_shard
from core.engine.optimizer_state import optimizer_slots
from core.export.artifact import ArtifactError, read_artifact, write_artifact
from core.model.params import param_table
from core.training.run import Run, RunError
from shared_tests.reference.storage import LARGEST
from shared_tests.support import mutants, record_mutants

MEMORY = 256 << 20
READ_SECONDS = 2.0
"""Of processor time: a busy machine must not look like a hang."""
STUCK_SECONDS = 60.0
"""Wall-clock time on one index after which the parent process ends it."""
REWRITTEN = 1 << 20
"""Codes up to which an accepted artifact is written again: beyond, packing takes longer than reading may."""
Counts = dict[tuple[str, str], collections.Counter]


class Reader(NamedTuple):
    """One reader and what makes files for it."""

    suffix: str
    error: type[Exception]
    whole: list[bytes]
    """Files that it accepts."""
    mutate: Callable[[mutants.Random, bytes], bytes]
    """Return a whole file changed before framing."""
    front: Callable[[bytes], int]
    """Return the bytes in front of a whole file's payload."""
    read: Callable[[Path], None]
    """Read a file; an AssertionError says what of the result is not sane."""
    place: Path | None = None
    """Where the file lies, among others that it belongs to; None: anywhere."""


BINARIES = ("artifact", "shard", "checkpoint")


def readers(folder: Path, names: Collection[str] = BINARIES) -> dict[str, Reader]:
    """Return readers by name, all of them without `names`; their whole files are made in `folder`."""
    return {n: r for n, r in {**binaries(folder), **records(folder)}.items() if not names or n in names}


def records(folder: Path) -> dict[str, Reader]:
    """Return the readers of records."""
    found = record_mutants.kinds(folder)
    return {
        name: Reader("", record_mutants.RefusedError, whole, mutate, lambda whole: 0, read, place)
        for name, (place, whole, mutate, read) in found.items()
    }


@functools.cache
def binaries(folder: Path) -> dict[str, Reader]:
    """Return the readers of weights and tokens."""
    m = mutants
    return {
        "artifact": Reader(
            ".skc", ArtifactError, m.artifact_files(folder), m.mutate_artifact,
            lambda whole: 12 + int.from_bytes(whole[8:12], "little"), read_one_artifact,
        ),
        "shard": Reader(
            ".bin", DataError, m.shard_files(folder), m.mutate_shard, lambda whole: 1024, read_one_shard
        ),
        "checkpoint": Reader(
            ".safetensors", RunError, m.checkpoint_files(folder), m.mutate_checkpoint,
            lambda whole: 8 + int.from_bytes(whole[:8], "little"), read_one_checkpoint,
        ),
    }  # fmt: skip


def read_one_artifact(path: Path) -> None:
    """Read an artifact; it must be in range, and the same bytes when it is written again."""
    got = read_artifact(path)
    assert list(got.stored) == list(param_table(got.model)), "tensors are not the table's"
    if sum(stored.codes.size for stored in got.stored.values()) > REWRITTEN:
        return
    assert all(np.isfinite(value).all() for value in got.weights.values()), "a weight is not finite"
    for name, row in param_table(got.model).items():
        codes, scales = got.stored[name]
        if scales is not None:
            largest = {**LARGEST, "fp8": 448}[row.storage.split("/")[0]]
            assert (scales >= 2.0**-14).all() and (np.abs(codes.astype(float)) <= largest).all(), (
                f"{name}: out of range"
            )
    again, words = path.with_name("again.skc"), (got.tokenizer_sha256, got.provenance)
    write_artifact(again, got.model, got.stored, tokenizer_sha256=words[0], provenance=words[1])
    assert again.read_bytes() == path.read_bytes(), "other bytes when written again"


def same(ours: Any, theirs: Any) -> bool:
    """Return whether two arrays are the same to the bit, or both None."""
    if ours is None or theirs is None:
        return ours is theirs
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and ours.tobytes() == theirs.tobytes()


def read_one_shard(path: Path) -> None:
    """Read a shard; its tokens must be all bytes behind its header, as many as it says."""
    tokens, data = np.asarray(open_shard(str(path))), path.read_bytes()
    assert (
        tokens.size and tokens.dtype == np.dtype("<u2") and tokens.shape == (struct.unpack_from("<i", data, 8)[0],)
    ), "other count"
    assert data[:8] == struct.pack("<2i", 20240520, 1) and tokens.tobytes() == data[1024:], "other tokens"


def read_one_checkpoint(path: Path) -> None:
    """Read a checkpoint; what it gives must be the run's tensors, and the bytes that the file's entries point at."""
    run = Run(path.parent, mutants.RUN)
    run.checkpoint_path = path
    got, data = run.checkpoint(), path.read_bytes()
    assert got and 0 <= got.step < 2**53 and 0 <= got.seconds < np.inf and type(got.quantise) is bool, "other metadata"
    held = {f"param/{name}": value for name, value in got.params.items()}
    held |= {f"optim/{name}": value for name, value in got.optimizer.items()}
    shapes = {f"param/{name}": row.shape for name, row in param_table(run.config.model).items()}
    slots = optimizer_slots(run.config.model, run.config.train)
    shapes |= {f"optim/{name}": shape for name, shape in slots.items()}
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert header.keys() - {"__metadata__"} == held.keys() == shapes.keys(), "other tensors"
    state = json.loads(header["__metadata__"]["skc"])
    digest = hashlib.sha256(b"".join(held[name].tobytes() for name in sorted(held)))
    assert state["sha256"] == digest.hexdigest(), "another checksum"
    for name, value in held.items():
        low, high = header[name]["data_offsets"]
        kind = {"F32": "float32", "F64": "float64"}[header[name]["dtype"]]
        assert value.shape == shapes[name] and value.dtype == kind, f"{name}: another shape or type"
        assert value.tobytes() == data[start + low : start + high], f"{name}: other bytes"


def mutant(reader: Reader, name: str, seed: int, index: int, before: bool) -> bytes:
    """Return the file of an index: it depends on nothing but the arguments."""
    rng = mutants.Random(f"{seed}/{index}/{name}")
    whole = rng.choice(reader.whole)
    if before:
        return reader.mutate(rng, whole)
    front = reader.front(whole) if rng.random() < 0.5 else 0  # headers are most of these small files
    return whole[:front] + mutants.edit(rng, whole[front:])


def attempt(reader: Reader, path: Path) -> tuple[str, str]:
    """Return (outcome, detail) of a read: accepted, refused with its field, or failed with what went wrong."""
    started = time.process_time()
    try:
        reader.read(path)
        outcome = ("accepted", "")
    except reader.error as error:
        outcome = refusal(str(error), path)
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = ("failed", "".join(traceback.format_exception(error)))
    took = time.process_time() - started
    return outcome if took <= READ_SECONDS else ("failed", f"it took {took:.1f} s; at most {READ_SECONDS}")


def refusal(message: str, path: Path) -> tuple[str, str]:
    """Return (refused, field) for an error that names the file, the field cut to what can be counted."""
    if not message.startswith(f"{path}: "):
        return "failed", f"the error does not name the file: {message[:500]!r}"
    rest = message.removeprefix(f"{path}: ").removeprefix("skc: ").removeprefix("model.")
    found = re.match(r"[A-Za-z0-9_]{1,24}", rest)
    return "refused", found[0] if found else "(unprintable)"


def campaign(
    folder: Path,
    seed: int,
    indices: range,
    before: int,
    reached: Callable[[int], None] = lambda index: None,
    names: Collection[str] = BINARIES,
) -> tuple[Counts, tuple[int, str] | None]:
    """Do the mutations of `indices`: return counts by (reader, when), and (index, what) of the first failure.

    Indices below `before` are changes before compression, the others after it; `reached` is told each at its start.
    """
    made, counts = readers(folder, names), collections.defaultdict(collections.Counter)
    for index in indices:
        reached(index)
        when = "before" if index < before else "after"
        for name, reader in made.items():
            path = reader.place or folder / f"mutant{reader.suffix}"
            path.unlink(missing_ok=True)  # writing over a file costs milliseconds on ext4, which flushes it then
            path.write_bytes(mutant(reader, name, seed, index, index < before))
            outcome, detail = attempt(reader, path)
            if reader.place is not None:
                path.write_bytes(reader.whole[0])  # for the files that it belongs to
            if outcome == "failed":
                return counts, (index, f"{name}, {when} compression and framing: {detail}")
            counts[name, when][detail] += 1
    return counts, None


def print_counts(counts: Counts) -> None:
    """Print two lines per reader and stage: how many were accepted and refused, and the fields that refusals named."""
    for (name, when), fields in counts.items():
        accepted, total = fields.pop("", 0), sum(fields.values())
        print(f"{name:<11}{when:<7}{accepted + total:>8}: accepted {accepted}, refused {total}")
        shown = fields.most_common(14)
        rest = total - sum(number for _, number in shown)
        print("    " + ", ".join(f"{field} {number}" for field, number in [*shown, ("others", rest)] if number))


def limit_memory() -> str:
    """Limit the address space; return in words what was done."""
    if sys.platform == "darwin":  # its kernel takes the call and enforces nothing
        return "no memory limit on macOS"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    return f"address space limited to {MEMORY >> 20} MB"


def work(options: argparse.Namespace, folder: Path, reached: Callable[[int], None]) -> int:
    """Do the campaign of the command line in this process; return its exit code."""
    limit, started = limit_memory(), time.monotonic()
    os.fsync = lambda fd: None  # a third of the time of writing again, and nothing here has to outlive a power cut
    indices = range(options.before + options.after)
    if options.only is not None:
        indices = range(options.only, options.only + 1)
    counts, failure = campaign(folder, options.seed, indices, options.before, reached, options.kinds)
    print_counts(counts)
    frameworks = {"torch", "mlx"} & sys.modules.keys()  # an ablation asks which of them there are
    assert not frameworks or "plan" in readers(folder, options.kinds), "a framework was imported"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    print(f"{len(indices)} of each file in {time.monotonic() - started:.1f} s, at most {peak} MB resident; {limit}")
    if failure:
        print_failure(options, *failure)
    return 1 if failure else 0


def print_failure(options: argparse.Namespace, index: int, what: str) -> None:
    """Print what an index did and the command that does it again."""
    print(f"FAILED at seed {options.seed}, index {index}: {what}")
    numbers = f"--before {options.before} --after {options.after} --seed {options.seed} --only {index}"
    numbers += f" --kinds {' '.join(options.kinds)}" * bool(options.kinds)
    print(f"again: python -m shared_tests.support.mutations {numbers}", flush=True)


def supervise(options: argparse.Namespace, folder: Path) -> int:
    """Run `work` in a child process, so that a crash or a hang inside a C library is named by its index too."""
    at, started = mmap.mmap(-1, 8), time.monotonic()

    def reached(index: int) -> None:
        at[:] = index.to_bytes(8, "little")
        if index and index % 50_000 == 0:
            print(f"{index} done after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work(options, folder, reached)
        except BaseException:
            print_failure(options, int.from_bytes(at[:], "little"), f"the campaign itself: {traceback.format_exc()}")
        finally:
            sys.stdout.flush()
            os._exit(code)
    seen, since = at[:], time.monotonic()
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        time.sleep(0.05)
        if at[:] != seen:
            seen, since = at[:], time.monotonic()
        if time.monotonic() - since > STUCK_SECONDS:
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        else:
            ended, status = os.waitpid(child, os.WNOHANG)
    if os.WIFSIGNALED(status):
        what = f"ended by signal {os.WTERMSIG(status)}, {time.monotonic() - since:.0f} s after its start"
        print_failure(options, int.from_bytes(at[:], "little"), what)
    return 0 if status == 0 else 1


def main() -> int:
    """Read the command line and run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=int, default=10_000, help="files changed before compression and framing")
    parser.add_argument("--after", type=int, default=2_000, help="files changed after it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="do this index alone")
    parser.add_argument("--kinds", nargs="*", default=BINARIES, help="of files; none: all")
    options = parser.parse_args()
    print(f"seed {options.seed}: {options.before} files of each kind changed before framing, {options.after} after it")
    sys.stdout.flush()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # Linux: a tenth faster than a disk
    with tempfile.TemporaryDirectory(prefix="mutations-", dir=memory) as folder:
        return supervise(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
