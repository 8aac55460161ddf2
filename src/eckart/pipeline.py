"""The main job: a model and a recipe in, a smaller model and a result out.

Stages are values: statistics -> decompositions -> choices -> modules.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import budget, hub, measure, memory, models, plugin, text
from .budget import Choice
from .calibrate import Calibrated, calibrate
from .embeddings import FactoredEmbedding, build_embedding, tied_head
from .errors import ModelError, NotFinite
from .factorize import Part, factor
from .factors import LowRank, build
from .linalg import WeightedSVD, check_matrix
from .models import Target
from .recipe import Recipe
from .result import Module, Result, Sizes

Watch = Callable[[str, int, int], None]
"""Called with the name of the stage, what is done and what there is to do."""


def _silent(stage: str, done: int, total: int) -> None:
    """Watch nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe will do to a model, known before any of it runs.

    `exact` is False where spectra will decide the ranks: then `choices` are those of uniform
    allocation at the same budget, for orientation.
    """

    recipe: Recipe
    choices: list[Choice]
    model_parameters: int
    exact: bool


def plan(recipe: Recipe, model: nn.Module, stored: torch.dtype) -> Plan:
    """Return the plan of `recipe` for `model`, which may be a skeleton on the meta device.

    Raises:
        ModelError: there is nothing in the model that can be treated, or a pattern matches nothing.
        RankError: the budget cannot be reached.
    """
    found = _targets(recipe, model)
    limit = _limit(recipe, model, found, stored)
    decided_by_spectra = recipe.resolved_method().allocation == "curvature" or recipe.energy is not None
    choices = budget.choose(recipe, limit, found)
    return Plan(recipe, choices, models.parameter_count(model), not decided_by_spectra)


def _targets(recipe: Recipe, model: nn.Module) -> list[Target]:
    found = models.targets(model, recipe.include, recipe.exclude)
    models.check_patterns([t.name for t in found], [override.match for override in recipe.overrides])
    return found


def _limit(recipe: Recipe, model: nn.Module, found: Sequence[Target], stored: torch.dtype) -> budget.Budget:
    itemsize = output_dtype(recipe, stored).itemsize
    fixed = budget.fixed_bytes(model, found, recipe.resolved_method().form, itemsize)
    return budget.settle(recipe, found, models.parameter_count(model), fixed, itemsize)


def output_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of the output: the recipe's, or the source's."""
    return hub.dtype(recipe.dtype) if recipe.dtype else stored


