"""m7mlx-convert: Hugging Face weights or a GGUF file → an MLX model folder, tensor by tensor."""
