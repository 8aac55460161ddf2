"""Compressed models in forms that need no eckart."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import hub, modelcard, models, plugin, render, report_healing, stores, tasks
from .errors import ConfigError, ModelError
from .losses import dtype_of
from .modelcard import Facts
from .stages import Watch, silent

if TYPE_CHECKING:
    from rich.console import RenderableType

TARGETS = ("dense",)


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
    to: str = "dense",
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Exported:
    """Write a compressed folder for programs that know no eckart.

    `dense` multiplies factors out and takes weights out of few bits: a stock model of the original
    architecture, which loads everywhere and computes the same. What compression saved is gone with it:
    parameters, bytes and time are those of the original.

    Args:
        source: a folder that eckart wrote, or a hub id of one.
        out: the folder to write.
        to: the form, dense.
        dtype: of the weights; default: as stored.
        trust_remote_code: run code that a model brings along.
        overwrite: replace `out`.
        watch: is told of progress.

    Raises:
        ConfigError: there is no such form, or dtype.
        ModelError: the model cannot be read, or is not compressed.
        StoreError: `out` exists.
    """
    show: Watch = watch or silent
    source, out = str(source), Path(out)
    if to not in TARGETS:
        raise ConfigError(f"form {to!r}: legal are {', '.join(TARGETS)}")
    wanted = None if dtype is None else hub.dtype(dtype)
    hub.check_output(out, overwrite, source)
    known = report_healing.known(source)
    show("load", 0, 1)
    loaded = hub.load(source, task=tasks.AUTO, compute=torch.float32, trust_remote_code=trust_remote_code)
    model = loaded.model
    if not (models.low_rank_modules(model) or stores.stored(model)):
        raise ModelError(f"{source} is not compressed by eckart: nothing is to be multiplied out; copy it")
    before, expected = models.parameter_count(model), _logits(model)
    show("export", 0, 1)
    plugin.densify(model)
    difference = _difference(model, expected)
    models.cast(model, wanted or loaded.stored)
    show("write", 0, 1)
    with hub.new_folder(out, overwrite) as folder:
        hub.write(folder, model, loaded.tokenizer)
        found = Exported(
            source=source,
            target=to,
            parameters=(before, models.parameter_count(model)),
            bytes=(loaded.bytes, hub.weight_bytes(folder)),
            dtype=str(dtype_of(model)).removeprefix("torch."),
            difference=difference,
        )
        report = known | {"exported": found.to_dict()}
        documents = {"README.md": _card(found), "eckart.json": render.to_json(report)}
        modelcard.write(folder, out.name, documents, _facts(found, loaded.task))
    show("write", 1, 1)
    return found


def _card(found: Exported) -> str:
    return f"## Exported\n\n{render.markdown_table(('', 'before', 'after'), found.rows())}\n"


def _facts(found: Exported, task: str) -> Facts:
    name = Path(found.source).name if Path(found.source).exists() else found.source
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
