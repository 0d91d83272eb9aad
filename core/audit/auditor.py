"""Audits a run or an artifact: watches its evaluation, checks the texts, and has a finding for every rule."""

import dataclasses
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.changed_text import Rescoring, check_again
from core.audit.claims import (
    Plan,
    check_configuration,
    check_evaluation_time,
    check_reference,
    check_seeds,
    check_size,
    check_training_time,
    claimed_bytes,
    same_text,
)
from core.audit.fingerprints import ROUNDING, Predictions
from core.audit.predictions import check_isolated, check_once, check_predictions, check_set
from core.audit.recount import predictions_of, recount, understood
from core.audit.rules import Finding
from core.audit.text.disjoint import check_disjoint
from core.audit.text.rules import check_bytes, check_reversible
from core.audit.watch.answer import DIED
from core.audit.watch.evaluation import AGREE, AuditOrder
from core.audit.watch.isolation import Isolated, run_isolated
from core.audit.watch.verdicts import check_packages, notes_left
from core.config import to_json
from core.console import Console
from core.data.bundled import open_data
from core.data.dataset import DataError, Dataset
from core.data.shards import file_sha256
from core.files import FileError, append_file, locked, read_text
from core.scoring.ledger import Ledger, LedgerError
from core.training.run import config_digest


