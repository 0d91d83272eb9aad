"""Verb `skc sample PATH`: a run or an artifact writes text."""

import os
from dataclasses import dataclass

from tyro.conf import Positional

from core.data.tokenizer import Tokenizer
from core.engine.protocol import load_engine
from core.training.generate import context_limit, read_as, sample
from core.training.run import Run
from core.verbs.common import (
    Backend,
    Context,
    Outcome,
    Subject,
    check_tokenizer,
    open_named,
    open_subject,
)


@dataclass(frozen=True)
class Sample:
    """Options of `skc sample`."""

    path: Positional[str]
    """Run folder or artifact."""
    prompt: str = ""
    """Text to go on from; empty: the start of a document."""
    tokens: int = 128
    """Most tokens to write."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int | None = 40
    """Candidates per token; None: all."""
    seed: int = 0
    """Seed of the draws."""
    data: str | None = None
    """Where a bare artifact's tokenizer is: a prepared folder; None: sample."""
    step: int | None = None
    """Step of a checkpoint that train.keep_every kept; None: the last one."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def write_text(options: Sample, context: Context) -> Outcome:
    """Let a model write."""
    subject = open_subject(options.path, options.data, options.step)
    if subject.step is not None and options.data is None:
        tokenizer = Tokenizer.load(str(Run.open(options.path).tokenizer_path))
    elif options.data is None and (beside := _tokenizer_beside(options.path, subject)) is not None:
        tokenizer = beside
    else:
        dataset = open_named(options.path, subject.config, options.data)
        check_tokenizer(subject, dataset)
        tokenizer = dataset.tokenizer
    engine = load_engine(options.backend, subject.config, subject.weights, quantise=subject.quantise)
    choices = (options.tokens, options.temperature, options.top_k, options.seed, context_limit(subject.config))
    read = read_as(tokenizer, options.prompt)
    if read != options.prompt:
        context.say(f"the tokenizer normalises text: the model reads the prompt as {read!r}")
    text = sample(engine, tokenizer, options.prompt, *choices)
    context.say(text)
    value = {"path": options.path, "prompt": options.prompt, "read_as": read, "text": text}
    return Outcome(True, {**value, "backend": engine.backend})


def _tokenizer_beside(artifact: str, subject: Subject) -> Tokenizer | None:
    """Return the tokenizer that lies in the folder of an artifact, if there is one and it is the artifact's."""
    path = os.path.join(os.path.dirname(artifact), "tokenizer.model")
    if not os.path.lexists(path):
        return None
    tokenizer = Tokenizer.load(path)
    return tokenizer if tokenizer.sha256 == subject.tokenizer_sha256 else None
