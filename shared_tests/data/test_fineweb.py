"""Published shards: fetched once, checked, taken up again, never mixed; odd ones are refused in a line. Budget: 8 s."""

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.data.fineweb
from core.cli import main
from core.data import published
from core.data.dataset import DataError, open_dataset
from core.data.fineweb import Folder, Hub, fetch_fineweb, notes
from core.files import append_file, locked
from shared_tests.support.published import NAME, SHARDS, TOKENIZER, FakeHub, layout, listing, tokens

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(3)]
ALL = ["tokenizer.model", "fineweb_val_000000.bin", *TRAIN]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch, layout(tmp_path / "hub"))


def refused(message: str, do: Callable[[], Any]) -> None:
    with pytest.raises(DataError, match=message) as caught:
        do()
    assert "\n" not in str(caught.value)


def check_whole(out: str, train: int = 3) -> dict[str, Any]:
    """The folder opens, holds the text of `layout`, and nothing is left beside it."""
    dataset = open_dataset(out)
    np.testing.assert_array_equal(dataset.val.read(0, len(dataset.val)), tokens(0))
    text = np.concatenate([tokens(100 * (i + 1)) for i in range(train)])
    np.testing.assert_array_equal(dataset.train.read(0, len(dataset.train)), text)
    assert {file.name for file in Path(out).iterdir()} == {*ALL[: 2 + train], "manifest.json"}
    assert not list(Path(out).parent.glob(".*")) and not list(Path(out).glob(".*"))
    return dataset.manifest


