"""m7mlx-plan: what a model takes of one machine or several, before any of it is fetched."""
