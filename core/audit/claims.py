"""Judges what a run claims beside its predictions: bytes, times, seeds, configuration (D1 to D3, D15 to D17)."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.code import packed_bytes
from core.audit.rules import Finding
from core.audit.seeds import beats
from core.audit.watch.isolation import Isolated
from core.config import RunConfig
from core.data.dataset import Dataset, identity
from core.data.unlisted import val_sha256
from core.files import read_file
from core.scoring.score import adaptation_in_words
from core.training.run import Run, config_digest

LIMIT = 16_000_000
"""Bytes of code and compressed model (D1)."""
SECONDS = 600.0
"""Of training and of evaluation, each, on 8 H100 (D2, D3)."""
SLOWER = ("CPU", "Apple")
"""Devices of which 8 are slower than 8 H100: how their names begin."""
CLAIM = {True: 1e-5, False: 5e-3}
"""Same backend and compute type? -> bits per byte by which the audited score may miss the recorded score."""


JUDGED = ("windows", "seq", "stride", "plugins", "round", "adapt", "phases")
"""Settings that decide the figures of a score."""
NOTHING: dict[str, Any] = {"plugins": [], "adaptation": ""}
"""What a recorded score says of what learned, if it says nothing."""
FIGURES = ("bpb", "loss", "bytes", "targets")
"""The figures of a recorded score that a comparison needs."""


class Plan(NamedTuple):
    """What is audited, and how: the order of one audit."""

    artifact: Path
    run: Run | None
    config: RunConfig
    """Of the evaluation."""
    folder: Path
    """Where ledger and reports go."""
    backend: str
    dtype: str | None
    documents: int | None
    """Score only the first so many documents; None: all."""
    flips: int
    seed: int
    seeds: tuple[Run, ...]
    """All runs of the claim, this one included."""
    reference: tuple[float, ...]
    """Scores to beat, in bits per byte."""
    program: Path | None = None
    """The packed program that made the run, whose bytes are those of the code."""


def check_size(plan: Plan, process: Isolated, dataset: Dataset) -> Finding:
    """Judge rule D1: artifact, code and whatever else the evaluation read, but for the text, are within the limit.

    Code counts as submissions pack it; of a packed program, which must be the one that made the run, its file counts. A
    strict total, which decides nothing, counts code as it is, and the tokenizer.
    """
    data, val = Path(dataset.path), dataset.manifest["splits"]["val"]
    names = ["manifest.json", *(entry["file"] for entry in val["files"]), val.get("document_bytes")]
    names += [entry["file"] for entry in val.get("token_bytes") or ()]
    text = {str((data / name).resolve()) for name in names if name}
    tokenizer = str((data / dataset.manifest["tokenizer"]["file"]).resolve())
    artifact = plan.artifact.stat().st_size
    code = [file for file in process.files if file.kind == "code"]
    packed = packed_bytes([Path(file.path) for file in code])
    how = f"{len(code)} files of code {packed:,} packed (LZMA, base85)"
    if plan.program is not None:
        data_of = read_file(plan.program, 1 << 24)
        sha256, packed = hashlib.sha256(data_of).hexdigest(), len(data_of)
        if sha256 not in _programs(plan.run):
            words = f"{plan.program.name} (sha256 {sha256[:12]}) is not the program that made the run, by its env.json"
            return Finding("D1", "FAIL", words)
        how = f"the packed program {packed:,}"
    rest = [file for file in process.files if file.kind in ("input", "other") and file.read and file.path not in text]
    rest = [file for file in rest if Path(file.path) != plan.artifact.resolve()]
    raw, others = sum(file.size or 0 for file in code), sum(file.size or 0 for file in rest)
    unpaid = [file for file in rest if file.path != tokenizer]
    extra = sum(file.size or 0 for file in unpaid)
    challenge, strict = artifact + packed + extra, artifact + raw + others
    more = f", {', '.join(Path(file.path).name for file in unpaid)} {extra:,}" if unpaid else ""
    names = ", ".join(sorted(Path(file.path).name for file in rest)) or "nothing else"
    over = "" if strict <= LIMIT else f", over {LIMIT:,}"
    evidence = (
        f"{challenge:,} bytes: artifact {artifact:,}, {how}{more}. "
        f"Strictly, every file that was opened as it is: {strict:,}{over} (code {raw:,}; {names} {others:,}). "
        f"Left out: the validation text, and {len(process.packages)} installed packages (D18)"
    )
    details = {
        "artifact": artifact, "packed_code": packed, "code": raw, "other": others, "extra": extra, "limit": LIMIT,
        "challenge": challenge, "strict": strict, "files": sorted(f.path for f in (*code, *rest)),
    }  # fmt: skip
    if not code and artifact <= LIMIT:
        return Finding("D1", "NOT CHECKED", "the evaluation ended before its files were known", details)
    return Finding("D1", "PASS" if challenge <= LIMIT else "FAIL", evidence, details)


def _programs(run: Run | None) -> set[Any]:
    """Return the SHA-256 of the program that made every start of a run, if one did, and no checkout."""
    environment = {} if run is None else run.environment()
    found = {start.get("program_sha256") for start in (environment, *environment.get("earlier", []))}
    return found if len(found) == 1 else set()


def check_training_time(plan: Plan) -> Finding:
    """Judge rule D2 by the training clock that the run recorded, and by when it closed its training text.

    PASS on machines that are no faster than the rule's; FAIL on those that are no slower, if it took longer by more
    than the step in which the time ran out.
    """
    if plan.run is None:
        return Finding("D2", "NOT CHECKED", "a bare artifact does not say how long it was trained")
    names = ("clock/seconds", "clock/stopped", "clock/closed", "perf/step_ms")
    seconds, stopped, closed, step = (_number(plan.run.last(name)) for name in names)
    environment = plan.run.environment()
    if seconds is None:
        return Finding("D2", "NOT CHECKED", "the run has recorded no training time")
    seconds = max(seconds, stopped or 0.0)
    starts = [environment, *environment.get("earlier", [])]
    machines = [
        (str(start.get("device", "an unknown device")), _number(start.get("ranks", 1)) or math.nan) for start in starts
    ]
    named = ", ".join(f"{ranks:g} x {device}" for device, ranks in dict.fromkeys(machines))
    evidence = f"trained for {seconds:.1f} s on {named} (training clock: no evaluation, no compilation)"
    ending = f"training data was closed at {closed:.1f} s" if closed is not None else "no close of its data is recorded"
    rule = f"the rule is {SECONDS:.0f} s of 8 H100"
    details = {"seconds": seconds, "stopped": stopped, "closed": closed, "starts": len(starts)}
    slower = all(ranks <= 8 and ("H100" in device or device.startswith(SLOWER)) for device, ranks in machines)
    official = all(ranks >= 8 and "H100" in device for device, ranks in machines)
    if official and seconds > SECONDS + (step or 0.0) / 1000:
        return Finding("D2", "FAIL", f"{evidence}; {ending}; {rule}", details)
    if closed is None or not slower or max(seconds, closed) > SECONDS:
        return Finding("D2", "NOT CHECKED", f"{evidence}; {ending}; {rule}", details)
    if len(starts) > 1:
        lost = f"{len(starts)} starts, and steps that were lost between them are not on the clock"
        return Finding("D2", "NOT CHECKED", f"{evidence}; {ending}; {lost}", details)
    return Finding("D2", "PASS", f"{evidence}; {ending}", details)


def _number(value: object) -> float | None:
    """Return a number out of a run's files, or None for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def check_evaluation_time(plan: Plan, process: Isolated) -> Finding:
    """Judge rule D3 by the strict clock: from before the process was started to the last score."""
    value = process.value or {}
    if not value.get("score"):
        return Finding("D3", "NOT CHECKED", "the evaluation did not come to its end")
    strict, prepared = value["clock"], value["prepared"]
    evidence = (
        f"{strict:.1f} s by the strict clock on {value['device']}: {prepared:.1f} s until the model was there "
        f"(start of Python, imports, decompression), {strict - prepared:.1f} s of scoring, compilation included, "
        f"{value['watching']:.1f} s of which the audit's own looking took"
    )
    details = {"strict": strict, "prepared": prepared}
    if value["resumed"]:
        return Finding(
            "D3", "NOT CHECKED", f"went on from {value['resumed']} passes of an earlier start; {evidence}", details
        )
    if plan.documents is not None:
        return Finding("D3", "NOT CHECKED", f"only a part of the text was scored; {evidence}", details)
    if strict <= SECONDS:
        return Finding("D3", "PASS", evidence, details)
    return Finding("D3", "NOT CHECKED", f"{evidence}; the rule is {SECONDS:.0f} s of 8 H100", details)


