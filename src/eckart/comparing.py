"""Two models side by side: sizes, perplexity by one protocol, matrix by matrix, and what they write."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import dense, evaluating, hub, kinds, measure, models, splitting, stores, text
from .api import Sources, loaded, sources
from .embeddings import FactoredEmbedding, FactoredHead
from .errors import ConfigError, ModelError
from .factors import NarrowLinear, PartialLinear
from .measure import Comparison
from .models import LowRankModule
from .pages.notebook import Shown
from .quant.corrected import CorrectedLinear
from .quant.stored import StoredLinear
from .stages import Run, Watch, silent

if TYPE_CHECKING:
    from rich.console import RenderableType

NEW_TOKENS = 48
PROMPTS = 3
_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the models is.

    Args:
        source: what it was called.
        architecture: its class.
        parameters: each tied one once; those stored in few bits by what they stand for.
        flops: per token, 2 x multiply-adds of its linear maps.
        file_bytes: of its weight files, None where there are none at hand.
        dtype: that it computed in.
    """

    source: str
    architecture: str
    parameters: int
    flops: int
    file_bytes: int | None
    dtype: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A matrix in both models.

    Args:
        name: in the model.
        shape_a, shape_b: (out, in) of the map that it stands for, with what width left out; None where a
            model has no linear map of this name.
        parameters_a, parameters_b: that hold it, without its bias; what it shares counts in each that has it.
        change: |A - B| / |A| of the maps, Frobenius; None where their shapes differ or one is missing, where
            a hidden dimension is narrower in one (`narrowed`), and where A is zero.
    """

    name: str
    shape_a: tuple[int, int] | None
    shape_b: tuple[int, int] | None
    parameters_a: int | None
    parameters_b: int | None
    change: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """What both models write after a prompt, greedily."""

    prompt: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Compared(Shown):
    """Two models side by side; `quality` has A for its reference, and is None where there was no text."""

    a: Side
    b: Side
    quality: Comparison | None
    matrices: tuple[Pair, ...]
    samples: tuple[Sample, ...]
    options: dict[str, Any]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"schema": 1, **asdict(self)}

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from .render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .report_compare import tables

        return tables(self)


def compare(
    a: Any,
    b: Any,
    *,
    text: Sources | None = None,
    prompts: Sequence[str] = (),
    tokens: int = 24_576,
    seq_len: int = 512,
    new_tokens: int = NEW_TOKENS,
    bos: bool = False,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> Compared:
    """Put two causal language models side by side, dense or compressed; what is in memory stays as it is.

    Args:
        a, b: hub ids, folders, .gguf files, or models in memory. Both read with the tokenizer of `a`.
        text: sources to measure perplexity on (eckart.measure); default: it is not measured.
        prompts: what both go on from, greedily; default: the beginnings of windows of `text`.
        tokens: from the start of the text.
        seq_len: window length, of which all but the first token are predicted.
        new_tokens: that each writes after a prompt, at most; 0 for none.
        bos: begin windows and prompts with the begin-of-text token.
        tokenizer: for a model given as an object.
        dtype: to compute in; default: float32 on a CPU, else as stored.
        device: cuda, mps, cpu; default: the first that is there.
        trust_remote_code: run code that a model brings along.
        watch: called with (stage, done, total).

    Raises:
        ConfigError: an option is not legal, or there is too little text.
        ModelError: a model cannot be read, or their vocabularies differ.
        NotFinite: a logit is NaN or infinite.
    """
    if new_tokens < 0:
        raise ConfigError(f"new_tokens {new_tokens}: must be at least 0")
    run = Run(watch or silent)
    with run.stage("load"):
        first = loaded(a, tokenizer, dtype, device, trust_remote_code)
        second = loaded(b, first.tokenizer, dtype, device, trust_remote_code)
        evaluating.same_vocabulary(first, second)
    both = (first, second)
    windows = None
    if sources(text):
        windows = evaluating.eval_windows(text or (), first.tokenizer, tokens, seq_len, bos)
    quality = None if windows is None else _quality(both, windows, run)
    asked = list(prompts) or _beginnings(first.tokenizer, windows, bos)
    samples = _samples(both, asked, new_tokens, bos, run) if new_tokens else ()
    sides = [_side(one) for one in both]
    try:
        with run.stage("matrices") as progress:
            matrices, notes = _pairs(both, progress)
    finally:
        for one in both:
            kinds.fold(one.model)
    given = {
        "text": list(sources(text) or ()), "tokens": tokens, "seq_len": seq_len, "new_tokens": new_tokens,
        "bos": bos, "dtype": dtype,
    }  # fmt: skip
    return Compared(sides[0], sides[1], quality, matrices, samples, given, dict(run.seconds), tuple(notes))


def _quality(both: tuple[hub.Loaded, hub.Loaded], windows: torch.Tensor, run: Run) -> Comparison:
    for one in both:
        measure.check_length(one.model, windows.shape[1])
        measure.check_causal(one.model)
    with run.stage("perplexity") as progress:
        return measure.compare(both[1].model, both[0].model, windows, progress)


def _side(one: hub.Loaded) -> Side:
    model: Any = one.model
    return Side(
        source=one.source,
        architecture=type(model).__name__,
        parameters=models.parameter_count(model),
        flops=models.flops_per_token(model),
        file_bytes=hub.source_bytes(one.source),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _beginnings(tokenizer: Any, windows: torch.Tensor | None, bos: bool) -> list[str]:
    """Return the beginnings of a few windows, evenly spread."""
    if windows is None:
        return []
    chosen = windows[:: max(1, math.ceil(len(windows) / PROMPTS))][:PROMPTS]
    return [str(tokenizer.decode(window[int(bos) : _PROMPT_TOKENS])) for window in chosen]


def _samples(
    both: tuple[hub.Loaded, hub.Loaded], prompts: Sequence[str], new_tokens: int, bos: bool, run: Run
) -> tuple[Sample, ...]:
    tokenizer = both[0].tokenizer
    if prompts and tokenizer is None:
        raise ModelError("prompts need a tokenizer: pass tokenizer=")
    found = []
    with run.stage("generate") as progress:
        for done, prompt in enumerate(prompts, 1):
            ids = text.tokenize(prompt, tokenizer)
            begin = text.begin_token(tokenizer, bos)
            ids = ids if begin is None else torch.cat([ids.new_tensor([begin]), ids])
            if not len(ids):
                raise ConfigError(f"prompt {prompt!r} has no tokens: give some text, or --bos")
            written = [_continued(one.model, ids, new_tokens, tokenizer) for one in both]
            found.append(Sample(prompt, written[0], written[1]))
            progress(done, len(prompts))
    return tuple(found)


@torch.no_grad()
def _continued(model: Any, ids: torch.Tensor, new_tokens: int, tokenizer: Any) -> str:
    """Return the text that `model` writes after `ids`, always its first choice."""
    given = ids[None].to(model.device)
    end = tokenizer.eos_token_id
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new_tokens, do_sample=False, num_beams=1,
        temperature=None, top_p=None, top_k=None, pad_token_id=end if end is not None else 0,
    )  # fmt: skip
    return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))


def pair(name: str, own: nn.Module | None, other: nn.Module | None, alike: bool = True) -> Pair:
    """Return what the map `name` is in both models; None where one has none.

    `alike` tells that rows and columns stand for the same channels in both; else there is no difference.
    """
    weights = [None if one is None else matrix(one) for one in (own, other)]
    shapes = [None if one is None else (one.shape[0], one.shape[1]) for one in weights]
    counts = [None if one is None else held(one) for one in (own, other)]
    change, (first, second) = None, weights
    if alike and first is not None and second is not None and first.shape == second.shape:
        size = float(first.norm())
        change = float((first - second).norm()) / size if size else None
    return Pair(name, shapes[0], shapes[1], counts[0], counts[1], change)


def _pairs(
    both: tuple[hub.Loaded, hub.Loaded], progress: Callable[[int, int], None]
) -> tuple[tuple[Pair, ...], list[str]]:
    """Return the linear maps of the blocks of both models by name, and what a reader should know of them."""
    for one in both:
        splitting.unfold(one.model, False)
    found = [maps(one.model) for one in both]
    names = list(dict.fromkeys([*found[0], *found[1]]))
    moved = narrowed(found[0]) | narrowed(found[1])
    made = []
    for done, name in enumerate(names, 1):
        made.append(pair(name, found[0].get(name), found[1].get(name), name not in moved))
        progress(done, len(names))
    notes = []
    lone = sum(pair.shape_a is None or pair.shape_b is None for pair in made)
    if lone:
        notes.append(f"{lone} of {len(made)} matrices are in one of the models alone.")
    others = sum(None not in (p.shape_a, p.shape_b) and p.shape_a != p.shape_b for p in made)
    if others:
        notes.append(f"{others} matrices have other shapes in B than in A: their weights have no difference.")
    if moved:
        notes.append(
            f"{len(moved)} matrices are narrower inside of an MLP or a head, and which channels are left, or "
            "in which basis, is not stored: their weights have no difference."
        )
    return tuple(made), notes


def narrowed(found: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the maps that write or read hidden channels which are not those of the dense model.

    What is left of a narrower hidden dimension stands side by side; narrower values of a head are in a basis
    of their own, while rotary pairs stand where they stood.
    """
    moved = {name for name, module in found.items() if isinstance(module, NarrowLinear)}
    partial = {name: module for name, module in found.items() if isinstance(module, PartialLinear)}
    for name, output in partial.items():
        if output.side == "columns":
            home = name.rpartition(".")[0]
            values = {n for n, m in partial.items() if n.rpartition(".")[0] == home and _writes(m, output)}
            moved |= {name, *values}
    return moved


