"""Accuracy on tasks: what a model gets right, and what it lost against another on the same samples."""
