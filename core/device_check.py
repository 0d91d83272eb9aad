"""`scripts/gpu_check` and `scripts/mac_check`: whether an accelerator computes what the CPU does, and how fast."""

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core import presets
from core.bench import BenchError, BenchReport, run_bench
from core.config import ConfigError, RunConfig
from core.console import Console, one_line
from core.device_cases import compiled, levels, ops, tried
from core.engine import choose_backend, load_engine
from core.parity import Check

Say = Callable[[str], None]
PEAKS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s by the maker's data sheet, by what the device's name contains."""
MINI, COMPILED = ("debug", "skc_8xh100"), ("debug", "baseline", "skc_8xh100")
"""Presets whose minis stand for all others, in a quick run and where compiling takes long."""
BENCHED = {"cuda": ("baseline", "ternary_74m", "skc_8xh100"), "mlx": ("tiny", "skc_mac", "baseline")}
MOST_ROWS = 64
"""Largest micro-batch that is tried."""
USED = 0.8
"""Share of the memory that a micro-batch may fill."""


@dataclass(frozen=True)
class Speed:
    """One preset's speed at one micro-batch."""

    micro_batch: int
    report: BenchReport
    own_peak: float
    """FLOP/s of the device's own large matmul, in the same session."""
    published: float | None
    """Dense bfloat16 FLOP/s of the data sheet."""

    def cells(self) -> list[str]:
        """Return a row of the table."""
        row = self.report.rows[0]
        share = f"{row.flops / self.published:.1%}" if self.published else "-"
        return [
            self.report.preset, str(self.micro_batch), f"{row.ms_per_step:.1f}", f"{row.tokens_per_second:,.0f}",
            f"{row.flops / 1e12:.2f}", share, f"{row.flops / self.own_peak:.1%}", f"{row.peak_bytes / 2**30:.2f}",
            f"{row.traces:.0f}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What `examine` found."""

    command: str
    device: dict[str, Any]
    forms: dict[str, dict[str, dict[str, float] | str]]
    """Documents -> form of attention -> gaps to ours, or why it is not there."""
    checks: tuple[Check, ...]
    speeds: tuple[Speed, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is within its limit."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        checks = [{"name": c.name, "gap": c.gap if c.gap < math.inf else None, "limit": c.limit} for c in self.checks]
        return {**dataclasses.asdict(self), "checks": checks, "ok": self.ok}

    def lines(self) -> list[str]:
        """Return the report as Markdown."""
        versions = ", ".join(f"{name} {value}" for name, value in self.device["versions"].items())
        out = [
            f"## {self.device['name']} ({datetime.date.today()})", "",
            f"`{self.command}`: {versions}; {self.device['memory'] / 2**30:.0f} GiB.", "",
            *(f"* {speed.report.preset}: {'; '.join(speed.report.rows[0].notes)}" for speed in self.speeds), "",
        ]  # fmt: skip
        rows = [
            [form, documents, *([f"{gap:.1e}" for gap in found.values()] if isinstance(found, dict) else [found])]
            for documents, of in self.forms.items()
            for form, found in of.items()
        ]
        if rows:
            out += [*_table(["attention, bfloat16, against ours", "documents", "output", "dq", "dk", "dv"], rows), ""]
        rows = [[c.name, f"{c.gap:.1e}", f"{c.limit:.0e}", "ok" if c.ok else "**BEYOND**"] for c in self.checks]
        out += [*_table(["what", "gap", "limit", ""], rows), ""]
        head = ["preset", "micro-batch", "ms/step", "tokens/s", "TFLOP/s", "of the data sheet", "of own matmul", "GiB",
                "compilations"]  # fmt: skip
        out += [*_table(head, [speed.cells() for speed in self.speeds]), ""] if self.speeds else []
        return [*out, f"Everything within its limit: {'yes' if self.ok else 'NO'}."]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    filled = [row + [""] * (len(head) - len(row)) for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *filled)]


def examine(
    backend: str, command: str, *, mini: bool, benched: Sequence[str], checked: bool = True, say: Say = print
) -> Report | None:
    """Check this machine's accelerator and time the presets `benched` on it; None if it has none.

    `mini`: a few small things, on the CPU too.
    """
    module = importlib.import_module(f"backends.{choose_backend(backend)}.check")
    device = module.accelerator()
    if device is None and not mini:
        return None
    device = device or {"name": "CPU (mini)", "memory": 2**30, "versions": {"numpy": np.__version__}}
    say(f"{device['name']}: " + ", ".join(f"{name} {value}" for name, value in device["versions"].items()))
    checks, forms = [], {}
    if checked:
        forms, names = _forms(module, mini), MINI if mini else tuple(presets.PRESETS)
        checks = [*ops(module, mini, say), *_form_checks(forms)]
        checks += tried("P2, P4", levels(backend, names, 3 if mini else 50, say))
        checks += tried("compiled against eager", compiled(backend, MINI if mini else COMPILED, not mini, say))
    speeds: list[Speed] = []
    for name in benched:
        config = presets.get(name).config
        peak = load_engine(backend, presets.mini(config)).matmul_rate(256 if mini else 8192, 10)
        try:
            speeds += _speeds(backend, presets.mini(config) if mini else config, device, peak, mini, say)
        except BenchError as error:
            checks.append(Check(f"timing {name}: {one_line(error)}", math.inf, 0.0))
    return Report(command, device, forms, tuple(checks), tuple(speeds))


def _forms(module: Any, mini: bool) -> dict[str, dict[str, dict[str, float] | str]]:
    """Return the forms of attention for documents apart and for whole rows, on the heads of skc_8xh100."""
    model = presets.get("skc_8xh100").config.model
    made = {kind: dataclasses.replace(model, documents=kind) for kind in ("isolated", "packed")}
    return {kind: module.forms(model, 64 if mini else 1024) for kind, model in made.items()}


def _form_checks(forms: dict[str, dict[str, dict[str, float] | str]]) -> Iterator[Check]:
    from shared_tests.tolerances import P2_BFLOAT16

    for documents, of in forms.items():
        for form, found in of.items():
            if isinstance(found, dict):
                yield Check(f"attention {documents}: {form}", max(found.values()), P2_BFLOAT16)


def fitting(config: RunConfig, peak: float, memory: float) -> int:
    """Return the largest micro-batch that should fit `memory`, if `peak` bytes were used by the config's own."""
    train = config.train
    most = min(MOST_ROWS, USED * memory * train.rows / peak)
    sizes = [n for n in (1 << i for i in range(10)) if n <= most and train.batch % n == 0]
    return max(sizes, default=train.rows)


def _speeds(backend: str, config: RunConfig, device: dict[str, Any], peak: float, mini: bool, say: Say) -> list[Speed]:
    """Time a preset at its own micro-batch, and at the largest that fits the memory."""
    if backend == "mlx":  # a step of a node takes a Mac a minute
        config = _resized(config, batch=min(config.train.batch, 16), micro_batch=None)
    published = next((value for name, value in PEAKS.items() if name in device["name"]), None)
    found: list[Speed] = []
    for _ in range(2):
        size = config.train.rows
        say(f"timing {config.preset}, micro-batches of {size} rows")
        try:
            rounds, seconds = (1, 0.05) if mini else (3, 5.0)
            report = run_bench(config, variants=[backend], rounds=rounds, seconds=seconds, report=say)
        except BenchError as error:
            if not found:
                raise
            say(f"micro-batches of {size} rows do not fit: {error}")
            break
        found.append(Speed(size, report, peak, published))
        better = fitting(config, report.rows[0].peak_bytes, device["memory"])
        if better == size:
            break
        config = _resized(config, micro_batch=better)
    return found


def _resized(config: RunConfig, **sizes: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **sizes))


def run(backend: str, kind: str, doc: str | None) -> int:
    """Be the script: read its options, examine, write both reports; return 0, 1 (beyond a limit) or 2 (no device)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / Path(sys.argv[0]).name)
    parser.add_argument("--mini", action="store_true")
    parser.add_argument("--bench", nargs="*", choices=list(presets.PRESETS), metavar="PRESET")
    parser.add_argument("--bench-only", action="store_true")
    options = parser.parse_args()
    mini = options.mini
    benched = options.bench if options.bench is not None else BENCHED[backend][:1] if mini else BENCHED[backend]
    say = Console(as_json=True)
    command = " ".join([f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    try:
        found = examine(backend, command, mini=mini, benched=benched, checked=not options.bench_only, say=say)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if found is None:
        print(f"there is no {kind} here: nothing was checked (--mini tries the script on the CPU)", file=sys.stderr)
        return 2
    text = "\n".join(found.lines()) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.md", text), ("report.json", json.dumps(found.to_json(), indent=1) + "\n")):
        (options.out / name).write_text(content)
        say(f"wrote {options.out / name}")
    return 0 if found.ok else 1
