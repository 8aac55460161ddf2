"""Published methods as rows of data: which metric on which side, which allocation, which form."""

from dataclasses import dataclass
from typing import Literal

import torch

from .errors import ConfigError
from .factors import FORMS, Form
from .linalg import Metric
from .nystrom import WideMetric
from .stats import Moment, Statistic, Stats, sketch_columns
from .width import Landmarks

InputMetric = Literal["identity", "fisher", "absolute", "gram"]
OutputMetric = Literal["identity", "gradient"]
Allocation = Literal["uniform", "curvature"]
Shape = Literal["factored", "pivoted", "shared", "width", "mixed"]
TargetMap = Literal["original", "anchored"]

INPUT_METRICS: tuple[InputMetric, ...] = ("identity", "fisher", "absolute", "gram")
OUTPUT_METRICS: tuple[OutputMetric, ...] = ("identity", "gradient")
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "curvature")
SHAPES: tuple[Shape, ...] = (*FORMS, "shared", "width", "mixed")


@dataclass(frozen=True, slots=True)
class Method:
    """One choice along the axes of low-rank factorization.

    inputs: metric H on the input side. `identity`; `fisher`: diagonal, the Fisher information of
        each column of W, whose root scales W (FWSVD); `absolute`: diagonal (E|x|)^(2 alpha), that
        is (E|x|)^alpha applied to W once (ASVD); `gram`: E[x x^T].
    outputs: metric C on the output side: `identity` or `gradient`, E[g g^T].
    allocation: `uniform` keeps the same share of every matrix; `curvature` spends one budget where
        the estimated loss falls most, and needs outputs = gradient to have one unit.
    form: how the map is stored and run. `factored` and `pivoted`: each matrix at a rank of its own;
        `shared`: two factors, the right one common to the matrices of the same name in consecutive blocks;
        `width`: hidden dimensions made narrower, other matrices as they are; `mixed`: each module
        by width or pivoted, whichever the allocation takes, and the other matrices pivoted.
    landmarks: how the units to keep of a hidden dimension are chosen.
    target: what is approximated, the `original` map, or the one that best reproduces its outputs from the
        inputs seen after everything before it was compressed (`anchored`, see eckart.closed).
    """

    inputs: InputMetric
    outputs: OutputMetric
    allocation: Allocation
    form: Shape
    source: str
    landmarks: Landmarks = "curvature"
    target: TargetMap = "original"

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that the two metrics are made of."""
        inputs: tuple[Statistic, ...] = () if self.inputs == "identity" else (self.inputs,)
        return inputs if self.outputs == "identity" else (*inputs, "gradient")

    @property
    def low_rank(self) -> Form | None:
        """Return the form of matrices that get a rank, None where none does."""
        if self.form == "width":
            return None
        if self.form == "shared":
            return "factored"
        return "pivoted" if self.form == "mixed" else self.form

    @property
    def narrows(self) -> bool:
        """Tell whether hidden dimensions may be made narrower."""
        return self.form in ("width", "mixed")

    @property
    def needs_text(self) -> bool:
        """Tell whether the method looks at data."""
        return bool(self.statistics())


METHODS: dict[str, Method] = {
    "svd": Method("identity", "identity", "uniform", "factored", "Eckart & Young 1936"),
    "fwsvd": Method("fisher", "identity", "uniform", "factored", "Hsu et al. 2022, arXiv:2207.00112"),
    "asvd": Method("absolute", "identity", "uniform", "factored", "Yuan et al. 2023, arXiv:2312.05821"),
    "svd-llm": Method("gram", "identity", "uniform", "factored", "Wang et al. 2024, arXiv:2403.07378"),
    "io-svd": Method("gram", "gradient", "uniform", "factored", "IO-SVD 2026, arXiv:2605.15626"),
    "pifa": Method("gram", "identity", "uniform", "pivoted", "Zhao et al. 2025, arXiv:2501.19090"),
    "aa-svd": Method(
        "gram",
        "identity",
        "uniform",
        "factored",
        "AA-SVD 2026, arXiv:2604.02119, without its training",
        target="anchored",
    ),
    "basis-sharing": Method("gram", "identity", "uniform", "shared", "Wang et al. 2024, arXiv:2410.03765"),
    "nystrom-mlp": Method(
        "gram", "identity", "uniform", "width", "Lin et al. 2024, arXiv:2408.09632, the MLPs", "leverage"
    ),
    "eckart": Method("gram", "gradient", "curvature", "mixed", "this package, docs/compress.md"),
}
DEFAULT = "eckart"


def get(name: str) -> Method:
    """Return the preset `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: legal are {', '.join(METHODS)}")
    return METHODS[name]


def input_metric(method: Method, stats: Stats, name: str, size: int, damp: float, alpha: float) -> Metric:
    """Return H for module `name` of input width `size`, damped by `damp` (relative).

    Of a very wide input it is a sketch: low rank plus a diagonal.
    """
    if method.inputs == "identity":
        return Metric(size)
    mean = stats.moment(method.inputs, name).mean()
    if method.inputs == "absolute":
        mean = mean.double().pow(2 * alpha)
    if method.inputs == "gram" and ("sketch", stats.leader(name)) in stats.moments:
        products = stats.moment("sketch", name).mean()
        return WideMetric(mean, products, sketch_columns(size).to(products.device), damp)
    return Metric(size, mean, damp)


def output_metric(method: Method, stats: Stats, name: str, size: int, damp: float) -> Metric:
    """Return C for module `name` of output width `size`, damped by `damp` (relative)."""
    if method.outputs == "identity":
        return Metric(size)
    return Metric(size, stats.moment("gradient", name).mean(), damp)


def tied_metrics(
    method: Method, stats: Stats, table: str, head: str, shape: tuple[int, int], damp: float, alpha: float
) -> tuple[Metric, Metric]:
    """Return (H, C) for an embedding table, the map of `shape` (d, v), and the head that is tied to it.

    Its error has two terms per token t, of the looked-up row and of the logit: the row's error e
    costs f_t e^T C e + c_t e^T H e, with f the frequencies, C the gradients of rows, H the inputs of
    the head and c the squared gradients of logits. The one metric that stands for both has the sum
    of the (d, d) parts, and the mean of the (v,) parts weighted by the traces. Without gradients
    the two terms have no common unit, and the head's decides alone.
    """
    dim, count = shape
    if method.outputs == "identity":
        return Metric(count), input_metric(method, stats, head, dim, damp, alpha)
    frequency = stats.moment("gram", table).mean().double()
    logit = stats.moment("gradient", head).mean().double()
    if logit.ndim == 2:
        logit = logit.diagonal()
    rows = stats.moment("gradient", table).mean().double() * frequency.mean()
    inputs = stats.moment("gram", head).mean().double() * logit.mean()
    shares = torch.stack([rows.trace(), inputs.trace()]) / (rows.trace() + inputs.trace())
    tokens = shares[0] * frequency / frequency.mean() + shares[1] * logit / logit.mean()
    return Metric(count, tokens, damp), Metric(dim, rows + inputs, damp)


def is_zero(moment: Moment) -> bool:
    """Tell whether nothing but zeros was seen."""
    total = moment.total if moment.total.ndim == 1 else moment.total.diagonal()
    return moment.count > 0 and not bool(total.any())


def shortage(moment: Moment) -> int:
    """Return how many tokens a full moment lacks to have full rank (0: none)."""
    if moment.total.ndim != 2 or moment.filled:
        return 0
    return max(0, moment.total.shape[0] - moment.count)
