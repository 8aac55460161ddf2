"""Statistics equal the sums written out by hand, and nothing is left behind on the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart import stats
from eckart.errors import ConfigError, ModelError, NotFinite
from eckart.methods import METHODS, input_metric
from eckart.nystrom import WideMetric
from eckart.stats import STATISTICS, Moment, Statistic, Stats, collect

NAMES = ("query", "key", "out")
LENGTHS = (3, 8, 5)
PRECISIONS = [torch.float32, torch.float64]


class Net(nn.Module):
    """`query` and `key` read one tensor; `out` reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 4), nn.Linear(6, 4)
        self.out, self.idle = nn.Linear(4, 3), nn.Linear(6, 2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.query(inputs)) * self.key(inputs)
        return torch.sin(self.out(hidden))


class Pair(nn.Module):
    """Two readers that are given one tensor or two equal ones, as the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor, shared: bool) -> Tensor:
        other = inputs if shared else inputs.clone()
        return torch.cat([self.first(inputs), self.second(other)], dim=-1)


def windows(width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, width, generator=generator) for length in LENGTHS]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one module saw in one window: inputs, gradients at its output and at its weight."""

    inputs: Tensor
    gradients: Tensor
    weight: Tensor


def traces(net: Net) -> dict[str, list[Trace]]:
    """Run every window by hand, in float64."""
    exact = Net().double()
    exact.load_state_dict(net.state_dict())
    found: dict[str, list[Trace]] = {name: [] for name in NAMES}
    for window in windows():
        inputs = window.double()[0]
        query, key = exact.query(inputs), exact.key(inputs)
        hidden = torch.tanh(query) * key
        out = exact.out(hidden)
        outputs = dict(zip(NAMES, (query, key, out), strict=True))
        weights = [exact.get_submodule(name).weight for name in NAMES]
        gradients = torch.autograd.grad(torch.sin(out).sum(), [*outputs.values(), *weights])
        for place, name in enumerate(NAMES):
            seen = hidden if name == "out" else inputs
            found[name].append(Trace(seen.detach(), gradients[place], gradients[place + 3]))
    return found


def by_hand(statistic: Statistic, seen: Sequence[Trace]) -> Tensor:
    inputs = torch.cat([trace.inputs for trace in seen])
    gradients = torch.cat([trace.gradients for trace in seen])
    if statistic == "gram":
        return inputs.T @ inputs / len(inputs)
    if statistic == "absolute":
        return inputs.abs().mean(0)
    if statistic == "gradient":
        return gradients.T @ gradients / len(gradients)
    return torch.stack([trace.weight.square().sum(0) for trace in seen]).mean(0)


def feed(net: nn.Module) -> None:
    for window in windows():
        net(window).sum().backward()


def is_close(found: Tensor, expected: Tensor) -> bool:
    allowed = 10 * torch.finfo(torch.float32).eps * max(expected.shape) * float(expected.norm())
    return bool((found - expected).norm() <= allowed)


# values


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_statistic_is_its_definition(statistic: Statistic, precision: torch.dtype) -> None:
    net = Net()
    with collect(net, NAMES, [statistic], precision=precision) as found:
        feed(net)
    expected = traces(net)
    for name in NAMES:
        moment = found.moment(statistic, name)
        mean = moment.mean()
        assert mean.dtype == precision
        assert is_close(mean, by_hand(statistic, expected[name]))
        assert moment.count == (len(LENGTHS) if statistic == "fisher" else sum(LENGTHS))
        untreated = sum(by_hand(statistic, [trace]) for trace in expected[name]) / len(LENGTHS)
        assert isinstance(untreated, Tensor)
        assert is_close(mean, untreated) == (statistic == "fisher")
        assert not is_close(moment.total, by_hand(statistic, expected[name]))


def test_all_statistics_come_from_one_pass() -> None:
    net = Net()
    with collect(net, NAMES, list(STATISTICS)) as found:
        feed(net)
    expected = traces(net)
    for statistic in STATISTICS:
        for name in NAMES:
            assert is_close(found.moment(statistic, name).mean(), by_hand(statistic, expected[name]))


