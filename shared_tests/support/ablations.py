"""Outcomes of ablations that nobody ran: synthetic scores and curves, for tests and for looking at reports."""

from pathlib import Path

import numpy as np

from core.ablation.plan import read_plan
from core.ablation.stats.results import Point, Result, Results

LAYERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)


def outcome(
    folder: Path, effects: dict[str, float], seeds: int = 3, noise: float = 0.004, budget: str = "steps = 250",
    backends: str = '["mlx"]', val: bool = True, speed: dict[str, float] | None = None,
    size: dict[str, int] | None = None, purpose: str = "Which part of the model helps?",
) -> Results:  # fmt: skip
    """Return a finished ablation: variant -> true difference to the first, whose effect is 0.

    Scores are 1.9 + effect + 0.02 * (what the seed does to all) + `noise` * (what it does to one), from fixed draws.
    """
    names = list(effects)
    lines = [f'purpose = "{purpose}"', 'base = "debug"', f"seeds = {list(range(seeds))}", f"backends = {backends}"]
    lines += ["[budget]", budget]
    for i, name in enumerate(names):
        lines += [f'[variants."{name}"]', *([f'"train.warmup" = {0.1 + i / 50:.2f}'] if i else [])]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "parts.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    plan = read_plan(path)
    made = []
    for job in plan.jobs():
        index = names.index(job.variant)
        shared = np.random.default_rng([job.seed, 7]).normal()
        own = np.random.default_rng([job.seed, index, len(job.backend)]).normal()
        bpb = 1.9 + effects[job.variant] + 0.02 * shared + noise * own
        rate = 20_000 * (speed or {}).get(job.variant, 1.0 - 0.02 * index)
        big = (size or {}).get(job.variant, 800_000 + 17_000 * index)
        made.append(
            Result(
                job.variant, job.seed, job.backend, "done", folder / "runs" / f"{job.variant}-{job.seed}", bpb, None,
                "table", "score", big, 3_150_000 + 1000 * index, 250, 250 * 2048 / rate, rate,
                _curve(bpb, rate, val, job.seed), (f"It was {job.variant} & <b>she</b> said so.",),
            )
        )  # fmt: skip
    return Results(plan, tuple(made))


def _curve(end: float, rate: float, val: bool, seed: int) -> tuple[Point, ...]:
    draw = np.random.default_rng([seed, 99])
    points = []
    for step in range(5, 251, 5):
        mean = end + 3.0 * ((step + 10) ** -0.6 - 260**-0.6)
        estimate = mean if val and step % 25 == 0 else None
        points.append(Point(step, step * 2048, step * 2048 / rate, mean + 0.02 * draw.normal(), estimate))
    return tuple(points)


def change(made: Results, variant: str, seed: int, **fields: object) -> Results:
    """Return an outcome with fields of one run replaced (on every backend)."""
    return made._replace(
        results=tuple(
            r._replace(**fields) if (r.variant, r.seed) == (variant, seed) else r  # type: ignore[arg-type]
            for r in made.results
        )
    )


def unfinished(made: Results, keep: int = 0) -> Results:
    """Return an outcome of which only the first `keep` runs are there."""
    kept = [r if i < keep else Result(r.variant, r.seed, r.backend, "waiting", r.folder) for i, r in
            enumerate(made.results)]  # fmt: skip
    return made._replace(results=tuple(kept))


def examples(folder: Path) -> dict[str, Results]:
    """Return the outcomes that reports are looked at with: few, many, one seed, a failure, nothing yet."""
    small = {"plain": 0.0, "engram": -0.03, "wide": -0.002, "no-muon": 0.04}
    many = {"plain": 0.0}
    for i, name in enumerate(
        ("attention-conv", "koopman", "skc", "skc-parallel", "attention+koopman", "koopman+skc", "koopman+bank",
         "koopman+skc+bank+engram-of-orders-two-three-and-four", "smear", "value-residual", "diverges"),
    ):  # fmt: skip
        many[name] = (-0.021, -0.004, 0.003, 0.0, -0.011, 0.009, 0.03, -0.05, -0.001, 0.006, 0.4)[i]
    said = "FloatingPointError: loss is nan at step 143 of 250; lower train.lr_matrix\n(see <folder>/log.txt)"
    twelve = outcome(folder / "twelve", many, 5, purpose="Which mixer, at <equal> parameters & time?")
    lost = {"status": "failed", "bpb": None, "message": said}
    return {
        "one-seed": outcome(folder / "one", small, 1),
        "three": outcome(folder / "three", small, 3, noise=0.002, size={"wide": 800_100}),
        "twelve": change(twelve, "skc", 2, **lost),
        "early": unfinished(outcome(folder / "early", small, 3), 7),
        "nothing": unfinished(outcome(folder / "nothing", small, 3)),
        "two-backends": outcome(folder / "two", small, 2, backends='["mlx", "cuda"]', val=False),
    }
