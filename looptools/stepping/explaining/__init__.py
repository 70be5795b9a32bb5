"""What parts read and write, found in their code."""
