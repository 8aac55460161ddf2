"""PEFT adapter folders as values: read with every scale known, written as a LoRA that plain PEFT loads."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ModelError, StoreError
from ..factors import LowRank
from ..linalg import to_float64

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
REPORT = "eckart.json"
_PREFIX = "base_model.model."
_KINDS = ("LORA", "ADALORA")
_PART = re.compile(
    r"(?P<name>.+)\.(?P<part>lora_(?:embedding_)?[ABE]|lora_magnitude_vector)(?P<tensor>\.weight|\.bias)?"
)
_KEPT = ("task_type", "base_model_name_or_path", "revision", "lora_dropout", "fan_in_fan_out")
# Options of PEFT under which the update is not s B A on one module.
_OTHER_MAPS = (
    "use_qalora", "target_parameters", "layer_replication", "trainable_token_indices", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """The update of one module: the map (n -> m) gains `scale * left (m, r) @ right (r, n)`.

    Of an embedding table it is the map from one-hot ids (n = vocabulary) to rows (m). `bias (m,)` is
    added to the outputs times the scale; with a `magnitude (m,)` (DoRA) the rows of the sum are scaled
    to these norms.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the map."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """The number of terms r."""
        return self.left.shape[1]

    def tensors(self) -> list[Tensor]:
        """Return everything that is stored."""
        found = (self.left, self.right, self.bias, self.magnitude)
        return [tensor for tensor in found if tensor is not None]

    def product(self) -> LowRank:
        """Return the update as a product, the scale on its left factor, in float64."""
        return LowRank(to_float64(self.left) * self.scale, to_float64(self.right))

    def delta(self) -> Tensor:
        """Return the update (m, n), dense, in float64."""
        return self.product().dense()


@dataclass(frozen=True, slots=True)
class Nf4:
    """The base that an adapter was trained on: NF4, its constants quantised as well if `double`.

    targets: the linear maps that are quantised, by dotted name.
    """

    double: bool
    targets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as `read` finds it under "base" in eckart.json."""
        return {"storage": "nf4", "double": self.double, "targets": list(self.targets)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter folder holds.

    factors: the updates by dotted name of the module.
    extras: whole tensors that replace those of the base, by dotted name of the tensor (modules_to_save,
        biases, embeddings).
    config: PEFT's adapter_config.json as it was read; of it, what is independent of the ranks is written.
    storage: of the base, where eckart.json says that it was quantised; None: as it is.
    """

    factors: Mapping[str, Factors]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    storage: Nf4 | None = None

    @property
    def base(self) -> str | None:
        """The name of the base model, None where the adapter does not say."""
        name: str | None = self.config.get("base_model_name_or_path")
        return name or None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is stored."""
        found = [tensor for factors in self.factors.values() for tensor in factors.tensors()]
        return [*found, *self.extras.values()]

    @property
    def parameters(self) -> int:
        """Parameters of all factors and whole tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the same, without the header of the file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def delta(self, name: str) -> Tensor:
        """Return the update (m, n) of module `name`, dense, in float64.

        Raises:
            ModelError: the adapter has no such module.
        """
        if name not in self.factors:
            raise ModelError(
                f"the adapter does not change {name}: it changes {', '.join(list(self.factors)[:3])} ..."
            )
        return self.factors[name].delta()


def read(source: str | Path) -> Adapter:
    """Read the adapter in a folder or at a hub id: LoRA or AdaLoRA.

    Of LoRA rank and alpha patterns, rsLoRA, DoRA, biases, embeddings and whole modules. AdaLoRA's triplets
    become two factors with PEFT's own scale (its get_delta_weight); modules of rank 0 are left out: they
    do nothing.

    Raises:
        ModelError: there is no adapter, it is a pickle, or of a kind that is not s B A.
        StoreError: what it declares and what it holds disagree, or a file is damaged.
    """
    folder = _folder(source)
    config = _config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        # Of a model that was compiled before PEFT wrapped it, the names tell.
        name = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
        found = _PART.fullmatch(name)
        if found is None:
            extras[name.replace(".base_layer.", ".")] = tensor
        else:
            part = found["part"] + (".bias" if found["tensor"] == ".bias" else "")
            parts.setdefault(found["name"], {})[part] = tensor
    factors = {name: _factors(name, held, config) for name, held in parts.items()}
    return Adapter({name: one for name, one in factors.items() if one.rank}, extras, config, _storage(folder))


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        return path
    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS, REPORT]))
    except (OSError, ValueError) as error:
        raise ModelError(f"no adapter at {source}: not a folder, and not to be had from the hub") from error


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"no adapter at {folder}: give a folder with {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / PICKLE).is_file()
        raise ModelError(
            f"{folder} holds {PICKLE}, a pickle, which is not read: load it with PEFT and save it again"
            if pickle
            else f"{folder} has no {WEIGHTS}"
        )
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{folder / CONFIG} is not JSON: {error}") from error
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise ModelError(f"{folder} is an adapter of type {kind}: legal are {', '.join(_KINDS)}")
    for option in _OTHER_MAPS:
        if config.get(option):
            raise ModelError(
                f"{folder} is an adapter with {option}, whose update is not s B A: not supported"
            )
    return config


def _storage(folder: Path) -> Nf4 | None:
    """Return what eckart.json says of the base, None where there is no such file or the base is plain."""
    report = folder / REPORT
    if not report.is_file():
        return None
    try:
        base = json.loads(report.read_text(encoding="utf-8")).get("base")
        if not isinstance(base, dict):
            return None
        kind, found = base["storage"], Nf4(bool(base["double"]), tuple(map(str, base["targets"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{report} does not say how the adapter's base is stored: {error!r}") from error
    if kind != "nf4":
        raise StoreError(f"{report} says that the adapter's base is stored as {kind!r}: legal is 'nf4'")
    return found


def _factors(name: str, held: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    embedding = "lora_embedding_A" in held
    stem = "lora_embedding_" if embedding else "lora_"
    left, right = held.get(f"{stem}B"), held.get(f"{stem}A")
    if left is None or right is None or left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        shapes = {part: list(tensor.shape) for part, tensor in held.items()}
        raise StoreError(
            f"the adapter holds {shapes} for {name}: two matrices (m, r) and (r, n) are needed; "
            "it is damaged, or adapts a convolution"
        )
    if config["peft_type"] == "ADALORA":
        if "lora_E" not in held:
            raise StoreError(f"the AdaLoRA adapter holds no lora_E for {name}: it is damaged or mixed")
        return Factors(left, right * held["lora_E"], _adalora_scale(config, len(right)))
    rank, scale = _lora_scale(name, config)
    if rank != len(right):
        raise StoreError(
            f"the adapter declares rank {rank} for {name} and holds rank {len(right)}: it is damaged or mixed"
        )
    magnitude = held.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise StoreError(f"use_dora and lora_magnitude_vector disagree for {name}: it is damaged or mixed")
    if magnitude is not None and (embedding or "lora_B.bias" in held):
        raise ModelError(f"DoRA with a bias or on embeddings ({name}) is not supported: train it without")
    return Factors(left, right, scale, held.get("lora_B.bias"), magnitude, embedding)


def _adalora_scale(config: Mapping[str, Any], rank: int) -> float:
    """Return PEFT's alpha / (ranknum + 1e-5); on loading, ranknum stays the rank at the start."""
    alpha = config.get("lora_alpha") or 0
    ranknum = torch.tensor(float(config["init_r"])) + 1e-5
    return float((alpha if alpha > 0 else float(rank)) / ranknum)


def _lora_scale(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    rank = _by_pattern(name, config.get("rank_pattern"), config["r"])
    alpha = _by_pattern(name, config.get("alpha_pattern"), config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Return what the first pattern says that matches `name`, whole or from a dot on: PEFT's rule."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def balanced(factors: Factors, alpha_over_rank: float = 1.0) -> Factors:
    """Return the same update with the scale `alpha_over_rank`, in factors of matching norms.

    Computed in float64, returned in the dtype of `factors`.
    """
    even = factors.product().balanced()
    dtype = factors.left.dtype
    return replace(
        factors,
        left=(even.left / math.sqrt(alpha_over_rank)).to(dtype),
        right=(even.right / math.sqrt(alpha_over_rank)).to(dtype),
        scale=alpha_over_rank,
        bias=None if factors.bias is None else factors.bias * (factors.scale / alpha_over_rank),
    )


def write(folder: str | Path, adapter: Adapter, *, alpha: float | None = None) -> None:
    """Write `adapter` into `folder` as a standard PEFT LoRA adapter.

    The function is that of `adapter` to rounding in the dtype of its factors, whatever it was before
    (AdaLoRA, rsLoRA, patterns). Patterns are anchored, so that no name matches another by its end;
    modules of rank 0 are left out.

    Args:
        folder: an existing folder.
        adapter: what to write.
        alpha: lora_alpha of every module; default: its rank, so that the scale is 1 and the factors say all.

    Raises:
        StoreError: no update is left, or only some have magnitudes or are of rank 0 with a bias.
    """
    kept = {name: one for name, one in adapter.factors.items() if one.rank}
    _refuse_unwritable(adapter, kept)
    even = {name: _scaled(one, alpha) for name, one in kept.items()}
    config = _written_config(adapter, even, alpha)
    tensors: dict[str, Tensor] = {}
    for name, one in even.items():
        tensors |= {f"{_PREFIX}{name}.{part}": tensor for part, tensor in _parts(one, config).items()}
    for name, tensor in adapter.extras.items():
        module, _, last = name.rpartition(".")
        key = f"{module}.base_layer.{last}" if module in kept else name
        tensors[_PREFIX + key] = tensor
    # A file cannot hold one tensor twice: a tied table and head are two tensors of it.
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (Path(folder) / CONFIG).write_text(text, encoding="utf-8")


def _scaled(one: Factors, alpha: float | None) -> Factors:
    # Balanced factors have at most as many terms as rows.
    return balanced(one, 1.0 if alpha is None else alpha / min(one.rank, one.shape[0]))


def _refuse_unwritable(adapter: Adapter, kept: Mapping[str, Factors]) -> None:
    if not kept:
        raise StoreError("no update is left to write: every module has rank 0; keep more")
    lost = [name for name, one in adapter.factors.items() if name not in kept and one.bias is not None]
    if lost:
        raise StoreError(
            f"{lost[0]} has a bias and rank 0, which PEFT cannot store: keep a rank of at least 1"
        )
    with_magnitude = sum(one.magnitude is not None for one in adapter.factors.values())
    if with_magnitude not in (0, len(kept)):
        raise StoreError(
            f"{with_magnitude} of {len(kept)} modules have a magnitude (DoRA): PEFT stores all or none"
        )


def _parts(one: Factors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    if one.embedding:
        return {"lora_embedding_A": one.right, "lora_embedding_B": one.left}
    parts = {"lora_A.weight": one.right, "lora_B.weight": one.left}
    if config["lora_bias"]:
        parts["lora_B.bias"] = one.left.new_zeros(one.shape[0]) if one.bias is None else one.bias
    if one.magnitude is not None:
        parts["lora_magnitude_vector"] = one.magnitude
    return parts


def _written_config(adapter: Adapter, even: Mapping[str, Factors], alpha: float | None) -> dict[str, Any]:
    rank = Counter(one.rank for one in even.values()).most_common(1)[0][0]
    other = {f"^{re.escape(name)}": one.rank for name, one in even.items() if one.rank != rank}
    whole = _saved_whole(adapter, even)
    biases = any(name.endswith(".bias") and name.rpartition(".")[0] not in whole for name in adapter.extras)
    return {
        "task_type": "CAUSAL_LM",
        **{name: adapter.config[name] for name in _KEPT if adapter.config.get(name) is not None},
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "rank_pattern": other,
        "alpha_pattern": {} if alpha is not None else other,
        "target_modules": list(even),
        "modules_to_save": whole or None,
        "bias": "all" if biases else "none",
        "lora_bias": any(one.bias is not None for one in even.values()),
        "use_dora": any(one.magnitude is not None for one in even.values()),
        "use_rslora": False,
        "init_lora_weights": True,
        "ensure_weight_tying": bool(adapter.config.get("ensure_weight_tying")),
    }


def _saved_whole(adapter: Adapter, even: Mapping[str, Factors]) -> list[str]:
    """Return the modules whose tensors PEFT saves whole; biases alone it takes by their names."""
    held: dict[str, set[str]] = {}
    for name in adapter.extras:
        module, _, last = name.rpartition(".")
        held.setdefault(module, set()).add(last)
    found = [name for name, lasts in held.items() if lasts != {"bias"} and name not in even]
    if not adapter.config.get("ensure_weight_tying"):
        return found
    # Of tensors that are tied PEFT wants the first named alone, and finds the others itself.
    named = adapter.config.get("modules_to_save") or ()
    return [name for name in found if name.endswith(tuple(named))]
