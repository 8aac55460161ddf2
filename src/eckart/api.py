"""The whole of eckart in a few calls: compress, save, load, evaluate."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import hub, measure, mend, models, pipeline, quantising, recipe, report, report_healing, text
from .adapt import loading
from .errors import ConfigError, ModelError
from .healing import Healing
from .measure import Comparison, Perplexity
from .methods import Allocation, Shape
from .overrides import Override
from .recipe import Of, Recipe
from .result import Healed, Result

Sources = str | Path | Sequence[str | Path]


def _sources(given: Sources | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return (str(given),) if isinstance(given, (str, Path)) else tuple(map(str, given))


def compress(
    model: Any,
    *,
    keep: float | None = None,
    of: Of | None = None,
    size: int | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    method: str | None = None,
    allocation: Allocation | None = None,
    form: Shape | None = None,
    storage: str | None = None,
    embeddings: str | None = None,
    correction: str | None = None,
    correction_rank: int | None = None,
    correction_storage: str | None = None,
    stock: bool | None = None,
    depth: bool | None = None,
    text: Sources | None = None,
    eval_text: Sources | None = None,
    include: Sources | None = None,
    exclude: Sources | None = None,
    overrides: Sequence[Override] | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    foreign_text: Sources | None = None,
    heal: Healing | None = None,
    work: str | Path | None = None,
    cache: str | Path | None = None,
    recipe: Recipe | None = None,
    tokenizer: Any = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> tuple[Any, Result]:
    """Compress a causal language model to a budget: one of keep, size, rank, energy.

    Args:
        model: a hub id, a folder, a .gguf file, or a transformers model, which is changed in place
            (with stock or depth, the model that is returned is a new one).
        tokenizer: for a model given as an object, to read text with.
        recipe: where the other arguments start from; those that are given go over it. All of them
            are explained in eckart.recipe.Recipe.
        heal: refinements after the compression.
        work: a folder for the state of these, so that an interrupted run goes on to the same result; the
            caller deletes it.
        cache: a folder for what the dense model predicts, which later runs take from there.
        watch: called with (stage, done, total).

    Returns:
        The model in the output dtype, which saves and loads like any other, and the result.

    Raises:
        ConfigError: an argument is not legal.
        RankError: the budget cannot be reached.
        ModelError: the model cannot be loaded or treated.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    given = {
        "keep": keep, "of": of, "size": size, "rank": rank, "energy": energy, "method": method,
        "allocation": allocation, "form": form, "storage": storage, "embeddings": embeddings,
        "correction": correction, "correction_rank": correction_rank,
        "correction_storage": correction_storage, "stock": stock, "depth": depth,
        "text": _sources(text), "eval_text": _sources(eval_text),
        "include": _sources(include), "exclude": _sources(exclude),
        "overrides": None if overrides is None else tuple(overrides),
        "tokens": tokens, "gradient_tokens": gradient_tokens, "seq_len": seq_len, "seed": seed,
        "dtype": dtype, "device": device,
        "foreign_text": _sources(foreign_text), "heal": heal,
    }  # fmt: skip
    by_name = isinstance(model, (str, Path))
    if by_name:
        given["model"] = str(model)
    resolved = _resolve(recipe, given)
    loaded = pipeline.load_for(resolved) if by_name else _given(model, tokenizer)
    ward = mend.Ward(_path(work), _path(cache))
    return pipeline.finish(resolved, pipeline.prepare(resolved, loaded, watch), ward)


