"""What test_ranks starts: one rank of a run on this machine, by torchrun's variables or mlx.launch's, and its tasks.

`python -m shared_tests.support.ranked BACKEND FOLDER TASK ...`: rank 0 writes what a task returned to FOLDER/TASK.json.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import core.engine.ranks
import core.training.loop
from core.config import AdaptConfig, ConfigError, EvalConfig, PhasesConfig, RunConfig, changed
from core.data.batch import Batch
from core.data.dataset import open_dataset
from core.engine.heartbeat import Heartbeat
from core.engine.loading import load_engine
from core.engine.protocol import Engine, EngineOptions
from core.engine.ranks import (
    Alone,
    Ranks,
    join,
    share,
)
from core.scoring.adapt.stream import StreamPass
from core.scoring.counts import Counts
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.plugins import Temperature
from core.scoring.score import score
from core.training.follower import Follower
from core.training.loop import train
from core.training.run import Run
from core.training.schedule import plan, progress_by_steps
from core.verbs.common import same_start
from shared_tests.support.harness import mini, working_weights
from shared_tests.support.killed import everything
from shared_tests.support.plugin_examples import Adaptation, small
from shared_tests.support.sleepers import kept, sleeping
from shared_tests.support.streams import FORMS, stream


class Seat(Alone):
    """One of several ranks that does not talk."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world


