"""Training from scratch in one call: config and text in, a model with its tokenizer out."""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from .. import hub, modelcard, models, render, text
from ..adapt.session import work_folder
from ..adapt.tuned import Prospect, Tuned
from ..errors import ConfigError, ModelError
from ..pages.notebook import Shown
from ..stages import Watch, silent
from ..training import is_main
from . import preset, report_pretrain, tokens
from .pretraining import Pretraining, from_mapping

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .switch import Switched


@dataclass(frozen=True, slots=True)
class Pretrained(Shown):
    """What came of a run.

    Args:
        settings: what it was started with.
        tuned: how it went.
        parameters: of the model in the end.
        dense: of the same architecture at full rank.
        ranks: of every matrix that is low-rank.
        vocabulary: tokens of the tokenizer.
        switched: what became of the optimizer's states where there were steps at full rank first, and the run
            did not go on from a later checkpoint.
    """

    settings: Pretraining
    tuned: Tuned
    parameters: int
    dense: int
    ranks: Mapping[str, int]
    vocabulary: int
    switched: "Switched | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"schema": 1, **asdict(self)}

    def __str__(self) -> str:
        """Show it as plain text tables."""
        return render.plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        return report_pretrain.result_table(self.to_dict(), self.tuned)


def pretrain(
    config: PretrainedConfig | str | Path,
    settings: Pretraining | None = None,
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
    **given: Any,
) -> tuple[Any, Pretrained]:
    """Train a model from scratch, low-rank from the first step, after a warm-up at full rank, or not at all.

        model, done = eckart.pretrain("config", data="text.txt", keep=0.5, vocabulary=4096, out="small")

    Args:
        config: of transformers, or a hub id or folder that has one; weights there are not read.
        settings: the settings, or
        given: what Pretraining takes, by name.
        out: a new folder for the model; default: none is written.
        work: a folder for the state of the run, so that an interrupted one goes on to the same result; the
            caller deletes it. Default: beside `out`, deleted at the end; without `out`, one must be given.
        tokenizer: an object, or what the settings call so.
        device: cuda, mps, cpu; default: the first that is there.
        trust_remote_code: run the code that the config brings along.
        text_licence: of the data, for the model card.
        overwrite: replace the folder `out`.
        before: called once, before the first step, with what is known then.
        watch: called with (stage, done, total).

    Returns:
        The model in its best state on held-out text (of those at low rank, where there are steps at full rank
        first), and what was done.

    Raises:
        ConfigError: data, settings or packages do not fit.
        RankError: the budget cannot be reached, or a rank is above break-even.
        ModelError: there is no such config, or nothing to make low-rank.
        NotFinite: the loss is NaN or infinite before any state was judged.
        StoreError: `out` cannot be written, or `work` holds the state of another run.
    """
    settings, tokenizer = _resolved(settings, given, tokenizer)
    if out is None and work is None:
        raise ConfigError("neither out nor work: name the folder to write, or one for the state of the run")
    state = work_folder(Path(str(out))) if work is None else Path(work)
    if out is not None:
        hub.check_output(Path(out), overwrite, str(config) if isinstance(config, (str, Path)) else None)
    from ..adapt import tune  # Trainer takes seconds to import
    from .switch import Switch

    loaded, dense = _built(config, settings, tokenizer, device, trust_remote_code, watch)
    callbacks = _callbacks(settings)
    _, tuned = tune.tune(
        loaded, settings.tuning(), work=state, callbacks=callbacks, before=before, watch=watch
    )
    switches = [found.done for found in callbacks if isinstance(found, Switch)]
    done = Pretrained(
        settings=settings,
        tuned=tuned,
        parameters=models.parameter_count(loaded.model),
        dense=dense,
        ranks=_ranks(loaded.model),
        vocabulary=len(loaded.tokenizer),
        switched=switches[0] if switches else None,
    )
    models.cast(loaded.model, hub.dtype(settings.dtype))
    if out is not None and is_main():
        done = write(Path(out), loaded, done, text_licence=text_licence, overwrite=overwrite)
        if work is None:
            shutil.rmtree(state, ignore_errors=True)
    return loaded.model.eval(), done


