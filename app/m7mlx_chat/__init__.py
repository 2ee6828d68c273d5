"""m7mlx-chat: a chat in the terminal with a model on this machine."""
