"""The quantisers in MLX: codes and scales of a weight by storage class, and the weight that they stand for.

Same names and signatures as backends/cuda/storage.py. Every step is one IEEE operation per element in a fixed order
(sums by halving), so both backends and the oracle get the same bits; rounding is half-to-even.
Letters: R rows, C columns, G groups of a row, g weights of a group.
"""

import mlx.core as mx
import numpy as np

from core.export.coder import FRACTION, LENGTHS, TOTAL
from core.model.storage import (
    LARGEST,
    RATIOS,
    SCALE_FLOOR,
    Stored,
    by_ratios,
    group_counts,
    group_size,
    storage_class,
)


def quantise(weight, storage, deviation=None):
    """Return (codes, scales) of a weight (R, C): (R, C) and (R, G) float16; for float16: (values, None).

    `deviation` here and below is that of core.model.table.Param.
    """
    if storage == "float16":
        return weight.astype(mx.float32).astype(mx.float16), None
    codes_RGg, scales_RG1 = _quantised(weight, storage, deviation)
    return _flat(codes_RGg, weight.shape[1]), mx.squeeze(scales_RG1, -1)


def stored(weight, storage, deviation=None, noise=None):
    """Return a weight as the artifact gives it back; its rows may have gaps between them.

    noise, like the weight: of a ternary one the codes are those of w / s + noise, s the scale of w alone.
    """
    if storage == "float16":
        return quantise(weight, storage)[0].astype(weight.dtype)
    codes_RGg, scales_RG1 = _quantised(weight, storage, deviation, noise)
    return _flat(codes_RGg * scales_RG1.astype(weight.dtype), weight.shape[1])


def softened(weight, storage, softness, deviation=None):
    """Return (value, slope) of a weight of an int class: where it is on its way to the stored form.

    With u = w / s and f = u - floor(u), value = s (floor(u) + 1/2 + tanh(a (f - 1/2)) / (2 tanh(a / 2))), a = softness,
    a number on the device: w itself for a small one, rounded for a large one. slope is its derivative by w at a fixed
    s: 0 past the grid's ends.
    """
    columns, largest = weight.shape[1], LARGEST[storage_class(storage)]
    u_RGg, scales_RG1 = _on_grid(weight, storage, deviation)
    inside = mx.abs(u_RGg) <= largest
    u_RGg = mx.clip(u_RGg, -largest, largest)
    low_RGg, end = mx.floor(u_RGg), 2 * mx.tanh(softness * 0.5)
    bend_RGg = mx.tanh(softness * (u_RGg - low_RGg - 0.5))
    value_RGg = (low_RGg + (0.5 + bend_RGg / end)) * scales_RG1.astype(weight.dtype)
    slope_RGg = mx.where(inside, softness * (1 - bend_RGg * bend_RGg) / end, 0.0)
    return _flat(value_RGg, columns), _flat(slope_RGg, columns)


def priced(weight, storage, deviation=None):
    """Return (bits, slope) of a stack (N, R, C) of an int class: what each weight takes of an artifact, and its slope.

    With u = w / s within the grid, bits go in a straight line from the length of one code to that of the next, in a
    table that core.export.coder could have made of the matrix's own codes. slope is the derivative of their sum by w:
    0 on the codes themselves and past the grid's ends, where the scale counts as a constant. A scale by deviations
    does not: it follows the weights, and what scales them all changes no code.
    """
    rows, largest = weight.reshape(-1, weight.shape[2]), LARGEST[storage_class(storage)]
    columns, symbols = rows.shape[1], 2 * largest + 1
    u_RGg, scales_RG1 = _on_grid(rows, storage, deviation)
    inside_RGg = mx.where(mx.isnan(u_RGg), 0.0, mx.clip(u_RGg, -largest, largest))  # NaN has no place
    zeros_R11 = mx.arange(len(rows), dtype=mx.int32)[:, None, None] // weight.shape[1] * symbols + largest
    codes = mx.flatten(_flat(mx.round(inside_RGg).astype(mx.int32) + zeros_R11, columns))
    counts = mx.zeros(len(weight) * symbols, mx.int32).at[codes].add(1).astype(mx.int64)
    frequencies = 1 + counts * (TOTAL - symbols) // weight[0].size  # whole numbers: the same on both backends
    lengths, low_RGg = mx.array(LENGTHS / (1 << FRACTION), rows.dtype)[frequencies], mx.floor(inside_RGg)
    below_RGg, above_RGg = (lengths[place.astype(mx.int32) + zeros_R11] for place in (low_RGg, mx.ceil(inside_RGg)))
    rise_RGg = above_RGg - below_RGg
    bits_RGg = below_RGg + (inside_RGg - low_RGg) * rise_RGg
    if deviation is not None:
        away_RGg, counts_G1 = _away(u_RGg, columns)
        square_RG1 = mx.sum(away_RGg * away_RGg, -1, keepdims=True)
        common_RG1 = mx.sum(rise_RGg * inside_RGg, -1, keepdims=True) / square_RG1
        spread = square_RG1 > counts_G1 * (0.99 * largest / deviation) ** 2  # else it is not the spread's scale
        rise_RGg = rise_RGg - away_RGg * mx.where(spread, common_RG1, 0.0)
    slope_RGg = rise_RGg / scales_RG1.astype(rows.dtype)
    bits, slope = (_flat(x, columns).reshape(weight.shape) for x in (bits_RGg, slope_RGg))
    return bits, slope


