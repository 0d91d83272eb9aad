"""The short convolution as kernels: forward in one launch; backward in one and a sum over the rows.

Whatever the type of x, sums are made in float32 and rounded once. Lanes are channels; forward, a warp has a position;
backward, the warps of a group share a row, so that the weights' gradient is summed in a fixed order.
Shapes: B rows, P positions before T, C channels, I taps.
"""

import mlx.core as mx

from backends.mlx.kernels import LANES, Kernel

FORWARD_WARPS, BACKWARD_WARPS = 8, 16

FORWARD = """
const int length = x_shape[1], width = x_shape[2], seq = length - TAPS + 1;
BEGIN
    const int c = COLUMN * 32 + LANE, t = PLACE * WARPS + WARP;
    if (c < width && t < seq) {
        const size_t now = size_t(ROW) * length + t + TAPS - 1;
        float sum = 0.0f;
        for (int i = 0; i < TAPS; ++i)
            if (documents[now - i] == documents[now])
                sum = sum + float(X(weight[c * TAPS + i])) * float(x[(now - i) * width + c]);
        y[(size_t(ROW) * seq + t) * width + c] = X(sum);
    }
END
"""

BACKWARD = """
SHARED float sums[WARPS][TAPS][32];
const int length = x_shape[1], width = x_shape[2], seq = length - TAPS + 1;
BEGIN
    const int c = COLUMN * 32 + LANE;
    float partial[TAPS];
    for (int i = 0; i < TAPS; ++i) partial[i] = 0.0f;
    if (c < width)
        for (int p = WARP; p < length; p += WARPS) {
            const size_t here = size_t(ROW) * length + p;
            const float value = float(x[here * width + c]);
            float sum = 0.0f;
            for (int i = 0; i < TAPS; ++i) {
                const int t = p - (TAPS - 1) + i;  // tap i of position t is here
                if (t >= 0 && t < seq && documents[here + i] == documents[here]) {
                    const float g = float(grad[(size_t(ROW) * seq + t) * width + c]);
                    sum = sum + float(X(weight[c * TAPS + i])) * g;
                    partial[i] = partial[i] + g * value;
                }
            }
            d_x[here * width + c] = X(sum);
        }
    for (int i = 0; i < TAPS; ++i) sums[WARP][i][LANE] = partial[i];
NEXT
    const int c = COLUMN * 32 + LANE;
    if (c < width)
        for (int i = WARP; i < TAPS; i += WARPS) {
            float sum = 0.0f;
            for (int k = 0; k < WARPS; ++k) sum = sum + sums[k][i][LANE];
            d_weight[(size_t(ROW) * width + c) * TAPS + i] = sum;
        }
END
"""

forward_kernel = Kernel("skc_conv", "x weight documents", "y", FORWARD)
backward_kernel = Kernel("skc_conv_back", "x weight documents grad", "d_x d_weight", BACKWARD)


def _launch(kernel, inputs, places, warps, shapes, dtypes):
    (rows, _, width), taps = inputs[0].shape, inputs[1].shape[1]
    constants = [("X", inputs[0].dtype), ("TAPS", taps), ("WARPS", warps)]
    return kernel(inputs, constants, (-(-width // LANES), places, rows), warps, shapes, dtypes)


def forward(x, weight, documents):
    """Return y (B, T, C); x (B, P + T, C), weight (C, I), documents (B, P + T) int."""
    seq = x.shape[1] - weight.shape[1] + 1
    places, shape = -(-seq // FORWARD_WARPS), (x.shape[0], seq, x.shape[2])
    return _launch(forward_kernel, (x, weight, documents), places, FORWARD_WARPS, [shape], [x.dtype])[0]


def backward(x, weight, documents, grad):
    """Return the gradients of x and weight, of y's gradient."""
    shapes, dtypes = [x.shape, (x.shape[0], *weight.shape)], [x.dtype, mx.float32]
    d_x, parts = _launch(backward_kernel, (x, weight, documents, grad), 1, BACKWARD_WARPS, shapes, dtypes)
    return d_x, mx.sum(parts, axis=0).astype(weight.dtype)
