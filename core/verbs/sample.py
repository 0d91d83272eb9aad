"""Verb `skc sample PATH`: a run or an artifact writes text."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from tyro.conf import Positional

from core.config import require
from core.console import Console
from core.decoding.generate import Text, context_limit, read_as, write
from core.decoding.settings import Decoding, Draft, Sampler
from core.decoding.statistics import DraftStatistics
from core.engine.loading import load_engine
from core.verbs.common import Backend, Context, Outcome, open_subject, open_tokenizer, open_twin
from core.verbs.conversation import Conversation

MOST = 10_000
"""Samples of a prompt."""


@dataclass(frozen=True)
class Sample:
    """Options of `skc sample`."""

    path: Positional[str]
    """Run folder or artifact."""
    prompt: tuple[str, ...] = ("",)
    """Texts to go on from, one or more; empty: the start of a document."""
    interactive: bool = False
    """Write together: a line that is typed goes into the text, which the model goes on with; /help says the rest."""
    n: int = 1
    """Samples of each prompt."""
    tokens: int = 128
    """Most tokens to write, in each."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int | None = 40
    """Candidates per token; None: all."""
    top_p: float = 1.0
    """Of the candidates the likeliest that have this share of the probability together; 1: all."""
    draft: Draft = "none"
    """Guess the next tokens and let the model check them in one pass, the same text in less time: ngram (what followed
    such words before), jacobi (what the model said behind a wrong guess), twin (what the model's twin says, after skc
    distill); docs/decoding.md."""
    twin: str | None = None
    """The twin's file, for --draft twin; None: twin.safetensors beside the artifact."""
    block: int = 8
    """Tokens of such a pass: the last one and block - 1 guesses."""
    sampler: Sampler = "coupled"
    """How tokens are drawn: coupled and gumbel write the same text whoever drafts, speculative one of the same
    distribution."""
    seed: int = 0
    """Seed of the draws: they follow from it, the sample's number and the place, whatever the other prompts are."""
    data: str | None = None
    """Where a bare artifact's tokenizer is: a prepared folder or sample-case; None: sample."""
    step: int | None = None
    """Step of a checkpoint that train.keep_every kept; None: the last one."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def write_text(options: Sample, context: Context) -> Outcome:
    """Let a model write."""
    require(1 <= options.n <= MOST, f"n={options.n}: expected at least 1, at most {MOST:,}")
    require(options.prompt != (), "--prompt: expected a text; leave it out to begin a document")
    how = Decoding(**{field.name: getattr(options, field.name) for field in fields(Decoding)})
    how.check()
    one = options.n == 1 and len(options.prompt) == 1
    require(one or not options.interactive, "--interactive writes one text: leave out --n, and give one --prompt")
    require(options.twin is None or how.draft == "twin", f"--twin {options.twin}: drafts only with --draft twin")
    subject = open_subject(options.path, options.data, options.step)
    tokenizer = open_tokenizer(subject, options.path, options.data)
    engine = load_engine(options.backend, subject.config, subject.weights, quantise=subject.quantise)
    twin = open_twin(engine, options.path, options.twin, subject.config) if how.draft == "twin" else None
    if options.interactive:
        talk = Conversation(engine, tokenizer, how, context_limit(subject.config), twin, context.say)
        talk.hold(options.prompt[0])
        return Outcome(True, {"path": options.path, "backend": engine.backend, **talk.to_json()})
    reads = {prompt: read_as(tokenizer, prompt) for prompt in options.prompt}
    for prompt, read in reads.items():
        if read != prompt:
            context.say(f"the tokenizer normalises text: the model reads the prompt as {read!r}")
    texts = [Text(tokenizer, prompt, number) for prompt in options.prompt for number in range(options.n)]
    statistics = DraftStatistics()
    grown = write(engine, texts, how, context_limit(subject.config), statistics=statistics, twin=twin)
    _show(texts, grown, context.say)
    context.say(statistics.speed())
    if how.draft != "none":
        context.say(statistics.line(how.draft))
    rows = [{"prompt": text.prompt, "read_as": reads[text.prompt], "text": str(text)} for text in texts]
    result = {"path": options.path, "samples": rows, "backend": engine.backend, "decoding": statistics.to_json()}
    return Outcome(True, result)


def _show(texts: list[Text], grown: Iterator[Text], say: Console) -> None:
    """Print texts in their order while they grow: the first that is not done as it comes, the next when it is."""
    turn, shown = 0, ""
    for text in grown:
        while turn < len(texts) and (text is texts[turn] or texts[turn].done):
            text, now = texts[turn], texts[turn].whole()
            if not shown and len(texts) > 1:
                say(f"{turn + 1} of {len(texts)}, sample {text.number + 1} after {text.prompt!r}:")
            say(now.removeprefix(shown), end="")
            shown = now
            if not text.done:
                break
            say("\n" if turn + 1 < len(texts) else "")
            turn, shown = turn + 1, ""
