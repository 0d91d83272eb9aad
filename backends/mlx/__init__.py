"""The MLX realisation. Import it through `core.engine.loading.load_engine`, which loads a fast BLAS first."""
