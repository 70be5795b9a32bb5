"""One middleware a file, named after what it does."""
