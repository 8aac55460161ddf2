"""The structure of a transformers model: what can be treated, found by structure; replace; densify."""

import dataclasses
import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import kinds, mixtures
from .embeddings import FactoredEmbedding, FactoredHead, share
from .errors import ModelError
from .factors import FactoredLinear, Form, LowRankLinear, NarrowLinear, PartialLinear
from .joint import JointLinear, bind, counted_twice
from .quant.corrected import CorrectedLinear
from .quant.stored import StoredEmbedding, StoredHead, StoredLinear, StoredReturn
from .shared import SharedLinear, common

LowRankModule = (
    LowRankLinear
    | NarrowLinear
    | PartialLinear
    | CorrectedLinear
    | SharedLinear
    | JointLinear
    | FactoredEmbedding
    | FactoredHead
)

# Module kinds whose matrices are not projections: normalisation, position tables, short convolutions.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_NOT_PROJECTIONS = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, *_CONVOLUTIONS)
_UNTREATED_SHARE = 0.02
_PROBE_TOKENS = 16
_PRODUCTS = (nn.Linear, StoredLinear, StoredHead, StoredReturn)


@dataclass(frozen=True, slots=True)
class Target:
    """A matrix to treat: its dotted name and its shape (m, n).

    An embedding table is the map from one-hot ids (n = vocabulary) to rows (m); `head` names the
    output head that is tied to it, which is treated along with it. What is not `ranked` keeps its rank:
    only its storage is open.
    """

    name: str
    shape: tuple[int, int]
    embedding: bool = False
    head: str | None = None
    ranked: bool = True

    @property
    def size(self) -> int:
        """Parameters of the dense matrix, bias not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold it."""
        return (self.name,) if self.head is None else (self.name, self.head)

    def form(self, wanted: Form | None) -> Form | None:
        """Return the form that it can have: a table is factored, whatever the others are."""
        if not self.ranked:
            return None
        return "factored" if self.embedding and wanted else wanted


def table_name(model: nn.Module) -> str | None:
    """Return the name of the input embeddings if they are a plain nn.Embedding."""
    table = end(model, "get_input_embeddings")
    if type(table) is not nn.Embedding:
        return None
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[table]


