"""A layer: a mixer and an MLP, each added to the stream, through a scale per channel unless there is none."""

from dataclasses import dataclass
from typing import NamedTuple

from core.model.table import Init, Model, Part, Rows, below, vector


class Kind(NamedTuple):
    """A kind of layer."""

    mixer: str
    """The part that mixes positions."""
    parallel: bool = False
    """Whether the MLP stands beside the mixer instead of behind it."""
    gated: bool = False
    """Whether a gate divides the sum between the mixer and the MLP beside it."""


KINDS = {
    "attention": Kind("attention"),
    "attention_parallel": Kind("attention", parallel=True),
    "attention_gated": Kind("attention", parallel=True, gated=True),
    "koopman": Kind("koopman"),
    "skc": Kind("skc"),
    "skc_parallel": Kind("skc", parallel=True),
    "delta": Kind("delta"),
}


def per_pass(model: Model, block: int, width: int) -> tuple[int, ...]:
    """Return the shape of what each pass through a block has of its own: one row for each if there are several."""
    first, again = model.uses_of(block)
    passes = first if model.repeat_scales == "shared" else first + again
    return (width,) if passes == 1 else (passes, width)


@dataclass(frozen=True)
class Layer(Part):
    """One block of weights, which one or several layers use."""

    block: int
    """Which one."""

    def mixer(self, model: Model) -> Part:
        """Return the part that mixes positions: layers that share a block are of one kind."""
        return getattr(model, KINDS[model.kind(self.block)].mixer)

    def mlp(self, model: Model) -> Part:
        """Return the part that changes every position by itself."""
        return model.experts if model.experts.within(model, self.block) else model.mlp

    def rows(self, model: Model) -> Rows:
        """Return the parameters; what belongs to a pass through the block has one row per pass if there are several."""
        first, again = model.uses_of(self.block)
        shape = per_pass(model, self.block, model.dim)
        # A repeat's own scales start at 0: switched on in the middle of a run, it changes nothing at first; one that
        # never was switched on changes nothing at all, so that scoring may always run the whole depth.
        # With feedback a repeat begins again where its layers began: without them the pass before would be lost.
        alike, mlp = len(shape) == 1 or model.feedback.width, self.mlp(model)
        # Of experts a token gets one whole: the branch must start small, whatever the router's probabilities are.
        small = 1.0 / model.experts.count if mlp is model.experts else 1.0
        mix = {"stream_mix": vector(*shape, init=1.0), "embed_mix": vector(*shape)} if model.residual_mix else {}
        gate, kind = vector(*per_pass(model, self.block, 1), init=0.5), KINDS[model.kind(self.block)]

        def beside(branch: str, start: float) -> Rows:
            scale = vector(*shape, init=start if alike else Init("rows", start, first))
            gained = model.norm_gains and not (branch == "mlp" and kind.parallel)  # which reads what the mixer does
            gain = {f"{branch}_norm_gain": vector(model.dim)} if gained else {}
            return ({f"{branch}_scale": scale} if model.residual_scales else {}) | gain

        return {
            **below("mixer", self.mixer(model).rows(model)),
            **beside("mixer", 1.0),
            **below("mlp", mlp.rows(model)),
            **beside("mlp", small),
            **mix,
            **({"gate": gate} if kind.gated else {}),
            **({"blend": vector(again, init=0.5)} if model.repeat_blend and again else {}),
        }

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return self.mixer(model).values(model, seq, scores) + self.mlp(model).values(model, seq, scores)
