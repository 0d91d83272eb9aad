"""Stages: what happens to the stream between embedding and head, in order. Both forward passes, the oracle, the
parameter table, FLOPs and decoding state are folds over them."""

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
    again: bool = False
    """Whether it repeats a layer."""

    @property
    def block(self) -> int:
        """The block of weights that a pass through a layer uses."""
        return int(self.name.rpartition(".")[2])

    @property
    def label(self) -> str:
        """What the stream behind it is called."""
        if self.part == "layer":
            return f"blocks.{self.layer}" + ".again" * self.again
        return self.name if self.layer < 0 else f"{self.name}.{self.layer}"


def layers(model: Model, repeat: bool) -> list[Stage]:
    """Return the passes through layers: those that are repeated run again, all of them, behind the last of them.

    A block's rows are those of its layers first, then those of its repeats.
    """
    rows: dict[int, int] = {}
    first, again = [], []
    for out, among in ((first, range(model.layers)), (again, model.repeat_layers)):
        for i in among:
            block = model.block_of(i)
            out.append(Stage("layer", f"blocks.{block}", i, rows.get(block, 0), out is again))
            rows[block] = rows.get(block, 0) + 1
    after = again[-1].layer + 1 if again else 0
    return [*first[:after], *again, *first[after:]] if repeat else first


def stages(model: Model, repeat: bool) -> tuple[Stage, ...]:
    """Return all stages; without `repeat` as long as train.repeat_from has not been reached."""
    steps = [Stage("bigram", "bigram")] * (model.bigram.buckets > 0) + [Stage("smear", "smear")] * model.smear.on
    steps += [Stage("value_embed", "value_embed")] * (model.value_embed.dim > 0)
    half, skips = model.layers // 2, model.skips.count(model)
    for stage in layers(model, repeat):
        i = stage.layer
        if stage.again:
            steps.append(stage)
            continue
        if i == half and "middle" in model.bank.places:
            steps.append(Stage("bank", "bank_middle"))
        if half <= i < half + skips:
            steps.append(Stage("skips", "skips", i, i - half))
        if i == model.engram.layer and model.engram.orders:
            steps.append(Stage("engram", "engram"))
        steps.append(stage)
        if i < skips:
            steps.append(Stage("skips", "skips", i))
    return (*steps, *([Stage("bank", "bank_head")] if "head" in model.bank.places else []))
