"""What a packed program does: it trains, exports and scores, by the habits of the challenge's own scripts.

It reads DATA_PATH, TOKENIZER_PATH, SEED, RUN_ID and what torchrun sets; everything else was decided when it was packed.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.config import ConfigError, RunConfig, to_json
from core.data.dataset import Dataset
from core.data.unlisted import open_unlisted, val_sha256
from core.engine.protocol import Arrays, EngineOptions
from core.engine.ranks import Alone, Ranks, launched
from core.files import append_file, locked, read_file, replace_file, replace_text
from core.model.params import count
from core.plain import rebuilt
from core.scoring.adapt.phases import phases_of
from core.scoring.evaluation import Evaluation
from core.submission.logs import Program, closing_lines, opening_lines, row_lines
from core.training.calibrate import calibrate
from core.training.environment import surroundings
from core.training.finish import close_training, export_and_score
from core.training.loop import check_rows, train
from core.training.pruning import start_weights
from core.training.run import config_digest
from core.training.spans import rooms

READ = ("DATA_PATH", "TOKENIZER_PATH", "SEED", "RUN_ID")
OFFICIAL = (
    "VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY ITERATIONS WARMDOWN_ITERS WARMUP_STEPS TRAIN_BATCH_TOKENS "
    "TRAIN_SEQ_LEN TRAIN_MAX_SEQ_LEN MAX_WALLCLOCK_SECONDS QK_GAIN_INIT VOCAB_SIZE NUM_LAYERS NUM_KV_HEADS MODEL_DIM "
    "NUM_HEADS MLP_MULT TIE_EMBEDDINGS ROPE_BASE LOGIT_SOFTCAP TIED_EMBED_LR TIED_EMBED_INIT_STD MATRIX_LR SCALAR_LR "
    "EMBED_LR HEAD_LR MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BETA1 "
    "BETA2 ADAM_EPS GRAD_CLIP_NORM CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS GRAD_ACCUM_STEPS "
    "MLX_MAX_MICROBATCH_TOKENS MLX_EAGER_EVAL LOGIT_CHUNK_TOKENS OUT_DIR"
)
"""Other variables of the official scripts: one that is set would be ignored, so it is refused."""


class Say:
    """Lines on standard error, and into log.txt of the run; nothing that moves."""

    terminal = False

    def __init__(self, run: "Made") -> None:
        self._run = run

    def __call__(self, line: str) -> None:
        """Print a line, on rank 0."""
        if self._run.writes and line:
            print(line, file=sys.stderr, flush=True)
            self._run.append("log.txt", line)

    def progress(self, label: str, detail: object = "") -> Callable[..., None]:
        """Return a function that shows nothing."""
        return lambda *given: None


class Made:
    """The run that the program makes: what the loop asks of core.training.run.Run, in one start, without checkpoints.

    Rank 0 writes its folder, and logs/RUN_ID.txt as it goes on.
    """

    copies = None

    def __init__(self, name: str, config: RunConfig, writes: bool) -> None:
        self.path, self.config, self.writes = Path("runs", name), config, writes
        self.log_path = Path("logs", f"{name}.txt")
        self.artifact_path = self.path / "artifact.skc"
        self.checkpoint_path = self.path / "config.json"
        self._rows: list[dict[str, Any]] = []
        self._environment: dict[str, Any] = {}
        self._tokenizer = b""
        self.tokenizer_path = self.path / "tokenizer.model"
        self._moments: Arrays | None = None

    def begin(self, environment: dict[str, Any], tokenizer: bytes) -> None:
        """Make the folder anew: what an earlier start left there goes."""
        self._environment, self._tokenizer = environment, tokenizer
        for folder in (self.path, self.log_path.parent):
            os.makedirs(folder, exist_ok=True)
        self._lock = append_file(self.path / "lock")  # held until the program ends
        if not locked(self._lock):
            raise ConfigError(f"{self.path}: another program writes into it: wait until it ends, or set RUN_ID")
        for name in ("metrics.jsonl", "log.txt", "artifact.skc"):
            (self.path / name).unlink(missing_ok=True)
        for name, value in (("config.json", to_json(self.config)), ("env.json", environment)):
            replace_text(self.path / name, json.dumps(value, indent=2) + "\n")
        replace_file(self.tokenizer_path, tokenizer)
        self.append("log.txt", f"settings sha256 {config_digest(self.config)}")
        self.log_path.unlink(missing_ok=True)
        self.tell(opening_lines(self))

    def tell(self, lines: list[str]) -> None:
        """Print lines and add them to logs/RUN_ID.txt."""
        text = "".join(f"{line}\n" for line in lines)
        print(text, end="", flush=True)
        with append_file(self.log_path) as file:
            file.write(text.encode())

    def append(self, name: str, line: str) -> None:
        """Add a line to a file of the folder."""
        with append_file(self.path / name) as file:
            file.write(f"{line}\n".encode())

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record what was measured after `step` steps, and add it to the log."""
        row = {"step": step, **values}
        self._rows.append(row)
        if self.writes:
            self.append("metrics.jsonl", json.dumps(row, allow_nan=False))
            self.tell(row_lines(self.config.train.steps, row))

    def metrics(self) -> list[dict[str, Any]]:
        """Return what was recorded."""
        return self._rows

    def last(self, name: str) -> Any:
        """Return the newest value of a metric, or None."""
        return next((row[name] for row in reversed(self._rows) if name in row), None)

    def tokenizer(self) -> bytes:
        """Return the tokenizer model."""
        return self._tokenizer

    def environment(self) -> dict[str, Any]:
        """Return what env.json holds."""
        return self._environment

    def restore(self, engine: Any) -> tuple[int, float, int]:
        """Begin with nothing."""
        return 0, 0.0, 0

    def save(self, engine: Any, step: int, seconds: float, tokens: int | None = None) -> None:
        """Keep no checkpoint."""

    def keep_moments(self, moments: Arrays, of: str) -> None:
        """Keep second moments for the export."""
        self._moments = moments

    def kept_moments(self, of: str) -> Arrays | None:
        """Return them."""
        return self._moments

    def ledger_path(self, name: str) -> None:
        """Return nothing: a scoring that is killed begins anew."""


