"""m7mlx-serve: a server with OpenAI's API for many clients at once, on this machine by default."""
