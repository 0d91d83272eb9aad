"""Every setting of a run, as frozen dataclasses: the docstring under a field is its help text.

`RunConfig` is what `config.json` holds; `to_json` and `from_json` are exact inverses and refuse unknown keys. The
model's settings are in core/model/config.py, those of training in core/train_config.py, how a setting is refused
in core/checks.py, how any settings become plain values in core/plain.py: import all of them from here.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from core.adapt_config import AdaptConfig as AdaptConfig
from core.adapt_config import PhasesConfig as PhasesConfig
from core.checks import ConfigError as ConfigError
from core.checks import in_words, require_limits, require_text, whole_in_words
from core.checks import require as require
from core.model.adapters import chosen_sites
from core.model.config import ModelConfig as ModelConfig
from core.model.params import param_table
from core.model.scopes import loose_names
from core.model.storage import gridded, storage_class
from core.plain import changed as changed
from core.plain import departures, rebuilt
from core.plain import differences as differences
from core.plain import flattened as flattened
from core.train_config import MOST_ROWS, MOST_TOKENS, check_tokens
from core.train_config import MOST_STEPS as MOST_STEPS
from core.train_config import NO_STAGES as NO_STAGES
from core.train_config import POLAR_EXPRESS as POLAR_EXPRESS
from core.train_config import TrainConfig as TrainConfig

SCHEMA = 3
READS = (2, SCHEMA)


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    path: str = "sample"
    """Folder written by `skc data prepare`; `sample`, `sample-case`: the bundled text, in the user's cache folder."""

    def __post_init__(self) -> None:
        require_limits("data", self, 0)


