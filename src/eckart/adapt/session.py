"""Tuning in one call: load, tune, write a folder."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import hub, modelcard, models
from ..errors import ConfigError, ModelError
from ..stages import Watch, silent
from ..training import is_main
from . import quantised, report_tune
from .tuned import Prospect, Tuned
from .tuning import Tuning, from_mapping

if TYPE_CHECKING:
    from .attach import Attached


def tune(
    model: Any,
    tuning: Tuning | None = None,
    *,
    out: str | Path | None = None,
    work: str | Path | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    text_licence: str | None = None,
    overwrite: bool = False,
    before: Callable[[Prospect], None] = lambda prospect: None,
    watch: Watch = silent,
    **settings: Any,
) -> tuple[Any, Tuned]:
    """Tune a model, or an adapter on it, on examples; compressed folders are tuned as they are.

        model, tuned = eckart.tune("model", method="lora", data="rows.jsonl", rank=8, out="adapter")

    Args:
        model: a hub id, a folder (compressed or not), a .gguf file, or a model, changed in place.
        tuning: the settings, or
        settings: what Tuning takes, by name.
        out: a new folder: a standard PEFT adapter, or the model for method full; default: none is written.
        work: a folder for the state of the run, so that an interrupted one goes on to the same result; the
            caller deletes it. Default: beside `out`, deleted at the end; without `out`, one must be given.
        tokenizer: for a model given as an object.
        device: cuda, mps, cpu; default: the first that is there.
        trust_remote_code: run code that the model brings along.
        text_licence: of the data, for the card.
        overwrite: replace the folder `out`.
        before: called once, before the first step, with what is known then.
        watch: called with (stage, done, total).

    Returns:
        PEFT's model with the adapter on it (the model itself for method full) in its best state, and what
        was done.

    Raises:
        ConfigError, ModelError, RankError, NotFinite: as in eckart.adapt.tune.tune.
        StoreError: `out` cannot be written, or `work` holds the state of another run.
    """
    if tuning is not None and settings:
        raise ConfigError(f"got tuning and {', '.join(settings)}: give one or the other")
    tuning = tuning or from_mapping(settings)
    place = _work(out, work)
    if out is not None:
        hub.check_output(Path(out), overwrite)
        if isinstance(model, (str, Path)):
            hub.check_output(Path(out), overwrite, str(model))
    loaded = _loaded(model, tuning, tokenizer, device, trust_remote_code)
    quantised.quiet()
    from . import tune as tuner  # Trainer takes seconds to import

    attached, tuned = tuner.tune(loaded, tuning, work=place, before=before, watch=watch)
    if out is not None and is_main():
        tuned = write(Path(out), loaded, attached, tuned, text_licence=text_licence, overwrite=overwrite)
        if work is None:
            shutil.rmtree(place, ignore_errors=True)
    return attached.model, tuned


def _work(out: str | Path | None, work: str | Path | None) -> Path:
    if work is not None:
        return Path(work)
    if out is None:
        raise ConfigError("neither out nor work: name the folder to write, or one for the state of the run")
    return work_folder(Path(out))


def work_folder(out: Path) -> Path:
    """Return where a run that writes `out` keeps its state until then."""
    return out.parent / f".{out.name}.tuning"


def _loaded(
    model: Any, tuning: Tuning, tokenizer: Any, device: str | None, trust_remote_code: bool
) -> hub.Loaded:
    if isinstance(model, (str, Path)):
        place = hub.device(device)
        # All parameters are trained in float32, whatever is multiplied in; a frozen base may be narrow.
        compute = torch.float32 if tuning.method == "full" else None
        return hub.load(str(model), compute=compute, place=place, trust_remote_code=trust_remote_code)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise ModelError(f"got a {type(model).__name__}: give a hub id, a path or a transformers model")
    given: Any = model
    stored = given.dtype
    if tuning.method == "full":
        models.cast(given, torch.float32)
    return hub.Loaded(given.eval(), tokenizer, given.config.name_or_path or "model", stored, None)


def write(
    out: Path,
    loaded: hub.Loaded,
    attached: "Attached",
    tuned: Tuned,
    *,
    text_licence: str | None = None,
    overwrite: bool = False,
) -> Tuned:
    """Write what was tuned as a new folder; return `tuned` with the bytes of its weight files.

    Raises:
        StoreError: `out` cannot be written.
    """
    from . import tune as tuner

    tuning = tuned.prospect.tuning
    with hub.new_folder(out, overwrite) as folder:
        if tuning.method == "full":
            models.cast(attached.model, loaded.stored)
            hub.write(folder, attached.model, loaded.tokenizer)
        else:
            tuner.write_adapter(folder, attached, loaded.source, tuning)
            loaded.tokenizer.save_pretrained(folder)
        done = replace(tuned, stored_bytes=hub.weight_bytes(folder))
        plot = bool(done.trajectory) and report_tune.plot_ranks(done, folder / "ranks.png")
        if done.decline is not None:
            report_tune.plot_spectra(done, folder / "spectra.png")
        documents = report_tune.documents(done, attached.storage, plot)
        modelcard.write(folder, out.name, documents, report_tune.facts(done, text_licence))
    return done
