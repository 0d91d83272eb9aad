"""One run compared with another for `skc compare`: data, settings, machine, curves, and that in words."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from core.compare.curves import CommonWindows, Curve, CurveGap, common_windows, measure_gap
from core.config import RunConfig, differences
from core.training.run import FREE, Run

By = Literal["auto", "step", "tokens", "share"]
DRIFT = 0.10
"""Nats by which free-running float32 twins of a ternary model drift after 50 steps (docs/log.md): grown rounding."""
LAST_PLACE = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
LEAVE_OUT = ("command", "step", "earlier", "data", "notes", "versions")
"""Fields of env.json that say nothing of the machine, or are taken apart."""
ESTIMATES = ("windows", "seq", "stride", "train_documents", "seed")
"""Fields of `eval` that choose what the estimates during training score."""


@dataclass(frozen=True)
class Validation:
    """Validation estimates of both runs at one place, in bits per byte; no error where all documents were scored."""

    at: float
    first: float
    first_error: float | None
    second: float
    second_error: float | None
    difference: float
    error: float | None
    """Standard error of the difference for two draws of documents; where both scored the same ones it is less."""


@dataclass(frozen=True)
class RunPair:
    """What differs between the first run and one other; lines read `first -> other`."""

    data: tuple[str, ...]
    decide: tuple[str, ...]
    """Settings that decide the weights."""
    free: tuple[str, ...]
    """Settings that do not."""
    machine: tuple[str, ...]
    by: str
    """What positions are: `step`, `tokens` or `share` (of the schedule)."""
    unit: str
    same_batches: bool
    """Whether both saw the same rows at the same place, so that the noise of batches cancels."""
    curves: CurveGap
    validation: tuple[Validation, ...]
    same_documents: bool
    notes: tuple[str, ...]
    """What the comparison leaves open."""
    over: CommonWindows
    """Both curves over common windows; not in the JSON."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the lines for people."""
        return {**{k: v for k, v in asdict(self).items() if k != "over"}, "words": words(self)}


def choose_axis(configs: list[RunConfig], by: By) -> str:
    """Choose what curves are aligned by: as asked for, else by step if all runs take the same steps, else by tokens."""
    names = ("batch", "seq", "steps", "seconds", "batch_stages", "batch_until")
    settings = {tuple(getattr(c.train, name) for name in names) for c in configs}
    return by if by != "auto" else "step" if len(settings) == 1 else "tokens"


def positions(run: Run, name: str, by: str) -> dict[float, dict[str, Any]]:
    """Return the lines of a run that hold the metric `name`, by place; RunError for a damaged record."""
    train, lines, last = run.config.train, {}, 0.0
    for row in run.metrics():
        if name not in row or row["step"] < 1:
            continue
        share = row["step"] / train.steps if train.seconds is None else row.get("progress", row["step"] / train.steps)
        place = {"step": row["step"], "tokens": run.tokens(row), "share": share}[by]
        if place > last:
            lines[place], last = row, place
    return lines


def trained_on(run: Run) -> str:
    """Return where a run was trained, in a few words."""
    env = run.environment()
    ranks = f"{env['ranks']} x " if env.get("ranks", 1) != 1 else ""
    backend, device, dtype = (env.get(name, "?")[:60] for name in ("backend", "device", "dtype"))
    return f"{backend}, {ranks}{device}, {dtype}"


