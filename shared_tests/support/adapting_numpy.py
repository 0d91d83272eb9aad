"""An engine in numpy with adapters of its own for each row, gradients by hand: small, exact in float64, and fast.

u = e(x) + s B1 A1 e(x); h_t = u_t + DECAY h_t-1 (0 before BOS); logits = W h + s B2 A2 h. Sites: mix (1), embed (2).
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from core import rng
from core.engine.adapting import AdaptStep
from core.engine.protocol import Scoring, StepResult
from core.engine.ranks import Alone
from core.model.adapters import AdapterSpec
from core.scoring.plugins import log_softmax
from core.scoring.predictions import Prediction

SITES = ("mix", "embed")
DIM, DECAY = 6, 0.7


class FakeAdapters(NamedTuple):
    """Values, mean and mean square by (site, letter): a (rows, rank, in), b (rows, rank, out)."""

    spec: AdapterSpec
    values: dict[tuple[str, str], np.ndarray]
    m: dict[tuple[str, str], np.ndarray]
    v: dict[tuple[str, str], np.ndarray]

    def a(self) -> dict[str, np.ndarray]:
        # As narrow as those of engines, so that nothing takes them for what numpy makes by itself.
        return {site: self.values[site, "a"].astype(np.float32) for site in self.spec.sites}


@dataclasses.dataclass
class FakeTape:
    """A pass: what a gradient and the next state need."""

    engine: "AdaptingEngine"
    adapters: FakeAdapters | None
    tokens: np.ndarray
    targets: np.ndarray
    e: np.ndarray
    h: np.ndarray
    opens: np.ndarray
    logits_: np.ndarray
    before: Any
    prediction: Prediction = Prediction()

    def logits(self) -> np.ndarray:
        return self.logits_

    def logprobs(self) -> np.ndarray:
        """Return the distributions that the prediction makes of the model's."""
        tilt, logprobs = self.prediction.tilt, log_softmax(self.logits_ * self.prediction.inverse)
        if tilt is None:
            return logprobs
        given = np.zeros_like(logprobs)
        row, column, place = np.nonzero(tilt.ids >= 0)
        ids, weights = tilt.ids[row, column, place], tilt.weights[row, column, place]
        np.add.at(given, (row, column, ids), weights)
        if tilt.kind == "boost":
            return log_softmax(logprobs + given)
        return np.log((1 - given.sum(-1, keepdims=True)) * np.exp(logprobs) + given)

    def moments(self) -> np.ndarray | None:
        """Return what the sample says of the temperature."""
        if self.prediction.sample is None:
            return None
        z, b = self.logits_.reshape(-1, self.engine.vocab)[self.prediction.sample], self.prediction.inverse
        p, target = np.exp(log_softmax(b * z)), self.targets.reshape(-1)[self.prediction.sample]
        mean = (p * z).sum(-1, keepdims=True)
        curvature = (p * (z - mean) ** 2).sum()
        slope = (mean[:, 0] - z[np.arange(len(z)), target]).sum()
        return np.array([curvature * b - slope, curvature])

    def nll(self, targets: np.ndarray | None = None) -> np.ndarray:
        given = self.targets if targets is None else targets
        self.engine.done.append("nll")
        return -np.take_along_axis(self.logprobs(), given[..., None].astype(np.int64), -1)[..., 0]

    def gradient(self, shares: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        """Return the gradient of the sum of shares times nats, by hand."""
        assert self.adapters is not None
        (spec, values), grads = self.adapters[:2], {}
        scale, (dz, du) = spec.alpha / spec.rank, self.slopes(shares)
        for site, into, out in (("embed", self.h, dz), ("mix", self.e, du)):
            if site in spec.sites:
                a, b = values[site, "a"], values[site, "b"]
                up, low = np.einsum("bto,bro->btr", out, b), np.einsum("bti,bri->btr", into, a)
                grads[site, "a"] = scale * np.einsum("btr,bti->bri", up, into)
                grads[site, "b"] = scale * np.einsum("btr,bto->bro", low, out)
        return grads

    def slopes(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of logits and of u."""
        p = np.exp(log_softmax(self.logits_))
        given = self.targets[..., None].astype(np.int64)
        np.put_along_axis(p, given, np.take_along_axis(p, given, -1) - 1, -1)
        dz = p * shares[..., None]
        dh = dz @ self.engine.w
        if self.adapters is not None and "embed" in self.adapters.spec.sites:
            values, scale = self.adapters.values, self.adapters.spec.alpha / self.adapters.spec.rank
            up = np.einsum("bto,bro->btr", dz, values["embed", "b"])
            dh = dh + scale * np.einsum("btr,bri->bti", up, values["embed", "a"])
        du, carry = np.zeros_like(dh), np.zeros_like(dh[:, 0])
        for t in range(dh.shape[1] - 1, -1, -1):
            carry = dh[:, t] + carry
            du[:, t] = carry
            carry = np.where(self.opens[:, t, None], 0.0, DECAY * carry)
        return dz, du


class AdaptingEngine:
    """Weights by seed; `done` is a record of what was asked, in order; `fault` changes what a test plants."""

    backend, device, dtype = "numpy", "host", "float64"
    scoring = Scoring()

    def __init__(self, vocab: int, bos: int = 1, seed: int = 0) -> None:
        self.vocab, self.bos, self.done = vocab, bos, []
        self.ranks: Any = Alone()
        self._before: Any = None
        self.table = rng.normal(seed, "table", vocab * DIM).reshape(vocab, DIM)
        self.w = rng.normal(seed, "head", vocab * DIM).reshape(vocab, DIM)

    def adapters(self, spec: AdapterSpec, rows: int, slot: int, a: Any = None) -> FakeAdapters:
        values = {}
        for site in spec.sites:
            drawn = [rng.uniform(spec.seed, f"{slot}/{site}/{row}", spec.rank * DIM) for row in range(rows)]
            fresh = np.stack(drawn).reshape(rows, spec.rank, DIM) / DIM**0.5
            values[site, "a"] = fresh if a is None else np.array(a[site])
            values[site, "b"] = np.zeros((rows, spec.rank, DIM if site == "mix" else self.vocab))
        zeros = {key: np.zeros_like(value) for key, value in values.items()}
        self.done.append("adapters")
        return FakeAdapters(spec, values, zeros, dict(zeros))

    def adapted(
        self,
        adapters: FakeAdapters | None,
        tokens: np.ndarray,
        targets: np.ndarray,
        prediction: Any = None,
        state: Any = None,
        often: bool = False,
    ) -> FakeTape:
        self.done.append("adapted")
        e = self.table[tokens]
        opens = tokens == self.bos
        u, scale = e, 0.0
        if adapters is not None:
            scale = adapters.spec.alpha / adapters.spec.rank
            if "mix" in adapters.spec.sites:
                low = np.einsum("bti,bri->btr", e, adapters.values["mix", "a"])
                u = e + scale * np.einsum("btr,bro->bto", low, adapters.values["mix", "b"])
        h = np.empty_like(u)
        last = np.zeros_like(u[:, 0]) if state is None else state
        for t in range(tokens.shape[1]):
            last = u[:, t] + np.where(opens[:, t, None], 0.0, DECAY * last)
            h[:, t] = last
        logits = h @ self.w.T
        if adapters is not None and "embed" in adapters.spec.sites:
            low = np.einsum("bti,bri->btr", h, adapters.values["embed", "a"])
            logits = logits + scale * np.einsum("btr,bro->bto", low, adapters.values["embed", "b"])
        return FakeTape(self, adapters, tokens, targets, e, h, opens, logits, state, prediction or Prediction())

    def adapt(self, tape: FakeTape, shares: np.ndarray, step: AdaptStep) -> FakeAdapters:
        self.done.append("adapt")
        old, rows = tape.adapters, (shares != 0).any(axis=1)
        assert old is not None
        lr, bias1, bias2 = (x[:, None, None] for x in step.by_row(len(rows)))
        grads, mark = tape.gradient(shares), rows[:, None, None]
        norm = np.sqrt(sum((g**2).sum(axis=(1, 2)) for g in grads.values()))
        factor = np.minimum(1, step.clip / (norm + 1e-6)) if step.clip else np.ones_like(norm)
        values, m, v = {}, {}, {}
        for key, grad in grads.items():
            grad, value = grad * factor[:, None, None], old.values[key]
            if step.rule == "adamw":
                mean = step.beta1 * old.m[key] + (1 - step.beta1) * grad
                square = step.beta2 * old.v[key] + (1 - step.beta2) * grad**2
                new = value * (1 - lr * step.decay) - lr * (mean / bias1) / (np.sqrt(square / bias2) + step.eps)
            else:
                mean, square = step.momentum * old.m[key] + grad, old.v[key]
                new = value * (1 - lr * step.decay) - lr * mean
            values[key] = np.where(mark, new, value)
            m[key], v[key] = np.where(mark, mean, old.m[key]), np.where(mark, square, old.v[key])
        return FakeAdapters(old.spec, values, m, v)

    def start(self, rows: int) -> Any:
        return np.zeros((rows, DIM))

    def chunk(self, state: Any, tokens: np.ndarray) -> FakeTape:
        return self.adapted(None, tokens, tokens, None, state)

    def commit(self, tape: FakeTape, n: Any) -> Any:
        rows, n = len(tape.tokens), np.broadcast_to(n, (len(tape.tokens),))
        return np.where((n > 0)[:, None], tape.h[np.arange(rows), np.maximum(n, 1) - 1], tape.before)

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return self.adapted(None, tokens, targets).nll()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.adapted(None, tokens, tokens).logits()

    def weights(self) -> dict[str, np.ndarray]:
        return {"table": self.table, "w": self.w}

    def loosen(self, names: Any) -> None:
        self._before = self.table.copy(), self.w.copy()
        self._momenta = {name: np.zeros_like(self.weights()[name]) for name in names}

    def descend(self, batch: Any, step: AdaptStep) -> StepResult:
        self.done.append("descend")
        real = batch.targets >= 0
        total = sum(int(part[0]) for part in self.ranks.gather(np.array([real.sum()])))
        tape = self.adapted(None, batch.tokens, np.maximum(batch.targets, 0))
        dz, du = tape.slopes(real / total)
        table = np.zeros_like(self.table)
        np.add.at(table, batch.tokens, du)
        grads = {"table": table, "w": np.einsum("bto,bti->oi", dz, tape.h)}
        flat = np.concatenate([grad.reshape(-1) for grad in grads.values()])
        flat = sum(self.ranks.gather(flat))
        norm = float(np.linalg.norm(flat))
        flat = flat * min(1.0, step.clip / (norm + 1e-6)) if step.clip else flat
        for name, grad in zip(grads, np.split(flat, [self.table.size]), strict=True):
            if name in self._momenta:
                self._momenta[name] = step.momentum * self._momenta[name] + grad.reshape(self.w.shape)
                setattr(self, name, self.weights()[name] - step.lr * self._momenta[name])
        return StepResult(0.0, norm, True)

    def loosened(self) -> dict[str, np.ndarray]:
        moments = {f"{name}.m": value for name, value in self._momenta.items()}
        return {**{name: self.weights()[name] for name in self._momenta}, **moments}

    def load_loosened(self, arrays: dict[str, np.ndarray]) -> None:
        for name in self._momenta:
            setattr(self, name, arrays[name])
            self._momenta[name] = arrays[f"{name}.m"]

    def forget_momenta(self) -> None:
        self._momenta = {name: np.zeros_like(value) for name, value in self._momenta.items()}

    def tighten(self) -> None:
        self.table, self.w = self._before


class Talk:
    """Ranks that are threads of this process: `of(rank)` is what one of them gets."""

    def __init__(self, world: int) -> None:
        self.world, self._values = world, [None] * world
        self._barrier = threading.Barrier(world, timeout=60)

    def of(self, rank: int) -> "ThreadRank":
        return ThreadRank(self, rank)

    def everyone(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, act: Callable[["ThreadRank"], Any]) -> list[Any]:
        """Let every rank do something and return what each returned; an error of one is raised."""
        results: list[Any] = [None] * self.world
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                results[rank] = act(self.of(rank))
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
        if first:
            raise first[0]
        return results


class ThreadRank(NamedTuple):
    """One rank of a Talk."""

    talk: Talk
    rank: int
    address: str = "localhost"

    @property
    def world(self) -> int:
        return self.talk.world

    def broadcast(self, value: bytes) -> bytes:
        return self.talk.everyone(self.rank, value)[0]

    def gather(self, value: np.ndarray) -> list[np.ndarray]:
        every = self.talk.everyone(self.rank, value)
        assert len({each.dtype for each in every}) == 1, "what ranks gather has one type: devices ask for it"
        return [each.copy() for each in every]

    def sum(self, value: Any) -> Any:
        """Return the sum of the ranks' arrays of a backend."""
        return sum(self.talk.everyone(self.rank, value))

    def close(self) -> None:
        pass
