"""What every part takes of a model: parameters, bytes, FLOPs, decoding state. Budget: 5 s."""

import pytest

from core import presets
from core.config import ModelConfig, changed
from core.model.params import count, param_table
from core.model.shares import Share, bytes_by_storage, shares
from core.model.table import State
from shared_tests.oracle import ALONE
from shared_tests.support.harness import EVERYTHING, mini, minis

TINY = changed(ModelConfig(), {
    "vocab": 50, "dim": 8, "layers": 3, "mlp.hidden": 20, "attention.heads": 2, "attention.kv_heads": 1,
    "attention.rope_dims": 2, "koopman.dim": 4, "smear.on": True, "head.bias": True,
    "blocks": ("attention", "koopman"), "matrix_storage": "int8/row",
})  # fmt: skip
"""Attention, Koopman, attention."""


def test_shares_counted_by_hand() -> None:
    attention = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8
    koopman, vectors = 3 * 4 * 8 + 8 * 4, 4 + 4 * 4 + 4 * 4 + 4 * 4 + 4
    mlp = 2 * 20 * 8
    assert shares(TINY, seq=100) == {
        "embedding": Share(400, 800, 3 * 2 * 400),
        "smear": Share(8, 16, 0, State(8)),
        "attention": Share(
            2 * (attention + 2),
            2 * (attention + 2 * 24 + 2 * 2),
            3 * 2 * (2 * attention + 2 * 100 * 8),
            State(0, 2 * 8),
        ),
        "mlp": Share(3 * mlp, 3 * (mlp + 2 * 28), 3 * 3 * 2 * mlp),
        "layer": Share(3 * 16, 3 * 32),
        "koopman": Share(koopman + vectors, koopman + 2 * 20 + 2 * vectors, 3 * (2 * koopman + 4 * 4**2), State(4 * 4)),
        "head": Share(50, 100),
    }


def test_a_repeated_layer_computes_and_remembers_again() -> None:
    once = shares(TINY, 100)
    twice = shares(changed(TINY, {"repeat_layers": (1,)}), 100)
    for part in ("koopman", "mlp"):
        assert twice[part].parameters == once[part].parameters
    assert twice["koopman"].flops == 2 * once["koopman"].flops and 3 * twice["mlp"].flops == 4 * once["mlp"].flops
    assert twice["koopman"].state == State(2 * once["koopman"].state.fixed)
    assert twice["layer"].parameters == once["layer"].parameters + 16, "its scales have a row for each pass"


@pytest.mark.parametrize("name", minis())
def test_every_parameter_is_in_one_share(name: str) -> None:
    for model in [mini(name).model, *([presets.get(name).config.model] if name in presets.PRESETS else [])]:
        parts = shares(model, 64)
        size = sum(bytes_by_storage(model).values())
        assert sum(share.parameters for share in parts.values()) == count(model)
        assert sum(share.bytes for share in parts.values()) == pytest.approx(size, abs=1e-6)
        assert parts.keys() <= {*model.parts, "layer"}


def test_everything_shows_every_part() -> None:
    model = mini(EVERYTHING).model
    used = {name for name, share in shares(model, 64).items() if share.parameters}
    assert used | ALONE == {*model.parts, "layer"} and not used & ALONE and len(param_table(model)) > 100
    assert {"delta", "lanes"} == ALONE, "every other part is in everything"
