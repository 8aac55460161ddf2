from typing import Any

import pytest
import torch
from torch.nn import functional

from eckart import NotFinite, models
from eckart.calibrate import calibrate, loss_gradient

from . import tiny

ALL = ["gram", "absolute", "gradient", "fisher"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(count: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 258, (count, length), generator=seeded(5))


def test_the_gradient_of_the_loss_is_that_of_autograd() -> None:
    logits = torch.randn(12, 30, generator=seeded(), requires_grad=True)
    window = torch.randint(30, (12,), generator=seeded(1))
    functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.allclose(loss_gradient(logits, window, "text", seeded()), logits.grad, atol=1e-6)


def test_sampled_labels_are_drawn_from_the_model() -> None:
    logits = torch.zeros(2000, 3)
    logits[:, 1] = 2
    found = loss_gradient(logits, torch.zeros(2000, dtype=torch.int64), "sampled", seeded())
    # The mean of softmax - one-hot over labels drawn from the softmax is zero.
    assert found[:-1].mean(0).abs().max() < 0.05
    assert loss_gradient(logits, torch.zeros(2000, dtype=torch.int64), "text", seeded())[0, 0] < -0.8


def test_infinite_logits_are_refused() -> None:
    with pytest.raises(NotFinite, match="logits on the calibration text are NaN or infinite"):
        loss_gradient(torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.int64), "text", seeded())


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_statistics_equal_those_of_full_autograd(name: str) -> None:
    """Every moment against a plain backward pass with gradients of all parameters."""
    model = tiny.build(name)
    rows = windows()
    names = [target.name for target in models.targets(model)]
    found = calibrate(model, rows, names, ALL, gradient_windows=3, generator=seeded())  # type: ignore[arg-type]
    seen: dict[str, list[Any]] = {key: [] for key in names}

    def watch(key: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            seen[key].append((args[0].detach(), output))

        return hook

    handles = [models.find(model, key).register_forward_hook(watch(key)) for key in names]
    fisher = {key: torch.zeros(()) for key in names}
    for window in rows:
        model.zero_grad()
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits, window[1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
        for key in names:
            gradient = models.find(model, key).weight.grad
            assert gradient is not None
            fisher[key] = fisher[key] + gradient.square().sum(0) / len(rows)
    for handle in handles:
        handle.remove()
    assert (found.tokens, found.gradient_tokens) == (36, 36)
    for key in names:
        inputs = torch.cat([x[0] for x, _ in seen[key]])
        gradients = torch.cat([output.grad[0] for _, output in seen[key]])
        for statistic, expected in (
            ("gram", inputs.T @ inputs / len(inputs)),
            ("absolute", inputs.abs().mean(0)),
            ("gradient", gradients.T @ gradients / len(gradients)),
            ("fisher", fisher[key]),
        ):
            mean = found.stats.moment(statistic, key).mean()  # type: ignore[arg-type]
            assert torch.allclose(mean, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), key


def test_projections_that_read_one_tensor_share_its_moment(llama: Any) -> None:
    names = [target.name for target in models.targets(llama)]
    stats = calibrate(llama, windows(), names, ["gram"], gradient_windows=1, generator=seeded()).stats
    layer = "model.layers.0."
    assert stats.leader(f"{layer}self_attn.v_proj") == f"{layer}self_attn.q_proj"
    assert stats.leader(f"{layer}mlp.up_proj") == f"{layer}mlp.gate_proj"
    assert stats.leader(f"{layer}mlp.down_proj") == f"{layer}mlp.down_proj"
    assert len(stats.moments) == 8


def test_calibration_leaves_the_model_as_it_was(llama: Any) -> None:
    llama.model.norm.weight.requires_grad_(False)
    names = [target.name for target in models.targets(llama)]
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    calibrate(llama, windows(), names, ["gram", "gradient"], gradient_windows=2, generator=seeded())
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())
    assert not llama.model.norm.weight.requires_grad
    assert llama.model.layers[0].mlp.up_proj.weight.requires_grad
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert not any(module._forward_hooks for module in llama.modules())


def test_gradient_windows_are_spread_over_the_text(llama: Any) -> None:
    name = "model.layers.0.mlp.up_proj"
    wanted: list[Any] = ["gram", "gradient"]
    found = calibrate(llama, windows(8), [name], wanted, gradient_windows=4, generator=seeded())
    assert found.stats.moment("gram", name).count == 96
    assert found.stats.moment("gradient", name).count == found.gradient_tokens == 48
