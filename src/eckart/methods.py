"""Published methods as rows of data: which metric on which side, which allocation, which form."""

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError
from .factors import Form
from .linalg import Metric
from .stats import Moment, Statistic, Stats

InputMetric = Literal["identity", "fisher", "absolute", "gram"]
OutputMetric = Literal["identity", "gradient"]
Allocation = Literal["uniform", "curvature"]

INPUT_METRICS: tuple[InputMetric, ...] = ("identity", "fisher", "absolute", "gram")
OUTPUT_METRICS: tuple[OutputMetric, ...] = ("identity", "gradient")
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "curvature")


@dataclass(frozen=True, slots=True)
class Method:
    """One choice along the axes of low-rank factorization.

    inputs: metric H on the input side. `identity`; `fisher`: diagonal, the Fisher information of
        each column of W, whose root scales W (FWSVD); `absolute`: diagonal (E|x|)^(2 alpha), that
        is (E|x|)^alpha applied to W once (ASVD); `gram`: E[x x^T].
    outputs: metric C on the output side: `identity` or `gradient`, E[g g^T].
    allocation: `uniform` keeps the same share of every matrix; `curvature` spends one budget where
        the estimated loss falls most, and needs outputs = gradient to have one unit.
    form: how the map is stored and run.
    """

    inputs: InputMetric
    outputs: OutputMetric
    allocation: Allocation
    form: Form
    source: str

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that the two metrics are made of."""
        inputs: tuple[Statistic, ...] = () if self.inputs == "identity" else (self.inputs,)
        return inputs if self.outputs == "identity" else (*inputs, "gradient")

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
    "eckart": Method("gram", "gradient", "curvature", "pivoted", "this package, docs in README"),
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
    """Return H for module `name` of input width `size`, damped by `damp` (relative)."""
    if method.inputs == "identity":
        return Metric(size)
    mean = stats.moment(method.inputs, name).mean()
    if method.inputs == "absolute":
        mean = mean.double().pow(2 * alpha)
    return Metric(size, mean, damp)


def output_metric(method: Method, stats: Stats, name: str, size: int, damp: float) -> Metric:
    """Return C for module `name` of output width `size`, damped by `damp` (relative)."""
    if method.outputs == "identity":
        return Metric(size)
    return Metric(size, stats.moment("gradient", name).mean(), damp)


def shortage(moment: Moment) -> int:
    """Return how many tokens a full moment lacks to have full rank (0: none)."""
    if moment.total.ndim != 2:
        return 0
    return max(0, moment.total.shape[0] - moment.count)
