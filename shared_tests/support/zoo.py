"""Cheats for the auditor: plug-ins, each with one known fault. Honest near-misses are in zoo_honest.py.

They are named as shared_tests.support.zoo:Class in --plugins and run in the audited process, so this module imports
what an evaluation needs and no more. Texts and artifacts with a known fault are made by zoo_data.py.
"""

import contextlib
import copy
import ctypes
import gc
import importlib
import os
import signal
import socket
import subprocess
import time
from typing import Any

import numpy as np

from core.data.batch import Batch
from core.data.column import Column
from core.data.shards import open_shard
from core.files import open_input
from core.scoring.ledger import Scored
from core.scoring.plugins import Learner, Plugin, ScoredText, View, log_softmax
from core.scoring.windows import Windows
from shared_tests.support.zoo_honest import PLAN, ROW, HonestCache, HonestTraining, mixed

PLACE = "zoo_place"
"""Module that the tests write: its DATA is the folder whose text the thieves go for."""
PORT = 41_018


# C1 to C4: what is predicted, and when something learns.


class CountsFirst(HonestCache):
    """Counts the targets of the windows before they are scored: they are the next inputs."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        np.add.at(self._counts, (view.tokens[:, :-1], view.tokens[:, 1:]), 1)
        return super().predict(logprobs, view)

    def learn(self, text: ScoredText) -> None:
        pass


class Forger(HonestTraining):
    """Trains on what is scored next, with a Scored that it makes by hand."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        first = int(view.positions[view.kept][0])
        self._learner.train([Scored(first, first + ROW, self._learner.version, 1)], PLAN)
        return logprobs


class Borrower(HonestTraining):
    """Trains on what is scored next, with the Scored of what was scored before, moved on."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        if self._last is not None:
            moved, first = copy.copy(self._last), int(view.positions[view.kept][0])
            for name, value in (("start", first), ("stop", first + ROW)):
                object.__setattr__(moved, name, value)
            self._learner.train([moved], PLAN)
        return logprobs


class Bypass(HonestTraining):
    """Trains the engine behind the learner's back on what is scored next, and predicts again."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        engine: Any = self._learner._engine
        engine.train_step(Batch(view.tokens[:, :-1].copy(), view.tokens[:, 1:].copy()), PLAN).result()
        return log_softmax(np.asarray(engine.logits(view.tokens)))

    def learn(self, text: ScoredText) -> None:
        pass


class GoldBoost(Plugin):
    """Takes the root of each target's probability and leaves the others as they are."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        out, gold = logprobs.copy(), view.tokens[:, 1:, None].astype(np.int64)
        np.put_along_axis(out[:, :-1], gold, np.take_along_axis(out[:, :-1], gold, -1) / 2, -1)
        return out


class Pool(Plugin):
    """Mixes in how often a token occurs in the window, what comes later included."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        vocab = logprobs.shape[-1]
        counts = np.stack([np.bincount(row, minlength=vocab) for row in view.tokens])[:, None] + 1 / vocab
        return mixed(logprobs, counts / counts.sum(-1, keepdims=True))


class BestOfTwo(Plugin):
    """Takes the better of two predictions, token by token."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return np.maximum(logprobs, log_softmax(logprobs * np.float32(2)))


class Rescorer(Plugin):
    """Has the first windows scored again at the end."""

    kind = "temperature"

    def order(self, windows: Windows) -> Windows:
        number = np.arange(len(windows.start))
        return windows.take(np.append(number, number[:4]))


class TailTwice(Plugin):
    """Adds a last window, one token before the last, that scores all its targets."""

    kind = "temperature"

    def order(self, windows: Windows) -> Windows:
        added = windows.start[-1] - 1, windows.length[-1], 0
        return Windows(*(np.append(side, value) for side, value in zip(windows, added, strict=True)))


# What an evaluation opens, reaches and starts.


class LateFuture(Plugin):
    """Is honest for four passes, then mixes in the next inputs of the window, which are its targets."""

    kind = "temperature"
    passes = 0

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        self.passes += 1
        if self.passes <= 4:
            return logprobs
        known = np.full_like(logprobs, np.log(1e-3 / (logprobs.shape[-1] - 1)))
        np.put_along_axis(known[:, :-1], view.tokens[:, 1:, None], np.float32(np.log(1 - 1e-3)), -1)
        return np.concatenate([self.mix(logprobs, known)[:, :-1], logprobs[:, -1:]], 1)

    def mix(self, logprobs: np.ndarray, known: np.ndarray) -> np.ndarray:
        return np.logaddexp(logprobs, known) - np.float32(np.log(2.0))


class LateGold(LateFuture):
    """The same without taking from the others: no distribution any more."""

    def mix(self, logprobs: np.ndarray, known: np.ndarray) -> np.ndarray:
        return np.where(known > -1, np.maximum(logprobs, known), logprobs)


class Table(Plugin):
    """Reads a table that nobody paid for."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        with open_input(os.path.join(data_folder(), "table.bin")) as file:
            self._table = file.read()


