"""The quantisers in PyTorch: codes and scales of a weight by storage class, and the weight that they stand for.

Same names and signatures as backends/mlx/storage.py. Every step is one IEEE operation per element in a fixed order
(sums by halving), so both backends and the oracle get the same bits; rounding is half-to-even.
Letters: R rows, C columns, G groups of a row, g weights of a group.
"""

import torch
import torch.nn.functional as F

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

STARTS_AND_STEPS = torch.tensor(RATIOS, dtype=torch.int32)
CODE_BITS = torch.tensor(LENGTHS / (1 << FRACTION))


def quantise(weight, storage, deviation=None):
    """Return (codes, scales) of a weight (R, C): (R, C) and (R, G) float16; for float16: (values, None).

    `deviation` here and below is that of core.model.table.Param.
    """
    if storage == "float16":
        return weight.float().half(), None
    codes_RGg, scales_RG1 = _quantised(weight, storage, deviation)
    return _flat(codes_RGg, weight.shape[1]), torch.squeeze(scales_RG1, -1)


def stored(weight, storage, deviation=None, noise=None):
    """Return a weight, or a stack of them, as the artifact gives it back; its rows may have gaps between them.

    noise, like the weight: of a ternary one the codes are those of w / s + noise, s the scale of w alone.
    """
    if storage == "float16":
        return quantise(weight, storage)[0].to(weight.dtype)
    rows = weight.flatten(0, -2)
    noise = None if noise is None else noise.flatten(0, -2)
    codes_RGg, scales_RG1 = _quantised(rows, storage, deviation, noise)
    return _flat(codes_RGg * scales_RG1.to(weight.dtype), rows.shape[1]).view(weight.shape)


def softened(weight, storage, softness, deviation=None):
    """Return (value, slope) of a weight of an int class, or a stack of them: where it is on its way to the stored form.

    With u = w / s and f = u - floor(u), value = s (floor(u) + 1/2 + tanh(a (f - 1/2)) / (2 tanh(a / 2))), a = softness,
    a number on the device: w itself for a small one, rounded for a large one. slope is its derivative by w at a fixed
    s: 0 past the grid's ends.
    """
    rows, largest = weight.flatten(0, -2), LARGEST[storage_class(storage)]
    u_RGg, scales_RG1 = _on_grid(rows, storage, deviation)
    inside = torch.abs(u_RGg) <= largest
    u_RGg = torch.clamp(u_RGg, -largest, largest)
    low_RGg, end = torch.floor(u_RGg), 2 * torch.tanh(softness * 0.5)
    bend_RGg = torch.tanh(softness * (u_RGg - low_RGg - 0.5))
    value_RGg = (low_RGg + (0.5 + bend_RGg / end)) * scales_RG1.to(weight.dtype)
    slope_RGg = torch.where(inside, softness * (1 - bend_RGg * bend_RGg) / end, 0.0)
    value, slope = (_flat(x, rows.shape[1]).reshape(weight.shape) for x in (value_RGg, slope_RGg))
    return value, slope


def priced(weight, storage, deviation=None):
    """Return (bits, slope) of a stack (N, R, C) of an int class: what each weight takes of an artifact, and its slope.

    With u = w / s within the grid, bits go in a straight line from the length of one code to that of the next, in a
    table that core.export.coder could have made of the matrix's own codes. slope is the derivative of their sum by w:
    0 on the codes themselves and past the grid's ends, where the scale counts as a constant. A scale by deviations
    does not: it follows the weights, and what scales them all changes no code.
    """
    rows, largest = weight.flatten(0, -2), LARGEST[storage_class(storage)]
    columns, symbols = rows.shape[1], 2 * largest + 1
    u_RGg, scales_RG1 = _on_grid(rows, storage, deviation)
    inside_RGg = torch.where(torch.isnan(u_RGg), 0.0, torch.clamp(u_RGg, -largest, largest))  # NaN has no place
    zeros_R11 = torch.arange(len(rows), device=rows.device)[:, None, None] // weight.shape[1] * symbols + largest
    codes = torch.flatten(_flat(torch.round(inside_RGg).long() + zeros_R11, columns))
    counts = torch.zeros(len(weight) * symbols, dtype=torch.int64, device=rows.device)
    counts = counts.scatter_add(0, codes, torch.ones_like(codes))
    frequencies = 1 + counts * (TOTAL - symbols) // weight[0].numel()  # whole numbers: the same on both backends
    lengths, low_RGg = CODE_BITS.to(rows.device, rows.dtype, non_blocking=True)[frequencies], torch.floor(inside_RGg)
    below_RGg, above_RGg = (lengths[place.long() + zeros_R11] for place in (low_RGg, torch.ceil(inside_RGg)))
    rise_RGg = above_RGg - below_RGg
    bits_RGg = below_RGg + (inside_RGg - low_RGg) * rise_RGg
    if deviation is not None:
        away_RGg, counts_G1 = _away(u_RGg, columns)
        square_RG1 = torch.sum(away_RGg * away_RGg, -1, keepdim=True)
        common_RG1 = torch.sum(rise_RGg * inside_RGg, -1, keepdim=True) / square_RG1
        spread = square_RG1 > counts_G1 * (0.99 * largest / deviation) ** 2  # else it is not the spread's scale
        rise_RGg = rise_RGg - away_RGg * torch.where(spread, common_RG1, 0.0)
    slope_RGg = rise_RGg / scales_RG1.to(rows.dtype)
    bits, slope = (_flat(x, columns).reshape(weight.shape) for x in (bits_RGg, slope_RGg))
    return bits, slope


