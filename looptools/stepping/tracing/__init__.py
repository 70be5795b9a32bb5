"""What a part changes, measures and waits for."""
