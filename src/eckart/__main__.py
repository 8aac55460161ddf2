"""python -m eckart, and torchrun ... -m eckart: the command line."""

from .cli import app

app()
