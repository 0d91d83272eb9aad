"""`skc parity PRESET`: the two backends side by side, layer by layer and step by step."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core import presets, rng
from core.config import NO_STAGES, ConfigError, ModelConfig, RunConfig
from core.data.batches import batch as batch_at
from core.data.bundled import open_data
from core.engine.loading import BACKENDS, EXTRAS, available_backends
from core.engine.measured import Measured, load_measured
from core.engine.protocol import Arrays, Batch, DType, Engine, EngineOptions
from core.engine.scaffolding import scaffolding
from core.model.params import by_group, count, param_table, start_values
from core.training import schedule

ROWS, SEQ = 4, 256
"""Largest batch of a parity run: enough to see every code path, small enough for a laptop in float64."""
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Check:
    """One comparison: a measured gap and the limit from core/check/tolerances.py."""

    name: str
    gap: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the gap is within the limit (NaN is not)."""
        return bool(self.gap <= self.limit)


@dataclass(frozen=True)
class ParityReport:
    """What `run_parity` measured."""

    preset: str
    dtype: str
    parameters: int
    rows: int
    seq: int
    checks: tuple[Check, ...]
    curves: dict[str, tuple[float, ...]]
    """Backend -> training loss of every step, in nats."""

    @property
    def ok(self) -> bool:
        """Whether every check is within its limit."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict:
        """Return plain JSON values."""
        checks = [{**dataclasses.asdict(check), "ok": check.ok} for check in self.checks]
        return {**dataclasses.asdict(self), "checks": checks, "ok": self.ok}

    def lines(self) -> list[str]:
        """Return the table as text."""
        out = [
            f"parity of {self.preset}: {self.parameters:,} parameters, {self.dtype}, {self.rows} x {self.seq} tokens",
            "",
            f"{'what':<34} {'gap':>10} {'limit':>10}",
        ]
        out += [f"{c.name:<34} {c.gap:>10.1e} {c.limit:>10.0e}  {'ok' if c.ok else 'BEYOND'}" for c in self.checks]
        ours, theirs = (self.curves[name] for name in BACKENDS)
        out += ["", f"{'step':>4} {'loss, mlx':>20} {'loss, cuda':>20} {'gap':>10}"]
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            out.append(f"{step:>4} {a:>20.15f} {b:>20.15f} {abs(a - b):>10.1e}")
        return [*out, "", f"parity: {'yes' if self.ok else 'NO'}"]


def run_parity(
    config: RunConfig,
    *,
    steps: int = 10,
    dtype: DType = "float32",
    mini: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Build both backends from the same start values and compare them on the same batches.

    `report` receives a line whenever a stage begins. ConfigError if a backend is missing.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"--steps {steps}: expected 1 to {MOST_STEPS:,}")
    for name in BACKENDS:
        if name not in available_backends():
            raise ConfigError(f"both backends are needed; {name!r} is missing: pip install -e '.[{EXTRAS[name]}]'")
    config = _sized(presets.mini(config) if mini else config)
    batches = _batches(config, steps)
    engines = []
    for name in BACKENDS:
        report(f"building {config.preset} on {name}")
        engines.append(load_measured(name, config, options=EngineOptions(dtype=dtype, compile=False)))
    report("comparing start values, activations and gradients")
    checks = _forward_checks(config, engines, batches[0], dtype)
    limits, curves = _limits(dtype), {}
    if dtype == "float32" and (config.train.quantise != "never" or config.model.experts.count):
        report(f"training {steps} steps on both, from common weights each")
        curves, codes, routes = teacher_forced(engines, config, batches)
        checks.append(Check("codes and scales that differ", codes, limits["flips"]))
        if config.model.experts.count:
            checks.append(Check("tokens sent to other experts", routes, limits["flips"]))
        what, limit = f"loss over {steps} steps, common weights", limits["teacher"]
    else:
        for engine in engines:
            report(f"training {steps} steps on {engine.backend}")
            curves[engine.backend] = tuple(_curve(engine, config, batches))
        what, limit = f"loss over {steps} steps", limits["curve"]
    ours, theirs = (np.array(curves[name]) for name in BACKENDS)
    checks.append(Check(what, float(np.abs(ours - theirs).max(initial=0.0)), limit))
    rows, seq = config.train.batch, config.train.seq
    return ParityReport(config.preset, dtype, count(config.model), rows, seq, tuple(checks), curves)


def teacher_forced(
    engines: list[Measured], config: RunConfig, batches: list[Batch]
) -> tuple[dict[str, tuple[float, ...]], float, float]:
    """Train two engines, the second from the first one's weights and optimizer before every step.

    Left alone, float32 curves of models with stored weights part: a weight on the edge between two codes falls to
    another side by its last bit, and a token between two experts goes to the other one. Returns the losses by backend;
    the share of codes and scales that differ after a step, and of tokens that a pass sends to other experts in it, over
    all steps.
    """
    first, second = engines
    losses: dict[str, list[float]] = {engine.backend: [] for engine in engines}
    different = total = elsewhere = sent = 0
    for step, batch in enumerate(batches):
        plan = schedule.plan(step, (step + 1) / len(batches), config.train)
        second.load_params(first.params(), first.quantise)
        second.load_optimizer(first.optimizer())
        if config.model.experts.count:
            ours, theirs = (engine.routes(batch.tokens) for engine in engines)
            elsewhere, sent = elsewhere + int(np.sum(np.any(ours != theirs, axis=-1))), sent + ours[..., 0].size
        for engine in engines:
            losses[engine.backend].append(engine.train_step(batch, plan).result().loss)
        ours, theirs = first.quantised(), second.quantised()
        for name, row in param_table(config.model).items():
            for a, b in zip(ours[name], theirs[name], strict=True):
                if row.storage != "float16" and a is not None:
                    different, total = different + int(np.sum(a != b)), total + a.size
    return {name: tuple(values) for name, values in losses.items()}, different / max(total, 1), elsewhere / max(sent, 1)


def perturbed(config: ModelConfig, seed: int, scale: float = 1.0) -> Arrays:
    """Return start values moved by noise, matrices and embedding times `scale`.

    Output projections start at zero, so that without the noise no layer would show in the logits. Gains and residual
    scales are not scaled: five times the gain on queries only saturates the softmax.
    """
    weights, start = {}, start_values(config, seed)
    for name, row in param_table(config).items():
        noise = rng.normal(seed, f"noise/{name}", row.size).reshape(row.shape)
        vector = row.group == "vector"
        weights[name] = ((start[name] + (0.1 if vector else 0.02) * noise) * (1.0 if vector else scale)).astype(
            np.float32
        )
    return weights


def _limits(dtype: DType) -> dict[str, float]:
    from core.check import tolerances as t

    if dtype == "float64":
        return {"forward": t.P2_FLOAT64, "curve": t.P4_FLOAT64}
    if dtype == "float32":
        return {
            "forward": t.P2_FLOAT32, "curve": t.P4_FLOAT32, "teacher": t.P4_TEACHER, "flips": t.P4_FLIPS,
        }  # fmt: skip
    raise ConfigError(f"--dtype {dtype}: limits exist for float32 and float64")


def _sized(config: RunConfig) -> RunConfig:
    """Return `config` with small batches of one row length: stages change the shape of a step, not its arithmetic."""
    rows, seq = min(config.train.batch, ROWS), min(config.train.seq, SEQ)
    sizes = {"batch": rows, "seq": seq, "micro_batch": None, **NO_STAGES}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **sizes))


def _batches(config: RunConfig, steps: int) -> list[Batch]:
    """Return real text; a mini's small vocabulary folds the token ids, which keeps BOS and something to learn."""
    dataset, vocab = open_data(config.data.path), config.model.vocab
    out = []
    for step in range(steps):
        real = batch_at(dataset.train, step, config.train.batch, config.train.seq, config.seed)
        out.append(real if vocab >= dataset.tokenizer.vocab else Batch(real.tokens % vocab, real.targets % vocab))
    return out


