"""What a recipe's text and data are for the task of its model: windows of text, or batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, hub, losses, running, samples, tasks, text, windows
from .batches import IGNORED
from .errors import ConfigError, ModelError
from .objectives import Objective, Own
from .recipe import Recipe
from .several import settled
from .windows import Windows

Arguments = dict[str, Any]
_MASKED, _EXCHANGED = 0.15, (0.8, 0.9)
_AT_ONCE = 8
_CTC = "ctc"


def read(recipe: Recipe, loaded: hub.Loaded, warnings: list[str]) -> Windows:
    """Return what to run the model on: what its task makes of the recipe's text and data.

    Raises:
        ConfigError: a source cannot be read, is too short, or is not for this task.
        ModelError: there is text and no tokenizer.
    """
    task = tasks.get(loaded.task)
    if not recipe.data and not recipe.eval_data:
        if task.input == "windows":
            return windows.read(recipe, loaded.tokenizer, warnings)
        if not recipe.text:
            return Windows(None, None, None, False)
        if task.needs_data:
            raise ConfigError(f"task {task.name} is not run on text: give --data, {samples.LEGAL}")
        return _of_text(recipe, loaded, task)
    if recipe.text or recipe.eval_text:
        raise ConfigError("got text and data: give one of them to run the model on")
    if not recipe.data:
        raise ConfigError("got data to measure on and none to calibrate on: give --data")
    found = _of_data(recipe.data, loaded, task)
    held_out = _of_data(recipe.eval_data, loaded, task) if recipe.eval_data else []
    objective, extra = _objective(loaded.model, found[0], task)
    calls, kept = ([{**call, **extra} for call in part] for part in (found, held_out))
    gradients = _gradients(recipe, len(calls))
    return running.of_batches(
        loaded.model, calls, kept if recipe.eval_data else None, gradients=gradients, objective=objective
    )


def _objective(model: Any, call: Arguments, task: tasks.Task) -> tuple[Objective | None, dict[str, Any]]:
    """Return what the task asks to be measured, and the arguments that this needs; None: by the model."""
    if "labels" in call and task.name == _CTC:
        summed = getattr(model.config, "ctc_loss_reduction", None) == "sum"
        return Own(batches.sides_of(model), "label", summed_up=summed), {}
    if task.parts is None:
        return None, {}
    first = losses.fitted(model, call)
    if task.input != "transduced" or "labels" not in call:
        return settled(task.parts, model, first)
    try:
        batches.call(model, first)
    except ImportError as error:  # the model's own loss is that of another package
        said = " ".join(str(error).split())
        raise ConfigError(
            f"task {task.name}: {said} Install it, or give decoder_input_ids without labels, and the loss is "
            "the distance from the dense model's scores"
        ) from error
    return Own(batches.sides_of(model), "label"), {}


def _gradients(recipe: Recipe, count: int) -> int:
    """Return how many of `count` batches to take gradients on: the recipe's share of its tokens."""
    return max(1, round(count * min(1.0, recipe.gradient_tokens / recipe.tokens)))


def _of_data(sources: Sequence[str], loaded: hub.Loaded, task: tasks.Task) -> list[Arguments]:
    found = samples.read(sources, loaded.model, loaded.tokenizer)
    if task.input == "transduced" or (task.name == _CTC and "labels" in found):
        return samples.one_by_one(found, loaded.model.config, task.input == "transduced")
    extra: dict[str, Any] = {"return_loss": True} if task.input == "pairs" else {}
    if task.name == "speech-seq2seq" and not {"labels", "decoder_input_ids"} & set(found):
        raise ConfigError(
            f"{', '.join(sources)}: task {task.name} needs what is said: labels (samples, tokens), {IGNORED} "
            "at the end of shorter ones, beside the input_features of a .safetensors"
        )
    return [{**part, **extra} for part in samples.batches(found, task.at_once)]


