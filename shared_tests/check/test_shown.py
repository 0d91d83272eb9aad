"""What people see: pictures' places and ticks, samples with their prompts, what stays in the log. Budget: 15 s."""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from core.ablation.report import wording
from core.audit import code as audit_code
from core.check import dtypes
from core.check.bench_report import BenchReport
from core.cli import main
from core.compare.picture import _curve, _difference
from core.compare.runs import compare
from core.console import Console
from core.decoding.generate import PROMPTS, Text, sample_lines
from core.model.shares import FLOP_RULE
from core.training.report import MARGIN, whole_ticks
from core.training.run import Run
from core.verbs.sample import _show
from shared_tests.support.command_line import Capture, call, refuse
from shared_tests.support.killed import small_data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of runs `a` and `b`, and what the first said on the console."""
    folder = tmp_path_factory.mktemp("shown")
    options = ["--train.steps", "6", "--train.log_every", "2", "--train.eval_every", "3", "--train.sample_every", "6"]
    options += ["--train.seq", "16", "--eval.seq", "16", "--data.path", small_data(folder), "--backend", "mlx"]
    with redirect_stdout(io.StringIO()) as said:
        assert main(["train", "debug", *options, "--out", str(folder / "a")]) == 0
    assert main(["train", "debug", "--seed", "2", *options, "--out", str(folder / "b")]) == 0
    return folder, said.getvalue()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is that of the C locale
def test_a_stream_shows_what_its_encoding_lacks_as_question_marks(errors: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors)
    Console(stream=stream)("Zürich \u2819")
    assert stream.buffer.getvalue() == b"Z?rich ?\n"  # type: ignore[attr-defined]


def test_the_console_leaves_the_hash_to_the_log(runs: tuple[Path, str]) -> None:
    folder, said = runs
    (digest,) = Run.open(folder / "a").logged_configs()
    assert digest not in said and said.splitlines()[1].startswith("run ")
    log = (folder / "a" / "log.txt").read_text()
    assert [line for line in log.splitlines() if "sha256" not in line] == said.splitlines()


def test_samples_are_shown_with_their_prompts(runs: tuple[Path, str]) -> None:
    folder, said = runs
    texts = Run.open(folder / "a").last("samples")
    (first, _), (second, the) = sample_lines(texts)
    assert PROMPTS == ("", "The") and (first, second) == ("from nothing", "after 'The'") and the.startswith("The")
    assert "step 6  sample from nothing: " in said and "step 6  sample after 'The': The" in said
    report = (folder / "a" / "report.md").read_text()
    assert "From nothing:\n\n> " in report and "After 'The':\n\n> The" in report


class Growing:
    """A text that is at first this long."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self.number, self.done, self.words = prompt, 0, False, prompt

    def __str__(self) -> str:
        return self.words

    whole: Any = Text.whole


def test_texts_are_shown_as_they_grow_and_in_their_order() -> None:
    """What a letter's first bytes decode to is not shown; the second text, done first, waits for its turn."""
    first, second, third = (Growing(prompt) for prompt in ("She", "He", "It"))
    pieces: list[str] = []

    def grown() -> Iterator[Any]:
        for text, words, done in (
            (second, "He was", False), (first, "She is", False), (second, "He was.", True), (third, "It", True),
            (first, "She is \ufffd", False), (first, "She is é", False), (first, "She is é\ufffd", True),
        ):  # fmt: skip
            text.words, text.done = words, done
            yield text
            pieces.append("|")

    say: Any = lambda line="", end="\n": pieces.append(line + end)  # noqa: E731
    texts: Any = [first, second, third]
    _show(texts, grown(), say)
    head = "1 of 3, sample 1 after 'She':\nShe is"
    rest = "\n\n2 of 3, sample 1 after 'He':\nHe was.\n\n3 of 3, sample 1 after 'It':\nIt\n|"
    assert "".join(pieces) == f"|{head}||| |é|\ufffd{rest}"


def test_curves_and_differences_are_at_the_same_places(runs: tuple[Path, str]) -> None:
    """Lines at steps 2, 3, 4, 6: their windows are drawn in the middle, above and below."""
    folder, _ = runs
    found, opened = compare([str(folder / "a"), str(folder / "b")])
    above, below = Figure().subplots(2, 1)
    _curve(above, opened[0], "step", "train/bpb", "black")
    _difference(below, found.pairs[str(folder / "b")], "black")
    places = [1.0, 2.5, 3.5, 5.0]
    assert [list(line.get_xdata()) for line in above.lines[:1]] == [places]
    assert [list(line.get_xdata()) for line in below.lines[:2]] == [places, places]


