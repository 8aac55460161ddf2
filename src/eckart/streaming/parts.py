"""Decompositions in files: what choices are made of in one, and the factors in another."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..factorize import Found, Part
from ..heads import PairNarrowing, ValueNarrowing
from ..linalg import WeightedSVD
from ..quant.noise import Noise
from ..width import Narrowing
from .work import Work

_FACTORS, _CURVES = "parts", "curves"
_TURNED = "|turned"
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Kept:
    """A decomposition that is in a file; see eckart.factorize.Decomposition.

    Args:
        work: where.
        name: of the matrix or the dimension.
        unit: what turns its squared errors into loss per token.
        curve: estimated losses of every rank or width (k + 1,), None where there is nothing to choose.
        noise: what rounding costs, in loss per token.
        place: the device that the factors come to.
    """

    work: Work
    name: str
    unit: float
    curve: Tensor | None
    noise: Noise | None
    place: torch.device = _CPU

    @property
    def decomposed(self) -> bool:
        """Tell whether it has ranks, or widths, to choose from."""
        return self.curve is not None

    @property
    def found(self) -> Found | None:
        """Return the decomposition itself, from its file."""
        return None if self.curve is None else _unpacked(self.work, self.name, self.place)

    @property
    def svd(self) -> WeightedSVD:
        """Return the decomposition of a matrix, from its file."""
        found = self.found
        assert isinstance(found, WeightedSVD)
        return found

    @property
    def narrowing(self) -> Narrowing:
        """Return the decomposition of a hidden dimension, from its file."""
        found = self.found
        assert isinstance(found, Narrowing)
        return found

    def losses(self) -> Tensor:
        """Return the estimated loss per token of every rank, or width, from 0 to all (k + 1,)."""
        assert self.curve is not None
        return self.curve

    def noises(self) -> Noise | None:
        """Return what rounding adds to the loss per token, per unit of a storage's noise, where asked for."""
        return self.noise


def keep_factors(work: Work, name: str, part: Part, precision: torch.dtype = torch.float32) -> None:
    """Write the factors of `part` in `precision`: float32 halves the file, and outputs are no wider.

    What lies by columns in memory does so again when it is read: products of it have the same bits.

    Raises:
        StoreError: they cannot be written.
    """
    found = part.found
    if found is None:
        return
    tensors = {key: getattr(found, key) for key in _FIELDS[type(found)]}
    if isinstance(found, ValueNarrowing):
        inner = {f"narrowing.{key}": getattr(found.narrowing, key) for key in _FIELDS[Narrowing]}
        tensors = {"basis": found.basis, **inner}
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        own = tensor.to(precision) if tensor.ndim == 2 and tensor.is_floating_point() else tensor
        packed |= {f"{key}{_TURNED}": own.T} if _by_columns(own) else {key: own}
    work.write_tensors(f"{_FACTORS}/{name}", packed, {"kind": type(found).__name__})


def _by_columns(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def without_factors(work: Work, name: str, part: Part) -> Kept:
    """Return `part` as it will be found in `work`."""
    return Kept(work, name, part.unit, part.losses().cpu() if part.decomposed else None, part.noises())


def keep_curves(
    work: Work, step: str, parts: Mapping[str, Kept], short: Mapping[str, int], warnings: Sequence[str]
) -> None:
    """Write what choices are made of; this is the last file of a step, and says that it is finished.

    `short` holds which moments lack how many tokens, `warnings` what else there is to say.
    """
    metadata = {"short": json.dumps(dict(short)), "warnings": json.dumps(list(warnings))}
    work.write_tensors(f"{_CURVES}/{step}", dict(_curves(parts)), metadata)


def curves_kept(work: Work, step: str) -> bool:
    """Tell whether the step is finished."""
    return work.has(f"{_CURVES}/{step}.safetensors")


def kept(
    work: Work, steps: Sequence[str], place: torch.device = _CPU
) -> tuple[dict[str, Kept], dict[str, int], list[str]]:
    """Return the decompositions of the finished `steps` by name, what moments lack tokens, and warnings.

    Raises:
        StoreError: a file cannot be read.
    """
    found: dict[str, Kept] = {}
    short: dict[str, int] = {}
    warnings: list[str] = []
    for step in steps:
        tensors, metadata = work.read_tensors(f"{_CURVES}/{step}")
        warnings.extend(json.loads(metadata["warnings"]))
        for kind, need in json.loads(metadata["short"]).items():
            short[kind] = max(short.get(kind, 0), need)
        for name in dict.fromkeys(key.partition("|")[0] for key in tensors):
            start = f"{name}|"
            own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
            noise = Noise(float(own["noise"]), own.get("noise_low_rank")) if "noise" in own else None
            found[name] = Kept(work, name, float(own["unit"]), own.get("curve"), noise, place)
    return found, short, warnings


def _curves(parts: Mapping[str, Kept]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        yield f"{name}|unit", torch.tensor(part.unit, dtype=torch.float64)
        if part.decomposed:
            yield f"{name}|curve", part.losses()
        noise = part.noises()
        if noise is not None:
            yield f"{name}|noise", torch.tensor(noise.dense, dtype=torch.float64)
            if noise.low_rank is not None:
                yield f"{name}|noise_low_rank", noise.low_rank


_FIELDS: dict[type, tuple[str, ...]] = {
    WeightedSVD: ("left", "right", "spectrum"),
    Narrowing: ("order", "reading", "cholesky", "losses"),
    PairNarrowing: ("order", "losses"),
    ValueNarrowing: (),
}


def _unpacked(work: Work, name: str, place: torch.device) -> Found:
    tensors, metadata = work.read_tensors(f"{_FACTORS}/{name}")
    wide: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        own = (tensor.double() if tensor.is_floating_point() else tensor).to(place)
        wide[key.removesuffix(_TURNED)] = own.T if key.endswith(_TURNED) else own
    kind = {made.__name__: made for made in _FIELDS}[metadata["kind"]]
    if kind is ValueNarrowing:
        inner = Narrowing(**{key: wide[f"narrowing.{key}"] for key in _FIELDS[Narrowing]})
        return ValueNarrowing(wide["basis"], inner)
    found: Found = kind(**{key: wide[key] for key in _FIELDS[kind]})
    return found
