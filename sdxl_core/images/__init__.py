"""Pictures: from bytes on disk to the pixels a bucket wants."""
