"""What makes MLX's CPU backend on Linux fast; no other system needs it."""
