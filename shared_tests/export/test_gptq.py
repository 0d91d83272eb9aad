"""GPTQ in numpy, and its twin in torch on the CPU: against the definition, and against plain rounding. Budget: 6 s.

The definition removes one column at a time from the inverse of the whole Hessian, without blocks and without a factor.
"""

import numpy as np
import pytest

from backends.cuda import gptq as twin
from core.export.gptq import BLOCK, TIED, RoundingError, compensate, compensated
from core.model.storage import STORAGES, Storage, Stored, decode, gridded
from core.model.table import Init, Param
from shared_tests.reference import storage as reference
from shared_tests.support.harness import BACKENDS, draw, module, to_device

GRIDS: list[Storage] = [storage for storage in STORAGES if gridded(storage)]
DAMPING = 0.01


def correlated(name: str, columns: int, tokens: int = 4096) -> np.ndarray:
    """Return the second moments of inputs of which a few directions hold most, as those of trained models do."""
    mixing = draw(f"{name}/mixing", columns, columns) * (1 + np.arange(columns)) ** -0.9
    inputs = draw(name, tokens, columns) @ mixing.T
    return (inputs.T @ inputs / tokens).astype(np.float32)


def gaussian(name: str, rows: int, columns: int, dtype: str = "float32") -> np.ndarray:
    return (0.02 * draw(name, rows, columns)).astype(dtype)


def plain(weight: np.ndarray, storage: Storage) -> Stored:
    """Return what an engine's rounding makes of a weight."""
    return module("cuda", "storage").to_host(to_device("cuda", weight, str(weight.dtype)), storage)


def error(weight: np.ndarray, stored: Stored, storage: Storage, moment: np.ndarray) -> float:
    """Return the mean square of what the product loses, as a share of what it is."""
    wide, lost = weight.astype(np.float64), decode(stored, storage).astype(np.float64) - weight
    return float(np.sum((lost @ moment) * lost) / np.sum((wide @ moment) * wide))


def by_definition(weight: np.ndarray, moment: np.ndarray, steps: np.ndarray, largest: int) -> np.ndarray:
    """Return the codes of columns that are taken one by one, the rest being set anew to lose least; a step a weight."""
    order = np.argsort(-np.diagonal(moment), kind="stable")
    left, steps = weight.astype(np.float64)[:, order], steps.astype(np.float64)[:, order]
    wide = moment.astype(np.float64)[np.ix_(order, order)]
    inverse = np.linalg.inv(wide + DAMPING * np.diagonal(wide).mean() * np.eye(len(wide)))
    codes = np.empty(weight.shape)
    for place, column in enumerate(order):
        codes[:, column] = np.clip(np.rint(left[:, place] / steps[:, place]), -largest, largest)
        lost = (left[:, place] - codes[:, column] * steps[:, place]) / inverse[place, place]
        left[:, place:] -= np.outer(lost, inverse[place, place:])
        inverse -= np.outer(inverse[:, place], inverse[place]) / inverse[place, place]
    return codes.astype(np.int8)


@pytest.mark.parametrize("solve", [compensated, lambda *given: twin.compensated(*given, device="cpu")])
def test_codes_are_those_of_the_definition(solve) -> None:
    """Float64 weights, so that no quotient is rounded to float32; columns end inside a block and inside a group."""
    columns = BLOCK + 45
    weight, moment = gaussian("gptq/definition", 21, columns, "float64"), correlated("gptq/definition", columns, 900)
    cases: list[tuple[Storage, int, int]] = [("int4/row", 7, columns), ("int6/64", 31, 64)]
    for storage, largest, size in cases:
        scales = plain(weight, storage).scales
        assert scales is not None
        expected = by_definition(weight, moment, np.repeat(scales, size, 1)[:, :columns], largest)
        assert np.array_equal(solve(weight, moment, scales, storage, DAMPING), expected), storage
        assert not np.array_equal(expected, plain(weight, storage).codes), "else this shows nothing"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("storage", GRIDS)
