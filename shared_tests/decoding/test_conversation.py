"""`skc sample --interactive`: what lines do to a text, what stops the model, what is said of speed. Budget: 6 s."""

import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

import skc
from core.cli import main
from core.verbs import conversation
from shared_tests.support.command_line import Capture, call, refuse
from shared_tests.support.killed import small_data

HOW = ("--tokens", "8", "--temperature", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("conversation")
    options = ("--train.steps", "1", "--train.seq", "32", "--eval.seq", "8", "--data.path", small_data(folder))
    assert main(["train", "debug", *options, "--backend", "cuda", "--out", str(folder / "run")]) == 0
    return str(folder / "run")


def talk(monkeypatch: pytest.MonkeyPatch, capsys: Capture, run: str, lines: str, *options: str) -> dict[str, Any]:
    """Type lines and return the JSON object, with what was said as `said`."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    assert main(["sample", run, "--interactive", *HOW, *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    return {**json.loads(captured.out), "said": captured.err}


def test_lines_go_into_the_text_and_the_model_goes_on(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    model = skc.load(run)
    first = model.sample("She", tokens=8, temperature=0)
    then = model.sample(f"{first} and he", tokens=8, temperature=0)
    value = talk(monkeypatch, capsys, run, "She\n and he\n/new\nIt")
    assert value["texts"] == [then, model.sample("It", tokens=8, temperature=0)]
    assert value["decoding"]["tokens"] == 24 and value["said"].count("(8 tokens in ") == 3
    assert value["said"].count("tokens/s)") == 3 and "> " not in value["said"], "no prompt where nobody types"


def test_an_empty_line_lets_it_write_on(run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The first turn is what `skc sample` writes, its tokens stay, and every turn has draws of its own."""
    numbers = []

    def streamed(engine: Any, text: Any, *arguments: Any) -> Iterator[str]:
        numbers.append((text.number, list(text.ids)))
        return real(engine, text, *arguments)

    real = conversation.streamed
    monkeypatch.setattr(conversation, "streamed", streamed)
    value = talk(monkeypatch, capsys, run, "\n\n", "--temperature", "1", "--seed", "2", "--prompt", "She")
    (text,) = value["texts"]
    first = skc.load(run).sample("She", tokens=8, temperature=1.0, seed=2)
    assert text.startswith(first) and len(text) > len(first) and value["decoding"]["tokens"] > 16
    assert [number for number, _ in numbers] == [0, 1, 2]
    begun, second, third = (ids for _, ids in numbers)
    assert second[: len(begun)] == begun and third[: len(second)] == second and len(third) > len(second) > len(begun)


def test_commands_change_how_it_writes(run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    lines = (
        "/tokens 3\nShe\n/temperature -1\n/top-k x\n/top-p 0\n/tempratur 1\n/nothing of that\n/\n/tokens\n"
        "/quit it\n/help\n/quit\nmore\n"
    )
    value = talk(monkeypatch, capsys, run, lines)
    assert value["texts"] == [skc.load(run).sample("She", tokens=3, temperature=0)]
    for words in (
        "temperature=-1.0: expected 0 or more", "/top-k x: expected a number", "top_p=0.0: expected more than 0",
        "/tempratur: did you mean /temperature?", "/nothing: type a beginning",
        "/tokens: expected one number; now 3\n", "/quit: type a beginning",
    ):  # fmt: skip
        assert words in value["said"]


def test_ctrl_c_stops_the_text_and_not_the_program(run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    turns = itertools.count()

    def streamed(*arguments: Any) -> Iterator[str]:
        for i, piece in enumerate(real(*arguments)):
            if next(turns) == 2:
                raise KeyboardInterrupt
            assert i < 8
            yield piece

    real = conversation.streamed
    monkeypatch.setattr(conversation, "streamed", streamed)
    value = talk(monkeypatch, capsys, run, "She\nIt\n")
    assert " (stopped)\n" in value["said"] and "It" in value["texts"][0]


def test_ctrl_c_at_the_prompt_says_how_to_end(run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Terminal(io.StringIO):
        lines = iter([KeyboardInterrupt(), "She\n", ""])

        def isatty(self) -> bool:
            return True

        def readline(self, size: int | None = -1, /) -> str:
            line = next(self.lines)
            if isinstance(line, BaseException):
                raise line
            return line

    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["sample", run, "--interactive", *HOW]) == 0
    said = capsys.readouterr().out
    assert "> \n/quit or Ctrl-D: the end\n> She" in said


def test_what_is_no_text_is_one_line(run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    bad = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    for stdin, words in (
        (bad, "standard input: not UTF-8"),
        (io.StringIO("a\udc80\n"), "standard input: not UTF-8"),
        (io.StringIO("a" * (conversation.MOST_LETTERS + 1)), "a line of over 1,048,576 letters"),
    ):
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["sample", run, "--interactive"]) == 2
        assert words in capsys.readouterr().err
    assert "--interactive writes one text" in refuse(capsys, "sample", run, "--interactive", "--n", "2")
    assert "--interactive writes one text" in refuse(capsys, "sample", run, "--interactive", "--prompt", "a", "b")


def test_a_sample_ends_with_its_speed(run: str, capsys: Capture) -> None:
    assert main(["sample", run, *HOW, "--prompt", "She", "--n", "2"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("16 tokens in ") and last.endswith(" tokens/s")
    decoding = call(capsys, "sample", run, *HOW)["decoding"]
    assert decoding["tokens"] == 8 and decoding["tokens_per_second"] == pytest.approx(8 / decoding["seconds"])
    assert decoding["seconds"] >= 1e-3 * decoding["passes"] * decoding["ms"]["verify"]


def test_top_p_reaches_the_sampler(run: str, capsys: Capture) -> None:
    """Of the likeliest tokens with next to no share only the likeliest is left: the text of temperature 0."""
    narrow = call(capsys, "sample", run, "--tokens", "8", "--top-p", "1e-9", "--prompt", "She")["samples"]
    assert narrow == call(capsys, "sample", run, *HOW, "--prompt", "She")["samples"]
    assert "top_p=1.5: expected more than 0, at most 1" in refuse(capsys, "sample", run, "--top-p", "1.5")
