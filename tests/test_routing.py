"""Mixtures of experts: statistics of the tokens that each expert got, and what those do that got too few."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eckart
from eckart import dimensions, kinds, mixtures, models, routing
from eckart.calibrate import calibrate
from eckart.methods import shortage
from eckart.stats import Moment, Stats

from . import tiny
from .conftest import Compress, logits, reload

EXPERTS = "model.layers.0.mlp.experts"
WINDOWS = torch.randint(2, tiny.VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(2))


class Mixture(nn.Module):
    """A mixture as code outside of transformers has it: a list of experts of nn.Linear, a linear router."""

    class Expert(nn.Module):
        """A gated MLP."""

        def __init__(self, size: int, hidden: int) -> None:
            super().__init__()
            self.w1, self.w3 = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
            self.w2 = nn.Linear(hidden, size, bias=False)

        def forward(self, inputs: Tensor) -> Any:
            """Map (tokens, d) to (tokens, d)."""
            return self.w2(nn.functional.silu(self.w1(inputs)) * self.w3(inputs))

    def __init__(self, size: int = 32, hidden: int = 40, count: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(size, count, bias=False)
        self.experts = nn.ModuleList([self.Expert(size, hidden) for _ in range(count)])

    def forward(self, hidden: Tensor) -> Tensor:
        """Send every token to two experts."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        total = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            if len(rows):
                total = total.index_add(0, rows, expert(flat[rows]) * weights[rows, places, None])
        return total.view_as(hidden)


def with_lists() -> Any:
    """Return a tiny model whose MLPs are such mixtures."""
    model = tiny.build("llama")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Mixture()
    return model


def silenced(model: Any, index: int) -> Any:
    """Return `model` with a router in its first block that never chooses the expert `index`."""
    gate = model.model.layers[0].mlp.gate
    forward = gate.forward

    def never(hidden: Tensor) -> Any:
        logits, _, _ = forward(hidden)
        logits[:, index] = -100.0
        weights, chosen = logits.softmax(-1).topk(2)
        return logits, weights, chosen

    gate.forward = never
    return model


def statistics(model: Any, *wanted: Any) -> Stats:
    """Return statistics of all matrices of the blocks on always the same windows."""
    names = [target.name for target in models.targets(model)]
    return calibrate(
        model, WINDOWS, names, wanted or ("gram", "gradient"),
        gradient_windows=len(WINDOWS), generator=torch.Generator().manual_seed(0),
    ).stats  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "granite-moe"])
