"""Low precision: how the numbers of a matrix are stored, and how they are chosen."""
