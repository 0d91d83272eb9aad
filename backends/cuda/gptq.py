"""GPTQ on a GPU, for exports that would take minutes on the host: core/export/gptq.py in torch, float64 too.

CUDA: MLX has no such file: float64 and Cholesky factors are its CPU's alone, where numpy does as well.
"""

import numpy as np
import torch

from core.export.gptq import BLOCK, RoundingError, check_solvable
from core.model.storage import LARGEST, group_size, storage_class


def compensated(weight, moment, scales, storage, damping, device="cuda"):
    """See core.export.gptq.compensated."""
    check_solvable(weight, moment, storage)
    weight_RC, moment_CC = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (weight, moment))
    order, factor_CC = _prepared(moment_CC.double(), damping)
    largest, columns = LARGEST[storage_class(storage)], weight.shape[1]
    steps_GR = torch.from_numpy(np.ascontiguousarray(scales)).to(device).T.to(weight_RC.dtype)
    left_CR = weight_RC.T.double()[order]
    left_CR[torch.diagonal(moment_CC)[order] <= 0] = 0
    codes_CR = torch.empty(left_CR.shape, dtype=torch.int8, device=device)
    groups = (order // group_size(storage, columns)).tolist()
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors_bR = torch.empty((end - begin, len(weight)), dtype=torch.float64, device=device)
        for column in range(begin, end):
            done = column - begin
            wanted_R = left_CR[column] - factor_CC[column, begin:column] @ errors_bR[:done]
            step_R = steps_GR[groups[column]]
            code_R = torch.clamp(torch.round(wanted_R.to(weight_RC.dtype) / step_R), -largest, largest)
            errors_bR[done] = (wanted_R - code_R * step_R) / factor_CC[column, column]
            codes_CR[column] = code_R.to(torch.int8)
        left_CR[end:] -= factor_CC[end:, begin:end] @ errors_bR
    codes_RC = torch.empty(weight.shape, dtype=torch.int8, device=device)
    codes_RC[:, order] = codes_CR.T
    return codes_RC.cpu().numpy()


def _prepared(moment_CC, damping):
    """See core.export.gptq.prepared."""
    sums_C = torch.diagonal(moment_CC)
    order, alive = torch.argsort(-sums_C, stable=True), sums_C > 0
    mean = sums_C[alive].mean() if bool(alive.any()) else 1.0
    damped_CC = moment_CC[order][:, order]
    torch.diagonal(damped_CC).add_(torch.where(alive[order], damping, 1.0).double() * mean)
    root_CC, failed = torch.linalg.cholesky_ex(torch.flip(damped_CC, (0, 1)))
    if int(failed):
        raise RoundingError(f"second moments are not positive at damping {damping}: raise export.damping")
    upper_CC, ones_CC = torch.flip(root_CC, (0, 1)), torch.eye(len(order), dtype=torch.float64, device=root_CC.device)
    return order, torch.linalg.solve_triangular(upper_CC, ones_CC, upper=True).T.contiguous()
