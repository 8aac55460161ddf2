"""The cache: statistics, decompositions and what the dense model measures, by all that can change them.

An entry is a folder of safetensors and JSON files, named by a hash of its key. It appears by one rename, so
that what is there is whole, whoever was interrupted; who wants what another process is making waits for it.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from .errors import ConfigError, StoreError
from .streaming.work import Work

FORMAT = 1
"""Of the entries: another one finds nothing of what was kept before."""
VARIABLE = "ECKART_CACHE"
"""The environment variable that names another folder."""
_MAKING, _LOCKS, _STALE = ".making-", ".locks", 24 * 3600.0
_SPARE = 1.05
Found = TypeVar("Found")


def default_folder() -> Path:
    """Return where the cache is unless another folder is named.

    $ECKART_CACHE; else `eckart` in $XDG_CACHE_HOME or ~/.cache (Linux), ~/Library/Caches (macOS) or
    %LOCALAPPDATA% (Windows).
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "eckart"


def shelf_to_read(named: Path | None, none: bool) -> "Shelf | None":
    """Return the cache of a command that takes what is there, and keeps only in a folder that is `named`.

    Raises:
        ConfigError: a folder is named, and none is wanted.
    """
    if named is not None and none:
        raise ConfigError(f"got a cache, {named}, and no cache: give one of them")
    return None if none else Shelf(named or default_folder(), writes=named is not None)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is kept: what it is, of which model, in how many bytes, since when (seconds)."""

    name: str
    kind: str
    source: str
    bytes: int
    made: float


@dataclass(frozen=True, slots=True)
class Shelf:
    """A cache folder.

    Args:
        folder: where; made when something is kept.
        writes: keep what is made, or only take what is there.
        used: filled with the kind of every entry that was asked for, and whether it was there.
    """

    folder: Path
    writes: bool = True
    used: dict[str, bool] = field(default_factory=dict)

    def fetch(
        self,
        kind: str,
        key: Mapping[str, Any],
        make: Callable[[], Found],
        write: Callable[[Work, Found], None],
        read: Callable[[Work], Found],
        size: Callable[[Found], int] = lambda made: 0,
        *,
        warnings: list[str],
    ) -> Found:
        """Return what is kept under `key`, or make it, and keep it.

        What cannot be kept, for want of room or of rights, is said in `warnings`; the run goes on.

        Args:
            kind: the first word of the entry's name.
            key: names and JSON values of all that can change the result.
            make: makes it.
            write: writes it into a work folder.
            read: reads it from there.
            size: the bytes that it will take.
            warnings: to be told to the user.

        Raises:
            StoreError: an entry that is there cannot be read.
        """
        place = self.folder / f"{kind}-{digest(key)[:32]}"
        self.used[kind] = self._has(place)
        if self.used[kind]:
            return read(Work(place))
        if not self.writes:
            return make()
        try:
            lock = self._lock(place.name)
        except OSError as error:
            warnings.append(f"nothing is cached: {self.folder} cannot be written ({error})")
            return make()
        with lock:
            if self._has(place):  # another process made it in the meantime
                self.used[kind] = True
                return read(Work(place))
            made = make()
            self._keep(place, key, lambda work: write(work, made), size(made), warnings)
            return made

    def _has(self, place: Path) -> bool:
        return (place / "key.json").is_file()

    def _lock(self, name: str) -> FileLock:
        folder = self.folder / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
        lock.release()
        return lock

    def _keep(
        self,
        place: Path,
        key: Mapping[str, Any],
        write: Callable[[Work], None],
        size: int,
        warnings: list[str],
    ) -> None:
        """Write an entry beside its place and rename it there."""
        self._sweep()
        free = shutil.disk_usage(self.folder).free
        if size * _SPARE > free:
            warnings.append(
                f"{place.name.partition('-')[0]} of {size / 1e9:.1f} GB are not cached: {self.folder} has "
                f"{free / 1e9:.1f} GB left; name another --cache, or pass --no-cache"
            )
            return
        making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.folder))
        try:
            # The key comes last: what has one is whole.
            write(Work(making))
            Work(making).write_json("key", dict(key))
            making.rename(place)
        except (OSError, StoreError) as error:
            warnings.append(f"{place.name.partition('-')[0]} could not be cached: {error}")
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete what interrupted processes left a day ago."""
        for left in self.folder.glob(f"{_MAKING}*"):
            if left.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(left, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Return what is kept, the newest first."""
        return sorted(self._entries(), key=lambda entry: -entry.made)

    def _entries(self) -> Iterator[Entry]:
        for place in self.folder.glob("*-*"):
            key = place / "key.json"
            if not key.is_file() or place.name.startswith("."):
                continue
            known = json.loads(key.read_text(encoding="utf-8"))
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            source = str(known.get("source", ""))
            yield Entry(place.name, place.name.partition("-")[0], source, size, key.stat().st_mtime)

    def bytes(self) -> int:
        """Return the size of all that is kept."""
        return sum(entry.bytes for entry in self._entries())

    def clear(self) -> int:
        """Delete all entries and what was left of interrupted ones; return the bytes that this freed.

        Whatever else is in the folder stays.
        """
        freed = self.bytes()
        for entry in self.entries():
            shutil.rmtree(self.folder / entry.name)
        for left in self.folder.glob(f"{_MAKING}*"):
            shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self.folder / _LOCKS, ignore_errors=True)
        return freed


def digest(values: Mapping[str, Any]) -> str:
    """Return the hash of JSON values, but for the source, which names a model and does not change it."""
    known = {name: value for name, value in values.items() if name != "source"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
