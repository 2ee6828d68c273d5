"""m7mlx-chat: a chat in the terminal with a model on this machine."""

ENGINE_THREAD = "m7mlx-engine"  # the name of the one thread that computes
