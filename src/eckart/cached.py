"""What a run takes from the cache, and keeps there: the stages that do not depend on the budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import identity, losses
from .calibrate import Calibrated
from .factorize import Decomposed, Decomposition, Part
from .linalg import NO_FLOAT64
from .measure import Perplexity
from .models import Target
from .recipe import Recipe
from .shelf import FORMAT, Shelf, digest
from .stats import Moment, Stats
from .streaming import parts as files
from .streaming.work import Work

_ALL, _STATISTICS, _VALUES = "all", "statistics", "values"


@dataclass(frozen=True, slots=True)
class Factored:
    """Decompositions by name, what they were made of (its statistics may be used up), and what to warn of."""

    parts: Mapping[str, Decomposition]
    calibrated: Calibrated
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cached:
    """A shelf for one dense model; see eckart.shelf.Shelf.fetch for what is shared by all its methods.

    Args:
        shelf: the cache folder.
        model: the part of every key that says which model: eckart.identity.of_model, and its source.
        place: the device that decompositions come to.
        warnings: to be told to the user.
    """

    shelf: Shelf
    model: Mapping[str, Any]
    place: torch.device
    warnings: list[str]

    @classmethod
    def of(cls, shelf: Shelf, model: Any, source: str, warnings: list[str]) -> "Cached":
        """Return the shelf for `model`, whose weights are read once for it."""
        device = losses.device_of(model)
        place = torch.device("cpu") if device.type in NO_FLOAT64 else device
        key = {"format": FORMAT, "source": source, **identity.of_model(model)}
        return cls(shelf, key, place, warnings)

    def measured(self, rows: Tensor, make: Callable[[], Perplexity]) -> Perplexity:
        """Return the perplexity of the dense model on windows `rows` (k, seq_len)."""
        key = {**self.model, "rows": identity.of_tensors({"rows": rows})}
        found = self._values("dense", key, lambda: asdict(make()))
        return Perplexity(**found)

    def blocks(
        self, rows: Tensor, names: Sequence[str], make: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return what it costs on windows `rows` to leave out each block, of the targets `names`."""
        key = {**self.model, "rows": identity.of_tensors({"rows": rows}), "targets": list(names)}
        return self._values("blocks", key, make)

    def _values(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        return self.shelf.fetch(
            kind, key, make,
            lambda work, found: work.write_json(_VALUES, found),
            lambda work: work.read_json(_VALUES),
            warnings=self.warnings,
        )  # fmt: skip

    def statistics(
        self, recipe: Recipe, names: Sequence[str], rows: Tensor | None, make: Callable[[], Calibrated]
    ) -> Calibrated:
        """Return the statistics that `recipe` asks for of the modules `names`, on windows `rows`."""
        if rows is None or not recipe.statistics():
            return make()
        return self.shelf.fetch(
            "statistics", self._statistics_key(recipe, names, rows), make, _write_statistics,
            self._read_statistics,
            lambda made: _bytes(moment.total for moment in made.stats.moments.values()),
            warnings=self.warnings,
        )  # fmt: skip

    def _statistics_key(self, recipe: Recipe, names: Sequence[str], rows: Tensor) -> dict[str, Any]:
        return {
            **self.model,
            "rows": identity.of_tensors({"rows": rows}),
            "modules": list(names),
            "statistics": list(recipe.statistics()),
            "gradient_tokens": recipe.gradient_tokens,
            "labels": recipe.labels,
            "seed": recipe.seed if recipe.labels == "sampled" else None,
        }

    def factored(
        self,
        recipe: Recipe,
        targets: Sequence[Target],
        rows: Tensor | None,
        found: Decomposed,
        make: Callable[[], Factored],
    ) -> Factored:
        """Return the decompositions of `targets`, and of what may be made narrower in `found`.

        Those from the cache read their factors when these are asked for.
        """
        method = recipe.resolved_method()
        names = [name for target in targets for name in target.modules]
        seen = None if rows is None else digest(self._statistics_key(recipe, names, rows))
        key = {
            **self.model,
            "statistics": seen if recipe.statistics() else None,
            "metrics": [method.inputs, method.outputs, method.target],
            "damp": recipe.damp,
            "alpha": recipe.alpha,
            "landmarks": method.landmarks,
            "rounding": recipe.stores,
            "targets": [[repr(target), target.form(method.low_rank) is not None] for target in targets],
            "dimensions": [repr(dimension) for dimension in found.dimensions],
            "heads": [repr(own) for own in found.heads],
            "bases": [list(names) for names in found.bases],
            "readings": [repr(own) for own in found.readings],
        }
        return self.shelf.fetch(
            "decompositions",
            key,
            make,
            _write_factored,
            self._read_factored,
            _size_of,
            warnings=self.warnings,
        )

    def _read_statistics(self, work: Work) -> Calibrated:
        tensors, _ = work.read_tensors(_STATISTICS)
        known = work.read_json(_VALUES)
        stats = Stats(leaders=dict(known["leaders"]))
        for name, total in tensors.items():
            kind, _, module = name.partition("|")
            stats.moments[kind, module] = Moment(total.to(self.place), known["counts"][name])  # type: ignore[index]
        return Calibrated(stats, **known["tokens"])

    def _read_factored(self, work: Work) -> Factored:
        known = work.read_json(_VALUES)
        found, _, warnings = files.kept(work, [_ALL], self.place)
        return Factored(found, Calibrated(Stats(), **known), warnings)


def _tokens(calibrated: Calibrated) -> dict[str, int | None]:
    names = ("tokens", "gradient_tokens", "terms")
    return {name: getattr(calibrated, name) for name in names}


def _write_statistics(work: Work, made: Calibrated) -> None:
    moments = {f"{kind}|{module}": moment for (kind, module), moment in made.stats.moments.items()}
    work.write_tensors(_STATISTICS, {name: moment.total for name, moment in moments.items()}, {})
    counts = {name: moment.count for name, moment in moments.items()}
    known = {"leaders": made.stats.leaders, "counts": counts, "tokens": _tokens(made)}
    work.write_json(_VALUES, known)


def _write_factored(work: Work, made: Factored) -> None:
    kept = {}
    for name, part in made.parts.items():
        assert isinstance(part, Part)
        files.keep_factors(work, name, part, torch.float64)
        kept[name] = files.without_factors(work, name, part)
    files.keep_curves(work, _ALL, kept, {}, made.warnings)
    work.write_json(_VALUES, _tokens(made.calibrated))


def _size_of(made: Factored) -> int:
    """Return the bytes of all tensors in the decompositions."""
    return sum(_bytes(_tensors(part.found)) for part in made.parts.values() if part.found is not None)


def _tensors(found: Any) -> list[Tensor]:
    fields = [getattr(found, name) for name in found.__dataclass_fields__]
    own = [value for value in fields if isinstance(value, Tensor)]
    inner = [value for value in fields if hasattr(value, "__dataclass_fields__")]
    return [*own, *(tensor for value in inner for tensor in _tensors(value))]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
