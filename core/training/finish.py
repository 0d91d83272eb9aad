"""What ends a run: the artifact, its score as its reader returns it, that of the weights in memory, the report."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.config import RunConfig
from core.console import Console
from core.data.dataset import Dataset
from core.engine.protocol import Arrays, Engine
from core.engine.ranks import agree, only_rank_0, share_arrays
from core.export.artifact import read_artifact, write_artifact
from core.scoring.evaluation import Evaluation
from core.scoring.key import evaluation_key
from core.scoring.ledger import Ledger
from core.scoring.plugins import load_plugins
from core.scoring.score import Score, score
from core.scoring.tally import Tally
from core.training.calibrate import moments_of
from core.training.loop import TrainingSummary, write_samples
from core.training.report import write_run_report
from core.training.rounding import Codes, chosen_codes
from core.training.run import Run


def finish(
    run: Run, engine: Engine, dataset: Dataset, step: int, say: Console, path: Path | None = None
) -> dict[str, Any]:
    """Do what `export_and_score` does, and write samples and the report, unless `path` is given.

    Returns what a verb prints as JSON. `engine` is left with the artifact's weights. All ranks score; rank 0 writes.
    """
    value = export_and_score(run, engine, dataset, step, say, path)
    if path is not None:
        return {**value, "samples": [], "files": [str(path)]}
    if engine.ranks.rank:
        return value
    for left in (run.path / "state").glob("*.ledger*"):  # of an evaluation that was given up
        if left.is_symlink() or not left.is_dir():
            left.unlink()
    shown = [row["samples"] for row in run.metrics() if row["step"] == step and "samples" in row]
    texts = shown[-1] if shown else write_samples(run, engine, dataset, step, say)
    written = [run.artifact_path, *write_run_report(run)]
    for file in written:
        say(f"wrote {file}")
    return {**value, "samples": texts, "files": [str(file) for file in written]}


def close_training(run: Run, dataset: Dataset, summary: TrainingSummary, say: Console) -> None:
    """Close the training text for good: what comes after training cannot read it (rule D2)."""
    closed = summary.seconds + time.perf_counter() - summary.ended
    dataset.train.close(f"training ended at {summary.seconds:.1f} s, and nothing reads its text after that")
    if not summary.taken:  # an earlier start trained, and its record stands
        return
    times = {"clock/stopped": summary.seconds, "clock/closed": closed}
    say(f"training stopped at {summary.seconds:.3f} s; training data was closed at {closed:.3f} s")
    train = run.config.train
    if train.seconds is not None and train.train_stop is not None and train.reserve_seconds:
        times["clock/train_stop"] = train.train_stop
        left = train.seconds - closed
        over = "" if left >= 0 else "WARNING: more than train.reserve_seconds was used: "
        say(f"{over}train_stop {train.train_stop:.3f} s; {left:.3f} s of train.seconds={train.seconds} are left")
    run.log(summary.steps, times)


def export_and_score(
    run: Run, engine: Engine, dataset: Dataset, step: int, say: Console, path: Path | None = None
) -> dict[str, Any]:
    """Write the artifact of `step` and score it as its reader returns it.

    One score is made, and shown for both, where the decoded weights are those in memory bit for bit; else the weights
    in memory are scored first. With `path` only the artifact is written, there: the run's own results stay those of
    its end.
    """
    config, ranks = run.config, engine.ranks
    clocks: dict[str, float | None] = {}

    def judge(label: str, name: str, plugins: bool = False) -> Score:
        ledger = run.ledger_path(name)
        begun, began = ledger is not None and ledger.exists(), time.perf_counter()
        result = final_score(engine, dataset, config, say, label, ledger, plugins=plugins)
        clocks["pass"] = None if begun else time.perf_counter() - began
        return result

    target, exact = path or run.artifact_path, engine.quantise
    if config.train.quantise != "never" and not exact:
        say(f"WARNING: train.quantise={config.train.quantise} never switched on: weights are rounded only now")
    size, decoded, plain, reading = _store(run, engine, dataset, step, target, say)
    once = agree(ranks, same_bits(decoded, engine.weights()))
    scored = None
    if once:
        say(f"all {len(decoded)} tensors of the artifact are those of the forward pass, bit for bit: one score is made")
    else:
        say("the artifact's weights are not those in memory: each get a score of their own")
        scored = judge("scoring", "score.ledger")
        say(f"{describe(scored)} (weights in memory)")
    costs = {} if plain is None else {"rounding": _costs(engine, dataset, config, plain, decoded, say)}
    began = time.perf_counter()
    engine.load_params(decoded)
    reading += time.perf_counter() - began
    stored = judge("scoring the artifact", "artifact.ledger")
    scored = scored or stored
    gap = stored.bpb - scored.bpb
    what = "artifact, reloaded, and weights in memory" if once else "artifact, reloaded"
    say(f"{describe(stored)} ({what}); round-trip gap {gap:+.6f}")
    allowed = config.export.budget - config.export.code_bytes
    verdict = "within" if size <= allowed else "OVER"
    say(f"artifact {size:,} bytes, {verdict} the {allowed:,} that are left of the budget beside the code")
    exported = {"score": stored.to_json(), "gap": gap, "bytes": size, "allowed": allowed, "within": size <= allowed}
    exported |= {"exact": exact, "once": once, **costs}
    value = {"run": str(run.path), "step": step, "score": scored.to_json()}
    value["artifact"] = {"path": str(target), **exported}
    if path is not None:
        say(f"wrote {path}")
        return value
    times = {} if config.eval.learns else _times(clocks["pass"], reading)
    run.log(step, {"final/score": scored.to_json(), "final/artifact": exported, **times})
    if config.eval.learns:
        kind = config.eval.adapt.kind
        parts = [*config.eval.plugins, *([kind] if kind != "none" else [])]
        helped = judge(f"scoring with {', '.join(parts)}", "plugins.ledger", plugins=True)
        say(f"{describe(helped)} (artifact)")
        run.log(step, {"final/plugins": helped.to_json(), **_times(clocks["pass"], reading)})
        value["plugins"] = helped.to_json()
    return value


def _store(
    run: Run, engine: Engine, dataset: Dataset, step: int, target: Path, say: Console
) -> tuple[int, Arrays, Arrays | None, float]:
    """Write the artifact; return its bytes, what its reader returns, what plain rounding would have stored, and a time.

    Plain rounding is None where that is what was stored; the time is that of reading, in seconds. PromiseError.
    """
    config, ranks = run.config, engine.ranks
    provenance = {"preset": config.preset, "seed": config.seed, "step": step, "train_seq": config.train.seq}
    moments = moments_of(run, engine, dataset, step, say) if config.export.method == "gptq" else {}

    def written(path: Path, codes: Codes) -> int:
        return write_artifact(
            path,
            config.model,
            codes.stored,
            tokenizer_sha256=dataset.tokenizer.sha256,
            provenance=provenance | codes.provenance,
        )

    def chosen() -> Codes:
        trial = target.with_suffix(".trial")
        try:
            return chosen_codes(engine, config, moments, say, partial(written, trial))
        finally:
            trial.unlink(missing_ok=True)

    codes = chosen() if ranks.rank == 0 else None
    size = only_rank_0(ranks, lambda: written(target, codes) if codes else None)
    began = time.perf_counter()
    decoded = share_arrays(ranks, read_artifact(target).weights if ranks.rank == 0 else None)
    reading = time.perf_counter() - began
    if engine.quantise:
        check_promise(decoded, engine.weights(), target)
    elif codes:
        check_promise(decoded, codes.weights(config), target)
    plain = share_arrays(ranks, codes and codes.plain) if config.export.method == "gptq" else None
    return size, decoded, plain, reading


def _times(scoring: float | None, reading: float) -> dict[str, Any]:
    """Return what metrics.jsonl says of the time of an evaluation; nothing where it went on from an earlier start."""
    return {} if scoring is None else {"clock/scoring": scoring, "clock/scoring_strict": reading + scoring}


def _costs(
    engine: Engine, dataset: Dataset, config: RunConfig, plain: Arrays, decoded: Arrays, say: Console
) -> dict[str, Any]:
    """Estimate what GPTQ's codes and plainly rounded ones cost in bits per byte, on the same documents.

    The engine has the weights in memory, and is left with others.
    """
    evaluation = Evaluation.of(dataset.val, config, config.eval.train_documents)
    estimates = [score(engine, evaluation, ranks=engine.ranks)]
    for weights in (decoded, plain):
        engine.load_params(weights)
        estimates.append(score(engine, evaluation, ranks=engine.ranks))
    trained, ours, theirs = (estimate.bpb for estimate in estimates)
    say(
        f"codes by {config.export.method} cost {ours - trained:+.6f} bits per byte, plain rounding on the same steps "
        f"{theirs - trained:+.6f} (estimates, {estimates[0].documents} documents)"
    )
    about = {"method": config.export.method, "documents": estimates[0].documents}
    return {**about, "gap": ours - trained, "plain": theirs - trained}


def same_bits(decoded: Arrays, weights: Arrays) -> bool:
    """Return whether an engine that is given the decoded weights would have those that it has."""
    return all(decoded[name].astype(weight.dtype).tobytes() == weight.tobytes() for name, weight in weights.items())


class PromiseError(AssertionError):
    """What is in memory is not what was stored: a fault of this program, never of the user's input."""


