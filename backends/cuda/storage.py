"""The quantisers in PyTorch: codes and scales of a weight by storage class, and the weight that they stand for.

Same names and signatures as backends/mlx/storage.py. Every step is one IEEE operation per element in a fixed order
(sums by halving), so both backends and the oracle get the same bits; rounding is half-to-even.
Letters: R rows, C columns, G groups of a row, g weights of a group.
"""

import functools

import torch
import torch.nn.functional as F

from core.storage import LARGEST, SCALE_FLOOR, Stored, group_counts, group_size, storage_class


def quantise(weight, storage):
    """Return (codes, scales) of a weight (R, C): (R, C) and (R, G) float16; for float16: (values, None)."""
    if storage == "float16":
        return weight.float().half(), None
    columns = weight.shape[1]
    size = group_size(storage, columns)
    w_RGg = _grouped(weight, size)
    name = storage_class(storage)
    if name == "ternary":
        shares = _shares(columns, size, weight.dtype, weight.device)
        scales_RG1 = _scales(_sum_by_halves(torch.abs(w_RGg)) * shares)
        half = scales_RG1.to(weight.dtype) * 0.5  # round(w / s) is not 0 where |w| > s / 2: a tie goes to even
        codes = (w_RGg > half).to(weight.dtype) - (w_RGg < -half).to(weight.dtype)
    else:
        top = torch.amax(torch.abs(w_RGg), dim=-1, keepdim=True)
        scales_RG1 = _scales(top * (1 / LARGEST[name]))
        exact = torch.clamp(w_RGg / scales_RG1.to(weight.dtype), -LARGEST[name], LARGEST[name])
        codes = _to_e4m3(exact) if name == "fp8" else torch.round(exact)
        codes = codes if name == "fp8" else torch.where(codes == 0, torch.zeros_like(codes), codes)  # no minus zero
    return _flat(codes, columns), torch.squeeze(scales_RG1, -1)


def decode(codes, scales, storage, dtype):
    """Return the weight (R, C) that codes and scales stand for: exact in float32 and wider."""
    if scales is None:
        return codes.to(dtype)
    columns = codes.shape[1]
    return _flat(_grouped(codes, group_size(storage, columns)) * scales.to(dtype)[..., None], columns)


def stored(weight, storage):
    """Return a weight as the artifact gives it back, row after row: as a reader of the artifact has it."""
    return decode(*quantise(weight, storage), storage, weight.dtype).contiguous()


def to_host(weight, storage):
    """Return core.storage.Stored of a weight."""
    codes, scales = quantise(weight, storage)
    if scales is None:
        return Stored(codes.cpu().numpy(), None)
    codes = codes.to(torch.float32 if storage_class(storage) == "fp8" else torch.int8)
    return Stored(codes.cpu().numpy(), scales.cpu().numpy())


@functools.cache  # CUDA: made once, for a copy from the host would make every step wait for the device
def _shares(columns, size, dtype, device):
    """Return one over the number of values of each group: (G, 1)."""
    return torch.tensor([[1 / count] for count in group_counts(columns, size)], dtype=dtype, device=device)


def _grouped(x, size):
    """Return (R, C) as (R, G, size), the last group of a row filled with zeros."""
    rows, columns = x.shape
    short = -columns % size
    x = F.pad(x, (0, short)) if short else x
    return x.reshape(rows, -1, size)


def _flat(x_RGg, columns):
    return x_RGg.reshape(x_RGg.shape[0], -1)[:, :columns]


def _sum_by_halves(x):
    """Return the sum over the last axis, a power of two, adding its second half to its first until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def _scales(exact):
    """Return float16 scales, never below the floor."""
    return torch.clamp(exact.float().half(), min=SCALE_FLOOR)


def _to_e4m3(x):
    """Return x (at most 448) rounded to the values of float8 e4m3: 3 bits behind the leading one, from 2^-6 down 2^-9.

    The exponent is read off the float32 bits; the quantum is 2^(exponent - 3).
    """
    exponent = torch.bitwise_and(torch.bitwise_right_shift(x.float().view(torch.int32), 23), 255)
    quantum = torch.bitwise_left_shift(torch.clamp(exponent, min=121) - 3, 23).view(torch.float32).to(x.dtype)
    return torch.round(x / quantum) * quantum
