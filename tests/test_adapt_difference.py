"""Two models tensor by tensor: spectra of the difference, read a pair at a time; what is no model."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eckart
from eckart import ModelError, NotFinite, StoreError, hub, models
from eckart.adapt import checkpoints, difference

from . import adapters, tiny
from .conftest import reload

QUERY = "model.layers.0.self_attn.q_proj.weight"


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, generator=made) for size in ((shape[0], rank), (rank, shape[1])))
    return 0.1 * left @ right


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Two models on disk that differ in a matrix by rank 3, in a norm, and in nothing else."""
    folder = tmp_path_factory.mktemp("pair")
    own = tiny.build("llama")
    other = copy.deepcopy(own)
    changes = {QUERY: low_rank((32, 32), 3), "model.norm.weight": 0.1 * torch.ones(32)}
    with torch.no_grad():
        for name, change in changes.items():
            other.state_dict()[name].add_(change)
    own.save_pretrained(folder / "own")
    other.save_pretrained(folder / "other")
    return folder / "own", folder / "other", changes


Pair = tuple[Path, Path, dict[str, torch.Tensor]]


def test_spectra_are_those_of_the_difference(pair: Pair) -> None:
    own, other, changes = pair
    found = eckart.diff(own, other)
    assert not found.equal
    assert (found.only_first, found.only_second, found.reshaped) == ([], [], [])
    assert {one.name for one in found.tensors if one.norm} == changes.keys()
    one = next(one for one in found.tensors if one.name == QUERY)
    before = load_file(own / "model.safetensors")[QUERY].double()
    values = torch.linalg.svdvals(load_file(other / "model.safetensors")[QUERY].double() - before)
    assert one.norm == pytest.approx(float(values.norm()))
    assert one.change == pytest.approx(float(values.norm() / before.norm()))
    assert one.spectral == pytest.approx(float(values[0]))
    assert one.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2))
    share = values.square().cumsum(0) / values.square().sum()
    assert one.ranks == tuple(int((share < part).sum()) + 1 for part in (0.5, 0.9, 0.99))
    assert one.ranks is not None
    assert one.ranks[2] == 3
    norm = next(one for one in found.tensors if one.name == "model.norm.weight")
    assert (norm.spectral, norm.stable_rank, norm.ranks) == (None, None, None)
    assert norm.change == pytest.approx(0.1, rel=1e-5)


def test_a_model_is_equal_to_itself(pair: Pair) -> None:
    found = eckart.diff(pair[0], pair[0])
    assert found.equal
    assert all(one.change == one.norm == 0 for one in found.tensors)
    assert "20 of 20 tensors of the same shape are equal" in str(found)


def test_it_is_shown_as_a_table_and_as_json(pair: Pair) -> None:
    found = eckart.diff(*pair[:2])
    text = str(found)
    assert "18 of 20 tensors of the same shape are equal" in text
    assert "3 of 32" in text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["first"] == str(pair[0])


def test_what_comes_of_nothing_is_infinite_and_none_in_json() -> None:
    one = difference.changed("a", torch.zeros(2, 2), torch.ones(2, 2))
    assert one.change == math.inf
    assert difference.changed("a", torch.zeros(2), torch.zeros(2)).change == 0
    found = difference.Difference("x", "y", [one], [], [], [])
    assert found.to_dict()["tensors"][0]["change"] is None
    assert "from zero" in str(found)


def test_names_and_shapes_that_differ_are_listed(pair: Pair, tmp_path: Path) -> None:
    tiny.build("llama-bias-untied", intermediate_size=64).save_pretrained(tmp_path / "wide")
    found = eckart.diff(pair[0], tmp_path / "wide")
    assert not found.equal
    assert found.only_first == []
    assert "lm_head.weight" in found.only_second
    assert ("model.layers.0.mlp.up_proj.weight", (48, 32), (64, 32)) in found.reshaped
    text = str(found).replace("\n", " ")
    assert "model.layers.0.mlp.up_proj.weight is 48 x 32 in the first and 64 x 32 in the second" in text
    assert "only in" in text