def test_ticks_are_whole_and_nothing_lies_on_the_axis() -> None:
    for end in (2, 3, 5, 20, 400, 20_000):
        axes = Figure(figsize=(8, 4.5)).add_subplot()
        axes.plot([1, end], [2.0, 3.0])
        axes.margins(y=MARGIN)
        whole_ticks(axes)
        ticks = axes.get_xticks()
        assert np.array_equal(ticks, np.round(ticks)) and len(ticks) > 1
        low, high = axes.get_ylim()
        assert low < 2 - 0.05 and high > 3 + 0.05


def test_the_verdict_comes_second() -> None:
    assert all(head[:2] == ("variant", "verdict") for head in (wording.HEAD, wording.PLACE_HEAD, wording.SIZE_HEAD))


def test_compare_names_the_folder_that_is_not_there(capsys: Capture) -> None:
    assert refuse(capsys, "compare", "runs/nothere").startswith("skc compare: runs/nothere: does not exist")


def test_the_formula_of_flops_is_in_the_docs(capsys: Capture) -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
    assert FLOP_RULE in " ".join(docs.read_text().split())
    assert main(["info", "debug"]) == 0
    assert FLOP_RULE not in capsys.readouterr().out and call(capsys, "info", "debug")["flop_rule"] == FLOP_RULE
    assert "flop_rule" in BenchReport.__annotations__


def test_doctor_says_what_it_did_not_check(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.check.doctor.available_backends", lambda: ["mlx"])
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "cuda: not installed (pip install -c constraints.txt -e '.[torch]')\n" in said
    assert "parity: not checked (needs both backends: pip install -c constraints.txt -e '.[torch]')\n" in said
    assert said.endswith("mlx works; parity was not looked at\n") and "everything" not in said
    assert "a training step" not in said, "there is no GPU"


def test_doctor_times_the_types_where_mlx_has_a_gpu(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chip is said to be one: the steps run here, of the size for a CPU."""
    from backends.mlx import device
    from core.check import doctor

    monkeypatch.setattr("core.check.doctor.available_backends", lambda: ["mlx"])
    monkeypatch.setattr(device, "chip", lambda: device.Chip(True, True, "Apple M1", "applegpu_g13g", 5e9, 8e9))
    monkeypatch.setattr(doctor, "step_milliseconds", lambda gpu: dtypes.step_milliseconds(False) if gpu else None)
    value = call(capsys, "doctor")
    assert value["types"].keys() == set(dtypes.TYPES) and min(value["types"].values()) > 0
    times = {"float32": 9.04, "float16": 6.0, "bfloat16": 12.0}
    monkeypatch.setattr(doctor, "step_milliseconds", lambda gpu: times)
    assert main(["doctor"]) == 0
    assert (
        "mlx: a training step in float32 9.0 ms, float16 6.0 ms, bfloat16 12.0 ms: float16 was fastest; skc train "
        "takes float32: --dtype float16 may be faster\n"
    ) in capsys.readouterr().out
    times["float32"] = 5.0
    assert dtypes.speeds_in_words(times, "float32").endswith("bfloat16 12.0 ms: float32 was fastest")


def test_code_over_its_share_of_the_budget(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of test_audit.py's audit; code that takes more than is reserved counts as it is."""
    packed = max(audit_code.packed_code().values())
    value = call(capsys, "info", "debug", "--export.code-bytes", str(packed))
    assert value["within_budget"] and max(value["packed_code"].values()) == packed
    assert value["bytes_total"] == value["bytes_predicted"] + packed
    small = ("info", "debug", "--export.code-bytes", str(packed - 7), "--export.budget")
    assert main([*small, str(value["bytes_total"])]) == 0
    assert f"packed: 7 more than the {packed - 7:,} of export.code_bytes" in capsys.readouterr().out
    assert main([*small, str(value["bytes_total"] - 1)]) == 1
    assert "OVER by 1" in capsys.readouterr().out
    names = {path.name for path in audit_code.imported(*audit_code.EVALUATION, *audit_code.ENGINES["cuda"])}
    assert {"watched_process.py", "evaluation.py", "ledger.py", "engine.py", "cross_entropy.py"} <= names
    assert not {"train.py", "cli.py", "report.py", "blas.py"} & names


def test_export_fails_where_the_code_is_over(
    runs: tuple[Path, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(code: int, status: int) -> dict:
        monkeypatch.setattr("core.verbs.export.packed_code", lambda: {"mlx": 1, "cuda": code})
        return call(capsys, "export", str(runs[0] / "b"), "--backend", "mlx", code=status)["artifact"]

    artifact = export(140_001, 0)
    assert artifact["within"] and artifact["packed_code"] == 140_001
    room = 16_000_000 - artifact["bytes"]
    assert export(room, 0)["within"] and export(room + 1, 1)["within"]
