"""`skc info RUN|ARTIFACT`: what each tensor takes of the artifact. Budget: 4 s."""

from pathlib import Path

import numpy as np
import pytest

from core.cli import main
from core.export.codecs import values_in
from core.export.coder import lanes
from core.model.params import param_table
from shared_tests.support.artifacts import MODELS, parts, some_stored, write
from shared_tests.support.command_line import call

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["ternary", "nibbles", "ratios"])
def test_the_tensors_add_up_to_the_artifact(name: str, tmp_path: Path, capsys: Capture) -> None:
    model, path = MODELS[name], tmp_path / "a.skc"
    size, stored = write(path, model), some_stored(model)
    tensors = call(capsys, "info", str(path))["tensors"]
    assert list(tensors) == list(param_table(model))
    beside = size - len(parts(path.read_bytes())[1]) + 4 + 4 * lanes(values_in(param_table(model)))
    assert sum(tensor["bytes"] for tensor in tensors.values()) == pytest.approx(size - beside, abs=4)
    for key, row in param_table(model).items():
        assert tensors[key]["bits"] == pytest.approx(8 * tensors[key]["bytes"] / row.size)
        entropy = tensors[key]["entropy"]
        if row.storage == "float16":
            assert entropy is None
        else:
            codes = stored[key].codes + 0.0 if "fp8" not in row.storage else stored[key].codes.view(np.uint32)
            share = np.unique(codes, return_counts=True)[1] / row.size
            assert entropy == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-9)
    main(["info", str(path)])
    shown = capsys.readouterr().out
    assert "bits a value" in shown and f"{path}: {size:,} bytes" in shown and "blocks.0.mlp.down.weight" in shown