def compare_pair(first: Run, other: Run, by: str) -> RunPair:
    """Compare `other` with `first`, aligned by what `choose_axis` chose."""
    environments = first.environment(), other.environment()
    a, b = (_machine(env) for env in environments)
    data, notes = _data(first, other)
    changed, decide, free = differences(first.config, other.config), [], []
    for line in changed:
        if line.startswith("data.path"):
            (data if data else free).append(line)
        else:
            (free if line.startswith(FREE) else decide).append(line)
    unit, metric = "nats", "train/loss"
    if first.config.model.vocab != other.config.model.vocab:
        unit, metric = "bits per byte", "train/bpb"
        notes.append("nats per token of different vocabularies cannot be compared: curves are in bits per byte")
    lines = [positions(run, metric, by) for run in (first, other)]
    over = common_windows(*(Curve([*p], [row[metric] for row in p.values()]) for p in lines), cut=by == "share")
    if by == "share":
        notes.append("lines of one run that cross a line of the other were taken as even")
    same_batches = not data and _same_batches(first.config, other.config, by)
    if not same_batches and len(over.ends):
        notes.append("no common batches: their noise does not cancel, so that only large differences show")
    notes += _schedules(lines, over, by)
    dtypes = [str(e.get("dtype")) for env in environments for e in (env, *env.get("earlier", []))]
    floor = rounding(dtypes, float(over.first.max(initial=0.0)), _tokens(first, over, by))
    curves = measure_gap(over, floor)
    val, same_documents = _validation(first, other, by), not data and _same_evaluation(first.config, other.config)
    machine = tuple(f"{k}: {a.get(k, '-')} -> {b.get(k, '-')}" for k in {**a, **b} if a.get(k) != b.get(k))
    return RunPair(
        tuple(data), tuple(decide), tuple(free), machine, by, unit, same_batches, curves, val, same_documents,
        tuple(notes), over,
    )  # fmt: skip


def rounding(dtypes: Sequence[str], level: float, tokens: float) -> float:
    """Return how far two means of `tokens` losses near `level` can differ by rounding in these types.

    Sums and means are float32 at best but in float64: 8 units in the last place. In 16-bit types every token's loss
    errs by about one unit, independently (measured in bfloat16: at most 0.3 of what this gives). An unknown type
    counts as float32.
    """
    single = LAST_PLACE["float32"]
    coarsest = max(LAST_PLACE.get(dtype, single) for dtype in dtypes)
    per_token = level * coarsest / math.sqrt(max(tokens, 1.0)) if coarsest > single else 0.0
    return 8 * level * min(coarsest, single) + per_token


def _machine(env: dict[str, Any]) -> dict[str, str]:
    """Return the machine's facts from env.json by name; a run started on several machines has all, joined by `then`."""
    facts: dict[str, list[str]] = {}
    for start in (*env.get("earlier", []), env):
        flat = {k: v for k, v in start.items() if k not in LEAVE_OUT}
        for note in start.get("notes", []):
            what, _, how = str(note).partition(": ")
            flat[what] = how
        flat |= {f"version of {k}": v for k, v in start.get("versions", {}).items()}
        flat["commit"] = str(flat.get("commit"))[:12]
        for name, value in flat.items():
            if str(value) not in facts.setdefault(name, []):
                facts[name].append(str(value))
    return {name: " then ".join(values) for name, values in facts.items()}


def _data(first: Run, other: Run) -> tuple[list[str], list[str]]:
    """Return how the data differ, and what is not known of them."""
    lines, notes, known = [], [], [run.environment().get("data") for run in (first, other)]
    for run, data in zip((first, other), known, strict=True):
        if data is None:
            notes.append(f"{run.path} does not say which data it saw: copy its env.json too")
    if None not in known:
        a, b = ({k: str(v)[:16] for k, v in data.items()} if isinstance(data, dict) else {} for data in known)
        lines += [f"{k}: {a.get(k, '-')} -> {b.get(k, '-')}" for k in {**a, **b} if a.get(k) != b.get(k)]
    if all(run.tokenizer_path.exists() for run in (first, other)):
        a, b = (hashlib.sha256(run.tokenizer()).hexdigest()[:16] for run in (first, other))
        lines += [f"tokenizer: {a} -> {b}"] if a != b else []
    return lines, notes


def _same_batches(a: RunConfig, b: RunConfig, by: str) -> bool:
    names = ["batch", "seq", "seq_stages", "seq_until", "batch_stages", "batch_until"]
    if by == "share" or a.train.seq_stages or a.train.batch_stages:  # places or row lengths follow the schedule
        names += ["steps", "seconds"]
        if a.train.seconds is not None:
            return False
    return a.seed == b.seed and all(getattr(a.train, name) == getattr(b.train, name) for name in names)


def _same_evaluation(a: RunConfig, b: RunConfig) -> bool:
    return all(getattr(a.eval, name) == getattr(b.eval, name) for name in ESTIMATES)


