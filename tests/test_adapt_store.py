"""Adapter folders: what plain PEFT wrote is read, what is written plain PEFT loads, all else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eckart import ModelError, StoreError
from eckart.adapt import store
from eckart.adapt.store import Adapter, Factors, Nf4

from . import adapters, tiny
from .adapters import VARIANTS, Variant, differ
from .conftest import logits

pytestmark = adapters.QUIET
NAMES = ("a", "b.a", "c.b.a", "c.b1a", "c.b.a_x")
CLOSE = 1e-5


def factors(shape: tuple[int, int] = (6, 5), rank: int = 2, scale: float = 1.0, **more: Any) -> Factors:
    made = torch.Generator().manual_seed(sum(shape) + rank)
    sides = (torch.randn(shape[0], rank, generator=made), torch.randn(rank, shape[1], generator=made))
    return Factors(*sides, scale, **more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA of PEFT on the tiny Llama."""
    variant = VARIANTS["plain"]
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    return adapters.save(adapters.wrap(adapters.base(variant), variant.config()), folder)


@pytest.fixture
def damaged(plain: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    for name in (store.CONFIG, store.WEIGHTS):
        (tmp_path / name).write_bytes((plain / name).read_bytes())
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / store.CONFIG).read_text())
    (folder / store.CONFIG).write_text(json.dumps(values | changes))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_peft_wrote_is_written_again_with_the_same_function(variant: Variant, tmp_path: Path) -> None:
    model, tokens = adapters.base(variant), tiny.tokens()
    made = adapters.wrap(model, variant.config())
    found = store.read(adapters.save(made, tmp_path / "first"))
    (tmp_path / "second").mkdir()
    store.write(tmp_path / "second", found)
    wanted = logits(made, tokens)
    assert differ(logits(adapters.load(model, tmp_path / "second"), tokens), wanted) < CLOSE
    assert differ(logits(model, tokens), wanted) > 1e-2
    again = store.read(tmp_path / "second")
    assert again.parameters == sum(tensor.numel() for tensor in again.tensors)
    assert again.extras.keys() == found.extras.keys()
    for name, one in found.factors.items():
        delta = again.delta(name)
        assert torch.allclose(delta, one.delta(), atol=1e-6 * float(one.delta().norm()))


def test_parameters_are_those_that_peft_counts(plain: Path) -> None:
    made = adapters.load(tiny.build("llama"), plain)
    count = sum(value.numel() for name, value in made.named_parameters() if "lora_" in name)
    found = store.read(plain)
    assert found.parameters == count
    assert found.bytes == 4 * count
    assert found.base is None


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=5, max_size=5),
    scales=st.lists(st.floats(0.1, 8), min_size=5, max_size=5),
    alpha=st.one_of(st.none(), st.floats(0.5, 40)),
)
def test_ranks_and_scales_belong_to_one_name_each(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], scales: list[float], alpha: float | None
) -> None:
    """Names that end like others, ranks and scales of their own: reading gives back every update."""
    folder = tmp_path_factory.mktemp("adapter")
    made = {
        name: factors((6, 7), rank, scale) for name, rank, scale in zip(NAMES, ranks, scales, strict=True)
    }
    store.write(folder, Adapter(made), alpha=alpha)
    found = store.read(folder)
    assert list(found.factors) == sorted(made)
    for name, one in made.items():
        assert found.factors[name].rank == one.rank
        assert found.factors[name].scale == pytest.approx(1 if alpha is None else alpha / one.rank)
        assert torch.allclose(found.delta(name), one.delta(), atol=1e-5 * float(one.delta().norm()))


def test_balanced_factors_have_matching_norms_and_the_same_product() -> None:
    one = factors((6, 5), 3, 4.0, bias=torch.ones(6))
    even = store.balanced(one, 0.5)
    assert even.scale == 0.5
    assert torch.allclose(even.delta(), one.delta(), atol=1e-5)
    assert torch.allclose(even.left.norm(dim=0), even.right.norm(dim=1), atol=1e-5)
    assert even.bias is not None
    assert torch.allclose(even.bias * even.scale, torch.full((6,), 4.0))


