"""Adapters: maps of low rank beside the matrices of a model, of which every row of a batch has its own (docs/model.md).

An adapter adds alpha / rank * B A x to what a matrix makes of x: A (rank, in), B (rank, out) as it lies in memory. B
starts at 0, so that adapters change nothing before they have learned.
"""

from typing import NamedTuple, Protocol

import numpy as np

from core import rng
from core.checks import closest, require
from core.model.config import ModelConfig
from core.model.params import check_arrays, param_table
from core.model.shares import flops_per_token

HEAD = "embed"
"""The site of the head: it multiplies by the embedding, whether or not it has vectors of its own beside it."""
PARALLEL = ("mixer", "block_mlp")
"""Sites that are no matrix's: from what enters a whole mixer or MLP, normalised, to what that puts out."""


class AdapterSpec(NamedTuple):
    """What adapters a batch has."""

    rank: int
    alpha: float
    sites: tuple[str, ...]
    """Their places, as `chosen_sites` names them."""
    seed: int = 0
    """What A is drawn by."""


class SiteShape(NamedTuple):
    """The shape of what is adapted at a site."""

    into: int
    out: int
    layer: int = -1
    """The layer that it is in, from 0; -1: none."""


class SiteChoice(Protocol):
    """The settings that choose sites (core/adapt_config.py)."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of sites, short or whole."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers, from 0; empty: all."""
        ...


def site_shapes(model: ModelConfig) -> dict[str, SiteShape]:
    """Return every site, in the order of the forward pass: of a layer that runs again, each pass is one.

    Experts' matrices are none: tokens of one row go to several of them.
    """
    table = param_table(model)
    rows = {name.removesuffix(".weight"): row for name, row in table.items() if row.group == "matrix"}
    matrices = {name: SiteShape(row.shape[1], row.shape[0]) for name, row in rows.items() if row.slices == 1}
    sites = {name: place for name, place in matrices.items() if "." not in name}  # a factored embedding's
    for stage in model.stages(True):
        layer = stage.layer if stage.part == "layer" else -1
        for name, place in matrices.items():
            if name.startswith(f"{stage.name}."):
                sites[stage.label + name.removeprefix(stage.name)] = place._replace(layer=layer)
        if stage.part == "layer":
            sites |= {f"{stage.label}.{name}": SiteShape(model.dim, model.dim, layer) for name in PARALLEL}
    vocab, width = table["embed.weight"].shape
    return sites | {HEAD: SiteShape(width, vocab)}


