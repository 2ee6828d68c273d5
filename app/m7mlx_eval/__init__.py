"""m7mlx-eval: how good a model is: perplexity, distance from another one, tasks of lm-evaluation-harness."""
