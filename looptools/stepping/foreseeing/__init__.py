"""The run walked through without model and data."""
