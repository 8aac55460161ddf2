"""Which matrices of a folder a layer of a serving engine holds, in which forms, and of which tensors.

An engine fuses matrices that read the same input (queries, keys and values; gate and up): each of them is
a shard of one layer, with a form and a rank of its own. Nothing here knows the engine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import StoreError

DENSE, FACTORED, PIVOTED, NARROW, PARTIAL = "dense", "factored", "pivoted", "narrow", "partial"
RUNS = (FACTORED, PIVOTED, NARROW, PARTIAL)
INDICES = ("order", "places")
"""The tensors that hold integers."""
_PLACES = {"q": 0, "k": 1, "v": 2}
_ADVICE = (
    "`eckart export DIR --to dense --out DENSE` writes an ordinary model of the same function, "
    "`eckart compress MODEL --stock` makes a smaller ordinary one"
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One matrix of the folder in a layer of the engine.

    Args:
        name: dotted, as in the folder.
        outputs, inputs: m and n of the map as the engine has it.
        spec: what config.json declares of it; empty for a dense one.
    """

    name: str
    outputs: int
    inputs: int
    spec: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The form."""
        return str(self.spec.get("kind", DENSE))

    @property
    def basis(self) -> str | None:
        """The name of the matrix whose right factor this one shares, if any."""
        found = self.spec.get("basis")
        return None if found is None else str(found)

    @property
    def copies(self) -> int:
        """How many times the units of a narrowed dimension stand one after another in the rows."""
        return int(self.spec.get("copies", 1))

    @property
    def made(self) -> int:
        """How many outputs are computed; the others are zero."""
        if self.kind == NARROW:
            return int(self.spec["shape"][0])
        by_rows = self.kind == PARTIAL and self.spec["side"] == "rows"
        return int(self.spec["kept"]) if by_rows else self.outputs

    @property
    def read(self) -> int:
        """How many inputs are read: the first of a narrow matrix, those at the places of a partial one."""
        if self.kind == NARROW:
            return int(self.spec["shape"][1])
        by_columns = self.kind == PARTIAL and self.spec["side"] == "columns"
        return int(self.spec["kept"]) if by_columns else self.inputs

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name, within the matrix, and shape of each tensor that must be there; biases may be, too."""
        if self.kind == FACTORED:
            rank = self.spec["rank"]
            own = {} if self.basis else {"down.weight": (rank, self.inputs)}
            return own | {"up.weight": (self.outputs, rank)}
        if self.kind == PIVOTED:
            rank = self.spec["rank"]
            rest = {"rest.weight": (self.outputs - rank, rank)} if rank < self.outputs else {}
            return {"pivot.weight": (rank, self.inputs), **rest, "order": (self.outputs,)}
        if self.kind == PARTIAL:
            return {"inner.weight": (self.made, self.read), "places": (self.spec["kept"],)}
        return {"weight": (self.made, self.read)}

    def biases(self) -> dict[str, tuple[int]]:
        """Return name and shape of each bias that the matrix may have."""
        weights = (name for name in self.tensors() if name.endswith("weight") and name != "down.weight")
        shapes = self.tensors()
        return {name.removesuffix("weight") + "bias": (shapes[name][0],) for name in weights}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise StoreError unless tensors of these names and shapes are those of the matrix."""
        wanted, allowed = self.tensors(), self.biases()
        missing = sorted(set(wanted) - set(shapes))
        foreign = sorted(set(shapes) - set(wanted) - set(allowed))
        if missing or foreign:
            raise StoreError(
                f"{self.name}, {self.kind}: tensors {missing} are missing and {foreign} not known; the files "
                "of the folder are not those of its config.json: copy the folder again"
            )
        for name, shape in shapes.items():
            if shape != (wanted | allowed)[name]:
                raise StoreError(
                    f"{self.name}.{name} has shape {shape}, its config.json says {(wanted | allowed)[name]}: "
                    "copy the folder again"
                )


@dataclass(frozen=True, slots=True)
class Layer:
    """The shards of a layer of the engine, in the order of its outputs.

    narrowed: its outputs are as few as are computed: who reads them expects that. Else the outputs that are
    missing are zeros.
    """

    shards: tuple[Shard, ...]
    narrowed: bool

    @property
    def outputs(self) -> int:
        """How many outputs the layer has."""
        return sum(shard.made if self.narrowed else shard.outputs for shard in self.shards)


def names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names, in the folder, of the matrices in the layer `prefix` of the engine.

    Args:
        prefix: dotted name of the layer.
        packed: last part of the name of a fused layer -> those of its matrices, in order.
    """
    parent, dot, leaf = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed.get(leaf, [leaf])]


def place(shard_id: object, count: int, layer: str) -> int:
    """Return which of `count` shards the engine means by `shard_id`: q, k, v, a number, or None for all.

    Raises:
        StoreError: none of them.
    """
    found = _PLACES.get(shard_id) if isinstance(shard_id, str) else shard_id
    if found is None and count == 1:
        return 0
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < count:
        raise StoreError(f"{layer}: a tensor for part {shard_id!r} of {count}: {_ADVICE}")
    return found