def to_host(weight, storage, deviation=None):
    """Return core.model.storage.Stored of a weight."""
    codes, scales = quantise(weight, storage, deviation)
    if scales is None:
        return Stored(codes.cpu().numpy(), None)
    codes = codes.to(torch.float32 if storage_class(storage) == "fp8" else torch.int8)
    return Stored(codes.cpu().numpy(), scales.cpu().numpy())


def _quantised(weight, storage, deviation, noise=None):
    """Return (codes, scales) in groups: (R, G, g) and (R, G, 1); not for float16. `noise`: as in `stored`."""
    columns, name = weight.shape[1], storage_class(storage)
    size = group_size(storage, columns)
    if name == "ternary":
        w_RGg = _grouped(weight, size)
        exact = _sum_by_halves(torch.abs(w_RGg)) * _shares(columns, size, weight)
        scales_RG1 = _scales(_on_ratios(exact) if by_ratios(storage) else exact)
        s_RG1 = scales_RG1.to(weight.dtype)
        noise = 0.0 if noise is None else _grouped(noise, size)
        # round(w / s + noise) is not 0 where w / s + noise is past 1/2: a tie goes to even
        up, down = w_RGg > s_RG1 * (0.5 - noise), w_RGg < s_RG1 * (-0.5 - noise)
        codes = up.to(weight.dtype) - down.to(weight.dtype)
    else:
        exact, scales_RG1 = _on_grid(weight, storage, deviation)
        exact = torch.clamp(exact, -LARGEST[name], LARGEST[name])
        codes = _to_e4m3(exact) if name == "fp8" else torch.round(exact)
        codes = codes if name == "fp8" else torch.where(codes == 0, torch.zeros_like(codes), codes)  # no minus zero
    return codes, scales_RG1


def _on_grid(weight, storage, deviation):
    """Return weights measured by the scale of their group, and the scales."""
    columns, largest = weight.shape[1], LARGEST[storage_class(storage)]
    w_RGg = _grouped(weight, group_size(storage, columns))
    exact = torch.amax(torch.abs(w_RGg), dim=-1, keepdim=True) * (1 / largest)
    if deviation is not None:
        spread = _spread(w_RGg, columns) * (deviation / largest)
        exact = torch.where(4 * spread < exact, exact, spread)  # nearly equal weights would be clipped to nothing
    scales_RG1 = _scales(exact)
    return w_RGg / scales_RG1.to(w_RGg.dtype), scales_RG1


def _spread(w_RGg, columns):
    """Return the standard deviation of every group: (R, G, 1)."""
    away_RGg, counts_G1 = _away(w_RGg, columns)
    return torch.sqrt(_sum_by_halves(away_RGg * away_RGg) / counts_G1)


def _away(w_RGg, columns):
    """Return how far weights are from the mean of their group, and how many real ones a group has: (G, 1)."""
    size = w_RGg.shape[-1]
    counts = group_counts(columns, size)
    # CUDA: by a number of the host's it would be multiplied by the inverse, which other compilers fuse with the sum
    counts_G1 = w_RGg.new_full((len(counts), 1), counts[0])
    counts_G1[-1:].fill_(counts[-1])
    away_RGg = w_RGg - _sum_by_halves(w_RGg) / counts_G1
    return _grouped(_flat(away_RGg, columns), size), counts_G1  # what fills the last group is zeros again


def _shares(columns, size, weight):
    """Return one over the number of values of each group: (G, 1), or one number for all."""
    counts = group_counts(columns, size)
    if counts[-1] == counts[0]:
        return 1 / counts[0]
    shares = weight.new_full((len(counts), 1), 1 / counts[0])  # CUDA: a copy from the host would make a step wait
    shares[-1:].fill_(1 / counts[-1])
    return shares


def _grouped(x, size):
    """Return (R, C) as (R, G, size), the last group of a row filled with zeros."""
    rows, columns = x.shape
    short = -columns % size
    x = F.pad(x, (0, short)) if short else x
    return x.reshape(rows, -1, size)


def _flat(x_RGg, columns):
    return x_RGg.reshape(x_RGg.shape[0], -1)[:, :columns]


def _sum_by_halves(x):
    """Return the sum over the last axis, by adding its second half to its first; zeros fill it to a power of two."""
    short = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    x = F.pad(x, (0, short)) if short else x
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def _scales(exact):
    """Return float16 scales, never below the floor."""
    return torch.clamp(exact.float().half(), min=SCALE_FLOOR)


def _on_ratios(exact):
    """Return float32 scales on the grid of core.model.storage.RATIOS, the nearest by ratio."""
    bits = torch.clamp(torch.bitwise_and(exact.float().view(torch.int32), 0x7FFFFFFF), max=0x7F800000)
    starts, steps = STARTS_AND_STEPS.to(exact.device, non_blocking=True)
    mantissa = torch.bitwise_and(bits, 0x7FFFFF)
    above = torch.sum(torch.where(mantissa >= starts, steps, 0), -1, keepdim=True, dtype=torch.int32)
    return (bits - mantissa + above).view(torch.float32)


def _to_e4m3(x):
    """Return x (at most 448) rounded to the values of float8 e4m3: 3 bits behind the leading one, from 2^-6 down 2^-9.

    The exponent is read off the float32 bits; the quantum is 2^(exponent - 3).
    """
    exponent = torch.bitwise_and(torch.bitwise_right_shift(x.float().view(torch.int32), 23), 255)
    quantum = torch.bitwise_left_shift(torch.clamp(exponent, min=121) - 3, 23).view(torch.float32).to(x.dtype)
    return torch.round(x / quantum) * quantum
