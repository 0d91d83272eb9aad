"""The MLX realisation. Import it through `core.engine.loading.load_engine`, which loads a fast BLAS first."""

import os
import sys

# MLX commits a command buffer every 20 to 50 operations, 40 to 50 MB: too often for steps of thousands of small ones.
# It reads these once. CUDA's own limits are wider: they stay.
if sys.platform == "darwin":
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "200")
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "400")
