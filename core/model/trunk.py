"""Stages: what happens to the stream between embedding and head, in order. Both forward passes, the oracle, the
parameter table, FLOPs and decoding state are folds over them."""

from collections import Counter
from typing import NamedTuple

from core.model.table import Model


class Stage(NamedTuple):
    """One use of a part."""

    part: str
    """Which part: the name of its file, and of its settings in ModelConfig (a layer's are its mixer's and MLP's)."""
    name: str
    """Where its weights are: the path of the module, and the prefix of its parameters."""
    layer: int = -1
    """Which layer it is or belongs to, from 0."""
    row: int = -1
    """Which row it uses of weights that have one per use; -1: none."""
    again: int = 0
    """How often the layer has run before."""
    repeat: int = -1
    """Which of its block's repeats it is, from 0; -1: none."""

    @property
    def block(self) -> int:
        """The block of weights that a pass through a layer uses."""
        return int(self.name.rpartition(".")[2])

    @property
    def label(self) -> str:
        """What the stream behind it is called."""
        if self.part == "layer":
            return f"blocks.{self.layer}" + ".again" * self.again
        return self.name if self.layer < 0 else f"{self.name}.{self.layer}" + ".again" * self.again


def layers(model: Model, repeat: bool) -> list[Stage]:
    """Return the passes through layers: those that are repeated run again, behind the last of them or each at once.

    A block's rows are those of its layers first, then those of its repeats, unless these use the rows of their layers.
    """
    used: Counter[int] = Counter()
    first, again = [], []
    for i in range(model.layers):
        block = model.block_of(i)
        first.append(Stage("layer", f"blocks.{block}", i, used[block]))
        used[block] += 1
    own = used.copy()
    for turn in range(1, 1 + model.repeat_times):
        for stage in (first[i] for i in model.repeat_layers):
            block = model.block_of(stage.layer)
            row = stage.row if model.repeat_scales == "shared" else used[block]
            again.append(stage._replace(row=row, again=turn, repeat=used[block] - own[block]))
            used[block] += 1
    if not repeat or not again:
        return first
    if model.repeat_order == "at_once":
        return sorted(first + again, key=lambda stage: (stage.layer, stage.again))
    after = again[-1].layer + 1
    return [*first[:after], *again, *first[after:]]


def stages(model: Model, repeat: bool) -> tuple[Stage, ...]:
    """Return all stages; without `repeat` as long as train.repeat_from has not been reached."""
    steps = [Stage("bigram", "bigram")] * (model.bigram.buckets > 0) + [Stage("smear", "smear")] * model.smear.on
    steps += [Stage("value_embed", "value_embed")] * (model.value_embed.dim > 0)
    passes = layers(model, repeat)
    pushes, adds = _skips(model, passes)
    for stage in passes:
        # A repeat runs the layer alone: bank and engram would else be added twice.
        i, first = stage.layer, not stage.again
        if model.feedback.width and not first and i == model.repeat_layers[0]:
            steps.append(Stage("feedback", "feedback", i, again=stage.again))
        if first and i == model.layers // 2 and "middle" in model.bank.places:
            steps.append(Stage("bank", "bank_middle"))
        if first and i == model.lanes.start:
            steps.append(Stage("lanes", "lanes"))
        if stage in adds:
            steps.append(Stage("skips", "skips", i, adds[stage], stage.again))
        if first and i == model.engram.layer and model.engram.orders:
            steps.append(Stage("engram", "engram"))
        steps.append(stage)
        if model.lanes.start is not None and i >= model.lanes.start:
            steps.append(Stage("lanes", "lanes", i, i))
        if stage in pushes:
            steps.append(Stage("skips", "skips", i, again=stage.again))
    return (*steps, *([Stage("bank", "bank_head")] if "head" in model.bank.places else []))


def _skips(model: Model, passes: list[Stage]) -> tuple[set[Stage], dict[Stage, int]]:
    """Return the passes that push what they put out, and those that add what was pushed, with the row that they use."""
    if not model.skips.on:
        return set(), {}
    if model.skips.over == "passes":
        into = out = passes
    else:
        into = [stage for stage in passes if not stage.again]
        # A layer that is repeated at once puts out what its last pass does.
        last = {stage.layer: stage for stage in passes if not stage.again or model.repeat_order == "at_once"}
        out = list(last.values())
    half = len(into) // 2
    return set(out[:half]), {stage: row for row, stage in enumerate(into[half : 2 * half])}
