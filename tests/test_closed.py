"""Laws of the blocks as a chain, of least squares block by block, and of descent block by block."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart import ModelError, NotPositiveDefinite, blockwise, closed, models, training
from eckart.chain import chain, matching
from eckart.closed import Metrics
from eckart.factors import FactoredLinear, Form, PartialLinear, PivotedLinear
from eckart.lessons import Lessons

from . import tiny, wards
from .conftest import Compress, logits

NAMES = list(tiny.LINEAR)
PLAIN = Metrics({})


@contextmanager
def _blocks(model: Any) -> Iterator[list[Tensor]]:
    """Note what every block gives in a forward of the whole model."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(note) for name in models.block_names(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _reads(model: Any, name: str, windows: Tensor) -> Tensor:
    """Return what the module `name` reads in a forward of the whole model, as float64 rows."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    handle.remove()
    return torch.cat([tensor.flatten(0, -2) for tensor in found]).double()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_chain_is_the_forward(name: str) -> None:
    model = tiny.build(name)
    window, other = tiny.tokens()
    found = chain(model, window)
    assert list(found.names) == models.block_names(model)
    for row in (window, other):
        with _blocks(model) as expected:
            model(input_ids=row[None], use_cache=False)
        hidden = found.entry(row)
        for index, wanted in enumerate(expected):
            before, hidden = hidden, found.run(index, hidden)
            torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
            assert not torch.allclose(before, wanted, rtol=1e-2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "opt"])
@torch.no_grad()
def test_the_chain_shows_what_modules_read(name: str) -> None:
    model, (window, _) = tiny.build(name), tiny.tokens()
    found = chain(model, window)
    hidden = found.run(0, found.entry(window))
    names = list(closed.linears(model, found.names[1]))
    for linear in names:
        own = found.read(1, hidden, linear)
        expected = _reads(model, linear, window[None])
        torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert sorted(seen for seen, _ in found.reads(1, hidden, names)) == sorted(names)


@torch.no_grad()
def test_stages_are_modules_that_read_the_same_tensor() -> None:
    model, (window, _) = tiny.build("llama"), tiny.tokens()
    found = chain(model, window)
    groups = closed.stages(found, 0, found.entry(window), list(closed.linears(model, found.names[0])))
    short = [[name.rsplit(".", 1)[-1] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, first: Tensor | None = None) -> Tensor:
        added = 0 if first is None else first
        return hidden_states + torch.tanh(self.inner(hidden_states)) + added


class _Model(nn.Module):
    """A language model whose blocks are called as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([_Block(), _Block(), _Block()])
        self.head = nn.Linear(8, 20)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=20))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        first = hidden = self.table(input_ids)
        for index, layer in enumerate(self.layers):
            if self.how == "skip" and index == 1:
                continue
            if self.how == "carry":
                hidden = layer(hidden, first=first)
            elif self.how == "keyword":
                hidden = layer(hidden_states=hidden)
            elif self.how == "other":
                hidden = layer(hidden) if index == 0 else hidden + 1
            else:
                hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