def test_an_adapter_of_another_name_is_read_where_peft_puts_it(tmp_path: Path) -> None:
    variant, tokens = VARIANTS["plain"], tiny.tokens()
    made = adapters.wrap(adapters.base(variant), variant.config(), name="second")
    adapters.save(made, tmp_path)
    found = store.read(tmp_path / "second")
    (tmp_path / "again").mkdir()
    store.write(tmp_path / "again", found)
    again = adapters.load(adapters.base(variant), tmp_path / "again")
    assert differ(logits(again, tokens), logits(made, tokens)) < CLOSE


def test_names_of_a_compiled_model_are_those_of_the_model(damaged: Path, plain: Path) -> None:
    tensors = load_file(damaged / store.WEIGHTS)
    compiled = {
        name.replace("base_model.model.", "base_model.model._orig_mod."): one for name, one in tensors.items()
    }
    save_file(compiled, damaged / store.WEIGHTS)
    assert store.read(damaged).factors.keys() == store.read(plain).factors.keys()


def test_what_does_not_depend_on_ranks_is_kept(plain: Path, damaged: Path, tmp_path: Path) -> None:
    configure(damaged, base_model_name_or_path="some/base", lora_dropout=0.1, revision="main", r=4)
    found = store.read(damaged)
    assert found.base == "some/base"
    (tmp_path / "out").mkdir()
    store.write(tmp_path / "out", found)
    values = json.loads((tmp_path / "out" / store.CONFIG).read_text())
    assert (values["base_model_name_or_path"], values["lora_dropout"], values["revision"]) == (
        "some/base", 0.1, "main",
    )  # fmt: skip


@pytest.mark.parametrize("dead", [False, True])
def test_adalora_cut_to_its_ranks_keeps_its_function(tmp_path: Path, dead: bool) -> None:
    """PEFT writes triplets without those that the allocation gave up; a module may lose all of them."""
    variant, tokens = VARIANTS["adalora"], tiny.tokens()
    model = adapters.base(variant)
    made = adapters.wrap(model, variant.config())
    kept: dict[str, list[bool]] = {}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("lora_E.default"):
                gone = dead and "layers.1.self_attn.v_proj" in name
                places = [index % 2 == 0 and not gone for index in range(len(parameter))]
                parameter.mul_(torch.tensor(places)[:, None])
                kept[name.removeprefix("base_model.model.")] = places
    made.peft_config["default"].rank_pattern = kept
    found = store.read(adapters.save(made, tmp_path / "first"))
    assert {one.rank for one in found.factors.values()} == {3}
    assert ("model.layers.1.self_attn.v_proj" in found.factors) is not dead
    (tmp_path / "second").mkdir()
    store.write(tmp_path / "second", found)
    again = adapters.load(model, tmp_path / "second")
    assert differ(logits(again, tokens), logits(made, tokens)) < CLOSE


def test_an_update_can_be_asked_for(plain: Path) -> None:
    found = store.read(plain)
    name = next(iter(found.factors))
    one = found.factors[name]
    assert torch.equal(found.delta(name), one.left.double() * one.scale @ one.right.double())
    with pytest.raises(ModelError, match="the adapter does not change lm_head: it changes model.layers.0"):
        found.delta("lm_head")


def test_a_quantised_base_is_known_from_the_report(damaged: Path) -> None:
    assert store.read(damaged).storage is None
    storage = Nf4(True, ("model.layers.0.mlp.up_proj",))
    (damaged / store.REPORT).write_text(json.dumps({"base": storage.to_dict()}))
    assert store.read(damaged).storage == storage
    (damaged / store.REPORT).write_text(json.dumps({"resized": []}))
    assert store.read(damaged).storage is None


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{", "eckart.json does not say how the adapter's base is stored: JSONDecodeError"),
        ("[]", "does not say how the adapter's base is stored: AttributeError"),
        ('{"base": {"storage": "nf4"}}', "does not say how the adapter's base is stored: KeyError"),
        ('{"base": {"storage": "fp4", "double": true, "targets": []}}', "stored as 'fp4': legal is 'nf4'"),
    ],
)
def test_a_base_that_is_not_known_is_an_error(damaged: Path, report: str, message: str) -> None:
    (damaged / store.REPORT).write_text(report)
    with pytest.raises(StoreError, match=message):
        store.read(damaged)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, damaged: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter at .*none: give a folder with adapter_config.json and"):
        store.read(tmp_path / "none")
    (damaged / store.WEIGHTS).unlink()
    with pytest.raises(ModelError, match="has no adapter_model.safetensors"):
        store.read(damaged)


