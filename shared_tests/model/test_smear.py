"""Smear in its forms: oracle, documents, decoding, start, counts, and what is refused. Budget: 5 s."""

from typing import Any

import numpy as np
import pytest

from core import presets
from core.config import ConfigError, RunConfig
from core.model.params import count, start_values
from shared_tests import oracle
from shared_tests.reference.ops import sigmoid
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    draw,
    engine,
    module,
    reader,
    to_device,
    to_numpy,
    tokens,
)
from shared_tests.support.one_layer import ONE_LAYER, check_reading_back, run_of

FORMS: dict[str, dict[str, Any]] = {
    "channel": {"smear.on": True},
    "window": {"smear.on": True, "smear.form": "window"},
    "all channels": {"smear.on": True, "smear.form": "window", "smear.width": 16},
    "lerp": {"smear.on": True, "smear.form": "lerp"},
    "packed": {"smear.on": True, "smear.form": "lerp", "documents": "packed"},
}

GATE, ONE = draw("smear/gate", 12), np.ones(1)


def of(changes: dict[str, Any]) -> RunConfig:
    """Return a run of the tiny model with other settings."""
    return run_of(ONE_LAYER | changes)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_the_oracle_keeps_documents_apart_and_decodes(form: str, backend: str) -> None:
    check_reading_back(ONE_LAYER | FORMS[form], "smear", backend)


def test_forms_by_hand() -> None:
    """Three tokens of two channels, of which the last begins a document."""
    x = np.array([[[2.0, -4.0], [8.0, 6.0], [1.0, 3.0]]])
    text = oracle.Text(np.array([[5, 6, 1]]), np.array([[False, False, True]]))
    stream, quarter = oracle.Stream(x, x, x, x), -np.log(3.0)  # sigmoid of it: 1/4

    def smeared(form: dict[str, Any], **weights: Any) -> list[list[float]]:
        model, w = of(form).model, {name: np.array(value) for name, value in weights.items()}
        stage = next(stage for stage in model.stages(False) if stage.part == "smear")
        return np.round(oracle.PARTS["smear"](model, w, stream, stage, text).x[0], 12).tolist()

    assert smeared(FORMS["channel"], share=[0.0, quarter]) == [[2, -4], [9, 5], [1, 3]]
    assert smeared(FORMS["lerp"], share=[0.0, quarter]) == [[1, -3], [5, 3.5], [0.5, 2.25]]
    gated = FORMS["window"] | {"smear.width": 1}
    assert smeared(gated, gate=[quarter / 8], scale=[2.0]) == [[2, -4], [9, 4], [1, 3]]


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fresh_window_is_the_model_without_it_and_learns(backend: str) -> None:
    config, rows = of(FORMS["window"]), tokens("smear/fresh", 2, 23, 29, 1)
    ours, bare = (engine(backend, c, dtype="float64") for c in (config, of({})))
    assert ours.logits(rows).tobytes() == bare.logits(rows).tobytes()
    _, gradients = ours.gradients(batches(config, 1)[0])
    assert np.abs(gradients["smear.scale"]).min() > 0 and not gradients["smear.gate"].any()
    _, gradients = reader(backend, config, 5.0, dtype="float64").gradients(batches(config, 1)[0])
    assert np.abs(gradients["smear.gate"]).min() > 0


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_reads_bfloat16_with_all_digits(backend: str) -> None:
    """The sum of its products in bfloat16 would leave two digits of the share."""
    given = draw("smear/bfloat16", 2, 9, 16)
    x, gate, scale = (to_device(backend, v, t) for v, t in ((given, "bfloat16"), (GATE, "float32"), (ONE, "float32")))
    part: Any = module(backend, "parts.smear").Smear(of(FORMS["window"]).model, False)
    if backend == "mlx":
        part.gate, part.scale = gate, scale
    else:
        part.gate.data, part.scale.data = gate, scale
    share = to_numpy(part._share(x, scale.dtype))
    assert np.abs(share - sigmoid(to_numpy(x)[..., :12] @ GATE, True)[..., None]).max() < 1e-6


def test_what_a_form_adds_and_where_it_starts() -> None:
    bare = count(of({}).model)
    added = {form: count(of(changes).model) - bare for form, changes in FORMS.items()}
    assert added == {"channel": 16, "window": 12 + 1, "all channels": 16 + 1, "lerp": 16, "packed": 16}
    starts = {form: start_values(of(changes).model, 1) for form, changes in FORMS.items()}
    assert (starts["channel"]["smear.share"] == -3).all() and not starts["lerp"]["smear.share"].any()


def test_a_mini_has_the_channels_that_its_gate_reads() -> None:
    wide = {"dim": 128, "attention.heads": 2, "smear.on": True, "smear.form": "window", "smear.width": 100}
    small = presets.mini(of(wide)).model
    assert small.smear.width == small.dim == 32


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"smear.form": "lerp"}, "form=lerp: there is no smear; set model.smear.on, too"),
        ({"smear.width": 3}, "width=3: only the form window reads so many channels; set model.smear.form=window"),
        ({"smear.on": True, "smear.form": "lerp", "smear.width": 3}, "width=3: only the form window"),
        (FORMS["window"] | {"smear.width": 17}, "width=17: expected from 1 to the 16 channels of the stream"),
        (FORMS["window"] | {"smear.width": 0}, "width=0: expected from 1 to the 16 channels of the stream"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.smear.{words}"):
        of(changes)