class _Renamed(_Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_models_that_are_no_chain_are_refused() -> None:
    window = torch.arange(6)
    for how in ("positional", "keyword"):
        model: Any = _Model(how)
        assert len(chain(model, window).names) == 3
    with pytest.raises(ModelError, match="blocks of _Model pass on more than hidden states: use refinement"):
        chain(_Model("carry"), window)
    for how in ("skip", "other"):
        with pytest.raises(ModelError, match="not every block ran: the blocks are no chain"):
            chain(_Model(how), window)
    model = _Model("positional")
    model.layers = nn.ModuleList([_Renamed(), _Renamed()])
    model.forward = lambda input_ids, use_cache: SimpleNamespace(
        logits=model.layers[1](x=model.layers[0](x=model.table(input_ids)))
    )
    with pytest.raises(ModelError, match="not called with hidden states: use refinement logits"):
        chain(model, window)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_that_were_left_out_are_named() -> None:
    dense, (window, _) = tiny.build("llama"), tiny.tokens()
    fewer = tiny.build("llama", num_hidden_layers=1)
    with pytest.raises(ModelError, match="the model has 1 blocks and the dense one 2: whole blocks"):
        matching(chain(fewer, window), chain(dense, window))
    with pytest.raises(ModelError, match="closed and block refinement match block with block"):
        closed.refit(fewer, dense, tiny.tokens(), 0.5, metrics=PLAIN)
    lessons = wards.lessons()
    with pytest.raises(ModelError, match="closed and block refinement match block with block"):
        _refine(fewer, dense, lessons)


@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
def test_a_model_that_is_not_compressed_stays_as_it_is(mixture: float) -> None:
    dense = tiny.build("llama-bias-untied")
    student = copy.deepcopy(dense)
    closed.refit(student, dense, wards.lessons().fit, mixture, metrics=PLAIN)
    if mixture == 0:
        assert wards.equal(wards.weights(student), wards.weights(dense))
    assert wards.distance(wards.weights(student), wards.weights(dense)) < 1e-4


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("mixture", [0.0, 1.0])
def test_at_full_rank_everything_is_reproduced(form: Form, mixture: float) -> None:
    """Even from a student whose weights were spoiled."""
    dense, tokens = tiny.build("llama-bias-untied"), tiny.tokens()
    expected = logits(dense, tokens)
    student = wards.cut(dense, 48, form)
    with torch.no_grad():
        for module in models.low_rank_modules(student).values():
            next(module.parameters()).mul_(1.5)
    tolerance = 1e-3 * float(expected.abs().max())
    assert not torch.allclose(logits(student, tokens), expected, atol=tolerance)
    closed.refit(student, dense, wards.lessons(fit=24).fit, mixture, metrics=PLAIN, damp=1e-9)
    assert torch.allclose(logits(student, tokens), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "factored") for name in NAMES), ("llama", "pivoted"), ("opt", "pivoted")]
)
def test_no_module_is_further_from_the_dense_outputs(name: str, form: Form) -> None:
    """At mixture 1 and in the plain metric each is the best of its rank on what it reads now."""
    dense, windows = tiny.build(name), wards.lessons(fit=16).fit
    student = wards.cut(dense, 8, form)
    before = copy.deepcopy(student)
    # A ReLU leaves channels dead on little text: nothing at all for damping would be singular.
    closed.refit(student, dense, windows, 1.0, metrics=PLAIN, damp=1e-8)
    gains = 0
    for linear, module in models.low_rank_modules(student).items():
        old = before.get_submodule(linear)
        wanted = models.find(dense, linear)(_reads(dense, linear, windows).float())
        inputs = _reads(student, linear, windows).float()
        assert type(module) is type(old)
        with torch.no_grad():
            now, then = (float((made(inputs) - wanted).norm()) for made in (module, old))
        assert now <= then * (1 + 1e-3)
        gains += now < 0.99 * then
    assert gains >= 4
    expected = logits(dense, windows)
    errors = [float((logits(model, windows) - expected).norm()) for model in (student, before)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_kind_rank_shape_bias_dtype_and_mode_are_kept(form: Form) -> None:
    dense = tiny.build("llama-bias-untied")
    student = wards.cut(dense, 8, form)
    models.cast(student, torch.bfloat16)
    student.train()
    before, biases = wards.weights(student), _biases(student)
    closed.refit(student, dense.to(torch.bfloat16), wards.lessons().fit, 0.5, metrics=PLAIN)
    after = wards.weights(student)
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {
        n: (v.shape, v.dtype) for n, v in before.items()
    }
    assert all(module.training for module in student.modules())
    for name, bias in _biases(student).items():
        torch.testing.assert_close(bias, biases[name], rtol=0.02, atol=0.02 * float(biases[name].abs().max()))
        assert float(bias.abs().max()) > 0
    changed = wards.changed(before, after)
    assert changed
    assert all("proj" in name for name in changed)


def _biases(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, module in models.low_rank_modules(model).items():
        assert isinstance(module, FactoredLinear | PivotedLinear)
        bias = module.dense_bias()
        assert bias is not None
        found[name] = bias.float()
    return found


def test_a_narrow_reader_is_that_of_least_squares(compress: Compress) -> None:
    """torch.linalg.lstsq on the inputs that were collected, as an independent reference."""
    dense, windows = tiny.build("llama"), wards.lessons(fit=16).fit
    student, _ = compress(copy.deepcopy(dense), form="width", keep=0.7, of="linears")
    before = copy.deepcopy(student)
    closed.refit(student, dense, windows, 1.0, metrics=PLAIN, damp=0.0)
    for block in models.block_names(student):
        name = f"{block}.mlp.down_proj"
        module: Any = student.get_submodule(name)
        inner = module.inner if isinstance(module, PartialLinear) else module
        assert inner.in_features < 48
        wanted = _reads(dense, name, windows) @ models.find(dense, name).weight.detach().double().T
        inputs = _reads(student, name, windows)
        solved = torch.linalg.lstsq(inputs, wanted).solution
        old: Any = before.get_submodule(name)
        for weight, bound in ((inner.weight, 1e-3), (old.weight, None)):
            error = float((inputs @ (weight.detach().double().T - solved)).norm() / wanted.norm())
            assert (error < bound) if bound else (error > 0.05)


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "qwen2", "gpt-neox", "opt"])
@pytest.mark.parametrize("form", ["width", "mixed"])
def test_narrow_models_keep_their_shapes_and_come_closer(name: str, form: str, compress: Compress) -> None:
    dense, windows = tiny.build(name), wards.lessons(fit=24).fit
    student, _ = compress(copy.deepcopy(dense), form=form, keep=0.7, of="linears")
    before, expected = wards.weights(student), logits(dense, windows)
    kinds = {module: type(found) for module, found in student.named_modules()}
    error = float((logits(student, windows) - expected).norm())
    names = [module for block in models.block_names(student) for module in closed.linears(student, block)]
    closed.refit(student, dense, windows, 1.0, metrics=Metrics.measured(dense, names, windows))
    after = wards.weights(student)
    assert {module: type(found) for module, found in student.named_modules()} == kinds
    assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in before.items()}
    assert float((logits(student, windows) - expected).norm()) < error
    assert all(torch.equal(before[key], value) for key, value in after.items() if key.endswith("places"))


