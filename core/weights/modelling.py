"""The one modelling file of an exported folder: our model's own code, without the rest of the checkout."""

import ast
import functools
from pathlib import Path

from core import ROOT
from core.files import read_text
from core.model.config import ModelConfig
from core.model.trunk import Stage
from core.weights.flattening import Defined, flat_module

HEAD = '''"""{what}

Written by skc-lab out of its own model code; it imports nothing of that. The settings of the model are in config.json.
"""

'''
CLIENTS = {
    "cuda": ("A language model of skc-lab for Hugging Face transformers.", ("SKCConfig", "SKCForCausalLM")),
    "mlx": ("A language model of skc-lab for mlx-lm.", ("Model", "ModelArgs")),
}
NAMES = {Defined("core.model.table", "Model"): "AnyModel", Defined("core.model.context", "Blocks"): "CapsuleBlocks"}
"""What is called otherwise than in its own module, where a better name than a made one is known."""
ASKED = ("check", "rows", "flops", "state", "values", "tape", "mini")
"""What only a checkout asks of the settings of a part (core.model.table.Part)."""


@functools.cache
def modelling_file(backend: str) -> str:
    """Return the text of a backend's modelling file: the same for every model: who has read one has read all."""
    what, classes = CLIENTS[backend]
    module = f"backends.{backend}.client"
    tree = ast.parse(read_text(Path(ROOT, *module.split(".")).with_suffix(".py")))
    # What the library calls nobody else may: each method is named.
    called = [one.name for kind in tree.body for one in getattr(kind, "body", []) if isinstance(one, ast.FunctionDef)]
    entry = f"from {module} import {', '.join(classes)}\n{', '.join(classes)}, {called!r}\n"
    names = {Defined(module, name): name for name in classes}
    names |= {Defined(f"backends.{backend}.model", "Model"): "Trunk", **NAMES}
    return HEAD.format(what=what) + flat_module(entry, names, _absent(backend))


def _absent(backend: str) -> set[str]:
    """Return the modules and methods that a modelling file leaves out: kernels, and checks of settings."""
    config = ModelConfig()
    parts = [type(part) for part in (*config.parts.values(), config.part(Stage("layer", "blocks.0")))]
    kinds = [kind for part in parts for kind in part.__mro__[:-1]]
    left = {f"{kind.__module__}.{kind.__name__}.{method}" for kind in kinds for method in ASKED}
    left |= {f"core.model.config.ModelConfig.{name}" for name in ("__post_init__", "_check_trunk")}
    return left | {f"backends.{backend}.kernels"}
