"""The packed program: what the checkout computes, bit for bit, where nothing of the checkout can be imported."""

import ast
import hashlib
import json
import os
import py_compile
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import ROOT, presets
from core.audit.claims import Plan, check_size, same_text
from core.audit.rules import Finding
from core.cli import main
from core.config import ConfigError, RunConfig, changed
from core.data.dataset import identity, open_dataset
from core.data.tokenizer import TokenizerError
from core.data.unlisted import open_unlisted, val_sha256
from core.files import locked
from core.submission import known
from core.submission.pack import pack_program, program_sources
from core.submission.program import open_text, run_name, seeded
from core.submission.shaking import Shaken
from core.submission.unpack import compile_problem, unpack_program
from core.verbs.pack import TARGETS
from shared_tests.support import cross_entropy_cases, packed, scan_cases
from shared_tests.support.killed import small_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_data(tmp_path_factory.mktemp("text"), 60)


def test_an_skc_program_computes_what_the_checkout_does(data: str, tmp_path: Path) -> None:
    found = packed.same(packed.skc(data), tmp_path)
    log = (tmp_path / "room" / "logs" / "one.txt").read_text()
    program = (tmp_path / "train_gpt.py").read_bytes()
    assert f"code_sha256: {hashlib.sha256(program).hexdigest()}\n" in log and f"code_bytes: {len(program)}\n" in log
    assert f"artifact_sha256: {found['artifact']}\n" in log and len(found["nats"]) == 2
    words = log + (tmp_path / "room" / "runs" / "one" / "env.json").read_text()
    assert not re.search(rf"(?<!\w){re.escape(os.uname().nodename)}(?!\w)", words)
    for name in (os.path.expanduser("~"), str(tmp_path), ROOT):
        assert name not in words + "".join(unpack_program(program).texts), name


@pytest.mark.long
def test_an_attention_program_computes_what_the_checkout_does(data: str, tmp_path: Path) -> None:
    packed.same(packed.attention(data), tmp_path, form="zip")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["cuda", "mlx"])
@pytest.mark.parametrize("kind", [packed.skc, packed.attention])
def test_programs_of_two_ranks_compute_what_the_checkout_does(
    kind: Any, backend: str, data: str, tmp_path: Path
) -> None:
    packed.same(kind(data), tmp_path, world=2, backend=backend)


@pytest.mark.long
@pytest.mark.parametrize("kind", [packed.skc, packed.attention])
def test_a_program_for_mlx_computes_what_the_checkout_does(kind: Any, data: str, tmp_path: Path) -> None:
    packed.same(kind(data), tmp_path, backend="mlx")


def test_a_program_writes_samples_where_its_settings_ask_for_them(data: str, tmp_path: Path) -> None:
    """As those of debug, tiny and skc_mac do."""
    program = packed.written(tmp_path, packed.tiny("debug", data, **{"train.steps": 2, "train.sample_every": 1}))
    done = packed.start(program, tmp_path, DATA_PATH=data, RUN_ID="one")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "logs" / "one.txt").read_text() == done.stdout
    rows = [json.loads(line) for line in (tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "samples" in row]) == 2


def test_a_program_has_no_place_of_the_machine_that_packed_it(tmp_path: Path) -> None:
    here = changed(presets.get("debug").config, {"data.path": str(tmp_path)})
    program = pack_program(here, "cuda", "text")
    assert not any(str(tmp_path) in text for text in unpack_program(program).texts)
    assert program == pack_program(presets.get("debug").config, "cuda", "text")


def test_a_program_reads_sentencepiece_alone(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("DATA_PATH", data)
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="neither a SentencePiece .model nor a tokenizer.json"):
        open_text(packed.tiny("debug", data))
    texts = program_sources(presets.get("debug").config, "cuda", "text", {})
    assert not {"core.data.tokenizer_json", "backends.cuda.twin", "core.formats.kinds"} & set(texts)


