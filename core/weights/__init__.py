"""A model in the forms that others read: safetensors, a Hugging Face folder, an mlx-lm folder."""
