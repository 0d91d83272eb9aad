"""The shape of the tree: what may import what, and that the twins mirror each other. Budget: 5 s."""

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import core
from core import config, presets
from core.model.layer import KINDS
from core.model.table import Part
from shared_tests.support.harness import module

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"torch", "mlx", "triton"}
ONE_TWIN_ONLY = {
    *("blas.py", "device.py", "fused.py", "gptq.py", "official.py", "staging.py"),
    *("kernels/cross_entropy.py", "kernels/short_conv.py", "kernels/trial.py"),
}
"""MLX: its Linux wheel needs a fast BLAS loaded first; Macs of many generations run it (device). CUDA: eager torch
needs hand-written gradients, MLX compiles.
Staging: a GPU has memory of its own to bring batches to.
Official: reads what torch.save wrote.
GPTQ: in float64 on a GPU; MLX has that and Cholesky factors on the CPU alone, where numpy does as well.

Kernels: on a Mac many small launches cost most, so that the convolution has one there; MLX's are tried on the device
before they are used, as there is no machine with Metal here to test one on.
"""


def imports(path: Path) -> set[str]:
    """Return every module name that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_core_imports_no_framework(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in FRAMEWORKS}


def test_no_test_imports_a_test() -> None:
    """What several tests use lies in support/: neither an import nor the program of a child names another test file."""
    for path in (ROOT / "shared_tests").rglob("*.py"):
        own = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        words = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        named = imports(path) | {name for text in words if isinstance(text, str) for name in TEST.findall(text)}
        others = {name for name in named if TEST.fullmatch(name) and not f"{name}.".startswith(f"{own}.")}
        assert not others, f"{path}: {others}: move what is shared to shared_tests/support"


TEST = re.compile(r"shared_tests\.(?:\w+\.)*test_\w+(?:\.\w+)*")
"""The name of a test file, or of something in it."""


def room(name: str) -> str:
    """Return the room of a module of core: the folder or file right inside core."""
    return ".".join(name.split(".")[:2])


def loaded(path: Path) -> set[str]:
    """Return what a file imports when it runs: as `imports`, and by import_module, but for types alone."""
    tree, names = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def arrows() -> dict[str, set[str]]:
    """Return module -> the modules of ours that it imports, of core and backends; a package is its __init__.py."""
    names = {}
    for folder in ("core", "backends"):
        for path in (ROOT / folder).rglob("*.py"):
            names[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return {name: (loaded(path) & names.keys()) - {name} for name, path in names.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the names of a circle of arrows; none if there is no circle."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if members := walk(other, [*path, name]):
                    return members
            done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def test_rooms_of_core_form_no_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, others in arrows().items():
        if name.startswith("core."):
            there = {room(other) for other in others if other.startswith("core.")}
            rooms[room(name)] = rooms.get(room(name), set()) | there - {room(name)}
    assert not circle(rooms), " -> ".join(circle(rooms))
    assert circle(rooms | {"core.checks": {"core.verbs"}}), "a planted circle was not found"


def test_modules_form_no_circle() -> None:
    assert not circle(arrows()), " -> ".join(circle(arrows()))


def test_no_arrow_leads_to_the_tests_and_the_wheel_ships_none() -> None:
    """The tests stay in the checkout: scripts/gpu_check, which needs them, runs from there."""
    for path in [p for folder in ("core", "backends") for p in (ROOT / folder).rglob("*.py")]:
        assert not {name for name in imports(path) if name.split(".")[0] == "shared_tests"}, path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["core*", "backends*"]
    assert "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))" in (ROOT / "scripts/gpu_check").read_text()


TWICE = {
    "Context", "State", "below", "choose", "closest", "draw", "flat", "number", "to_json",
}  # fmt: skip
"""Public names that core still has more than once: each is to get its room in its name, none may join them."""


def test_core_has_a_public_name_once() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "core").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    twice = {name: where for name, where in places.items() if len(where) > 1 and name != "main"}
    assert not twice.keys() - TWICE, {name: twice[name] for name in twice.keys() - TWICE}


DOORS = {
    "core/files.py": "the doors",
    "core/audit/watch/watched_process.py": "watched before any import; its files lie in the auditor's own folder",
}
"""Files of core that may open others by themselves, and why."""
PAST_THE_DOORS = {
    "open", "os.open", "os.fdopen", "io.open", "io.FileIO", "os.replace", "os.rename", "os.link", "os.symlink",
    "np.memmap", "np.fromfile", "mmap.mmap", "shutil.copyfile", "shutil.copy", "shutil.copytree", "shutil.move",
    "lzma.open", "gzip.open", "safe_open", "safetensors.safe_open", "tempfile.NamedTemporaryFile", "tempfile.mkstemp",
}  # fmt: skip
METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "tofile", "symlink_to", "hardlink_to", "touch"}
ON_FILES = {"np.load", "np.save", "np.savez", "savefig"}
"""These take a path or an open file: it must be called so."""


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_opened_through_the_doors_alone(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in DOORS:
        return
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name, method = ast.unparse(call.func), call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if call.args and ast.unparse(call.args[0]) == "os.devnull":
            continue
        where = f"{path}:{call.lineno}: {name}: use core.files"
        assert name not in PAST_THE_DOORS and method not in METHODS, where
        if name in ON_FILES or method in ON_FILES:
            assert call.args and ast.unparse(call.args[0]) in ("file", "buffer"), where


@pytest.mark.parametrize("backend, other", [("mlx", "cuda"), ("cuda", "mlx")])
def test_a_backend_never_imports_the_other_one(backend: str, other: str) -> None:
    foreign = {"mlx": "torch", "cuda": "mlx"}[backend]
    for path in (ROOT / "backends" / backend).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(f"backends.{other}"), path
            assert name.split(".")[0] != foreign, path


def test_the_twins_have_the_same_files() -> None:
    files = {
        b: {p.relative_to(ROOT / "backends" / b) for p in (ROOT / "backends" / b).rglob("*.py")}
        for b in ("mlx", "cuda")
    }
    extra = {p.as_posix() for p in files["mlx"] ^ files["cuda"]}
    assert extra == ONE_TWIN_ONLY


def test_backends_holds_nothing_executable() -> None:
    assert {p.name for p in (ROOT / "backends").glob("*.py")} == {"__init__.py"}
    tree = ast.parse((ROOT / "backends" / "__init__.py").read_text())
    assert all(isinstance(node, ast.Expr) for node in tree.body)


def stems(folder: str) -> set[str]:
    """Return the names of a folder's Python files, without `__init__`."""
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def public(thing: object) -> dict[str, object]:
    """Return the classes and functions that a module defines itself, in order of definition."""
    own = {n: v for n, v in vars(thing).items() if getattr(v, "__module__", None) == thing.__name__}  # type: ignore[attr-defined]
    return {n: v for n, v in own.items() if not n.startswith("_") and (inspect.isclass(v) or inspect.isfunction(v))}


