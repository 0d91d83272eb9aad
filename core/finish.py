"""What ends a run: the score, the artifact, the score of the artifact as its reader returns it, the report."""

from pathlib import Path
from typing import Any

import numpy as np

from core.config import RunConfig
from core.console import Console
from core.data import Dataset
from core.engine import Arrays, Engine
from core.export.artifact import read_artifact, write_artifact
from core.report import write_report
from core.run import Run
from core.scoring import Score, score
from core.train import write_samples


def finish(run: Run, engine: Engine, dataset: Dataset, step: int, say: Console) -> dict[str, Any]:
    """Score the weights of `step`, write the artifact, score it again through its reader, write the report.

    Returns what a verb prints as JSON. `engine` is left with the artifact's weights.
    """
    config = run.config
    scored = final_score(engine, dataset, config, say, "scoring")
    say(f"{describe(scored)} (weights in memory)")
    size = write_artifact(
        run.artifact_path,
        config.model,
        engine.quantised(),
        tokenizer_sha256=dataset.tokenizer.sha256,
        provenance={"preset": config.preset, "seed": config.seed, "step": step, "train_seq": config.train.seq},
    )
    decoded = read_artifact(run.artifact_path).weights
    exact = engine.quantise
    if exact:
        check_promise(decoded, engine.weights(), run.artifact_path)
        say(f"all {len(decoded)} tensors of the artifact are those of the forward pass, bit for bit")
    engine.load_params(decoded)
    stored = final_score(engine, dataset, config, say, "scoring the artifact")
    gap = stored.bpb - scored.bpb
    say(f"{describe(stored)} (artifact, reloaded); round-trip gap {gap:+.6f}")
    allowed = config.export.budget - config.export.code_bytes
    verdict = "within" if size <= allowed else "OVER"
    say(f"artifact {size:,} bytes, {verdict} the {allowed:,} that are left of the budget beside the code")
    exported = {"score": stored.to_json(), "gap": gap, "bytes": size, "allowed": allowed, "within": size <= allowed}
    exported["exact"] = exact
    run.log(step, {"final/score": scored.to_json(), "final/artifact": exported})
    shown = [row["samples"] for row in run.metrics() if row["step"] == step and "samples" in row]
    texts = shown[-1] if shown else write_samples(run, engine, dataset, step, say)
    written = [run.artifact_path, *write_report(run)]
    for path in written:
        say(f"wrote {path}")
    return {
        "run": str(run.path),
        "step": step,
        "score": scored.to_json(),
        "artifact": {"path": str(run.artifact_path), **exported},
        "samples": texts,
        "files": [str(path) for path in written],
    }


class PromiseError(AssertionError):
    """What was scored is not what was stored: a fault of this program, never of the user's input."""


def check_promise(decoded: Arrays, scored: Arrays, path: str | Path) -> None:
    """Raise PromiseError unless the decoded weights are those of the scored forward pass, bit for bit."""
    for name, values in decoded.items():
        if values.tobytes() != scored[name].astype(np.float32).tobytes():
            raise PromiseError(f"{path}: {name} is not the weight that was scored; do not use this artifact")


def final_score(engine: Engine, dataset: Dataset, config: RunConfig, say: Console, label: str) -> Score:
    """Score as config.eval says, with progress."""
    report = say.progress(label)
    return score(engine, dataset, config.eval, documents=config.eval.documents, seed=config.eval.seed, progress=report)


def describe(found: Score) -> str:
    """Return a score in words, with its label and byte rule."""
    spread = f" ± {found.error:.4f}" if found.error else ""
    what = "all" if found.full else f"{found.documents} of {found.total_documents}"
    how = f"rule {found.byte_rule}, {what} documents, {found.windows}"
    return f"{found.label} {found.bpb:.4f}{spread} bits per byte ({how})"
