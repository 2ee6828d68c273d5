"""m7mlx-eval: the quality of a model: perplexity, distance from another, lm-evaluation-harness."""
