"""`skc doctor`: what this machine has, one forward on each installed backend, and parity if both are there."""

import importlib
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

import core
from core import presets
from core.check.dtypes import speeds_in_words, step_milliseconds
from core.check.parity import run_parity
from core.console import Console
from core.engine.loading import BACKENDS, EXTRAS, available_backends, load_engine
from core.training.environment import ROOT, versions


def examine(say: Console) -> dict[str, Any]:
    """Look at everything, say it line by line, and return it; `ok` is False if something that is installed fails."""
    packages, installed = versions(), available_backends()
    say(", ".join(f"{name} {version}" for name, version in packages.items()))
    value: dict[str, Any] = {"versions": packages, "paths": _paths(say), "backends": {}}
    compiler = "g++" if shutil.which("g++") else None
    say(f"C++ compiler: {compiler or 'none: compiled steps run eagerly where they need one'}")
    value["compiler"] = compiler
    if "mlx" in installed:  # before anything imports MLX
        value["blas"] = importlib.import_module("backends.mlx.blas").load_fast_blas()
        say(f"BLAS for MLX: {value['blas']}")
    for name in BACKENDS:
        value["backends"][name] = _forward(name, say) if name in installed else {"installed": False}
        if name not in installed:
            say(f"{name}: not installed (pip install -c constraints.txt -e '.[{EXTRAS[name]}]')")
    value["types"], value["parity"] = None, None
    mlx = value["backends"]["mlx"]
    if mlx.get("ok") and mlx["device"].endswith("(GPU)"):  # a CPU has fast products of float32 alone
        try:
            value["types"] = step_milliseconds(gpu=True)
            say(f"mlx: {speeds_in_words(value['types'], mlx['dtype'])}")
        except (RuntimeError, ValueError) as error:
            mlx |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
            say(f"mlx: training FAILED: {mlx['error']}")
    sound = all(value["backends"][name]["ok"] for name in installed)
    if len(installed) == len(BACKENDS) and sound:
        say("parity: both backends on the mini of debug ...")
        parity = run_parity(presets.get("debug").config, steps=3, dtype="float32", mini=True)
        value["parity"] = parity.ok
        say(f"parity: {'yes' if parity.ok else 'NO; see: skc parity debug --mini'}")
    else:
        missing = " and ".join(f"'.[{EXTRAS[name]}]'" for name in BACKENDS if name not in installed)
        why = f"needs both backends: pip install -c constraints.txt -e {missing}" if sound else "a backend fails"
        say(f"parity: not checked ({why})")
    value["ok"] = bool(installed) and sound and value["parity"] is not False and value["paths"]["ok"]
    fine = "everything works" if value["parity"] else f"{' and '.join(installed)} works; parity was not looked at"
    say(fine if value["ok"] else "something is wrong: see above")
    return value


def _paths(say: Console) -> dict[str, Any]:
    """Say where `core` and `mlx` come from: a folder called mlx of ours must not stand in for the real one."""
    ours = Path(core.__file__).resolve()
    spec = importlib.util.find_spec("mlx")
    places = [Path(p).resolve() for p in spec.submodule_search_locations or []] if spec else []
    shadowed = any(place.is_relative_to(ROOT / "backends") for place in places)
    say(f"core: {ours.parent}")
    if places:
        say(f"mlx: {places[0]}{' - OURS, it hides the real one: do not run inside backends/' if shadowed else ''}")
    return {"core": str(ours.parent), "mlx": str(places[0]) if places else None, "ok": not shadowed}


def _forward(name: str, say: Console) -> dict[str, Any]:
    """Run `debug` forward once on a backend; a failure is reported, not raised: the doctor goes on."""
    config = presets.get("debug").config
    start = time.perf_counter()
    try:
        engine = load_engine(name, config)
        logits = engine.logits(np.full((1, config.train.seq), config.model.bos, np.int32))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"{name}: FAILED: {type(error).__name__}: {error}")
        return {"installed": True, "ok": False, "error": f"{type(error).__name__}: {error}"}
    ok = bool(np.isfinite(logits).all()) and logits.shape == (1, config.train.seq, config.model.vocab)
    took = time.perf_counter() - start
    say(
        f"{name}: {engine.device}, {engine.dtype}, forward {'ok' if ok else 'WRONG'} ({took:.1f} s); "
        + "; ".join(engine.notes)
    )
    return {"installed": True, "ok": ok, "device": engine.device, "dtype": engine.dtype, "notes": list(engine.notes)}
