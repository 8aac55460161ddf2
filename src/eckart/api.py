"""The whole of eckart in a few calls: compress, quantise, heal, save, load."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import (
    fusing,
    hub,
    losses,
    mend,
    models,
    pipeline,
    points,
    quantising,
    recipe,
    report,
    report_healing,
    report_sharing,
    running,
    tasks,
)  # fmt: skip
from .adapt import loading
from .batches import Call, Key
from .errors import ConfigError, ModelError
from .healing import Healing
from .joined import Joined, Tied
from .latency import Objective
from .methods import Allocation, Shape
from .objectives import Loss
from .overrides import Override
from .recipe import Of, Recipe, Split
from .result import Healed, Result
from .shelf import Shelf

Sources = str | Path | Sequence[str | Path]


def sources(given: Sources | None) -> tuple[str, ...] | None:
    """Return one source, or several, as a recipe has them; None as it is."""
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
    latency: float | str | None = None,
    objective: Objective | None = None,
    workload: int | str | None = None,
    times: str | Path | None = None,
    max_ppl_increase: str | None = None,
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
    share_inputs: bool | None = None,
    split: Split | None = None,
    text: Sources | None = None,
    eval_text: Sources | None = None,
    batches: Iterable[Call] | None = None,
    eval_batches: Iterable[Call] | None = None,
    loss: Loss | None = None,
    masks: Mapping[Key, Key] | None = None,
    inputs: Sequence[Key] | None = None,
    gradient_batches: int | None = None,
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
    """Compress a model to a budget: one of keep, size, rank, energy, latency, max_ppl_increase.

    A causal language model is run on `text`. Any other model, of transformers or not, is run on `batches`,
    and its loss is measured before and after instead of a perplexity:

        eckart.compress(model, batches=loader, keep=0.6)
        eckart.compress(net, batches=pairs, keep=0.6, inputs=[0], loss=lambda y, pair: (y - pair[1]) ** 2 / 2)

    Args:
        model: a hub id, a folder, a .gguf file, or a model, which is changed in place
            (with stock or depth, the model that is returned is a new one).
        batches: what the model is called with: mappings of keyword arguments, tensors, or tuples of
            positional arguments, in any iterable, which is read once. The last tenth is left out of
            calibration and measured on.
        eval_batches: to measure on instead.
        loss: (outputs, batch) -> the losses of the terms, of any shape, or their sum, in nats where it is a
            log-likelihood; never a mean. Of a sum, the unit is a token (a sample, without sequences), else a
            term. Default: the model's own loss times what it is the mean of, which is checked; where it has
            none, how far the outputs are from the dense model's (eckart.objectives.Likeness).
        masks: argument with a sequence -> argument with its mask, where they are not those of transformers
            (input_ids: attention_mask, decoder_input_ids: decoder_attention_mask). Padding counts nowhere.
        inputs: the arguments of a batch that the model gets, by name or position, the others being there for
            `loss` alone; default: all.
        gradient_batches: how many of the batches gradients are taken on; default: all.
        tokenizer: for a model given as an object, to read text with.
        recipe: where the other arguments start from; those that are given go over it. All of them
            are explained in eckart.recipe.Recipe.
        heal: refinements after the compression.
        work: a folder for the state of these, so that an interrupted run goes on to the same result; the
            caller deletes it.
        cache: a folder for what serves other runs as well: statistics and decompositions (eckart.shelf), and
            what the dense model predicts (heal). What is there is taken from there, to the same bits.
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
        "keep": keep, "of": of, "size": size, "rank": rank, "energy": energy,
        "max_ppl_increase": max_ppl_increase, "method": method, "share_inputs": share_inputs,
        "latency": latency, "objective": objective, "workload": workload,
        "times": None if times is None else str(times), "dtype": dtype, "device": device,
        "allocation": allocation, "form": form, "storage": storage, "embeddings": embeddings,
        "correction": correction, "correction_rank": correction_rank, "stock": stock, "depth": depth,
        "correction_storage": correction_storage, "split": split, "foreign_text": sources(foreign_text),
        "text": sources(text), "eval_text": sources(eval_text),
        "include": sources(include), "exclude": sources(exclude),
        "overrides": None if overrides is None else tuple(overrides),
        "tokens": tokens, "gradient_tokens": gradient_tokens, "seq_len": seq_len, "seed": seed, "heal": heal,
    }  # fmt: skip
    if by_name := isinstance(model, (str, Path)):
        given["model"] = str(model)
    resolved = _resolve(recipe, given)
    details = (eval_batches, loss, masks, inputs, gradient_batches)
    if batches is None and any(one is not None for one in details):
        raise ConfigError(
            "eval_batches, loss, masks, inputs and gradient_batches go with batches: give these, too"
        )
    if batches is not None and (resolved.text or resolved.eval_text):
        raise ConfigError("got text and batches: give one of them to run the model on")
    loaded = pipeline.load_for(resolved) if by_name else _given(model, tokenizer)
    material = None
    if batches is not None:
        material = running.of_batches(
            loaded.model, list(batches), None if eval_batches is None else list(eval_batches),
            loss=loss, masks=masks, inputs=inputs, gradients=gradient_batches,
        )  # fmt: skip
        running.check(resolved, material, loaded.model)
    ward = mend.Ward(_path(work), _path(cache))
    shelf = None if ward.cache is None else Shelf(ward.cache)
    return points.compress(resolved, loaded, watch, material, ward, shelf)


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
        "keep": 1.0, "storage": storage, "embeddings": embeddings, "text": sources(text),
        "correction": correction, "correction_rank": correction_rank,
        "correction_storage": correction_storage,
        "eval_text": sources(eval_text), "foreign_text": sources(foreign_text), "method": method,
        "exclude": sources(exclude), "tokens": tokens, "gradient_tokens": gradient_tokens,
        "seq_len": seq_len, "seed": seed, "dtype": dtype, "device": device,
    }  # fmt: skip
    by_name = isinstance(model, (str, Path))
    resolved = _resolve(None, given | ({"model": str(model)} if by_name else {}))
    quantising.check(resolved)
    return quantising.quantise(resolved, loaded_for(resolved) if by_name else _given(model, tokenizer), watch)