def test_one_pair_is_read_at_a_time_and_no_model_loaded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    order: list[str] = []
    plain = difference.changed

    def counted(name: str, before: torch.Tensor, after: torch.Tensor) -> difference.Changed:
        order.append(name)
        return plain(name, before, after)

    monkeypatch.setattr(hub, "load", refused)
    monkeypatch.setattr(difference, "changed", counted)
    seen: list[tuple[int, int]] = []
    found = difference.diff(*pair[:2], watch=lambda done, total: seen.append((done, total)))
    assert order == [one.name for one in found.tensors]
    assert seen == [(done, 20) for done in range(1, 21)]


def test_shards_are_read_like_one_file(pair: Pair, tmp_path: Path) -> None:
    reload(pair[1]).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert eckart.diff(pair[1], tmp_path / "shards").equal


def test_compressed_folders_are_compared_as_the_maps_that_they_are(
    llama: Any, tokenizer: Any, llama_folder: Path, tmp_path: Path
) -> None:
    own = checkpoints.open_checkpoint(adapters.compressed(tmp_path, llama, tokenizer))
    assert own.how == "memory"
    for name, tensor in models.state_tensors(eckart.densify(eckart.load(tmp_path))).items():
        assert torch.equal(own.read(name), tensor)
    found = eckart.diff(llama_folder, tmp_path)
    ranks = [one.ranks for one in found.tensors if one.ranks]
    assert len(ranks) == 14
    assert (found.only_first, found.only_second, found.reshaped) == ([], [], [])


def test_the_dtype_is_that_of_most_parameters(tmp_path: Path) -> None:
    tiny.build("llama", torch.bfloat16).save_pretrained(tmp_path)
    found = checkpoints.open_checkpoint(tmp_path)
    assert (found.how, found.dtype) == ("files", torch.bfloat16)
    assert found.shapes[QUERY] == (32, 32)
    integers = checkpoints.Checkpoint(
        "x", {"a": (2,)}, {"a": torch.int64}, "files", lambda name: torch.zeros(2)
    )
    with pytest.raises(ModelError, match="x holds no floating-point tensors"):
        _ = integers.dtype


def test_what_is_no_number_is_named(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors[QUERY][0, 0] = math.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFinite, match=f"{QUERY} is NaN or infinite in one of the two models"):
        eckart.diff(pair[0], tmp_path / "broken")


def test_models_that_are_not_there_or_damaged_are_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at .*none: give a folder, a .gguf file or a hub id"):
        eckart.diff(pair[0], tmp_path / "none")
    shutil.copytree(pair[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="model.safetensors is not a readable safetensors file"):
        eckart.diff(pair[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="damaged has no model.safetensors: load it with transformers and"):
        eckart.diff(pair[0], tmp_path / "damaged")
    torch.save({}, tmp_path / "damaged" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="has weights as a pickle alone, which is not read"):
        eckart.diff(pair[0], tmp_path / "damaged")


def test_what_the_hub_does_not_give_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*given: Any, **options: Any) -> Any:
        raise OSError("gated")

    monkeypatch.setattr(checkpoints, "cached_file", gated)
    with pytest.raises(ModelError, match="cannot read model.safetensors of .*own: gated"):
        checkpoints.open_checkpoint(pair[0])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index of shards"),
        ("{}", "is not an index of shards: 'weight_map'"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "its index names model-1.safetensors, which is not"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "its index names ../x.safetensors, which is not there"),
        ('{"weight_map": {"a": "part.safetensors"}}', "its index names a, which no shard holds"),
    ],
)
def test_indices_that_name_what_is_not_there_are_refused(
    pair: Pair, tmp_path: Path, index: str, message: str
) -> None:
    shutil.copy(pair[0] / "config.json", tmp_path)
    save_file({"b": torch.zeros(2)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(StoreError, match=message):
        checkpoints.open_checkpoint(tmp_path)