def check_reference(plan: Plan) -> Finding:
    """Judge rule D15: compare all seeds of the claim with the reference, in nats per token of this tokenizer."""
    scores = {str(run.path): recorded(run) for run in plan.seeds}
    scores = {name: score for name, score in scores.items() if score and score.get("full")}
    partly = [str(run.path) for run in plan.seeds if str(run.path) not in scores]
    odd = [n for n, score in scores.items() if not all((_number(score.get(k)) or 0.0) > 0 for k in FIGURES)]
    if odd:
        return Finding("D15", "FAIL", f"recorded no numbers above 0 as {', '.join(FIGURES)}: {', '.join(odd)}")
    ours = {name: score["loss"] for name, score in scores.items()}
    seeds = [run.config.seed for run in plan.seeds]
    if len(set(seeds)) < len(seeds):
        return Finding("D15", "NOT CHECKED", f"runs of one seed are one sample, not several; seeds: {seeds}")
    first = next(iter(scores.values()), None)
    if first is None or not plan.reference:
        names = ", ".join(f"{name} {score['bpb']:.4f}" for name, score in scores.items()) or "none with a score"
        return Finding("D15", "NOT CHECKED", f"give scores to beat with --reference; seeds: {names}")
    if partly:  # every run that is given counts
        words = f"no score of the whole text is recorded in {', '.join(partly)}"
        return Finding("D15", "NOT CHECKED", words)
    if len({(score["bytes"], score["targets"], score["windows"], score["byte_rule"]) for score in scores.values()}) > 1:
        return Finding("D15", "FAIL", "the seeds' scores are not of one text, cut and counted alike")
    per_token = math.log(2.0) * first["bytes"] / first["targets"]
    return beats(ours, [bpb * per_token for bpb in plan.reference])


