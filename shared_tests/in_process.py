"""Audits whose evaluation runs in this process: quick, and blind for what a process of its own is there to see."""

import importlib
import traceback
from pathlib import Path
from typing import Any

import pytest

from core.audit import auditor
from core.audit.isolation import Isolated


def run_here(function: str, arguments: dict[str, Any], **_: Any) -> Isolated:
    """Call `function` as core.audit.isolation.run_isolated does, without the isolation."""
    module, _, name = function.partition(":")
    value, error = None, None
    try:
        value = getattr(importlib.import_module(module), name)(**arguments)
    except Exception as raised:
        kind = f"{type(raised).__module__}.{type(raised).__qualname__}"
        error = {"kind": kind, "message": str(raised), "traceback": traceback.format_exc()}
    return Isolated(value, error, 0.1, [], [], [], {}, [], ["any isolation: a test"], 0)


def stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let audits call their evaluations here."""
    monkeypatch.setattr(auditor, "run_isolated", run_here)
