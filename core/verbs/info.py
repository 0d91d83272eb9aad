"""Verb `skc info PRESET|RUN|ARTIFACT`: what a model consists of and takes, and what its matrices get to read."""

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Self

from tyro.conf import Suppress

from core import presets
from core.audit.code import against_reserve, packed_code
from core.config import RunConfig
from core.data.bundled import open_data
from core.engine.scaffolding import standing
from core.export.budget import fitted_steps, predicted_bytes, with_tables
from core.export.fit import SLACK, FitError
from core.model.params import count, param_table
from core.model.shares import FLOP_RULE, Share, bytes_by_storage, decoding_state, decoding_tape, flops_per_token, shares
from core.scoring.plugins import load_plugins
from core.verbs.common import Backend, Context, Outcome, PresetOptions, fit_tokens, open_subject, with_text
from core.verbs.info_bytes import tensor_bytes
from core.verbs.info_statistics import open_reader, statistics


@dataclass(frozen=True)
class Info(PresetOptions):
    """Options of `skc info`."""

    path: Suppress[str | None] = None
    """The run or artifact, if it is one and no preset."""
    statistics: bool = False
    """Of a run or artifact: second moments of what enters each matrix, from some training text (trace, largest and mean
    diagonal of the sum of a a^T)."""
    backend: Backend = "auto"
    """What computes the statistics."""

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the options that stand for a preset, or for what a run or an artifact was trained with."""
        if name in presets.PRESETS or not os.path.lexists(name):
            return super().named(name)
        return dataclasses.replace(cls.of(open_subject(name, None).config), path=name)


def info(options: Info, context: Context) -> Outcome:
    """Show what a model consists of; not ok if it, or the code, does not fit the budget."""
    config, say = options.config(), context.say
    load_plugins(config.eval.plugins, strangers=options.path is None)  # what a run names is not run to look at it
    reader = open_reader(options.path, config, options.backend) if options.statistics else None  # what is wrong, first
    if "--data.path" in options.given and options.path is None:
        config = with_text(config, say)
        config, changed = fit_tokens(config, open_data(config.data.path, train=False), options.given)
        for line in changed:
            say(line)
    model, export = config.model, config.export
    say.table(("parameter", "shape", "count", "values", "group", "storage", "start"), _grouped(config))
    storage, predicted, tables = bytes_by_storage(model), predicted_bytes(model), with_tables(model)
    packed = packed_code()
    code = max(export.code_bytes, *packed.values())
    total = predicted + code
    fits = total <= export.budget
    parts = shares(model, config.train.seq)
    flops, state, tape = flops_per_token(model, config.train.seq), decoding_state(model), decoding_tape(model)
    say()
    say.table(
        ("part", "parameters", "bytes", "FLOPs per token", "state", "per token"), [_row(*p) for p in parts.items()]
    )
    say()
    say(f"parameters        {count(model):,}{standing(model, config.train)}")
    lacks = presets.PRESETS[config.preset].lacks if config.preset in presets.PRESETS else ""
    if lacks:
        say(f"not here yet      {lacks}")
    for name, size in storage.items():
        say(f"{name:<17} {size:,.0f} bytes before compression, scales included")
    verdict = "within" if fits else f"OVER by {total - export.budget:,}"
    if export.fit:
        try:
            fit = fitted_steps(model, export.budget - code, round(SLACK * export.budget))
            fits = True
            verdict += f"; export.fit makes steps {fit.factor:.2f} times as large: {fit.size + code:,}"
        except FitError as error:
            verdict = f"{verdict}; {error}"
    say(f"artifact          {predicted:,} bytes, predicted for trained weights (docs/log.md: how well)")
    say(f"with code         {total:,} of {export.budget:,} bytes: {verdict} ({code:,} for code)")
    took = ", ".join(f"{size:,} ({name})" for name, size in packed.items())
    say(f"code, as audited  {took} bytes packed: {against_reserve(max(packed.values()), export.code_bytes)}")
    others = ", ".join(f"{name} {size:,}" for name, size in tables.items())
    say(f"by table storage  {others} bytes ({model.embedding.storage} in use)")
    say(f"FLOPs per token   {flops:,} at seq {config.train.seq} (docs/performance.md: how counted)")
    sent = _experts(config)
    if sent:
        rounds = "" if config.train.quantise == "never" else ", all rounded in every step that rounds"
        say(
            f"experts           {sent['weights']:,} weights{rounds}; a token is sent through {sent['active']:,} of them"
        )
    say(f"decoding state    {state.fixed:,} floats, and {state.per_token:,} more per token")
    say(f"tape of a chunk   {tape:,} floats for every token, until it is known how many of them stay")
    value = {
        "preset": config.preset,
        "parameters": count(model),
        "bytes_by_storage": storage,
        "bytes_predicted": predicted,
        "bytes_predicted_by_table_storage": tables,
        "bytes_total": total,
        "budget": export.budget,
        "within_budget": fits,
        "not_here_yet": lacks,
        "packed_code": packed,
        "code_bytes": export.code_bytes,
        "flops_per_token": flops,
        "seq": config.train.seq,
        "flop_rule": FLOP_RULE,
        "experts": sent,
        "state_per_token": state.per_token,
        "state_size": state.fixed,
        "tape_per_token": tape,
        "parts": {name: {**share._asdict(), "state": share.state._asdict()} for name, share in parts.items()},
        "table": {name: list(row.shape) for name, row in param_table(model).items()},
    }
    if options.path is not None:
        value["tensors"] = tensor_bytes(options.path, say)
    if reader is not None:
        value["statistics"] = statistics(reader, context)
    return Outcome(fits, value)


def _experts(config: RunConfig) -> dict[str, int]:
    """Return the weights of all experts, and of those that one token is sent to; nothing if there are none."""
    rows, own = param_table(config.model).values(), config.model.experts
    weights = sum(row.size for row in rows if row.slices > 1)
    return {"weights": weights, "active": weights * own.active // own.count} if weights else {}


def _row(part: str, share: Share) -> tuple[str | int, ...]:
    """Return a part's share as a row of a table."""
    return part, share.parameters, round(share.bytes), share.flops, *share.state


def _grouped(config: RunConfig) -> list[tuple[str, str, int, int, str, str, str]]:
    """Return the parameter table with the same parameter of equal layers on one row."""
    groups: dict[tuple[str, str, str, str, str], list[int]] = {}
    for name, row in param_table(config.model).items():
        place = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        shape = " x ".join(map(str, row.shape))
        until = f" to {row.init.until:.4g}" if row.init.kind == "rates" else ""
        start = f"{row.init.kind} {row.init.scale:.4g}{until}"
        groups.setdefault((place, shape, row.group, row.rule, start), []).append(row.size)
    return [
        (place, shape, len(sizes), sum(sizes), group, storage, start)
        for (place, shape, group, storage, start), sizes in groups.items()
    ]