def same_text(run: Run, dataset: Dataset) -> bool:
    """Return whether a run scored the validation text of a dataset: by its manifest, of a packed program by its files.

    Such a program reads no manifest; a run that names no text at all is taken at its word.
    """
    environment = run.environment()
    if "val_sha256" in environment:
        return environment["val_sha256"] == val_sha256(dataset)
    return environment.get("data") in (None, identity(dataset))


def check_configuration(plan: Plan, process: Isolated, same_data: bool) -> Finding:
    """Judge rule D16: config.json, logs and seeds have one configuration, and the audit finds the figures again.

    `same_data`: the audit scored the text of the run, so that the figures can be compared.
    """
    differs = (process.value or {}).get("differs")
    if differs:
        return Finding("D16", "FAIL", f"the evaluation answered otherwise than its ledger, which counts: {differs}")
    if plan.run is None:
        return Finding("D16", "NOT CHECKED", "a bare artifact has no logs")
    digests = {str(run.path): config_digest(run.config) for run in plan.seeds}
    logged = {str(run.path): run.logged_configs() for run in plan.seeds}
    details = {"config_sha256": digests, "logged": {name: sorted(configs) for name, configs in logged.items()}}
    judged = {tuple(getattr(run.config.eval, name) for name in JUDGED) for run in plan.seeds}
    if len(set(digests.values())) > 1 or len(judged) > 1:
        return Finding("D16", "FAIL", f"the seeds have different settings: {', '.join(sorted(digests))}", details)
    strangers = [name for name, configs in logged.items() if configs - {digests[name]}]
    if strangers:
        words = f"log.txt of {', '.join(strangers)} was written with other settings than its config.json has"
        return Finding("D16", "FAIL", words, details)
    silent = [name for name, configs in logged.items() if not configs]
    digest = config_digest(plan.run.config)
    words = f"configuration {digest[:12]} (what decides the weights, but the seed) in config.json and log of "
    words += f"{len(digests)} run(s)"
    claim = recorded(plan.run)
    if claim is None:
        return Finding("D16", "NOT CHECKED", f"{words}; it has recorded no score of its artifact", details)
    own = _own_claim(plan, claim)
    if own:
        return Finding("D16", "FAIL", f"{words}; what it recorded is not of its own settings: {own}", details)
    audited = (process.value or {}).get("score")
    if not audited or not same_data or _others(plan):
        why = "the evaluation gave no score" if not audited else _others(plan) or "on other data"
        return Finding("D16", "NOT CHECKED", f"{words}; its recorded score was not computed again: {why}", details)
    env = plan.run.environment()
    if "val_sha256" in env:  # a packed program knows no raw bytes: a manifest has them
        audited = {**audited, "bpb_raw": None}
    same = (env.get("backend"), env.get("dtype")) == (process.value["backend"], process.value["dtype"])
    details |= {"recorded": claim, "audited": audited, "once": plan.run.last("final/artifact").get("once")}
    problems = [f"{name} {claim.get(name)}, audited {audited[name]}" for name in _differ(claim, audited, CLAIM[same])]
    size = plan.run.last("final/artifact")["bytes"]
    if size != plan.artifact.stat().st_size:
        problems.append(f"an artifact of {size} bytes, found {plan.artifact.stat().st_size}")
    if problems:
        return Finding("D16", "FAIL", f"{words}; recorded {'; '.join(problems)}", details)
    words += (
        f"; recorded {claim['bpb']:.6f} bits per byte, audited {audited['bpb']:.6f} (at most {CLAIM[same]:.0e} apart)"
    )
    if silent:
        return Finding("D16", "NOT CHECKED", f"{words}; no settings in the log of {', '.join(silent)}", details)
    return Finding("D16", "PASS", words, details)


