"""Changed predictions in numpy, from whole log-probabilities on the host: what backends/*/predicting.py is held to."""

from typing import Any

import numpy as np

from core.scoring.plugins import log_softmax
from core.scoring.predictions import Prediction


def logprobs(logits: np.ndarray, prediction: Prediction) -> np.ndarray:
    """Return the log-probabilities of a changed prediction, candidate by candidate, in float64."""
    out = log_softmax(prediction.inverse * log_softmax(logits.astype(np.float64)))
    tilt = prediction.tilt
    if tilt is None:
        return out
    for row, column in np.ndindex(out.shape[:2]):
        pairs = [(i, w) for i, w in zip(tilt.ids[row, column], tilt.weights[row, column], strict=True) if i >= 0]
        p, entropy = np.exp(out[row, column]), -(np.exp(out[row, column]) * out[row, column]).sum()
        if tilt.kind == "mix":
            p = p * (1 - sum(weight for _, weight in pairs))
            for token, weight in pairs:
                p[token] += weight
        elif tilt.above is None or entropy > tilt.above:
            for token, weight in pairs:
                p[token] *= np.exp(weight)
            p = p / p.sum()
        with np.errstate(divide="ignore"):  # where candidates leave nothing
            out[row, column] = np.log(p)
    return out


def moments(logits: np.ndarray, targets: np.ndarray, prediction: Prediction) -> np.ndarray:
    """Return curvature x b - slope, and curvature, of the cost in b, summed over the sample: on log-probabilities."""
    assert prediction.sample is not None
    of_sample, b = logits.reshape(-1, logits.shape[-1])[prediction.sample], prediction.inverse
    values = log_softmax(of_sample).astype(np.float64)
    p = np.exp(b * values - np.max(b * values, -1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    finite = np.maximum(values, -1e9)
    mean = (p * finite).sum(-1)
    variance = (p * (finite - mean[:, None]) ** 2).sum(-1)
    slope = mean - finite[np.arange(len(values)), targets.reshape(-1)[prediction.sample]]
    return np.array([(variance * b - slope).sum(), variance.sum()])


class HostTape:
    """A forward pass whose predictions are changed on the host."""

    def __init__(self, logits: np.ndarray, tokens: np.ndarray, targets: np.ndarray, prediction: Prediction) -> None:
        self.tokens = tokens
        self._logits, self._targets, self._prediction = logits, targets, prediction

    def logprobs(self) -> np.ndarray:
        return logprobs(self._logits, self._prediction)

    def nll(self) -> np.ndarray:
        return -np.take_along_axis(self.logprobs(), self._targets[..., None].astype(np.int64), -1)[..., 0]

    def moments(self) -> np.ndarray | None:
        given = self._prediction.sample is not None
        return moments(self._logits, self._targets, self._prediction) if given else None


class HostPredictions:
    """What makes an engine of numpy one that predictors can work with."""

    def predicted(self, tokens: np.ndarray, targets: np.ndarray, prediction: Prediction, state: Any = None) -> HostTape:
        """Score changed predictions."""
        engine: Any = self
        logits = engine.logits(tokens) if state is None else engine.chunk(state, tokens).logits()
        return HostTape(logits, tokens, targets, prediction)
