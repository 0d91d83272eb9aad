"""The layer kinds of the model: kind -> mixer class."""

from backends.mlx.blocks.attention import Attention

BLOCKS = {"attention": Attention}