def _tokens(run: Run, over: CommonWindows, by: str) -> float:
    """Return about how many tokens the shortest window holds."""
    shortest = float(np.min(over.ends - over.starts, initial=np.inf)) if len(over.ends) else 1.0
    per_step = run.config.train.tokens_per_step
    return shortest * {"step": per_step, "tokens": 1, "share": per_step * run.config.train.steps}[by]


def _schedules(lines: list[dict[float, dict[str, Any]]], over: CommonWindows, by: str) -> list[str]:
    """Say so where the schedules are at different places when the common part ends."""
    if by == "share" or not len(over.ends):
        return []
    end = float(over.ends[-1])
    a, b = (line[end].get("progress") for line in lines)
    if a is None or b is None or abs(a - b) <= 0.02:
        return []
    return [
        f"at {where(end, by)} the first is {100 * a:.3g} % through its schedule, this one {100 * b:.3g} %: their "
        "rates differ, which parts curves (--by share aligns by the schedule)"
    ]


def _validation(first: Run, other: Run, by: str) -> tuple[Validation, ...]:
    a, b = (positions(run, "val/bpb", by) for run in (first, other))
    estimates = []
    for at in sorted(a.keys() & b.keys()):
        (x, dx), (y, dy) = ((row["val/bpb"], row.get("val/error")) for row in (a[at], b[at]))
        error = math.hypot(dx or 0.0, dy or 0.0) or None
        estimates.append(Validation(at, x, dx, y, dy, y - x, error))
    return tuple(estimates)


def where(place: float, by: str) -> str:
    """Return a position with its unit."""
    return {"step": f"step {place:,.0f}", "tokens": f"{place:,.0f} tokens", "share": f"{100 * place:.3g} %"}[by]


def words(pair: RunPair) -> list[str]:
    """Return lines for people: differing data first, then settings, machine, curves, validation and what is open."""
    out = [f"DATA differ: {'; '.join(pair.data)}"] if pair.data else []
    out.append(f"settings that decide the weights: {'; '.join(pair.decide) or 'the same'}")
    out += [f"settings that do not: {'; '.join(pair.free)}"] if pair.free else []
    out.append(f"machine: {'; '.join(pair.machine) or 'the same'}")
    out.append(f"curves by {'share of the schedule' if pair.by == 'share' else pair.by}: {_curves(pair)}")
    if pair.validation:
        val = pair.validation[-1]
        spread = "" if val.error is None else f" ± {val.error:.4f}"
        same = " (the same documents: the true error is smaller)" if spread and pair.same_documents else ""
        out.append(f"validation at {where(val.at, pair.by)}: {val.difference:+.4f}{spread} bits per byte{same}")
    return out + [f"note: {note}" for note in pair.notes]


def _curves(pair: RunPair) -> str:
    """Return one sentence: how long the curves are the same, and how far apart they end."""
    gap, unit = pair.curves, pair.unit
    if not gap.windows:
        return "no common windows"
    within = "to the last bit" if gap.same_within == 0 else f"to rounding (at most {gap.same_within:.1g} {unit})"
    until = where(gap.same_until, pair.by)
    same = f"the same {within} until {until}" if gap.same_until else f"apart by more than {gap.floor:.1g} at once"
    if gap.end is None or gap.end_from is None:
        return f"{same}, where the common part ends"
    mean = f"{gap.end:+.4f}" + ("" if gap.end_spread is None else f" ± {gap.end_spread:.4f}")
    text = f"{same}, then at most {gap.largest:.2g} apart; {mean} {unit} after {where(gap.end_from, pair.by)}"
    return f"{text} ({_caution(pair)})"


def _caution(pair: RunPair) -> str:
    """Return how far the difference at the end can be believed."""
    gap = pair.curves
    if gap.end_spread is None:
        return f"{gap.end_windows} windows: too few for an interval; seeds decide: skc ablate"
    # float64 does not grow that far, and curves that were never the same did not part by rounding.
    grown = gap.same_until > 0 and abs(gap.end or 0.0) <= DRIFT and pair.unit == "nats" and gap.floor > 1e-12
    why = f"grown rounding alone can bring {DRIFT:.2f}" if grown else "one pair of runs is one draw"
    return f"{gap.end_windows} windows, taken as independent; {why}; seeds decide: skc ablate"
