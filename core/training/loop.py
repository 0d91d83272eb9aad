"""The training loop, on one screen: what happens, in the order in which it happens."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from core import rng
from core.config import ConfigError, RunConfig, TrainConfig
from core.console import duration
from core.data.batch import Batch
from core.data.batches import Prefetch, batch_from
from core.data.dataset import Dataset
from core.decoding.generate import sample_lines, samples
from core.engine.protocol import Engine, Pending, StepResult
from core.engine.ranks import Ranks, Stopped, agree, share
from core.files import MAX_TEXT
from core.scoring.accounting import bits_per_byte, training_bytes
from core.scoring.evaluation import Evaluation
from core.scoring.score import score
from core.training.run import Run
from core.training.schedule import plan, progress_by_steps
from core.training.step_line import Show, StepLine, of_steps

Say = Callable[[str], None]
MOST_LINES = MAX_TEXT // 400
"""Log lines of which metrics.jsonl can be read: one has about 300 bytes."""


OVERFLOWS = 10
"""Steps in a row whose gradients overflow float16, after which a run ends."""


class NonFiniteError(ArithmeticError):
    """Loss or gradients of a step were not finite: the weights are those before it and nothing is saved after it."""


class TrainingSummary(NamedTuple):
    """What `train` did."""

    steps: int
    """Steps that the weights have seen, earlier starts included."""
    seconds: float
    """Training time, earlier starts included."""
    ended: float
    """When the last step was done, by time.perf_counter."""
    taken: int
    """Steps of this start."""


class Due(NamedTuple):
    """What follows a step."""

    evaluate: bool
    """A validation estimate."""
    write: bool
    """Samples of text."""
    save: bool
    """A checkpoint."""
    read: bool
    """The loop waits for the device: one of these, a log line, or the last step."""


class Clock:
    """Training time: it stands still inside `paused`, and goes on from `seconds` when a run is resumed."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before if self._since is None else self._before + time.perf_counter() - self._since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not training."""
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()


class Leave:
    """A context in which SIGINT and SIGTERM ask the loop to stop after its step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Leave":
        """Listen, if this is the main thread, to the signals that this process does not ignore."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def train(run: Run, engine: Engine, dataset: Dataset, say: Say, show: Show | None = None) -> TrainingSummary:
    """Train `engine` to the end of `run.config` on `dataset`, from the run's checkpoint if it has one.

    Every rank of the engine does this with its rows of each batch; time is rank 0's. NonFiniteError names the first
    step whose loss or gradients were not finite, ConfigError a run of fewer rows than ranks. Stopped comes, after a
    checkpoint, where SIGINT or SIGTERM asked for it. `show` gets a line in place of the last one after every step.
    """
    config, settings, ranks = run.config, run.config.train, engine.ranks
    check_rows(settings, ranks)
    step, seconds, tokens = run.restore(engine)
    if step:
        say(f"resumed at step {step}")
    if not done(step, seconds, settings):
        if settings.ternary_noise:
            say("ternary weights have noise: until the quiet end what is trained is what is stored on average only")
        warm_up(engine, config, show)
    now = plan(step, progress_of(step, seconds, settings), settings)
    feed = prefetch(config, ranks, dataset, tokens, now.rows, now.seq)
    clock, first = Clock(seconds), step
    ended = time.perf_counter()
    meter, saved, saved_at = Meter(run, engine, dataset, clock, say), step, time.monotonic()
    line = StepLine(settings, lambda: clock.seconds, step, tokens, show, engine.stats)
    with Leave() as leave, contextlib.closing(feed):
        while not done(step, seconds := agreed(clock, engine, settings), settings):
            progress = progress_of(step, seconds, settings)
            now = plan(step, progress, settings)
            if settings.quantise == "late" and now.quantise and not engine.quantise:
                softly = ", rounded softly" if settings.quantise_soft else ""
                say(f"step {step}: from here on forward passes use the stored form of the weights{softly}")
            pending = engine.train_step(feed.get(tokens, now.rows, now.seq), now)
            tokens += now.rows * now.seq
            meter.add(step, progress, pending, tokens)
            step += 1
            line(step, tokens, pending)
            now_due = due(step, settings)
            leaving, late = _asked(ranks, leave, now_due, time.monotonic() - saved_at, settings)
            if now_due.read or leaving:
                meter.read(step)  # waits for the device: what follows is not training and the clock stands still
            ended = time.perf_counter()
            with clock.paused():
                if now_due.evaluate:
                    _estimate(run, engine, dataset, step, tokens, say)
                if now_due.write and ranks.rank == 0:
                    write_samples(run, engine, dataset, step, say)
                if leaving:
                    say(f"asked to stop: saving step {step} first")
                if now_due.save or late or leaving:
                    run.save(engine, step, clock.seconds, tokens)
                    saved, saved_at = step, time.monotonic()
            if leaving:
                agree(ranks, None)  # no rank leaves before rank 0 has saved
                raise Stopped
    if meter.read(step):
        ended = time.perf_counter()
    seconds = clock.seconds
    if agree(ranks, saved != step or not run.checkpoint_path.exists()):
        run.save(engine, step, seconds, tokens)
    if _any(ranks, leave.asked):
        raise Stopped
    return TrainingSummary(step, seconds, ended, step - first)


