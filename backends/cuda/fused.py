"""CUDA: hand-written gradients for eager PyTorch, where autograd would walk memory two to three times as often.

MLX needs none of this: mx.compile fuses. The readable form of each is the exact form of its op in ops.py.
"""

import torch
from torch.autograd import Function


class RMSNorm(Function):
    """y = x / sqrt(mean(x^2) + eps); dx = (g - y * mean(g * y)) / sqrt(mean(x^2) + eps)."""

    @staticmethod
    def forward(ctx, x, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # on a GPU torch's own fused kernel is used instead
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        y = wide * scale
        ctx.save_for_backward(y, scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        y, scale = ctx.saved_tensors
        wide = grad.to(y.dtype)
        inner = torch.sum(wide * y, dim=-1, keepdim=True).div_(-y.shape[-1])
        return torch.addcmul(wide, y, inner).mul_(scale).to(grad.dtype), None


class Orthogonal(Function):
    """o = P y, P = 1 - u u^T, u = v / sqrt(|v|^2 + 1e-12); dy = P g, dv = -((u . y) dy + (u . g) o) / sqrt(...) in sum.

    y (B, T, G, R, K), v (B, T, G, 1, K), alone (B, T, 1, 1, 1) bool: o and its gradient are 0 there.
    """

    @staticmethod
    def forward(ctx, y, v, alone):
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        # 1e-12 keeps the gradient finite where v is 0.
        scale = torch.sum(wide * wide, dim=-1, keepdim=True).add_(1e-12).rsqrt_()
        unit = wide * scale
        along = torch.sum(y * unit, dim=-1, keepdim=True)
        out = torch.addcmul(y.to(unit.dtype), along, unit, value=-1).masked_fill_(alone, 0.0).to(y.dtype)
        ctx.save_for_backward(unit, scale, along, out, alone)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        unit, scale, along, out, alone = ctx.saved_tensors
        slope = torch.sum(grad * unit, dim=-1, keepdim=True)
        dy = torch.addcmul(grad.to(unit.dtype), slope, unit, value=-1).masked_fill_(alone, 0.0)
        dv = torch.mul(dy, along).addcmul_(slope, out).sum(dim=3, keepdim=True)
        return dy.to(grad.dtype), dv.mul_(scale).neg_().to(grad.dtype), None


class SquaredLeaky(Function):
    """y = max(x, slope * x)^2; with r = max(x, slope * x): dx = 2 g r where x > 0, 2 g r slope elsewhere."""

    @staticmethod
    def forward(ctx, x, slope):
        r = torch.nn.functional.leaky_relu(x, slope) if slope else torch.relu(x)
        ctx.save_for_backward(r)
        ctx.slope = slope
        return r * r

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        (r,) = ctx.saved_tensors
        dx = torch.mul(grad, r).mul_(2)
        return (torch.where(r > 0, dx, dx * ctx.slope) if ctx.slope else dx), None


class Decay(Function):
    """d = sigmoid(-x), s = sqrt(1 - d^2 + 1e-6); dx = d (1 - d) (g_s d / s - g_d)."""

    @staticmethod
    def forward(ctx, x):
        d, rest = torch.sigmoid(-x), torch.sigmoid(x)
        s = torch.addcmul(rest, rest, d).add_(1e-6).sqrt_()
        ctx.save_for_backward(d, rest, s)
        return d, s

    @staticmethod
    def backward(ctx, grad_d, grad_s):  # pyright: ignore
        d, rest, s = ctx.saved_tensors
        return torch.mul(grad_s, d).div_(s).sub_(grad_d).mul_(d).mul_(rest)


class Softcap(Function):
    """y = cap * tanh(x / cap); dx = g * (1 - tanh^2): the two factors of cap cancel."""

    @staticmethod
    def forward(ctx, x, cap):
        t = torch.div(x, cap).tanh_()
        ctx.save_for_backward(t)
        return t * cap

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        (t,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, t), None


class CrossEntropy(Function):
    """(lse - logits[target], lse); dlogits = softmax * (g_nll + g_lse) - onehot * g_nll."""

    @staticmethod
    def forward(ctx, logits, targets):
        total = torch.logsumexp(logits, dim=-1)
        places = targets[..., None].long()
        ctx.save_for_backward(logits, places, total)
        return total - torch.gather(logits, -1, places).squeeze(-1), total

    @staticmethod
    def backward(ctx, grad_nll, grad_total):  # pyright: ignore
        logits, places, total = ctx.saved_tensors
        dx = torch.sub(logits, total[..., None]).exp_().mul_((grad_nll + grad_total)[..., None])
        return dx.scatter_add_(-1, places, -grad_nll[..., None]), None
