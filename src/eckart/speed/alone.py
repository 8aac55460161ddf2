"""Load a model, and run it once, in a process of its own: load time and peak memory that are its alone."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import api, hub, models
from ..errors import EckartError, ModelError
from ..memory import Watermark
from . import decoding
from .options import Setting
from .spread import Spread
from .timing import synchronise

_START = "from eckart.speed import alone; alone.main()"
_PACKAGES = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Request:
    """What the process is to do: load `source` so many times, and run it once with `setting`."""

    source: str
    setting: Setting
    loads: int
    threads: int
    seed: int
    dtype: str | None
    device: str | None
    trust_remote_code: bool


@dataclass(frozen=True, slots=True)
class Alone:
    """What a model took in a process of its own; bytes of a device that keeps count, else of main memory.

    Args:
        load: seconds of each loading, tokenizer included, weights on the device. The first one also imports
            the model's code, and finds no file in the cache of the system where it was not there before.
        resting: bytes before loading, interpreter and libraries.
        loading, running: peak bytes while it was loaded for the first time, and while the largest setting was
            run once after that. Weights that are used as they are stored may come when they are first used.
        exact: False where the system cannot tell the two peaks apart.
    """

    load: Spread
    resting: int
    loading: int
    running: int
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        own = {name: getattr(self, name) for name in ("resting", "loading", "running", "exact")}
        return {"load_seconds": self.load.to_dict(), **own}


def measure(request: Request) -> Alone:
    """Start the process and return what it found.

    Raises:
        ModelError: it ended early: the model cannot be loaded or run, or memory does not suffice.
    """
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-c", _START],
        input=json.dumps(asdict(request)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"the process that loads and runs {request.source} alone ended with {ended.returncode}: "
            f"{said[-1] if said else 'it said nothing (was memory too small for it?)'}; "
            "without load time and peak memory (--loads 0) there is none"
        )
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    if "error" in found:
        raise ModelError(found["error"])
    return Alone(**found | {"load": Spread(tuple(found["load"]))})


def main() -> None:
    """Read a request from stdin, write what was found, or the error, as one line of JSON on stdout."""
    asked = json.load(sys.stdin)
    request = Request(**asked | {"setting": Setting(**asked["setting"])})
    with contextlib.redirect_stdout(sys.stderr):  # code that the model brings may print
        try:
            found = _measured(request)
        except EckartError as error:
            found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


def _measured(request: Request) -> dict[str, Any]:
    torch.set_num_threads(request.threads)
    place = hub.device(request.device)
    torch.zeros(1, device=place)  # what a device sets up at first use is no part of loading
    mark = Watermark(place)
    seconds, loaded = _loaded(request, place)
    loading = mark.peak()
    second = Watermark(place)
    ids = decoding.prompt(request.setting, models.vocabulary(loaded.model), request.seed)
    decoding.greedy(loaded.model, ids, request.setting.new_tokens)
    running = second.peak()
    del loaded
    return {
        "load": [seconds, *(_loaded(request, place)[0] for _ in range(request.loads - 1))],
        "resting": mark.resting,
        "loading": loading,
        "running": running,
        "exact": mark.exact and second.exact,
    }


def _loaded(request: Request, place: torch.device) -> tuple[float, hub.Loaded]:
    start = time.perf_counter()
    found = api.loaded(request.source, None, request.dtype, request.device, request.trust_remote_code)
    synchronise(place)
    return time.perf_counter() - start, found
