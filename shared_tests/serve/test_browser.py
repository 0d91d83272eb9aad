"""The pages of `skc serve` and `skc watch` in a real browser, at the sizes and colours that people have. Long."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.cli import main
from shared_tests.support.browser import Tab, browser_tab, find_browser
from shared_tests.support.server_process import server

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_browser() is None, reason="NOT CHECKED: the pages, as no Chromium is on PATH"),
]
PARTS = (
    "--model.blocks", "koopman", "skc", "--model.bank.at", "head", "--model.engram.orders", "1",
    "--model.engram.heads", "2", "--model.engram.dim", "16", "--model.engram.buckets", "1021",
)  # fmt: skip
TRAIN = ("--train.steps", "100", "--train.eval-every", "50", "--eval.documents", "2", "--backend", "torch")
SCREENS = ((1280, "light"), (390, "dark"), (1280, "dark"), (390, "light"))
TOKENS = "#{}-answers .answer:nth-child({}) [data-at]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two trained runs: one with bank, engram and capsules, one without."""
    folder = tmp_path_factory.mktemp("runs")
    found = [str(folder / "parts"), str(folder / "plain")]
    assert main(["train", "debug", *PARTS, *TRAIN, "--out", found[0]]) == 0
    assert main(["train", "debug", *TRAIN, "--out", found[1]]) == 0
    return found


@pytest.fixture(scope="module")
def address(runs: list[str]) -> Iterator[str]:
    """Where both are served."""
    with server("serve", *runs) as running:
        yield f"{running.url}/"


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """An empty tab, in which nothing may go wrong."""
    with browser_tab(tmp_path) as found:
        found.show(1280)
        yield found
        assert found.errors == []


def count(tab: Tab, selector: str) -> int:
    """Return how many elements there are."""
    return tab.ask(f"document.querySelectorAll({json.dumps(selector)}).length")


def text(tab: Tab, selector: str) -> str:
    """Return the words of an element."""
    return tab.ask(f"document.querySelector({json.dumps(selector)}).innerText")


def ended(tab: Tab, form: str) -> None:
    """Wait until both models have answered, and nothing was complained of."""
    tab.wait(f"!document.querySelector('.busy') && !document.querySelector('#{form}-go').disabled")
    assert text(tab, f"#{form}-error") == ""


def test_two_models_write_side_by_side_in_colours_with_alternatives(tab: Tab, address: str) -> None:
    tab.open(address)
    tab.click("#write-go")
    tab.wait(f"document.querySelectorAll({json.dumps(TOKENS.format('write', 2))}).length > 0")
    ended(tab, "write")
    for place, name in ((1, "parts"), (2, "plain")):
        assert count(tab, TOKENS.format("write", place)) == 96
        assert text(tab, f"#write-answers .answer:nth-child({place}) h3") == name
        assert "tokens/s" in text(tab, f"#write-answers .answer:nth-child({place}) .figures")
    boxes = tab.ask("[...document.querySelectorAll('.answer')].map((e) => e.getBoundingClientRect().top)")
    assert boxes[0] == boxes[1], "side by side"
    said = tab.ask("[...document.querySelectorAll('.token')].map((e) => [e.ariaLabel, e.firstElementChild.className])")
    for label, shade in said:
        bits = float(label.split(", ")[-1].removesuffix(" bits"))
        level = sum(bits >= least for least in (0.5, 1.5, 3, 5, 8, 12))
        near = any(abs(bits - least) < 0.01 for least in (0.5, 1.5, 3, 5, 8, 12))
        assert near or shade == (f"bits-{level}" if level else ""), label
    grounds = "[...document.querySelectorAll('.token > span')].map((e) => getComputedStyle(e).backgroundColor)"
    assert len(set(tab.ask(grounds))) >= 4
    assert tab.ask("document.querySelector('#card').hidden")
    tab.hover(TOKENS.format("write", 1).replace("[data-at]", '[data-at="5"]'))
    tab.wait("!document.querySelector('#card').hidden")
    assert count(tab, "#card tr") == 5 and "bits: probability" in text(tab, "#card")
    tab.hover("h1")
    tab.wait("document.querySelector('#card').hidden")
    first = text(tab, "#write-answers .tokens")
    assert "<0x" not in first, "letters, not the names of their bytes"
    tab.click("#write-go")
    tab.wait("document.querySelector('#write-stop').disabled === false")
    ended(tab, "write")
    assert text(tab, "#write-answers .tokens") == first, "the same seed, the same text"


