"""Triton kernels, one file an op; each is imported only where a CUDA device and triton are there."""
