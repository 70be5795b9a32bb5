"""Two runs in lock-step."""