def test_statistics_are_those_of_the_tokens_that_were_routed_to_an_expert(name: str) -> None:
    stock = tiny.build(name)
    holder = dict(stock.named_modules())[next(n for n, _ in stock.named_modules() if n.endswith(".experts"))]
    calls: list[Any] = []
    handle = holder.register_forward_pre_hook(lambda module, args: calls.append(args))
    for window in WINDOWS:
        logits(stock, window[None])
    handle.remove()
    hidden, chosen = (torch.cat([call[index] for call in calls]) for index in (0, 1))
    model = kinds.unfold(tiny.build(name))
    found = statistics(model)
    place = next(n for n, m in model.named_modules() if type(m).__name__ == "Experts")
    total = 0
    for index in range(4):
        rows = hidden[(chosen == index).any(1)]
        moment = found.moment("gram", f"{place}.each.{index}.gate_up")
        assert moment.count == len(rows)
        assert torch.allclose(moment.mean(), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(moment.mean(), hidden.T @ hidden / len(hidden), rtol=1e-3, atol=1e-4)
        inner = holder.act_fn(rows @ holder.gate_up_proj[index].T.chunk(2, -1)[0])
        inner = (inner * (rows @ holder.gate_up_proj[index].T.chunk(2, -1)[1])).detach()
        moment = found.moment("gram", f"{place}.each.{index}.down")
        assert torch.allclose(moment.mean(), inner.T @ inner / len(inner), rtol=1e-3, atol=1e-4)
        assert found.moment("gradient", f"{place}.each.{index}.down").count == len(rows)
        total += moment.count
    assert total == 2 * WINDOWS.numel()  # two experts for each token


def test_lists_of_experts_are_found_and_routers_stay(compress: Compress) -> None:
    model = with_lists()
    assert set(mixtures.expert_lists(model, models.all_blocks(model))) == {
        f"model.layers.{index}.mlp.experts" for index in range(2)
    }
    names = {target.name for target in models.targets(model)}
    assert "model.layers.0.mlp.experts.3.w2" in names
    assert not any(name.endswith("mlp.gate") for name in names)
    small, result = compress(model)
    assert result.keep_linears <= 0.6
    assert type(small.model.layers[0].mlp.gate) is nn.Linear
    assert models.low_rank_modules(small)
    assert models.targets(with_lists(), include=["mlp.gate"])  # by name they may be


def test_flops_are_those_of_the_experts_that_a_token_goes_to() -> None:
    model = kinds.unfold(tiny.build("mixtral"))
    each = sum(2 * m.in_features * m.out_features for m in model.modules() if type(m) is nn.Linear)
    experts = 2 * 4 * 2 * (96 * 32 + 32 * 48)
    assert models.flops_per_token(model) == each - experts // 2


def test_moments_with_enough_tokens_stay_as_they_are() -> None:
    model = kinds.unfold(tiny.build("mixtral"))
    found = statistics(model)
    before = {key: (moment.total.clone(), moment.count) for key, moment in found.moments.items()}
    routing.fill(model, models.targets(model), found)
    for key, moment in found.moments.items():
        if not moment.filled:
            assert torch.equal(moment.total, before[key][0])
        enough = before[key][1] >= len(moment.total)
        assert moment.filled == (not enough and ".experts." in key[1])
    assert any(moment.filled for moment in found.moments.values())


def test_what_lacks_is_filled_from_the_others_by_what_is_missing() -> None:
    model = kinds.unfold(tiny.build("mixtral"))
    found = models.targets(model)
    stats, generator = statistics(model), torch.Generator().manual_seed(0)
    names = [f"{EXPERTS}.each.{index}.gate_up" for index in range(4)]
    for index, count in enumerate((40, 10, 64, 96)):
        rows = torch.randn(count, 32, generator=generator)
        stats.moments["gram", names[index]] = Moment(rows.T @ rows, count)
    old = [stats.moments["gram", name] for name in names]
    pooled = (old[0].total + old[2].total + old[3].total) / 200
    warnings = routing.fill(model, found, stats)
    assert stats.moments["gram", names[0]].total is old[0].total
    new = stats.moments["gram", names[1]]
    assert (new.count, new.filled, shortage(new)) == (10, True, 0)
    assert torch.allclose(new.mean(), (10 * old[1].mean() + 22 * pooled) / 32, atol=1e-5)
    assert not torch.allclose(new.mean(), old[1].mean(), atol=1e-2)
    assert int(torch.linalg.matrix_rank(old[1].total)) == 10
    assert int(torch.linalg.matrix_rank(new.mean())) == 32
    assert any("1: 10" in warning for warning in warnings)


def test_an_experts_own_dimension_is_shrunk_towards_the_identity() -> None:
    model = kinds.unfold(tiny.build("mixtral"))
    stats = statistics(model)
    names = [f"{EXPERTS}.each.{index}.down" for index in range(4)]
    rows = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    for name in names:
        stats.moments["gram", name] = Moment(100 * torch.eye(48), 100)
    stats.moments["gram", names[2]] = Moment(rows.T @ rows, 12)
    old = stats.moments["gram", names[2]].mean()
    routing.fill(model, models.targets(model), stats)
    new = stats.moments["gram", names[2]]
    expected = (12 * old + 36 * old.trace() / 48 * torch.eye(48)) / 48
    assert torch.allclose(new.mean(), expected, atol=1e-5)
    assert torch.allclose(new.mean().trace(), old.trace(), rtol=1e-5)  # the energy is its own


@pytest.mark.parametrize("wanted", [("gram", "gradient"), ("absolute",), ("fisher",)])
def test_an_expert_that_saw_nothing_gets_the_mean_and_counts_as_one_token(wanted: Any) -> None:
    model = kinds.unfold(silenced(tiny.build("mixtral"), 2))
    stats = statistics(model, *wanted)
    kind, name = wanted[0], f"{EXPERTS}.each.{2}.gate_up"
    assert (kind, name) not in stats.moments
    others = [stats.moment(kind, f"{EXPERTS}.each.{index}.gate_up") for index in (0, 1, 3)]
    others = [Moment(moment.total.clone(), moment.count) for moment in others]
    warnings = routing.fill(model, models.targets(model), stats)
    found = stats.moment(kind, name)
    mean = torch.stack([moment.total for moment in others]).sum(0) / sum(moment.count for moment in others)
    assert found.count == 1
    assert torch.allclose(found.mean(), mean, rtol=1e-5)
    assert any(warning.startswith(f"{EXPERTS}.each: ") and "2: 0" in warning for warning in warnings)
    for target in models.targets(model):
        for statistic in wanted:
            assert stats.moment(statistic, target.name).mean().isfinite().all()


def test_a_list_that_all_tokens_go_through_is_no_mixture() -> None:
    model = kinds.unfold(tiny.build("mixtral"))
    stats = statistics(model)
    for moment in stats.moments.values():
        moment.count = 7  # all saw the same tokens, too few
    assert routing.fill(model, models.targets(model), stats) == []


def test_a_model_with_a_silent_expert_is_compressed_and_says_so(compress: Compress) -> None:
    model, result = compress(silenced(tiny.build("mixtral"), 2))
    assert [w for w in result.warnings if w.startswith(f"{EXPERTS}.each: ") and "2: 0" in w]
    assert logits(model, tiny.tokens()).isfinite().all()
    assert any(row.name.startswith(f"{EXPERTS}.each.2.") for row in result.modules)


def test_every_expert_is_tried_by_itself_for_its_width() -> None:
    """Tokens of a probe may all go to others: what an expert does is asked of the expert."""
    for name in ("mixtral", "granite-moe"):
        model = kinds.unfold(tiny.build(name))
        if name == "mixtral":
            silenced(model, 0)
        found = dimensions.verified(model, dimensions.find(model, models.targets(model)))
        assert sum(dimension.kind == "mlp" for dimension in found) == 8
    model = kinds.unfold(tiny.build("gpt-oss"))  # gate and up stand in turns: not what shapes suggest
    found = dimensions.verified(model, dimensions.find(model, models.targets(model)))
    assert not any(dimension.kind == "mlp" for dimension in found)


def test_experts_narrowed_or_in_few_bits_load_again(
    compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    cases: list[dict[str, Any]] = [{"form": "width"}, {"storage": "int8"}, {"storage": "nf4", "keep": 1.0}]
    for index, options in enumerate(cases):
        model, result = compress(tiny.build("mixtral"), **options)
        before = logits(model, tiny.tokens())
        eckart.save(model, tokenizer, tmp_path / str(index), result)
        again = reload(tmp_path / str(index))
        found = logits(again, tiny.tokens())
        assert torch.allclose(found, before, atol=1e-5 * float(before.abs().max()))
        stock = eckart.densify(again)
        assert type(stock.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
        assert torch.allclose(logits(stock, tiny.tokens()), found, atol=1e-2 * float(found.abs().max()))