def quantise(
    model: Any,
    storage: str | None = None,
    *,
    embeddings: str | None = None,
    correction: str | None = None,
    correction_rank: int | None = None,
    correction_storage: str | None = None,
    text: Sources | None = None,
    eval_text: Sources | None = None,
    foreign_text: Sources | None = None,
    method: str | None = None,
    exclude: Sources | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    tokenizer: Any = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> tuple[Any, Result]:
    """Store a model, dense or compressed, in few bits; ranks and widths stay as they are.

    Errors are made good for each other, and measured, in the metric of `method` (eckart: of inputs and of
    output gradients on `text`; svd: none, and no text).

    Args:
        model: a hub id, a folder, a .gguf file, or a model, which is changed in place.
        storage: of the matrices of the blocks, a name of eckart.quant.storage.STORAGES, or float.
        embeddings: storage of the embeddings and of the output head; default: the same.
        correction: a low-rank correction of each matrix that is whole, a row of
            eckart.quant.correction.METHODS; compressed ones have none.
        correction_rank: in all they take at most the bytes of this rank in each (16).
        correction_storage: of their factors (int8).

    The others are as in `compress`.

    Returns:
        The model, which saves and loads like any other, and the result.

    Raises:
        ConfigError: an argument is not legal.
        ModelError: the model cannot be loaded, or is stored in few bits already.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    given = {
        "keep": 1.0, "storage": storage, "embeddings": embeddings, "text": _sources(text),
        "correction": correction, "correction_rank": correction_rank,
        "correction_storage": correction_storage,
        "eval_text": _sources(eval_text), "foreign_text": _sources(foreign_text), "method": method,
        "exclude": _sources(exclude), "tokens": tokens, "gradient_tokens": gradient_tokens,
        "seq_len": seq_len, "seed": seed, "dtype": dtype, "device": device,
    }  # fmt: skip
    by_name = isinstance(model, (str, Path))
    resolved = _resolve(None, given | ({"model": str(model)} if by_name else {}))
    quantising.check(resolved)
    return quantising.quantise(resolved, loaded_for(resolved) if by_name else _given(model, tokenizer), watch)


def loaded_for(resolved: Recipe) -> hub.Loaded:
    """Load the model that `resolved` names, compressed or not, to compute on its device.

    Raises:
        ModelError: it names none, or it cannot be loaded.
    """
    return pipeline.load_for(resolved, low_rank=True)


def heal(
    model: Any,
    teacher: Any,
    text: Sources,
    *,
    settings: Healing | None = None,
    eval_text: Sources | None = None,
    foreign_text: Sources | None = None,
    eval_tokens: int = 12_288,
    bos: bool = False,
    work: str | Path | None = None,
    cache: str | Path | None = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Callable[[str, int, int], None] | None = None,
) -> tuple[Any, Healed]:
    """Bring a compressed model closer to the dense one that it was made of; ranks and widths stay.

    Args:
        model: a compressed folder, or a model in memory, which is changed in place.
        teacher: the dense model: a hub id, a folder, a .gguf file, or a model in memory.
        text: sources to learn from, each `NAME` or `NAME=WEIGHT` (eckart.lessons).
        settings: which refinements, and how; default: Healing().
        eval_text: sources to measure perplexity on, before and after; default: none, only the divergence on
            the last tenth of `text` is measured.
        foreign_text: sources of another kind to measure on as well.
        eval_tokens: of each.
        bos: begin windows with the begin-of-text token.
        work: a folder for the state, so that an interrupted run goes on to the same result; the caller
            deletes it.
        cache: a folder for what the teacher predicts, which later runs take from there.
        tokenizer: for a model given as an object.
        dtype: of the output; default: as stored.
        device: cuda, mps, cpu; default: the first that is there.
        trust_remote_code: run code that a model brings along.
        watch: called with (stage, done, total).

    Returns:
        The model in the output dtype, and what was done.

    Raises:
        ConfigError: a setting is not legal, or there is too little text.
        ModelError: the two models do not belong together.
        StoreError: the state or the cache cannot be used.
    """
    own, dense = (
        _loaded(which, tokenizer, "float32", device, trust_remote_code) for which in (model, teacher)
    )
    stored = own.model.dtype if not isinstance(model, (str, Path)) else own.stored
    models.cast(own.model, torch.float32)
    resolved = replace(settings or Healing(), text=_sources(text) or ())
    return mend.healed(
        own, dense, resolved,
        texts=(_sources(eval_text) or (), _sources(foreign_text) or ()),
        tokens=eval_tokens, bos=bos, ward=mend.Ward(_path(work), _path(cache)),
        dtype=hub.dtype(dtype) if dtype else stored, watch=watch,
    )  # fmt: skip


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _resolve(base: Recipe | None, given: dict[str, Any]) -> Recipe:
    start = {} if base is None else {name: getattr(base, name) for name in Recipe.__dataclass_fields__}
    return recipe.from_mapping(recipe.override(start, given), "compress")


def _given(model: Any, tokenizer: Any) -> hub.Loaded:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise ModelError(f"got a {type(model).__name__}: give a hub id, a path or a transformers model")
    anything: Any = model.eval()
    return hub.Loaded(anything, tokenizer, anything.config.name_or_path or "model", anything.dtype, None)


def save(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    result: Result | Healed | None = None,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a new folder, with card, recipe and report when there is a result.

    `source` is the folder that was healed, whose card and report go along.

    Raises:
        StoreError: `out` exists (and `overwrite` is not given, or it is not a model folder).
    """
    out = Path(out)
    with hub.new_folder(out, overwrite) as folder:
        hub.write(folder, model, tokenizer)
        if isinstance(result, Healed):
            for name, content in report_healing.documents(result, *report_healing.known(source)).items():
                (folder / name).write_text(content, encoding="utf-8")
        elif result is not None:
            measured = result.with_file_bytes(hub.weight_bytes(folder))
            for name, content in report.documents(measured, out.name).items():
                (folder / name).write_text(content, encoding="utf-8")
    return out


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model, compressed or not, in the dtype it is stored in unless another is asked for.

    The folder of an adapter gives PEFT's model: the base that it names, in NF4 where it was trained on
    that, with the adapter on it.

    Raises:
        ModelError: it cannot be read.
        StoreError: what a compressed folder declares and what it holds disagree.
    """
    place = hub.device(device) if device else torch.device("cpu")
    wanted = hub.dtype(dtype) if dtype else None
    if loading.is_adapter(source):
        return loading.load(source, compute=wanted, place=place, trust_remote_code=trust_remote_code).model
    stored = wanted or hub.stored_dtype(str(source), trust_remote_code=trust_remote_code)
    return hub.load(str(source), compute=stored, place=place, trust_remote_code=trust_remote_code).model


def evaluate(
    model: Any,
    text: Sources,
    *,
    tokens: int = 24_576,
    seq_len: int = 512,
    bos: bool = False,
    against: Any = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Perplexity | Comparison:
    """Measure perplexity by the protocol of eckart.measure; with `against`, compare two models.

    Args:
        model, against: hub ids, paths or models. Models with different tokenizers have no common
            perplexity; `against` is run on the tokens of `model`.
        text: sources to read (eckart.text.read).
        tokens: from the start of the text.
        seq_len: window length, of which all but the first token are predicted.
        bos: begin every window with the tokenizer's begin-of-text token.
        tokenizer: for a model given as an object.
        dtype: to compute in; default: float32 on a CPU, else as stored.

    Raises:
        NotFinite: a logit is NaN or infinite.
        ConfigError: no text, or no such option.
    """
    first = _loaded(model, tokenizer, dtype, device, trust_remote_code)
    windows = _eval_windows(text, first.tokenizer, tokens, seq_len, bos)
    measure.check_length(first.model, seq_len)
    measure.check_causal(first.model)
    if against is None:
        return measure.perplexity(first.model, windows, watch)
    second = _loaded(against, first.tokenizer, dtype, device, trust_remote_code)
    _same_vocabulary(first, second)
    return measure.compare(first.model, second.model, windows, watch)


def _loaded(model: Any, tokenizer: Any, dtype: str | None, device: str | None, remote: bool) -> hub.Loaded:
    if not isinstance(model, (str, Path)):
        return _given(model, tokenizer)
    compute, place = hub.dtype(dtype) if dtype else None, hub.device(device)
    if loading.is_adapter(model):
        found = loading.load(model, compute=compute, place=place, trust_remote_code=remote)
        return replace(found, model=found.model.get_base_model())
    return hub.load(str(model), compute=compute, place=place, trust_remote_code=remote)


def _eval_windows(sources: Sources, tokenizer: Any, tokens: int, seq_len: int, bos: bool) -> torch.Tensor:
    if tokenizer is None:
        raise ModelError("text needs a tokenizer: pass tokenizer=")
    if tokens < 2 or seq_len < 2:
        raise ConfigError(f"tokens {tokens}, seq_len {seq_len}: both must be at least 2")
    parts = [text.tokenize(text.read(source, tokenizer), tokenizer) for source in _sources(sources) or ()]
    return text.windows(torch.cat(parts)[:tokens], seq_len, text.begin_token(tokenizer, bos))


def _same_vocabulary(first: hub.Loaded, second: hub.Loaded) -> None:
    own, other = (models.vocabulary(loaded.model) for loaded in (first, second))
    if own != other:
        raise ModelError(
            f"{first.source} has a vocabulary of {own} and {second.source} of {other}: "
            "models with different tokenizers cannot be compared token by token"
        )
