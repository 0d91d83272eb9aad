"""What a program of given settings never does: the definitions that it leaves out, and what attributes then hold."""

import ast
from pathlib import Path
from typing import Any

from core import ROOT
from core.config import RunConfig
from core.files import read_text
from core.model.params import count, param_table
from core.model.storage import by_ratios
from core.scoring.score import adaptation_in_words
from core.training.run import config_digest

NEVER = (
    "core.model.upgrade", "core.presets", "core.verbs", "core.engine.joining.watched",
    "core.engine.protocol.Engine", "core.scoring.journal.Journal", "core.scoring.key", "core.config._upgrade",
    "core.training.moments",
    *(f"core.scoring.ledger.Ledger.{name}" for name in ("open", "_continued", "read")),
    *(f"core.data.dataset.Split.{name}" for name in ("documents", "document_bytes", "verify", "start_verify")),
    *(f"core.scoring.snapshots.Snapshots.{name}" for name in ("read", "write", "_read", "remove")),
    *(f"core.scoring.adapt.session.Adaptation.{name}" for name in ("_copy", "_everyones_a", "_finished")),
    "core.scoring.session.Session._copy", "core.scoring.session.Session._take_targets",
    "core.model.deviations.Deviations.check",
    *(f"core.scoring.adapt.weights.LooseWeights.{name}" for name in ("state", "load")),
    "core.data.column.Column.verify", "core.data.tokenizer.Tokenizer.load", "core.data.tokenizer.Tokenizer.of",
)  # fmt: skip
"""Of any program: modules, definitions (module.name) and methods (module.class.name). It keeps no ledger's file."""
UNASKED = ("check", "flops", "tape", "state", "mini")
"""What only a checkout asks of the settings of a part (core.model.table.Part)."""
UNUSED = ("rows", "values")
"""What is asked of parts that the model has."""
DECODING = ("start", "chunk", "commit", "forget")
LEARNING = ("train", "reset", "state", "load", "_keep", "_forget", "_load")
"""What only plug-ins ask of core.scoring.plugins.Learner."""
ALWAYS = ("layer", "embedding", "head")
"""Parts that every model has, beside those of its stages."""


def absent(config: RunConfig, backend: str) -> set[str]:
    """Return the modules, definitions and methods that a program of `config` never calls."""
    model, evaluation, engine = config.model, config.eval, f"backends.{backend}"
    used = used_parts(config)
    left = {*NEVER, f"{engine}.descent.Descent.loosened", f"{engine}.descent.Descent.load_loosened"}
    left.add(f"{engine}.engine.Engine.twin")
    left |= {*(f"{engine}.parts.{name}" for name in _with_imports(engine, used)[1])}
    for name, part in {**model.parts, "layer": model.part(model.stages(True)[0])}.items():
        kind = type(part)
        methods = UNASKED if name in used or name == "layer" else (*UNASKED, *UNUSED)
        left |= {f"{kind.__module__}.{kind.__name__}.{method}" for method in methods}
    if not model.stores:
        left |= {f"core.model.capsules.Store.{method}" for method in ("rows", "state")}
    if config.train.sample_every is None and config.export.calibration != "self":
        left |= {"core.decoding", "core.data.tokenizer.Tokenizer.decode", "core.data.byte_table.checked_ids"}
        left |= {f"core.data.transform.{name}_transform" for name in ("apply", "invert")}
        if evaluation.windows != "stateful":
            left |= {"core.scoring.stateful", f"{engine}.tape"}
            left |= {f"{engine}.engine.Engine.{name}" for name in DECODING}
            left |= {f"{engine}.model.Model.{name}" for name in DECODING}
            left |= _methods(engine, used, "commit")  # `start` gives what training begins with, too
    if config.export.calibration != "random":
        left.add("core.export.calibration.uniform_rows")
    if config.export.method != "gptq":
        left |= {"core.export.gptq", "backends.cuda.gptq", f"{engine}.engine.Engine.second_moments"}
    if not config.export.fit:
        left.add("core.export.fit")
    if not evaluation.plugins:
        left |= {"core.scoring.counts", "core.scoring.predictions.Temperature", "core.scoring.predictions.Tilt.check"}
        left |= {"core.scoring.choices", "core.scoring.plugins.load_plugins", f"{engine}.predicting.costs"}
        left |= {f"core.scoring.plugins.Learner.{name}" for name in LEARNING}
    if evaluation.adapt.kind != "lora":
        left |= {"core.scoring.adapt.session", f"{engine}.adapting"}
    if evaluation.adapt.kind != "sgd":
        left.add("core.scoring.adapt.stream")
        if not evaluation.phases.at:
            left |= {"core.scoring.adapt.phases.learn_phase", "core.scoring.adapt.weights.LooseWeights"}
    if not evaluation.learns:
        left |= {"core.scoring.ledger.Ledger.confirm", "core.scoring.adapt", f"{engine}.predicting"}
    return left