def curves(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Train minis for 50 steps in float64, each rank on its rows, and return losses and final weights' digest."""
    from shared_tests.support.harness import batches

    found = {}
    for name, config in cases(ranks.world).items():
        engine = built(backend, config, ranks)
        losses = []
        for step, batch in enumerate(batches(config, config.train.steps)):
            part = share(len(batch.tokens), ranks)
            mine = Batch(batch.tokens[part], batch.targets[part], len(batch.tokens), part.start)
            now = plan(step, progress_by_steps(step, config.train), config.train)
            losses.append(engine.train_step(mine, now).result()._asdict())
        state = {**engine.params(), **engine.optimizer()}
        if ranks.rank == 0:
            save_file(state, folder / f"{name}.safetensors")
        found[name] = losses
    return found


def cases(world: int) -> dict[str, RunConfig]:
    """Return what `curves` trains: every optimizer, stored and soft weights, averages and their mean, further heads,
    code lengths, a part's own loss, clipping, stochastic depth, rows that do not divide.

    Four ranks, which here share two cores, do the two that differ most.
    """

    # At rates of 0.003 the loss of consistency makes rounding grow a hundredfold in ten steps, as many parts do.
    slow = dict.fromkeys(("lr_embed", "lr_matrix", "lr_vector"), 1e-3)
    made = {}
    for name, preset, changes in (
        ("adamw", "ablate_float", {
            "matrix_rule": "adamw", "batch": 4, "depth_drop": 0.3, "consistency": 0.1, **slow,
        }),
        ("uneven", "ablate_float", {
            "matrix_rule": "muon", "batch": 7, "clip": 0.5, "z_loss": 1e-3, "average_from": 0.3, "mtp_heads": 3,
            "snapshot_every": 4, "snapshot_below": 0.6, "quantise": "always", "quantise_soft": (0.3, 1.0),
            "rate": 0.03, "rate_from": 0.3,
        }),
        ("micro", "ablate", {
            "matrix_rule": "muon", "batch": 6, "micro_batch": 2, "depth_drop": 0.3, "ternary_noise": 0.2,
        }),
    ):  # fmt: skip
        config = mini(preset)
        model = dataclasses.replace(config.model, layers=1, blocks=config.model.blocks[:1])
        model = dataclasses.replace(model, matrix_storage="int4/64") if "quantise_soft" in changes else model
        if "consistency" in changes:
            model = changed(model, {"bank.at": "head", "skc.block": 4})
        train = dataclasses.replace(config.train, steps=50, seq=16, **changes)
        made[name] = dataclasses.replace(config, model=model, train=train)
    return made if world < 4 else {name: made[name] for name in ("uneven", "micro")}


def whole_run(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Train a run with everything on in folder/run, or go on with it, and return its numbers."""
    config = everything((folder / "data-path").read_text(), eval_every=6)
    dataset = open_dataset((folder / "data-path").read_text())
    engine = built(backend, config, ranks)
    path = folder / "run"
    run = Run.create(path, config, dataset.tokenizer.model) if ranks.rank == 0 else Follower(path, config)
    train(run, engine, dataset, lambda line: None)
    state = {**engine.params(), **engine.optimizer()}
    if ranks.rank == 0:
        save_file(state, folder / "run.safetensors")
    return {"rows": run.metrics() if ranks.rank == 0 else []}


def timed(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Train for a second of rank 0's time; the clock of rank 1 goes ten times as fast, and neither waits for steps."""
    config = everything((folder / "data-path").read_text())
    settings = {"seconds": 1.0, "steps": 100_000, "save_every": None, "keep_every": None, "log_every": 10}
    settings |= {"batch_stages": (2,), "batch_until": (0.5,)}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    dataset = open_dataset(config.data.path)
    path = folder / f"timed-{ranks.world}"
    run = Run.create(path, config, dataset.tokenizer.model) if ranks.rank == 0 else Follower(path, config)
    before = core.training.loop.Clock
    core.training.loop.Clock = FastClock if ranks.rank else before
    try:
        done = train(run, built(backend, config, ranks), dataset, lambda line: None)
    finally:
        core.training.loop.Clock = before
    steps = [int(part[0]) for part in ranks.gather(np.array([done.steps]))]
    return {"steps": steps, "seconds": done.seconds, "saved": ranks.rank == 0 and run.checkpoint().step}  # type: ignore


class FastClock(core.training.loop.Clock):
    """A clock that is wrong."""

    @property
    def seconds(self) -> float:
        """Ten times the time."""
        return 10 * super().seconds


def apart(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Start alike, then with other options on rank 1, and return what is said."""
    config = everything((folder / "data-path").read_text())
    dataset = open_dataset(config.data.path)
    same_start(ranks, config, dataset, dtype=None)
    try:
        same_start(ranks, config, dataset, dtype="float64" if ranks.rank else None)
    except ConfigError as error:
        return {"said": str(error)}
    return {"said": ""}


def scores(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Score the same weights in every kind of windows and return nats and bits per byte."""
    config = everything((folder / "data-path").read_text())
    dataset = open_dataset((folder / "data-path").read_text())
    engine = built(backend, config, ranks)
    found = {}
    for windows in ("plain", "sliding", "documents", "stateful"):
        stride = 8 if windows in ("sliding", "documents") else None
        settings = EvalConfig(windows=windows, seq=24, stride=stride, batch=3)
        for drawn in (None, 7):
            made = score(engine, Evaluation(dataset.val, settings, drawn), ranks=ranks)
            found[f"{windows} {drawn}"] = made.to_json()
    settings = EvalConfig(seq=24, batch=3, plugins=("temperature", "shared_tests.support.plugin_examples:Adaptation"))
    settings = dataclasses.replace(settings, round=2)
    for plugin in (Temperature(), Counts(), Adaptation(24)):  # what learns between rounds, and what trains
        made = score(engine, Evaluation(dataset.val, settings, 7, plugins=True), ranks=ranks, plugins=[plugin])
        found[type(plugin).__name__] = made.to_json()
    adapt = AdaptConfig("lora", rank=2, lr=0.02, chunk=8, documents=1, warm_a=True)
    phases = PhasesConfig((0.4,), lr=0.01, chunk=24)
    settings = EvalConfig(windows="documents", seq=24, round=2, adapt=adapt, phases=phases, plugins=("temperature",))
    learning = Evaluation.of(dataset.val, dataclasses.replace(config, eval=settings), 7, plugins=True)
    found["lora"] = score(engine, learning, ranks=ranks).to_json()
    return found


def beaten(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Hear each other while rank 1 is busy for longer than the silence allows, then lose it."""
    with Heartbeat(ranks, beat=0.2, silence=4.0, hint="go on from the checkpoint"):
        if ranks.rank == 1:
            until = time.monotonic() + 6
            while time.monotonic() < until:  # busy in Python: the slow rank of the test
                sum(range(1000))
        ranks.broadcast(b"")  # the others wait for the slow one here
        (folder / f"slow-{ranks.rank}").touch()
        while ranks.rank == 1 and len(list(folder.glob("slow-*"))) < ranks.world:  # the end must not overtake them
            time.sleep(0.05)
        how = os.environ.get("SKC_TEST_END", "")
        if ranks.rank == 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 1 and how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if ranks.rank == 1 and how == "raise":
            raise ValueError("a disk is full")
        ranks.broadcast(b"")  # for ever, where rank 1 is gone
    return {}


def wired(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Train in float64, with gradients sent in bfloat16; return losses, norms, notes, and each rank's final bits."""
    from shared_tests.support.harness import batches

    found: dict[str, Any] = {}
    for name, config in cases(ranks.world).items():
        options = EngineOptions(dtype="float64", compile=False, wire="bfloat16")
        engine, losses = load_engine(backend, config, options=options, ranks=ranks), []
        norms = []
        for step, batch in enumerate(batches(config, 8)):
            part = share(len(batch.tokens), ranks)
            mine = Batch(batch.tokens[part], batch.targets[part], len(batch.tokens), part.start)
            now = plan(step, progress_by_steps(step, config.train), config.train)
            result = engine.train_step(mine, now).result()
            losses.append(result.loss)
            norms.append(result.grad_norm)
        state = b"".join(value.tobytes() for value in {**engine.params(), **engine.optimizer()}.values())
        bits = ranks.gather(np.frombuffer(hashlib.sha256(state).digest(), np.uint8))
        notes = [note for note in engine.notes if "sent" in note]
        digests = [row.tobytes().hex() for row in bits]
        found[name] = {"losses": losses, "norms": norms, "bits": digests, "notes": notes}
    return found


def dormant(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Train experts of which one gets no token, by each rule; return the losses, and which experts kept their bits."""
    from shared_tests.support.harness import batches

    found = {}
    for rule in ("adamw", "muon"):
        config, weights = sleeping(rule)
        engine, losses = built(backend, config, ranks), []
        engine.load_params(weights, True)
        before = engine.params() | engine.optimizer()
        for batch in batches(config, 20):
            part = share(len(batch.tokens), ranks)
            mine = Batch(batch.tokens[part], batch.targets[part], len(batch.tokens))
            losses.append(engine.train_step(mine, plan(3, 0.5, config.train)).result().loss)
        found[rule] = {"losses": losses, "kept": kept(before, engine.params() | engine.optimizer())}
    return found


def streams(backend: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Score streams that whole weights learn from, with a temperature and without, and return what they cost."""
    found, config = {}, small("debug")
    for name, predictors in (("sliding", []), ("reset", []), ("plain", [Temperature()])):
        engine = built(backend, config, ranks)
        engine.load_params(working_weights(config.model, 2.0))
        evaluation = stream(tuple(engine.weights()), **FORMS[name])
        ledger = Ledger(len(evaluation.split))
        StreamPass(engine, evaluation, ledger, predictors, ranks=ranks).run()
        same = ranks.gather(ledger.entries["nats"].copy())
        assert all((nats == same[0]).all() for nats in same), "the ranks' ledgers differ"
        found[name] = [ledger.entries[side].tolist() for side in ("nats", "version")]
    return found


TASKS: dict[str, Callable[[str, Ranks, Path], dict[str, Any]]] = {
    "curves": curves, "whole_run": whole_run, "timed": timed, "apart": apart, "scores": scores, "beaten": beaten,
    "wired": wired, "dormant": dormant, "streams": streams,
}  # fmt: skip


def built(backend: str, config: RunConfig, ranks: Ranks) -> Engine:
    """Return the eager float64 engine of one rank."""
    options = EngineOptions(dtype="float64", compile=False)
    return load_engine(backend, config, options=options, quantise=config.train.quantise == "always", ranks=ranks)


def environments(backend: str, world: int, folder: Path) -> list[dict[str, str]]:
    """Return what a launcher would set for each of `world` ranks on this machine."""
    ports = _ports(world)
    if backend == "mlx":
        (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")} for rank in range(world)]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def read_hosts() -> list[list[str]]:
    """Return the hosts of the ring that this process is a rank of."""
    return json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())


def start(backend: str, world: int, command: list[str], folder: Path, **more: str) -> list[subprocess.Popen]:
    """Start `world` ranks of `python COMMAND ...` and return their processes; what they print goes to folder/rank-N."""
    processes, meeting = [], tempfile.mkdtemp(prefix="meeting-", dir=folder)
    more = {**more, "SKC_TEST_MEETING": meeting}
    for rank, variables in enumerate(environments(backend, world, folder)):
        with open(folder / f"rank-{rank}", "wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], env={**os.environ, **variables, **more}, stdout=file, stderr=file
                )
            )
    return processes


def together(backend: str, world: int, folder: Path, *tasks: str) -> dict[str, Any]:
    """Run tasks on `world` ranks (1: in this process) and return rank 0's results by task."""
    if world == 1:
        return {task: TASKS[task](backend, Alone(), folder) for task in tasks}
    processes = start(backend, world, ["-m", "shared_tests.support.ranked", backend, str(folder), *tasks], folder)
    codes = [process.wait(timeout=300) for process in processes]
    said = "\n".join((folder / f"rank-{rank}").read_text() for rank in range(world))
    assert codes == [0] * world, said
    return {task: json.loads((folder / f"{task}.json").read_text()) for task in tasks}


def _ports(count: int) -> list[int]:
    """Return free ports, of those that a system gives to nobody who does not ask for them by number."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports += [port] if port not in ports else []
    return ports


def meet(meeting: Path, rank: int, world: int, seconds: float = 240.0) -> None:
    """Wait until all ranks have been started and have loaded what they import; RuntimeError after `seconds`.

    MLX's ring tries for 31 s to reach a neighbour. On a busy machine the imports of two ranks may end further
    apart; then one of them gives up, and the others wait for it for ever.
    """
    (meeting / str(rank)).touch()
    until = time.monotonic() + seconds
    while len(list(meeting.iterdir())) < world:
        if time.monotonic() > until:
            raise RuntimeError(f"only ranks {sorted(path.name for path in meeting.iterdir())} of {world} were started")
        time.sleep(0.02)


def main() -> None:
    """Be one rank."""
    backend, folder = sys.argv[1], Path(sys.argv[2])
    if backend == "mlx":
        import mlx.core  # noqa: F401  # before the meeting: it takes longest

        meet(Path(os.environ["SKC_TEST_MEETING"]), int(os.environ["MLX_RANK"]), len(read_hosts()))
    ranks = join(backend)
    if backend == "cuda":
        import torch

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    for task in sys.argv[3:]:
        found = TASKS[task](backend, ranks, folder)
        if ranks.rank == 0:
            (folder / f"{task}.json").write_text(json.dumps(found))
    ranks.close()
    # A thread of gloo may still be letting go of a sum when the interpreter ends under it: once in hundreds of runs
    # std::terminate was called then, after the work was done. The tests are about the work.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
