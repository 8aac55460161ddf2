"""Statistics of what flows through modules: the only owner of hooks.

Every statistic is a mean over the tokens that the module saw. Products are formed in float32
(whatever the model computes in) and summed in float32 or float64.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import ConfigError, ModelError, NotFinite

Statistic = Literal["gram", "absolute", "gradient", "fisher", "sketch"]
STATISTICS: dict[Statistic, str] = {
    "gram": "E[x x^T] of the input (n, n)",
    "absolute": "E[|x|] of the input (n,)",
    "gradient": "E[g g^T] of the gradient at the output (m, m)",
    "fisher": "sum over outputs of E[(dL/dW)^2], one number per input column (n,), per window",
}
_OF_INPUT: tuple[Statistic, ...] = ("gram", "absolute", "sketch")
_RECENT_INPUTS = 4
WIDEST_FULL = 16_384
"""A side wider than this (a vocabulary) gets the diagonal of its second moment; of inputs a sketch, too."""
SKETCH = 512
"""Columns of a sketch: the second moment times always the same random matrix (eckart.nystrom.WideMetric)."""


@dataclass(slots=True)
class Moment:
    """A running sum and the number of samples in it; `filled` up by others where that were too few."""

    total: Tensor
    count: int = 0
    filled: bool = False

    def add(self, value: Tensor, count: int) -> None:
        """Add a sum over `count` samples."""
        self.total += value
        self.count += count

    def mean(self) -> Tensor:
        """Return total / count.

        Raises:
            ModelError: nothing was added.
            NotFinite: the sum is NaN or infinite.
        """
        if not self.count:
            raise ModelError("a statistic saw no tokens: its module did not run on the calibration text")
        if not bool(torch.isfinite(self.total).all()):
            raise NotFinite(
                "a statistic is NaN or infinite: the model overflows on the calibration text; "
                "load it in a wider dtype"
            )
        return self.total / self.count


@dataclass(slots=True)
class Stats:
    """What `collect` gathered. Modules that read the same tensor share the statistics of the input."""

    moments: dict[tuple[Statistic, str], Moment] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)

    def leader(self, name: str) -> str:
        """Return the first of the modules that read the same input as `name`."""
        return self.leaders.get(name, name)

    def moment(self, statistic: Statistic, name: str) -> Moment:
        """Return the accumulator of `statistic` for module `name`.

        Raises:
            ModelError: it was not collected, or the module did not run.
        """
        key = self.leader(name) if statistic in _OF_INPUT else name
        if (statistic, key) not in self.moments:
            raise ModelError(
                f"no {statistic!r} statistic for {name}: it was not collected, or the module did not "
                "run on the calibration text (leave it out with --exclude)"
            )
        return self.moments[statistic, key]

    def forget(self, names: Sequence[str]) -> None:
        """Free the statistics of `names`, but not of an input that another module still shares."""
        for name in names:
            self.leaders.pop(name, None)
        inputs, outputs = set(self.leaders.values()), set(self.leaders)
        for statistic, key in list(self.moments):
            if key not in (inputs if statistic in _OF_INPUT else outputs):
                del self.moments[statistic, key]


@dataclass(slots=True)
class Padding:
    """Which rows of the current batch are real; whoever runs the model sets it before each pass.

    owners: for each module, which of the masks its rows belong to; all rows of others are real.
    masks: (samples, positions), true where there is something, by the keys that `owners` names.
    samples: how many samples the batch has.
    """

    owners: Mapping[str, str]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    samples: int = 1

    def real(self, name: str, rows: int, places: Tensor | None = None) -> Tensor | None:
        """Return which of the `rows` that module `name` got are real (rows,), None where all are.

        `places` are the positions (rows,) of a module that does not get all of them (an expert). One row
        for each sample is what was taken out of it: no padding.

        Raises:
            ModelError: there is padding, and the rows are not the positions of its mask.
        """
        mask = self.masks.get(self.owners.get(name, ""))
        if mask is None or bool(mask.all()):
            return None
        flat = mask.flatten()
        if places is not None:
            return flat[places]
        if rows == len(flat):
            return flat
        if rows == self.samples:
            return None
        raise ModelError(
            f"{name} reads {rows} rows, and the mask has {mask.shape[0]} x {mask.shape[1]} positions with "
            "padding: which rows are real cannot be told; give samples of one length, or one at a time"
        )

    def samples_of(self, name: str, rows: int, places: Tensor | None = None) -> Tensor:
        """Return to which sample each of the `rows` of module `name` belongs (rows,).

        Rows that are not shared out evenly over the samples count as one.
        """
        mask = self.masks.get(self.owners.get(name, ""))
        if places is not None:
            return places // mask.shape[1] if mask is not None else torch.zeros_like(places)
        each = rows // self.samples if rows % self.samples == 0 else rows
        return torch.arange(rows) // max(1, each)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).to(torch.float32)


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Let products be those of float32 where the model runs under autocast, whose hooks run under it, too.

    A second moment in bfloat16 is neither near enough nor positive semidefinite.
    """
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _chosen(rows: Tensor, real: Tensor | None) -> Tensor:
    return rows if real is None else rows[real.to(rows.device)]


