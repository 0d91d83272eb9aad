"""The MLX realisation. Import it through `core.engine.protocol.load_engine`, which loads a fast BLAS first."""
