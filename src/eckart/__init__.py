"""eckart: find the low-rank structure of a language model, shrink the model by it, say what it cost.

Importing it teaches transformers to load compressed folders (quantization method "eckart").
"""

__version__ = "0.1.0"

from . import interpolative, linalg, nystrom
from .adapt.difference import diff
from .adapt.session import tune
from .adapt.toolbox import extract, merge, resize
from .api import compress, heal, load, quantise, save
from .api_sharing import share, tie, untie
from .comparing import compare
from .curving import curve
from .errors import (
    ConfigError,
    EckartError,
    ModelError,
    NotFinite,
    NotPositiveDefinite,
    RankError,
    StoreError,
)
from .evaluating import evaluate
from .exporting import export
from .exports.session import open_export
from .fusing import fuse, unfuse
from .healing import Healing
from .overrides import Override
from .plugin import densify
from .recipe import Recipe
from .scratch.preset import from_config
from .scratch.pretrain import pretrain
from .speed.run import bench, bench_layers
from .stats import collect
from .streaming.execute import compress_to
from .surveying import spectrum
from .sweeping import sweep

__all__ = [
    "ConfigError",
    "EckartError",
    "Healing",
    "ModelError",
    "NotFinite",
    "NotPositiveDefinite",
    "Override",
    "RankError",
    "Recipe",
    "StoreError",
    "__version__",
    "bench",
    "bench_layers",
    "collect",
    "compare",
    "compress",
    "compress_to",
    "curve",
    "densify",
    "diff",
    "evaluate",
    "export",
    "extract",
    "from_config",
    "fuse",
    "heal",
    "interpolative",
    "linalg",
    "load",
    "merge",
    "nystrom",
    "open_export",
    "pretrain",
    "quantise",
    "resize",
    "save",
    "share",
    "spectrum",
    "sweep",
    "tie",
    "tune",
    "unfuse",
    "untie",
]
