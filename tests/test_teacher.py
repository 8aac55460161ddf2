"""Laws of the teacher's distributions, with and without a cache, and of checkpoints."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eckart import teacher as teachers
from eckart.checkpoint import Checkpoint
from eckart.divergence import divergence
from eckart.errors import StoreError
from eckart.teacher import Teacher

from . import tiny, wards


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Count the forwards of `model`."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def _window(seed: int = 0) -> torch.Tensor:
    return torch.randint(2, tiny.VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("largest", [None, 5, tiny.VOCABULARY])
def test_what_is_cached_is_what_is_computed_to_half_precision(largest: int | None, tmp_path: Path) -> None:
    model, window = tiny.build("llama"), _window()
    computed = Teacher(model, 2.0, largest or teachers.LARGEST).chances(window)
    first = Teacher(model, 2.0, largest, tmp_path).chances(window)
    again = Teacher(model, 2.0, largest, tmp_path).chances(window)
    assert torch.equal(first.log, again.log)
    assert torch.equal(first.log, computed.log.to(torch.float16).float())
    assert not torch.equal(first.log, computed.log)
    assert (first.ids is None) == (computed.ids is None) == (again.ids is None)
    if computed.ids is not None and first.ids is not None and again.ids is not None:
        assert torch.equal(first.ids, computed.ids)
        assert torch.equal(again.ids, computed.ids)
        assert again.ids.dtype == torch.int64
    with torch.no_grad():
        own = model(input_ids=window[None]).logits[0, :-1] / 2
    assert abs(float(divergence(own, again, window[1:]))) < 1e-3
    assert float(divergence(own.roll(1, -1), again, window[1:])) > 3e-3


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    model = tiny.build("llama")
    for expected in (3, 0):
        found = Teacher(model, cache=tmp_path)
        with _counted(model) as forwards:
            for seed in (0, 1, 0, 2, 2):
                found.chances(_window(seed))
        assert len(forwards) == expected
    with _counted(model) as forwards:
        for _ in range(2):
            Teacher(model).chances(_window())
    assert len(forwards) == 2


def test_whatever_changes_the_result_has_a_folder_of_its_own(tmp_path: Path) -> None:
    model, other = tiny.build("llama"), tiny.build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    variants: list[tuple[Any, dict[str, Any]]] = [
        (model, {}),
        (model, {"temperature": 1.5}),
        (model, {"largest": 9}),
        (other, {}),
        (tiny.build("mistral"), {}),
        (model, {"precision": torch.bfloat16}),
    ]
    for number, (which, options) in enumerate(variants, 1):
        found = Teacher(which, cache=tmp_path, **options)
        with _counted(which) as forwards:
            found.chances(_window())
        assert len(forwards) == 1
        assert len(list(tmp_path.iterdir())) == number
    Teacher(tiny.build("llama"), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_the_digest_is_of_the_weights_and_of_the_dtype() -> None:
    model = tiny.build("llama")
    assert teachers.digest(model) == teachers.digest(copy.deepcopy(model))
    assert teachers.digest(model) != teachers.digest(tiny.build("llama", torch.bfloat16))
    assert teachers.digest(model) != teachers.digest(wards.cut(model, 8))


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama")
    found = Teacher(model, cache=tmp_path)
    found.chances(_window())
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(StoreError, match=rf"{file.name} of the cache cannot be read \(.*\): delete it"):
        found.chances(_window())
    file.unlink()
    found.chances(_window())
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="the cache .*file cannot be written"):
        Teacher(model, cache=blocked)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_model_and_its_gradients_are_left_alone() -> None:
    model = tiny.build("llama")
    before = wards.weights(model)
    found = Teacher(model).chances(_window())
    assert not found.log.requires_grad
    assert wards.equal(before, wards.weights(model))


def _state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return {"step": 3, "course": {"ended": ""}}, {"a": torch.arange(3.0), "b": torch.ones(2, 2).bfloat16()}


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "work" / "0.safetensors", "key")
    assert kept.read() is None
    state, tensors = _state()
    kept.write(state, tensors)
    found = kept.read()
    assert found is not None
    assert found[0] == state
    assert wards.equal(found[1], tensors)
    kept.write({"step": 4}, {})
    again = kept.read()
    assert again is not None
    assert again[0] == {"step": 4}
    assert [path.name for path in kept.file.parent.iterdir()] == ["0.safetensors"]


def test_a_checkpoint_takes_tensors_that_share_memory(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "0.safetensors", "key")
    whole = torch.arange(6.0)
    kept.write({}, {"whole": whole, "same": whole, "part": whole[::2]})
    found = kept.read()
    assert found is not None
    assert torch.equal(found[1]["part"], whole[::2])
    assert torch.equal(found[1]["same"], whole)


def test_deleting_leaves_other_files_and_no_empty_folder(tmp_path: Path) -> None:
    first, second = (Checkpoint(tmp_path / "work" / name, "key") for name in ("a", "b"))
    for kept in (first, second):
        kept.write({}, {})
    first.delete()
    assert second.read() is not None
    second.delete()
    assert list(tmp_path.iterdir()) == []
    second.delete()


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "0.safetensors"
    Checkpoint(file, "one").write(*_state())
    with pytest.raises(StoreError, match=r"is of a run with other settings, models or text: go on with"):
        Checkpoint(file, "other").read()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"0.safetensors cannot be read \(.*\): delete it"):
        Checkpoint(file, "one").read()
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(StoreError, match=r"cannot be read \(.*\): delete it"):
        Checkpoint(file, "one").read()
    save_file({"a": torch.ones(1)}, file, {"state": "{}"})
    with pytest.raises(StoreError, match=r"cannot be read \(.*\): delete it"):
        Checkpoint(file, "one").read()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="the checkpoint .* cannot be written"):
        Checkpoint(blocked / "0.safetensors", "one").write(*_state())