def end(model: Any, getter: str) -> Any:
    """Return what `model.getter()` is, the embeddings or the head; None where it has none or cannot say."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:  # a model of several towers
        return None


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all plain nn.Linear, in the order of the model."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the transformer blocks: children of the largest ModuleList of one class.

    Raises:
        ModelError: there is no such list.
    """
    stacks: dict[str, tuple[int, list[str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            stacks[name] = (size, [f"{name}.{index}" for index in range(len(module))])
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no list of equal blocks: name the matrices with --include"
        )
    return max(stacks.values())[1]


def all_blocks(model: nn.Module) -> list[str]:
    """Return the names of the blocks of all stacks of `model` (of an encoder, a decoder), none without any.

    A stack is a ModuleList of one class of modules that hold matrices, inside no other stack.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        hold = all(isinstance(part, nn.Module) and any(part.children()) for part in module)
        if hold and any(w.ndim > 1 for w in module.parameters()) and owner(name, found) is None:
            found += [f"{name}.{index}" for index in range(len(module))]
    return found


def owner(name: str, blocks: Iterable[str]) -> str | None:
    """Return the one of `blocks` that the module `name` is inside of, or None."""
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def targets(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Target]:
    """Return the matrices to treat.

    Without `include`, every nn.Linear inside the transformer blocks of all stacks (of a model without any,
    every nn.Linear): embeddings and head stay. Patterns are globs on dotted names, whole or from a dot on
    (`q_proj`, `layers.0.*`, `model.layers.*.mlp.*`, `embed_tokens`, `lm_head`). A head that is
    tied to the embeddings and the embeddings are one matrix: either name chooses it.

    Raises:
        ModelError: nothing to treat, a pattern matches nothing, or the matrices of the blocks are
            not nn.Linear.
    """
    linears, table = linear_names(model), table_name(model)
    legal = linears if table is None else [table, *linears]
    chosen = _matching(legal, include) if include else _default_names(model, linears)
    dropped = set(_matching(legal, exclude))
    chosen = [name for name in chosen if name not in dropped]
    if not chosen:
        raise ModelError(f"no matrix left to treat: exclude {list(exclude)} removes all of them")
    head = None if table is None else _tied_head(model, table)
    chosen = list(dict.fromkeys(str(table) if name == head else name for name in chosen))
    for name in chosen:
        _refuse_shared(model, name, (table, head))
    return [_target(model, name, head if name == table else None) for name in chosen]


def ends(model: nn.Module, found: Sequence[Target], exclude: Sequence[str] = ()) -> list[Target]:
    """Return the embeddings and the output head where they are plain and not among `found`, not ranked."""
    table, treated = table_name(model), {name for target in found for name in target.modules}
    last = end(model, "get_output_embeddings")
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    head = names[last] if type(last) is nn.Linear else None
    tied = None if table is None else _tied_head(model, table)
    wanted = [(table, tied), (None if head == tied else head, None)]
    return [
        dataclasses.replace(_target(model, name, other), ranked=False)
        for name, other in wanted
        if name is not None and name not in treated and match_one(name, exclude) is None
    ]


def _tied_head(model: nn.Module, table: str) -> str | None:
    weight: object = model.get_submodule(table).weight
    return next((name for name in linear_names(model) if find(model, name).weight is weight), None)


def _target(model: nn.Module, name: str, head: str | None) -> Target:
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        return Target(name, (module.embedding_dim, module.num_embeddings), True, head)
    linear = find(model, name)
    return Target(name, (linear.out_features, linear.in_features))


def weight(model: nn.Module, target: Target) -> Tensor:
    """Return the matrix (m, n) of `target`, detached."""
    found = model.get_submodule(target.name).weight
    assert isinstance(found, Tensor)
    return found.detach().T if target.embedding else found.detach()


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ModelError(_no_match(names, pattern))
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def _no_match(names: Sequence[str], pattern: str) -> str:
    ends = Counter(name.rsplit(".", 1)[-1] for name in names)
    close = difflib.get_close_matches(pattern, [*ends, *names], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"names end in {', '.join(ends) or 'nothing'}"
    return f"{pattern!r} matches none of the model's {len(names)} matrices: {hint}"


def match_one(name: str, patterns: Sequence[str]) -> int | None:
    """Return the index of the last of `patterns` that matches `name`, or None."""
    hits = [index for index, pattern in enumerate(patterns) if _matches(name, pattern)]
    return hits[-1] if hits else None


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise ModelError, with a suggestion, unless every pattern matches one of `names`."""
    _matching(names, patterns)


def _default_names(model: nn.Module, linears: Sequence[str]) -> list[str]:
    prefixes = tuple(f"{block}." for block in all_blocks(model)) or ("",)
    _refuse_untreatable(model, prefixes)
    routers = mixtures.routers(model, all_blocks(model))
    return [name for name in linears if name.startswith(prefixes) and name not in routers]


def _refuse_untreatable(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Refuse blocks whose matrices are not plain nn.Linear rather than skip them in silence."""
    total, untreated = 0, Counter[str]()
    for name, module in model.named_modules():
        if not name.startswith(prefixes) or isinstance(module, _NOT_PROJECTIONS):
            continue
        size = sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim > 1)
        total += size
        if size and type(module) is not nn.Linear:
            untreated[type(module).__name__] += size
    if total == 0 or untreated.total() > _UNTREATED_SHARE * total:
        kinds = ", ".join(f"{kind} ({size:,} parameters)" for kind, size in untreated.most_common())
        convolves = any(isinstance(module, _CONVOLUTIONS) for module in model.modules())
        kinds = kinds or ("convolutions" if convolves else "none found")
        raise ModelError(
            f"{type(model).__name__} keeps matrices of its blocks in modules that are not understood: "
            f"{kinds}; only nn.Linear is. To treat the nn.Linear that it has, name them with --include"
        )


def _refuse_shared(model: nn.Module, name: str, tied: tuple[str | None, str | None]) -> None:
    weight = model.get_submodule(name).weight
    for owner, other in model.named_modules():
        shared = any(parameter is weight for parameter in other.parameters(recurse=False))
        if shared and owner != name and {owner, name} != set(tied):
            raise ModelError(
                f"{name} shares its weight with {owner}: factoring one of them would store both; "
                "leave it out, or untie them first"
            )


def find(model: nn.Module, name: str) -> nn.Linear:
    """Return the nn.Linear called `name`.

    Raises:
        ModelError: there is none.
    """
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{name} is not an nn.Linear of this {type(model).__name__}")
    return module


def low_rank_modules(model: nn.Module) -> dict[str, LowRankModule]:
    """Return the low-rank modules by name, in the order of the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankModule)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, in the training mode of what it replaces; it stands for the same."""
    before = model.get_submodule(name)
    model.set_submodule(name, kinds.stands_for(module, before).train(before.training))
    bind(model.get_submodule(name.rpartition(".")[0]))


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what is stored on disk to `dtype`, in place, as loading in that dtype does.

    Unlike `model.to(dtype)` it leaves computed buffers alone: rotary frequencies in bfloat16 would
    make another model.
    """
    for tensor in state_tensors(model).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if isinstance(module, StoredEmbedding):
            module.rows_in(dtype)
    return model


def tie(model: Any) -> None:
    """Make a factored head share the weights of the factored embeddings, and tell transformers so.

    And tell it which right factors and which bases are one and the same.
    """
    found = low_rank_modules(model)
    heads = {name: module for name, module in found.items() if isinstance(module, FactoredHead)}
    tables = {name: module for name, module in found.items() if isinstance(module, FactoredEmbedding)}
    for (head_name, head), (table_name, table) in zip(heads.items(), tables.items(), strict=False):
        share(table, head)
        keys = {f"{head_name}.{part}.weight": f"{table_name}.{part}.weight" for part in ("codes", "up")}
        model._tied_weights_keys, model.all_tied_weights_keys = keys, dict(keys)
    same = common(model)
    if same:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **same}
        model.all_tied_weights_keys = {**(getattr(model, "all_tied_weights_keys", None) or {}), **same}


def bases(model: nn.Module) -> dict[str, str]:
    """Return, for each linear that shares its right factor with an earlier one, that one's name."""
    firsts: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in low_rank_modules(model).items():
        if isinstance(module, FactoredLinear | JointLinear):
            first = firsts.setdefault(id(module.down), name)
            if first != name:
                found[name] = first
    return found


def untie(model: Any) -> None:
    """Give a model back the tied weights that its class has."""
    model.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def parameter_count(model: nn.Module) -> int:
    """Return the parameters of `model`, tied ones counted once; stored ones by what they stand for."""
    stored = [m.shape for m in model.modules() if isinstance(m, StoredLinear | StoredEmbedding)]
    return sum(p.numel() for p in model.parameters()) + sum(rows * columns for rows, columns in stored)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what is written to disk: parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            kept[name] = tensor
        seen.add(id(tensor))
    return kept


def flops_per_token(model: nn.Module) -> int:
    """Return 2 x multiply-adds per token of all linear maps, the output head included.

    Attention scores, which depend on the length of the text, and elementwise work are not counted; of
    experts, as many as a token goes to.
    """
    shares = mixtures.active_shares(model, all_blocks(model))
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    return round(
        sum(
            2 * module.in_features * module.out_features * shares.get(owner(name, shares) or "", 1.0)
            for name, module in model.named_modules(remove_duplicate=False)  # what is shared runs for each
            if isinstance(module, _PRODUCTS)
        )
        - 2 * counted_twice(modules)
    )


def hidden_states_entry(model: PreTrainedModel) -> nn.Module:
    """Return the module at whose output gradients may start: the input embeddings."""
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Module):
        raise ModelError(f"{type(model).__name__} has no input embeddings to start gradients from")
    return embeddings


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens that `model` scores."""
    size: int = model.config.get_text_config().vocab_size
    return size


def probe(model: PreTrainedModel) -> Tensor:
    """Return token ids (1, 16), always the same, on the device of `model`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary(model), (1, _PROBE_TOKENS), generator=generator)
    return ids.to(model.device)


def probe_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of `model` on `ids` in float32."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