def layer(
    prefix: str, parts: Sequence[str], sizes: Sequence[int], inputs: int, declared: Mapping[str, Any]
) -> Layer:
    """Return the layer `prefix` of the engine with the forms that `declared` gives its matrices.

    Args:
        prefix: its dotted name.
        parts: the names of its matrices; one alone stands for all outputs.
        sizes: the outputs of each of its parts, as the engine has them.
        inputs: what it reads.
        declared: dotted name -> declaration in config.json.

    Raises:
        StoreError: the engine's parts are not those of the folder, or differ in what they read.
    """
    rows = [sum(sizes)] if len(parts) == 1 else list(sizes)
    if len(parts) != len(rows):
        raise StoreError(
            f"{prefix} is made of {len(rows)} parts in this engine, the folder has "
            f"{', '.join(parts)}: {_ADVICE}"
        )
    found = tuple(
        Shard(name, outputs, inputs, declared.get(name, {}))
        for name, outputs in zip(parts, rows, strict=True)
    )
    for shard in found:
        _check_size(shard)
    by_columns = [shard.name for shard in found if shard.kind == PARTIAL and shard.spec["side"] == "columns"]
    if len({shard.read for shard in found}) > 1 or (by_columns and len(found) > 1):
        raise StoreError(f"{prefix} reads one input, its parts {', '.join(parts)} several: {_ADVICE}")
    return Layer(found, _narrowed(parts, found, declared))


def _check_size(shard: Shard) -> None:
    rank = shard.spec.get("rank", 1)
    fits = shard.made <= shard.outputs and shard.read <= shard.inputs
    fits = fits and shard.outputs % shard.copies == shard.made % shard.copies == 0
    if not fits or rank > min(shard.outputs, shard.inputs):
        raise StoreError(
            f"{shard.name} is declared as {dict(shard.spec)}, and has {shard.outputs} outputs and "
            f"{shard.inputs} inputs in this engine: {_ADVICE}"
        )


def _narrowed(parts: Sequence[str], found: Sequence[Shard], declared: Mapping[str, Any]) -> bool:
    """Tell whether these are all that write a dimension that one other matrix beside them reads.

    So it is in an MLP. Beside queries, keys and values in layers of their own stand other writers, and their
    outputs must keep their size for the attention between them and the reader.
    """
    if any(shard.kind != NARROW for shard in found):
        return False
    parent = parts[0].rpartition(".")[0]
    beside = [
        name
        for name, spec in declared.items()
        if name.rpartition(".")[0] == parent and spec.get("kind") == NARROW and name not in parts
    ]
    widths = {shard.made // shard.copies for shard in found}
    return len(beside) == 1 and widths == {declared[beside[0]]["shape"][1]} and len(_units(found)) == 1


def _units(found: Iterable[Shard]) -> set[int]:
    return {shard.outputs // shard.copies for shard in found}


def refuse(
    modules: Mapping[str, Mapping[str, Any]], storage: Mapping[str, Any], unfolded: Mapping[str, Any]
) -> None:
    """Raise StoreError where a declaration of config.json holds what no layer here runs."""
    for name, spec in modules.items():
        if spec["kind"] not in RUNS:
            raise StoreError(f"{name} is {spec['kind']}: only {', '.join(RUNS)} run in vLLM. {_ADVICE}")
    for name, kind in storage.items():
        what = "tied to a stored table" if isinstance(kind, Mapping) else f"stored in {kind}"
        raise StoreError(f"{name} is {what}: storages of few bits do not run in vLLM. {_ADVICE}")
    for name, spec in unfolded.items():
        raise StoreError(
            f"{name} is unfolded to {spec['kind']}: vLLM has the layer as it was, in one piece. {_ADVICE}"
        )


def refuse_parallel(name: str, count: int) -> None:
    """Raise StoreError where the layer `name` would be split over `count` devices."""
    if count > 1:
        raise StoreError(
            f"{name} is low-rank and tensor parallelism of {count} would split it: serve with "
            "--tensor-parallel-size 1 (more devices: --data-parallel-size, --pipeline-parallel-size)"
        )


def refuse_foreign(prefix: str, declared: Iterable[str]) -> None:
    """Raise StoreError if a layer `prefix` that is no linear map holds a matrix that is declared."""
    held = [name for name in declared if name == prefix or name.startswith(f"{prefix}.")]
    if prefix and held:
        raise StoreError(
            f"{held[0]} ({len(held)} in all) is inside of {prefix}, which vLLM runs as one, not as linear "
            f"maps: {_ADVICE}"
        )


def refuse_unclaimed(declared: Iterable[str], claimed: Iterable[str]) -> None:
    """Raise StoreError if there are declared matrices that no layer of the engine has taken."""
    left = sorted(set(declared) - set(claimed))
    if left:
        raise StoreError(
            f"{left[0]} ({len(left)} in all) is low-rank in the folder, and no layer of vLLM's model has "
            f"that name: {_ADVICE}"
        )
