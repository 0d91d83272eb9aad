"""P0: the table, start values, step plans and device integers are the same bits everywhere. Budget: 20 s."""

import dataclasses
import hashlib

import numpy as np
import pytest

from core import presets, rng
from core.config import ConfigError, changed
from core.engine.scaffolding import trained_table
from core.model.params import count, param_table, start_values
from core.model.shares import decoding_state, flops_per_token
from core.training import schedule
from shared_tests.support.harness import BACKENDS, call, engine, mini, minis, module

GOLDEN_START = {
    "debug": "869ca5a0ca069c61",
    "tiny": "5061974b01cb7984",
    "ablate_float": "6b7014275f26f16a",
    "ablate": "6b7014275f26f16a",
    "baseline": "3c024b7bca346465",
    "ternary_74m": "254e5ab500c7581c",
    "skc_ablate": "365ccfc36b6c7ff5",
    "delta_ablate": "df6c589a0e7be5c9",
    "skc_mac": "dd0b8606246d17bb",
    "skc_600": "46cb42366a2a21df",
    "skc_8xh100": "8aaf6c1cda40fbf5",
    "skc_8xh100_int6": "8b086b31c931be90",
    "skc_proxy": "dd86c4edc2676fcc",
    "skc_1609_mac": "e5bec53981a67775",
    "skc_1609": "2f74b6150f37128c",
    "pr401": "831bbee3d3da97f2",
    "pr550": "e1375c9651159677",
    "pr1619": "7a1068cb93514ef9",
    "pr1394": "2aad4285a5a3d18e",
    "pr1855": "b912476ecbe9f855",
    "pr401_mac": "32cd16abbeac5346",
    "pr550_mac": "372b8eb0f56c1565",
    "pr1619_mac": "bb4bf553788e0f7d",
    "pr1394_mac": "2aad4285a5a3d18e",
    "pr1855_mac": "b912476ecbe9f855",
    "everything": "e5d5d3108a3456e8",
    "opposite": "5d9f357234fad7bd",
    "hybrid": "bef7557557ab7051",
}
"""blake2b of all start values of each preset's mini, in table order (made by this file's `digest`)."""


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Return a short hash of arrays, names included."""
    state = hashlib.blake2b(digest_size=8)
    for name, value in arrays.items():
        state.update(name.encode() + value.tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("name", minis())
def test_start_values_are_golden(name: str) -> None:
    config = mini(name)
    assert digest(start_values(config.model, config.seed)) == GOLDEN_START[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_has_its_recorded_count(name: str) -> None:
    assert count(presets.get(name).config.model) == presets.get(name).params


def test_stages_stand_in_their_order() -> None:
    """Five layers of four blocks, of which 1 to 3 run again; skips over them; every memory; and a run's first part."""
    model = mini("everything").model
    assert [stage.label for stage in model.stages(True)] == [
        *(
            "bigram",
            "smear",
            "value_embed",
            "blocks.0",
            "skips.0",
            "engram",
            "blocks.1",
            "skips.1",
            "bank_middle",
            "skips.2",
            "blocks.2",
        ),
        *("skips.3", "blocks.3", "feedback.1.again", "blocks.1.again", "blocks.2.again", "blocks.3.again"),
        *("blocks.4", "bank_head"),
    ]
    assert model.stages(False) == tuple(stage for stage in model.stages(True) if not stage.again)
    used = [(stage.name, stage.row) for stage in model.stages(True) if stage.part == "layer"]
    assert used[0] == ("blocks.0", 0) and used[-1] == ("blocks.0", 1)
    assert used[4:7] == [(f"blocks.{i}", 1) for i in (1, 2, 3)]


