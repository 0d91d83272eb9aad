"""Reports of ablations: their figures are those of the statistics; whole, escaped, offline. Budget: 25 s."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import scipy.stats

from core.ablation.report import wording
from core.ablation.report.page import NARROW, WIDE
from core.ablation.report.pictures import COLOURS, STYLE, learning, short
from core.ablation.report.report import draw, write_report
from core.ablation.stats.findings import assess
from core.ablation.stats.results import Results
from shared_tests.support.ablations import change, examples, outcome, unfinished
from shared_tests.support.report_page import EVIL, Page, offline


def written(made: Results, folder: Path) -> tuple[Page, str, list[Path]]:
    """Return (page, its text, files) of a report."""
    files = write_report(made, folder)
    text = files[0].read_text(encoding="utf-8")
    return Page(text), text, files


class Reports:
    """The example cases and their reports, each written once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, examples(folder / "cases")
        self.done: dict[str, tuple[Page, str, list[Path]]] = {}

    def __call__(self, name: str) -> tuple[Page, str, list[Path]]:
        if name not in self.done:
            self.done[name] = written(self.made[name], self.folder / name)
        return self.done[name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return Reports(tmp_path_factory.mktemp("reports"))


@pytest.mark.parametrize("name", ["one-seed", "three", "twelve", "early", "nothing", "two-backends"])
def test_every_case_is_well_formed_offline_and_small(name: str, cases: Reports, tmp_path: Path) -> None:
    page, text, files = cases(name)
    assert offline(text) and "default-src 'none'" in text
    assert len(text.encode()) < 1_000_000 and all(path.stat().st_size > 500 for path in files)
    backends = len(cases.made[name].plan.backends)
    assert len(files) == (2 if name == "nothing" else 2 + 4 * backends)
    heads = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert heads[0] == "h1" and heads.count("h1") == 1 and "h2" in heads
    images = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(len(attributes["aria-label"] or "") > 20 for attributes in images)
    assert bool(images) == (name != "nothing")
    regions = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert len(regions) == len(page.tables) and all(r["tabindex"] == "0" for r in regions)


def test_the_reader_of_this_test_sees_faults() -> None:
    good = "<html><body><p>x</p></body></html>"
    assert offline(good)
    for bad in (
        '<img src="a.png"/>',
        "<script>1</script>",
        '<a href="x">y</a>',
        "<p>http://x</p>",
        '<p onclick="1">x</p>',
    ):
        assert not offline(good.replace("<p>x</p>", bad))
    with pytest.raises(AssertionError):
        Page("<p><b>x</p></b>")


def test_every_figure_of_the_table_is_that_of_the_statistics(cases: Reports, tmp_path: Path) -> None:
    made = cases.made["twelve"]
    page, text, files = cases("twelve")
    assert "&lt; 0.0001</td>" in text and "< 0.0001</td>" not in text
    head, *rows = page.tables[0]
    assert tuple(head) == wording.HEAD and len(rows) == 12
    base = {r.seed: r for r in made.of("plain")}
    chances = {}
    for cells in rows[1:]:
        row, runs = dict(zip(head, cells, strict=True)), made.of(cells[0])
        test: Any = scipy.stats.ttest_rel([r.bpb for r in runs], [base[r.seed].bpb for r in runs])
        interval = test.confidence_interval(0.95)
        gap = np.mean([(r.bpb or 0) - (base[r.seed].bpb or 0) for r in runs])
        figures = np.array([r.bpb for r in runs])
        assert row["difference"].replace("−", "-") == f"{gap:+.4f}"
        assert row["95 % interval"].replace("−", "-") == f"{interval.low:+.4f} to {interval.high:+.4f}"
        assert row["p"] == wording.chance(float(test.pvalue))
        assert row["bits per byte"] == f"{figures.mean():.4f} ± {figures.std(ddof=1):.4f}"
        assert row["seeds"] == str(len(runs)) == ("4" if cells[0] == "skc" else "5")
        assert row["bytes"] == f"{runs[0].bytes:,}" and row["parameters"] == f"{runs[0].parameters:,}"
        assert row["tokens/s"] == f"{runs[0].tokens_per_second:,.0f}"
        chances[cells[0]] = float(test.pvalue), row["Holm p"], row["verdict"]
    highest = 0.0
    for i, (p, shown, verdict) in enumerate(sorted(chances.values())):
        highest = max(highest, min(1.0, (11 - i) * p))
        assert shown == wording.chance(highest)
        assert (verdict in ("better", "worse")) == (highest < 0.05) and ("inside noise" in verdict) == (p >= 0.05)
    assert chances["skc"][2] == "inside noise (4 of 5; 1 failed)"
    gaps = [float(row[3].replace("−", "-")) for row in rows[1:]]
    assert gaps == sorted(gaps) and gaps[0] < 0 < gaps[-1]
    markdown = files[1].read_text(encoding="utf-8")
    for cells in rows:
        assert f"`{cells[0]}`" in markdown and all(
            cell.split(" ±")[0].replace("<", r"\<") in markdown for cell in cells
        )


def test_answers_say_how_much_how_sure_and_at_what_cost(cases: Reports, tmp_path: Path) -> None:
    words = "".join(cases("three")[0].words)
    (found,) = assess(cases.made["three"])
    for one in found.ends:
        assert one.paired is not None
        assert f"{abs(one.paired.mean):.4f} bits per byte {'lower' if one.paired.mean < 0 else 'higher'}" in words
    assert "+17,000 bytes (+2.1 %), speed −2 %" in words and "3 seeds could have resolved 0.0072" in words
    words = "".join(cases("one-seed")[0].words)
    assert "in the one seed that both have: no interval" in words and "95 % interval −" not in words
    words = "".join(cases("early")[0].words)
    assert "(early look: 2 of 3)" in words and "not started: no-muon seed 1" in words
    words = "".join(cases("nothing")[0].words)
    assert "No run has finished yet: 12 are planned" in words and "bits per byte lower" not in words


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    made = outcome(tmp_path, {"plain": 0.0, "b": -0.01})
    made = change(change(made, "b", 0, samples=(EVIL,)), "b", 1, status="failed", bpb=None, message=EVIL)
    made = made._replace(plan=made.plan._replace(purpose=EVIL + "|`*"))
    made = change(made, "b", 2, byte_rule=EVIL)
    page, text, files = written(made, tmp_path / "out")
    assert offline(text) and "<script" not in text
    assert "".join(page.words).count(EVIL) >= 4  # purpose, sample, message, doubt: shown as they are
    markdown = files[1].read_text(encoding="utf-8")
    assert all(line.startswith("    ") for line in markdown.splitlines() if "<script>" in line.replace(r"\<", ""))


def test_failed_runs_changes_and_the_way_to_repeat_it_are_there(cases: Reports, tmp_path: Path) -> None:
    made = cases.made["twelve"]
    words = "".join(cases("twelve")[0].words)
    assert "FloatingPointError: loss is nan at step 143 of 250" in words and "skc, seed 2, mlx" in words
    assert "train.warmup: 0.02 -> 0.14" in words and "59 done, 1 failed" in words
    assert "It was koopman & <b>she</b> said so." in words
    assert Path(made.plan.path).read_text() in words and "skc ablate parts.toml" in words


def test_one_variant_a_lost_reference_and_stale_pictures(cases: Reports, tmp_path: Path) -> None:
    page, _, files = written(outcome(tmp_path, {"plain": 0.0}), tmp_path / "out")
    assert len(page.tables) == 1 and {p.name for p in files} >= {"curves.png", "bytes.png"}
    made = outcome(tmp_path, {"plain": 0.0, "b": 0.1})
    for seed in range(3):
        made = change(made, "plain", seed, status="failed", bpb=None)
    words = "".join(written(made, tmp_path / "out")[0].words)
    assert "nothing to compare" in words and not list((tmp_path / "out").glob("*.png"))
    assert "".join(written(unfinished(made), tmp_path / "out")[0].words)


@pytest.fixture
def style() -> Iterator[None]:
    """Draw as reports do."""
    with matplotlib.rc_context(STYLE):
        yield


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.usefixtures("style")
def test_pictures_show_the_figures_inside_their_frame(width: int, cases: Reports) -> None:
    made = cases.made["twelve"]
    (found,) = assess(made)
    drawn = draw(made, found, width)
    for key, picture in drawn.items():
        picture.figure.draw_without_rendering()
        box, frame = picture.figure.get_tightbbox(), picture.figure.bbox_inches
        assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= frame.x1 + 0.01 and box.y1 <= frame.y1 + 0.01, key
    (axes,) = drawn["difference"].figure.axes
    rings = {tuple(line.get_xdata()) for line in axes.lines if line.get_label() == "seeds"}
    ends = [e for e in found.ends if e.paired and e.variant != "diverges"]
    assert rings == {e.differences for e in ends} and len(rings) == 10, "every seed, but for the one variant far away"
    intervals = {tuple(line.get_xdata()) for line in axes.lines if line.get_label() == "interval"}
    assert intervals == {(e.paired.low, e.paired.high) for e in ends if e.paired}
    assert [line.get_marker() for line in axes.lines if line.get_xdata()[0] == axes.get_xlim()[1]] == [">"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert "koopman" in names and all("koopman" not in name or name == "koopman" or "…" in name or "+" in name
                                      for name in names)  # fmt: skip
    titles = [panel.get_title("left") for panel in drawn["curves"].figure.axes]
    assert len(titles) == 11 and "koopman" in titles and "diverges *" in titles


@pytest.mark.usefixtures("style")
def test_missing_seeds_do_not_move_a_point_and_shared_noise_leaves_the_gaps(cases: Reports) -> None:
    made = cases.made["twelve"]
    (found,) = assess(made)
    one, base = next(e for e in found.ends if e.variant == "skc"), found.summaries[0].bpb
    assert one.paired is not None and base is not None
    picture = draw(made, found, WIDE)["bytes"]
    dots = picture.figure.axes[0].collections[0].get_offsets().tolist()
    assert [851.0, base + one.paired.mean] in dots and len(dots) == 11
    assert f"skc 851,000 bytes {base + one.paired.mean:.4f}" in picture.words
    for case, basis in (("three", "validation estimates"), ("two-backends", "training curves")):
        what, lines, gaps = learning(cases.made[case], "mlx", "step")
        ends = {e.variant: e.paired.mean for e in assess(cases.made[case])[0].ends if e.paired}
        assert what == basis and [line.name for line in lines] == ["plain", *ends]
        assert set(gaps[0].mean) == {0.0}
        for line in gaps[1:]:  # made with the same difference all along, and with the same batches
            assert line.mean == pytest.approx([ends[line.name]] * len(line.xs), abs=1e-9)
            assert max(line.high) - min(line.low) < 0.02 < max(lines[0].high) - min(lines[0].low)


def test_long_names_lose_their_middle() -> None:
    assert short("koopman+engram+bank", NARROW) == "koopman…m+bank"
    assert short("plain", NARROW) == "plain" and len(short("k" * 60, WIDE)) == 26


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_can_be_read_by_day_and_by_night() -> None:
    for name in ("ink", "muted", "better", "worse", "noise"):
        for i in (0, 1):
            for ground in ("page", "box"):
                assert contrast(COLOURS[name][i], COLOURS[ground][i]) >= 4.5, (name, i, ground)
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#999999", "#ffffff") < 4.5
