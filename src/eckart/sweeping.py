"""Methods, sizes and storages, all measured: in parallel, and again from where it was interrupted."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from filelock import FileLock, Timeout

from . import api, hub, identity, pipeline, recipe, render
from .api import Sources, sources
from .checkpoint import appearing
from .curving import Cache, shelf_of
from .errors import ConfigError, ModelError, StoreError
from .recipe import FLOAT, Of
from .stages import Watch, silent
from .streaming.work import Work
from .sweep_group import Settings, load_row, run_group
from .sweeps import Combination, Sweep

METHODS = ("svd-llm", "eckart")
KEEPS = (0.9, 0.8, 0.6)
RESULT = "sweep.json"
_COMMON = (
    "of", "tokens", "gradient_tokens", "seq_len", "eval_tokens", "seed", "dtype", "include", "exclude",
)  # fmt: skip
_START = "from eckart import sweep_group; sweep_group.main()"
_PACKAGES = Path(__file__).parents[1]
_POLL = 0.2


def sweep(
    model: Any,
    text: Sources,
    *,
    out: str | Path,
    methods: Sequence[str] = METHODS,
    keeps: Sequence[float] = KEEPS,
    storages: Sequence[str] = (FLOAT,),
    of: Of | None = None,
    eval_text: Sources | None = None,
    include: Sources | None = None,
    exclude: Sources | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    eval_tokens: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool | None = None,
    devices: Sequence[str] = (),
    jobs: int = 1,
    speed: bool = False,
    cache: Cache = True,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> Sweep:
    """Measure all combinations of `methods`, `keeps` and `storages`; find the front of bytes and perplexity.

    Rows are kept in `out` as they come, so that the same call goes on after an interruption, with more
    combinations, too; what failed is tried again. Calibration is shared through the cache wherever
    methods have the same statistics, decompositions where they have the same metrics.

    Args:
        model: a hub id, a folder, a .gguf file; or a model, for one process only, which stays as it is.
        text: to calibrate on; without `eval_text` its last 5 % are measured on.
        out: the folder of the rows, one JSON file each, and of sweep.json.
        methods: presets, each alone or with a form: eckart, eckart/pivoted, eckart/width, eckart/stock.
        keeps: in (0, 1].
        storages: float, or names of eckart.quant.storage.STORAGES.
        devices: one process for each, such as cuda:0, cuda:1.
        jobs: so many processes on one device, which share the threads of a CPU.
        speed: time decoding as well.
        cache: as in `curve`.

    The others are explained in eckart.recipe.Recipe.

    Raises:
        ConfigError: an argument is not legal.
        ModelError: the model cannot be loaded, or a process ended early; rows that are finished stay.
        StoreError: `out` holds a sweep of other inputs, or another process is at work in it.
    """
    given = {
        "of": of, "text": sources(text), "eval_text": sources(eval_text), "include": sources(include),
        "exclude": sources(exclude), "tokens": tokens, "gradient_tokens": gradient_tokens,
        "seq_len": seq_len, "eval_tokens": eval_tokens, "seed": seed, "dtype": dtype,
        "trust_remote_code": trust_remote_code, "model": str(model) if _named(model) else None,
    }  # fmt: skip
    common = recipe.override({}, given)
    every = product(dict.fromkeys(methods), dict.fromkeys(storages), dict.fromkeys(keeps))
    wanted = [Combination(method, keep, storage) for method, storage, keep in every]
    places = _places(devices, jobs, speed, model)
    shelf = shelf_of(cache)
    settings = Settings(str(out), common, None if shelf is None else str(shelf.folder), speed)
    known = None if _named(model) else api.loaded(model, tokenizer, None, None, False)
    return _swept(_source(model), settings, wanted, places, _protocol(common, model), known, watch or silent)


def _swept(
    source: str,
    settings: Settings,
    wanted: Sequence[Combination],
    places: "Sequence[_Place]",
    protocol: Mapping[str, Any],
    known: hub.Loaded | None,
    watch: Watch,
) -> Sweep:
    """Measure what is missing, and return everything."""
    folder = Path(settings.folder)
    work = Work.opened(folder, protocol)
    with _alone(work):
        groups: dict[tuple[str, str], list[Combination]] = {}
        for one in wanted:
            row = load_row(work, one, settings.speed)
            if row is None or not row.ok:
                groups.setdefault((one.method, one.storage), []).append(one)
        runner = _Runner(settings, work, wanted, watch)
        if len(places) == 1:
            runner.here(list(groups.values()), places[0].device, known)
        else:
            runner.apart(list(groups.values()), places)
        rows = [row for one in wanted if (row := load_row(work, one, False)) is not None]
        found = Sweep.of(source, str(folder), protocol, rows)
        with appearing(folder / RESULT) as partial:
            partial.write_text(render.to_json(found.to_dict()) + "\n", encoding="utf-8")
    return found


def _named(model: Any) -> bool:
    return isinstance(model, (str, Path))


def _source(model: Any) -> str:
    return str(model) if _named(model) else type(model).__name__


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a process runs, and on how many threads (0: as many as it likes)."""

    device: str | None
    threads: int


