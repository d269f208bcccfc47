"""Small texts that the demo uses."""
