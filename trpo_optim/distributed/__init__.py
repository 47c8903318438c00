"""One step over many processes."""
