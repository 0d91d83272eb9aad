"""Two realisations of one model spec. This file must exist: without it our `mlx` folder shadows the real one."""
