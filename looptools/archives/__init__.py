"""Files of tensors and plain values: written whole or not at all, proved by their checksum, read without harm."""
