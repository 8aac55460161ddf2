"""Run a streamed compression, kill it with SIGKILL at random moments, start it again, until it ends.

    python tests/killed.py RECIPE OUT WORK KILLS SEED

Prints how many of the runs were killed before they ended.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from eckart.recipe import from_mapping
from eckart.streaming.execute import compress_to
from eckart.yaml_files import read_yaml


def child(recipe: str, out: str, work: str) -> int:
    """Start one run in a process of its own and return its number."""
    number = os.fork()
    if number:
        return number
    torch.set_num_threads(1)
    values = read_yaml(Path(recipe))
    compress_to(from_mapping(values, recipe), out, memory="8GB", work=work)
    os._exit(0)


def main() -> None:
    """Time one run, then kill others at random parts of that time."""
    recipe, out, work, kills, seed = sys.argv[1:]
    start = time.monotonic()
    ended = os.waitpid(child(recipe, f"{out}-whole", f"{work}-whole"), 0)[1]
    assert ended == 0
    lasts = time.monotonic() - start
    generator = random.Random(int(seed))
    killed = 0
    for _ in range(int(kills)):
        number = child(recipe, out, work)
        time.sleep(lasts * generator.uniform(0.05, 0.6))
        os.kill(number, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(number, 0)[1])
        if Path(out).exists():
            break
    if not Path(out).exists():
        assert os.waitpid(child(recipe, out, work), 0)[1] == 0
    print(killed)


if __name__ == "__main__":
    main()
