"""Copies of a pipe that share nothing with it."""