def test_what_runs_twice_is_counted_twice() -> None:
    """In FLOPs and state, by the sums over stages; its parameters are there once."""
    model = mini("skc_ablate").model
    once, twice = (decoding_state(m).fixed for m in (model, changed(model, {"repeat_layers": (1,)})))
    assert twice - once == model.skc.state(model).fixed
    head, both = (changed(model, {"bank.at": at}) for at in ("head", "both"))
    bank = 2 * model.bank.heads * model.bank.capsules * model.dim + model.bank.flops(model, 37)
    assert flops_per_token(both, 37) - flops_per_token(head, 37) == 3 * bank
    repeated = changed(head, {"repeat_layers": (1,)})
    assert count(repeated) - count(head) == 2 * model.dim  # another row of both residual scales
    layer = sum(
        row.size for name, row in param_table(head).items() if name.startswith("blocks.1.") and row.group == "matrix"
    )
    more = 2 * layer + model.skc.flops(model, 37)
    assert flops_per_token(repeated, 37) - flops_per_token(head, 37) == 3 * more


def test_baseline_is_the_official_model() -> None:
    config = presets.get("baseline").config
    assert count(config.model) == 17_059_912
    assert abs(flops_per_token(config.model, 1024) - 130.5e6) < 0.1e6  # docs/challenge.md, 5


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", minis())
def test_a_backend_starts_from_the_tables_bits(name: str, backend: str) -> None:
    config = mini(name)
    start, got = start_values(config.model, config.seed), engine(backend, config, dtype="float32").params()
    assert list(got) == list(trained_table(config.model, config.train))
    for key, value in start.items():
        assert got[key].dtype == np.float32 and got[key].tobytes() == value.tobytes(), key


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_is_strict_and_names_the_parameter(backend: str) -> None:
    config = mini("debug")
    made = engine(backend, config, dtype="float32")
    weights = made.params()
    for change, word in (
        (lambda w: w.pop("head.bias"), "head.bias is missing"),
        (lambda w: w.update(extra=np.zeros(1, np.float32)), "extra is not a parameter"),
        (lambda w: w.update(**{"head.bias": np.zeros(3, np.float32)}), "head.bias has shape"),
    ):
        bad = dict(weights)
        change(bad)
        with pytest.raises(ValueError, match=word):
            made.load_params(bad)
        with pytest.raises(ValueError, match=word):
            engine(backend, config, bad)
    with pytest.raises(ValueError, match=r"embed.weight.m is missing"):
        made.load_optimizer({})


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_device_noise_is_the_hosts_bits(backend: str) -> None:
    index = np.concatenate([np.arange(1000), 2**32 - 1 - np.arange(1000)]).astype(np.uint32)
    for key in (0, 1, 2**32 - 1, rng.hash_key(1337, 5, "noise")):
        ours = rng.hash32(key, index)
        (theirs,) = call(backend, module(backend, "ops").hash32, (key, index), "float32")
        assert theirs.dtype == np.uint32 and np.array_equal(ours, theirs)


def test_hash_is_golden_and_well_mixed() -> None:
    assert rng.hash32(7, np.arange(4, dtype=np.uint32)).tolist() == [2492178918, 2816725947, 1548080446, 3648937681]
    bits = rng.hash32(3, np.arange(1 << 16, dtype=np.uint32))
    share = np.array([((bits >> np.uint32(b)) & 1).mean() for b in range(32)])
    assert len(np.unique(bits)) == 1 << 16 and np.abs(share - 0.5).max() < 0.01


def test_generator_is_golden_and_has_its_moments() -> None:
    assert rng.integers16(1337, "golden", 4).tolist() == [16076, 21257, 6820, 43472]
    x, u = rng.normal(0, "moments", 1 << 18), rng.uniform(0, "moments", 1 << 18)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs(u.std() - 3**-0.5) < 0.01
    assert abs((x**4).mean() - 2.9) < 0.05  # sums of 12 uniforms: kurtosis 3 - 0.1
    assert np.abs(u).max() < 1