class AuditResult(NamedTuple):
    """The end of an audit: a finding for every rule, and the process that was watched."""

    findings: list[Finding]
    isolated: Isolated
    plan: Plan
    seconds: float
    artifact_sha256: str = ""

    @property
    def ok(self) -> bool:
        """Whether the evaluation gave a score and no rule is broken."""
        scored = self.isolated.error is None and bool((self.isolated.value or {}).get("score"))
        return scored and all(finding.verdict != "FAIL" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        process = self.isolated
        own = [file for file in process.files if file.kind not in ("python", "package", "system")]
        isolation = {
            "in_force": process.measures,
            "missing": process.missing,
            "packages": process.packages,
            "network": process.network,
            "executed": process.executed,
            "files": [file._asdict() for file in own],
        }
        return {
            "subject": str(self.plan.artifact),
            "findings": [finding.to_json() for finding in self.findings],
            "evaluation": process.value,
            "error": process.error,
            "isolation": isolation,
            "config_sha256": config_digest(self.plan.config),
            "artifact_sha256": self.artifact_sha256,
            "seconds": self.seconds,
        }


class AuditError(ValueError):
    """The evaluation cannot be run: the message, which is the evaluation's own, says why."""


def audit(plan: Plan, say: Console) -> AuditResult:
    """Evaluate in a watched process, check the texts beside it, and return a finding for every rule.

    AuditError if what was given cannot be evaluated at all.
    """
    began = time.monotonic()
    artifact = file_sha256(str(plan.artifact))
    # Without the training text, so that nothing in this process can read it.
    dataset = open_data(plan.config.data.path, train=False)
    for split in (dataset.train, dataset.val):
        split.verify()
    same_data = plan.run is not None and same_text(plan.run, dataset)
    reference = check_reference(plan)  # a wrong claim is refused before the work
    base = Path(dataset.path)
    shards, texts = ([base / e["file"] for e in dataset.manifest["splits"][n]["files"]] for n in ("train", "val"))
    process, fresh = _evaluations(plan, dataset, shards, texts, say)
    if process.error and process.error["kind"].startswith("core."):  # the user can do something about it
        raise AuditError(process.error["message"])
    say("checking the texts")
    limit = None if plan.documents is None else len(dataset.val.documents(plan.documents))
    rule, scored = claimed_bytes(plan, process, same_data)
    findings = [
        check_size(plan, process, dataset),
        check_training_time(plan),
        check_evaluation_time(plan, process),
        check_isolated(process, fresh, shards, texts),
        check_once(process, plan.documents),
        check_set(process, plan.documents, dataset),
        check_disjoint(_open(plan.config.data.path), say.progress("validation text in training text")),
        *check_predictions(process),
        check_bytes(dataset, rule, limit, say.progress("bytes of the text"), scored),
        check_reversible(dataset, limit, say.progress("tokens back to text")),
        reference,
        check_configuration(plan, process, same_data),
        check_seeds(plan),
        check_packages(process),
    ]
    return AuditResult(_founded(findings), process, plan, time.monotonic() - began, artifact)


def _evaluations(
    plan: Plan, dataset: Dataset, shards: Sequence[Path], texts: Sequence[Path], say: Console
) -> tuple[Isolated, list[Isolated]]:
    """Run the evaluation, and those of the changed text; return the one, recounted, and the others."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    ledger = plan.folder / "ledger"
    if _is_done(ledger):  # an audit that has ended is not continued but run again
        ledger.unlink()
    if not os.path.lexists(ledger):  # state without a ledger is of use to a cheat alone
        Path(f"{ledger}.plugins").unlink(missing_ok=True)
    say(f"evaluating {plan.artifact} in a process of its own")
    text = dataset
    if plan.documents is not None:
        text = dataclasses.replace(dataset, val=dataset.val.documents(plan.documents))
    start = time.time_ns()
    process = _evaluate(plan, Path(dataset.path), ledger, plan.documents, plan.flips, shards)
    kind = process.error["kind"] if process.error else ""
    busy = kind == DIED or kind.endswith("InUseError")
    process = recount(process, text, plan.config, ledger)
    fresh: list[Isolated] = []
    if process.value and process.value["score"]:
        say("scoring the text again, changed, in processes of their own")
        process.value["again"] = _again(plan, text, process, ledger, [*shards, *texts], fresh, start)
    if not busy and not _is_done(ledger):  # only a killed audit goes on from its ledger
        ledger.unlink(missing_ok=True)
    return process, fresh


def _founded(findings: list[Finding]) -> list[Finding]:
    """Return the findings, with D15 NOT CHECKED where it passed on figures that D16 did not find again."""
    again = next(finding for finding in findings if finding.rule == "D16").verdict == "PASS"
    words = "the audited run's recorded score was not found again (D16); "
    return [
        finding._replace(verdict="NOT CHECKED", evidence=words + finding.evidence)
        if finding.rule == "D15" and finding.verdict == "PASS" and not again
        else finding
        for finding in findings
    ]


def _open(path: str) -> Dataset:
    """Open the data, without the training text where it is not on this machine."""
    try:
        return open_data(path)
    except DataError:
        return open_data(path, train=False)


def _evaluate(
    plan: Plan, data: Path, ledger: Path, documents: int | None, flips: int, hidden: Sequence[Path],
    rescoring: Rescoring | None = None,
) -> Isolated:  # fmt: skip
    """Run the evaluation of the text in `data` in a watched process."""
    order = AuditOrder(
        artifact=str(plan.artifact),
        data=str(data),
        config=to_json(plan.config),
        backend=plan.backend,
        dtype=plan.dtype,
        ledger=str(ledger),
        predictions=str(_prints(ledger)),
        stop=rescoring.stop if rescoring else None,
        places=rescoring.places if rescoring else (),
        secret=_secret(),
        started=time.monotonic(),
        documents=documents,
        flips=flips,
        seed=plan.seed,
    )
    process = run_isolated(
        "core.audit.watch.evaluation:audited",
        dataclasses.asdict(order),
        hidden=hidden,
        writable=[ledger.parent, ledger, Path(f"{ledger}.plugins")],
        warm=("core.audit.watch.evaluation", f"backends.{plan.backend}.engine"),
    )
    return understood(process, flips > 0)


def _prints(ledger: Path) -> Path:
    return Path(f"{ledger}.predictions.npz")


def _again(
    plan: Plan, text: Dataset, evaluation: Isolated, ledger: Path, hidden: Sequence[Path], fresh: list[Isolated],
    start: int,
) -> dict[str, Any]:  # fmt: skip
    """Score the text in fresh processes, which are added to `fresh`, and compare the predictions.

    `start`: time.time_ns() before the evaluation.
    """
    first = predictions_of(ledger, _prints(ledger), text, plan.config)
    if first is None:
        return {"error": True, "why": {"kind": DIED, "message": "the evaluation did not leave what it predicted"}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def score(rescoring: Rescoring) -> Predictions | None:
            book = folder / secrets.token_hex(8) / "ledger"
            book.parent.mkdir()
            process = _evaluate(plan, rescoring.folder, book, None, 0, hidden, rescoring)
            notes = notes_left(process, evaluation, start, os.path.realpath(folder))
            fresh.append(process._replace(tampered=(*process.tampered, *notes)))
            value = fresh[-1].value
            if not value or value["broken"]:
                return None
            return predictions_of(book, _prints(book), text, plan.config)

        dtype, resumed = evaluation.value["dtype"], evaluation.value["resumed"]
        agree = ROUNDING[dtype] if plan.config.eval.plugins else AGREE[dtype]
        result = check_again(score, text, plan.config, first, folder, ROUNDING[dtype], agree, resumed)
    if result["error"]:
        last = fresh[-1]
        broken = (last.value or {}).get("broken")
        result["why"] = last.error or (broken and {"kind": broken["rule"], "message": broken["message"]})
    return result


def _secret() -> str:
    """Return a secret of this user on this machine, made on first use: so no ledger from elsewhere is continued."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skc"
    path = cache / "audit-key"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with append_file(path) as file:
            locked(file, wait=True)  # another audit may make it just now
            if not os.fstat(file.fileno()).st_size:
                os.fchmod(file.fileno(), 0o600)
                file.write(secrets.token_hex(32).encode())
        return read_text(path, 64)
    except (OSError, FileError):  # nowhere to keep it: this audit cannot be continued
        return secrets.token_hex(32)


def _is_done(ledger: Path) -> bool:
    """Return whether a ledger is there and complete, or cannot be used."""
    if not ledger.exists():
        return False
    try:
        return Ledger.read(ledger).complete()
    except LedgerError:
        return True
