"""eckart: find the low-rank structure of a language model, shrink the model by it, say what it cost."""

__version__ = "0.1.0"
