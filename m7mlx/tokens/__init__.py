"""Text, conversations and token ids."""
