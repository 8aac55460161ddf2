"""The plugin of vLLM: compressed folders run in its own models, layer by layer.

vLLM calls `register` through the entry point group vllm.general_plugins. It builds its own layers, fused
where matrices read the same input, and asks the quantisation named in config.json how each is to be run.
Nothing else of eckart imports this module, and only here is vllm imported.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from ..declaration import NAME, EckartConfig
from ..errors import StoreError
from . import shards
from .fused import FusedLinear, Product


def register() -> None:
    """Teach vLLM the quantisation "eckart". It may be called several times."""
    register_quantization_config(NAME)(EckartQuantization)


class EckartQuantization(QuantizationConfig):  # type: ignore[misc]
    """What vLLM knows of a compressed folder: the forms of its matrices, and their tensors while it loads.

    Raises:
        StoreError: the folder holds what does not run in vLLM.
    """

    def __init__(self, declared: EckartConfig) -> None:
        super().__init__()
        shards.refuse(declared.modules, declared.storage, declared.unfolded)
        self.modules = declared.modules
        self.claimed: set[str] = set()
        self.loaded: dict[str, dict[str, Tensor]] = {}
        self.bases: dict[str, Product] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EckartQuantization":
        """Build it from the quantization_config of config.json."""
        return cls(EckartConfig.from_dict(config))

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the quantisation."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that layers compute in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: products run on every device."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: config.json says it all."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call matrices what vLLM's model calls them."""
        renamed = hf_to_vllm_mapper.apply_dict(self.modules)
        for name, spec in renamed.items():
            if "basis" in spec:
                renamed[name] = spec | {"basis": hf_to_vllm_mapper.apply_list([spec["basis"]])[0]}
        self.modules = renamed

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return how `layer` is run; None for what is no linear map.

        Raises:
            StoreError: it holds matrices of the folder in a way that cannot be served.
        """
        if not isinstance(layer, LinearBase):
            shards.refuse_foreign(prefix, self.modules)
            return None
        names = shards.names(prefix, self.packed_modules_mapping)
        if not any(name in self.modules for name in names):
            return UnquantizedLinearMethod()
        self.claimed.update(names)
        return EckartLinearMethod(self, names)

    def receive(self, name: str, tensor: str, value: Tensor) -> None:
        """Keep a tensor of the matrix `name` until its layer is made. Guards are empty, and dropped."""
        if value.numel():
            self.loaded.setdefault(name, {})[tensor] = value

    def basis(self, name: str, prepare: Callable[[Product], None]) -> Product:
        """Return the right factor of the matrix `name`, which others share."""
        if name not in self.bases:
            found = self.loaded.get(name, {}).get("down.weight")
            if found is None:
                raise StoreError(
                    f"the right factor of {name}, which is shared, is not in the files: copy the folder again"
                )
            self.bases[name] = Product(found)
            prepare(self.bases[name])
        return self.bases[name]

    @property
    def shared(self) -> set[str]:
        """The names of the matrices whose right factor others share."""
        return {spec["basis"] for spec in self.modules.values() if "basis" in spec}


class EckartLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Runs a linear layer of vLLM some of whose matrices are not dense."""

    def __init__(self, config: EckartQuantization, names: list[str]) -> None:
        super().__init__()
        self.config, self.names = config, names
        self.products = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Give `layer` a name for every tensor of its matrices, for vLLM's loaders to find.

        Sizes are those of the dense layer; the folder's own take their place.

        Raises:
            StoreError: tensor parallelism would split it, or its parts are not those of the folder.
        """
        if not isinstance(layer, ReplicatedLinear):
            shards.refuse_parallel(self.names[0], int(getattr(layer, "tp_size", 1)))
        found = shards.layer(
            str(getattr(layer, "prefix", self.names[0])),
            self.names,
            output_partition_sizes,
            input_size_per_partition,
            self.config.modules,
        )
        self.layer, self.dtype = found, params_dtype
        for name in _tensor_names(found.shards):
            _name(layer, name, params_dtype, partial(self._load, name))
        # The bias of the layer, which it makes itself after this call, gets its tensors from here as well.
        layer.weight_loader = partial(self._load, "bias")

    def _load(self, tensor: str, parameter: Any, value: Tensor, shard_id: Any = None) -> None:
        if shard_id is None:
            shard_id = getattr(value, "shard_id", None)
        name = self.names[shards.place(shard_id, len(self.names), self.names[0])]
        kind = torch.int64 if tensor in shards.INDICES else self.dtype
        self.config.receive(name, tensor, value.to(parameter.device, kind, copy=True))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put what computes the layer together.

        Raises:
            StoreError: tensors are missing, or of other shapes than declared.
        """
        config = self.config
        shards.refuse_unclaimed(config.modules, config.claimed)
        wanted = {shard.basis or shard.name for shard in self.layer.shards} & config.shared
        bases = {name: config.basis(name, self.products.process_weights_after_loading) for name in wanted}
        tensors = [config.loaded.get(name, {}) for name in self.names]
        fused = FusedLinear(self.layer, tensors, bases, self.products.apply)
        for product in fused.products():
            if product not in bases.values():
                self.products.process_weights_after_loading(product)
        for name in self.names:
            config.loaded.pop(name, None)
        for name in {name.partition(".")[0] for name in _tensor_names(self.layer.shards)} - {
            "weight",
            "bias",
        }:
            delattr(layer, name)
        self._set_bias(layer, fused)
        layer.eckart = fused.to(_device(layer))

    def _set_bias(self, layer: nn.Module, fused: FusedLinear) -> None:
        own = getattr(layer, "bias", None)
        if own is None and fused.bias is not None:
            raise StoreError(f"{self.names[0]} has a bias in the folder and none in vLLM's model")
        if own is not None:
            bias = own.new_zeros(fused.outputs) if fused.bias is None else fused.bias.to(own)
            layer.bias = nn.Parameter(bias, requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map `x` (..., n) to (..., m)."""
        outputs: Tensor = layer.eckart(x)
        return outputs if bias is None else outputs + bias


def _device(layer: nn.Module) -> torch.device:
    return next((parameter.device for parameter in layer.parameters()), torch.device("cpu"))


def _tensor_names(found: Iterable[shards.Shard]) -> list[str]:
    """Return the names of the tensors of the matrices, guards among them; a layer makes its own bias."""
    names = ["weight"]
    for shard in found:
        names += [name for name in (*shard.tensors(), *shard.biases()) if name != "bias"]
    return list(dict.fromkeys(names))


def _name(layer: nn.Module, name: str, dtype: torch.dtype, load: Callable[..., None]) -> None:
    """Register an empty parameter called `name`, dots included, that hands what is loaded to `load`."""
    owner = layer
    *path, leaf = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    kind = torch.int32 if name in shards.INDICES else dtype
    parameter = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": load})
    owner.register_parameter(leaf, parameter)
