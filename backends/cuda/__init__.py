"""The PyTorch realisation: on a CUDA device where there is one, else on the CPU (it says which)."""