def test_the_verb(tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "out")
    argv = ["data", "fineweb", "--from", layout(tmp_path / "hub"), "--out", out]
    assert main([*argv, "--train-shards", "2"]) == 0
    text = capsys.readouterr().out
    assert "WARNING: training text: 2 of 3 published shards; the challenge trains on 3" in text
    assert "WARNING: NOT the published validation text: documents 5 (published: 50,000)" in text
    assert main([*argv, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    manifest = check_whole(out)
    assert value["published"] == manifest["published"] and value["published"]["same"] is False
    assert value["made_from"] == manifest["made_from"]
    made = manifest["made_from"]
    assert made["train_shards"] == {"taken": 3, "published": 3}
    assert (made["repo"], made["variant"], made["prefix"]) == ("folder hub", "sp1024", "datasets")
    assert notes(manifest) == ["training text: 3 of 3 published shards"]
    made["val_tokens_listed"] += 1
    assert notes(manifest)[1].startswith("WARNING: the source's manifest says")


def test_the_verb_downloads_where_no_folder_is_given(hub: FakeHub, tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "fineweb", "--repo", "someone/shards", "--out", str(tmp_path / "out"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["made_from"]
    assert (made["repo"], made["revision"]) == ("someone/shards", "a" * 40)
    assert hub.fetched == ALL
    check_whole(str(tmp_path / "out"))


def test_a_local_folder_with_the_manifest_at_its_top(tmp_path: Path) -> None:
    layout(tmp_path / "hub")
    fetch_fineweb(Folder(str(tmp_path / "hub" / "datasets")), str(tmp_path / "out"))
    assert check_whole(str(tmp_path / "out"))["made_from"]["prefix"] == ""


def test_a_folder_grows_and_is_never_cut(hub: FakeHub, tmp_path: Path) -> None:
    out, source = str(tmp_path / "out"), Hub("a/b")
    fetch_fineweb(source, out, train_shards=1)
    assert hub.fetched == ALL[:3]
    before = os.stat(tmp_path / "out" / TRAIN[0])
    assert len(fetch_fineweb(source, out)["splits"]["train"]["files"]) == 3
    assert hub.fetched == ALL
    assert os.stat(tmp_path / "out" / TRAIN[0]).st_ino == before.st_ino
    manifest, stamp = check_whole(out), (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert fetch_fineweb(source, out) == manifest and hub.fetched == ALL
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    refused("out: holds fineweb_train_00000[12].bin, which", lambda: fetch_fineweb(source, out, train_shards=1))
    refused("train_shards=4: a/b has 3", lambda: fetch_fineweb(source, out, train_shards=4))
    assert check_whole(out) == manifest


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def die(file: Path) -> None:
    raise KeyboardInterrupt


def fail(file: Path) -> None:
    raise ConnectionError("the network is gone\n(Request ID: 5)")


MEDDLED: dict[Any, str] = {
    cut: "train_000001.bin: size: ",
    flip: "train_000001.bin: sha256: ",
    fail: "at aaaa.*the network is gone; ",
}


@pytest.mark.parametrize("meddle", [cut, flip, fail, die])
def test_a_broken_download_goes_on(hub: FakeHub, tmp_path: Path, meddle: Callable[[Path], None]) -> None:
    out, hub.meddle = str(tmp_path / "out"), {TRAIN[1]: meddle}
    if meddle is die:
        with pytest.raises(KeyboardInterrupt):
            fetch_fineweb(Hub("a/b"), out)
    else:
        refused(MEDDLED[meddle], lambda: fetch_fineweb(Hub("a/b"), out))
    assert not Path(out, "manifest.json").exists()
    left = Path(out, ".part", "source", SHARDS)
    assert left.is_dir(), "what the library has brought is there for it to go on from"
    assert not (left / TRAIN[1]).exists() or meddle in (fail, die), "the library would take a damaged file for whole"
    hub.meddle = {}
    fetch_fineweb(Hub("a/b"), out)
    check_whole(out)


KILLED = """
import os, signal, sys
from core.data.fineweb import Folder, fetch_fineweb
def at(stage, done, total):
    if stage == "counting train":
        os.kill(os.getpid(), signal.SIGKILL)
fetch_fineweb(Folder(sys.argv[1]), sys.argv[2], progress=at)
"""


def test_a_killed_download_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "hub"), str(out)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    fetch_fineweb(Hub("a/b"), str(out))
    assert hub.fetched == []
    check_whole(str(out))


@pytest.mark.parametrize("nth", [3, 6])
def test_a_kill_while_a_folder_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """At the first shard, at the manifest: the smaller text stays good until then."""
    folder, out, calls, move = layout(tmp_path / "hub"), tmp_path / "out", [], os.replace
    before = fetch_fineweb(Folder(folder), str(out), train_shards=1)

    def killed(*paths: str) -> None:
        calls.append(paths)
        if len(calls) == nth:
            raise KeyboardInterrupt
        move(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        fetch_fineweb(Folder(folder), str(out))
    assert open_dataset(str(out)).manifest == before
    open_dataset(str(out)).train.verify()
    fetch_fineweb(Folder(folder), str(out))
    check_whole(str(out))


def test_a_link_to_a_larger_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    fetch_fineweb(Folder(layout(tmp_path / "hub")), str(tmp_path / "out"))
    check_whole(str(tmp_path / "disk"))
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink])
def test_damage_is_found_and_fetched_again(hub: FakeHub, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    fetch_fineweb(Hub("a/b"), str(out))
    spoil(out / TRAIN[1])
    fetch_fineweb(Hub("a/b"), str(out))
    assert hub.fetched == [*ALL, TRAIN[1]]
    check_whole(str(out))


def test_files_of_two_sources_never_mix(hub: FakeHub, tmp_path: Path) -> None:
    out, top = str(tmp_path / "out"), tmp_path / "hub" / "datasets" / "manifest.json"
    manifest = fetch_fineweb(Hub("a/b"), out, train_shards=2)
    refused("another source .repo: a/b, now c/d", lambda: fetch_fineweb(Hub("c/d"), out))
    hub.commit = "b" * 40
    refused("another source .revision: aaaa.*, now bbbb", lambda: fetch_fineweb(Hub("a/b"), out))
    hub.commit = "a" * 40
    top.write_text(json.dumps(listing() | {"exported": "again"}))
    refused("another source .manifest_sha256: ", lambda: fetch_fineweb(Hub("a/b"), out))
    assert hub.fetched == ALL[:4] and open_dataset(out).manifest == manifest
    Path(out, "manifest.json").unlink()  # as if it had been begun, and the text was another one then
    Path(out, ".part").mkdir()
    layout(tmp_path / "hub", shift=1)
    fetch_fineweb(Hub("a/b"), out)
    assert hub.fetched == [*ALL[:4], *TRAIN]
    train = open_dataset(out).train
    np.testing.assert_array_equal(train.read(0, len(train)), np.concatenate([tokens(100 * i + 1) for i in (1, 2, 3)]))


def changed(*where: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets one value of a manifest."""

    def change(manifest: Any) -> None:
        for key in where[:-1]:
            manifest = manifest[key]
        manifest[where[-1]] = to

    return change


ODD: dict[str, Callable[[dict[str, Any]], None]] = {
    "model_path: '../secret.model', expected a rel": changed("tokenizers", 0, "model_path", to="../secret.model"),
    "model_path: '/etc/passwd', expected a relative": changed("tokenizers", 0, "model_path", to="/etc/passwd"),
    "model_path: 'a//b.model', expected a relative": changed("tokenizers", 0, "model_path", to="a//b.model"),
    r"model_path: 'a.*b', expected a relative": changed("tokenizers", 0, "model_path", to="a\\b"),
    r"model_path: '\*.model', expected a relative": changed("tokenizers", 0, "model_path", to="*.model"),
    "model_path: None, expected a relative path": changed("tokenizers", 0, "model_path", to=None),
    "model_path: 5, expected a relative path": changed("tokenizers", 0, "model_path", to=5),
    "no 'fineweb10B_sp1024'; it has 'fineweb10B_sp512', 'fineweb10B_byte260'; others": lambda m: m["datasets"].pop(0),
    "datasets: {}, expected a list": changed("datasets", to={}),
    r"tokenizers\[0\]: name: 3, expected a text": changed("tokenizers", to=[{"name": 3}]),
    "tokenizer_name: None, expected a text": changed("datasets", 0, "tokenizer_name", to=None),
    "tokenizers: no 'bpe'; it has 'sp_bpe_1024', ": changed("datasets", 0, "tokenizer_name", to="bpe"),
    "sp1024: stats: 7, expected an object": changed("datasets", 0, "stats", to=7),
    "stats: files_train: True, expected": changed("datasets", 0, "stats", "files_train", to=True),
    "stats: files_train: 1000000000000, expected": changed("datasets", 0, "stats", "files_train", to=10**12),
    "stats: files_val: 0, expected": changed("datasets", 0, "stats", "files_val", to=0),
    "fineweb_val_000001.bin and 3 more: the manifest lists it, but": changed("datasets", 0, "stats", "files_val", to=5),
    "bpe.model: the manifest lists it, but": changed("tokenizers", 0, "model_path", to="tokenizers/bpe.model"),
}  # fmt: skip


@pytest.mark.parametrize("message", ODD)
def test_an_odd_manifest_is_refused(hub: FakeHub, tmp_path: Path, message: str) -> None:
    manifest = listing()
    (tmp_path / "secret.model").write_bytes(TOKENIZER.model)
    ODD[message](manifest)
    (tmp_path / "hub" / "datasets" / "manifest.json").write_text(json.dumps(manifest))
    refused(message, lambda: fetch_fineweb(Hub("a/b"), str(tmp_path / "out")))
    assert hub.fetched == [] and {file.name for file in tmp_path.iterdir()} == {"hub", "secret.model"}


def test_other_refusals(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = Hub("a/b"), str(tmp_path / "out")
    top = tmp_path / "hub" / "datasets" / "manifest.json"
    refused("byte260 is listed in the published manifest, but", lambda: fetch_fineweb(source, out, variant="byte260"))
    refused("variant ../x: expected sp1024", lambda: fetch_fineweb(source, out, variant="../x"))
    refused("--prefix: '../hub', expected a relative path", lambda: fetch_fineweb(source, out, prefix="../hub"))
    refused("a/b: elsewhere/manifest.json: not there", lambda: fetch_fineweb(source, out, prefix="elsewhere"))
    refused("train_shards=0: expected at least 1", lambda: fetch_fineweb(source, out, train_shards=0))
    refused("nowhere: no such folder", lambda: Folder(str(tmp_path / "nowhere")))
    for bad in ("{", "[" * 200_000, "\udc80"):
        top.write_bytes(bad.encode(errors="surrogateescape"))
        refused("manifest.json: not (JSON|UTF-8)", lambda: fetch_fineweb(source, out))
    layout(tmp_path / "hub")
    with monkeypatch.context() as patch:
        patch.setattr(core.data.fineweb, "MAX_MANIFEST", 10)
        refused("expected at most 10; this is no manifest", lambda: fetch_fineweb(source, out))
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(core.data.fineweb.shutil, "disk_usage", lambda path: usage)
        refused("bytes to fetch, 1,000,000 free on its disk", lambda: fetch_fineweb(source, out))
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    refused("out: exists and holds no prepared data", lambda: fetch_fineweb(source, out))
    assert hub.fetched == []
    variant = (tmp_path / "hub" / SHARDS).rename(tmp_path / "hub" / SHARDS.replace("1024", "512"))
    new = str(tmp_path / "new")
    refused("the tokenizer of sp512 has other pieces", lambda: fetch_fineweb(source, new, variant="sp512"))
    cut(variant / TRAIN[0])  # its hash is right: it is damaged at the source
    newer = str(tmp_path / "newer")
    refused("train_000000.bin: size: .*damaged", lambda: fetch_fineweb(source, newer, variant="sp512"))
    monkeypatch.setattr(hub, "dataset_info", lambda *_, **__: 1 / 0)
    refused("a/b at main: division by zero", lambda: Hub("a/b"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"needs huggingface_hub, which is not installed; run: pip install .*data", lambda: Hub("a/b"))


def test_data_made_otherwise_is_no_download(tmp_path: Path) -> None:
    folder, out = layout(tmp_path / "hub"), str(tmp_path / "out")
    fetch_fineweb(Folder(folder), out)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for made in (None, {}, {"train_shards": {"taken": 3}}):
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"made_from": made}))
        refused("made_from", lambda: fetch_fineweb(Folder(folder), out))


def test_one_download_at_a_time(tmp_path: Path) -> None:
    folder, part = layout(tmp_path / "hub"), tmp_path / "out" / ".part"
    part.mkdir(parents=True)
    with append_file(part / "lock") as held:
        assert locked(held)
        refused("another process is writing to it", lambda: fetch_fineweb(Folder(folder), str(tmp_path / "out")))
    fetch_fineweb(Folder(folder), str(tmp_path / "out"))
    check_whole(str(tmp_path / "out"))


SOUND = (1024, 50_000, 62_021_846, 151_079_000)


def test_the_published_text_is_known_by_its_constants() -> None:
    assert published.compare_published(*SOUND)["same"] is True
    assert published.line(published.compare_published(*SOUND)).startswith(
        "validation text: documents 50,000, tokens, bytes, 2.4"
    )
    assert published.compare_published(8192, 50_000, 40_541_000, 151_079_000)["same"] is True
    assert published.compare_published(4096, 50_000, 45_515_000, 151_076_000)["same"] is True
    unknown = published.compare_published(512, 50_000, 80_000_000, 151_079_000)
    assert unknown["same"] is None and "no such vocabulary" in published.line(unknown)
    planted = {
        ("documents",): (1024, 49_999, 62_021_846, 151_079_000),
        ("tokens",): (1024, 50_000, 62_021_600, 151_079_000),
        ("tokens", "bytes per"): (1024, 50_000, 63_779_841, 151_079_000),  # the first export of the challenge
        ("bytes", "bytes per"): (1024, 50_000, 62_021_846, 157_319_833),  # byte pieces counted as 3
        ("documents", "tokens", "bytes"): (1024, 10_000, 12_404_370, 30_216_000),
    }
    for wrong, figures in planted.items():
        found = published.compare_published(*figures)
        assert found["same"] is False and len(found["differs"]) == len(wrong), found
        assert all(text.startswith(name) for text, name in zip(found["differs"], wrong, strict=True)), found


def test_published_text_is_announced(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same small text, with constants that fit it."""
    folder, out = layout(tmp_path / "hub"), str(tmp_path / "out")
    found = fetch_fineweb(Folder(folder), str(tmp_path / "measured"))["splits"]["val"]
    monkeypatch.setattr(published, "DOCUMENTS", found["documents"])
    monkeypatch.setattr(published, "BYTES", (found["table_bytes"],) * 2)
    monkeypatch.setattr(published, "TARGETS", {(1024, "none"): (found["tokens"] - 1,)})
    monkeypatch.setattr(published, "BYTES_PER_TOKEN", {(1024, "none"): (found["table_bytes"] / (found["tokens"] - 1),)})
    assert main(["data", "fineweb", "--from", folder, "--out", out]) == 0
    said = capsys.readouterr().out
    assert "validation text: documents 5, tokens, bytes, " in said and "NOT" not in said
    assert check_whole(out)["published"]["same"] is True
    (tmp_path / "out" / "manifest.json").unlink()
    assert main(["data", "adopt", out, "--tokenizer", str(tmp_path / "out" / "tokenizer.model")]) == 0
    assert "validation text: documents 5, tokens, bytes, " in capsys.readouterr().out
    assert open_dataset(out).name == "out" and check_whole(str(tmp_path / "measured"))["name"] == NAME
