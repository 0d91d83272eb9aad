"""scripts/bench_decoding refuses in one line what it cannot measure. Budget: 5 s."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import skc
from core.presets import PRESETS

SCRIPT = Path(skc.__file__).parent / "scripts" / "bench_decoding"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("nowhere",), "nowhere: no such run folder or artifact"),
        (("nowhere", "--block", "8", "1"), "block=1: expected 2 to 64"),
        (("nowhere", "--temperature", "-1"), "temperature=-1.0: expected 0 or more"),
        (("nowhere", "--prompts", "0"), "prompts=0: expected 1 to 6"),
        (("nowhere", "--rounds", "0"), "rounds=0: expected"),
        (("tiny", "--tokens", "256"), "tokens=256: corpus text must end before this model's context does"),
    ],
)
def test_bad_values_are_refused(
    given: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if given[0] == "tiny":
        monkeypatch.setattr(skc, "load", lambda *_, **__: SimpleNamespace(config=PRESETS["tiny"].config))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"bench_decoding: error: {words}")
