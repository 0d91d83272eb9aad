"""report.md and curve.png: views of what a run folder holds."""

from pathlib import Path
from typing import Any

from core.config import RunConfig, differences
from core.decoding.generate import sample_lines
from core.files import new_file, replace_text
from core.model.params import count, param_table
from core.presets import PRESETS
from core.training.run import Run

MARGIN = 0.1
"""Share of the height that is left free above and below curves: a line along the axis cannot be seen."""


def write_run_report(run: Run) -> list[Path]:
    """Write report.md and curve.png from the run's own files and return their paths; needs a finished run."""
    curve, report = run.path / "curve.png", run.path / "report.md"
    draw_curve(run, curve)
    replace_text(report, _markdown(run))
    return [report, curve]


def _markdown(run: Run) -> str:
    config, env = run.config, run.environment()
    final, stored = run.last("final/score"), run.last("final/artifact")
    spread = f" ± {final['error']:.4f}" if final["error"] else ""
    preset = PRESETS.get(config.preset)
    score = f"**{final['label']}: {final['bpb']:.4f}{spread} bits per byte**"
    raw = "" if final["bpb_raw"] is None else f" Per byte of the raw text: {final['bpb_raw']:.4f}."
    fits = "within" if stored["within"] else "**over**"
    exact = "the trained weights, bit for bit" if stored.get("exact") else "rounded after training"
    exact += ", so scored once" if stored.get("once") else ", scored apart from the weights in memory"
    if chosen := stored.get("rounding"):
        exact += f"; {chosen['method']} {chosen['gap']:+.6f}, plain rounding {chosen['plain']:+.6f} (estimates)"
    commit = f"{env.get('commit') or 'unknown'}{' (with uncommitted changes)' if env.get('dirty') else ''}"
    lines = [
        f"# {config.preset}, seed {config.seed}, {env.get('backend')}",
        "",
        preset.purpose if preset else "",
        "",
        f"{score} over {final['documents']:,} of {final['total_documents']:,} validation documents, "
        f"byte rule {final['byte_rule']}, windows {final['windows']}.{raw}",
        "",
        "![loss against step](curve.png)",
        "",
        "| | |",
        "|---|---|",
        f"| artifact | {stored['bytes']:,} bytes, {fits} the {stored['allowed']:,} left beside the code |",
        f"| reloaded artifact | {stored['score']['bpb']:.4f} bits per byte, gap {stored['gap']:+.6f}; {exact} |",
        f"| model | {count(config.model):,} parameters |",
        f"| storage | {_storage(config)} |",
        f"| training | {_speed(run)} |",
        f"| backend | {_backends(env)} |",
        f"| data | {config.data.path} |",
        f"| commit | {commit} |",
        "",
        "## Command",
        "",
        f"    {env.get('command')}",
        "",
        "## Configuration",
        "",
        _settings(config),
        "",
        "## Samples",
        "",
        *(
            f"{prompt[0].upper()}{prompt[1:]}:\n\n> {text}\n"
            for prompt, text in sample_lines(run.last("samples") or [])
        ),
    ]
    return "\n".join(lines)


def _backends(env: dict[str, Any]) -> str:
    """Return every start of the run: where it ran, and from which step."""
    starts = [*env.get("earlier", []), env]
    texts = [f"{e.get('backend')}, {e.get('device')}, {e.get('dtype')}" for e in starts]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{text} from step {e.get('step')}" for text, e in zip(texts, starts, strict=True))


def _storage(config: RunConfig) -> str:
    """Return how many weights each storage class holds."""
    totals: dict[str, int] = {}
    for row in param_table(config.model).values():
        totals[row.storage] = totals.get(row.storage, 0) + row.size
    return ", ".join(f"{name}: {values:,} weights" for name, values in totals.items())


def _speed(run: Run) -> str:
    rows = [row for row in run.metrics() if "train/loss" in row]
    if not rows:
        return "no steps"
    seconds, tokens = rows[-1]["clock/seconds"], run.tokens(rows[-1])
    return (
        f"{rows[-1]['step']:,} steps, {tokens:,} tokens, {seconds:.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )


def _settings(config: RunConfig) -> str:
    """Return what the run changed of its preset, or the preset's name."""
    preset = PRESETS.get(config.preset)
    lines = differences((preset.config if preset else RunConfig()), config)
    if not lines:
        return f"Preset `{config.preset}` as it is (config.json holds every field)."
    changed = "\n".join(f"    {line}" for line in lines)
    return f"Preset `{config.preset}` with (config.json holds every field):\n\n{changed}"


def whole_ticks(axes: Any) -> None:
    """Let the ticks of the x axis be whole numbers: there are no half steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def draw_curve(run: Run, path: Path) -> None:
    """Draw training and validation bits per byte against the step (nats per token where bytes are unknown)."""
    from matplotlib.figure import Figure

    rows = run.metrics()
    name = "train/bpb" if any("train/bpb" in row for row in rows) else "train/loss"
    train = [(row["step"], row[name]) for row in rows if name in row]
    val = [(row["step"], row["val/bpb"], row.get("val/error", 0.0)) for row in rows if "val/bpb" in row]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#4c72b0", linewidth=1.5, label="training (estimate)")
    if val and name == "train/bpb":
        steps, values, errors = zip(*val, strict=True)
        style: dict[str, Any] = {"color": "#c44e52", "fmt": "o-", "markersize": 4, "linewidth": 1.5, "capsize": 3}
        axes.errorbar(steps, values, yerr=errors, label="validation estimate ± standard error", **style)
    final = run.last("final/score")
    if final and name == "train/bpb":
        label = f"final {final['label']} {final['bpb']:.4f}"
        axes.axhline(final["bpb"], color="#55a868", linestyle="--", linewidth=1.2, label=label)
    axes.margins(y=MARGIN)
    whole_ticks(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if name == "train/bpb" else "nats per token")
    backend = run.environment().get("backend", "")[:60]
    axes.set_title(f"{run.config.preset}, seed {run.config.seed}, {backend}".replace("$", r"\$"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with new_file(path) as file:
        figure.savefig(file, format="png")