def _resolved(
    settings: Pretraining | None, given: Mapping[str, Any], tokenizer: Any
) -> tuple[Pretraining, Any]:
    """Return the settings, and the tokenizer if it is an object and they name none."""
    if settings is not None and given:
        raise ConfigError(f"got settings and {', '.join(given)}: give one or the other")
    if isinstance(tokenizer, (str, Path)):
        given = {**given, "tokenizer": str(tokenizer)}
        settings = replace(settings, tokenizer=str(tokenizer)) if settings else None
        tokenizer = None
    settings = settings or from_mapping(given)
    if tokenizer is not None and (settings.tokenizer or settings.vocabulary):
        raise ConfigError(
            f"got a tokenizer, and settings that name {settings.tokenizer or settings.vocabulary}: give one"
        )
    return settings, tokenizer


def _ranks(model: Any) -> dict[str, int]:
    found: dict[str, Any] = {**models.low_rank_modules(model)}
    return {name: module.rank for name, module in found.items()}


def _callbacks(settings: Pretraining) -> list[Any]:
    structure = settings.structure()
    if structure is None:
        return []
    from .decay import FrobeniusDecay
    from .switch import Switch

    moving = [] if settings.dense_steps is None else [Switch(structure, settings.dense_steps)]
    return [FrobeniusDecay(settings.frobenius), *moving]


def _built(
    config: Any, settings: Pretraining, tokenizer: Any, device: str | None, remote: bool, watch: Watch
) -> tuple[hub.Loaded, int]:
    """Return the model as it begins, with its tokenizer, and its parameters at full rank."""
    hub.dtype(settings.dtype)
    place, source = hub.device(device), "from scratch"
    if isinstance(config, (str, Path)):
        source = str(config)
        config = hub.load_config(source, trust_remote_code=remote)
    config = copy.deepcopy(config)
    watch("tokenizer", 0, 1)
    found = tokenizer or _tokenizer(source, settings, remote)
    _fit(config, found, settings)
    watch("tokenizer", 1, 1)
    watch("build", 0, 1)
    model = preset.build(config, seed=settings.seed, trust_remote_code=remote)
    dense, structure = models.parameter_count(model), settings.structure()
    if structure is not None:
        # Refused now, also where the switch comes later.
        preset.ranks(model, structure)
        if settings.dense_steps is None:
            model = preset.factorize(model, structure)
    watch("build", 1, 1)
    return hub.Loaded(model.to(place), found, source, torch.float32, None), dense


def _tokenizer(source: str, settings: Pretraining, remote: bool) -> Any:
    if settings.vocabulary is not None:
        if not settings.data:
            raise ConfigError("no data: give at least one source to learn from")
        return tokens.train((text.read(name, None) for name in settings.data), settings.vocabulary)
    where = settings.tokenizer or source
    try:
        return hub.load_tokenizer(where, trust_remote_code=remote)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"no tokenizer at {where}: name one (tokenizer), or have one trained on the data (vocabulary)"
        ) from error


def _fit(config: Any, tokenizer: Any, settings: Pretraining) -> None:
    """Give `config` the vocabulary of a tokenizer that was trained for it, or check that it has room."""
    inner = config.get_text_config()
    if settings.vocabulary is not None:
        inner.vocab_size = len(tokenizer)
        inner.bos_token_id, inner.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        inner.pad_token_id = None
    elif len(tokenizer) > inner.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer):,} tokens and the config a vocab_size of "
            f"{inner.vocab_size:,}: raise it in the config, or give another tokenizer"
        )


def write(
    out: Path,
    loaded: hub.Loaded,
    done: Pretrained,
    *,
    text_licence: str | None = None,
    overwrite: bool = False,
) -> Pretrained:
    """Write what was trained as a new folder; return `done` with the bytes of its weight files.

    Raises:
        StoreError: `out` cannot be written.
    """
    with hub.new_folder(out, overwrite) as folder:
        hub.write(folder, loaded.model, loaded.tokenizer)
        done = replace(done, tuned=replace(done.tuned, stored_bytes=hub.weight_bytes(folder)))
        plot = report_pretrain.plot(done.tuned, folder / "spectra.png")
        documents = report_pretrain.documents(done.to_dict(), done.tuned, plot)
        modelcard.write(folder, out.name, documents, report_pretrain.facts(done.tuned, text_licence))
    return done