def _asked(ranks: Ranks, leave: Leave, now: Due, since: float, settings: TrainConfig) -> tuple[bool, bool]:
    """Return whether to stop after this step, and whether a checkpoint is due by rank 0's clock.

    Several ranks tell each other where they wait for the device anyway.
    """
    late = now.read and settings.save_minutes is not None and since >= 60 * settings.save_minutes
    if ranks.world == 1:
        return leave.asked, late
    if not now.read:
        return False, False
    return _any(ranks, leave.asked), agree(ranks, late)


def _any(ranks: Ranks, mine: bool) -> bool:
    """Return whether it is so on any rank."""
    return any(row.any() for row in ranks.gather(np.array([mine], np.int64)))


def check_rows(settings: TrainConfig, ranks: Ranks) -> None:
    """Raise ConfigError for a run of fewer rows than ranks, or of more log lines than are read again at its end."""
    lines = settings.steps // settings.log_every
    if settings.seconds is None and lines > MOST_LINES:
        raise ConfigError(
            f"train.log_every={settings.log_every} gives {lines:,} log lines in train.steps={settings.steps:,}: "
            f"expected at most {MOST_LINES:,}; raise train.log_every"
        )
    if settings.batch < ranks.world:
        raise ConfigError(f"train.batch={settings.batch} rows cannot be shared by {ranks.world} ranks: use fewer ranks")
    rows, seq = min(settings.shapes)
    if rows < ranks.world:
        raise ConfigError(
            f"train.batch_stages={settings.batch_stages}: a stage's {rows} rows of {seq} tokens cannot be shared by "
            f"{ranks.world} ranks: use fewer ranks, or more rows"
        )


