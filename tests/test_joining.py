"""Blocks that share their matrices: fitted, stored once, loaded once, trained once, counted once."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart import ConfigError, Healing, ModelError, RankError, StoreError, models, sharing
from eckart.groups import Sharing
from eckart.joined import Joined
from eckart.shared import SharedLinear, sources

from . import tiny
from .conftest import logits, reload


def shared(model: Any) -> dict[str, SharedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedLinear)}


@pytest.fixture
def share(tokenizer: Any, text_file: Path) -> Any:
    """Share in a tiny model with little text; keyword arguments go over these defaults."""

    def run(model: Any, groups: str = "every:2", **options: Any) -> tuple[Any, Joined]:
        own: dict[str, Any] = {"tokens": 512, "gradient_tokens": 256, "seq_len": 64, "eval_tokens": 512}
        return eckart.share(model, groups, **own | {"text": text_file, "tokenizer": tokenizer} | options)

    return run


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "phi3", "gpt-neox", "opt", "gemma3"])
def test_what_is_shared_is_stored_once_loaded_once_counted_once(name: str, tmp_path: Path) -> None:
    dense = tiny.build(name, num_hidden_layers=4)
    before = models.parameter_count(dense)
    model, result = eckart.share(copy.deepcopy(dense), "0+2+3", start="first", differences=2, scales=True)
    with torch.no_grad():
        for module in shared(model).values():
            module.get_parameter("up.weight").normal_(std=0.1)
            module.get_parameter("scale").uniform_(0.5, 1.5)
    found = shared(model)
    assert len(found) == sum(len(group) for group in result.joined.values())
    size = sum(module.out_features * module.in_features for module in found.values())
    own = sum(
        module.out_features + 2 * (module.out_features + module.in_features) for module in found.values()
    )
    assert result.after.model == models.parameter_count(model) == before - size * 2 // 3 + own
    assert result.after.linears == size // 3 + own == sum(row.after for row in result.modules)
    assert result.before.linears == size
    eckart.save(model, None, tmp_path / "a", result)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert sum(key.endswith("base.weight") for key in stored) == len(result.joined)
    assert (tmp_path / "a" / "model.safetensors").stat().st_size == result.after.bytes
    again = reload(tmp_path / "a")
    assert sources(again) == sources(model)
    assert len(sources(again)) == 2 * len(result.joined)
    for second, first in sources(again).items():
        pair = again.get_submodule(first), again.get_submodule(second)
        assert pair[0].base.weight is pair[1].base.weight
    assert torch.equal(logits(again, tiny.tokens()), logits(model, tiny.tokens()))
    again.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == stored.keys()
    plain = eckart.densify(again)
    assert not shared(plain)
    assert models.parameter_count(plain) == before
    plain.save_pretrained(tmp_path / "c")
    scale = float(logits(model, tiny.tokens()).abs().max())
    assert torch.allclose(
        logits(reload(tmp_path / "c"), tiny.tokens()), logits(model, tiny.tokens()), atol=1e-4 * scale
    )


def test_differences_of_full_rank_leave_the_model_as_it_was() -> None:
    dense = tiny.build("llama-bias-untied", num_key_value_heads=4)
    model, _ = eckart.share(copy.deepcopy(dense), "all", method="svd", differences=32)
    scale = float(logits(dense, tiny.tokens()).abs().max())
    assert torch.allclose(logits(model, tiny.tokens()), logits(dense, tiny.tokens()), atol=1e-4 * scale)
    none, _ = eckart.share(copy.deepcopy(dense), "all", method="svd")
    assert not torch.allclose(logits(none, tiny.tokens()), logits(dense, tiny.tokens()), atol=1e-2 * scale)


def test_blocks_that_are_alike_share_for_nothing(share: Any) -> None:
    """Whatever the metric: what all of them have is what they share, and the loss says so."""
    dense = tiny.build("llama", num_hidden_layers=4)
    first, second = (dense.get_submodule(name) for name in models.block_names(dense)[:2])
    for own, other in zip(second.parameters(), first.parameters(), strict=True):
        own.data.copy_(other.data)
    model, result = share(copy.deepcopy(dense), "0-1")
    scale = float(logits(dense, tiny.tokens()).abs().max())
    assert torch.allclose(logits(model, tiny.tokens()), logits(dense, tiny.tokens()), atol=1e-4 * scale)
    assert result.compressed.loss == pytest.approx(result.dense.loss, abs=1e-4)
    assert result.predicted_increase == pytest.approx(0, abs=1e-6)


def test_the_metric_and_what_is_added_pay(share: Any) -> None:
    """The estimated loss falls with scales, and with the rank of differences; and so does the loss."""
    dense = tiny.build("llama")
    first, second = (dense.get_submodule(name) for name in models.block_names(dense))
    with torch.no_grad():  # blocks that have something in common
        for own, other in zip(second.parameters(), first.parameters(), strict=True):
            own.mul_(0.3).add_(other)
    results = [
        share(copy.deepcopy(dense), "all", what="mlp", **options)[1]
        for options in ({}, {"scales": True}, {"differences": 2}, {"differences": 8}, {"method": "svd"})
    ]
    plain, scaled, few, more, mean = results
    assert plain.predicted_increase > scaled.predicted_increase > 0
    assert plain.predicted_increase > few.predicted_increase > more.predicted_increase > 0
    assert mean.predicted_increase is None
    assert plain.compressed.loss > more.compressed.loss
    assert plain.calibration_tokens == 512
    assert plain.gradient_tokens == 256


@pytest.mark.parametrize(
    ("what", "parts"),
    [("blocks", {"q", "k", "v", "o", "gate", "up", "down"}), ("attention", {"q", "k", "v", "o"}),
     ("mlp", {"gate", "up", "down"})],
)  # fmt: skip
def test_what_says_which_matrices(what: Any, parts: set[str]) -> None:
    model, result = eckart.share(tiny.build("llama", num_hidden_layers=4), "1-2", method="svd", what=what)
    assert {name.split(".")[-1].removesuffix("_proj") for name in shared(model)} == parts
    assert {name.split(".")[2] for name in shared(model)} == {"1", "2"}
    assert result.sharing.what == what
    one, _ = eckart.share(
        tiny.build("llama", num_hidden_layers=4), "all", method="svd", what=what, exclude="o_proj"
    )
    assert not any(name.endswith("o_proj") for name in shared(one))
    norms = [one.get_submodule(f"model.layers.{index}.input_layernorm").weight for index in range(4)]
    assert len({id(norm) for norm in norms}) == 4


@pytest.mark.parametrize("name", ["gpt-neox", "opt", "phi3", "phi"])
def test_the_feed_forward_is_found_by_structure(name: str) -> None:
    model = tiny.build(name)
    forward = sharing.twins(model, Sharing("all", "mlp"))
    attention = sharing.twins(model, Sharing("all", "attention"))
    whole = sharing.twins(model, Sharing("all"))
    assert len(forward) == 2
    assert sorted([*forward, *attention]) == sorted(whole)
    assert all("attn" in group[0] or "attention" in group[0] for group in attention)


def test_from_scratch_the_first_stands_for_all_and_one_gradient_trains_it(tmp_path: Path) -> None:
    dense = tiny.build("llama", num_hidden_layers=4)
    model, result = eckart.share(copy.deepcopy(dense), "all", start="first", differences=2, scales=True)
    assert result.dense is None
    q = [model.get_submodule(f"model.layers.{index}.self_attn.q_proj") for index in range(4)]
    first = dense.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.equal(q[0].base.weight, first)
    for module in q:
        assert torch.allclose(module.dense_weight().float(), first)
    assert not torch.equal(q[0].down.weight, q[1].down.weight)
    model.train()
    loss = model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
    loss.backward()
    assert len({id(module.base.weight.grad) for module in q}) == 1
    assert sum(parameter is q[0].base.weight for parameter in model.parameters()) == 1
    # The gradient is the sum of those of the four places.
    apart = eckart.densify(copy.deepcopy(model))
    apart.zero_grad()
    apart(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    summed = sum(
        apart.get_submodule(f"model.layers.{index}.self_attn.q_proj").weight.grad for index in range(4)
    )
    assert torch.allclose(q[0].base.weight.grad, summed, atol=1e-5 * float(summed.abs().max()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    assert q[3].base.weight is q[0].base.weight
    assert not torch.equal(q[0].base.weight, first)
    with torch.no_grad():
        assert model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss < loss
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(
        logits(reload(tmp_path / "trained"), tiny.tokens()), logits(model.eval(), tiny.tokens())
    )


@pytest.mark.parametrize("steps", [("logits",), ("closed",), ("block",)])
def test_healing_keeps_what_is_shared(
    steps: tuple[Any, ...], share: Any, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    dense = tiny.build("llama", num_hidden_layers=4)
    model, result = share(copy.deepcopy(dense), "0-3", differences=2)
    before = sources(model)
    start = {name: module.base.weight.detach().clone() for name, module in shared(model).items()}
    settings = Healing(
        steps=steps, tokens=2048, fit_tokens=512, hold_tokens=512, seq_len=64, block_epochs=1, rate=2e-3
    )
    healed, done = eckart.heal(model, dense, text_file, settings=settings, tokenizer=tokenizer)
    assert sources(healed) == before
    for second, first in before.items():
        assert healed.get_submodule(first).base.weight is healed.get_submodule(second).base.weight
    assert done.steps[0].after <= done.steps[0].before
    if steps == ("logits",):
        assert done.steps[0].after < done.steps[0].before
        assert any(not torch.equal(shared(healed)[name].base.weight, value) for name, value in start.items())
    else:  # what belongs to other blocks as well is none of theirs
        assert all(torch.equal(shared(healed)[name].base.weight, value) for name, value in start.items())
    eckart.save(model, None, tmp_path / "shared", result)
    eckart.save(healed, None, tmp_path / "healed", done, source=tmp_path / "shared")
    assert torch.equal(logits(reload(tmp_path / "healed"), tiny.tokens()), logits(healed, tiny.tokens()))
    assert "## Healed" in (tmp_path / "healed" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_leave_alone_what_others_share(share: Any, tokenizer: Any, text_file: Path) -> None:
    from eckart.adapt import targets

    dense = tiny.build("llama", num_hidden_layers=4)
    model, _ = share(copy.deepcopy(dense), "1-2", what="mlp", differences=2)
    assert {name.rsplit(".", 1)[-1] for name in targets.names(model, ["mlp.*_proj"], ["0.*", "3.*"])} == {
        "down",
        "up",
    }
    settings = Healing(steps=("logits",), train="adapter", adapter_rank=2, tokens=512, seq_len=64)
    start = {name: module.base.weight.detach().clone() for name, module in shared(model).items()}
    healed, _ = eckart.heal(model, dense, text_file, settings=settings, tokenizer=tokenizer)
    assert all(torch.equal(shared(healed)[name].base.weight, value) for name, value in start.items())


def test_the_folder_says_what_was_done(share: Any, tmp_path: Path) -> None:
    dense = tiny.build("llama", num_hidden_layers=4)
    model, result = share(dense, "0-1,2-3", what="attention", differences=1, scales=True)
    eckart.save(model, None, tmp_path / "a", result)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "attention shared by groups 0-1,2-3 with differences of rank 1 and scales" in card
    assert (
        "eckart share MODEL --groups 0-1,2-3 --what attention --method eckart --differences 1 --scales"
        in card
    )
    assert "| 0, 1 | 8 |" in card
    values = json.loads((tmp_path / "a" / "eckart.json").read_text())
    assert values["sharing"]["groups"] == "0-1,2-3"
    assert values["keep_model"] == pytest.approx(result.after.model / result.before.model)
    assert len(values["joined"]) == 8
    assert "heal it towards the model" in str(result)


def test_a_broken_declaration_is_refused(tmp_path: Path) -> None:
    model, result = eckart.share(tiny.build("llama"), "all", method="svd")
    eckart.save(model, None, tmp_path / "a", result)
    config = tmp_path / "a" / "config.json"
    whole = config.read_text()
    for old, new, message in (
        ('"source": "model.layers.0.mlp.up_proj"', '"source": "model.layers.0.self_attn.k_proj"',
         "mlp.up_proj shares what model.layers.0.self_attn.k_proj has, which does not fit"),
        ('"scaled": false', '"scaled": 3', "legal for the kind shared are a rank of at least 0, scaled"),
    ):  # fmt: skip
        assert old in whole
        config.write_text(whole.replace(old, new, 1))
        with pytest.raises(StoreError, match=message):
            reload(tmp_path / "a")


def test_what_cannot_share_is_refused(share: Any, compressed_folder: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=4)
    with pytest.raises(ConfigError, match="method 'eckart' looks at data: give text"):
        eckart.share(model, "all")
    with pytest.raises(ConfigError, match="groups '0-4' of a model with 4 blocks: legal are 0 to 3, got 4"):
        eckart.share(model, "0-4", method="svd")
    with pytest.raises(
        RankError, match=r"rank 17 for .*k_proj, which is 16 x 32: legal are 0 to 16; or leave"
    ):
        eckart.share(model, "all", method="svd", differences=17)
    with pytest.raises(
        ModelError, match=r"must have one shape: .*0.*is not there, .*1.*q_proj is 32 x 32; take"
    ):
        eckart.share(model, "0-1", method="svd", exclude="layers.0.self_attn.q_proj")
    with pytest.raises(ModelError, match="compressed already, and only dense matrices can share"):
        eckart.share(compressed_folder, "all", method="svd")
    model.get_submodule("model.layers.1.mlp").up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ModelError, match=r"0.mlp.up_proj is 48 x 32, .*1.mlp.up_proj is 40 x 32"):
        eckart.share(model, "0-1", method="svd", exclude=["gate_proj", "down_proj"])
    shared_model, result = eckart.share(tiny.build("llama"), "all", method="svd")
    with pytest.raises(ModelError, match="already low-rank"):
        eckart.compress(shared_model, keep=0.5, method="svd")
    with pytest.raises(ModelError, match="SharedLinear has no known linear leaves"):
        eckart.quantise(shared_model, "int8", method="svd")
    assert result.warnings == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("0", "a group has two blocks at least"),
        ("every:1", "write for example 0-3,4-7"),
        ("3-1", "3-1 is no range"),
        ("0-1,1-2", "name block 1 twice"),
        ("0-0", "0-0 is one block"),
        ("0-1-2", "0-1-2 is no range"),
        ("some", "write for example"),
    ],
)
def test_groups_that_are_none(groups: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sharing(groups)


def test_groups() -> None:
    assert Sharing("0-2,4+6").blocks(7) == [(0, 1, 2), (4, 6)]
    assert Sharing("every:2").blocks(5) == [(0, 1), (2, 3)]
    assert Sharing("every:3").blocks(5) == [(0, 1, 2), (3, 4)]
    assert Sharing("all").blocks(3) == [(0, 1, 2)]
    with pytest.raises(ConfigError, match="model with 1 blocks: .* at least two in a group"):
        Sharing("all").blocks(1)
    for name, value, message in (
        ("what", "heads", "what 'heads': legal are blocks, attention, mlp"),
        ("start", "last", "start 'last': legal are fit, first"),
        ("differences", -1, "differences -1: must be a whole number of at least 0"),
        ("scales", 1, "scales 1: must be true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sharing("all", **{name: value})  # type: ignore[arg-type]