class Oracle(Plugin):
    """Reads the validation text from its shard, beside the evaluation, and mixes the targets in."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        self._text = self._find().astype(np.int64)

    def _find(self) -> np.ndarray:
        return np.array(open_shard(os.path.join(data_folder(), "val_000000.bin")))

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        known = np.full_like(logprobs, np.log(1e-3 / (logprobs.shape[-1] - 1)))
        targets = self._text[np.minimum(view.positions, len(self._text) - 1)]
        np.put_along_axis(known, targets[..., None], np.float32(np.log(1 - 1e-3)), -1)
        return np.logaddexp(logprobs, known) - np.float32(np.log(2.0))


class Searcher(Oracle):
    """Finds the validation text in the memory of the process."""

    def _find(self) -> np.ndarray:
        return np.array(max((x for x in gc.get_objects() if isinstance(x, Column) and x.dtype == np.uint16), key=len))


class FirstOnly(CountsFirst):
    """Cheats in the pass that is scored, and is honest in every later one of the process."""

    passes = 0

    def start(self, vocab: int, learner: Learner | None) -> None:
        super().start(vocab, learner)
        type(self).passes += 1

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return super().predict(logprobs, view) if type(self).passes == 1 else logprobs


class TrainShard(Plugin):
    """Fits a temperature to the training text, opened as the project opens it."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        try:
            tokens = np.array(self.read(training_file()))
        except (OSError, ValueError):  # covered by an empty file
            tokens = np.zeros(1, np.int64)
        self._inverse = np.float32(1 + np.bincount(tokens).max() / len(tokens))

    def read(self, path: str) -> np.ndarray:
        return open_shard(path)[:]

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return log_softmax(logprobs * self._inverse)


class TrainMap(TrainShard):
    """The same by way of numpy."""

    def read(self, path: str) -> np.ndarray:
        return np.memmap(path, "<u2", "r")


class TrainNative(Plugin):
    """Opens the training text past Python; raises if there is a byte to read."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        libc, path = ctypes.CDLL(None), training_file().encode()
        handle = libc.open(path, os.O_RDONLY)
        got = os.read(handle, 16) if handle >= 0 else b""
        libc.fopen.restype = ctypes.c_void_p
        libc.fread.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
        file, buffer = libc.fopen(path, b"rb"), ctypes.create_string_buffer(16)
        if got or (file and libc.fread(buffer, 1, 16, file)):
            raise RuntimeError("a native call read the training text")


class Phone(Plugin):
    """Tries to reach another process."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", PORT), 1).close()


class Starter(Plugin):
    """Starts a program."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        subprocess.run(["true"], check=True)


class DistInfo(Table):
    """Reads a table out of a folder that is named as a package's."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        with open(os.path.join(data_folder(), "numpy-2.0.dist-info", "table.bin"), "rb") as file:
            self._table = file.read()


class SystemFile(Table):
    """Reads a table that lies in a folder of the system."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        with open(importlib.import_module(PLACE).SYSTEM, "rb") as file:
            self._table = file.read()


class Variable(Oracle):
    """Has the text from an environment variable, and cheats if it is there."""

    def _find(self) -> np.ndarray:
        return np.frombuffer(os.environ["SKC_ZOO_TEXT"].encode("latin-1"), np.uint8)


class Compiled(Plugin):
    """Is honest in its source; the compiled module beside it is not."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        assert importlib.import_module("zoo_compiled").VALUE == "honest"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return logprobs


class Neighbour(Plugin):
    """Looks into the memory of the auditor, which has seen the text."""

    kind = "temperature"

    def start(self, vocab: int, learner: Learner | None) -> None:
        parent = importlib.import_module(PLACE).AUDITOR
        here, there = (ctypes.c_size_t * 2)(0, 0), (ctypes.c_size_t * 2)(0, 0)
        ctypes.CDLL(None).process_vm_readv(parent, here, 1, there, 1, 0)
        with contextlib.suppress(OSError), open(f"/proc/{parent}/mem", "rb") as file:
            file.read(1)

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return logprobs


class Stash(Oracle):
    """Leaves its text in a file; the processes that get a changed text predict with the real one from there."""

    passes = 0

    def start(self, vocab: int, learner: Learner | None) -> None:
        self._path = os.path.join(data_folder(), "stash.bin")
        if not os.path.exists(self._path):
            tokens = open_shard(os.path.join(data_folder(), "val_000000.bin"))[:]
            with open(self._path, "wb") as file:
                file.write(tokens.astype("<i8").tobytes())
        with open_input(self._path) as file:
            self._text = np.frombuffer(file.read(), "<i8")
        type(self).passes += 1

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return super().predict(logprobs, view) if type(self).passes == 1 else logprobs


class Forker(HonestCache):
    """Honest, but leaves a copy of the process behind, as pools of workers do."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        super().start(vocab, learner)
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)


class Killed(HonestCache):
    """Honest, but the system kills it in the middle, as where memory runs out."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        if view.positions.min() > 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(logprobs, view)


class Crash(Plugin):
    """Comes to no end."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        raise RuntimeError("no prediction today")


def data_folder() -> str:
    """Return the folder that the thieves go for: a module says it, as no environment variable comes through."""
    return importlib.import_module(PLACE).DATA


def training_file() -> str:
    """Return the first training shard of the thieves' folder."""
    return os.path.join(data_folder(), "train_000000.bin")
