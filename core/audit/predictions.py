"""What the watched evaluation says of its predictions: D5 and D7 to D12."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.audit.isolation import DIED, Isolated, check_isolation
from core.audit.rules import Finding
from core.audit.texts import check_official
from core.data import Dataset


def check_isolated(
    seen: Isolated, fresh: Sequence[Isolated], train_files: Sequence[Path], texts: Sequence[Path]
) -> Finding:
    """D4: of the evaluation, and of the processes that scored a changed text and had no use for the real one."""
    found = check_isolation(seen, train_files)
    if found.verdict == "FAIL":
        return found
    for other in fresh:
        again = check_isolation(other, train_files)
        if again.verdict == "FAIL":
            return again
        real = {os.path.realpath(text) for text in texts}
        opened = [file.path for file in other.files if file.path in real]
        if opened:
            words = f"given a changed text to score, the evaluation opened the real one: {', '.join(opened)}"
            return Finding("D4", "FAIL", words, found.details)
    return found


def check_once(seen: Isolated, documents: int | None) -> Finding:
    """D5: every target has one entry."""
    broken = broken_rule(seen, "D5")
    if broken:
        return Finding("D5", "FAIL", broken)
    if not seen.value:
        return Finding("D5", "NOT CHECKED", died(seen))
    book = seen.value["ledger"]
    evidence = f"{book['written']:,} of {book['targets']:,} targets are in the ledger, each once"
    if not seen.value["score"]:
        return Finding("D5", "NOT CHECKED", f"{evidence}; another rule stopped the evaluation", book)
    if book["written"] != book["targets"]:
        return Finding("D5", "FAIL", f"{evidence}; the others were not scored", book)
    if documents is not None:
        return Finding("D5", "NOT CHECKED", f"{evidence}, but only {documents:,} documents were asked for", book)
    return Finding("D5", "PASS", evidence, book)


def check_set(seen: Isolated, documents: int | None, dataset: Dataset) -> Finding:
    """D5: is it the official set?"""
    score = (seen.value or {}).get("score")
    if documents is not None or not score:
        return Finding("D5", "NOT CHECKED", "not the whole set was scored, so its constants were not compared")
    if score["byte_rule"] != "table":
        words = f"not the official set: {score['documents']:,} documents whose bytes are counted in the raw text"
        return Finding("D5", "NOT CHECKED", words)
    return check_official(dataset, score["documents"], score["targets"], score["bytes"])


def check_predictions(seen: Isolated) -> list[Finding]:
    """D7 to D12: what flips, distributions and ledger say of the predictions."""
    if not seen.value:
        return [Finding(rule, "NOT CHECKED", died(seen)) for rule in ("D7", "D8", "D9", "D10", "D11", "D12")]
    flips, found, book = seen.value["flips"], seen.value["distributions"], seen.value["ledger"]
    plugins: dict[str, str] = seen.value["plugins"]
    findings = [_causal(seen, flips), _normal(seen, found), _score_first(seen, flips, book), _single(seen, book)]
    named = ", ".join(f"{name} ({kind})" for name, kind in plugins.items())
    foreign = [name for name in plugins if ":" in name]
    if foreign:
        words = f"plug-ins {named}: what they do beyond D7 to D10 is for a reader of {', '.join(foreign)}"
        findings.append(Finding("D11", "NOT CHECKED", words, {"plugins": plugins}))
    else:
        words = f"plug-ins: {named or 'none'}; nothing else may change a prediction"
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


def _causal(seen: Isolated, flips: dict[str, Any]) -> Finding:
    if broken_rule(seen, "D7"):
        return Finding("D7", "FAIL", broken_rule(seen, "D7"))
    evidence = (
        f"{flips['flips']} random tokens changed in {len(flips['tokens'])} texts of {max(flips['tokens'])} tokens, "
        f"through the whole scoring path: {flips['compared']:,} predictions (the whole vocabulary) had to keep their "
        f"bits, {flips['noticed']:,} could and did notice"
    )
    again = seen.value.get("again")
    details = {"flips": flips, "again": again}
    if again is None:
        return Finding("D7", "NOT CHECKED", "another rule stopped the evaluation", details)
    alone = again["alone"]
    if alone and alone["rounding"] and not alone["same_bits"]:
        words = "scoring the same text in another process gave other bits, so a change shows nothing"
        return Finding("D7", "NOT CHECKED", words, details)
    if again["wrong"]:
        words = (
            f"scored again in a fresh process with tokens {', '.join(map(str, again['changed']))} changed, "
            f"{again['wrong_count']:,} predictions of the start of the text differ that must not, such as that of "
            f"target {again['wrong'][0]}"
        )
        return Finding("D7", "FAIL", words, details)
    if not flips["repeatable"]:
        words = "scoring the same text twice gave other bits, so a flip shows nothing"
        return Finding("D7", "NOT CHECKED", words, details)
    if alone and not alone["rounding"]:
        words = (
            f"the first {again['tokens']:,} tokens, scored by themselves in a fresh process, cost up to "
            f"{alone['largest_gap']:.3f} nats per target more or less than as a part of the whole text"
        )
        return Finding("D7", "FAIL", words, details)
    if again["error"]:
        why = again.get("why") or {"kind": DIED, "message": "no answer"}
        words = f"a fresh process could not score the changed start of the text: {why['kind']}: {why['message']}"
        return Finding("D7", "NOT CHECKED" if why["kind"] == DIED else "FAIL", words, details)
    evidence += (
        f"; in a fresh process that had only the first {again['tokens']:,} tokens, {len(again['changed'])} of them "
        f"changed, {again['compared']:,} predictions had the same bits and {again['noticed']:,} noticed"
    )
    if flips["wrong"]:
        first = flips["wrong"][0]
        such = f"such as that of target {first['target']} when token {first['token']} was changed"
        return Finding("D7", "FAIL", f"{evidence}; {flips['wrong_count']:,} noticed that must not, {such}", details)
    if not flips["flips"] or not flips["noticed"] or not again["compared"] or not again["noticed"]:
        return Finding("D7", "NOT CHECKED", f"{evidence}: the test saw no effect at all, so it shows nothing", details)
    return Finding("D7", "PASS", evidence, details)


def _normal(seen: Isolated, found: dict[str, Any]) -> Finding:
    if broken_rule(seen, "D8"):
        return Finding("D8", "FAIL", broken_rule(seen, "D8"), found)
    worst = "not finite" if found["largest_log_sum"] is None else f"{abs(found['largest_log_sum']):.1e}"
    evidence = (
        f"{found['positions']:,} predictions of {found['passes']} forward passes, over all {found['vocabulary']:,} "
        f"tokens: the log of their sum is at most {worst} away from 0 (limit {found['limit']:.0e}); the costs in the "
        f"ledger are theirs within {found['largest_cost_gap']:.1e} nats"
    )
    if not found["positions"]:
        return Finding("D8", "NOT CHECKED", "no forward pass was looked at", found)
    return Finding("D8", "PASS" if found["normal"] and found["agrees"] else "FAIL", evidence, found)


def _score_first(seen: Isolated, flips: dict[str, Any], book: dict[str, Any]) -> Finding:
    broken = broken_rule(seen, "D9")
    if broken:
        return Finding("D9", "FAIL", broken, book)
    if flips["wrong"] and flips["by_plugins"] and flips["repeatable"]:
        first = flips["wrong"][0]
        words = (
            f"the plug-ins used token {first['token']} for target {first['target']} before it was in the ledger (the "
            "model alone passes the same flip)"
        )
        return Finding("D9", "FAIL", words, flips)
    updates = book["versions"] - 1
    if updates and not book["versions_rise"]:
        return Finding("D9", "FAIL", "targets were scored by older weights after newer ones", book)
    what = (
        f"weights changed {updates} times, each on ranges that were in the ledger" if updates else "no weight changed"
    )
    verdict = "PASS" if seen.value["score"] and not flips["wrong"] else "NOT CHECKED"
    return Finding("D9", verdict, f"{book['writes']:,} writes to the ledger, {what}", book)


def _single(seen: Isolated, book: dict[str, Any]) -> Finding:
    broken = broken_rule(seen, "D10")
    if broken:
        return Finding("D10", "FAIL", broken, book)
    how = "from left to right" if book["left_to_right"] else (
        "not in the order of the text (documents by length, or as a plug-in asked: an open point of the rules)"
    )  # fmt: skip
    verdict = "PASS" if seen.value["score"] else "NOT CHECKED"
    return Finding("D10", verdict, f"{book['writes']:,} writes, no target twice, {how}", book)


def broken_rule(seen: Isolated, rule: str) -> str:
    """Return how the evaluation broke a rule, where it did."""
    value = seen.value or {}
    for found in (value.get("broken"), (value.get("flips") or {}).get("broken")):
        if found and found["rule"] == rule:
            return found["message"]
    return ""


def died(seen: Isolated) -> str:
    """Return why the evaluation gave no answer."""
    error = seen.error or {"kind": "?", "message": "no answer"}
    return f"the evaluation stopped: {error['kind']}: {error['message']}"