@pytest.mark.pair
@pytest.mark.parametrize(
    "name",
    [
        *(
            "ops",
            "scan",
            "optim",
            "storage",
            "linear",
            "model",
            "engine",
            "update",
            "descent",
            "measured",
            "parts",
            "adapting",
            "twin",
        ),
        *(f"parts.{name}" for name in sorted(stems("backends/mlx/parts"))),
    ],
)
def test_names_and_signatures_mirror(name: str) -> None:
    ours, theirs = public(module("mlx", name)), public(module("cuda", name))
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        if inspect.isfunction(value):
            assert list(inspect.signature(value).parameters) == list(inspect.signature(theirs[key]).parameters), key  # type: ignore[arg-type]


def test_a_part_has_a_file_of_its_name_in_the_spec_both_backends_and_the_oracle() -> None:
    def has_rows(name: str) -> bool:
        own = public(importlib.import_module(f"core.model.{name}")).values()
        return any(hasattr(value, "rows") and value is not Part for value in own)

    spec = {name for name in stems("core/model") if has_rows(name)}
    assert spec == stems("backends/mlx/parts") == stems("backends/cuda/parts") == stems("shared_tests/oracle")


@pytest.mark.pair
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_every_kind_of_layer_has_a_mixer(backend: str) -> None:
    mixers = module(backend, "parts.layer").MIXERS
    assert set(mixers) == {kind.mixer for kind in KINDS.values()}


@pytest.mark.pair
def test_the_real_mlx_is_imported_and_core_is_ours() -> None:
    import mlx.core as mx

    assert Path(core.__file__).resolve().is_relative_to(ROOT)
    assert not Path(str(mx.__file__)).resolve().is_relative_to(ROOT / "backends")


def test_every_public_thing_in_core_has_a_docstring() -> None:
    for path in (ROOT / "core").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in tree.body + [method for c in classes for method in c.body]:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_every_preset_has_a_purpose_and_a_mini() -> None:
    for name, preset in presets.PRESETS.items():
        small = presets.mini(preset.config).model
        assert preset.purpose and preset.config.preset == name
        assert small.dim <= 64 and small.layers <= 4


def test_every_setting_is_read() -> None:
    """A field that no code outside the files of settings names would be a setting that does nothing."""
    code = "".join(
        path.read_text()
        for folder in ("core", "backends/cuda")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("config.py", "train_config.py") and path.parent.name != "presets"
    )
    for section in (config.ModelConfig, config.TrainConfig, config.EvalConfig, config.ExportConfig, config.DataConfig):
        for field in dataclasses.fields(section):
            # Read through ModelConfig's methods, which have tests of their own.
            read = field.name in ("blocks", "repeat_layers", "share_order")
            assert read or f".{field.name}" in code or f'"{field.name}"' in code, field.name
    for name, part in config.ModelConfig().parts.items():
        own = (ROOT / "core" / "model" / f"{name}.py").read_text()
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            assert f".{name}.{field.name}" in code or f"self.{field.name}" in own, f"{name}.{field.name}"