def _writes(values: PartialLinear, output: PartialLinear) -> bool:
    """Tell whether `values` has the rows, head by head, that `output` reads."""
    places = output.places[output.places < values.out_features]
    return values.side == "rows" and torch.equal(places.sort().values, values.places.sort().values)


def maps(model: Any) -> dict[str, nn.Module]:
    """Return the linear maps of the blocks of `model` by name: dense, low-rank, narrow or stored."""
    prefixes = tuple(f"{block}." for block in models.all_blocks(model)) or ("",)
    found: dict[str, nn.Module] = {}
    last = "\n"
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(prefixes) and not name.startswith(f"{last}.") and _is_map(module):
            found[name], last = module, name
    return found


def _is_map(module: nn.Module) -> bool:
    tables = FactoredEmbedding | FactoredHead
    other = isinstance(module, LowRankModule | StoredLinear) and not isinstance(module, tables)
    return type(module) is nn.Linear or other


def held(module: nn.Module) -> int:
    """Return the parameters of a map, biases left out; those in few bits by what they stand for."""
    stored = [one.shape for one in module.modules() if isinstance(one, StoredLinear)]
    own = sum(w.numel() for name, w in module.named_parameters() if name.rpartition(".")[2] != "bias")
    return own + sum(rows * columns for rows, columns in stored)


@torch.no_grad()
def matrix(module: Any) -> torch.Tensor:
    """Return the matrix (out, in) that a map stands for, float64 on the CPU: what was left out is zero there.

    The module stays as it is.
    """
    if isinstance(module, CorrectedLinear):
        weight = module.dense_weight()
    else:
        holder: Any = nn.ModuleDict({"map": copy.deepcopy(module)})
        for name, leaf in list(holder.named_modules()):
            if isinstance(leaf, StoredLinear):
                holder.set_submodule(name, stores.unstored(leaf, torch.float32))
        found = holder["map"]
        weight = found.weight if type(found) is nn.Linear else dense.dense_linear(found).weight
    return weight.detach().to("cpu", torch.float64)
