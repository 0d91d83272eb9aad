"""docs/tour.ipynb: it is kept without outputs, and runs from top to bottom. Budget: 1 s; long: 2 minutes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, "ran.ipynb")
"""


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    """Return the cells of a notebook."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs_and_names_what_there_is() -> None:
    import skc

    code = cells(NOTEBOOK)
    assert len(code) >= 7 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code))
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "skc"]
    assert {node.attr for node in named} == {"train", "runs", "ablate"} <= set(skc.__all__)
    assert all(
        len(line) <= 160 for cell in cells(NOTEBOOK, "markdown") for line in "".join(cell["source"]).splitlines()
    )


@pytest.mark.long
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """In a child process with a kernel of its own, in an empty folder: two pictures are drawn, and figures agree."""
    place = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path), "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)],
        cwd=tmp_path,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    outputs = [output for cell in cells(tmp_path / "ran.ipynb") for output in cell["outputs"]]
    said = "".join("".join(output.get("text", "")) for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    errors = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")
    assert all(line.startswith("preparing the bundled text in ") for line in errors.splitlines()), errors
    by_hand, of_score = next(line for line in said.splitlines() if "the score says" in line).split(" bits per byte")
    assert abs(float(by_hand.split()[-1]) - float(of_score.split()[-1])) < 2e-3
    assert "plain         2" in said and "held against" in said and "tour/first" in said