def test_a_hub_id_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ModelError, match="no adapter at someone/adapter: not a folder, and not to be had"):
        store.read("someone/adapter")


def test_a_pickle_is_not_read(damaged: Path) -> None:
    torch.save(load_file(damaged / store.WEIGHTS), damaged / store.PICKLE)
    (damaged / store.WEIGHTS).unlink()
    with pytest.raises(
        ModelError, match="holds adapter_model.bin, a pickle, which is not read: load it with"
    ):
        store.read(damaged)


def test_damaged_files_are_refused(damaged: Path) -> None:
    (damaged / store.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(StoreError, match="adapter_model.safetensors is not a readable safetensors file"):
        store.read(damaged)
    (damaged / store.CONFIG).write_text("{")
    with pytest.raises(StoreError, match="adapter_config.json is not JSON"):
        store.read(damaged)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"peft_type": "IA3"}, ModelError, "is an adapter of type IA3: legal are LORA, ADALORA"),
        ({"use_qalora": True}, ModelError, "is an adapter with use_qalora, whose update is not s B A"),
        ({"layer_replication": [[0, 2]]}, ModelError, "is an adapter with layer_replication, whose"),
        ({"r": 5}, StoreError, "declares rank 5 for model.layers.0.mlp.down_proj and holds rank 4"),
        ({"rank_pattern": {"q_proj": 2}}, StoreError, r"declares rank 2 for .*q_proj and holds rank 4"),
        ({"use_dora": True}, StoreError, "use_dora and lora_magnitude_vector disagree for model.layers.0"),
        (
            {"peft_type": "ADALORA", "init_r": 4},
            StoreError,
            "the AdaLoRA adapter holds no lora_E for model.layers.0",
        ),
    ],
)
def test_what_config_and_weights_do_not_agree_on_is_refused(
    damaged: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    configure(damaged, **changes)
    with pytest.raises(kind, match=message):
        store.read(damaged)


def test_half_an_update_and_convolutions_are_refused(damaged: Path) -> None:
    tensors = load_file(damaged / store.WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({key: one for key, one in tensors.items() if key != name}, damaged / store.WEIGHTS)
    with pytest.raises(
        StoreError, match=r"holds \{'lora_B': \[48, 4\]\} for model.layers.0.mlp.up_proj: two"
    ):
        store.read(damaged)
    save_file(tensors | {name: torch.zeros(4, 32, 1, 1)}, damaged / store.WEIGHTS)
    with pytest.raises(StoreError, match="is damaged, or adapts a convolution"):
        store.read(damaged)


def test_dora_on_embeddings_is_refused(tmp_path: Path) -> None:
    variant = adapters.lora("llama-bias-untied", use_dora=True, target_modules=["embed_tokens"])
    made = adapters.wrap(adapters.base(variant), variant.config())
    adapters.save(made, tmp_path)
    with pytest.raises(ModelError, match=r"DoRA with a bias or on embeddings \(model.embed_tokens\) is not"):
        store.read(tmp_path)


def test_what_peft_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no update is left to write: every module has rank 0; keep more"):
        store.write(tmp_path, Adapter({"a": factors(rank=0)}))
    biased = Adapter({"a": factors(), "b": factors(rank=0, bias=torch.ones(6))})
    with pytest.raises(StoreError, match="b has a bias and rank 0, which PEFT cannot store: keep a rank of"):
        store.write(tmp_path, biased)
    mixed = Adapter({"a": factors(), "b": factors(magnitude=torch.ones(6))})
    with pytest.raises(
        StoreError, match=r"1 of 2 modules have a magnitude \(DoRA\): PEFT stores all or none"
    ):
        store.write(tmp_path, mixed)
    assert not list(tmp_path.iterdir())


def test_modules_of_rank_0_are_left_out(tmp_path: Path) -> None:
    store.write(tmp_path, Adapter({"a": factors(), "b": factors(rank=0)}))
    assert list(store.read(tmp_path).factors) == ["a"]


def test_factors_are_written_in_their_dtype(tmp_path: Path) -> None:
    one = factors()
    narrow = Factors(one.left.bfloat16(), one.right.bfloat16(), 2.0)
    store.write(tmp_path, Adapter({"a": narrow}))
    found = store.read(tmp_path)
    assert found.factors["a"].left.dtype == torch.bfloat16
    assert float((found.delta("a") - narrow.delta()).norm() / narrow.delta().norm()) < 2**-7