def test_the_fisher_of_a_window_is_not_that_of_its_tokens() -> None:
    net = Net()
    with collect(net, ["out"], ["fisher"]) as found:
        feed(net)
    seen = traces(net)["out"]
    tokens = sum((trace.gradients.square().T @ trace.inputs.square()).sum(0) for trace in seen) / len(seen)
    assert isinstance(tokens, Tensor)
    assert not is_close(found.moment("fisher", "out").mean(), tokens)


def test_frozen_parameters_have_gradients_at_their_outputs() -> None:
    net = Net().requires_grad_(False)
    with collect(net, NAMES, ["gradient", "fisher"]) as found:
        for window in windows():
            net(window.requires_grad_()).sum().backward()
    expected = traces(net)
    wanted: tuple[Statistic, ...] = ("gradient", "fisher")
    for statistic in wanted:
        for name in NAMES:
            assert is_close(found.moment(statistic, name).mean(), by_hand(statistic, expected[name]))


def test_the_model_computes_what_it_computed() -> None:
    net, other = Net(), Net()
    with collect(net, NAMES, list(STATISTICS)):
        feed(net)
    feed(other)
    for observed, plain in zip(net.parameters(), other.parameters(), strict=True):
        assert (observed.grad is None) == (plain.grad is None)
        if observed.grad is not None and plain.grad is not None:
            assert torch.equal(observed.grad, plain.grad)


def test_narrow_inputs_are_multiplied_in_float32() -> None:
    layer = nn.Sequential(nn.Linear(6, 2, dtype=torch.bfloat16))
    inputs = [window.bfloat16() for window in windows()]
    with torch.no_grad(), collect(layer, ["0"], ["gram"]) as found:
        for window in inputs:
            layer(window)
    rows = torch.cat([window[0] for window in inputs])
    exact = rows.double().T @ rows.double() / len(rows)
    assert is_close(found.moment("gram", "0").mean(), exact)
    assert not is_close((rows.T @ rows / len(rows)).double(), exact)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_products_are_exact_under_autocast(statistic: Statistic) -> None:
    linear = nn.Linear(6, 4)
    inputs = [1 + window / 100 for window in windows()]  # near to one direction: rounding would show
    seen: list[Trace] = []
    with torch.autocast("cpu", torch.bfloat16), collect(linear, [""], [statistic]) as found:
        for window in inputs:
            output = linear(window)
            rows, wide = 2 * output.detach().double()[0], window.double()[0]
            seen.append(Trace(wide, rows, rows.T @ wide))
            output.square().sum().backward()
    mean = found.moment(statistic, "").mean()
    assert is_close(mean, by_hand(statistic, seen))
    if mean.ndim == 2:
        assert float(torch.linalg.eigvalsh(mean.double()).min()) >= -1e-5 * float(mean.norm())


def test_sums_in_float64_do_not_stall() -> None:
    layer = nn.Sequential(nn.Linear(1, 1))
    means = {}
    for precision in PRECISIONS:
        with torch.no_grad(), collect(layer, ["0"], ["gram"], precision=precision) as found:
            for value in (2.0**13, *[1.0] * 64):
                layer(torch.full((1, 1), value))
        means[precision] = float(found.moment("gram", "0").mean()) * 65
    assert means[torch.float64] == pytest.approx(2.0**26 + 64, rel=1e-12)
    assert means[torch.float32] < 2.0**26 + 32


def test_a_wide_side_gets_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "WIDEST_FULL", 4)
    net = Net()
    with collect(net, NAMES, ["gram", "gradient"]) as found:
        feed(net)
    expected = traces(net)
    wide = found.moment("gram", "query").mean()
    assert wide.shape == (6,)
    whole = by_hand("gram", expected["query"])
    assert is_close(wide, whole.diagonal())
    products = found.moment("sketch", "query").mean()
    assert is_close(products, whole @ stats.sketch_columns(6).to(whole))
    assert ("sketch", "out") not in found.moments
    metric = input_metric(METHODS["svd-llm"], found, "query", 6, 0.0, 0.5)
    assert isinstance(metric, WideMetric)
    assert torch.allclose(
        metric.dense(), whole, atol=1e-5 * float(whole.abs().max())
    )  # as many columns as rows
    assert found.moment("gram", "out").mean().shape == (4, 4)
    monkeypatch.setattr(stats, "WIDEST_FULL", 2)
    with collect(net, ["out"], ["gradient"]) as found:
        feed(net)
    assert is_close(found.moment("gradient", "out").mean(), by_hand("gradient", expected["out"]).diagonal())