def to_host(weight, storage, deviation=None):
    """Return core.model.storage.Stored of a weight."""
    codes, scales = quantise(weight, storage, deviation)
    if scales is None:
        return Stored(np.array(codes), None)
    return Stored(np.array(codes.astype(mx.float32 if storage_class(storage) == "fp8" else mx.int8)), np.array(scales))


def _quantised(weight, storage, deviation, noise=None):
    """Return (codes, scales) in groups: (R, G, g) and (R, G, 1); not for float16. `noise`: as in `stored`."""
    columns, name = weight.shape[1], storage_class(storage)
    size = group_size(storage, columns)
    if name == "ternary":
        w_RGg = _grouped(weight, size)
        shares = mx.array([[1 / count] for count in group_counts(columns, size)], weight.dtype)
        exact = _sum_by_halves(mx.abs(w_RGg)) * shares
        scales_RG1 = _scales(_on_ratios(exact) if by_ratios(storage) else exact)
        s_RG1 = scales_RG1.astype(weight.dtype)
        noise = 0.0 if noise is None else _grouped(noise, size)
        # round(w / s + noise) is not 0 where w / s + noise is past 1/2: a tie goes to even
        up, down = w_RGg > s_RG1 * (0.5 - noise), w_RGg < s_RG1 * (-0.5 - noise)
        codes = up.astype(weight.dtype) - down.astype(weight.dtype)
    else:
        exact, scales_RG1 = _on_grid(weight, storage, deviation)
        exact = mx.clip(exact, -LARGEST[name], LARGEST[name])
        codes = _to_e4m3(exact) if name == "fp8" else mx.round(exact)
        codes = codes if name == "fp8" else mx.where(codes == 0, mx.zeros_like(codes), codes)  # no minus zero
    return codes, scales_RG1


def _on_grid(weight, storage, deviation):
    """Return weights measured by the scale of their group, and the scales."""
    columns, largest = weight.shape[1], LARGEST[storage_class(storage)]
    w_RGg = _grouped(weight, group_size(storage, columns))
    exact = mx.max(mx.abs(w_RGg), axis=-1, keepdims=True) * mx.array(1 / largest, weight.dtype)
    if deviation is not None:
        spread = _spread(w_RGg, columns) * mx.array(deviation / largest, weight.dtype)
        exact = mx.where(4 * spread < exact, exact, spread)  # nearly equal weights would be clipped to nothing
    scales_RG1 = _scales(exact)
    return w_RGg / scales_RG1.astype(w_RGg.dtype), scales_RG1


def _spread(w_RGg, columns):
    """Return the standard deviation of every group: (R, G, 1)."""
    away_RGg, counts_G1 = _away(w_RGg, columns)
    return mx.sqrt(_sum_by_halves(away_RGg * away_RGg) / counts_G1)


def _away(w_RGg, columns):
    """Return how far weights are from the mean of their group, and how many real ones a group has: (G, 1)."""
    size = w_RGg.shape[-1]
    # MLX: a product with the inverse might be fused with the difference below, and rounded once less
    counts_G1 = mx.array([[count] for count in group_counts(columns, size)], w_RGg.dtype)
    away_RGg = w_RGg - _sum_by_halves(w_RGg) / counts_G1
    return _grouped(_flat(away_RGg, columns), size), counts_G1  # what fills the last group is zeros again


def _grouped(x, size):
    """Return (R, C) as (R, G, size), the last group of a row filled with zeros."""
    rows, columns = x.shape
    short = -columns % size
    x = mx.pad(x, [(0, 0), (0, short)]) if short else x
    return x.reshape(rows, -1, size)


def _flat(x_RGg, columns):
    return x_RGg.reshape(x_RGg.shape[0], -1)[:, :columns]


def _sum_by_halves(x):
    """Return the sum over the last axis, by adding its second half to its first; zeros fill it to a power of two."""
    short = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    x = mx.pad(x, [(0, 0), (0, 0), (0, short)]) if short else x
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def _scales(exact):
    """Return float16 scales, never below the floor."""
    return mx.maximum(exact.astype(mx.float32).astype(mx.float16), mx.array(SCALE_FLOOR, mx.float16))


def _on_ratios(exact):
    """Return float32 scales on the grid of core.model.storage.RATIOS, the nearest by ratio."""
    bits = mx.minimum(mx.bitwise_and(mx.view(exact.astype(mx.float32), mx.int32), 0x7FFFFFFF), 0x7F800000)
    starts, steps = mx.array(RATIOS, mx.int32)
    mantissa = mx.bitwise_and(bits, 0x7FFFFF)
    above = mx.sum(mx.where(mantissa >= starts, steps, 0), axis=-1, keepdims=True)
    return mx.view(bits - mantissa + above, mx.float32)


def _to_e4m3(x):
    """Return x (at most 448) rounded to the values of float8 e4m3: 3 bits behind the leading one, from 2^-6 down 2^-9.

    The exponent is read off the float32 bits; the quantum is 2^(exponent - 3).
    """
    exponent = mx.bitwise_and(mx.right_shift(mx.view(x.astype(mx.float32), mx.uint32), 23), 255)
    quantum = mx.view(mx.left_shift(mx.maximum(exponent, 121) - 3, 23), mx.float32).astype(x.dtype)
    return mx.round(x / quantum) * quantum
