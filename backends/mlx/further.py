"""Further heads (train.mtp_heads): what is added to the training loss for tokens behind the next one.

Letters: B rows, T positions, V vocabulary, E width of what the tied head reads.
"""

import mlx.core as mx

from backends.mlx import ops


def further_loss(hidden_BTE, heads, targets_BT, config, exact):
    """Return the mean over rows and heads of a head's mean cross-entropy over its targets in a row.

    heads: weights (V, E); the target of head k at t is the id k places behind the next one, where the row has it and no
    document begins up to it. A row without any adds 0. Rows are what micro-batches and ranks share out: the mean of
    their means is that of the whole step.
    """
    isolated = config.documents == "isolated"
    open_BT = targets_BT != config.bos if isolated else mx.ones(targets_BT.shape, mx.bool_)
    live_BT, total = open_BT, 0.0
    for k, weight_VE in enumerate(heads, 1):
        live_BT = live_BT & _later(open_BT, k)
        logits_BTV = ops.linear(hidden_BTE, weight_VE)
        nll_BT, _ = ops.cross_entropy(logits_BTV, _later(targets_BT, k), exact, config.head.softcap)
        live = live_BT.astype(nll_BT.dtype)
        count_B = mx.maximum(mx.sum(live, axis=1), 1)
        total = total + mx.mean(mx.sum(nll_BT * live, axis=1) / count_B)
    return total / len(heads)


def _later(x_BT, k):
    """Return the values of k positions later, zeros (of bool: False) past the end."""
    k = min(k, x_BT.shape[1])  # what learns while it is scored may be given rows of few tokens
    return mx.pad(x_BT[:, k:], [(0, 0), (0, k)])