def test_streams_depend_on_seed_and_name_only() -> None:
    assert np.array_equal(rng.normal(1, "a", 7), rng.normal(1, "a", 9)[:7])
    assert not np.array_equal(rng.normal(1, "a", 7), rng.normal(2, "a", 7))
    assert not np.array_equal(rng.normal(1, "a", 7), rng.normal(1, "b", 7))
    drawn = rng.choose(0, "c", 100, 10)
    assert len(set(drawn.tolist())) == 10 and (np.diff(drawn) > 0).all()


def test_step_plan_is_golden() -> None:
    config = presets.get("debug").config.train
    plans = [schedule.plan(s, schedule.progress_by_steps(s, config), config) for s in range(config.steps)]
    rates = [p.lr_matrix / config.lr_matrix for p in plans]
    assert rates[0] == 1.0 and rates[11] == 1.0 and rates[-1] == pytest.approx(config.floor, abs=1e-15)
    assert rates[12] < 1.0 and all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    assert plans[3].bias1 == 1 - config.beta1**4 and plans[3].bias2 == 1 - config.beta2**4


def test_schedule_warms_up_and_down_linearly() -> None:
    config = presets.get("ablate_float").config.train
    assert schedule.lr_scale(0.01, config) == pytest.approx(0.5)
    assert schedule.lr_scale(0.5, config) == 1.0
    assert schedule.lr_scale(0.8, config) == pytest.approx((1 + config.floor) / 2)
    assert schedule.lr_scale(1.7, config) == pytest.approx(config.floor)


def test_rows_grow_in_stages_at_constant_tokens_per_step() -> None:
    stages = {"seq_stages": (16, 32), "seq_until": (0.1, 0.25)}
    config = dataclasses.replace(presets.get("ablate_float").config.train, batch=8, seq=64, micro_batch=4, **stages)
    lengths = {p: schedule.plan(0, p, config).seq for p in (0.0, 0.1, 0.11, 0.25, 0.26, 1.0, 1.5)}
    assert list(lengths.values()) == [16, 16, 32, 32, 64, 64, 64] and config.lengths == (16, 32, 64)
    assert [config.rows_of(seq) for seq in config.lengths] == [(32, 16), (16, 8), (8, 4)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_stages": (16,)}, "as many shares as lengths"),
        ({"seq_stages": (16, 32), "seq_until": (0.2, 0.2)}, "rising shares"),
        ({"seq_stages": (16,), "seq_until": (1.5,)}, "rising shares"),
        ({"seq_stages": (7,), "seq_until": (0.5,)}, "7 does not divide the 512 tokens of a micro-batch"),
        ({"seq_stages": (0,), "seq_until": (0.5,)}, "does not divide|modulo"),
        ({"quantise": "late", "quantise_below": 0.05}, "would never switch on"),
        ({"quantise": "late", "warmdown": 0.0}, "would never switch on"),
        ({"average_from": 1.5}, "average_from=1.5"),
        ({"average_decay": 1.0}, "average_decay=1.0"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"keep_every": 2, "save_every": None}, "keeps nothing"),
        ({"average_from": 1.0}, "nothing would be averaged"),
        ({"average_ternary": True}, "averages nothing"),
        ({"seq_stages": (128,), "seq_until": (0.5,)}, "not shorter than train.seq=64"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(changes: dict, message: str) -> None:
    config = dataclasses.replace(presets.get("ablate_float").config.train, batch=8, seq=64)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    "section, field, value",
    [("train", name, bad) for name in ("eps", "lr_matrix", "weight_decay", "z_loss") for bad in (float("nan"), -1.0)]
    + [
        ("train", "eps", 0.0),
        ("train", "clip", float("inf")),
        ("model", "attention.rope_base", -5.0),
        ("model", "norm_eps", 0.0),
    ]
    + [("model", "attention.q_gain", float("inf")), ("model", "embedding.std", -0.1)],
)
def test_a_setting_that_would_poison_the_weights_is_refused(section: str, field: str, value: float) -> None:
    config = getattr(presets.get("debug").config, section)
    with pytest.raises(ConfigError, match=rf"{section}\.{field}="):
        changed(config, {field: value})