def prefetch(config: RunConfig, ranks: Ranks, dataset: Dataset, tokens: int, rows: int, seq: int) -> Prefetch:
    """Start to make this rank's batches behind `tokens` tokens, `rows` rows of `seq`, of shards as they were made."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        dataset.train.start_verify()

    def make(tokens: int, rows: int, seq: int) -> Batch:
        return batch_from(dataset.train, tokens // seq, rows, seq, config.seed, share(rows, ranks))

    return Prefetch(make, tokens, rows, seq)


def warm_up(engine: Engine, config: RunConfig, show: Show | None = None) -> None:
    """Let the engine compile its step for every shape, with and without repeats and experts if the run has both.

    It does so on random tokens; weights and optimizer are put back. `show` gets a line before every step.
    """
    params, optimizer, quantise = engine.params(), engine.optimizer(), engine.quantise
    settings, again, sends = config.train, bool(config.model.repeat_layers), bool(config.train.route_from)
    firsts = [plan(0, progress, settings) for progress in (0.0, settings.repeat_from, settings.route_from, 1.0)]
    for rows, seq in sorted(settings.shapes, key=lambda shape: shape[::-1]):
        drawn = rng.integers16(config.seed, "warm-up", rows * (seq + 1)) % config.model.vocab
        drawn = drawn.astype(np.int32).reshape(rows, seq + 1)[share(rows, engine.ranks)]
        tokens, targets = np.ascontiguousarray(drawn[:, :-1]), np.ascontiguousarray(drawn[:, 1:])
        switches = [(now.repeat and every, now.route) for now in firsts for every in (True, settings.repeat_every == 1)]
        for repeat, route in dict.fromkeys(switches):
            if show is not None:
                words = ", layers repeated" * again * repeat + ", experts" * sends * route
                show(f"compiling: a step of {rows} rows of {seq} tokens{words}")
            first = replace(firsts[0], rows=rows, seq=seq, quantise=settings.quantise != "never")
            first = replace(first, repeat=repeat, route=route, snapshot=settings.snapshot_every is not None)
            engine.train_step(Batch(tokens, targets, rows), first).result()
    engine.load_params(params, quantise)
    engine.load_optimizer(optimizer)


class Meter:
    """The steps since the last line: read together, so that the device is not stalled by every one of them."""

    def __init__(self, run: Run, engine: Engine, dataset: Dataset, clock: Clock, say: Say) -> None:
        self._run, self._engine, self._clock, self._say = run, engine, clock, say
        self._traces = engine.stats()["traces"]
        self._tokens, self._bytes = len(dataset.train), training_bytes(dataset)
        self._steps: list[tuple[int, float, Pending, int]] = []
        self._shown = self._first = clock.seconds
        self._taken = self._overflows = 0

    def add(self, step: int, progress: float, pending: Pending, tokens: int) -> None:
        """Remember a step that was started, and the tokens of all steps up to it."""
        self._steps.append((step, progress, pending, tokens))

    def read(self, step: int) -> bool:
        """Wait for the steps since the last line and record them, if there are any, and return whether there were.

        NonFiniteError names the first bad one.
        """
        if not self._steps:
            return False
        results = [(number, pending.result()) for number, _, pending, _ in self._steps]
        self._check(results)
        now, settings = self._clock.seconds, self._run.config.train
        took, count = max(now - self._shown, 1e-9), len(results)
        loss = float(np.mean([result.loss for _, result in results]))
        progress = [p for _, p, _, _ in self._steps]
        tokens = sum(math.prod(settings.shape(p)) for p in progress)
        norms = [result.grad_norm for _, result in results if result.finite]
        values: dict[str, Any] = {
            "train/loss": loss,
            **({"train/grad_norm": float(np.mean(norms))} if norms else {}),
            "opt/lr": plan(step - 1, progress[-1], settings).lr_matrix,
            "perf/tok_s": tokens / took,
            "perf/step_ms": 1000 * took / count,
            "clock/seconds": now,
            "progress": progress[-1],
        }
        stats = self._engine.stats()
        if (memory := stats.get("peak_bytes", stats.get("process_bytes"))) is not None:
            values["perf/memory"] = memory
        if settings.seconds is not None:
            values["progress/each"] = progress
        if settings.batch_stages:
            values["tokens"] = self._steps[-1][3]
        if self._bytes is not None:
            values["train/bpb"] = bits_per_byte(loss * self._tokens, self._bytes[1])
        self._steps, self._shown, self._taken = [], now, self._taken + count
        self._run.log(step, values)
        self._say(self._line(step, values, now))
        self._warn(step, progress[-1], stats["traces"])
        return True

    def _check(self, results: list[tuple[int, StepResult]]) -> None:
        """Raise NonFiniteError for a step that did not change the weights.

        In float16 gradients may overflow now and then: such a step is said, and the next one has another batch.
        """
        skips = []
        for number, result in results:
            self._overflows = 0 if result.finite else self._overflows + 1
            if result.finite:
                continue
            narrow = self._engine.dtype == "float16"
            if not narrow or self._overflows >= OVERFLOWS or not np.isfinite(result.loss):
                raise NonFiniteError(
                    f"step {number}: the loss ({result.loss}) or its gradients (norm {result.grad_norm}) are not "
                    f"finite; stopped, and {self._run.checkpoint_path} is as it was: try a lower learning rate"
                    + (", or --dtype float32" if narrow else "")
                )
            skips.append(str(number))
        if skips:
            self._say(f"left the weights as they were, since gradients overflowed float16, in step {', '.join(skips)}")

    def _warn(self, step: int, progress: float, traces: float) -> None:
        """Say once that the device's code was compiled again: a step waited for it, and the clock went on."""
        more = traces - self._traces
        if more > 0:
            rows, seq = self._run.config.train.shape(progress)
            rows = min(rows, self._run.config.train.rows_of(seq)[1])
            self._say(
                f"compiled again by step {step} ({more:.0f} more): {rows} rows of {seq} tokens, in a shape "
                "that the warm-up had not seen (said once)"
            )
            self._traces = float("inf")

    def _line(self, step: int, values: dict[str, Any], now: float) -> str:
        settings = self._run.config.train
        left = (settings.steps - step) * (now - self._first) / self._taken
        if settings.train_stop is not None:
            left = min(left, settings.train_stop - now)
        bpb = f"  bpb {values['train/bpb']:.4f}" if "train/bpb" in values else ""
        return (
            f"{of_steps(step, settings)}  loss {values['train/loss']:.4f}{bpb}  lr {values['opt/lr']:.2e}  "
            f"{values['perf/tok_s']:,.0f} tok/s  {duration(left)} left"
        )


