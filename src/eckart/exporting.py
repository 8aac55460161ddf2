"""Models in forms that need no eckart: dense ones for transformers, graphs for other engines."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import hub, modelcard, models, plugin, render, report_healing, stores, tasks
from .environment import name_of
from .errors import ConfigError, ModelError
from .exports import write
from .exports.options import STORAGES, Form
from .exports.result import EngineExport
from .losses import dtype_of
from .modelcard import Facts
from .stages import Watch, silent

if TYPE_CHECKING:
    from rich.console import RenderableType

DENSE = "dense"
TARGETS = (DENSE, *STORAGES)


@dataclass(frozen=True, slots=True)
class Exported:
    """A model that was written in another form.

    Args:
        source: the compressed folder.
        target: the form.
        parameters: of the model, before and after.
        bytes: of the weight files, before and after; before is None where they are not at hand.
        dtype: of the weights that were written.
        difference: the largest difference of a logit on random tokens, both models in float32 with the
            weights as they are stored, relative to the largest logit; None where there are no logits.
    """

    source: str
    target: str
    parameters: tuple[int, int]
    bytes: tuple[int | None, int]
    dtype: str
    difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        return render.plain(self.__rich__())

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        return render.table(f"{self.source}: {self.target}", ("", "before", "after"), self.rows())

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows (what, before, after) of the table."""
        before, after = self.bytes
        size = "" if before is None else f"{before:,}"
        rows = [
            ("parameters", f"{self.parameters[0]:,}", f"{self.parameters[1]:,}"),
            ("bytes of the weight files", size, f"{after:,}"),
        ]
        if before is not None:
            saved = f"saved against {self.target}"
            rows.append((saved, f"{1 - before / after:.1%}", "nothing"))
        if self.difference is not None:
            rows.append(("largest difference of a logit, relative", "", f"{self.difference:.1e}"))
        return rows


def export(
    source: str | Path,
    out: str | Path,
    to: str = DENSE,
    *,
    dtype: str | None = None,
    storage: str | None = None,
    block: int | None = None,
    cache: str | Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Exported | EngineExport:
    """Write a model for programs that know no eckart.

    `dense` multiplies the factors of a compressed folder out and takes weights out of few bits: a stock model
    of the original architecture, which loads everywhere and computes the same. What compression saved is gone
    with it: parameters, bytes and time are those of the original.

    `onnx` (for onnxruntime) and `openvino` keep the factors. They take any causal language model whose layers
    keep keys and values, compressed or not. What is written is checked against PyTorch in float32, through
    its own cache and generation loop; a float export that differs by more than rounding is refused. Open it
    by `eckart.open_export`.

    Args:
        source: a folder that eckart wrote, or a hub id of one; for an engine any model, or a .gguf file.
        out: the folder to write.
        to: the form: dense, onnx, openvino.
        dtype: of the weights of a dense model; default: as stored.
        storage: of the weights for an engine: float32 (default), int8, int4; float16 for openvino.
        block: how many weights of a row have a scale in common, 32 (default), 64 or 128; in int4, and in int8
            for onnx.
        cache: a folder to keep traced graphs in, for later exports of the same model to engines.
        trust_remote_code: run code that a model brings along.
        overwrite: replace `out`.
        watch: is told of progress.

    Raises:
        ConfigError: there is no such form, dtype, storage or block, one does not go with the form, or a
            package is not installed.
        ModelError: the model cannot be read; is not compressed (dense); cannot be traced, or the engine
            computes something else (engines).
        NotFinite: a logit is NaN or infinite.
        StoreError: `out` exists.
    """
    if to not in TARGETS:
        raise ConfigError(f"form {to!r}: legal are {', '.join(TARGETS)}")
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "overwrite": overwrite}
    common["watch"] = watch or silent
    if to == DENSE:
        _refuse(to, storage=storage, block=block, cache=cache)
        return _export_dense(str(source), Path(out), dtype, **common)
    _refuse(to, dtype=dtype)
    given = {"storage": storage, "block": block}
    form = Form(to, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    return write.export(str(source), Path(out), form, cache=None if cache is None else Path(cache), **common)


def _refuse(to: str, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} is not an option of --to {to}: leave it out")


def _export_dense(
    source: str, out: Path, dtype: str | None, *, trust_remote_code: bool, overwrite: bool, watch: Watch
) -> Exported:
    wanted = None if dtype is None else hub.dtype(dtype)
    hub.check_output(out, overwrite, source)
    known = report_healing.known(source)
    watch("load", 0, 1)
    loaded = hub.load(source, task=tasks.AUTO, compute=torch.float32, trust_remote_code=trust_remote_code)
    model = loaded.model
    if not (models.low_rank_modules(model) or stores.stored(model)):
        raise ModelError(f"{source} is not compressed by eckart: nothing is to be multiplied out; copy it")
    before, expected = models.parameter_count(model), _logits(model)
    watch("export", 0, 1)
    plugin.densify(model)
    difference = _difference(model, expected)
    models.cast(model, wanted or loaded.stored)
    watch("write", 0, 1)
    with hub.new_folder(out, overwrite) as folder:
        hub.write(folder, model, loaded.tokenizer)
        found = Exported(
            source=source,
            target=DENSE,
            parameters=(before, models.parameter_count(model)),
            bytes=(loaded.bytes, hub.weight_bytes(folder)),
            dtype=str(dtype_of(model)).removeprefix("torch."),
            difference=difference,
        )
        report = known | {"exported": found.to_dict()}
        documents = {"README.md": _card(found), "eckart.json": render.to_json(report)}
        modelcard.write(folder, out.name, documents, _facts(found, loaded.task))
    watch("write", 1, 1)
    return found


def _card(found: Exported) -> str:
    return f"## Exported\n\n{render.markdown_table(('', 'before', 'after'), found.rows())}\n"


def _facts(found: Exported, task: str) -> Facts:
    name = name_of(found.source)
    summary = (
        f"{name}, compressed by eckart, as an ordinary model of the original architecture: factors are "
        "multiplied out, weights taken out of few bits. It computes the same and loads without eckart; what "
        "compression saved is gone."
    )
    return Facts(summary, (found.source,), task=task, continued=True)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor | None:
    """Return the logits of a causal language model on random tokens, of others None."""
    if model.get_output_embeddings() is None or getattr(model.config, "is_encoder_decoder", False):
        return None
    return models.probe_logits(model.eval(), models.probe(model))


def _difference(model: Any, expected: torch.Tensor | None) -> float | None:
    found = None if expected is None else _logits(model)
    if expected is None or found is None:
        return None
    return float((found - expected).abs().max() / expected.abs().max())
