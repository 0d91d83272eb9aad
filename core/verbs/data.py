"""Verbs that make data folders: data sample, data prepare, data adopt, data fineweb."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from core.data import fineweb, published
from core.data.adopt import adopt_shards
from core.data.bundled import SAMPLES, prepare_sample, sample_folder
from core.data.corpus import Format
from core.data.prepare import Progress as StageProgress
from core.data.prepare import prepare
from core.data.tokenizer import Tokenizer
from core.data.transform import Transform
from core.scoring.accounting import byte_note
from core.verbs.common import Context, Outcome


@dataclass(frozen=True)
class BundledSample:
    """Options of `skc data sample`."""

    transform: Literal["none", "case"] = "none"
    """none: the data `sample`; case: the data `sample-case`, in lower case with markers of capitals."""
    out: str | None = None
    """Folder to write; None: that in the user's cache folder which `data.path = sample` (`sample-case`) reads."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


@dataclass(frozen=True)
class Prepare:
    """Options of `skc data prepare`."""

    inputs: Positional[tuple[str, ...]]
    """Files, folders or patterns: .txt or .jsonl (an object a line), each also .gz, .xz or .zst; .parquet."""
    out: str
    """Folder to write."""
    val: tuple[str, ...] = ()
    """Files that become the validation split; none: a share of the inputs does."""
    val_share: float = 0.05
    """Share of the documents that becomes validation where no --val is given; of a single text, its end."""
    column: str | None = None
    """Key of a JSON line, or column of a parquet file, with the text; None: text, content or raw_content."""
    split: Literal["files", "blank-lines"] = "files"
    """What separates documents of a .txt: files and form feeds, or blank lines too."""
    tokenizer: str | None = None
    """A SentencePiece .model, a tokenizer.json, or bytes (256 tokens of one byte, and one between documents); None:
    train one."""
    vocab: int | None = None
    """Pieces of the tokenizer that is trained; None: 1024, or as many as a small text allows."""
    transform: Transform = "none"
    """case: lower case with markers of capitals, which is undone exactly; caseops: the same as published shards."""
    shard_tokens: int = 100_000_000
    """Tokens of one shard."""
    name: str | None = None
    """Name of the data in reports; None: the folder's name."""
    threads: int | None = None
    """Threads that tokenise; None: all cores."""
    overwrite: bool = False
    """Replace a folder that holds data made from other inputs."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


@dataclass(frozen=True)
class Adopt:
    """Options of `skc data adopt`."""

    folder: Positional[str]
    """Folder with official shards: *_train_*.bin and *_val_*.bin."""
    tokenizer: str
    """The SentencePiece .model, or the tokenizer.json, that they were made with."""
    transform: Transform = "none"
    """What was done to their text: none, or caseops for shards of lower-case text with markers of capitals."""
    name: str | None = None
    """Name of the data in reports; None: the folder's name."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


@dataclass(frozen=True)
class Fineweb:
    """Options of `skc data fineweb`."""

    variant: str = "sp1024"
    """Tokenizer of the shards: sp1024, sp4096 or sp8192; the default repository may have sp1024 only."""
    out: str | None = None
    """Folder to write, or to add shards to; None: data/fineweb10B_VARIANT."""
    train_shards: int | None = None
    """Training shards to take, from the first on (200 MB each); None: the challenge's 80, or all if there are fewer."""
    repo: str = fineweb.REPO
    """Dataset repository of the Hugging Face hub; kevclark/parameter-golf has sp4096 and sp8192."""
    revision: str = "main"
    """Branch, tag or commit of the repository."""
    prefix: str | None = None
    """Folder in the source that holds manifest.json; None: datasets (a local folder's top, if it lies there)."""
    source: Annotated[str | None, arg(name="from", metavar="FOLDER")] = None
    """A folder on this machine with the same layout; then nothing is downloaded."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def prepare_bundled(options: BundledSample, context: Context) -> Outcome:
    """Prepare the bundled text."""
    name = next(name for name, transform in SAMPLES.items() if transform == options.transform)
    out = options.out or sample_folder(name)
    return _told(prepare_sample(out, progress=_stages(context), name=name), out, context)


def prepare_text(options: Prepare, context: Context) -> Outcome:
    """Tokenise text files."""
    manifest = prepare(
        options.inputs,
        options.out,
        val=options.val or None,
        val_share=options.val_share,
        tokenizer=options.tokenizer,
        vocab=options.vocab,
        transform=options.transform,
        shard_tokens=options.shard_tokens,
        name=options.name,
        threads=options.threads,
        overwrite=options.overwrite,
        form=Format(options.column, options.split),
        progress=_stages(context),
    )
    return _told(manifest, options.out, context)


def adopt(options: Adopt, context: Context) -> Outcome:
    """Write the manifest that downloaded shards lack."""
    manifest = adopt_shards(
        options.folder, options.tokenizer, transform=options.transform, name=options.name, progress=_stages(context)
    )
    return _told(manifest, options.folder, context)


def fetch(options: Fineweb, context: Context) -> Outcome:
    """Download published shards."""
    source = fineweb.Hub(options.repo, options.revision) if options.source is None else fineweb.Folder(options.source)
    out = options.out or f"data/fineweb10B_{options.variant}"
    manifest = fineweb.fetch_fineweb(
        source,
        out,
        variant=options.variant,
        prefix=options.prefix,
        train_shards=options.train_shards,
        progress=_stages(context),
    )
    outcome = _told(manifest, out, context)
    for note in fineweb.notes(manifest):
        context.say(note)
    return Outcome(True, outcome.value | {"made_from": manifest["made_from"]})


def _stages(context: Context) -> StageProgress:
    """Show one progress line per stage."""
    shown = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            context.say(f"{stage} ...")
            shown[stage] = context.say.progress(stage)
        shown[stage](done, total)

    return report


def _told(manifest: dict, out: str, context: Context) -> Outcome:
    """Say what the folder holds."""
    splits = {}
    for name, split in manifest["splits"].items():
        keys = ("documents", "tokens", "raw_bytes", "table_bytes", "unknown_tokens")
        splits[name] = {key: split.get(key) for key in keys}
        rate = f", {split['bytes_per_token']:.4f} bytes per token" if split.get("bytes_per_token") else ""
        context.say(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens{rate}")
    tokenizer = Tokenizer.load(os.path.join(out, manifest["tokenizer"]["file"]))
    note = byte_note(tokenizer, manifest["splits"]["val"])
    notes = [*(manifest.get("notes") or []), *([note] if note else [])]
    for note in notes:
        context.say(note)
    context.say(f"wrote {out}")
    value = {"path": out, "name": manifest["name"], "tokenizer": manifest["tokenizer"], "splits": splits}
    value |= {"notes": notes, "transform": manifest.get("transform") or "none"}
    if manifest.get("published"):
        context.say(published.line(manifest["published"]))
        value["published"] = manifest["published"]
    return Outcome(True, value)
