"""Judges what the watched evaluation says of its predictions: rules D4, D5 and D7 to D12."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.audit.rules import Finding
from core.audit.text.rules import check_official
from core.audit.watch.answer import DIED
from core.audit.watch.isolation import Isolated
from core.audit.watch.verdicts import check_isolation
from core.data.dataset import Dataset


def check_isolated(
    process: Isolated, fresh: Sequence[Isolated], train_files: Sequence[Path], texts: Sequence[Path]
) -> Finding:
    """Judge rule D4 of the evaluation, and of the processes with a changed text, which must not open the real one."""
    finding = check_isolation(process, train_files)
    if finding.verdict == "FAIL":
        return finding
    for other in fresh:
        other_finding = check_isolation(other, train_files)
        if other_finding.verdict == "FAIL":
            return other_finding
        real = {os.path.realpath(text) for text in texts}
        opened = [file.path for file in other.files if file.path in real]
        if opened:
            words = f"given a changed text to score, the evaluation opened the real one: {', '.join(opened)}"
            return Finding("D4", "FAIL", words, finding.details)
    return finding


def check_once(process: Isolated, documents: int | None) -> Finding:
    """Judge rule D5, first half: every target has one entry in the ledger."""
    broken = broken_rule(process, "D5")
    if broken:
        return Finding("D5", "FAIL", broken)
    if not process.value:  # killed for want of memory: the evaluation is not at fault
        return Finding("D5", "NOT CHECKED" if process.returncode < 0 else "FAIL", died(process))
    book = process.value["ledger"]
    evidence = f"{book['written']:,} of {book['targets']:,} targets are in the ledger, each once"
    if process.value["broken"]:
        return Finding("D5", "NOT CHECKED", f"{evidence}; another rule stopped the evaluation", book)
    if book["written"] != book["targets"] or not process.value["score"]:
        return Finding("D5", "FAIL", f"{evidence}; the others were not scored", book)
    if documents is not None:
        return Finding("D5", "NOT CHECKED", f"{evidence}, but only {documents:,} documents were asked for", book)
    return Finding("D5", "PASS", evidence, book)


def check_set(process: Isolated, documents: int | None, dataset: Dataset) -> Finding:
    """Judge rule D5, second half: the text is the official set."""
    score = (process.value or {}).get("score")
    if documents is not None or not score:
        return Finding("D5", "NOT CHECKED", "not the whole set was scored, so its constants were not compared")
    if score["byte_rule"] != "table":
        words = f"not the official set: {score['documents']:,} documents whose bytes are counted in the raw text"
        return Finding("D5", "NOT CHECKED", words)
    return check_official(dataset, score["documents"], score["targets"], score["bytes"])


def check_predictions(process: Isolated) -> list[Finding]:
    """Judge rules D7 to D12 by the flip test, the distributions and the ledger."""
    if not process.value:
        return [Finding(rule, "NOT CHECKED", died(process)) for rule in ("D7", "D8", "D9", "D10", "D11", "D12")]
    flips, distributions, book = process.value["flips"], process.value["distributions"], process.value["ledger"]
    plugins: dict[str, str] = process.value["plugins"]
    findings = [
        _causal(process, flips),
        _normal(process, distributions),
        _score_first(process, flips, book),
        _single(process, book),
    ]
    named = ", ".join(f"{name} ({kind})" for name, kind in plugins.items())
    foreign = [name for name in plugins if ":" in name]
    if foreign:
        words = f"plug-ins {named}: what they do beyond D7 to D10 is for a reader of {', '.join(foreign)}"
        findings.append(Finding("D11", "NOT CHECKED", words, {"plugins": plugins}))
    else:
        learned = process.value.get("adaptation")
        words = f"plug-ins: {named or 'none'}; "
        words += f"what learns, from scored targets alone (D9): {learned}; " if learned else ""
        words += "nothing else may change a prediction"
        findings.append(Finding("D11", "PASS", words, {"plugins": plugins}))
    caches = [name for name, kind in plugins.items() if kind == "cache" or name in foreign]
    if not caches:
        words = "no cache; n-gram tables of the model are in the artifact and its bytes"
        findings.append(Finding("D12", "PASS", words))
    else:
        worst = [f.rule for f in findings[:4] if f.verdict == "FAIL"]
        unknown = [f.rule for f in findings[:4] if f.verdict == "NOT CHECKED"]
        declared = any(kind == "cache" for kind in plugins.values())
        verdict = "FAIL" if worst and declared else "NOT CHECKED" if worst or unknown else "PASS"
        what = "cache" if declared else "perhaps a cache, though it does not say so"
        broken = f", broken: {', '.join(worst)}" if worst else ""
        words = f"{', '.join(caches)} ({what}): follows from D7 to D10{broken}"
        findings.append(Finding("D12", verdict, words))
    return findings


def _causal(process: Isolated, flips: dict[str, Any]) -> Finding:
    if broken_rule(process, "D7"):
        return Finding("D7", "FAIL", broken_rule(process, "D7"))
    again = process.value.get("again")
    details = {"flips": flips, "again": again}
    if again is None:
        return Finding("D7", "NOT CHECKED", "another rule stopped the evaluation", details)
    problems = [*_flipped(flips), *_scored_again(again)]
    others = f", {flips['documents']} documents replaced beside others" if flips["documents"] else ""
    evidence = (
        f"{flips['flips']} random tokens changed{others} and {flips['ends']} documents ended in {len(flips['tokens'])} "
        f"texts of {max(flips['tokens'])} tokens, through the whole scoring path: {flips['compared']:,} predictions "
        f"(the whole vocabulary) had to stay as they were, {flips['noticed']:,} could and did notice"
    )
    if problems:
        return Finding("D7", "FAIL", f"{'; '.join(problems)}. {evidence}", details)
    evidence += (
        f"; in fresh processes up to forward pass {' and '.join(map(str, again['stops']))}, with "
        f"{len(again['changed'])} tokens changed and everything after them, {again['compared']:,} predictions were the "
        f"same and {again['noticed']:,} noticed"
    )
    if again["guesses"]:
        evidence += f"; of {again['guesses']['tokens']:,} random tokens all over the text nothing was known before"
    if not flips["repeatable"] or flips["differ"] or again["differ"]:
        evidence += (
            f"; not all bits repeat: one text scored twice differs by up to {flips['repeat_gap']:.1e} nats, "
            f"{flips['differ'] + again['differ']:,} of the predictions above by up to "
            f"{max(flips['explained'], again['explained']):.1e}, and the bound of rounding for "
            f"{process.value['dtype']} on {process.value['device']} is {again['rounding']:.0e}"
        )
    if not flips["flips"] or not flips["noticed"] or not again["compared"] or not again["noticed"]:
        return Finding("D7", "NOT CHECKED", f"{evidence}: the test saw no effect at all, so it shows nothing", details)
    return Finding("D7", "PASS", evidence, details)


def _flipped(flips: dict[str, Any]) -> list[str]:
    """Return the problems that the flip test found."""
    problems = []
    if not flips["repeat_gap"] <= flips["rounding"]:
        problems.append(
            f"scoring the same text twice gave costs that differ by up to {flips['repeat_gap']:.3g} nats per target: "
            f"that is no rounding (bound {flips['rounding']:.0e})"
        )
    if flips["wrong"]:
        first = flips["wrong"][0]
        change = "a document went on, not ended," if first["end"] else "another stood"
        problems.append(
            f"{flips['wrong_count']:,} predictions noticed that must not, such as that of target {first['target']} "
            f"when {change} at token {first['token']}, by up to {flips['largest_wrong']:.3g} nats"
        )
    return problems


def _scored_again(again: dict[str, Any]) -> list[str]:
    """Return the problems that the fresh processes found."""
    problems = []
    if again["error"]:
        why = again.get("why") or {"kind": DIED, "message": "no answer"}
        problems.append(f"a fresh process could not score the changed text: {_ended(why)}")
    wrong, guesses = again.get("wrong"), again.get("guesses")
    if wrong:
        size = "in their bits, which repeat without a change" if wrong["by"] == "bits" else (
            f"by up to {again['largest_gap']:.3g} nats (bound of rounding {again['rounding']:.0e})"
        )  # fmt: skip
        problems.append(
            f"scored again in a fresh process with {len(again['changed'])} tokens and everything after them changed, "
            f"{wrong['count']:,} predictions differ that must not, such as that of target {wrong['target']}, {size}"
        )
    if guesses and not guesses["log_money"] < guesses["sure"]:
        problems.append(
            f"of {guesses['tokens']:,} random tokens, put in all over the text, more was known than anybody can: a bet "
            f"that is fair for an honest prediction won e^{guesses['log_money']:.0f} times its stake"
        )
    return problems


def _normal(process: Isolated, sums: dict[str, Any]) -> Finding:
    if broken_rule(process, "D8"):
        return Finding("D8", "FAIL", broken_rule(process, "D8"), sums)
    worst = "not finite" if sums["largest_log_sum"] is None else f"{abs(sums['largest_log_sum']):.1e}"
    evidence = (
        f"{sums['positions']:,} predictions of {sums['passes']} forward passes, over all {sums['vocabulary']:,} "
        f"tokens: the log of their sum is at most {worst} away from 0 (limit {sums['limit']:.0e}); the costs in the "
        f"ledger are theirs within {sums['largest_cost_gap']:.1e} nats"
    )
    again = process.value.get("again") or {}
    rows, good = again.get("rows"), sums["normal"] and sums["agrees"]
    if rows and rows["count"]:
        evidence += (
            f"; added up by the audit itself, {rows['count']} that it asked a fresh process for after the evaluation: "
            f"{rows['sum']:.1e} away from 0, their costs {rows['cost']:.1e} (limit {rows['limit']:.0e}) away"
        )
        good = good and rows["sum"] <= sums["limit"] and rows["cost"] <= rows["limit"]
    if rows and not rows["genuine"]:
        good, evidence = False, f"{evidence}; the distributions that were given are not those that were predicted with"
    if not sums["positions"]:
        words = "no forward pass was looked at"
        return Finding("D8", "FAIL" if process.value["score"] else "NOT CHECKED", words, sums)
    continued = process.value.get("continued")
    if continued:
        evidence += (
            f"; of what a killed start had written {continued['targets']:,} targets were scored again, within "
            f"{continued['largest_gap']:.1e} nats"
        )
    return Finding("D8", "PASS" if good else "FAIL", evidence, {**sums, "rows": rows})


def _score_first(process: Isolated, flips: dict[str, Any], book: dict[str, Any]) -> Finding:
    broken = broken_rule(process, "D9")
    if broken:
        return Finding("D9", "FAIL", broken, book)
    if flips["wrong"] and flips["by_plugins"] and flips["repeat_gap"] <= flips["rounding"]:
        first = flips["wrong"][0]
        learned = process.value.get("adaptation")
        who = (
            f"what learns ({learned}{', with plug-ins' if process.value['plugins'] else ''})"
            if learned
            else "the plug-ins"
        )
        after = ", or from a row or document that its adapters may not learn from" if learned else ""
        words = (
            f"{who} used token {first['token']} for target {first['target']} before it was in the ledger{after} (the "
            "model alone passes the same flip)"
        )
        return Finding("D9", "FAIL", words, flips)
    updates = book["versions"] - 1
    if updates and not book["versions_rise"]:
        return Finding("D9", "FAIL", "targets were scored by older weights after newer ones", book)
    what = (
        f"weights changed {updates} times, each on ranges that were in the ledger" if updates else "no weight changed"
    )
    if book["rows"]:
        what = f"adapters of {book['rows']:,} rows, changed up to {updates} times, each from what they had scored"
    verdict = "PASS" if process.value["score"] and not flips["wrong"] else "NOT CHECKED"
    return Finding("D9", verdict, f"{book['writes']:,} writes to the ledger, {what}", book)


def _single(process: Isolated, book: dict[str, Any]) -> Finding:
    broken = broken_rule(process, "D10")
    if broken:
        return Finding("D10", "FAIL", broken, book)
    if book["backwards"] is not None:
        words = f"target {book['backwards']} was scored before the ones in front of it in its document"
        return Finding("D10", "FAIL", words, book)
    how = "from left to right" if book["left_to_right"] else "each document from left to right, "
    if not book["left_to_right"]:
        how += "several side by side" if book["documents_in_order"] else (
            "the documents in another order than the text's (by length, or as a plug-in asked: an open point of the "
            "rules, which the score's windows name)"
        )  # fmt: skip
    verdict = "PASS" if process.value["score"] else "NOT CHECKED"
    return Finding("D10", verdict, f"{book['writes']:,} writes, no target twice, {how}", book)


def broken_rule(process: Isolated, rule: str) -> str:
    """Return how the evaluation broke a rule, or an empty text if it did not."""
    value = process.value or {}
    for broken in (value.get("broken"), (value.get("flips") or {}).get("broken")):
        if broken and broken["rule"] == rule:
            return broken["message"]
    return ""


def died(process: Isolated) -> str:
    """Return why the evaluation gave no answer."""
    return _ended(process.error or {"kind": "?", "message": "no answer"})


def _ended(error: dict[str, Any]) -> str:
    return f"the evaluation died: {error['kind']}: {error['message']}"
