"""Models larger than memory: one transformer block at a time, from the weight files to the weight files."""