def _places(devices: Sequence[str], jobs: int, speed: bool, model: Any) -> list[_Place]:
    if jobs < 1 or isinstance(jobs, bool) or (devices and jobs > 1):
        given = ", ".join(devices) or "none"
        raise ConfigError(f"jobs {jobs}, devices {given}: give a number of jobs of at least 1, or devices")
    for device in devices:
        hub.device(device)
    count = max(len(devices), jobs)
    if count > 1 and not _named(model):
        raise ConfigError("several processes each load the model: give its name instead of the model")
    if speed and jobs > 1:
        raise ConfigError("speed is measured by one process at a time: leave out jobs")
    if devices:
        return [_Place(device, 0) for device in devices]
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    return [_Place(None, threads)] * jobs


def _protocol(common: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return all that can change a row, and is the same in all of them."""
    whole = recipe.from_mapping({**common, "keep": 1.0, "method": "svd"}, "sweep")
    found: dict[str, Any] = {name: getattr(whole, name) for name in _COMMON}
    for name in ("text", "eval_text"):
        found[name] = [identity.of_source(source) for source in getattr(whole, name)]
    found["model"] = identity.of_source(str(model)) if _named(model) else identity.of_model(model)["tensors"]
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@contextmanager
def _alone(work: Work) -> Iterator[None]:
    lock = FileLock(work.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(
            f"another process is at work in {work.folder}: wait for it, or choose another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs groups and reports how many rows there are."""

    settings: Settings
    work: Work
    wanted: Sequence[Combination]
    watch: Watch
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def tick(self) -> None:
        done = sum(self.work.has(f"rows/{one.name}.json") for one in self.wanted)
        self.watch("sweep", done, len(self.wanted))

    def here(self, groups: Sequence[list[Combination]], device: str | None, known: hub.Loaded | None) -> None:
        """Run all groups in this process, one after the other."""
        if groups and known is None:
            self.watch("load", 0, 1)
            known = pipeline.load_for(self.settings.recipe_for(groups[0][0], device))
        for group in groups:
            self.tick()
            run_group(self.settings, group, device, self.watch, known)
        self.tick()

    def apart(self, groups: Sequence[list[Combination]], places: Sequence[_Place]) -> None:
        """Run the groups in processes, one at a time in each place.

        Raises:
            ModelError: a process ended early; the others were let go on.
        """
        queue: SimpleQueue[list[Combination]] = SimpleQueue()
        for group in groups:
            queue.put(group)
        with ThreadPoolExecutor(len(places)) as pool:
            tasks = [pool.submit(self._serve, place, queue) for place in places]
            try:
                while not all(task.done() for task in tasks):
                    self.tick()
                    time.sleep(_POLL)
            except BaseException:
                while True:
                    try:
                        queue.get_nowait()
                    except Empty:
                        break
                for process in self.running:
                    process.terminate()
                raise
        self.tick()
        said = [line for task in tasks for line in task.result()]
        if said:
            raise ModelError(
                f"{len(said)} of the processes ended early, the others went on and rows are kept: {said[0]}"
            )

    def _serve(self, place: _Place, queue: "SimpleQueue[list[Combination]]") -> list[str]:
        """Run groups until there are none, and return what ended early."""
        ended: list[str] = []
        while True:
            try:
                group = queue.get_nowait()
            except Empty:
                return ended
            asked = {
                "settings": asdict(self.settings), "group": [asdict(one) for one in group],
                "device": place.device, "threads": place.threads,
            }  # fmt: skip
            paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
            process = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
            self.running.append(process)
            _, errors = process.communicate(json.dumps(asked))
            if process.returncode:
                lines = [line for line in errors.splitlines() if line.strip()]
                said = lines[-1] if lines else "it said nothing (was memory too small for it?)"
                ended.append(f"{group[0].method}, {group[0].storage} ({process.returncode}): {said}")
