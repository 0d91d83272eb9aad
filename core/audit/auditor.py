"""Audits a run or an artifact: watches its evaluation, checks the texts, and has a finding for every rule."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.claims import (
    Plan,
    check_configuration,
    check_evaluation_time,
    check_reference,
    check_seeds,
    check_size,
    check_training_time,
    claimed_bytes,
    claimed_rule,
)  # fmt: skip
from core.audit.disjoint import check_disjoint
from core.audit.isolation import DIED, Isolated, check_isolation, check_packages, run_isolated
from core.audit.predictions import check_once, check_predictions, check_set
from core.audit.rules import Finding
from core.audit.texts import check_bytes, check_reversible
from core.bundled import open_data
from core.config import to_json
from core.console import Console
from core.run import config_digest
from core.scoring.ledger import Ledger, LedgerError


class Audit(NamedTuple):
    """What an audit found."""

    findings: list[Finding]
    isolated: Isolated
    plan: Plan
    seconds: float

    @property
    def ok(self) -> bool:
        """The evaluation came to its end, and no rule was found broken."""
        return self.isolated.error is None and all(finding.verdict != "FAIL" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        seen = self.isolated
        own = [file for file in seen.files if file.kind not in ("python", "package", "system")]
        isolation = {
            "in_force": seen.measures,
            "missing": seen.missing,
            "packages": seen.packages,
            "network": seen.network,
            "executed": seen.executed,
            "files": [file._asdict() for file in own],
        }
        return {
            "subject": str(self.plan.artifact),
            "findings": [finding.to_json() for finding in self.findings],
            "evaluation": seen.value,
            "error": seen.error,
            "isolation": isolation,
            "config_sha256": config_digest(self.plan.config),
            "seconds": self.seconds,
        }


class AuditError(ValueError):
    """The evaluation cannot be made: the message, its own, says why."""


def audit(plan: Plan, say: Console) -> Audit:
    """Evaluate in a watched process, check the texts beside it, and return a finding for every rule.

    AuditError if what was given cannot be evaluated at all.
    """
    began = time.monotonic()
    dataset = open_data(plan.config.data.path)
    base = Path(dataset.path)
    shards = [base / entry["file"] for entry in dataset.manifest["splits"]["train"]["files"]]
    plan.folder.mkdir(parents=True, exist_ok=True)
    ledger = plan.folder / "ledger"
    copies = Path(f"{ledger}.plugins")
    if _is_done(ledger):  # an audit that came to its end is not continued but made again
        ledger.unlink()
        copies.unlink(missing_ok=True)
    say(f"evaluating {plan.artifact} in a process of its own")
    seen = run_isolated(
        "core.audit.evaluation:audited",
        {
            "artifact": str(plan.artifact),
            "data": dataset.path,
            "config": to_json(plan.config),
            "backend": plan.backend,
            "dtype": plan.dtype,
            "ledger": str(ledger),
            "started": time.monotonic(),
            "documents": plan.documents,
            "flips": plan.flips,
            "seed": plan.seed,
        },
        hidden=shards,
        writable=[plan.folder, ledger, copies],
    )
    died = seen.error is not None and seen.error["kind"] == DIED
    if not died and not _is_done(ledger):  # only a kill leaves something to go on from
        ledger.unlink(missing_ok=True)
    if seen.error and seen.error["kind"].startswith("core."):  # the user can do something about it
        raise AuditError(seen.error["message"])
    say("checking the texts")
    limit = None if plan.documents is None else len(dataset.val.documents(plan.documents))
    findings = [
        check_size(plan, seen, base),
        check_training_time(plan),
        check_evaluation_time(plan, seen),
        check_isolation(seen, shards),
        check_once(seen, plan.documents),
        check_set(seen, plan.documents, dataset),
        check_disjoint(dataset, say.progress("validation text in training text")),
        *check_predictions(seen),
        check_bytes(
            dataset, claimed_rule(plan, seen), limit, say.progress("bytes of the text"), claimed_bytes(plan, seen)
        ),
        check_reversible(dataset, limit, say.progress("tokens back to text")),
        check_reference(plan, seen),
        check_configuration(plan, seen),
        check_seeds(plan),
        check_packages(seen),
    ]
    return Audit(findings, seen, plan, time.monotonic() - began)


def _is_done(ledger: Path) -> bool:
    """Return whether a ledger is there and complete, or cannot be used."""
    if not ledger.exists():
        return False
    try:
        return Ledger.read(ledger).complete()
    except LedgerError:
        return True