def known_values(config: RunConfig, backend: str) -> dict[str, dict[str, Any]]:
    """Return module -> attribute, variable or call() -> what that always is in a program of `config`.

    Its shards have no manifest; it shows no line that moves, and goes on from nothing.
    """
    engine, given = f"backends.{backend}", dict[str, dict[str, Any]]()
    scoring: dict[str, Any] = {"_watch": None, "watched": False, "due": False, "_restored()": 0, "_copy()": None}
    scoring |= {"_alike": False, "agree()": False, "_take_targets()": None, "_share_ledger()": None, "remove()": None}
    if not config.eval.plugins:
        scoring |= {"plugins": (), "predictors": (), "_strangers": (), "_predictors": ()}
        given |= {f"{engine}.adapting": {"prediction": None}, "core.scoring.plugins": {"_before": None}}
    if config.eval.windows != "stateful":
        scoring["carries"] = False
        given["core.scoring.score"] = {"carries": False, "skip()": False}
    for name in ("session", "adapt.session", "adapt.stream"):
        given[f"core.scoring.{name}"] = scoring
    given |= {
        "core.data.column": {"_verified": True},
        "core.data.dataset": {"sidecar": None, "_lengths": None, "unknown_tokens": None},
        "core.scoring.accounting": {"document_bytes": None, "unknown_tokens": None},
        "core.scoring.ledger": {"_journal": None, "journal": None},
        "core.scoring.snapshots": {"path": None},
        "core.training.finish": {"ledger": None, "plain": None, "Tally()": "", "describe()": ""},
        "core.training.loop": {
            "StepLine()": None, "line()": None, "_line()": "", "_warn()": None, "start_verify()": None,
            "training_bytes()": None, "_bytes": None, "show": None, "save()": None,
        },
    }  # fmt: skip
    given.setdefault("core.scoring.score", {})["verify()"] = None
    given["core.scoring.score"]["adaptation_in_words()"] = adaptation_in_words(config.eval)
    for name in ("logs", "program"):
        given[f"core.submission.{name}"] = {"config_digest()": config_digest(config), "count()": count(config.model)}
    for name in ("model", "parts.layer", "parts.delta", "parts.koopman", "parts.value_embed"):  # no twin's pass
        given[f"{engine}.{name}"] = {"draft": None}
    for name in ("engine.protocol", "model.adapters", "model.scopes", "plain"):  # words of errors that have none
        given[f"core.{name}"] = {"closest()": None}
    if not config.eval.plugins:
        given["core.scoring.score"] |= {"check_plugins()": None, "plugins": ()}
    if config.train.sample_every is None:
        given["core.training.loop"]["write"] = False
    if config.train.eval_every is None:
        given["core.training.loop"] |= {"evaluate": False, "_estimate()": None}
        if config.eval.documents is None:
            given["core.scoring.score"]["ratio_error()"] = None
    if backend == "cuda":
        dead = [] if config.train.rate else ["_priced"]
        dead += [] if config.train.quantise_soft or config.train.ternary_noise else ["softened_all", "noised_all"]
        for name in ("engine", "masters", "update"):
            given[f"{engine}.{name}"] = dict.fromkeys(dead)
        if config.train.snapshot_every is None:
            given[f"{engine}.engine"]["snapshot"] = False
    if not any(by_ratios(row.storage) for row in param_table(config.model).values()):
        for place in (f"{engine}.storage", "core.model.storage", "core.export.symbols", "core.export.budget"):
            given.setdefault(place, {})["by_ratios()"] = False
    return given


def _methods(engine: str, used: set[str], name: str) -> set[str]:
    """Return a method of a name as module.class.name, of every class of a backend's parts that has one."""
    found = set()
    for part in _with_imports(engine, used)[0]:
        path = Path(ROOT, *engine.split("."), "parts", f"{part}.py")
        for node in ast.parse(read_text(path)).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef) and name in {getattr(one, "name", "") for one in node.body}:
                found.add(f"{engine}.parts.{part}.{node.name}.{name}")
    return found


def used_parts(config: RunConfig) -> set[str]:
    """Return the parts of a model: the names of their files in core/model and in a backend."""
    model: Any = config.model
    mixers = {kind.mixer(model) for kind in {model.part(s) for s in model.stages(True) if s.part == "layer"}}
    mlps = {kind.mlp(model) for kind in {model.part(s) for s in model.stages(True) if s.part == "layer"}}
    names = {name for name, part in model.parts.items() if any(part is one for one in mixers | mlps)}
    return names | {stage.part for stage in model.stages(True) if stage.part != "layer"} | set(ALWAYS)


def _with_imports(engine: str, used: set[str]) -> tuple[set[str], set[str]]:
    """Return the files of a backend's parts that `used` ones need, and all others; a layer imports every kind."""
    folder = Path(ROOT, *engine.split("."), "parts")
    files = {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}
    waiting, found = [*used & set(files)], {"layer"}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(read_text(files[name]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{engine}.parts."):
                waiting.append(str(node.module).rpartition(".")[2])
    return found, set(files) - found