def _second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows if rows.shape[1] <= WIDEST_FULL else rows.square().sum(0)


@lru_cache(maxsize=2)
def sketch_columns(size: int) -> Tensor:
    """Return the columns (size, k) that a second moment of a wide input is multiplied by, float32.

    Gaussian, and the same for every input of this size.
    """
    return torch.randn(size, min(SKETCH, size), generator=torch.Generator().manual_seed(size))


def _weight_gradient(rows: Tensor, inputs: Tensor, width: int) -> Tensor:
    """Return the gradient (m, n) of the weight, from those of the outputs and from the inputs, row by row."""
    if inputs.is_floating_point():
        return rows.T @ inputs
    return rows.new_zeros(width, rows.shape[1]).index_add_(0, inputs, rows).T


def _on_backward(output: Tensor, listen: Callable[[Tensor], None]) -> None:
    """Call `listen` with the gradient at `output`, rows first, whatever is done to it in place afterwards.

    A hook of a view is lost when the view is changed in place, and a linear map with a bias returns one.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        output.register_hook(listen)  # type: ignore[no-untyped-call]
    else:
        width = output.shape[-1]
        base.grad_fn.register_prehook(lambda gradients: listen(gradients[0].reshape(-1, width)))


@dataclass(slots=True)
class _Collector:
    stats: Stats
    wanted: frozenset[Statistic]
    precision: torch.dtype
    padding: Padding | None = None
    recent: deque[tuple[Tensor, int, str]] = field(default_factory=lambda: deque(maxlen=_RECENT_INPUTS))
    open: bool = True

    def add(self, statistic: Statistic, key: str, value: Tensor, count: int) -> None:
        if (statistic, key) not in self.stats.moments:
            self.stats.moments[statistic, key] = Moment(torch.zeros_like(value, dtype=self.precision))
        self.stats.moments[statistic, key].add(value, count)

    def is_first_reader(self, name: str, inputs: Tensor) -> bool:
        """Tell whether `name` leads its group, which the first forward decides and later ones must keep."""
        # A tensor that was changed in place is another input; inference mode does not keep count.
        version = 0 if inputs.is_inference() else inputs._version
        known = (leader for tensor, then, leader in self.recent if tensor is inputs and then == version)
        seen = next(known, None)
        leader = self.stats.leaders.setdefault(name, seen or name)
        if leader == name:
            self.recent.append((inputs, version, name))
        elif leader != seen:
            raise ModelError(
                f"{name} and {leader} read one tensor on the first window and two on a later one: "
                "leave one of them out with --exclude"
            )
        return leader == name

    def real(self, name: str, rows: int, places: Tensor | None) -> Tensor | None:
        return None if self.padding is None else self.padding.real(name, rows, places)

    def on_input(self, name: str, inputs: Tensor, width: int, places: Tensor | None) -> None:
        if not self.is_first_reader(name, inputs):
            return
        if not inputs.is_floating_point():
            ids = inputs.flatten()
            self.on_ids(name, _chosen(ids, self.real(name, len(ids), places)), width)
            return
        rows = _rows(inputs)
        rows = _chosen(rows, self.real(name, len(rows), places))
        if "gram" in self.wanted:
            self.add("gram", name, _second_moment(rows), len(rows))
            if rows.shape[1] > WIDEST_FULL:
                products = rows.T @ (rows @ sketch_columns(rows.shape[1]).to(rows.device))
                self.add("sketch", name, products, len(rows))
        if "absolute" in self.wanted:
            self.add("absolute", name, rows.abs().sum(0), len(rows))

    def on_ids(self, name: str, ids: Tensor, width: int) -> None:
        """An id is a one-hot input: both statistics are its frequency, by Laplace's rule of succession."""
        for statistic in _OF_INPUT:
            if statistic in self.wanted:
                counts = torch.bincount(ids, minlength=width)
                if (statistic, name) not in self.stats.moments:
                    self.add(statistic, name, torch.ones_like(counts, dtype=torch.float32), width)
                self.add(statistic, name, counts, ids.numel())

    def on_output(self, name: str, inputs: Tensor, output: Tensor, width: int, places: Tensor | None) -> None:
        if not output.requires_grad or not {"gradient", "fisher"} & self.wanted:
            return
        kept = inputs.detach() if "fisher" in self.wanted else None
        count = output.numel() // output.shape[-1]
        real = self.real(name, count, places)
        samples = None if self.padding is None else self.padding.samples_of(name, count, places)

        def on_gradient(gradient: Tensor) -> None:
            if not self.open:
                return
            rows = _rows(gradient)
            with _exactly(rows.device):
                if "gradient" in self.wanted:
                    chosen = _chosen(rows, real)
                    self.add("gradient", name, _second_moment(chosen), len(chosen))
                if kept is not None:
                    self.add_fisher(name, rows, kept, width, real, samples)

        _on_backward(output, on_gradient)

    def add_fisher(
        self,
        name: str,
        rows: Tensor,
        inputs: Tensor,
        width: int,
        real: Tensor | None,
        samples: Tensor | None,
    ) -> None:
        """Add the squares of the gradient of the weight, sample by sample; without padding all are one."""
        flat = _rows(inputs) if inputs.is_floating_point() else inputs.flatten()
        if samples is None:
            self.add("fisher", name, _weight_gradient(rows, flat, width).square().sum(0), 1)
            return
        samples = samples.to(rows.device)
        for sample in sorted(set(samples.tolist())):
            chosen = samples == sample if real is None else (samples == sample) & real.to(rows.device)
            if bool(chosen.any()):
                gradient = _weight_gradient(rows[chosen], flat[chosen], width)
                self.add("fisher", name, gradient.square().sum(0), 1)


