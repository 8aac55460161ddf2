"""Models for other engines: traced, stored in few bits, checked against PyTorch, and run."""