def check_promise(decoded: Arrays, scored: Arrays, path: str | Path) -> None:
    """Raise PromiseError unless the decoded weights are those of the forward pass, bit for bit.

    The artifact is removed then: nobody may take it for the model that was trained.
    """
    for name, values in decoded.items():
        if values.tobytes() != scored[name].astype(np.float32).tobytes():
            Path(path).unlink(missing_ok=True)
            raise PromiseError(f"{path}: {name} is not the weight of the forward pass; the artifact is removed")


def final_score(
    engine: Engine,
    dataset: Dataset,
    config: RunConfig,
    say: Console,
    label: str,
    ledger: Path | None = None,
    *,
    plugins: bool = False,
    keep: bool = False,
) -> Score:
    """Score as config.eval says, with progress; with its plug-ins and adaptation if `plugins`.

    With `ledger` a killed evaluation goes on from that file, which is deleted at the end unless `keep`: a kept file is
    the user's and LedgerError says so if it is of another evaluation, another one is replaced.
    """
    evaluation = Evaluation.of(dataset.val, config, config.eval.documents, plugins)
    # First: a wrong name must not open a ledger.
    used = load_plugins(config.eval.plugins) if plugins and config.eval.plugins else ()
    if ledger is None:
        book = Ledger(len(dataset.val))
    else:
        key = evaluation_key(engine, dataset, config, evaluation.plugins or evaluation.adapts)
        book = Ledger.open(ledger, len(dataset.val), key, anew=not keep)
    if book.writes:
        say(f"{label} goes on from {ledger}: {book.writes} forward passes are in it")
    progress = say.progress(label, Tally(book, dataset.val))
    try:
        result = score(engine, evaluation, book, plugins=used, progress=progress, ranks=engine.ranks, say=say)
    except BaseException:
        book.close(delete=not book.writes)  # what was refused leaves no file, which would refuse other settings
        raise
    book.close(delete=not keep)
    if ledger is not None:
        Path(f"{ledger}.plugins").unlink(missing_ok=True)
    return result


def describe(score: Score) -> str:
    """Return a score in words, with its label and byte rule."""
    spread = f" ± {score.error:.4f}" if score.error else ""
    what = "all" if score.full else f"{score.documents} of {score.total_documents}"
    how = f"rule {score.byte_rule}, {what} documents, {score.windows}"
    learned = [*score.plugins, *([score.adaptation] if score.adaptation else [])]
    how += f", with {', '.join(learned)}" if learned else ""
    if score.byte_rule == "table" and score.bpb_raw is not None and score.bpb_raw > score.bpb:
        how += f"; {score.bpb_raw:.4f} per byte of the raw text, of which the table counts more than there are"
    return f"{score.label} {score.bpb:.4f}{spread} bits per byte ({how})"
