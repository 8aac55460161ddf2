"""Laws of training through the quantiser, and of healing models that are stored in few bits."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import eckart
from eckart import ConfigError, NotFinite, models, plugin, refine, stores
from eckart.factors import FactoredLinear, NarrowLinear
from eckart.quant import storage
from eckart.quant.cells import Cells
from eckart.quant.storage import STORAGES
from eckart.quant.stored import StoredEmbedding, StoredHead, StoredLinear
from eckart.quant.straight import MasterEmbedding, MasterLinear, through
from eckart.training import recomputed, trained_names

from . import tiny, wards
from .conftest import logits, reload


class _Stopped(Exception):
    """What the tests interrupt with."""


def _silent(stage: str, done: int, total: int) -> None:
    """Watch nothing."""


def _put(model: Any, name: str, kind: str) -> None:
    weight = model.get_submodule(name).weight.detach()
    grid = storage.get(kind).grid(weight)
    stores.store(model, name, storage.get(kind), grid.codes(weight), grid)


def _stored(model: Any, kind: str = "int3", embeddings: str | None = None) -> Any:
    """Return `model` with the linears of its blocks, and its embeddings, rounded to nearest, in place."""
    blocks = models.block_names(model)
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, NarrowLinear) and models.owner(name, blocks):
            _put(model, name, kind)
    if embeddings is not None:
        table = models.table_name(model)
        assert table is not None
        _put(model, table, embeddings)
    plugin.mark(model)
    return model


def _linear(kind: str, shape: tuple[int, int], seed: int = 0) -> Any:
    """Return a stored linear map alone in a model."""
    model: Any = nn.Sequential(nn.Linear(shape[1], shape[0]))
    with torch.no_grad():
        model[0].weight.normal_(generator=torch.Generator().manual_seed(seed))
    _put(model, "0", kind)
    return model


def _codes(module: Any) -> Tensor:
    found: Tensor = module.storage.unpack(module.tensors(), module.shape)[0]
    return found


def _gap(module: Any) -> Tensor:
    """Return half the distance of each stored value from the next larger one; infinite at the end."""
    codes, grid = module.storage.unpack(module.tensors(), module.shape)
    ordered, order = grid.levels.sort()
    place = order.argsort()[codes.long()]
    above = ordered[(place + 1).clamp(max=len(ordered) - 1)]
    half = (above - ordered[place]) * grid.scale / 2
    return torch.where(place == len(ordered) - 1, torch.inf, half)


@given(
    kind=st.sampled_from(list(STORAGES)),
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 5, 63, 64, 65, 128, 130]),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 100),
)
def test_cells_round_to_what_the_grid_says_is_nearest(
    kind: str, rows: int, columns: int, spread: float, seed: int
) -> None:
    module: Any = _linear(kind, (rows, columns), seed)[0]
    _, grid = module.storage.unpack(module.tensors(), module.shape)
    values = spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    cells = Cells.of(module)
    assert torch.equal(cells.rounded(values), grid.rounded(values))
    assert torch.equal(grid.values(cells.codes(values)), grid.rounded(values))


@pytest.mark.parametrize("kind", STORAGES)
def test_zero_blocks_stay_zero(kind: str) -> None:
    model: Any = nn.Sequential(nn.Linear(128, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    _put(model, "0", kind)
    with through(model):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        assert not bool(model(torch.ones(1, 128)).any())
    assert not bool(model(torch.ones(1, 128)).any())


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "opt", "gpt-neox"])
@pytest.mark.parametrize("kind", ["int8", "nf4-dq", "fp4", "int3"])
def test_without_a_step_function_and_bits_are_the_same(name: str, kind: str) -> None:
    model = _stored(tiny.build(name), kind, "int4")
    before, kinds = wards.weights(model), {key: type(found) for key, found in model.named_modules()}
    first, own = logits(model, tiny.tokens()), stores.stored(model)
    with through(model):
        assert stores.stored(model) == {}
        opened = logits(model, tiny.tokens())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    scale = float(first.abs().max())
    assert float((opened - first).abs().max()) <= 100 * torch.finfo(torch.float32).eps * scale
    assert wards.equal(wards.weights(model), before)
    assert {key: type(found) for key, found in model.named_modules()} == kinds
    assert stores.stored(model) == own
    assert torch.equal(logits(model, tiny.tokens()), first)


def test_codes_with_the_same_value_stay() -> None:
    """fp4 has two codes for zero."""
    model = _linear("fp4", (4, 64))
    module: Any = model[0]
    codes, grid = module.storage.unpack(module.tensors(), module.shape)
    zeros = [code for code, level in enumerate(module.storage.table) if level == 0]
    assert len(zeros) == 2
    codes[0, :2] = torch.tensor(zeros, dtype=torch.uint8)
    module._fill(codes, grid)
    with through(model):
        pass
    assert torch.equal(_codes(model[0]), codes)


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("shape", [(5, 64), (7, 70)])
def test_a_code_moves_exactly_when_its_master_passes_a_midpoint(kind: str, shape: tuple[int, int]) -> None:
    model = _linear(kind, shape)
    stored: Any = model[0]
    before, parts = _codes(stored), {k: v.clone() for k, v in stored.tensors().items() if k != "codes"}
    half, values = _gap(stored), stored.dequantised()
    finite = half.isfinite() & (half > 0)
    with through(model):
        opened: Any = model[0]
        assert torch.equal(opened.rounded(), values)
        with torch.no_grad():
            opened.weight.copy_(values)
        share = torch.where(torch.arange(finite.numel()).view(shape) % 2 == 0, 0.99, 1.01)
        # One step of SGD at rate 1 by a gradient that is given.
        opened.weight.grad = torch.where(finite, -share * half, 0.0)
        torch.optim.SGD([opened.weight], lr=1.0).step()
        assert torch.equal(opened.rounded() != values, finite & (share > 1))
    assert model[0] is stored
    assert torch.equal(_codes(stored) != before, finite & (share > 1))
    assert all(torch.equal(stored.tensors()[name], part) for name, part in parts.items())
    assert bool((stored.dequantised() >= values).all())


def test_masters_begin_evenly_over_what_is_rounded_to_the_stored_value() -> None:
    model = _linear("int3", (64, 640))
    values = model[0].dequantised()
    with through(model, seed=3):
        opened: Any = model[0]
        cells = Cells.of(opened.grid[0])
        shares = ((opened.weight.detach() - values).view(cells.view) / cells.scale).flatten()
        first = opened.weight.detach().clone()
    ordered = shares.sort().values
    even = torch.linspace(-0.5, 0.5, len(ordered))
    # Kolmogorov's bound at one in a million.
    assert float((ordered - even).abs().max()) < 2.7 / len(ordered) ** 0.5
    for seed, same in ((3, True), (4, False)):
        with through(model, seed=seed):
            assert torch.equal(model[0].weight, first) == same


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("shape", [(6, 64), (7, 70)])
def test_what_is_trained_is_what_is_stored(kind: str, shape: tuple[int, int]) -> None:
    model = _linear(kind, shape)
    before = model[0].dequantised()
    generator = torch.Generator().manual_seed(2)
    with through(model):
        opened: Any = model[0]
        assert (opened.gain is None) == kind.endswith("-dq")
        with torch.no_grad():
            opened.weight.add_(0.1 * torch.randn(shape, generator=generator))
            if opened.gain is not None:
                opened.gain.add_(0.01 * torch.randn(opened.gain.shape, generator=generator))
        trained = opened.rounded().detach()
    assert not torch.equal(trained, before)
    assert torch.equal(model[0].dequantised(), trained)


@pytest.mark.parametrize("kind", [name for name in STORAGES if not name.endswith("-dq")])
@pytest.mark.parametrize("shape", [(3, 64), (5, 70)])
def test_gradients_of_scales_are_those_of_the_values(kind: str, shape: tuple[int, int]) -> None:
    model = _linear(kind, shape)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(shape, generator=generator)
    with through(model):
        opened: Any = model[0]
        (opened.rounded() * weights).sum().backward()
        step = 0.01 * torch.randn(opened.gain.shape, generator=generator)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                opened.gain.copy_(sign * step)
                found.append(float((opened.rounded().double() * weights).sum()))
        wanted = (found[0] - found[1]) / 2
        # Scales of float16 are rounded to 11 bits.
        assert float((opened.gain.grad * step).sum()) == pytest.approx(wanted, rel=2e-2)
        assert torch.equal(opened.weight.grad, weights)


def test_gradients_are_those_of_the_rounded_weight() -> None:
    model = _linear("int3", (6, 70))
    inputs = torch.randn(4, 70, generator=torch.Generator().manual_seed(1))
    plain: Any = nn.Linear(70, 6)
    with torch.no_grad():
        plain.weight.copy_(model[0].dequantised())
        plain.bias.copy_(model[0].bias)
    plain(inputs).square().sum().backward()
    with through(model):
        model(inputs).square().sum().backward()
        opened: Any = model[0]
        assert torch.allclose(opened.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
        assert torch.allclose(opened.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


def test_a_tied_head_has_the_master_of_its_table() -> None:
    model = _stored(tiny.build("llama"), "int4", "int8")
    head = model.lm_head
    assert isinstance(head, StoredHead)
    with through(model):
        assert isinstance(model.model.embed_tokens, MasterEmbedding)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        names = trained_names(model, "all")
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" not in trained_names(model, "blocks")
        logits_before = logits(model, tiny.tokens())
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
        changed = logits(model, tiny.tokens())
        assert not torch.allclose(changed, logits_before)
    assert model.lm_head is head
    assert head.table is model.model.embed_tokens
    assert torch.allclose(logits(model, tiny.tokens()), changed, rtol=1e-3, atol=1e-3)


def test_what_is_shared_stays_shared() -> None:
    first, second = FactoredLinear(64, 64, 16), FactoredLinear(64, 64, 16)
    model = nn.Sequential(first, second)
    _put(model, "0.down", "int4")
    shared = second.down = first.down
    with through(model):
        assert isinstance(first.down, MasterLinear)
        assert first.down is second.down
    assert first.down is shared is second.down


def test_copies_train_by_themselves() -> None:
    model = _linear("int2", (4, 64))
    with through(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.neg_()
        assert not torch.equal(other(torch.ones(1, 64)), model(torch.ones(1, 64)))


def test_factors_are_masters_of_low_rank_and_narrow_modules() -> None:
    model = wards.cut(tiny.build("llama"), 8)
    name = "model.layers.1.mlp.down_proj"
    linear = models.find(tiny.build("llama"), name)
    models.replace(model, name, NarrowLinear.slice(linear, None, torch.arange(40)))
    _stored(model, "int4")
    with through(model):
        names = trained_names(model, "factors")
    assert f"{name}.weight" in names
    assert "model.layers.0.mlp.up_proj.down.weight" in names
    assert not [found for found in names if "norm" in found]


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = _stored(tiny.build("llama"), "nf4")
    with through(model):
        found = []
        for context in (torch.enable_grad(), recomputed(model)):
            model.zero_grad()
            with context:
                model(input_ids=tiny.tokens(), use_cache=False).logits.square().mean().backward()
            found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_masters_that_are_not_finite_are_refused_and_change_nothing() -> None:
    first: Any = _linear("int4", (4, 64))
    model = nn.Sequential(first, _linear("nf4", (4, 4)))
    before = {name: part.dequantised() for name, part in stores.stored(model).items()}
    message = "1 of 2 stored matrices are NaN or infinite after training, and stay as they were: lower"
    with pytest.raises(NotFinite, match=message), through(model), torch.no_grad():
        first[0].weight[0, 0] = torch.nan
    assert all(torch.equal(part.dequantised(), before[name]) for name, part in stores.stored(model).items())
    with pytest.raises(_Stopped), through(model):
        raise _Stopped
    assert {type(part) for part in stores.stored(model).values()} == {StoredLinear}


def _pair(kind: str = "int3", embeddings: str | None = "int8", rank: int | None = None) -> tuple[Any, Any]:
    dense = tiny.build("llama")
    student = copy.deepcopy(dense) if rank is None else wards.cut(dense, rank)
    return _stored(student, kind, embeddings), dense


@pytest.mark.parametrize(
    ("kind", "rank", "train"), [("int3", 12, "blocks"), ("int2", None, "all"), ("nf4-dq", 12, "factors")]
)
def test_healing_through_the_quantiser_brings_a_model_closer(kind: str, rank: int | None, train: Any) -> None:
    student, dense = _pair(kind, rank=rank)
    lessons, before = wards.lessons(rows=24, held_out=12), wards.weights(student)
    settings = wards.settings(tokens=24 * wards.LENGTH, rate=5e-4, evaluations=1, train=train)
    with through(student):
        (found,) = refine.heal(student, dense, lessons, settings, watch=_silent)
    assert found.gain
    assert found.after < 0.98 * found.before
    changed = {name.rpartition(".")[2] for name in wards.changed(before, wards.weights(student))}
    assert changed - {"scale", "absmax"} == {"codes"} | ({"weight"} if train != "factors" else set())
    table = wards.changed(before, wards.weights(student)) & {"model.embed_tokens.codes"}
    assert bool(table) == (train == "all")
    rows = lessons.held_out
    after = eckart.measure.compare(student, dense, rows).kl
    assert after == pytest.approx(found.after, rel=1e-3)


@pytest.mark.parametrize("stop", [("heal: block", 1), ("heal: logits", 1), ("heal: logits", 6)])
def test_an_interrupted_run_ends_with_the_same_bits(stop: tuple[str, int], tmp_path: Path) -> None:
    lessons = wards.lessons(rows=8, fit=4, held_out=4)
    settings = wards.settings(
        tokens=8 * wards.LENGTH,
        evaluations=2,
        block_epochs=2,
        steps=("block", "logits"),
        block_rate=1e-4,
        rate=3e-4,
    )

    def heal(student: Any, dense: Any, watch: Any, work: Path | None) -> list[Any]:
        with through(student):
            return refine.heal(student, dense, lessons, settings, work=work, key="key", watch=watch)

    whole, dense = _pair()
    expected = heal(whole, dense, _silent, None)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == stop:
            raise _Stopped

    with pytest.raises(_Stopped):
        heal(_pair()[0], dense, interrupt, tmp_path / "work")
    again, _ = _pair()
    found = heal(again, dense, _silent, tmp_path / "work")
    assert [(step.before, step.after, step.curve) for step in found] == [
        (step.before, step.after, step.curve) for step in expected
    ]
    assert wards.equal(wards.weights(again), wards.weights(whole))


SMALL = wards.settings(tokens=640, hold_tokens=512, seq_len=32, text=(), rate=3e-4)


@pytest.mark.parametrize("rank", [None, 12])
def test_a_healed_folder_loads_to_the_same_logits(
    rank: int | None, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    student, dense = _pair(rank=rank)
    kinds = {name: type(module) for name, module in student.named_modules()}
    eckart.save(student, tokenizer, tmp_path / "before")
    healed, done = eckart.heal(
        tmp_path / "before", dense, text_file, settings=SMALL, eval_text=text_file, eval_tokens=640,
    )  # fmt: skip
    assert {name: type(module) for name, module in healed.named_modules()} == kinds
    assert done.steps[0].gain
    assert done.quality is not None
    expected = eckart.evaluate(healed, text_file, tokens=640, seq_len=32, tokenizer=tokenizer)
    assert isinstance(expected, eckart.measure.Perplexity)
    assert done.quality.compressed.loss == pytest.approx(expected.loss, rel=1e-5)
    eckart.save(healed, tokenizer, tmp_path / "out", done, source=tmp_path / "before")
    again = reload(tmp_path / "out")
    assert torch.equal(logits(again, tiny.tokens()), logits(healed, tiny.tokens()))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "out"))
    ends = {name.rpartition(".")[2] for name in first if not torch.equal(first[name], second[name])}
    assert ends == {"codes", "scale", "weight"}


def test_compress_heals_what_it_stores(tokenizer: Any, text_file: Path) -> None:
    model, result = eckart.compress(
        tiny.build("llama"), keep=1.0, storage="int2", embeddings="int8", text=text_file, tokens=1024,
        gradient_tokens=512, seq_len=32, heal=SMALL, tokenizer=tokenizer,
    )  # fmt: skip
    (step,) = result.healing
    assert step.gain
    assert step.after < step.before
    assert isinstance(model.model.embed_tokens, StoredEmbedding)


def test_what_solves_for_float_weights_is_refused(tokenizer: Any, text_file: Path) -> None:
    student, dense = _pair()
    before = wards.weights(student)
    settings: dict[str, Any] = {"seq_len": 32, "hold_tokens": 512}
    for step, measured in itertools.product(("ranks", "closed"), (None, text_file)):
        message = f"refinement {step} solves for float weights, and the model is stored in few bits: heal"
        with pytest.raises(ConfigError, match=message):
            eckart.heal(
                student, dense, text_file, tokenizer=tokenizer,
                settings=wards.settings(steps=("logits", step), **settings), eval_text=measured,
            )  # fmt: skip
    with pytest.raises(ConfigError, match="train adapter: merged into weights of few bits, an adapter would"):
        eckart.heal(
            student, dense, text_file, tokenizer=tokenizer,
            settings=wards.settings(train="adapter", **settings),
        )  # fmt: skip
    assert wards.equal(wards.weights(student), before)