# sharing


def test_readers_of_one_tensor_share_its_statistics() -> None:
    net = Net()
    with collect(net, NAMES, list(STATISTICS)) as found:
        feed(net)
    assert [found.leader(name) for name in NAMES] == ["query", "query", "out"]
    of_input: tuple[Statistic, ...] = ("gram", "absolute")
    of_output: tuple[Statistic, ...] = ("gradient", "fisher")
    for statistic in of_input:
        assert found.moment(statistic, "key") is found.moment(statistic, "query")
        assert found.moment(statistic, "out") is not found.moment(statistic, "query")
        assert found.moment(statistic, "query").count == sum(LENGTHS)
    for statistic in of_output:
        assert found.moment(statistic, "key") is not found.moment(statistic, "query")


def test_equal_tensors_are_not_one_tensor() -> None:
    pair = Pair()
    with torch.no_grad(), collect(pair, ["first", "second"], ["gram"]) as found:
        for window in windows(4):
            pair(window, shared=False)
    assert found.leader("second") == "second"
    first, second = (found.moment("gram", name) for name in ("first", "second"))
    assert first is not second
    assert torch.equal(first.mean(), second.mean())


def test_readers_that_meet_later_keep_their_own_statistics() -> None:
    pair = Pair()
    with torch.no_grad(), collect(pair, ["first", "second"], ["gram"]) as found:
        for place, window in enumerate(windows(4)):
            pair(window, shared=place > 0)
    rows = torch.cat([window[0] for window in windows(4)]).double()
    for name in ("first", "second"):
        assert found.leader(name) == name
        assert is_close(found.moment("gram", name).mean(), rows.T @ rows / len(rows))


def test_sharing_that_ends_is_refused() -> None:
    pair = Pair()
    with torch.no_grad(), collect(pair, ["first", "second"], ["gram"]):
        pair(windows(4)[0], shared=True)
        with pytest.raises(ModelError, match="second and first read one tensor on the first window and two"):
            pair(windows(4)[1], shared=False)


def test_a_reader_far_from_the_first_is_still_right() -> None:
    chain = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])
    names = [str(place) for place in range(8)]
    rows = []
    with torch.no_grad(), collect(chain, names, ["gram"]) as found:
        for window in windows(4):
            hidden = window
            for layer in list(chain)[:-1]:
                hidden = layer(hidden)
            chain[7](window)
            rows.append(window[0].double())
    inputs = torch.cat(rows)
    for name in ("0", "7"):
        assert is_close(found.moment("gram", name).mean(), inputs.T @ inputs / len(inputs))


def test_a_tensor_changed_in_place_is_another_input() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    inputs = windows(4)[0]
    with torch.no_grad(), collect(nn.ModuleList([first, second]), ["0", "1"], ["gram"]) as found:
        inputs += first(inputs)
        second(inputs)
    rows = inputs[0].double()
    assert is_close(found.moment("gram", "1").mean(), rows.T @ rows / len(rows))


# lifetime


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_hooks_leave_with_the_context_and_others_stay() -> None:
    net = Net()
    calls = []
    net.query.register_forward_hook(lambda *_: calls.append(1))
    with collect(net, NAMES, ["gram"]) as found:
        assert hooks(net) == len(NAMES) + 1
        feed(net)
    assert hooks(net) == 1
    before = found.moment("gram", "query").count
    feed(net)
    assert found.moment("gram", "query").count == before
    assert len(calls) == 2 * len(LENGTHS)


def test_hooks_leave_after_an_exception() -> None:
    net = Net()

    def fail() -> None:
        with collect(net, NAMES, ["gram"]):
            feed(net)
            raise KeyError("out of text")

    with pytest.raises(KeyError, match="out of text"):
        fail()
    assert hooks(net) == 0


def test_a_backward_pass_after_the_context_adds_nothing() -> None:
    net = Net()
    with collect(net, ["out"], ["gradient"]) as found:
        loss = net(windows()[0]).sum()
    loss.backward()
    assert not found.moments


