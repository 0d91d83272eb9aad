"""The MLX realisation. Import it through `core.engine.loading.load_engine`, which loads a fast BLAS first."""

import os

# MLX reads it at its first product and has 1 where nobody set it: on Macs from the M5 on and on NVIDIA's GPUs float32
# products would then have 10 bits. MLX_ENABLE_TF32=1 in the environment asks for that.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
