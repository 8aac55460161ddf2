"""What a model is exported to: engine, storage, blocks; and what has to be installed for it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

ONNX, OPENVINO = "onnx", "openvino"
FLOAT = "float32"
STORAGES = {ONNX: (FLOAT, "int8", "int4"), OPENVINO: (FLOAT, "float16", "int8", "int4")}
BLOCKS = (32, 64, 128)
GRAPHS = {ONNX: "model.onnx", OPENVINO: "openvino_model.xml"}
"""The file of an exported folder that the engine opens."""
TOLERANCE = {FLOAT: 1e-4, "float16": 2e-2}
"""The largest difference of a logit, relative to the largest logit, that a float export may have."""
_RUN = {ONNX: ("onnxruntime",), OPENVINO: ("openvino",)}
_MAKE = {ONNX: ("onnx", "onnxscript", "onnxruntime"), OPENVINO: ("onnx", "onnxscript", "openvino", "nncf")}


@dataclass(frozen=True, slots=True)
class Form:
    """An engine, and how weights are stored for it.

    Args:
        target: onnx (onnxruntime) or openvino.
        storage: one of STORAGES of the target; `float` is float32.
        block: how many weights of a row have a scale in common, in int4, and in int8 for onnxruntime.

    Raises:
        ConfigError: there is no such target, storage or block.
    """

    target: str
    storage: str = FLOAT
    block: int = 32

    def __post_init__(self) -> None:
        if self.target not in STORAGES:
            raise ConfigError(f"target {self.target!r}: legal are {', '.join(STORAGES)}")
        if self.storage == "float":
            object.__setattr__(self, "storage", FLOAT)
        if self.storage not in STORAGES[self.target]:
            legal = ", ".join(STORAGES[self.target])
            raise ConfigError(f"storage {self.storage!r}: legal with --to {self.target} are {legal}")
        if self.block not in BLOCKS:
            raise ConfigError(f"block {self.block!r}: legal are {', '.join(map(str, BLOCKS))}")

    @property
    def graph(self) -> str:
        """The file that the engine opens."""
        return GRAPHS[self.target]

    @property
    def tolerance(self) -> float | None:
        """The largest relative difference of a logit that is let pass; None where few bits make their own."""
        return TOLERANCE.get(self.storage)


def need_to_make(target: str) -> None:
    """Raise ConfigError unless all that an export to `target` takes is installed."""
    _need(_MAKE[target], target)


def need_to_run(target: str) -> None:
    """Raise ConfigError unless the engine of `target` is installed."""
    _need(_RUN[target], target)


def installed(package: str) -> bool:
    """Tell whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _need(packages: Sequence[str], extra: str) -> None:
    missing = [name for name in packages if not installed(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed: pip install 'eckart[{extra}]'")