def start_program(build: Callable[..., Any], join: Callable[[], Ranks], file: str, form: str, settings: str) -> None:
    """Run the program in `file` to its end and exit: 0, 1 where the artifact is too large, 2 where the input is wrong.

    `settings`: JSON of the run's settings and the engine's options.
    """
    try:
        code = read_file(file, 1 << 24)
        program = Program(hashlib.sha256(code).hexdigest(), len(code), form)
        ranks = join() if launched() else Alone()
        good = run_program(build, ranks, program, **json.loads(settings))
        ranks.close()
    except (ValueError, OSError, ArithmeticError) as error:
        told = isinstance(error, OSError) or type(error).__module__.startswith("core.")
        if not (told and str(error)):  # else the traceback says where it was
            raise
        print(f"{os.path.basename(file)}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, ArithmeticError) else 2)
    sys.exit(0 if good else 1)


def run_program(
    build: Callable[..., Any], ranks: Ranks, program: Program, config: dict[str, Any], options: dict[str, Any]
) -> bool:
    """Train, export and score as the settings and the environment say; return whether the artifact fits its budget."""
    check_environment()
    settings = with_code(seeded(rebuilt(RunConfig, config, "settings")), program.bytes)
    dataset = open_text(settings)
    check_rows(settings.train, ranks)
    if settings.eval.phases.at:  # now, not after the training
        phases_of(Evaluation.of(dataset.val, settings, settings.eval.documents, plugins=True))
    run: Any = Made(run_name(settings), settings, not ranks.rank)
    say: Any = Say(run)
    chosen = EngineOptions(spans=rooms(dataset.train, settings, ranks.world), **options)
    engine = build(settings, start_weights(settings, dataset.train), chosen, False, ranks)
    if run.writes:
        surrounding = {"command": os.path.basename(sys.argv[0]), "val_sha256": val_sha256(dataset)}
        surrounding |= {**surroundings(engine, dataset, 0), **program.to_json()}
        run.begin(surrounding, dataset.tokenizer.model)
    say(f"{settings.preset}, seed {settings.seed}: {count(settings.model):,} parameters, code {program.bytes:,} bytes")
    say(f"{engine.backend} on {ranks.world} x {engine.device}, {engine.dtype}; {'; '.join(engine.notes)}")
    summary = train(run, engine, dataset, say)
    calibrate(run, engine, dataset, summary.steps, summary.taken, say)
    close_training(run, dataset, summary, say)
    value = export_and_score(run, engine, dataset, summary.steps, say)
    if run.writes:
        run.tell(closing_lines(run))
    return value["artifact"]["within"]


def check_environment() -> None:
    """Raise ConfigError for a variable of the official scripts that this program does not read."""
    given = [name for name in OFFICIAL.split() if name in os.environ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: this program reads {', '.join(READ)} alone; its settings are packed: unset"
        )


def seeded(config: RunConfig) -> RunConfig:
    """Return the settings with the SEED of the environment, if it has one; ConfigError."""
    text = os.environ.get("SEED")
    if text is None:
        return config
    if not (text.isascii() and text.isdecimal() and int(text[:11]) < 2**31):
        raise ConfigError(f"SEED={text[:40]!r}: expected a whole number from 0 to 2^31 - 1")
    return dataclasses.replace(config, seed=int(text))


def with_code(config: RunConfig, size: int) -> RunConfig:
    """Return the settings with the program's own bytes as those of the code: over them the budget is closed."""
    return dataclasses.replace(config, export=dataclasses.replace(config.export, code_bytes=size))


def run_name(config: RunConfig) -> str:
    """Return the name of the run, RUN_ID or that of its settings; ConfigError for one that is no name of a file."""
    name = os.environ.get("RUN_ID") or f"{config.preset}_seed{config.seed}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == "." or len(name) > 100:
        raise ConfigError(f"RUN_ID={name[:40]!r}: expected letters, digits, dots, - and _ alone")
    return name


def open_text(config: RunConfig) -> Dataset:
    """Open the shards in DATA_PATH, or where the settings say; ConfigError unless they are of the model's tokenizer."""
    path = os.environ.get("DATA_PATH") or config.data.path
    if not os.path.isdir(path):
        raise ConfigError(f"DATA_PATH={path[:200]}: no such folder; give the one that holds the shards")
    dataset = open_unlisted(path, os.environ.get("TOKENIZER_PATH") or os.path.join(path, "tokenizer.model"))
    for name in ("vocab", "bos"):
        ours, theirs = getattr(config.model, name), getattr(dataset.tokenizer, name)
        if ours != theirs:
            raise ConfigError(f"TOKENIZER_PATH: {name} {theirs}, but this program is packed for {ours}")
    return dataset