def test_outputs_count_by_what_errors_cost() -> None:
    """Of two metrics, each is better in itself."""
    dense, windows = tiny.build("llama"), wards.lessons(fit=16).fit
    name = "model.layers.0.self_attn.o_proj"
    costly = torch.ones(32, dtype=torch.float64)
    costly[:8] = 1e4
    errors = []
    for metrics in (Metrics({name: torch.diag(costly)}), PLAIN):
        student = wards.cut(dense, 8)
        closed.refit(student, dense, windows, 1.0, metrics=metrics, damp=0.0)
        wanted = models.find(dense, name)(_reads(dense, name, windows).float())
        error = (student.get_submodule(name)(_reads(student, name, windows).float()) - wanted).detach()
        errors.append((float((error.double().square() * costly).sum()), float(error.square().sum())))
    assert errors[0][0] < 0.95 * errors[1][0]
    assert errors[1][1] < errors[0][1]


def test_the_dense_model_is_left_alone_and_watching_counts_blocks() -> None:
    dense = tiny.build("llama")
    before, seen = wards.weights(dense), []
    closed.refit(
        wards.cut(dense, 8), dense, wards.lessons().fit, 0.5,
        metrics=PLAIN, watch=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert wards.equal(before, wards.weights(dense))
    assert seen == [(1, 2), (2, 2)]


def test_a_singular_moment_is_named() -> None:
    with pytest.raises(NotPositiveDefinite, match="moment of 3 inputs is singular with damp=0.0: raise"):
        closed.anchored(torch.ones(2, 3).double(), torch.zeros(3, 3).double(), 0.0)


def test_anchoring_is_ridge_regression() -> None:
    made = torch.Generator().manual_seed(0)
    rows, outputs = (torch.randn(50, size, generator=made, dtype=torch.float64) for size in (6, 4))
    gram = rows.T @ rows / 50
    for damp in (0.0, 0.3):
        ridge = damp * float(gram.diagonal().mean()) * 50
        stacked = torch.cat([rows, ridge**0.5 * torch.eye(6, dtype=torch.float64)])
        padded = torch.cat([outputs, torch.zeros(6, 4, dtype=torch.float64)])
        expected = torch.linalg.lstsq(stacked, padded).solution.T
        torch.testing.assert_close(closed.anchored(outputs.T @ rows / 50, gram, damp), expected)


def _refine(student: Any, dense: Any, lessons: Lessons, **changes: Any) -> int:
    settings = wards.settings(**{"block_rate": 1e-3} | changes)
    names = training.trained_names(student, "blocks")
    metrics = blockwise.costs(dense, lessons.fit)
    return blockwise.refine(
        student, dense, lessons.fit, lessons.held_out, settings, metrics=metrics, trained=names
    )


@torch.no_grad()
def _error(model: Any, index: int, inputs: Any, dense: Any, windows: Tensor, metric: Tensor) -> float:
    """Return the error of block `index` of `model` on what the blocks of `inputs` give."""
    total = 0.0
    own, feed, original = (chain(which, windows[0]) for which in (model, inputs, dense))
    for window in windows:
        hidden, wanted = feed.entry(window), original.entry(window)
        for before in range(index):
            hidden, wanted = feed.run(before, hidden), original.run(before, wanted)
        error = (own.run(index, hidden) - original.run(index, wanted)).double()
        total += float((error @ metric.double() * error).sum())
    return total


@pytest.mark.parametrize("name", NAMES)
def test_no_block_is_further_from_its_outputs_on_held_out_text(name: str) -> None:
    dense, lessons = tiny.build(name), wards.lessons(fit=16)
    student = wards.cut(dense, 8)
    before, first = copy.deepcopy(student), wards.weights(student)
    better = _refine(student, dense, lessons)
    changed = wards.changed(first, wards.weights(student))
    metrics = blockwise.costs(dense, lessons.fit)
    blocks = models.block_names(student)
    gains = 0
    for index, block in enumerate(blocks):
        now, then = (
            _error(model, index, student, dense, lessons.held_out, metrics[block])
            for model in (student, before)
        )
        touched = any(models.owner(key, [block]) for key in changed)
        assert now < then if touched else now == then
        gains += touched
    assert gains == better > 0
    assert all(models.owner(key, blocks) for key in changed)


def test_a_block_that_gets_no_better_is_left_to_the_bit() -> None:
    dense, lessons = tiny.build("llama"), wards.lessons()
    for student, changes in (
        (copy.deepcopy(dense), {}),
        (wards.cut(dense, 8), {"block_rate": 30.0}),
    ):
        before = wards.weights(student)
        assert _refine(student, dense, lessons, **changes) == 0
        assert wards.equal(before, wards.weights(student))


def test_only_trained_parameters_change_and_the_order_follows_the_seed() -> None:
    dense, lessons = tiny.build("llama"), wards.lessons(fit=16)
    found = []
    for seed in (0, 0, 1):
        student = wards.cut(dense, 8)
        trained = [name for name in training.trained_names(student, "factors") if ".layers.0." in name]
        before = wards.weights(student)
        blockwise.refine(
            student, dense, lessons.fit, lessons.held_out, wards.settings(block_rate=1e-3, seed=seed),
            metrics=blockwise.costs(dense, lessons.fit), trained=trained,
        )  # fmt: skip
        after = wards.weights(student)
        assert wards.changed(before, after) == set(trained)
        found.append(after)
    assert wards.equal(found[0], found[1])
    assert not wards.equal(found[0], found[2])


def test_costs_are_second_moments_of_gradients_at_the_blocks() -> None:
    dense, windows = tiny.build("llama"), wards.lessons(fit=3).fit
    found = blockwise.costs(dense, windows)
    assert list(found) == models.block_names(dense)
    total, count = torch.zeros(32, 32, dtype=torch.float64), 0
    for window in windows:
        with _blocks(dense) as outputs:
            scores = dense(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(scores, window[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, outputs[1])
        rows = gradient.flatten(0, -2).double()
        total, count = total + rows.T @ rows, count + len(rows)
    expected = total / count
    torch.testing.assert_close(
        found["model.layers.1"].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
