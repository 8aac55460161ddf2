"""Where a table of times comes from: a file, a measurement, or what the file had with the rest measured."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import appearing
from ..errors import StoreError
from ..stages import Watch
from . import grid, times
from .times import Kind, Shape, Times


def obtain(
    file: str | Path | None,
    wanted: Sequence[tuple[Shape, Kind]],
    tokens: int,
    place: torch.device,
    dtype: torch.dtype,
    watch: Watch | None = None,
) -> Times:
    """Return a table with all of `wanted` for so many tokens; what `file` lacks is measured and added to it.

    Args:
        file: a JSON file to read, and to write; None: everything is measured, and kept nowhere.
        wanted: shapes (m, n) and kinds.
        tokens: at once.
        place, dtype: to measure on.
        watch: (stage, done, total) of what is measured.

    Raises:
        ConfigError: the file is of another device, processor, dtype, number of threads or torch.
        StoreError: it cannot be read or written.
    """
    here = grid.here(place, dtype)
    found = Times(here)
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        found = read(path)
        times.check_same(found, here, str(path))
    lacking = list(dict.fromkeys(shape for shape, _ in found.lacking(wanted, tokens)))
    for done, shape in enumerate(lacking):
        # Times of one shape are compared with one another: they come from the same rounds.
        known = [(row.shape, row.kind) for row in found.rows if row.tokens == tokens]
        own = [one for one in dict.fromkeys([*wanted, *known]) if one[0] == shape]
        rows = grid.measure(own, tokens, place, dtype, watch=partial(_part, watch, done, len(lacking)))
        kept = [row for row in found.rows if (row.shape, row.tokens) != (shape, tokens)]
        found = Times(here, (*kept, *rows))
        if path is not None:
            with appearing(path, "the table of times ") as partial_file:
                partial_file.write_text(found.to_json(), encoding="utf-8")
    return found


def _part(watch: Watch | None, before: int, parts: int, stage: str, done: int, total: int) -> None:
    if watch is not None:
        watch(stage, before * total + done, parts * total)


def read(path: Path) -> Times:
    """Return the table in the file at `path`.

    Raises:
        StoreError: it cannot be read, or is no table of times.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"the table of times {path} cannot be read: {error}") from error
    return times.from_json(text, str(path))