def _of_text(recipe: Recipe, loaded: hub.Loaded, task: tasks.Task) -> Windows:
    tokenizer = loaded.tokenizer
    if tokenizer is None or not callable(tokenizer):
        raise ModelError("text needs a tokenizer: pass tokenizer=")
    both = (recipe.text, recipe.eval_text)
    if task.name == "sequence-classification" and any(_has_rows(source) for part in both for source in part):
        own, other = (samples.labelled(part, loaded.model, tokenizer, recipe.seq_len) for part in both)
        found = samples.batches(own, _AT_ONCE)
        held_out = samples.batches(other, _AT_ONCE) if other else None
        return running.of_batches(loaded.model, found, held_out, gradients=_gradients(recipe, len(found)))
    rows, held = _rows(recipe, loaded)
    generator = torch.Generator().manual_seed(recipe.seed)
    ends = special_tokens(tokenizer)
    calls, kept = ([_call(task, row, ends, tokenizer, generator) for row in part] for part in (rows, held))
    material = running.of_batches(loaded.model, calls, kept, gradients=_gradients(recipe, len(calls)))
    return Windows(material.calibration, material.trial, material.held_out, not recipe.eval_text)


def _has_rows(source: str) -> bool:
    return Path(source).suffix == ".jsonl"


def _rows(recipe: Recipe, loaded: hub.Loaded) -> tuple[Tensor, Tensor]:
    """Return windows of tokens to calibrate on, picked by the seed, and to measure on."""
    positions = positions_of(loaded.model)
    if positions is not None and recipe.seq_len > positions:
        raise ConfigError(
            f"seq_len {recipe.seq_len}: the model has {positions} positions, give at most that many"
        )
    body = recipe.seq_len - sum(map(len, special_tokens(loaded.tokenizer)))
    if body < 4:
        raise ConfigError(f"seq_len {recipe.seq_len}: no room beside the special tokens, give 16 at least")
    texts = text.load(recipe.text, recipe.eval_text, loaded.tokenizer)
    rows = text.windows(texts.calibration, body, None, "the text to calibrate on")
    held = text.windows(texts.evaluation[: recipe.eval_tokens], body, None, "the text to measure on")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    return rows[order[: max(1, recipe.tokens // recipe.seq_len)].sort().values], held


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens the position table of `model` is for, None where it has none.

    A table with a row for padding begins to count after it.
    """
    config: Any = getattr(model, "config", None)
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if found is None:
        return None
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    own = [
        part.padding_idx for part in tables if part.num_embeddings == found and part.padding_idx is not None
    ]
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return found - own[0] - 1 if own and vocabulary != found else found


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    return [], []


def _call(
    task: tasks.Task,
    row: Tensor,
    ends: tuple[list[int], list[int]],
    tokenizer: Any,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return what the model is called with on one window `row` (tokens,), with its labels."""
    if task.input == "continued":
        half = len(row) // 2
        ids, labels = (_ended(part, ends)[None] for part in (row[:half], row[half:]))
        return _inputs(ids) | {"labels": labels}
    ids = _ended(row, ends)
    if task.input != "masked":
        return _inputs(ids[None])
    chosen = _chosen(len(row), generator)
    chosen = torch.cat([torch.zeros(len(ends[0]), dtype=torch.bool), chosen])
    chosen = torch.cat([chosen, torch.zeros(len(ends[1]), dtype=torch.bool)])
    labels = ids.masked_fill(~chosen, IGNORED)
    return _inputs(masked(ids, chosen, tokenizer, generator)[None]) | {"labels": labels[None]}


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ended(row: Tensor, ends: tuple[list[int], list[int]]) -> Tensor:
    first, last = (torch.tensor(part, dtype=row.dtype) for part in ends)
    return torch.cat([first, row, last])


def _chosen(count: int, generator: torch.Generator) -> Tensor:
    wanted = max(1, round(_MASKED * count))
    return torch.zeros(count, dtype=torch.bool).index_fill_(
        0, torch.randperm(count, generator=generator)[:wanted], True
    )


def masked(ids: Tensor, chosen: Tensor, tokenizer: Any, generator: torch.Generator) -> Tensor:
    """Return `ids` with the `chosen` ones hidden: most masked, some exchanged, some as they were.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError("task masked-lm: the tokenizer has no mask token; choose another task")
    fate = torch.rand(len(ids), generator=generator)
    drawn = torch.randint(len(tokenizer), ids.shape, generator=generator)
    hidden = torch.where(fate < _EXCHANGED[1], drawn, ids)
    hidden = torch.where(fate < _EXCHANGED[0], torch.full_like(ids, tokenizer.mask_token_id), hidden)
    return torch.where(chosen, hidden, ids)
