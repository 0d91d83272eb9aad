"""Verb `skc pack PRESET`: one self-contained program that trains, exports and scores, and how many bytes it has."""

import dataclasses
import hashlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from core.config import ConfigError, RunConfig
from core.data.bundled import SAMPLES, open_data
from core.engine.loading import check_dtype
from core.engine.protocol import DType, EngineOptions
from core.export.artifact import check_limits
from core.files import replace_file
from core.scoring.plugins import foreign
from core.verbs.common import Context, Outcome, PresetOptions, fit_tokens, with_text
from core.verbs.train import asks_for_rows, check_budget

TARGETS = {"text": 75_000, "zip": 60_000}
"""Bytes of a program, by its form, that the packer is held to."""


@dataclass(frozen=True)
class Pack(PresetOptions):
    """Options of `skc pack`."""

    out: str = "train_gpt.py"
    """The file that is written: python runs it, alone or by torchrun (docs/submission.md)."""
    pack: Literal["text", "zip"] = "text"
    """text: compressed source in a line; zip: a fifth fewer bytes, and no text any more."""
    backend: Literal["cuda", "mlx"] = "cuda"
    """cuda: PyTorch, on GPUs or a CPU; mlx: for Macs."""
    dtype: DType | None = None
    """Compute type; None: as `skc train` chooses it where the program runs."""


def pack_preset(options: Pack, context: Context) -> Outcome:
    """Write the program of a preset and say how many bytes it has."""
    config = options.config()
    check_dtype(options.backend, options.dtype)
    check_packable(config)
    if config.data.path not in SAMPLES:
        config = with_text(config, context.say)
        config, changes = fit_tokens(config, open_data(config.data.path, train=False), options.given)
        for line in changes:
            context.say(line)
    check_limits(config.model)
    from core.submission.pack import pack_program

    chosen: dict[str, Any] = {"dtype": options.dtype} if options.dtype else {}
    if asks_for_rows(config, options.given) and EngineOptions.micro_tokens is not None:
        chosen["micro_tokens"] = None
    program = pack_program(config, options.backend, options.pack, **chosen)
    size = len(program)
    check_budget(dataclasses.replace(config, export=dataclasses.replace(config.export, code_bytes=size)))
    replace_file(options.out, program)
    sha256 = hashlib.sha256(program).hexdigest()
    aim = TARGETS[options.pack]
    context.say(f"wrote {options.out}: {size:,} bytes, sha256 {sha256}")
    context.say(f"{'within' if size <= aim else 'over'} the {aim:,} bytes that a program as {options.pack} should have")
    value = {"path": options.out, "bytes": size, "sha256": sha256, "form": options.pack, "backend": options.backend}
    return Outcome(True, {**value, "within": size <= aim})


def check_packable(config: RunConfig) -> None:
    """Raise ConfigError for settings that a program of our code alone cannot have, or without the packer's package."""
    if strangers := foreign(config.eval.plugins):
        raise ConfigError(f"eval.plugins={', '.join(strangers)}: a packed program holds our code alone; leave them out")
    if importlib.util.find_spec("python_minifier") is None:
        raise ConfigError("python-minifier is not installed: pip install -c constraints.txt -e '.[submit]'")