def test_inputs_of_equal_size_that_have_nothing_in_common_give_plain_rounding(storage: Storage, dtype: str) -> None:
    weight = gaussian("gptq/identity", 33, 189, dtype)
    weight[0], weight[1] = 0.0, 1e-9
    stored = plain(weight, storage)
    assert stored.scales is not None
    for moment in (np.eye(189), np.diag(np.linspace(0.1, 3.0, 189)[::-1])):
        codes = compensated(weight, moment, stored.scales, storage, DAMPING)
        assert codes.dtype == np.int8 and np.array_equal(codes, stored.codes)


def test_codes_follow_their_columns_where_inputs_have_nothing_in_common() -> None:
    """Of a diagonal H the order of the columns means nothing."""
    weight, sizes = gaussian("gptq/order", 17, 150), np.linspace(0.1, 2.0, 150)
    stored, mixed = plain(weight, "int4/row"), np.argsort(draw("gptq/mixed", 150))
    assert stored.scales is not None
    one = compensated(weight, np.diag(sizes), stored.scales, "int4/row", DAMPING)
    other = compensated(weight[:, mixed], np.diag(sizes[mixed]), stored.scales, "int4/row", DAMPING)
    assert np.array_equal(one[:, mixed], other)


def test_a_column_that_nothing_reaches_is_0_and_changes_no_other() -> None:
    weight, moment = gaussian("gptq/dead", 16, 140), correlated("gptq/dead", 140)
    dead = np.array([3, 60, 139])
    moment[dead] = moment[:, dead] = 0.0
    alive = np.setdiff1d(np.arange(140), dead)
    scales = plain(weight, "int4/row").scales
    assert scales is not None
    codes = compensated(weight, moment, scales, "int4/row", DAMPING)
    assert not codes[:, dead].any() and weight[:, dead].all()
    without = compensated(weight[:, alive], moment[np.ix_(alive, alive)], scales, "int4/row", DAMPING)
    assert np.array_equal(codes[:, alive], without)
    nothing = compensated(weight, np.zeros((140, 140)), scales, "int4/row", DAMPING)
    assert not nothing.any(), "what nothing reaches at all"


@pytest.mark.parametrize("solve", [compensated, lambda *given: twin.compensated(*given, device="cpu")])
def test_the_product_loses_at_most_a_quarter_of_what_rounding_loses(solve) -> None:
    """512 x 512, a step of 0.4145 standard deviations: 12.85 of them on either side in 31 steps."""
    weight, moment = gaussian("gptq/512", 512, 512), correlated("gptq/512", 512)
    scales = (12.85 / 31 * weight.std(axis=1, keepdims=True)).astype(np.float16)
    nearest = np.clip(np.rint(weight / scales.astype(np.float32)), -31, 31).astype(np.int8)
    rounded = error(weight, Stored(nearest, scales), "int6/row", moment)
    codes = solve(weight, moment, scales, "int6/row", DAMPING)
    ours = error(weight, Stored(codes, scales), "int6/row", moment)
    assert ours * 4 < rounded and 0.01 < rounded < 0.02, (ours, rounded)


def test_the_torch_twin_loses_as_much() -> None:
    """On a GPU products are summed in another order; here, too, ties may fall otherwise."""
    weight, moment = gaussian("gptq/twin", 64, 300), correlated("gptq/twin", 300)
    moment[:, 7] = moment[7] = 0.0
    stored = plain(weight, "int6/64")
    assert stored.scales is not None
    ours, theirs = (
        solve(weight, moment, stored.scales, "int6/64", DAMPING)
        for solve in (compensated, lambda *given: twin.compensated(*given, device="cpu"))
    )
    assert theirs.dtype == np.int8 and np.mean(ours != theirs) < 1e-3
    lost = [error(weight, Stored(codes, stored.scales), "int6/64", moment) for codes in (ours, theirs)]
    assert abs(lost[1] / lost[0] - 1) < 0.01