def loaded_for(resolved: Recipe) -> hub.Loaded:
    """Load the model that `resolved` names, compressed or not, to compute on its device (or ModelError)."""
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
        loaded(which, tokenizer, "float32", device, trust_remote_code) for which in (model, teacher)
    )
    stored = own.model.dtype if not isinstance(model, (str, Path)) else own.stored
    models.cast(own.model, torch.float32)
    resolved = replace(settings or Healing(), text=sources(text) or ())
    return mend.healed(
        own, dense, resolved,
        texts=(sources(eval_text) or (), sources(foreign_text) or ()),
        tokens=eval_tokens, bos=bos, ward=mend.Ward(_path(work), _path(cache)),
        dtype=hub.dtype(dtype) if dtype else stored, watch=watch,
    )  # fmt: skip


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _resolve(base: Recipe | None, given: dict[str, Any]) -> Recipe:
    start = {} if base is None else {name: getattr(base, name) for name in Recipe.__dataclass_fields__}
    return recipe.from_mapping(recipe.override(start, given), "compress")


def _given(model: Any, tokenizer: Any) -> hub.Loaded:
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"got a {type(model).__name__}: give a hub id, a path or a model")
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    anything: Any = model.eval()
    task = tasks.of_model(model).name
    return hub.Loaded(anything, tokenizer, name or "model", losses.dtype_of(model), None, task)


def save(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    result: Result | Healed | Tied | None = None,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a new folder, with card, recipe and report when there is a result.

    `source` is the folder that was healed, tied or untied, whose card and report go along.

    Raises:
        StoreError: `out` exists (and `overwrite` is not given, or it is not a model folder).
    """
    out = Path(out)
    with hub.new_folder(out, overwrite) as folder:
        with fusing.unfused(model):
            hub.write(folder, model, tokenizer)
        texts: dict[str, str] = {}
        if isinstance(result, Healed):
            texts = report_healing.documents(result, *report_healing.known(source))
        elif isinstance(result, Tied):
            texts = report_sharing.tied_documents(result, *report_healing.known(source))
        elif result is not None:
            measured = result.with_file_bytes(hub.weight_bytes(folder))
            shown = report_sharing.documents if isinstance(measured, Joined) else report.documents
            texts = shown(measured, out.name)  # type: ignore[arg-type]
        for name, content in texts.items():
            (folder / name).write_text(content, encoding="utf-8")
    return out


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    task: str = tasks.AUTO,
    fast: bool = False,
) -> Any:
    """Load a model, compressed or not, in the dtype it is stored in unless another is asked for.

    `task` is what to load it for, a name of eckart.tasks.TASKS; default: what it was stored for. `fast` makes
    it run as fast as its sizes allow (eckart.fuse).

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
    model = hub.load(
        str(source), compute=stored, place=place, trust_remote_code=trust_remote_code, task=task
    ).model
    return fusing.fuse(model) if fast else model


def loaded(model: Any, tokenizer: Any, dtype: str | None, device: str | None, remote: bool) -> hub.Loaded:
    """Return `model` with its tokenizer, loaded where it is named; of an adapter, the model it is on."""
    if not isinstance(model, (str, Path)):
        return _given(model, tokenizer)
    compute, place = hub.dtype(dtype) if dtype else None, hub.device(device)
    if loading.is_adapter(model):
        found = loading.load(model, compute=compute, place=place, trust_remote_code=remote)
        return replace(found, model=found.model.get_base_model())
    return hub.load(str(model), compute=compute, place=place, trust_remote_code=remote)
