"""The failure that only stored conversations can have."""

from m7mlx.errors import InputError


class StoreError(InputError):
    """The database of conversations is damaged, foreign or newer, or lacks what is asked for."""
