"""The diagonal recurrence as kernels: forward in one launch, all three gradients in another.

A group has 32 channels of one row: lanes are channels, so that memory is read line by line, and every warp has a chunk
of 32 positions. It makes its chunk's end and product, the first warp joins the chunks, and a second sweep writes: the
order of operations is that of backends.mlx.scan.chunked. Longer rows take several turns of up to 32 chunks.
Shapes: B rows, T positions, C channels.
"""

from backends.mlx.kernels import LANES, Kernel

CHUNK, WARPS = 32, 32

JOIN = """
    if (WARP == 0) {
        float h = carry[LANE];
        for (int k = 0; k < WARPS; ++k) {
            const float next = ends[k][LANE] + whole[k][LANE] * h;
            ends[k][LANE] = h;
            h = next;
        }
        carry[LANE] = h;
    }
"""
"""From what each chunk makes of nothing, and of what enters it, to what enters each; `carry` enters the first."""

FORWARD = f"""
SHARED float ends[WARPS][32], whole[WARPS][32], carry[32];
const int seq = drive_shape[1], width = drive_shape[2];
BEGIN
    const int c = COLUMN * 32 + LANE;
    if (WARP == 0) carry[LANE] = c < width ? start[size_t(ROW) * width + c] : 0.0f;
END
for (int turn = 0; turn * {CHUNK} < seq; turn += WARPS) {{
BEGIN
    const int c = COLUMN * 32 + LANE, from = (turn + WARP) * {CHUNK};
    float h = 0.0f, product = 1.0f;
    if (c < width && WARPS > 1)  // a chunk that is alone has nothing to hand on
        for (int t = from; t < from + {CHUNK} && t < seq; ++t) {{
            const size_t at = (size_t(ROW) * seq + t) * width + c;
            h = drive[at] + decay[at] * h;
            product = product * decay[at];
        }}
    ends[WARP][LANE] = h;
    whole[WARP][LANE] = product;
NEXT
{JOIN}
NEXT
    const int c = COLUMN * 32 + LANE, from = (turn + WARP) * {CHUNK};
    float h = ends[WARP][LANE];
    if (c < width)
        for (int t = from; t < from + {CHUNK} && t < seq; ++t) {{
            const size_t at = (size_t(ROW) * seq + t) * width + c;
            h = drive[at] + decay[at] * h;
            states[at] = h;
        }}
END
}}
"""

BACKWARD = f"""
SHARED float ends[WARPS][32], whole[WARPS][32], carry[32];
const int seq = decay_shape[1], width = decay_shape[2], chunks = (seq + {CHUNK - 1}) / {CHUNK};
BEGIN
    if (WARP == 0) carry[LANE] = 0.0f;
END
for (int turn = 0; turn < chunks; turn += WARPS) {{  // from the last chunk to the first
BEGIN
    const int c = COLUMN * 32 + LANE, from = (chunks - 1 - turn - WARP) * {CHUNK};
    float delta = 0.0f, product = 1.0f;
    if (c < width && from >= 0 && WARPS > 1)
        for (int t = from + {CHUNK - 1}; t >= from; --t)
            if (t < seq) {{
                const size_t at = (size_t(ROW) * seq + t) * width + c;
                const float following = t + 1 < seq ? decay[at + width] : 0.0f;
                delta = grad[at] + following * delta;
                product = product * following;
            }}
    ends[WARP][LANE] = delta;
    whole[WARP][LANE] = product;
NEXT
{JOIN}
NEXT
    const int c = COLUMN * 32 + LANE, from = (chunks - 1 - turn - WARP) * {CHUNK};
    float delta = ends[WARP][LANE];
    if (c < width && from >= 0) {{
        for (int t = from + {CHUNK - 1}; t >= from; --t)
            if (t < seq) {{
                const size_t at = (size_t(ROW) * seq + t) * width + c;
                const float following = t + 1 < seq ? decay[at + width] : 0.0f;
                delta = grad[at] + following * delta;
                d_drive[at] = delta;
                d_decay[at] = delta * (t > 0 ? states[at - width] : start[size_t(ROW) * width + c]);
            }}
        if (from == 0) d_start[size_t(ROW) * width + c] = decay[size_t(ROW) * seq * width + c] * delta;
    }}
END
}}
"""

forward_kernel = Kernel("skc_scan", "decay drive start", "states", FORWARD)
backward_kernel = Kernel("skc_scan_back", "decay states start grad", "d_decay d_drive d_start", BACKWARD)


def _launch(kernel, inputs, shapes):
    rows, seq, width = inputs[0].shape
    warps = min(-(-seq // CHUNK), WARPS)
    dtypes = [inputs[0].dtype] * len(shapes)
    return kernel(inputs, [("WARPS", warps)], (-(-width // LANES), 1, rows), warps, shapes, dtypes)


def forward(decay, drive, start):
    """Return h (B, T, C); decay, drive (B, T, C), start (B, C), float32."""
    return _launch(forward_kernel, (decay, drive, start), [drive.shape])[0]


def backward(decay, states, start, grad):
    """Return the gradients of decay, drive and start, of h's gradient; states are h."""
    return tuple(_launch(backward_kernel, (decay, states, start, grad), [decay.shape, decay.shape, start.shape]))