def test_equal_weights_and_moments_give_equal_bits_whatever_the_moments_are_divided_by() -> None:
    """Weights and scales of both engines are the same bits: so are the codes."""
    weight, moment = gaussian("gptq/bits", 40, 200), correlated("gptq/bits", 200)
    table = {"w": Param((40, 200), Init("normal", 0.02), "matrix", "int4/row")}
    made = []
    for backend in BACKENDS:
        stored = module(backend, "storage").to_host(to_device(backend, weight, "float32"), "int4/row")
        made.append(compensate({"w": stored, "v": stored}, {"w": weight}, {"w": moment}, table, DAMPING, compensated))
    assert made[0]["w"].codes.tobytes() == made[1]["w"].codes.tobytes()
    assert made[0]["v"].codes.tobytes() != made[0]["w"].codes.tobytes(), "without moments it stays as it was"
    again = compensated(weight, 1024 * moment, made[0]["w"].scales, "int4/row", DAMPING)
    assert again.tobytes() == made[0]["w"].codes.tobytes()


def test_a_tied_table_is_damped_more_and_errs_less_as_a_table() -> None:
    weight, moment = gaussian("gptq/tied", 60, 96), correlated("gptq/tied", 96)
    stored, names = plain(weight, "int4/row"), ("embed.weight", "blocks.0.mlp.up.weight")
    table = {name: Param((60, 96), Init("normal", 0.02), "embed", "int4/row") for name in names}
    rounded, weights, moments = dict.fromkeys(names, stored), dict.fromkeys(names, weight), dict.fromkeys(names, moment)
    tied, other = compensate(rounded, weights, moments, table, DAMPING, compensated).values()
    assert stored.scales is not None
    assert np.array_equal(tied.codes, compensated(weight, moment, stored.scales, "int4/row", TIED))
    assert np.array_equal(other.codes, compensated(weight, moment, stored.scales, "int4/row", DAMPING))
    as_table, by_head = np.eye(96), moment
    assert error(weight, tied, "int4/row", as_table) < 0.9 * error(weight, other, "int4/row", as_table)
    assert error(weight, tied, "int4/row", by_head) < 0.9 * error(weight, stored, "int4/row", by_head)


@pytest.mark.parametrize("solve", [compensated, lambda *given: twin.compensated(*given, device="cpu")])
def test_what_has_no_codes_is_refused(solve) -> None:
    weight, moment = gaussian("gptq/refused", 8, 32), correlated("gptq/refused", 32)
    scales = plain(weight, "int6/row").scales
    assert scales is not None
    odd = weight.copy()
    odd[3, 4] = np.nan
    with pytest.raises(RoundingError, match="weights are not finite: train again"):
        solve(odd, moment, scales, "int6/row", DAMPING)
    unknown = moment.copy()
    unknown[5, 6] = np.inf
    with pytest.raises(RoundingError, match="second moments are not finite"):
        solve(weight, unknown, scales, "int6/row", DAMPING)
    with pytest.raises(RoundingError, match=r"second moments of shape \(32, 32\), expected \(16, 16\)"):
        solve(weight[:, :16], moment, scales, "int6/row", DAMPING)
    with pytest.raises(RoundingError, match="ternary/64 has no grid of equal steps.*take export.method=round"):
        solve(weight, moment, scales, "ternary/64", DAMPING)
    turned = moment - 2 * np.diag(np.diagonal(moment))
    turned[np.diag_indices(32)] *= -1
    turned[0, 1] = turned[1, 0] = 100 * turned.max()
    with pytest.raises(RoundingError, match="not positive at damping 0.01: raise export.damping"):
        solve(weight, turned, scales, "int6/row", DAMPING)


def test_a_refusal_names_the_tensor() -> None:
    weight = gaussian("gptq/named", 8, 32)
    table = {"blocks.0.mlp.up.weight": Param((8, 32), Init("normal", 0.02), "matrix", "int6/row")}
    given = {name: plain(weight, "int6/row") for name in table}, {name: weight for name in table}
    with pytest.raises(RoundingError, match=r"^blocks.0.mlp.up.weight: second moments are not finite"):
        compensate(*given, {name: np.full((32, 32), np.nan) for name in table}, table, DAMPING, compensated)


def test_the_reference_rounds_as_the_engines_do() -> None:
    """What `plain` is held to, so that no test here compares GPTQ with itself."""
    weight = gaussian("gptq/reference", 12, 70)
    assert np.array_equal(plain(weight, "int6/64").codes, reference.quantise(weight, "int6/64").codes)
