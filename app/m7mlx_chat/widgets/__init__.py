"""The parts of the chat's main screen."""
