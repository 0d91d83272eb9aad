"""The layer kinds of the model: kind -> mixer class."""

from backends.mlx.blocks.attention import Attention
from backends.mlx.blocks.koopman import Koopman
from backends.mlx.blocks.skc import SKC

BLOCKS = {"attention": Attention, "koopman": Koopman, "skc": SKC, "skc_parallel": SKC}
