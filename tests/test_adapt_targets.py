"""Which linear maps are adapted: those of the blocks, or what is named, inside compressed modules as well."""

from typing import Any

import pytest
import torch
import transformers

import eckart
from eckart import ModelError, models
from eckart.adapt import targets
from eckart.factors import Form

from . import tiny, wards
from .conftest import Compress

PARTS: dict[Form, tuple[str, ...]] = {"factored": ("down", "up"), "pivoted": ("pivots", "rest")}


def heads(model: Any) -> set[int]:
    return {id(model.get_output_embeddings()), id(model.get_input_embeddings())}


@pytest.mark.parametrize("architecture", tiny.LINEAR)
def test_all_linear_maps_in_the_blocks_are_adapted(architecture: str) -> None:
    model = tiny.build(architecture)
    found = targets.names(model)
    assert len(found) == len(set(found))
    chosen = {id(model.get_submodule(name)) for name in found}
    assert not chosen & heads(model)
    everything = {id(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert everything - chosen <= heads(model)
    assert found == [target.name for target in models.targets(model)]  # what is compressed, in its order


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("form", PARTS)
def test_a_compressed_module_stands_for_the_maps_inside(architecture: str, form: Form) -> None:
    dense = tiny.build(architecture)
    model = wards.cut(dense, 6, form)
    inside = {
        name: [part for part, _ in model.get_submodule(name).named_children()]
        for name in targets.names(dense)
    }
    assert all(len(parts) == 2 for parts in inside.values())
    assert targets.names(model) == [f"{name}.{part}" for name, parts in inside.items() for part in parts]
    last = targets.names(dense)[-1]
    for pattern in (last, last.rsplit(".", 1)[1]):
        own = [name for name in inside if pattern in (name, name.rsplit(".", 1)[1])]
        named = [f"{name}.{part}" for name in own for part in inside[name]]
        assert targets.names(model, [pattern]) == named
        assert targets.names(model, exclude=[pattern]) == [
            name for name in targets.names(model) if name not in named
        ]
    one = inside[last][1]
    assert targets.names(model, [f"{last}.{one}"]) == [f"{last}.{one}"]
    assert targets.names(model, [one]) == [f"{name}.{one}" for name in inside]


def test_globs_choose_and_exclude(llama: Any) -> None:
    def ends(*patterns: str, exclude: tuple[str, ...] = ()) -> list[str]:
        return [name.removeprefix("model.layers.") for name in targets.names(llama, patterns, exclude)]

    assert ends("q_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert ends("v_proj", "q_proj") == [  # in the order of the model
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    ]
    assert ends("layers.1.*", exclude=("mlp.*", "[qk]_proj")) == ["1.self_attn.v_proj", "1.self_attn.o_proj"]
    assert ends("model.layers.0.mlp.gate_proj") == ["0.mlp.gate_proj"]
    assert ends("lm_head", "0.*.o_proj") == ["0.self_attn.o_proj", "lm_head"]
    assert targets.names(llama, ["layers.*"]) == targets.names(llama)
    assert targets.names(llama, exclude=["lm_head"]) == targets.names(llama)


def test_shapes_are_those_of_the_maps(llama: Any) -> None:
    model = wards.cut(llama, 6)
    chosen = targets.names(model, ["0.self_attn.k_proj", "down_proj"])
    assert targets.shapes(model, chosen) == {
        name: tuple(model.get_submodule(name).weight.shape) for name in chosen
    }
    assert targets.shapes(llama, ["lm_head"]) == {"lm_head": (tiny.VOCABULARY, 32)}


def test_right_factors_that_are_shared_are_left_out(compress: Compress) -> None:
    model, _ = compress(tiny.build("llama", num_hidden_layers=4), method="basis-sharing")
    pairs = models.bases(model)
    assert pairs
    sharing = {*pairs, *pairs.values()}
    found = targets.names(model)
    for name in models.low_rank_modules(model):
        alone = name not in sharing
        assert (f"{name}.down" in found) == alone
        assert f"{name}.up" in found
        assert targets.names(model, [name]) == [f"{name}.{part}" for part in ("down", "up")][1 - alone :]
    shared = next(iter(sharing))
    with pytest.raises(ModelError, match=rf"'{shared}.down' matches none of .*: did you mean"):
        targets.names(model, [f"{shared}.down"])


def test_factors_of_tied_embeddings_are_left_out(compress: Compress) -> None:
    """The head reads the weights of the embeddings: an adapter on either would be missing in the other."""
    model, _ = compress(tiny.build("llama"), include=["embed_tokens", "q_proj"])
    assert {"model.embed_tokens", "lm_head"} <= set(models.low_rank_modules(model))
    assert not [name for name in targets.linears(model) if "embed_tokens" in name or "lm_head" in name]
    assert targets.names(model, ["q_proj"])
    with pytest.raises(ModelError, match="'lm_head' matches none of"):
        targets.names(model, ["lm_head"])


@pytest.mark.parametrize(
    ("chosen", "exclude", "message"),
    [
        (["qproj"], [], r"'qproj' matches none of the model's 15 matrices: did you mean q_proj"),
        (["q_proj"], ["ffn"], r"'ffn' matches none of the model's 15 matrices: names end in q_proj, k_proj"),
        (["q_proj", "embed_tokens"], [], r"'embed_tokens' matches none of the model's 15 matrices"),
        ([], ["layers.*"], r"no linear map left to adapt: exclude \['layers.\*'\] removes all 14"),
        (["q_proj"], ["self_attn.*"], r"no linear map left to adapt: exclude .* removes all 2"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(
    chosen: list[str], exclude: list[str], message: str, llama: Any
) -> None:
    with pytest.raises(ModelError, match=message):
        targets.names(llama, chosen, exclude)


def test_a_pattern_near_a_compressed_module_is_suggested(llama: Any) -> None:
    with pytest.raises(
        ModelError, match=r"'qproj' matches none of the model's \d+ matrices: did you mean q_pr"
    ):
        targets.names(wards.cut(llama, 6), ["qproj"])


def test_blocks_without_linear_maps_are_refused() -> None:
    small = transformers.GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(small)
    with pytest.raises(
        ModelError, match="GPT2LMHeadModel has no linear map in its blocks: name what it has with --targets"
    ):
        targets.names(model)
    assert targets.names(model, ["lm_head"]) == ["lm_head"]


def test_a_model_in_few_bits_takes_no_adapter() -> None:
    model, _ = eckart.quantise(tiny.build("llama"), "nf4-dq", method="svd")
    with pytest.raises(ModelError, match="stored in few bits, which adapters cannot be put on"):
        targets.names(model)
    with pytest.raises(ModelError, match="already low-rank or in few bits"):
        eckart.compress(model, keep=0.5, method="svd")
