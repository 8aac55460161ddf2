"""What config.json says of a model that eckart changed: the modules, and how they are stored."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import kinds, models, stores
from .embeddings import FactoredEmbedding, FactoredHead
from .errors import StoreError
from .experts import Experts
from .factors import FORMS, FactoredLinear, NarrowLinear, PartialLinear
from .fused import Layout, SplitLinear
from .joint import JointLinear
from .quant.corrected import CorrectedLinear
from .quant.storage import STORAGES
from .quant.stored import StoredLinear
from .shared import SharedLinear, sources

NAME = "eckart"
FORMAT = 6
READS = (1, 2, 3, 4, 5, 6)
_PLAIN_FORMAT = 5
"""Of folders without joint projections, which an eckart of that format reads."""
KINDS = (*FORMS, CorrectedLinear.kind, FactoredEmbedding.kind, FactoredHead.kind)
_LEGAL_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@register_quantization_config(NAME)
class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a low-rank model.

    Args:
        modules: dotted name -> {"kind": k, "rank": r}, where k is factored or pivoted for an
            nn.Linear (a factored one may say "basis": the name of another whose right factor it shares),
            corrected for one that is whole, with a low-rank correction beside it,
            embedding for an nn.Embedding, head for an nn.Linear that is tied to it; or
            {"kind": "narrow", "shape": [m, n], "copies": c} for an nn.Linear that lost rows or
            columns (eckart.factors.NarrowLinear); or {"kind": "partial", "kept": k, "side": s} for one
            that stores some of its rows or columns (eckart.factors.PartialLinear); or
            {"kind": "shared", "rank": r, "scaled": s} for one whose base others share
            (eckart.shared.SharedLinear), with "source": the name of the module that has it, unless it is its
            own, and a difference of rank r or none (0); or {"kind": "joint", "rank": r, "own": o} for one
            that goes on from a joint product of rank r (eckart.joint.JointLinear), with "basis": the name
            of the module whose `down` that is, unless it is its own, and "own" only where it is pivoted.
        storage: dotted name of an nn.Linear or nn.Embedding, or of one inside of the modules above -> the
            name of its storage (eckart.quant.storage.STORAGES); or {"table": t} for what is tied in an
            output head to the stored embeddings t.
        unfolded: dotted name of what holds the parts of a stock module instead of it -> what it is:
            {"kind": "experts"} for stacked experts, one by one; {"kind": "linear"} for what is an nn.Linear
            instead of another kind of matrix (eckart.kinds; named modules of such kinds need no entry);
            {"kind": "split", "parts": [[name, rows], ...], "grouped": g} for a fused matrix as its parts
            (eckart.fused.Layout).
        format: version of this declaration and of the tensors' names.

    Raises:
        StoreError: a newer format, an illegal name, an unknown kind, rank or storage.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        storage: Mapping[str, Any] | None = None,
        unfolded: Mapping[str, Mapping[str, Any]] | None = None,
        format: int = FORMAT,
        quant_method: str = NAME,
    ) -> None:
        if format not in READS:
            raise StoreError(
                f"the folder has format {format}, this eckart reads formats {READS[0]} to {FORMAT}: "
                "install a newer eckart"
            )
        self.quant_method = quant_method
        self.format = format
        self.modules = {name: dict(spec) for name, spec in modules.items()}
        for name, spec in self.modules.items():
            _check_declaration(name, spec)
        self.storage = dict(storage or {})
        for name, stored in self.storage.items():
            _check_storage(name, stored)
        self.unfolded = {name: dict(spec) for name, spec in (unfolded or {}).items()}
        for name, spec in self.unfolded.items():
            _check_unfolded(name, spec)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build it from the JSON of config.json, refusing keys of which it knows nothing."""
        unknown = set(config_dict) - {"modules", "storage", "unfolded", "format", "quant_method"}
        if unknown or "modules" not in config_dict:
            raise StoreError(
                f"quantization_config of config.json: unknown keys {sorted(unknown)}, or no 'modules'"
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def _check_declaration(name: str, spec: Mapping[str, Any]) -> None:
    if not _LEGAL_NAME.fullmatch(name):
        raise StoreError(f"config.json declares a module {name!r}: not a dotted module name")
    if spec.get("kind") == NarrowLinear.kind:
        shape = spec.get("shape")
        pair = shape if isinstance(shape, list | tuple) and len(shape) == 2 else [None]
        numbers, wanted = [*pair, spec.get("copies")], {"kind", "shape", "copies"}
    elif spec.get("kind") == PartialLinear.kind:
        numbers, wanted = [spec.get("kept")], {"kind", "kept", "side"}
    elif spec.get("kind") == SharedLinear.kind:
        _check_shared(name, spec)
        return
    elif spec.get("kind") == JointLinear.kind:
        _check_joint(name, spec)
        return
    else:
        numbers, wanted = [spec.get("rank")], {"kind", "rank"}
        if spec.get("kind") == FactoredLinear.kind and "basis" in spec:
            wanted = {"kind", "rank", "basis"}
    legal = spec.get("kind") in (*KINDS, NarrowLinear.kind, PartialLinear.kind) and set(spec) == wanted
    legal = legal and isinstance(spec.get("basis", ""), str)
    legal = legal and spec.get("side", "rows") in ("rows", "columns")
    if not legal or not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise StoreError(
            f"config.json declares {name} as {dict(spec)}: legal is a kind of {', '.join(KINDS)} and a rank "
            "of at least 1; the kind narrow, a shape [m, n] and copies; or the kind partial, kept and a "
            "side of rows or columns"
        )


def _check_unfolded(name: str, spec: Mapping[str, Any]) -> None:
    legal = set(spec) == {"kind"} and spec["kind"] in ("experts", "linear")
    if spec.get("kind") == "split":
        legal = set(spec) == {"kind", "parts", "grouped"} and isinstance(spec["grouped"], bool)
        legal = legal and isinstance(spec["parts"], list) and all(map(_is_part, spec["parts"]))
        legal = legal and len({part[0] for part in spec["parts"]}) == len(spec["parts"]) > 0
    if not legal or not _LEGAL_NAME.fullmatch(name):
        raise StoreError(
            f"config.json declares {name!r} as unfolded to {dict(spec)}: legal is a dotted module name, and "
            "a kind of experts, linear, or split with parts [name, rows] and grouped; a newer eckart may "
            "know it"
        )


def _is_part(part: object) -> bool:
    if not isinstance(part, list | tuple) or len(part) != 2:
        return False
    name, rows = part
    legal = isinstance(name, str) and name.isidentifier()
    return legal and isinstance(rows, int) and not isinstance(rows, bool) and rows >= 1


def layout(spec: Mapping[str, Any]) -> Layout:
    """Return the layout that an entry of kind split declares."""
    return Layout(tuple((name, rows) for name, rows in spec["parts"]), spec["grouped"])


def _check_shared(name: str, spec: Mapping[str, Any]) -> None:
    rank = spec.get("rank")
    legal = set(spec) - {"source"} == {"kind", "rank", "scaled"} and isinstance(spec["scaled"], bool)
    legal = legal and isinstance(spec.get("source", ""), str)
    if not legal or isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise StoreError(
            f"config.json declares {name} as {dict(spec)}: legal for the kind shared are a rank of at least "
            "0, scaled true or false, and the name of a source"
        )


def _check_joint(name: str, spec: Mapping[str, Any]) -> None:
    legal = set(spec) - {"basis", "own"} == {"kind", "rank"} and isinstance(spec.get("basis", ""), str)
    pairs = [(spec.get("rank"), 1), (spec.get("own", 0), 0)]
    if not legal or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n, least in pairs):
        raise StoreError(
            f"config.json declares {name} as {dict(spec)}: legal for the kind joint are a rank of at least "
            "1, own of at least 0, and the name of a basis"
        )


