"""The fourteen checks, in order, over one folder."""

from core.submission.checks import figures, form, settings, shipped
from core.submission.checks.answers import Checked, SubmissionCheck

CHECKS = (
    ("names, places and sizes of what is in the folder", form.check_layout),
    ("submission.json has its fields, of their types", form.check_json),
    ("every figure follows from the logs", figures.check_figures),
    ("code and artifact of each seed within 16,000,000 bytes", figures.check_totals),
    ("the parameters are those of the settings", settings.check_parameters),
    ("the README's settings are those of the logs", settings.check_readme),
    ("training and evaluation within 600 s each", figures.check_times),
    ("the published validation text, whole", figures.check_text),
    ("the program compiles, is whole, and is the one that ran", shipped.check_program),
    ("one configuration for all seeds", settings.check_one_configuration),
    ("better than the reference by more than chance", figures.check_against),
    ("audit.json names the artifacts", shipped.check_artifact),
    ("no home folders, credentials, names of machines", form.check_secrets),
    ("case operators cost no bytes", figures.check_operators),
)
"""What each check asks for, and the function that answers; the first is number 1."""


def run_checks(subject: Checked) -> list[SubmissionCheck]:
    """Return the fourteen checks of a folder."""
    checks = []
    for place, (asks, ask) in enumerate(CHECKS, 1):
        answer = ask(subject)
        checks.append(SubmissionCheck(place, asks, answer.verdict, answer.words()))
    return checks
