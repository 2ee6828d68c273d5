"""m7mlx-bench: what this machine makes of a model, against other engines in the same run."""
