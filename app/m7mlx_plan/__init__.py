"""m7mlx-plan: what a model takes of one machine or of several, before any of it is fetched."""
