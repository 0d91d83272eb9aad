"""Verb `skc serve PATH ...`: runs and artifacts behind a local address, for a page and for programs."""

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from tyro.conf import Positional

from core.config import require
from core.console import Console
from core.engine.loading import load_engine
from core.engine.protocol import DType, EngineOptions
from core.serve.limits import Limits, require_libraries
from core.training.run import Run, RunError
from core.verbs.common import Backend, Context, Outcome, open_subject, open_tokenizer, open_twin

if TYPE_CHECKING:  # the extra may not be installed
    from core.serve.models import Served


@dataclass(frozen=True)
class Serve:
    """Options of `skc serve`."""

    paths: Positional[tuple[str, ...]]
    """Run folders and artifacts."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is reached from this machine only."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    allow: tuple[str, ...] = ()
    """Further names under which requests may reach this server: those of this machine, or of a proxy in front of it."""
    body: int = Limits.body
    """Bytes of a request at most, and of a text that is scored."""
    letters: int = Limits.letters
    """Characters of a prompt at most, and of a text whose tokens are shown."""
    tokens: int = Limits.tokens
    """Tokens that a request may ask for at most."""
    seconds: float = Limits.seconds
    """Time of a request at most: text ends where it is then."""
    requests: int = Limits.requests
    """Requests that run at the same time at most: one more is told to come back (429)."""
    data: str | None = None
    """Where a bare artifact's tokenizer is: a prepared folder or sample-case; None: sample."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it (not M1, M2), else float32. float16: MLX only."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def serve_models(options: Serve, context: Context) -> Outcome:
    """Answer requests until Ctrl-C."""
    require_libraries("skc serve")
    from core.serve.api import Api
    from core.serve.openai import Completions
    from core.serve.page_files import page_routes
    from core.serve.run import check_address, listen, serve_routes
    from core.serve.work import Places

    limits = Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})
    limits.check()
    require(bool(options.paths), "expected a run or an artifact: skc serve RUN")
    check_address(options.host, options.port, options.allow)
    stopping, say = threading.Event(), context.say
    names = short_names(options.paths)
    with listen(options.host, options.port) as place, ThreadPoolExecutor(1) as thread:
        models = [open_model(options, path, name, thread, say) for path, name in zip(options.paths, names, strict=True)]
        for model in models:
            say(f"{model.name}: {model.what} on {model.engine.backend}, {model.engine.device}, {model.engine.dtype}")
        places = Places(limits, stopping)
        routes = [*page_routes(), *Api(models, places).routes(), *Completions(models, places).routes()]
        serve_routes(
            routes,
            options.host,
            options.port,
            options.allow,
            lambda url: say(f"{url}  (Ctrl-C ends it)"),
            stopping,
            place,
        )
    say("stopped")
    return Outcome(True, {"models": [model.to_json() for model in models]})


def short_names(paths: tuple[str, ...]) -> list[str]:
    """Return for each path the shortest end of it that no other has; ConfigError for one that is there twice."""
    whole = [PurePath(os.path.abspath(path)).parts for path in paths]
    require(len(set(whole)) == len(whole), f"{', '.join(paths)}: a path stands there twice")

    def tail(parts: tuple[str, ...]) -> str:
        """Return the end of a path."""
        counts = range(1, len(parts) + 1)
        alone = (n for n in counts if sum(other[-n:] == parts[-n:] for other in whole) == 1)
        return "/".join(parts[-next(alone, len(parts)) :])

    return [tail(parts) for parts in whole]


def open_model(options: Serve, path: str, name: str, thread: ThreadPoolExecutor, say: Console) -> "Served":
    """Open a run or an artifact, with an engine in the given thread."""
    from core.serve.models import Served
    from core.serve.shared_engine import SharedDrafter, SharedEngine
    from core.twin.sidecar import SidecarError, beside

    subject = open_subject(path, options.data)
    tokenizer = open_tokenizer(subject, path, options.data)
    choices = EngineOptions(dtype=options.dtype)

    def build(weights, quantise=False):
        return load_engine(options.backend, subject.config, weights, choices, quantise)

    engine = SharedEngine(thread.submit(build, subject.weights, subject.quantise).result(), thread)
    model = Served(name, subject.what.replace(path, name), subject.config, tokenizer, engine)
    model.build = build
    artifact = path if subject.step is None else str(Run.open(path).artifact_path)
    model.bytes = os.path.getsize(artifact) if os.path.isfile(artifact) else None
    if subject.step is not None:
        final = Run.open(path).last("final/score") or {}
        model.score, model.label = final.get("bpb"), final.get("label")
    if os.path.exists(beside(path)):
        try:
            model.twin = SharedDrafter(engine.turn(open_twin, engine.own, path, None, subject.config), engine.turn)
        except (SidecarError, RunError) as error:
            say(f"careful: {name} goes without its twin: {error}")
    return model