def test_nothing_of_the_checkout_is_there_for_a_stranger(tmp_path: Path) -> None:
    """Else the programs of these tests could take from it what they lack."""
    done = subprocess.run(
        [*packed.STRANGER, "-c", "import numpy, core"],
        cwd=tmp_path, env=packed.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert "No module named 'core'" in done.stderr


@pytest.mark.parametrize(("preset", "form"), [("skc_8xh100", "text"), ("pr1855", "text"), ("pr1855", "zip")])
def test_programs_have_no_more_bytes_than_they_should(preset: str, form: Any, tmp_path: Path) -> None:
    config = presets.get(preset).config
    program = pack_program(config, "cuda", form)
    assert len(program) <= TARGETS[form], len(program)
    assert len(program) <= config.export.code_bytes, "what training leaves for code covers it"
    found = unpack_program(program)
    assert not found.problems and len(found.texts) > 100
    if form == "text":
        assert not compile_problem(found)
        (tmp_path / "train_gpt.py").write_bytes(program)
        py_compile.compile(str(tmp_path / "train_gpt.py"), cfile=str(tmp_path / "x.pyc"), doraise=True)
    else:
        assert program == pack_program(config, "cuda", form), "the same settings give the same bytes"


def test_what_is_left_out_exists() -> None:
    """A name that has changed would leave nothing out."""
    for backend in ("cuda", "mlx"):
        for preset in ("skc_8xh100", "pr1855", "debug"):
            for name in known.absent(presets.get(preset).config, backend):
                assert _exists(name.split(".")), name


def _exists(parts: list[str]) -> bool:
    place = Path(ROOT)
    for i, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            tree: Any = ast.parse((place / f"{part}.py").read_text())
            for name in parts[i + 1 :]:
                tree = next((one for one in tree.body if getattr(one, "name", None) == name), None)
                if tree is None:
                    return i + 3 == len(parts)  # a method that the class inherits
            return True
        else:
            return False
    return True


def test_shaking_keeps_what_is_named_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "one": "from core.two import kept, left\nimport core.three as three\nBOTH = 1\n"
        "def used():\n    return kept() + three.far() + BOTH\ndef unused():\n    return left()\n",
        "two": "def kept():\n    return Thing().called()\ndef left():\n    return 2\n"
        "class Thing:\n    def called(self):\n        return getattr(self, 'named')()\n"
        "    def named(self):\n        return 3\n    def idle(self):\n        return 4\n",
        "three": "print('done by itself')\ndef far():\n    return 5\n",
    }
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "__init__.py").touch()
    for name, text in texts.items():
        (tmp_path / "core" / f"{name}.py").write_text(text)
    monkeypatch.setattr("core.submission.shaking.ROOT", str(tmp_path))
    shaken = Shaken("from core.one import used\nused()", ["core.three"])
    found = {name: ast.unparse(shaken.text(name)) for name in shaken.modules}
    assert "used" in found["core.one"] and "unused" not in found["core.one"] and "left" not in found["core.one"]
    assert "called" in found["core.two"] and "named" in found["core.two"] and "idle" not in found["core.two"]
    assert "core.three" not in found
    whole = Shaken("from core.one import used\nused()")
    assert "done by itself" in ast.unparse(whole.text("core.three"))


@pytest.mark.parametrize(("preset", "backend"), [("skc_mac", "mlx"), ("pr1855", "mlx"), ("skc_1609_mac", "cuda")])
def test_shaking_keeps_the_gradients_of_what_it_keeps(preset: str, backend: str) -> None:
    """What a decorator gives to another function is named by nobody: without it gradients have other digits."""
    given = []
    for module, text in program_sources(presets.get(preset).config, backend, "text", {}).items():
        path = Path(ROOT, *module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text()).body if path.is_file() else ():
            decorators = [one for one in getattr(node, "decorator_list", ()) if isinstance(one, ast.Attribute)]
            names = {ast.unparse(one): ast.unparse(one.value) for one in decorators}
            given += [(f"@{name}" in text) for name, owner in names.items() if f"def {owner}(" in text]
    assert given and all(given)


