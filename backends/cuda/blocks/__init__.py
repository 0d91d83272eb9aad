"""The layer kinds of the model: kind -> mixer class."""

from backends.cuda.blocks.attention import Attention
from backends.cuda.blocks.koopman import Koopman
from backends.cuda.blocks.skc import SKC

BLOCKS = {"attention": Attention, "koopman": Koopman, "skc": SKC, "skc_parallel": SKC}
