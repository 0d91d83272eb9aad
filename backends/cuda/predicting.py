"""Predictions that were changed after the model: temperature and tilts, normalised over the whole vocabulary.

Reads as a translation of backends/mlx/predicting.py.
Letters: B rows, T positions, V vocabulary, M candidates, S sample.
"""

from typing import Any

import numpy as np
import torch

from backends.cuda import ops
from core.engine.protocol import State
from core.scoring.predictions import Prediction


def costs(logits_BTV, targets_BT, prediction: Prediction, exact):
    """Return -log p(target) (B, T) of the changed prediction, and the moments of its sample, (2,) or None.

    `logits_BTV`: the final ones, float32 or wider. What a prediction leaves as it is takes no launch.
    """
    changed_BTV, mix = _changed(logits_BTV, prediction, exact)
    nats_BT, _ = ops.cross_entropy(changed_BTV, targets_BT, exact)
    if mix is not None:
        ids_BTM, weights_BTM = mix
        given_BT = torch.sum(torch.where(ids_BTM == targets_BT[..., None], weights_BTM, 0.0), -1)
        nats_BT = -_mixed(-nats_BT, given_BT, torch.sum(weights_BTM, -1), exact)
    return nats_BT, _moments(logits_BTV, targets_BT, prediction, exact)


def logprobs(logits_BTV, prediction: Prediction, exact):
    """Return the log-probabilities of the changed prediction, (B, T, V)."""
    changed_BTV, mix = _changed(logits_BTV, prediction, exact)
    logprobs_BTV = changed_BTV - ops.logsumexp(changed_BTV, exact)[..., None]
    if mix is None:
        return logprobs_BTV
    ids_BTM, weights_BTM = mix
    given_BTV = _scattered(torch.zeros_like(logprobs_BTV), ids_BTM, weights_BTM)
    return _mixed(logprobs_BTV, given_BTV, torch.sum(weights_BTM, -1, keepdim=True), exact)


def _changed(logits_BTV, prediction, exact):
    """Return the logits that are normalised, and the candidates that are mixed with that distribution, or None."""
    changed_BTV = logits_BTV if prediction.inverse == 1 else logits_BTV * prediction.inverse
    tilt = prediction.tilt
    if tilt is None:
        return changed_BTV, None
    device, dtype = logits_BTV.device, logits_BTV.dtype
    ids_BTM = torch.from_numpy(np.ascontiguousarray(tilt.ids, np.int64)).to(device)
    weights_BTM = torch.from_numpy(np.ascontiguousarray(tilt.weights)).to(device, dtype)
    weights_BTM = torch.where(ids_BTM < 0, 0.0, weights_BTM)
    if tilt.kind == "mix":
        return changed_BTV, (ids_BTM, weights_BTM)
    if tilt.above is not None:
        unsure_BT = _entropy(changed_BTV, exact) > tilt.above
        weights_BTM = torch.where(unsure_BT[..., None], weights_BTM, 0.0)
    return _scattered(changed_BTV, ids_BTM, weights_BTM), None


def _scattered(x_BTV, ids_BTM, weights_BTM):
    """Return x with each candidate's weight added; a place without one adds nothing to token 0."""
    return torch.scatter_add(x_BTV, -1, torch.clamp(ids_BTM, min=0), weights_BTM)


def _mixed(logprobs, given, share, exact):
    """Return log((1 - share) p + given); what was given nothing stays finite where p itself would be 0."""
    rest = torch.clamp(1 - share, min=0)  # rounding
    return torch.where(given > 0, torch.log(rest * ops.exp(logprobs, exact) + given), logprobs + torch.log(rest))


def _entropy(logits_BTV, exact):
    """Return the entropy in nats, (B, T)."""
    p_BTV = ops.softmax(logits_BTV, exact)
    return ops.logsumexp(logits_BTV, exact) - torch.sum(p_BTV * logits_BTV, -1)


def _moments(logits_BTV, targets_BT, prediction, exact):
    """Return the sums of curvature x b - slope and of curvature, at b = 1 / temperature, over the sample; or None.

    The cost logsumexp(b z) - b z[target] is convex in b: its slope is the expected z less the target's, its curvature
    the variance of z.
    """
    if prediction.sample is None:
        return None
    sample_S = torch.from_numpy(prediction.sample).to(logits_BTV.device)
    z_SV = logits_BTV.reshape(-1, logits_BTV.shape[-1])[sample_S]
    z_SV = z_SV - torch.amax(z_SV, -1, keepdim=True)  # neither moment knows, and small numbers round less
    p_SV = ops.softmax(z_SV * prediction.inverse, exact)
    mean_S = torch.sum(p_SV * z_SV, -1)
    curvature_S = torch.sum(p_SV * torch.square(z_SV - mean_S[:, None]), -1)
    of_target_S = torch.gather(z_SV, -1, targets_BT.reshape(-1)[sample_S][:, None].long())[:, 0]
    slope_S = mean_S - of_target_S
    return torch.stack([torch.sum(curvature_S * prediction.inverse - slope_S), torch.sum(curvature_S)])


class PredictedTape:
    """See core.engine.protocol.PredictedTape."""

    def __init__(self, before, tokens, model, logits, targets, prediction, exact):
        self.before, self.tokens, self.model = before, tokens, model
        self._logits, self._prediction, self._exact = logits, prediction, exact
        self._nats, self._moments = costs(logits, targets, prediction, exact)

    def nll(self) -> np.ndarray:
        return self._nats.cpu().numpy()

    def moments(self) -> np.ndarray | None:
        return None if self._moments is None else self._moments.cpu().numpy().astype(np.float64)

    def logprobs(self) -> np.ndarray:
        return logprobs(self._logits, self._prediction, self._exact).cpu().numpy()


class Predicting:
    """The part of core.engine.protocol.Engine that scores changed predictions."""

    _read: Any
    _forward: Any
    _scored: Any
    _constants: Any
    _move: Any
    _exact: bool

    @torch.no_grad()
    def predicted(self, tokens: np.ndarray, targets: np.ndarray, prediction: Prediction, state: State | None = None):
        if state is None:
            logits, model = self._read(tokens)
        else:
            constants = self._constants(tokens.shape[1], state.position)
            logits, model = self._forward(self._scored(), self._move(tokens), constants, state=state.model)
        return PredictedTape(state, tokens, model, logits, self._move(targets), prediction, self._exact)
