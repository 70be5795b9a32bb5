"""Where batches come from, and how their place is found again."""
