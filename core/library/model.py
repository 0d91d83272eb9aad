"""A trained model as a Python object: it scores text and writes text. `skc.py` shows this to the outside."""

import os
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np

from core.checks import in_words, require
from core.data.tokenizer import Tokenizer
from core.decoding import generate
from core.decoding.settings import Decoding, Draft, Sampler
from core.decoding.text_state import TextState, token_ids
from core.engine.loading import load_engine
from core.engine.protocol import DType, Engine, EngineOptions
from core.library.arguments import check_path, documented
from core.scoring.evaluation import Evaluation, one_document
from core.scoring.score import Score, score
from core.verbs.common import Backend, Subject, open_subject, open_tokenizer, open_twin


class Model:
    """The weights of a run or an artifact on a backend, and the tokenizer that they were trained with."""

    def __init__(self, subject: Subject, tokenizer: Tokenizer, engine: Engine, path: str = "") -> None:
        self.config, self.tokenizer, self.engine, self._path = subject.config, tokenizer, engine, path
        self._twins: dict[str | None, Any] = {}
        self._what = f"{subject.what} on {engine.backend}, {engine.device}, {engine.dtype}"

    def __repr__(self) -> str:
        return f"<skc.Model: {self._what}>"

    def score(self, text: str) -> Score:
        """Return what `text` costs as one document, in windows as the run's eval settings say and without plug-ins.

        `bpb` is in bits per byte, `nats` the sum over all tokens. ConfigError for what is no text, or an empty one.
        """
        _check_text("text", text)
        split = one_document(self.tokenizer, text)
        require(len(split) > 1, "text: has no tokens; expected at least one letter")
        return score(self.engine, Evaluation.of(split, self.config))

    def sample(
        self,
        prompt: str = "",
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = 40,
        seed: int = 0,
        *,
        top_p: float = 1.0,
        sampler: Sampler = "coupled",
        draft: Draft = "none",
        block: int = 8,
        twin: str | None = None,
    ) -> str:
        """Return `prompt` and what the model writes after it, at most `tokens` tokens. ConfigError.

        `draft` changes how long that takes and not what is written; see docs/decoding.md. `twin`: the file of the twin
        that drafts, if it is not twin.safetensors beside the artifact.
        """
        more = self.generate(
            prompt, tokens, temperature, top_k, seed, top_p=top_p, sampler=sampler, draft=draft, block=block, twin=twin
        )
        return prompt + "".join(more)

    def generate(
        self,
        prompt: str = "",
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = 40,
        seed: int = 0,
        *,
        top_p: float = 1.0,
        sampler: Sampler = "coupled",
        draft: Draft = "none",
        block: int = 8,
        twin: str | None = None,
    ) -> Iterator[str]:
        """Return an iterator over what `sample` writes after `prompt`, piece by piece as it comes; the same errors.

        A piece is one letter or more. Who takes no more pieces stops the model.
        """
        _check_text("prompt", prompt)
        _check_number("tokens", tokens, Integral)
        _check_number("temperature", temperature, Real)
        _check_number("seed", seed, Integral)
        _check_number("top_p", top_p, Real)
        _check_number("block", block, Integral)
        if top_k is not None:
            _check_number("top_k", top_k, Integral)
        limit = generate.context_limit(self.config)
        candidates = None if top_k is None else int(top_k)
        how = Decoding(int(tokens), float(temperature), candidates, float(top_p), int(seed), sampler, draft, int(block))
        how.check()
        require(twin is None or draft == "twin", f"twin={in_words(twin)}: drafts only with draft=twin")
        if draft == "twin" and twin not in self._twins:
            self._twins[twin] = open_twin(self.engine, self._path, twin, self.config)
        drafter = self._twins[twin] if draft == "twin" else None
        return generate.streamed(self.engine, generate.Text(self.tokenizer, prompt), how, limit, twin=drafter)

    def logits(self, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the logits of what follows each token, (tokens, vocab) float32. ConfigError.

        Of a text the tokens are BOS and its own, so that row 0 says how the text may begin; ids are taken as they are.
        """
        return np.asarray(self.engine.logits(self._ids(text)[None])[0], np.float32)

    def state(self, text: str | Sequence[int] | np.ndarray = "") -> TextState:
        """Return the state behind a text, or behind ids, as `logits` takes them. ConfigError."""
        return TextState(self.engine, self.config.model.vocab, self._ids(text))

    def _ids(self, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the tokens of a text, BOS first, or ids as (tokens,) int32; ConfigError."""
        if isinstance(text, str):
            _check_text("text", text)
            return np.append(self.tokenizer.bos, self.tokenizer.encode(text)).astype(np.int32)
        expected = "expected text, or token ids"
        require(
            isinstance(text, Sequence | np.ndarray) and not isinstance(text, bytes), f"{in_words(text)}: {expected}"
        )
        return token_ids("ids", text, self.config.model.vocab)


@documented()
def load(
    path: str | os.PathLike[str],
    *,
    data: str | None = None,
    step: int | None = None,
    backend: Backend = "auto",
    dtype: DType | None = None,
) -> Model:
    """Return the model of a run folder (its last checkpoint, or the one kept of `step`) or of an artifact.

    `data`: the prepared folder that a bare artifact's tokenizer is in, where it does not lie beside the artifact.
    RunError, ArtifactError, DataError or ConfigError say what cannot be loaded.
    """
    check_path("path", path, "a run folder or an artifact")
    require(data is None or isinstance(data, str), f"data={in_words(data)}: expected the name of a prepared folder")
    types = get_args(DType)
    require(dtype is None or dtype in types, f"dtype={in_words(dtype)}: expected one of {', '.join(types)}")
    name = os.fspath(path)
    subject = open_subject(name, data, step)
    tokenizer = open_tokenizer(subject, name, data)
    engine = load_engine(backend, subject.config, subject.weights, EngineOptions(dtype=dtype), subject.quantise)
    return Model(subject, tokenizer, engine, name)


def _check_number(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless an argument is a number of a kind, Python's or numpy's."""
    expected = "a whole number" if kind is Integral else "a number"
    require(isinstance(value, kind) and not isinstance(value, bool), f"{name}={in_words(value)}: expected {expected}")


def _check_text(name: str, text: Any) -> None:
    require(isinstance(text, str), f"{name}={in_words(text)}: expected text, got {type(text).__name__}")
    require(not any("\ud800" <= letter <= "\udfff" for letter in text), f"{name}: is not valid Unicode")
