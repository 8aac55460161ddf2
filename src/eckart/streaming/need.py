"""How much memory and disk a streamed run needs, known before it starts."""

import shutil
from collections.abc import Iterable

import torch

from .. import models
from ..errors import ConfigError, StoreError
from ..hub import MB
from ..memory import resident
from ..models import Target
from ..stats import SKETCH, WIDEST_FULL
from .job import Job

_DOUBLE, _SINGLE = 8, 4
_MARGIN = 1.1
"""For what is not itemised: libraries' workspaces, pages that are not given back at once."""


def check(job: Job, limit: int) -> None:
    """Refuse a run that would not keep to `limit` bytes of memory, or that the disk has no room for.

    Raises:
        ConfigError: with the memory that is needed, and for what.
        StoreError: with the disk space that is needed.
    """
    parts = memory(job)
    needed = sum(parts.values())
    if needed > limit:
        most = max(parts, key=lambda name: parts[name])
        raise ConfigError(
            f"memory {limit / MB:,.0f} MB: this run needs {needed / MB:,.0f} MB, most of it for {most} "
            f"({parts[most] / MB:,.0f} MB): allow that much, or leave wide matrices out"
        )
    space = disk(job)
    free = shutil.disk_usage(job.work.folder).free
    if space > free:
        raise StoreError(
            f"{job.work.folder} has {free / MB:,.0f} MB left and the run needs {space / MB:,.0f} MB there "
            "until it is finished: make room, choose another --out, or fewer tokens"
        )


def memory(job: Job) -> dict[str, int]:
    """Return the most bytes that are in use at a time, by what for.

    One block's weights in the dtype to compute in, and beside them the most of: the same weights as they
    are read; the moments of the block and the activations of one window; the moments that are left and
    what it takes to decompose one matrix; or, without the block, embeddings or output head and logits.
    """
    blocks = [_block_bytes(job, index) for index in range(job.count)]
    largest = max(blocks)
    compute: torch.dtype = job.stream.model.dtype
    stored = largest * job.stored.itemsize // compute.itemsize
    gather = max(_moments(job, job.targets(i)) for i in range(job.count)) + _window(job)
    factor = max((_factoring(job, job.targets(i)) for i in range(job.count)), default=0)
    inside = {"reading a block": stored, "moments and one window": gather, "decomposing a matrix": factor}
    name = max(inside, key=lambda key: inside[key])
    ends = _ends(job)
    resting = {"the process itself": resident()}
    if ends > largest + inside[name]:
        return resting | {"embeddings, output head and logits": int(ends * _MARGIN)}
    return resting | {"one block": int(largest * _MARGIN), name: int(inside[name] * _MARGIN)}


def disk(job: Job) -> int:
    """Return the bytes of the work folder when it is fullest: activations and decompositions."""
    itemsize: int = job.stream.model.dtype.itemsize
    length = 0 if job.texts.calibration is None else job.texts.calibration.shape[1]
    hidden = job.rows * length * job.stream.width * itemsize
    steps = job.count + 1
    slopes = hidden * (steps if job.recipe.stores else 2)
    factors = sum(_kept(job, target) for target in job.found if target.ranked)
    output: int = sum(t.numel() for t in job.stream.model.state_dict().values()) * job.stored.itemsize
    return hidden * steps + slopes + factors + output


def _block_bytes(job: Job, index: int) -> int:
    block = job.stream.model.get_submodule(job.stream.names[index])
    return sum(tensor.numel() * tensor.element_size() for tensor in block.state_dict().values())


def _square(side: int) -> int:
    return side * side if side <= WIDEST_FULL else side


def _sketch(side: int) -> int:
    return side * SKETCH if side > WIDEST_FULL else 0


def _moments(job: Job, targets: Iterable[Target]) -> int:
    """Return the bytes of the moments of `targets`, of inputs and of outputs."""
    wanted = job.recipe.statistics()
    total = 0
    widths: set[tuple[str, int]] = set()
    for target in targets:
        outputs, inputs = target.shape
        if "gram" in wanted:
            widths.add((target.name.rpartition(".")[0], inputs))
        if "gradient" in wanted:
            total += _square(outputs)
    return _SINGLE * (total + sum(_square(width) + _sketch(width) for _, width in widths))


def _window(job: Job) -> int:
    """Return the bytes of one window on its way through a block and back."""
    length = 0 if job.texts.calibration is None else job.texts.calibration.shape[1]
    if job.texts.held_out is not None:
        length = max(length, job.texts.held_out.shape[1])
    config = job.stream.model.config.get_text_config()
    scores = 4 * getattr(config, "num_attention_heads", 1) * length * length
    sides = max(sum(sum(target.shape) for target in job.targets(index)) for index in range(job.count))
    itemsize: int = job.stream.model.dtype.itemsize
    return itemsize * (scores + 3 * length * sides)


def _factoring(job: Job, targets: list[Target]) -> int:
    """Return the bytes of decomposing the matrix that takes most, with the moments of those after it."""
    most = 0
    for place, target in enumerate(targets):
        rows, columns = target.shape
        small, large = sorted(target.shape)
        square, product = small * small, rows * columns
        # Making and checking the larger metric; the eigendecomposition; the factors made of it.
        work = _square(large) + max(
            2 * _square(large) + 2 * square, 2 * product + 7 * square, 3 * product + 4 * square
        )
        if job.dimensions([target]):
            # The metrics and the factors stay; beside them are two squares of a Cholesky factor and an
            # inverse, or of a step of elimination, and the weight in three forms.
            work = max(work, 3 * _square(large) + 3 * square + 4 * product)
        if job.recipe.stores:
            work += 2 * _square(large)
        most = max(most, _DOUBLE * work + _moments(job, targets[place:]))
    return most


def _ends(job: Job) -> int:
    """Return the bytes of embeddings or output head, and of the logits of one window with their gradients."""
    model = job.stream.model
    sizes = [0]
    for name in (job.stream.table, job.stream.head):
        if name is not None:
            module = model.get_submodule(name)
            sizes.append(sum(p.numel() * p.element_size() for p in module.parameters()))
    length = 0 if job.texts.calibration is None else job.texts.calibration.shape[1]
    logits = 4 * _SINGLE * length * models.vocabulary(model)
    whole = sum(sizes) if job.targets(None) else max(sizes)
    itemsize: int = model.dtype.itemsize
    return whole * (itemsize + job.stored.itemsize) // itemsize + logits


def _kept(job: Job, target: Target) -> int:
    rows, columns = target.shape
    small = min(target.shape)
    kept = small * (rows + columns)
    if job.dimensions([target]):
        kept += columns * (columns + rows)
    return _SINGLE * kept