def test_a_program_refuses_what_it_does_not_read(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = packed.tiny("debug", data)
    done = packed.start(packed.written(tmp_path, config), tmp_path, DATA_PATH=data, NUM_LAYERS="4")
    words = "NUM_LAYERS: this program reads DATA_PATH, TOKENIZER_PATH, SEED, RUN_ID alone"
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert not (tmp_path / "runs").exists()
    for name, value, of, words in (
        ("SEED", "x", seeded, "SEED='x': expected a whole number"),
        ("RUN_ID", "../x", run_name, "RUN_ID='../x': expected letters"),
        ("DATA_PATH", str(tmp_path / "none"), open_text, "no such folder; give the one that holds the shards"),
        ("DATA_PATH", str(tmp_path), open_text, "tokenizer.model"),
    ):
        with monkeypatch.context() as given:
            given.setenv(name, value)
            with pytest.raises((ConfigError, OSError), match=re.escape(words)):
                of(config)
    monkeypatch.setenv("SEED", "7")
    assert seeded(config).seed == 7 and run_name(seeded(config)) == "debug_seed7"


def test_libraries_read_the_source_of_packed_modules(tmp_path: Path) -> None:
    """Triton and torch.compile ask inspect for the lines of a function, which lie in no file."""
    program = packed.written(tmp_path, presets.get("skc_8xh100").config)
    script = (
        "import runpy, inspect, sys; runpy.run_path(sys.argv[1], run_name='packed')\n"
        "from core.rng import stream\nfrom backends.cuda.kernels import scan\n"
        "print(inspect.getsource(stream).splitlines()[0], inspect.getsourcefile(stream))\n"
        "print('tl.constexpr' in scan.forward_kernel.src, scan.forward_kernel.src.splitlines()[0])\n"
    )
    done = subprocess.run(
        [*packed.STRANGER, "-c", script, str(program)],
        cwd=tmp_path, env=packed.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first.startswith("def stream(") and first.endswith("train_gpt.py/core/rng.py")
    assert second.startswith("True def forward_kernel(")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("kernels")
    return folder, [sys.executable, "-W", "ignore", "-m", "shared_tests.support.packed"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
def test_packed_kernels_equal_the_oracle(kernels: Any) -> None:
    folder, command = kernels
    program, file = packed.written(folder, presets.get("skc_8xh100").config), folder / "found.npz"
    environment = scan_cases.environment(TRITON_INTERPRET="1")
    subprocess.run([*command, "kernels", str(program), str(file)], env=environment, check=True, timeout=400, cwd=ROOT)
    with np.load(file) as arrays:
        found = dict(arrays)
    for case in scan_cases.CASES:
        got = {key.rpartition("/")[2]: value for key, value in found.items() if key.startswith(f"scan {case}/")}
        assert max(scan_cases.gaps(case, got).values()) <= scan_cases.LIMITS[case.dtype], case
    for case in cross_entropy_cases.CASES:
        start = f"cross_entropy {case}/"
        got = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
        for output, gap in (
            cross_entropy_cases.Run({f"{case}/{k}": v for k, v in got.items()}, {}).gaps(case, case).items()
        ):
            assert gap <= case.limit(output), (case, output, gap)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
def test_packed_kernels_compile_for_an_h100(kernels: Any) -> None:
    folder, command = kernels
    program = packed.written(folder, presets.get("skc_8xh100").config)
    done = subprocess.run(
        [*command, "compile", str(program)],
        env=scan_cases.environment(), capture_output=True, text=True, timeout=400, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert names == ["forward_kernel", "backward_kernel"] * 5, done.stdout


def test_the_verb_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train_gpt.py"
    assert main(["pack", "debug", "--out", str(out), "--pack", "zip", "--json"]) == 0
    said = capsys.readouterr().out
    assert f'"bytes": {out.stat().st_size}' in said and hashlib.sha256(out.read_bytes()).hexdigest() in said
    assert runpy.run_path(str(out), run_name="packed")["PARTS"]
    sys.meta_path.pop(0)
    assert main(["pack", "debug", "--out", str(out), "--eval.plugins", "package.module:Class"]) == 2
    assert "a packed program holds our code alone" in capsys.readouterr().err


def test_settings_are_folded_and_what_runs_later_is_not() -> None:
    config = presets.get("debug").config
    texts = program_sources(config, "cuda", "text", {})
    assert "mtp_heads" not in texts["backends.cuda.engine"] and "depth_drop" not in texts["backends.cuda.engine"]
    assert "code_bytes" in texts["core.training.finish"], "the program's own bytes"
    assert "class Delta" not in "".join(texts.values()).replace("class Delta:0", "").replace("class Delta(Part)", "")


def test_an_audit_knows_the_text_of_a_packed_run(data: str) -> None:
    """By its files: the program read no manifest, the audit reads one."""
    listed = open_dataset(data)
    read = val_sha256(open_unlisted(data, str(Path(data, "tokenizer.model"))))
    known = {"val_sha256": read, "data": {"name": "data", "sha256": "0" * 64}}
    for environment, same in (
        (known, True), ({**known, "val_sha256": "0" * 64}, False), ({"data": identity(listed)}, True),
        ({"data": known["data"]}, False), ({}, True),
    ):  # fmt: skip
        run: Any = SimpleNamespace(environment=lambda environment=environment: environment)
        assert same_text(run, listed) == same, environment


def test_two_programs_never_write_into_one_run(data: str, tmp_path: Path) -> None:
    program = packed.written(tmp_path, packed.tiny("debug", data))
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with (tmp_path / "runs" / "one" / "lock").open("ab") as file:
        assert locked(file)
        done = packed.start(program, tmp_path, DATA_PATH=data, RUN_ID="one")
    words = "train_gpt.py: runs/one: another program writes into it: wait until it ends, or set RUN_ID\n"
    assert done.returncode == 2 and done.stderr.endswith(words), done.stderr[-2000:]
    assert not (tmp_path / "runs" / "one" / "config.json").exists()


def test_an_audit_counts_the_program_that_made_the_run(tmp_path: Path) -> None:
    program, artifact = tmp_path / "train_gpt.py", tmp_path / "artifact.skc"
    program.write_bytes(b"x" * 70_000)
    artifact.write_bytes(b"a" * 1000)
    sha256 = hashlib.sha256(program.read_bytes()).hexdigest()
    manifest = {"splits": {"val": {"files": []}}, "tokenizer": {"file": "tokenizer.model"}}
    dataset: Any = SimpleNamespace(path=str(tmp_path), manifest=manifest)
    code = SimpleNamespace(kind="code", path=known.__file__, size=9, read=True)
    process: Any = SimpleNamespace(files=[code], packages=[])

    def found(environment: dict[str, Any], file: Path | None) -> Finding:
        run: Any = SimpleNamespace(environment=lambda: environment)
        plan = Plan(artifact, run, RunConfig(), tmp_path, "cuda", None, None, 0, 0, (), (), file)
        return check_size(plan, process, dataset)

    good = found({"program_sha256": sha256}, program)
    assert (
        good.verdict == "PASS" and good.details["challenge"] == 71_000 and "the packed program 70,000" in good.evidence
    )
    assert found({"program_sha256": sha256}, None).details["packed_code"] < 70_000
    for other in ({"program_sha256": "0" * 64}, {}, {"program_sha256": sha256, "earlier": [{}]}):
        assert found(other, program).verdict == "FAIL", other
