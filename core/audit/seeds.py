"""Judges rule D15: a claim to beat the reference must hold over all runs."""

from collections.abc import Sequence

from core.audit.rules import Finding
from core.statistics import finite, welch

MIN_OURS = 3
"""Logs that the challenge asks for."""
MIN_REFERENCE = 2


def beats(ours: dict[str, float], reference: Sequence[float], margin: float = 0.005, alpha: float = 0.01) -> Finding:
    """Judge by Welch's test whether `ours` (run name -> nats per token) is below `reference` by more than `margin`.

    Every run given is used and listed. NOT CHECKED for fewer than three of ours or two references, or where no value
    varies; else FAIL unless p < alpha. StatisticsError for a value that is not finite.
    """
    finite("ours", list(ours.values()))
    finite("reference", reference)
    runs = "ours: " + (", ".join(f"{name} {value:.6f}" for name, value in ours.items()) or "none")
    others = "reference: " + (", ".join(f"{value:.6f}" for value in reference) or "none")
    listed = f"{runs}; {others} (nats per token)"
    details = {"ours": dict(ours), "reference": list(reference), "margin": margin, "alpha": alpha}
    short = [
        f"{need - have} more of {side} (has {have}, needs {need})"
        for side, have, need in (("ours", len(ours), MIN_OURS), ("the reference", len(reference), MIN_REFERENCE))
        if have < need
    ]
    if short:
        return Finding("D15", "NOT CHECKED", f"missing: {' and '.join(short)}. {listed}", details)
    test = welch(list(ours.values()), reference, margin)
    details |= {"difference": test.difference, "t": test.t, "degrees": test.degrees, "p": test.p}
    if test.degrees == 0.0:
        evidence = f"no value varies from run to run, so chance cannot be judged: are these copies of one run? {listed}"
        return Finding("D15", "NOT CHECKED", evidence, details)
    evidence = (
        f"lower by {test.difference:.6f} nats; that it is more than {margin}: t = {test.t:.3f}, "
        f"{test.degrees:.2f} degrees of freedom, one-sided p = {test.p:.3g}, needed p < {alpha}. {listed}"
    )
    return Finding("D15", "PASS" if test.p < alpha else "FAIL", evidence, details)
