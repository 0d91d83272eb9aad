"""The lab's decisions, made once. Numpy only: nothing here imports torch, mlx or triton."""