def _forward_checks(config: RunConfig, engines: list[Measured], batch: Batch, dtype: DType) -> list[Check]:
    from core.check.tolerances import relative_rms

    limit = _limits(dtype)["forward"]
    start = [engine.params() for engine in engines]
    different = sum(start[0][name].tobytes() != start[1][name].tobytes() for name in start[0])
    checks = [Check("start values, tensors unequal", float(different), 0.0)]
    moved = perturbed(config.model, config.seed)
    for engine in engines:
        engine.load_params(moved, config.train.quantise != "never")
    ours, theirs = (engine.activations(batch.tokens) for engine in engines)
    checks += [Check(name, relative_rms(ours[name], theirs[name]), limit) for name in ours]
    grads = [engine.gradients(batch)[1] for engine in engines]
    beside = {"scaffolding": list(rows)} if (rows := scaffolding(config.model, config.train)) else {}
    for group, names in {**by_group(config.model), **beside}.items():
        a, b = (np.concatenate([g[name].ravel() for name in names]) for g in grads)
        checks.append(Check(f"gradients, {group}", relative_rms(a, b), limit))
    for engine, values in zip(engines, start, strict=True):
        engine.load_params(values)
    return checks


def _curve(engine: Engine, config: RunConfig, batches: list[Batch]) -> list[float]:
    pending = []
    for step, batch in enumerate(batches):
        plan = schedule.plan(step, (step + 1) / len(batches), config.train)
        pending.append(engine.train_step(batch, plan))
    return [p.result().loss for p in pending]
