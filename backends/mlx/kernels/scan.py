"""The diagonal recurrence as kernels: forward in one launch, all three gradients in another.

A group has 32 channels of one row: lanes are channels, so that memory is read line by line, and every warp has a chunk
of 32 positions. It makes its chunk's end and product, the first warp joins the chunks, and a second sweep writes: the
order of operations is that of backends.mlx.scan.chunked. Longer rows take several turns of up to 32 chunks. Backward
the chunks are taken from the last to the first; h is then delta.
Shapes: B rows, T positions, C channels.
"""

from backends.mlx.kernels import LANES, Kernel

CHUNK, WARPS = 32, 32

SWEEPS = """
SHARED float ends[WARPS][32], whole[WARPS][32], carry[32];
const int seq = decay_shape[1], width = decay_shape[2], chunks = (seq + 31) / 32;
const size_t row = ROW;
BEGIN
    const int c = COLUMN * 32 + LANE;
    if (WARP == 0) carry[LANE] = c < width ? ENTERING : 0.0f;
END
for (int turn = 0; turn < chunks; turn += WARPS) {
BEGIN
    const int c = COLUMN * 32 + LANE;
    float h = 0.0f, product = 1.0f;
    if (c < width && WARPS > 1)  // a chunk that is alone has nothing to hand on
        for (int w = 0; w < 32; ++w)
            if (POSITION >= 0 && POSITION < seq) {
                const size_t at = (row * seq + POSITION) * width + c;
                h = DRIVE + DECAY * h;
                product = product * DECAY;
            }
    ends[WARP][LANE] = h;
    whole[WARP][LANE] = product;
NEXT
    if (WARP == 0) {  // from what each chunk makes of nothing, and of what enters it, to what enters each
        float h = carry[LANE];
        for (int k = 0; k < WARPS; ++k) {
            const float next = ends[k][LANE] + whole[k][LANE] * h;
            ends[k][LANE] = h;
            h = next;
        }
        carry[LANE] = h;
    }
NEXT
    const int c = COLUMN * 32 + LANE;
    float h = ends[WARP][LANE];
    if (c < width)
        for (int w = 0; w < 32; ++w)
            if (POSITION >= 0 && POSITION < seq) {
                const size_t at = (row * seq + POSITION) * width + c;
                h = DRIVE + DECAY * h;
                WRITE
            }
END
}
"""

FORWARD = f"""
#define POSITION ((turn + WARP) * 32 + w)
#define ENTERING start[row * width + c]
#define DECAY decay[at]
#define DRIVE drive[at]
#define WRITE states[at] = h;
{SWEEPS}"""

BACKWARD = f"""
#define POSITION ((chunks - turn - WARP) * 32 - 1 - w)
#define ENTERING 0.0f
#define DECAY (POSITION + 1 < seq ? decay[at + width] : 0.0f)
#define DRIVE grad[at]
#define WRITE d_drive[at] = h; \\
    d_decay[at] = h * (POSITION > 0 ? states[at - width] : start[row * width + c]); \\
    if (POSITION == 0) d_start[row * width + c] = decay[at] * h;
{SWEEPS}"""

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
