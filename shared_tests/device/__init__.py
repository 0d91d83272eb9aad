"""What scripts/gpu_check and scripts/mac_check run: a driver without a framework, and items that are processes."""
