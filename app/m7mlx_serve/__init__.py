"""m7mlx-serve: an OpenAI-compatible server for many clients at once, on this machine alone unless told otherwise."""