def test_writing_stops_when_asked_to(tab: Tab, address: str) -> None:
    tab.open(address)
    tab.ask("document.querySelector('#tokens').value = 1024")
    tab.click("#write-go")
    tab.wait(f"document.querySelectorAll({json.dumps(TOKENS.format('write', 1))}).length > 3")
    tab.click("#write-stop")
    ended(tab, "write")
    assert 3 < count(tab, TOKENS.format("write", 1)) < 1024
    tab.click("#write-read")
    tab.wait("document.querySelectorAll('#read-answers [data-at]').length > 3")
    ended(tab, "read")
    assert tab.ask("document.querySelector('#text').value").startswith("It is a truth")


def test_what_a_part_saves_is_shown_token_by_token(tab: Tab, address: str, runs: list[str]) -> None:
    tab.open(f"{address}#read")
    tab.click("#parts label:nth-child(3) input")
    tab.click("#read-go")
    tab.wait("document.querySelectorAll('#read-answers [data-at]').length > 100")
    ended(tab, "read")
    assert count(tab, "#read-answers .answer:nth-child(1) :is([class^=saves], [class^=costs])") > 0
    assert count(tab, "#read-answers .answer:nth-child(2) :is([class^=saves], [class^=costs])") == 0
    assert "engram" in text(tab, "#read-answers .figures b:nth-of-type(2)")
    assert "has no engram" in text(tab, "#read-answers .answer:nth-child(2) .figures")
    tokens = TOKENS.format("read", 1)
    shown = tab.ask(f"[...document.querySelectorAll('{tokens}')].map((e) => e.textContent).join('')")
    assert shown == tab.ask("document.querySelector('#text').value")
    tab.ask("document.querySelector('#read-answers [data-at]').focus()")
    for _ in range(3):
        tab.key("ArrowRight")
    assert tab.ask("document.activeElement.dataset.at") == "3", "the keyboard goes from token to token"
    assert "without engram, which" in text(tab, "#card")
    tab.key("Escape")
    assert tab.ask("document.querySelector('#card').hidden")


def test_a_file_is_drawn_beside_two_compressors(tab: Tab, address: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("She was a woman of mean understanding, little information, and uncertain temper. <b>&amp;" * 30)
    tab.open(f"{address}#score")
    tab.give_file("#file", file)
    tab.click("#score-go")
    tab.wait("document.querySelectorAll('#score-chart path.line').length === 2")
    keys = text(tab, "#score-chart .keys")
    assert all(name in keys for name in ("parts", "plain", "bz2", "brotli"))
    assert count(tab, "#score-chart line.line") == 2 and count(tab, "#score-table tbody tr") == 4
    tab.hover("#score-chart svg")
    tab.wait("document.querySelector('#score-chart .hint').textContent.includes('parts ')")


def test_an_axis_of_numbers_beyond_2_to_53_has_an_end(tab: Tab, address: str) -> None:
    tab.open(address)
    ticks = "import('/chart.js').then((chart) => chart.ticks({}, {}, 8))"
    assert tab.ask(ticks.format(0, 1)) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert tab.ask(ticks.format(2**53, 2**53 + 1)) == [2**53]


def test_errors_stand_in_one_line_where_they_belong(tab: Tab, address: str) -> None:
    tab.open(f"{address}#score")
    tab.click("#score-go")
    assert text(tab, "#score-error") == "choose a file, or paste a text"
    tab.open(address)
    tab.open(f"{address}?again#read")
    tab.ask("document.querySelector('#model-1').value = ''")
    tab.ask("document.querySelector('#model-1').dispatchEvent(new Event('change'))")
    tab.ask("document.querySelector('#text').value = ''")
    tab.click("#read-go")
    tab.wait("document.querySelector('#read-error').textContent")
    assert "expected at least one letter" in text(tab, "#read-error")
    tab.errors[:] = [error for error in tab.errors if "400" not in error]


@pytest.mark.parametrize("width, scheme", SCREENS)
def test_no_panel_scrolls_sideways(tab: Tab, address: str, width: int, scheme: str) -> None:
    tab.show(width, scheme=scheme)
    for panel in ("write", "read", "score"):
        tab.open(f"{address}?{panel}#{panel}")
        if panel != "score":
            tab.click(f"#{panel}-go")
            tab.wait(f"document.querySelectorAll('#{panel}-answers [data-at]').length > 50")
            ended(tab, panel)
            token = TOKENS.format(panel, 1).replace("[data-at]", '[data-at="9"]')
            tab.tap(token) if width < 600 else tab.hover(token)
            tab.wait("!document.querySelector('#card').hidden")
            left, right = tab.ask(
                "(({left, right}) => [left, right])(document.querySelector('#card').getBoundingClientRect())"
            )
            assert 0 <= left < right <= width
        assert tab.sideways() == 0
    ground = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 31)")