def sites(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of all sites: `<stage>.<matrix>`, `<stage>.mixer` and `<stage>.block_mlp` per pass, `embed`."""
    return tuple(site_shapes(model))


def chosen_sites(model: ModelConfig, adapt: SiteChoice) -> tuple[str, ...]:
    """Return the sites that settings choose, in the order of the forward pass; ConfigError for a name without any.

    A name is whole, or the end of one: `q` is that of every attention layer in every pass, `head` is `embed`. `layers`
    leaves out sites of other layers; those that are in no layer stay.
    """
    known, layers, taken = site_shapes(model), adapt.layers, set()
    for layer in layers:
        require(0 <= layer < model.layers, f"eval.adapt.layers={layer}: expected layers from 0 to {model.layers - 1}")
    for name in adapt.sites:
        named = [site for site in known if _names(name, site)]
        if not named:
            short = dict.fromkeys("head" if site == HEAD else site.rpartition(".")[2] for site in known)
            close = closest(name, short)
            hint = f"did you mean {close}?" if close else f"this model has {', '.join(short)}"
            require(False, f"eval.adapt.sites={name}: no matrix that can be adapted is called so; {hint}")
        inside = [site for site in named if known[site].layer in (-1, *layers) or not layers]
        where = f"eval.adapt.sites={name}: none is in eval.adapt.layers={', '.join(map(str, layers))}"
        require(bool(inside), f"{where}; it is in layers {', '.join(map(str, _layers(known, named)))}")
        taken |= set(inside)
    idle = [layer for layer in layers if layer not in {known[site].layer for site in taken}]
    where = f"eval.adapt.layers={', '.join(map(str, idle))}: none of eval.adapt.sites is there; leave it out"
    require(not idle, where)
    return tuple(site for site in known if site in taken)


def _names(name: str, site: str) -> bool:
    return site == name or site.endswith(f".{name}") or (name == "head" and site == HEAD)


def _layers(known: dict[str, SiteShape], named: list[str]) -> list[int]:
    return sorted({known[site].layer for site in named})


def adapted_shapes(model: ModelConfig, spec: AdapterSpec) -> dict[str, SiteShape]:
    """Return the sites of `spec`; a ValueError for one that the model lacks, or for none."""
    known = site_shapes(model)
    unknown = [site for site in spec.sites if site not in known]
    if unknown or not spec.sites:
        raise ValueError(f"adapters at {', '.join(unknown) or 'no site'}: expected some of {', '.join(known)}")
    return {site: known[site] for site in spec.sites}


def start_a(model: ModelConfig, spec: AdapterSpec, rows: int, slot: int) -> dict[str, np.ndarray]:
    """Return A of every site, (rows, rank, in) float64: uniform within 1 / sqrt(in), keyed by seed, slot, site and row.

    So a row's A does not depend on how many rows there are.
    """
    start = {}
    for site, shape in adapted_shapes(model, spec).items():
        drawn = [rng.uniform(spec.seed, f"adapter/{slot}/{site}/{row}", spec.rank * shape.into) for row in range(rows)]
        start[site] = np.stack(drawn).reshape(rows, spec.rank, shape.into) * shape.into**-0.5
    return start


def adapter_sizes(model: ModelConfig, spec: AdapterSpec) -> list[int]:
    """Return how many values each A of a row has, then each B, in the order of the sites."""
    shapes = adapted_shapes(model, spec).values()
    return [spec.rank * shape.into for shape in shapes] + [spec.rank * shape.out for shape in shapes]


def first_a(model: ModelConfig, spec: AdapterSpec, rows: int, slot: int, a: dict[str, np.ndarray] | None) -> np.ndarray:
    """Return what A begins with, all sites side by side, (rows, M): `a` if it is given (a ValueError if it does not
    fit), else as start_a draws it.
    """
    shapes = {site: (rows, spec.rank, shape.into) for site, shape in adapted_shapes(model, spec).items()}
    a = start_a(model, spec, rows, slot) if a is None else a
    check_arrays(a, shapes, "A of adapters")
    return np.concatenate([a[site].reshape(rows, -1) for site in shapes], axis=1)


def unflat_a(model: ModelConfig, spec: AdapterSpec, flat: np.ndarray) -> dict[str, np.ndarray]:
    """Return A by site, (rows, rank, in), of all sites side by side, (rows, M)."""
    ends = np.cumsum(adapter_sizes(model, spec)[: len(spec.sites)])
    parts = np.split(flat, ends[:-1], axis=1)
    return {site: part.reshape(len(flat), spec.rank, -1) for site, part in zip(spec.sites, parts, strict=True)}


def adapter_parameters(model: ModelConfig, spec: AdapterSpec) -> int:
    """Return the number of parameters that the adapters of one row have."""
    return sum(spec.rank * (shape.into + shape.out) for shape in adapted_shapes(model, spec).values())


def adapted_flops(model: ModelConfig, spec: AdapterSpec, seq: int) -> int:
    """Return the FLOPs per token of a pass with adapters and of its gradients, by FLOP_RULE.

    It is a training pass without the products that make gradients of matrices, and three times what adapters take.
    """
    matrices = sum(
        shape.into * shape.out for site, shape in site_shapes(model).items() if site.rpartition(".")[2] not in PARALLEL
    )
    return flops_per_token(model, seq) - 2 * matrices + 6 * adapter_parameters(model, spec)