@dataclass(slots=True)
class _Run:
    """The moving parts of one run: clock, warnings, watcher."""

    watch: Watch
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        self.watch(name, 0, 1)
        yield lambda done, total: self.watch(name, done, total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        memory.give_back()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A dense model with everything that does not depend on the budget: it serves every budget."""

    loaded: hub.Loaded
    found: list[Target]
    parts: dict[str, Part]
    before: Sizes
    held_out: Tensor | None
    own_text: bool
    dense: measure.Perplexity | None
    calibrated: Calibrated
    run: _Run


def prepare(recipe: Recipe, loaded: hub.Loaded, watch: Watch | None = None) -> Prepared:
    """Measure the dense model, calibrate on it and decompose its matrices; it stays as it is.

    Raises:
        EckartError: any of its subclasses.
    """
    run = _Run(watch or _silent)
    model = loaded.model
    if models.low_rank_modules(model):
        raise ModelError("the model is already low-rank: eckart.densify it first")
    found = _targets(recipe, model)
    # An unreachable budget is refused now, not after the calibration.
    budget.choose(recipe, _limit(recipe, model, found, loaded.stored), found)
    recipe.check_text()
    for target in found:
        check_matrix(models.weight(model, target), target.name)
    with run.stage("read text"):
        calibration, held_out, own_text = _windows(recipe, loaded.tokenizer, run)
        if held_out is not None:
            measure.check_length(model, recipe.seq_len)
            measure.check_causal(model)
    dense = _measure(run, "measure dense", model, held_out)
    with run.stage("calibrate") as progress:
        calibrated = _calibrated(recipe, model, found, calibration, progress)
    with run.stage("factor") as progress:
        parts, lacking = factor(recipe, model, found, calibrated, progress)
        run.warnings.extend(lacking)
    before = _sizes(model, found, output_dtype(recipe, loaded.stored))
    return Prepared(loaded, found, parts, before, held_out, own_text, dense, calibrated, run)


def finish(recipe: Recipe, prepared: Prepared) -> Result:
    """Choose ranks for the budget of `recipe`, put the low-rank modules into the model and measure it.

    The model ends in the output dtype. `recipe` may differ from the one that was prepared in its
    budget, form, allocation, overrides and dtype.

    Raises:
        RankError: the budget cannot be reached.
        NotFinite: a factor does not fit the output dtype, or the model's logits are not finite.
    """
    loaded, run, found = prepared.loaded, prepared.run, prepared.found
    model, dtype = loaded.model, output_dtype(recipe, loaded.stored)
    choices = budget.choose(
        recipe,
        _limit(recipe, model, found, loaded.stored),
        found,
        {name: part.svd.tail() for name, part in prepared.parts.items()},
        {name: part.unit for name, part in prepared.parts.items()},
    )
    with run.stage("replace") as progress:
        modules = _replace(model, choices, prepared.parts, dtype, progress)
    plugin.mark(model)
    # Weights are rounded to the output dtype, then measured in the dtype that this device computes in.
    computed = model.dtype
    after = _sizes(models.cast(model, dtype), found, dtype)
    _check_fits(model, dtype)
    compressed = _measure(run, "measure compressed", models.cast(model, computed), prepared.held_out)
    models.cast(model, dtype)
    predicted = sum(module.loss for module in modules)
    return Result(
        recipe=recipe,
        source=loaded.source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        modules=modules,
        before=prepared.before,
        after=after,
        source_bytes=loaded.bytes,
        dense=prepared.dense,
        compressed=compressed,
        held_out=prepared.own_text,
        predicted_increase=predicted if recipe.resolved_method().outputs == "gradient" else None,
        calibration_tokens=prepared.calibrated.tokens,
        gradient_tokens=prepared.calibrated.gradient_tokens,
        seconds=dict(run.seconds),
        peak_memory=memory.peak_bytes(model.device),
        warnings=list(run.warnings),
    )


def _check_fits(model: nn.Module, dtype: torch.dtype) -> None:
    for name, tensor in models.state_tensors(model).items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{name} does not fit {dtype}: choose dtype bfloat16 or float32")


def _windows(recipe: Recipe, tokenizer: Any, run: _Run) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return the windows to calibrate on, those to measure on, and whether both are of one text."""
    if not recipe.text and not recipe.eval_text:
        return None, None, False
    if tokenizer is None:
        raise ModelError("text needs a tokenizer: pass tokenizer=")
    bos = text.begin_token(tokenizer, recipe.bos)
    texts = text.load(recipe.text or recipe.eval_text, recipe.eval_text, tokenizer)
    held_out = text.windows(
        texts.evaluation[: recipe.eval_tokens], recipe.seq_len, bos, "the text to measure on"
    )
    if not recipe.text:
        return None, held_out, False
    rows = text.windows(texts.calibration, recipe.seq_len, bos, "the text to calibrate on")
    wanted = max(1, recipe.tokens // rows.shape[1])
    if len(rows) < wanted:
        run.warnings.append(
            f"the text has {rows.numel():,} tokens to calibrate on, fewer than tokens = {recipe.tokens:,}"
        )
    return text.pick(rows, wanted, torch.Generator().manual_seed(recipe.seed)), held_out, texts.held_out


def _measure(run: _Run, name: str, model: Any, windows: Tensor | None) -> measure.Perplexity | None:
    if windows is None:
        return None
    with run.stage(name) as progress:
        return measure.perplexity(model, windows, progress)


def _calibrated(
    recipe: Recipe, model: Any, found: Sequence[Target], windows: Tensor | None, progress: measure.Progress
) -> Calibrated:
    statistics = recipe.resolved_method().statistics()
    if windows is None or not statistics:
        windows = torch.zeros(0, 2, dtype=torch.int64)
    return calibrate(
        model,
        windows,
        [name for target in found for name in target.modules],
        statistics,
        gradient_windows=max(1, recipe.gradient_tokens // windows.shape[1]),
        labels=recipe.labels,
        generator=torch.Generator().manual_seed(recipe.seed),
        watch=progress,
    )


def _replace(
    model: nn.Module,
    choices: Sequence[Choice],
    parts: dict[str, Part],
    dtype: torch.dtype,
    progress: measure.Progress,
) -> list[Module]:
    rows = []
    for done, choice in enumerate(choices, 1):
        name, part = choice.target.name, parts[choice.target.name]
        tail = part.svd.tail()
        kept = min(choice.target.shape) if choice.rank is None else choice.rank
        rows.append(
            Module(
                name=name,
                shape=choice.target.shape,
                form="dense" if choice.rank is None else choice.form,
                rank=kept,
                before=choice.target.size,
                after=choice.parameters,
                energy=1 - float(tail[kept] / tail[0]) if float(tail[0]) else 1.0,
                loss=part.unit * float(tail[kept]),
            )
        )
        if choice.rank is not None:
            _put(model, part.svd, choice, dtype)
        progress(done, len(choices))
    return rows


def _put(model: nn.Module, svd: WeightedSVD, choice: Choice, dtype: torch.dtype) -> None:
    """Replace the dense module of `choice` (and the head that is tied to it) by a low-rank one."""
    name, dense = choice.target.name, model.get_submodule(choice.target.name)
    low_rank = LowRank(svd.left[:, : choice.rank], svd.right[: choice.rank])
    module: nn.Module
    if isinstance(dense, nn.Embedding):
        module = build_embedding(low_rank, dense.padding_idx)
    else:
        bias = models.find(model, name).bias
        module = build(low_rank, choice.form, None if bias is None else bias.detach().to(svd.left))
    # float64 to the output dtype at once: by way of the dtype computed in, it would be rounded twice.
    own = next(dense.parameters())
    module = module.to(dtype).to(own.dtype).to(own.device)
    models.replace(model, name, module)
    if choice.target.head is not None and isinstance(module, FactoredEmbedding):
        head = models.find(model, choice.target.head)
        models.replace(model, choice.target.head, tied_head(module, head.bias))
        models.tie(model)


def _sizes(model: Any, found: Sequence[Target], dtype: torch.dtype) -> Sizes:
    tables = [model.get_submodule(target.name) for target in found]
    owners = [model.get_submodule(name) for target in found for name in target.modules]
    return Sizes(
        linears=sum(_weights(module) for module in tables),
        model=models.parameter_count(model),
        linear_flops=sum(models.flops_per_token(module) for module in owners),
        model_flops=models.flops_per_token(model),
        linear_bytes=sum(_stored_bytes(module, dtype) for module in tables),
        bytes=hub.accounted_bytes(_written(model), dtype),
    )


def _stored_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    indices = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return _weights(module) * dtype.itemsize + indices


def _weights(module: nn.Module) -> int:
    return sum(tensor.numel() for name, tensor in module.named_parameters() if not name.endswith("bias"))


def _written(model: Any) -> dict[str, Tensor]:
    return models.state_tensors(model) | plugin.guard_tensors(model)


def load_for(recipe: Recipe) -> hub.Loaded:
    """Load the model that `recipe` names, to compute on its device.

    Raises:
        ModelError: the recipe names none, or it cannot be loaded.
    """
    if recipe.model is None:
        raise ModelError("the recipe names no model: give a hub id, a folder or a .gguf file")
    return hub.load(
        recipe.model,
        place=hub.device(recipe.device),
        trust_remote_code=recipe.trust_remote_code,
        low_rank=False,
    )