def drawn(tab: Tab) -> int:
    """Return how many points the curve of training has."""
    return tab.ask("(document.querySelector('#curve path.c-better')?.getAttribute('d') ?? '').split('L').length")


def test_a_run_under_way_gets_its_points_while_it_is_watched(tab: Tab, tmp_path: Path) -> None:
    folder = tmp_path / "live"
    with server("watch", str(folder)) as running:
        tab.open(running.url)
        assert text(tab, "#badge") == "waiting"
        options = [*TRAIN, "--train.steps", "60", "--train.log-every", "2", "--out", str(folder)]
        training = subprocess.Popen(
            [sys.executable, "-m", "core.cli", "train", "debug", *options], stdout=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        try:
            tab.wait("document.querySelector('#badge').innerText === 'training'")
            tab.wait("(document.querySelector('#curve path.c-better')?.getAttribute('d') ?? '').includes('L')")
            before = drawn(tab)
            tab.wait(f"(document.querySelector('#curve path.c-better').getAttribute('d')).split('L').length > {before}")
            tab.wait("document.querySelector('#badge').innerText === 'finished'")
        finally:
            assert training.wait() == 0
        lines = (folder / "metrics.jsonl").read_text().count("train/bpb")
        assert text(tab, "h1") == "live" and drawn(tab) == lines >= 30
        assert "60 of 60" in text(tab, "#figures") and count(tab, "#steps tbody tr") >= lines
        assert count(tab, "#samples blockquote") > 0 and "train.steps: 20 -> 60" in text(tab, "#settings")
        for width, scheme in SCREENS:
            tab.show(width, scheme=scheme)
            assert tab.sideways() == 0


PLAN = """
name = "quick"
base = "debug"
backends = ["cuda"]
seeds = [0, 1]
[budget]
steps = 12
[settings]
"eval.documents" = 2
"train.log_every" = 2
[variants.plain]
[variants.wide]
"model.dim" = 64
"""


def test_an_ablation_is_watched_to_its_end(tab: Tab, tmp_path: Path) -> None:
    plan = tmp_path / "quick.toml"
    plan.write_text(PLAN)
    store = tmp_path / "store"
    with server("watch", str(store)) as running:
        tab.open(running.url)
        ablating = subprocess.Popen(
            [sys.executable, "-m", "core.cli", "ablate", str(plan), "--store", str(store)], stdout=subprocess.DEVNULL
        )
        tab.wait("document.querySelector('#badge').innerText === 'finished'")
        assert ablating.wait() == 0
        assert "4 of 4 runs done" in text(tab, "#words") and count(tab, "#curves path.line") == 4
        assert count(tab, "#findings .difference circle.ring") == 2
        tab.wait("document.querySelector('#report a')")
        for width, scheme in SCREENS:
            tab.show(width, scheme=scheme)
            assert tab.sideways() == 0
        tab.command("Page.navigate", url=f"{running.url}/report?name=quick")
        tab.wait("document.querySelector('h1')?.innerText === 'quick' && document.querySelectorAll('svg').length > 2")
