"""The files of the pages: all served, nothing from elsewhere, no markup out of texts, colours that can be read."""

import itertools
import re
from pathlib import Path

import pytest

from core.ablation.report.pictures import COLOURS
from core.serve.page_files import FILES, PAGE, page_routes
from core.serve.run import application
from shared_tests.support.report_page import Page
from shared_tests.support.serving import ask

SCRIPTS = sorted(PAGE.glob("*.js"))
READABLE = 4.5
"""Contrast of words, by WCAG 2 AA."""


def test_every_file_is_served_and_loads_what_is_served() -> None:
    assert {file.name for file in PAGE.iterdir()} == {*FILES, *itertools.chain(*FILES.values())}
    for page, files in FILES.items():
        served = application(page_routes(page), ["127.0.0.1"])
        for path in ("/", *(f"/{name}" for name in files)):
            answer = ask(served, "GET", path)
            body = (PAGE / (path[1:] or page)).read_text()
            assert (answer.status, answer.body) == (200, body) and "self" in answer.headers["content-security-policy"]
        loads = set(re.findall(r'(?:src|href)="([^"]+)"', (PAGE / page).read_text()))
        for name in files:
            loads |= set(re.findall(r'from "\./([^"]+)"', (PAGE / name).read_text()))
        assert loads == set(files), page


@pytest.mark.parametrize("page", FILES)
def test_a_page_has_no_script_or_style_inside_and_a_name_for_every_field(page: str) -> None:
    text = (PAGE / page).read_text()
    read = Page(re.sub(r"<!DOCTYPE html>|<(link|meta|input)[^>]*>", "", text))
    assert not [
        tag for tag, attributes in read.tags if "style" in attributes or any(a.startswith("on") for a in attributes)
    ]
    assert "<style" not in text and re.findall(r"<script[^>]*>(.*?)</script>", text, re.S) == [""]
    fields = set(re.findall(r'<(?:input|select|textarea)[^>]* id="([^"]+)"', text))
    assert fields == set(re.findall(r'<label for="([^"]+)"', text))
    assert 'lang="en"' in text and "width=device-width" in text and "<main>" in text


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_script_makes_no_markup_of_texts_and_asks_nobody_else(file: Path) -> None:
    text = file.read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "srcdoc",
        "style=",
    ):
        assert word not in text, word
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg\")|localStorage|sendBeacon|WebSocket|document\.cookie", text
    )


def colours(night: bool) -> dict[str, str]:
    """Return the variables of page.css by day or by night."""
    text = (PAGE / "page.css").read_text()
    day, dark = re.findall(r":root \{(.*?)\n\s*\}", text, re.S)
    pairs = re.findall(r"--([\w-]+): (#[0-9a-f]{6})", day + dark if night else day)
    return dict(pairs)


def brightness(colour: str) -> float:
    """Return the relative luminance of a colour, by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("night", [False, True])
def test_words_can_be_read_on_every_ground(night: bool) -> None:
    of = colours(night)
    assert {name: pair[night] for name, pair in COLOURS.items()}.items() <= of.items(), "one look with report.html"
    for name in ("ink", "muted", "better", "worse", "noise", "third"):
        assert min(contrast(of[name], of[ground]) for ground in ("page", "box")) >= READABLE, name
    grounds = [name for name in of if name.startswith(("bits-", "saves-"))]
    assert len(grounds) == 11 and min(contrast(of["ink"], of[name]) for name in grounds) >= READABLE
    assert contrast(of["on-accent"], of["better"]) >= READABLE
    assert contrast(of["field"], of["page"]) >= 3.0, "the edge of a field"
    for kind in ("bits", "saves"):
        steps = [brightness(of[name]) for name in grounds if name.startswith(kind)]
        assert steps == sorted(steps, reverse=not night), "more is stronger"