@contextmanager
def collect(
    model: nn.Module,
    names: Sequence[str],
    wanted: Sequence[Statistic],
    *,
    precision: torch.dtype = torch.float32,
    padding: Padding | None = None,
) -> Iterator[Stats]:
    """Gather statistics of the named modules of `model` while the context is open.

    Works for any nn.Module whose named modules take a tensor (..., n) first and return a tensor
    (..., m). Statistics of gradients need a backward pass inside the context, through outputs that
    require a gradient (parameters need none); 'fisher' expects one window per backward pass.

    With `padding`, which the caller keeps up to date, batches may hold several samples: padding counts in
    no statistic, and a sample is what was a window. A module that gets some of the positions only says
    which by an attribute `routed (rows,)`, their indices among (samples x positions).

    A module that is called twice in one window counts as two windows for 'fisher'. Inside
    torch.inference_mode, a tensor that is changed in place between two readers passes for one input.

    Args:
        model: the module that will be run.
        names: dotted names of its submodules.
        wanted: keys of STATISTICS.
        precision: of the sums, float32 or float64.
        padding: what of the current batch is real; default: all of it.

    Raises:
        ModelError: a name is not a submodule.
        ConfigError: a statistic is not one of STATISTICS.
    """
    unknown = [name for name in wanted if name not in STATISTICS]
    if unknown:
        raise ConfigError(f"statistic {unknown[0]!r}: legal are {', '.join(STATISTICS)}")
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ModelError(f"no module named {missing[0]}")
    stats = Stats()
    collector = _Collector(stats, frozenset(wanted), precision, padding)
    handles = [modules[name].register_forward_hook(_hook(collector, name)) for name in names]
    try:
        yield stats
    finally:
        collector.open = False
        for handle in handles:
            handle.remove()


def _hook(collector: _Collector, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not args:
            raise ModelError(f"{name} is called by keyword: leave it out with --exclude")
        width: int = getattr(module, "num_embeddings", args[0].shape[-1])
        places: Tensor | None = getattr(module, "routed", None)
        with _exactly(args[0].device):
            collector.on_input(name, args[0], width, places)
        collector.on_output(name, args[0], output, width, places)

    return on_forward
