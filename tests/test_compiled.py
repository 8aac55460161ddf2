"""Every kind of module under torch.compile, in one graph, with static caches, checkpointing and autocast.

Backend "eager" runs what was traced as it is: what cannot be in one graph fails there already.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import eckart
from eckart.factors import LowRank, NarrowLinear, PartialLinear, build
from eckart.lean import LeanFactored, LeanPivoted
from eckart.quant import storage
from eckart.quant.stored import StoredLinear
from eckart.shared import SharedLinear
from eckart.speed import decoding

from . import tiny
from .conftest import Compress, logits

IDS = tiny.tokens()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(64, 96, bias)


def low_rank(form: Any) -> Any:
    factors = LowRank(gaussian(96, 8).double(), gaussian(8, 64, seed=1).double())
    return build(factors, form, gaussian(96, seed=2).double()).float()


def straight() -> nn.Module:
    module = low_rank("pivoted")
    module.order.copy_(torch.arange(96))
    return LeanPivoted.of(module)


def stored(name: str) -> nn.Module:
    plain, chosen = linear(), storage.get(name)
    grid = chosen.grid(plain.weight)
    return StoredLinear.of(plain, chosen, grid.codes(plain.weight.detach()), grid)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "factored": lambda: low_rank("factored"),
    "pivoted": lambda: low_rank("pivoted"),
    "lean factored": lambda: LeanFactored.of(low_rank("factored")),
    "lean pivoted": lambda: LeanPivoted.of(low_rank("pivoted")),
    "lean pivoted, straight": straight,
    "narrow": lambda: NarrowLinear.slice(linear(), torch.arange(0, 96, 2), None),
    "partial rows": lambda: PartialLinear.slice(linear(), "rows", torch.arange(0, 96, 3)),
    "partial columns": lambda: PartialLinear.slice(linear(), "columns", torch.arange(0, 64, 3)),
    "shared": lambda: SharedLinear.of(
        linear(False), LowRank(gaussian(96, 4), gaussian(4, 64)), gaussian(96), gaussian(96)
    ),
    "int8": lambda: stored("int8"),
    "nf4": lambda: stored("nf4"),
    "nf4-dq": lambda: stored("nf4-dq"),
    "int4": lambda: stored("int4"),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Forget what was compiled before: recompiling often is an error of its own."""
    torch._dynamo.reset()


def close(found: Tensor, expected: Tensor, scale: float = 1e-5) -> bool:
    return bool((found - expected).norm() <= scale * (expected.norm() + 1e-9))


# single modules


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_every_kind_is_one_graph(kind: str, gradients: bool) -> None:
    module = KINDS[kind]()
    width: Any = module.in_features
    compiled = torch.compile(module, backend="aot_eager" if gradients else "eager", fullgraph=True)
    for shape in ((2, 3), (1, 1)):
        own = gaussian(*shape, width).requires_grad_(gradients)
        other = own.detach().clone().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            found, expected = compiled(own), module(other)
        assert close(found, expected)
        if gradients:
            found.square().sum().backward()
            expected.square().sum().backward()
            assert close(own.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_batch_can_stay_open(kind: str) -> None:
    module = KINDS[kind]()
    width: Any = module.in_features
    graphs = CompileCounter()
    compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 5, 7):
            inputs = gaussian(rows, 4, width)
            assert close(compiled(inputs), module(inputs))
    assert graphs.frame_count == 1


def test_llm_int8_is_no_single_graph() -> None:
    # Which columns hold outliers, and how many, the inputs say: a shape that no graph knows before.
    module = stored("llm.int8")
    with torch.no_grad():
        assert close(torch.compile(module, backend="eager")(gaussian(3, 64)), module(gaussian(3, 64)))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(module, backend="eager", fullgraph=True)(gaussian(3, 64))


def test_a_graph_of_straight_outputs_selects_nothing() -> None:
    for make, count in ((straight, 0), (KINDS["lean pivoted"], 1)):
        graphs = AotGraphs()
        with torch.no_grad():
            torch.compile(make(), backend=graphs, fullgraph=True)(gaussian(2, 3, 64))
        assert graphs.calls("index_select") == count


class AotGraphs:
    """A backend that keeps the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def calls(self, name: str) -> int:
        return sum(name in str(node.target) for graph in self.graphs for node in graph.graph.nodes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_replays_every_kind(kind: str) -> None:
    module, width = KINDS[kind]().cuda(), 64
    inputs = gaussian(1, 1, width if kind != "narrow" else 64).cuda()
    with torch.no_grad():
        module(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = module(inputs)
        inputs.copy_(gaussian(1, 1, width, seed=4))
        graph.replay()
        assert close(outputs, module(inputs))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("int", "nf"))])
def test_autocast_computes_in_the_low_dtype_with_gradients(kind: str) -> None:
    module = KINDS[kind]()
    width: Any = module.in_features
    inputs = gaussian(3, width)
    whole = gradients_of(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(inputs).dtype == torch.bfloat16 or kind == "shared"  # its scales are added in float32
        half = gradients_of(module, inputs)
    for own, other in zip(half, whole, strict=True):
        assert own.dtype == torch.float32
        assert close(own, other, 0.05)
        assert not close(own, other, 1e-6)


def gradients_of(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    module.zero_grad()
    torch.autograd.backward(module(inputs).float().square().mean())
    return [p.grad.clone() for p in module.parameters() if p.grad is not None and p.grad.norm() > 0]


# whole models


FORMS = [{"form": "pivoted", "allocation": "uniform"}, {"form": "factored", "allocation": "uniform"}, {}]


@pytest.fixture(params=[1, 2, 3], ids=["factored", "mixed", "fused"])
def model(request: pytest.FixtureRequest, compress: Compress) -> Any:
    found, _ = compress(tiny.build("llama"), **FORMS[request.param % 3])
    return eckart.fuse(found, joint_pivots=True, bound=1000.0) if request.param == 3 else found


def test_a_whole_model_is_one_graph_and_static_caches_say_the_same(model: Any) -> None:
    expected = logits(model, IDS)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert close(logits(whole, IDS), expected)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    plain = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), plain)
    cache = StaticCache(config=model.config, max_cache_len=40)
    word = decoding.cache_word(model)
    with torch.no_grad():
        made = model(input_ids=IDS, use_cache=True, **{word: cache})
        step: Any = torch.compile(model.forward, backend=(graphs := CompileCounter()), fullgraph=True)
        chosen = [made.logits[:, -1:].argmax(-1)]
        for _ in range(7):
            made = step(input_ids=chosen[-1], use_cache=True, **{word: cache})
            chosen.append(made.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(chosen, 1), plain[:, IDS.shape[1] :])
    assert graphs.frame_count == 1  # the same graph for every token


def test_checkpointing_gives_the_same_gradients(model: Any) -> None:
    plain = copy.deepcopy(model).train()
    again = copy.deepcopy(model).train()
    with warnings.catch_warnings():  # newer transformers have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        again.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (plain, again):
        one(input_ids=IDS, labels=IDS).loss.backward()
    found = dict(again.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (found[name].grad is None), name
        if parameter.grad is not None:
            assert close(found[name].grad, parameter.grad), name


def test_inductor_runs_a_fused_block() -> None:
    module = nn.Sequential(low_rank("pivoted"), nn.SiLU(), nn.Linear(96, 64))
    eckart.fuse(module)
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what inductor itself imports
        for shape in ((1, 1, 64), (2, 5, 64)):
            assert close(compiled(gaussian(*shape)), module(gaussian(*shape)))