def _check_storage(name: str, stored: object) -> None:
    if not _LEGAL_NAME.fullmatch(name):
        raise StoreError(f"config.json declares a stored module {name!r}: not a dotted module name")
    if isinstance(stored, Mapping) and set(stored) == {"table"} and isinstance(stored["table"], str):
        return
    if not isinstance(stored, str) or stored not in STORAGES:
        raise StoreError(
            f"config.json declares {name} as stored in {stored!r}: legal are {', '.join(STORAGES)}, or the "
            "table that an output head is tied to; a newer eckart may know it"
        )


def declare(model: nn.Module) -> EckartConfig:
    """Return the declaration of the low-rank and stored modules that `model` has."""
    modules = {name: _spec(module) for name, module in models.low_rank_modules(model).items()}
    for name, first in models.bases(model).items():
        modules[name]["basis"] = first
    for name, first in sources(model).items():
        modules[name]["source"] = first
    parts = stores.stored(model)
    for name, part in parts.items():
        if isinstance(part, StoredLinear) and part.narrow is not None:
            shape = [part.out_features, part.in_features]
            modules[name] = {"kind": NarrowLinear.kind, "shape": shape, "copies": part.narrow[1]}
    kinds_there = {spec["kind"] for spec in modules.values()}
    return EckartConfig(
        modules,
        {name: _stored(model, part) for name, part in parts.items()},
        _unfolded(model),
        FORMAT if JointLinear.kind in kinds_there else _PLAIN_FORMAT,
    )


def _unfolded(model: nn.Module) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found[name] = {"kind": "experts"}
        elif isinstance(module, SplitLinear):
            parts = [list(part) for part in module.layout.parts]
            found[name] = {"kind": "split", "parts": parts, "grouped": module.layout.grouped}
        elif type(module) is nn.Linear and kinds.stock(module) is not None:
            found[name] = {"kind": "linear"}
    return found


def _stored(model: nn.Module, module: stores.StoredModule) -> str | dict[str, str]:
    if not isinstance(module, stores.Tied):
        return module.storage.name
    names: dict[nn.Module, str] = {part: name for name, part in model.named_modules()}
    return {"table": names[module.table]}


def _spec(module: models.LowRankModule) -> dict[str, Any]:
    if isinstance(module, NarrowLinear):
        return {"kind": module.kind, "shape": list(module.weight.shape), "copies": module.copies}
    if isinstance(module, PartialLinear):
        return {"kind": module.kind, "kept": module.kept, "side": module.side}
    if isinstance(module, SharedLinear):
        return {"kind": module.kind, "rank": module.rank, "scaled": module.scale is not None}
    if isinstance(module, JointLinear) and module.own is not None:
        return {"kind": module.kind, "rank": module.rank, "own": module.own}
    return {"kind": module.kind, "rank": module.rank}
