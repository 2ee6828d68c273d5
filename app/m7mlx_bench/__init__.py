"""m7mlx-bench: the speed of a model on this machine, against other engines in the same run."""
