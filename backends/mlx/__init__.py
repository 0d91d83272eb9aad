"""The MLX realisation. Import it through `core.engine.load_engine`, which loads a fast BLAS first."""
