"""The module that adds a low-rank correction to a linear map."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eckart import models
from eckart.errors import ConfigError, ModelError, RankError
from eckart.factors import LowRank
from eckart.quant.corrected import CorrectedLinear, weight_of


class Halved(nn.Module):
    """A linear map that stores its weight in int8, in halves."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.register_buffer("codes", torch.randint(-9, 9, (rows, columns), dtype=torch.int8))
        self.bias: nn.Parameter | None = nn.Parameter(torch.randn(rows))

    def dequantised(self) -> Tensor:
        codes: Any = self.codes
        halves: Tensor = codes.to(torch.float32) / 2
        return halves

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.dequantised(), self.bias)


def factors(rows: int, columns: int, rank: int) -> LowRank:
    return LowRank(torch.randn(rows, rank), torch.randn(rank, columns))


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.data())
@hypothesis_settings(max_examples=30, deadline=None)
def test_it_is_the_sum_of_both(rows: int, columns: int, bias: bool, stored: bool, data: Any) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    torch.manual_seed(0)
    base = Halved(rows, columns) if stored else nn.Linear(columns, rows, bias)
    low_rank = factors(rows, columns, rank)
    made = CorrectedLinear.of(base, low_rank, torch.float32)
    assert torch.equal(
        made.dense_weight(), weight_of(base) + low_rank.left.double() @ low_rank.right.double()
    )
    assert made.dense_weight().dtype == torch.float64
    assert (made.dense_bias() is None) == (not bias and not stored)
    inputs = torch.randn(2, 3, columns)
    expected = nn.functional.linear(
        inputs.double(), made.dense_weight(), None if base.bias is None else base.bias.double()
    )
    assert torch.allclose(made(inputs).double(), expected, atol=1e-4)
    assert not torch.allclose(base(inputs).double(), expected, atol=1e-4)


def test_its_names_and_what_it_costs() -> None:
    made = CorrectedLinear.of(nn.Linear(8, 6), factors(6, 8, 3), torch.bfloat16)
    assert set(made.state_dict()) == {"base.weight", "base.bias", "down.weight", "up.weight"}
    assert made.kind == "corrected"
    assert (made.in_features, made.out_features, made.rank) == (8, 6, 3)
    assert models.parameter_count(made) == 6 * 8 + 6 + 3 * (6 + 8)
    assert models.flops_per_token(made) == 2 * (6 * 8 + 3 * (6 + 8))
    assert made.down.weight.dtype == made.up.weight.dtype == torch.bfloat16
    assert "8 -> 6, corrected by rank 3" in repr(made)


def test_it_can_be_made_on_meta_filled_and_copied() -> None:
    made = CorrectedLinear.of(Halved(6, 8), factors(6, 8, 3), torch.float32)
    with torch.device("meta"):
        skeleton = CorrectedLinear(Halved(6, 8), 3)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    skeleton.load_state_dict(made.state_dict(), assign=True)
    inputs = torch.randn(4, 8)
    assert torch.equal(skeleton(inputs), made(inputs))
    twin = copy.deepcopy(made)
    with torch.no_grad():
        next(twin.up.parameters()).mul_(2)
    assert torch.equal(skeleton(inputs), made(inputs))
    assert torch.equal(weight_of(twin.base), weight_of(made.base))
    assert not torch.equal(twin(inputs), made(inputs))


def test_the_correction_alone_can_be_trained() -> None:
    made = CorrectedLinear.of(Halved(6, 8), factors(6, 8, 3), torch.float32)
    made.base.requires_grad_(False)
    made(torch.randn(4, 8)).square().sum().backward()
    assert {name for name, one in made.named_parameters() if one.grad is not None} == {
        "down.weight",
        "up.weight",
    }


def test_its_factors_are_its_own() -> None:
    low_rank = factors(6, 8, 3)
    made = CorrectedLinear.of(nn.Linear(8, 6), low_rank, torch.float32)
    with torch.no_grad():
        low_rank.left.zero_()
    assert made.map().left.all()


def test_factors_may_be_stored_too() -> None:
    made = CorrectedLinear.of(nn.Linear(8, 6, False), factors(6, 8, 3), torch.float32)
    made.up = Halved(6, 3)
    made.up.bias = None
    inputs = torch.randn(4, 8)
    expected = inputs.double() @ made.dense_weight().T
    assert torch.allclose(made(inputs).double(), expected, atol=1e-4)


@pytest.mark.parametrize(("left", "right"), [((5, 3), (3, 8)), ((6, 3), (3, 7)), ((6, 3), (2, 8))], ids=str)
def test_factors_that_do_not_fit(left: tuple[int, int], right: tuple[int, int]) -> None:
    match = (
        f"factors of {left[0]} x {left[1]} and {right[0]} x {right[1]} for a map of 8 inputs and 6 outputs"
    )
    with pytest.raises(ConfigError, match=match):
        CorrectedLinear.of(nn.Linear(8, 6), LowRank(torch.zeros(left), torch.zeros(right)), torch.float32)


def test_errors() -> None:
    with pytest.raises(RankError, match="rank 7 for a 6 x 8 matrix: legal are 1 to 6"):
        CorrectedLinear(nn.Linear(8, 6), 7)
    with pytest.raises(ModelError, match=r"ReLU is no linear module: it needs dequantised\(\), or a weight"):
        weight_of(nn.ReLU())
    packed = nn.Linear(8, 6)
    packed.weight = nn.Parameter(torch.zeros(24, 1))
    with pytest.raises(ModelError, match="Linear is no linear module"):
        weight_of(packed)