def _estimate(run: Run, engine: Engine, dataset: Dataset, step: int, tokens: int, say: Say) -> None:
    """Estimate the validation score on a few documents and record it."""
    evaluation = Evaluation.of(dataset.val, run.config, run.config.eval.train_documents)
    estimate = score(engine, evaluation, ranks=engine.ranks)
    values = {"val/bpb": estimate.bpb} | ({} if estimate.error is None else {"val/error": estimate.error})
    run.log(step, values | ({"tokens": tokens} if run.config.train.batch_stages else {}))
    spread = f" ± {estimate.error:.4f}" if estimate.error else ""  # no error where the draw took all documents
    say(
        f"step {step}  validation estimate {estimate.bpb:.4f}{spread} bits per byte "
        f"({estimate.documents} of {estimate.total_documents} documents, byte rule {estimate.byte_rule}, "
        f"{estimate.windows})"
    )


def write_samples(run: Run, engine: Engine, dataset: Dataset, step: int, say: Say) -> list[str]:
    """Let the model write its samples, show them and record them."""
    texts = samples(engine, dataset.tokenizer, run.config)
    run.log(step, {"samples": texts})
    for prompt, text in sample_lines(texts):
        say(f"step {step}  sample {prompt}: {text}")
    return texts


def due(step: int, settings: TrainConfig) -> Due:
    """Return what follows when `step` steps are done."""
    evaluate, write, save = (
        _due(step, every) for every in (settings.eval_every, settings.sample_every, settings.save_every)
    )
    read = evaluate or write or save or _due(step, settings.log_every) or step == settings.steps
    return Due(evaluate, write, save, read)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def done(step: int, seconds: float, settings: TrainConfig) -> bool:
    """Return whether a run of `step` steps and `seconds` of training has reached its end."""
    return step >= settings.steps or (settings.train_stop is not None and seconds >= settings.train_stop)


def agreed(clock: Clock, engine: Engine, settings: TrainConfig) -> float:
    """Return the training time that every rank goes by; where only steps count, nobody is asked."""
    return clock.seconds if settings.seconds is None else agree(engine.ranks, clock.seconds)


def progress_of(step: int, seconds: float, settings: TrainConfig) -> float:
    """Return the share of the run that the schedule sees at the start of `step`, after `seconds` of training."""
    stop = settings.train_stop
    return progress_by_steps(step, settings) if stop is None else min(1.0, seconds / stop)
