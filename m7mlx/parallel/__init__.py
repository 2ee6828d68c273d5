"""Several processes that share one model."""