@dataclass(frozen=True)
class EvalConfig:
    """How text is scored."""

    windows: Literal["plain", "sliding", "documents", "stateful"] = "plain"
    """plain: consecutive windows; sliding: overlapping by seq - stride; documents: either, inside each document;
    stateful: consecutive windows of a document, each with the exact state that the one before left."""
    seq: int = 512
    """Longest context of a window, in tokens."""
    stride: int | None = None
    """Targets scored per window after the first (sliding, documents); None: seq, windows do not overlap."""
    batch: int = 8
    """Windows per forward pass (changes speed and memory, not the score); a GPU takes 65,536 tokens if that is more."""
    documents: int | None = None
    """Score only this many documents, drawn at random: an estimate with an error bar, never a score. None: all."""
    train_documents: int = 32
    """Documents of the estimate that is made during training."""
    seed: int = 0
    """Seed of the draw of documents: not the run's, so that runs of other seeds are judged on the same text."""
    plugins: tuple[str, ...] = ()
    """What else has a part in the score of the artifact: temperature, counts, or package.module:Class
    (docs/legality.md); a setting is eval.plugins.NAME.field (temperature: prior; counts: rule, orders, k, ...)."""
    round: int = 8
    """Forward passes, or batches of documents (eval.adapt), of a round: between two rounds ranks tell each other what
    they scored, and what all of them share may change."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)

    @property
    def learns(self) -> bool:
        """Whether anything learns while the artifact is scored."""
        return bool(self.plugins) or self.adapt.kind != "none"

    def plain(self) -> "EvalConfig":
        """Return these settings with nothing that learns."""
        nothing = EvalConfig()
        parts = {name: getattr(nothing, name) for name in ("plugins", "round", "adapt", "phases")}
        return dataclasses.replace(self, **parts)

    def __post_init__(self) -> None:
        require_limits("eval", self, 2**31 - 1, batch=MOST_ROWS, seq=MOST_TOKENS, stride=MOST_TOKENS)
        check_tokens("eval", self.batch, self.seq)
        require(0 <= self.seed < 2**31, f"eval.seed={self.seed}: expected from 0 to 2^31 - 1")
        for name in ("seq", "batch", "train_documents"):
            require(getattr(self, name) >= 1, f"eval.{name}={getattr(self, name)}: expected at least 1")
        require(self.documents is None or self.documents >= 2, f"eval.documents={self.documents}: expected at least 2")
        require(
            self.stride is None or 1 <= self.stride <= self.seq,
            f"eval.stride={self.stride}: expected from 1 to eval.seq={self.seq}",
        )
        require(
            self.windows != "sliding" or self.stride is not None,
            "eval.windows=sliding needs eval.stride (64, for example)",
        )
        require(
            self.windows not in ("plain", "stateful") or self.stride in (None, self.seq),
            f"eval.stride={self.stride} has no meaning with eval.windows={self.windows}: take sliding or documents",
        )
        self._check_learning()

    def _check_learning(self) -> None:
        """Raise ConfigError for adaptation that these windows cannot have."""
        adapt = self.adapt
        require(self.round >= 1, f"eval.round={self.round}: expected at least 1")
        require(
            self.learns or self.round == EvalConfig.round,
            f"eval.round={self.round} changes nothing where nothing learns: leave it out, or set eval.plugins or "
            "eval.adapt.kind",
        )
        strangers = [name for name in self.plugins if ":" in name]
        require(
            adapt.kind == "none" or not strangers,
            f"eval.plugins={', '.join(strangers)} with eval.adapt.kind={adapt.kind}: plug-ins of your own are for "
            "weights that stay as they are; leave one out",
        )
        if adapt.kind == "lora":
            require(
                self.windows in ("documents", "stateful"),
                f"eval.adapt.kind=lora with eval.windows={self.windows}: adapters are those of a document; take "
                "eval.windows=documents or stateful",
            )
            require(
                adapt.chunk <= self.seq,
                f"eval.adapt.chunk={adapt.chunk}: expected at most eval.seq={self.seq}, the longest window",
            )
            check_tokens("eval", adapt.documents, self.seq)
        where = f"eval.adapt.kind=sgd with eval.windows={self.windows}"
        where_state = f"{where}: the state comes from earlier weights; take plain, sliding or documents"
        require(adapt.kind != "sgd" or self.windows != "stateful", where_state)
        require(
            adapt.kind != "sgd" or adapt.reset == "never" or self.windows == "documents",
            f"{where} and eval.adapt.reset=document: windows read several documents; take eval.adapt.reset=never, or "
            "eval.windows=documents",
        )
        where = f"eval.phases.at with eval.adapt.kind={adapt.kind}, eval.adapt.reset={adapt.reset}"
        phased = adapt.kind == "lora" and adapt.reset == "document"
        require(phased or not self.phases.at, f"{where}: phases come between documents with adapters (lora, document)")


@dataclass(frozen=True)
class ExportConfig:
    """How the weights are stored."""

    budget: int = 16_000_000
    """Largest total of artifact and code, in bytes."""
    code_bytes: int = 180_000
    """Bytes of the budget that are reserved for code, packed (LZMA, base85); skc info says what it takes."""
    method: Literal["round", "gptq"] = "round"
    """How weights that were trained as they are get their codes: each to the nearest, or by GPTQ, which makes up for
    rounding errors by what a matrix multiplies (matrices of int storages; the others are rounded)."""
    calibration: Literal["train", "random", "self"] = "train"
    """Text that GPTQ learns that from: train: training text, inside train.seconds (train.reserve_seconds is for it);
    random: tokens at random; self: what the model writes. The last two need no data and no training time."""
    calibration_tokens: int = 16_384
    """Tokens of that text, in rows of train.seq."""
    damping: float = 0.01
    """Share of the mean second moment that GPTQ adds to all of them."""
    fit: bool = False
    """Make all steps of model.deviations finer or coarser by one factor, so that the artifact fills the budget."""

    def __post_init__(self) -> None:
        require_limits("export", self, 1 << 40, calibration_tokens=MOST_TOKENS)
        require(
            0 <= self.code_bytes < self.budget,
            f"export.code_bytes={self.code_bytes}: expected from 0 to below export.budget={self.budget}",
        )
        require(
            self.calibration_tokens >= 1,
            f"export.calibration_tokens={self.calibration_tokens}: expected at least 1",
        )
        require(1e-6 <= self.damping <= 1, f"export.damping={self.damping}: expected from 1e-6 to 1")
        for name in ("calibration", "calibration_tokens", "damping"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            require(
                self.method == "gptq" or value == default,
                f"export.{name}={value} changes nothing with export.method={self.method}: leave it out, or take gptq",
            )


@dataclass(frozen=True)
class RunConfig:
    """One run: everything that decides its result."""

    preset: str = "debug"
    """Name of the preset that this run started from."""
    seed: int = 1337
    """Seed of the start values and of the order of the data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        require_text("preset", self.preset)
        require(0 <= self.seed < 2**31, f"seed={whole_in_words(self.seed)}: expected from 0 to 2^31 - 1")
        require(
            self.train.repeat_from < 1 and (self.train.repeat_from == 0 or bool(self.model.repeat_layers)),
            f"train.repeat_from={self.train.repeat_from}: expected a share below 1, and model.repeat_layers to repeat",
        )
        where = f"train.repeat_every={self.train.repeat_every}: expected model.repeat_layers to repeat, or leave it out"
        require(self.train.repeat_every == 1 or bool(self.model.repeat_layers), where)
        require(
            self.train.untie_from < 1 and (self.train.untie_from == 0 or self.model.head.untied),
            f"train.untie_from={self.train.untie_from}: expected a share below 1, and model.head.untied=True to untie",
        )
        if self.train.ternary_noise > 0:
            ternary = any(storage_class(row.storage) == "ternary" for row in param_table(self.model).values())
            where = f"train.ternary_noise={self.train.ternary_noise}: the model has no ternary weights; leave it out"
            require(ternary, where)
        if self.train.rate > 0:
            coded = any(gridded(row.storage) for row in param_table(self.model).values())
            where = f"train.rate={self.train.rate}: the model has no weights in int4 to int8; leave it out"
            require(coded, where)
        self._check_experts()
        require(
            self.eval.windows != "stateful" or self.model.documents == "isolated" or not self.model.mixes("attention"),
            "eval.windows=stateful with packed documents would keep the keys of every token of the text: "
            "take sliding ones",
        )
        adapt, phases = self.eval.adapt, self.eval.phases  # now: not after the training
        if adapt.kind == "lora":
            chosen_sites(self.model, adapt)
        if adapt.kind == "sgd":
            loose_names(self.model, adapt.params, adapt.frozen)
        elif phases.at:
            loose_names(self.model, phases.params, where="eval.phases")
        if self.train.consistency:
            self._check_consistency()
        self._check_rounding()
        if self.train.quantise_soft is not None:
            rows = [row for row in param_table(self.model).values() if row.storage != "float16"]
            other = sorted({row.storage for row in rows if not gridded(row.storage)})
            found = f"has weights in {', '.join(other)}" if other else "has no such weights"
            require(
                bool(rows) and not other,
                "train.quantise_soft is for int storages, whose steps are of equal size; "
                f"the model {found}: leave it out, or take int4 to int8",
            )

    def _check_consistency(self) -> None:
        where, shortest = f"train.consistency={self.train.consistency}", min(self.train.lengths)
        require(self.model.stores, f"{where}: no part stores capsules; name skc layers, take a bank, or leave it out")
        require(
            shortest >= 2 * self.model.skc.block,
            f"{where}: rows of {shortest} tokens hold no two blocks of model.skc.block={self.model.skc.block} tokens, "
            "so that nothing is foreseen",
        )

    def _check_experts(self) -> None:
        experts, balance, start = self.model.experts, self.train.router_balance, self.train.route_from
        require(
            experts.count > 0 or balance == TrainConfig.router_balance,
            f"train.router_balance={balance}: there is no router; set model.experts.count, or leave it out",
        )
        require(
            experts.count == 0 or experts.active < experts.count or balance in (0, TrainConfig.router_balance),
            f"train.router_balance={balance}: every expert gets every token (model.experts.active={experts.active}), "
            "and nothing can be out of balance; leave it out",
        )
        require(
            start < 1 and (start == 0 or experts.shared > 0),
            f"train.route_from={start}: expected a share below 1, and a model.experts.shared to train until then",
        )

    def _check_rounding(self) -> None:
        """Raise ConfigError for what export cannot do to the weights after training."""
        gptq = self.export.method == "gptq"
        require(
            not (gptq or self.export.fit) or self.train.quantise == "never",
            f"export.{'method=gptq' if gptq else 'fit'} rounds weights after training, but train.quantise="
            f"{self.train.quantise} trains their stored form, which is never rounded again: leave it out, or train "
            "with train.quantise=never",
        )
        rows = param_table(self.model).items() if gptq or self.export.fit else ()
        require(
            not self.export.fit or any(row.deviation is not None for _, row in rows),
            "export.fit changes steps that are so many deviations, and the model has none: set model.deviations.mlp, "
            "attention or table, or leave it out",
        )
        require(
            not gptq or any(gridded(row.storage) and (row.group == "matrix" or n == "embed.weight") for n, row in rows),
            "export.method=gptq is for matrices in int storages, of which the model has none: take export.method=round "
            "or, for example, model.matrix_storage=int6/row",
        )