def _own_claim(plan: Plan, claim: dict[str, Any]) -> str:
    """Return in what a recorded score departs from the run's own settings, or an empty text."""
    assert plan.run is not None
    settings, claim = plan.run.config.eval, {**NOTHING, **claim}
    learned = adaptation_in_words(settings) if settings.adapt.kind != "none" else ""
    wanted = {"full": settings.documents is None, "plugins": list(settings.plugins), "adaptation": learned}
    return ", ".join(f"{n} {claim[n]}, by config.json {value}" for n, value in wanted.items() if claim[n] != value)


def _others(plan: Plan) -> str:
    """Return why this audit does not score as the run did, or an empty text."""
    assert plan.run is not None
    ours, own = plan.config.eval, plan.run.config.eval
    if own.documents is not None:
        return f"it is an estimate from {own.documents} documents"
    if plan.documents is not None:
        return "only a part of the text was scored"
    given = [f"--{name}" for name in JUDGED if getattr(ours, name) != getattr(own, name)]
    given = [
        name if name in ("--windows", "--seq", "--stride", "--plugins") else f"--eval.{name[2:]}" for name in given
    ]
    return f"with {' '.join(given)} the audit scores otherwise" if given else ""


def _differ(claim: dict[str, Any], audited: dict[str, Any], bound: float) -> list[str]:
    """Return the figures of a recorded score that the audit did not find again; `bound` is in bits per byte.

    A figure that is missing or no number counts as not found again.
    """
    per_bit = math.log(2.0) * audited["bytes"]  # nats of the whole text
    near = {"bpb": bound, "loss": bound * per_bit / audited["targets"], "nats": bound * per_bit}
    if audited["bpb_raw"] is not None:
        near["bpb_raw"] = bound * audited["bpb_raw"] / audited["bpb"]
    exact = ("byte_rule", "targets", "bytes", "documents", "total_documents", "full", "windows", *NOTHING)
    claim = {**NOTHING, **claim}
    other = [name for name in exact if claim.get(name) != audited[name]]
    figures = {name: _number(claim.get(name)) for name in near}
    return other + [n for n, value in figures.items() if value is None or not abs(value - audited[n]) <= near[n]]


def check_seeds(plan: Plan) -> Finding:
    """Judge rule D17: NOT CHECKED, as only those who ran the seeds know which they ran."""
    seeds = ", ".join(f"{run.path} (seed {run.config.seed})" for run in plan.seeds) or "no run folder was given"
    return Finding("D17", "NOT CHECKED", f"software cannot see runs that are not shown; shown: {seeds}")


def recorded(run: Run) -> dict[str, Any] | None:
    """Return the score that a run claims for its artifact."""
    final, helped = run.last("final/artifact"), run.last("final/plugins") if run.config.eval.learns else None
    return None if final is None else helped or final["score"]


def claimed_bytes(plan: Plan, process: Isolated, same_data: bool) -> tuple[Any, int | None]:
    """Return the byte rule of the claimed score, and the bytes that it was divided by if it is of the whole set.

    The claim is the recorded score, or the audited one where none is recorded.
    """
    claim = recorded(plan.run) if plan.run and same_data else None
    claim = claim or (process.value or {}).get("score") or {}
    return claim.get("byte_rule"), claim.get("bytes") if claim.get("full") and plan.documents is None else None
