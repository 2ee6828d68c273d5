"""What opens over the chat and gives something back."""