def test_forget_keeps_an_input_that_is_still_shared() -> None:
    net = Net()
    with collect(net, NAMES, ["gram", "gradient"]) as found:
        feed(net)
    gram = found.moment("gram", "key").mean()
    found.forget(["query"])
    assert torch.equal(found.moment("gram", "key").mean(), gram)
    assert found.moment("gradient", "key").count == sum(LENGTHS)
    with pytest.raises(ModelError, match="no 'gradient' statistic for query"):
        found.moment("gradient", "query")
    found.forget(["key"])
    with pytest.raises(ModelError, match="no 'gram' statistic for key"):
        found.moment("gram", "key")
    assert set(found.moments) == {("gram", "out"), ("gradient", "out")}
    found.forget(["out"])
    assert not found.moments


# errors


def test_an_unknown_name_is_refused_before_any_hook() -> None:
    net = Net()
    with (
        pytest.raises(ModelError, match="no module named nothing"),
        collect(net, ["out", "nothing"], ["gram"]),
    ):
        pass
    assert hooks(net) == 0


def test_a_statistic_that_was_not_gathered_is_refused() -> None:
    net = Net()
    with torch.no_grad(), collect(net, [*NAMES, "idle"], ["gram", "gradient"]) as found:
        net(windows()[0])
    absent: list[tuple[Statistic, str]] = [("absolute", "out"), ("gram", "idle"), ("gradient", "out")]
    for statistic, name in absent:
        message = f"no '{statistic}' statistic for {name}: it was not collected, or the module did not run"
        with pytest.raises(ModelError, match=message):
            found.moment(statistic, name)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_statistic_that_is_not_finite_is_refused(broken: float) -> None:
    net = Net()
    window = windows()[0]
    window[0, 1, 2] = broken
    with torch.no_grad(), collect(net, NAMES, ["gram", "absolute"]) as found:
        net(windows()[1])
        net(window)
    wanted: tuple[Statistic, ...] = ("gram", "absolute")
    for statistic in wanted:
        with pytest.raises(NotFinite, match="a statistic is NaN or infinite: the model overflows"):
            found.moment(statistic, "query").mean()


def test_a_statistic_of_no_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="a statistic saw no tokens: its module did not run"):
        Moment(torch.zeros(2)).mean()
    layer = nn.Sequential(nn.Linear(6, 2))
    with torch.no_grad(), collect(layer, ["0"], ["gram"]) as found:
        layer(torch.zeros(0, 6))
    with pytest.raises(ModelError, match="saw no tokens"):
        found.moment("gram", "0").mean()


def test_a_call_by_keyword_is_refused() -> None:
    layer = nn.ModuleList([nn.Linear(6, 2)])
    with collect(layer, ["0"], ["gram"]), pytest.raises(ModelError, match="0 is called by keyword: leave it"):
        layer[0](input=torch.ones(1, 6))
    assert hooks(layer) == 0


def test_an_unknown_statistic_is_refused() -> None:
    wanted: list[Any] = ["grams"]
    with (
        pytest.raises(ConfigError, match="statistic 'grams': legal are gram, absolute"),
        collect(Net(), NAMES, wanted),
    ):
        pass


def test_a_name_that_nothing_shares_leads_itself() -> None:
    assert Stats().leader("out") == "out"


def test_inference_mode_is_as_good_as_no_grad() -> None:
    net = Net()
    with torch.inference_mode(), collect(net, NAMES, ["gram"]) as found:
        for window in windows():
            net(window.clone())
    rows = torch.cat([window[0] for window in windows()]).double()
    assert found.leader("key") == "query"
    assert is_close(found.moment("gram", "query").mean(), rows.T @ rows / len(rows))


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_is_added_to_in_place_has_its_gradient(bias: bool) -> None:
    linear, inputs = nn.Linear(4, 3, bias), torch.randn(1, 5, 4)  # with a bias, the output is a view

    class Block(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.linear, self.in_place = linear, in_place

        def forward(self, hidden: Tensor) -> Tensor:
            found: Tensor = self.linear(hidden)
            if self.in_place:
                found += hidden[..., :3]
                return found.square().sum()
            return (found + hidden[..., :3]).square().sum()

    found = []
    for in_place in (True, False):
        block = Block(in_place)
        with collect(block, ["linear"], ["gradient", "fisher"]) as stats:
            torch.autograd.backward(block(inputs.clone().requires_grad_()))
        found.append([stats.moments[kind, "linear"].mean() for kind in ("gradient", "fisher")])
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))
    assert float(found[0][0].trace()) > 0
