"""The layer kinds of the model: kind -> mixer class."""

from backends.cuda.blocks.attention import Attention

BLOCKS = {"attention": Attention}