def to_json(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values; a RunConfig also carries the schema number."""
    plain = dataclasses.asdict(config)
    return {"schema": SCHEMA, **plain} if isinstance(config, RunConfig) else plain


def chosen(config: Any) -> dict[str, Any]:
    """Return the settings of a config that are not at their defaults, nested as `to_json` has them.

    Artifacts and digests are made of these, and `from_json` makes the config of them again: so a new setting changes
    none of those that there are, and the default of a setting must never change.
    """
    return departures(to_json(config), to_json(type(config)()))


def from_json(kind: type, values: Any, where: str = "config") -> Any:
    """Rebuild dataclass `kind` from `to_json`'s values; ConfigError names an unknown key or a wrong type.

    A setting that is absent has its default: it came after the file was written.
    """
    if kind is RunConfig and isinstance(values, dict):
        values = dict(values)
        _upgrade(values, where)
    return rebuilt(kind, values, where)


def _upgrade(values: dict[str, Any], where: str) -> None:
    """Give a run's settings their names of today, and take their schema number away."""
    schema, model = values.pop("schema", None), values.get("model")
    require(
        schema in READS,
        f"{where}: schema {in_words(schema)} was written by another version; this one reads {READS[0]} and {SCHEMA}: "
        "train again",
    )
    if schema == 2 and isinstance(model, dict):
        from core.model.upgrade import model_settings

        values["model"] = model_settings(model, f"{where}.model")
