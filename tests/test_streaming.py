"""A model block by block: the same result as in memory, resumed to the same bytes, within its promises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import eckart
from eckart import ConfigError, ModelError, RankError, StoreError, models
from eckart.healing import Healing
from eckart.recipe import Recipe
from eckart.streaming import execute, passes, work
from eckart.streaming.activations import Activations
from eckart.streaming.execute import compress_to
from eckart.streaming.shards import Shards
from eckart.streaming.stream import Stream, skeleton
from eckart.streaming.work import Work

from . import tiny
from .conftest import logits, reload

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "mixed with fused matrices": ("phi3", {}),
    "biases and an own head": ("llama-bias-untied", {"form": "pivoted"}),
    "identity": ("gemma2", {"method": "svd"}),
    "fisher": ("qwen2", {"method": "fwsvd"}),
    "absolute": ("opt", {"method": "asvd"}),
    "inputs alone": ("gpt-neox", {"method": "svd-llm"}),
    "transposed": ("gpt2", {"form": "pivoted"}),
    "experts": ("mixtral", {"form": "pivoted"}),
    "a tied table": ("llama", {"include": ("embed*", "*.0.*"), "form": "pivoted"}),
    "a table and a head": ("llama-bias-untied", {"include": ("embed*", "lm_head", "*.1.mlp.*")}),
    "few bits": ("llama", {"storage": "int4", "keep": 0.9}),
    "few bits by size": ("phi3", {"size": "52KB"}),
    "sampled labels": ("llama", {"labels": "sampled", "form": "factored"}),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return everything that the weight files of `folder` hold."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of an output folder but what tells times; of the report, without them."""
    found = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "README.md"}
    report = json.loads(found["eckart.json"])
    for name in ("seconds", "peak_memory", "environment"):
        report.pop(name, None)
    found["eckart.json"] = json.dumps(report).encode()
    return found


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Any:
    """Write a tiny dense model of an architecture in several shards, and return its folder."""

    def build(name: str = "llama", **changes: Any) -> Path:
        folder = tmp_path / "source" / name
        tiny.build(name, **changes).save_pretrained(folder, max_shard_size="20KB")
        tokenizer.save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
        return folder

    return build


@pytest.fixture
def recipe(text_file: Path) -> Any:
    """Return a recipe for the model in a folder; keyword arguments go over the defaults."""

    def build(folder: Path, **options: Any) -> Recipe:
        defaults: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64, "eval_tokens": 512}
        if not {"keep", "size", "rank"} & set(options):
            defaults |= {"keep": 0.6, "of": "linears"}
        return Recipe(model=str(folder), text=(str(text_file),), **defaults | options)

    return build


@pytest.mark.parametrize("case", list(CASES))
def test_the_result_is_that_of_a_model_in_memory(
    case: str, source: Any, recipe: Any, tmp_path: Path, tokenizer: Any
) -> None:
    name, options = CASES[case]
    given = recipe(source(name), **options)
    model, expected = eckart.compress(given.model, recipe=given)
    eckart.save(model, tokenizer, tmp_path / "whole", expected)
    found = compress_to(given, tmp_path / "out", memory="8GB")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == parts.keys()
    config, other = (json.loads((tmp_path / which / "config.json").read_text()) for which in ("whole", "out"))
    assert config == other
    assert [(m.name, m.form, m.rank, m.storage) for m in found.modules] == [
        (m.name, m.form, m.rank, m.storage) for m in expected.modules
    ]
    assert (found.before, found.after) == (expected.before, expected.after)
    assert found.warnings == expected.warnings
    own, theirs = (logits(reload(tmp_path / which), tiny.tokens()) for which in ("out", "whole"))
    dense = logits(tiny.build(name), tiny.tokens())
    assert float((own - theirs).norm()) < 1e-4 * float((theirs - dense).norm())
    for mine, whole_model in ((found.dense, expected.dense), (found.compressed, expected.compressed)):
        assert mine is not None
        assert whole_model is not None
        assert mine.loss == pytest.approx(whole_model.loss, abs=1e-4)
        assert (mine.predicted, mine.dtype, mine.device) == (whole_model.predicted, "float32", "cpu")
    assert (found.predicted_increase is None) == (expected.predicted_increase is None)
    if expected.predicted_increase is not None:
        assert found.predicted_increase == pytest.approx(expected.predicted_increase, rel=1e-4)
    assert not (tmp_path / ".out.work").exists()


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama", {"storage": "int4"}), ("mixtral", {"form": "pivoted"})],
    ids=["float", "few bits", "experts"],
)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    name: str,
    options: dict[str, Any],
    source: Any,
    recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = recipe(source(name), eval_tokens=128, tokens=256, gradient_tokens=128, **options)
    compress_to(given, tmp_path / "whole", memory="8GB")
    place = {"at": 0, "wanted": 0}
    replace = Path.replace

    def stopping(self: Path, target: Any) -> Any:
        # Everything that is finished appears by rename: stop after one of them, and before it.
        place["at"] += 1
        if place["at"] == place["wanted"]:
            raise _Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    stops = 0
    while True:
        place |= {"at": 0, "wanted": 3 + 4 * stops}
        try:
            compress_to(given, tmp_path / "out", memory="8GB", work=tmp_path / "work")
            break
        except _Killed:
            stops += 1
            assert not (tmp_path / "out").exists()
            place["wanted"] = 0
    assert stops > 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_differs_from_the_unfinished_run_is_named(
    source: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    folder = source()

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(execute, "decompose", stop)
        with pytest.raises(_Killed):
            compress_to(recipe(folder), tmp_path / "out", memory="8GB")
    kept = sorted(path.name for path in (tmp_path / ".out.work").rglob("*") if path.is_file())
    with pytest.raises(StoreError, match=r"in recipe.keep \(0.6, now 0.5\).*go on with.*choose another"):
        compress_to(recipe(folder, keep=0.5, of="linears"), tmp_path / "out", memory="8GB")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(StoreError, match=r"differs in threads \(\d+, now 77\)"):
            compress_to(recipe(folder), tmp_path / "out", memory="8GB")
    text_file.write_text(text_file.read_text() + " and a rank")
    with pytest.raises(StoreError, match=r"differs in text.\w+ \("):
        compress_to(recipe(folder), tmp_path / "out", memory="8GB")
    assert kept == sorted(path.name for path in (tmp_path / ".out.work").rglob("*") if path.is_file())


def test_a_folder_with_something_else_is_no_work_folder(source: Any, recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(StoreError, match="is not the work folder of a run"):
        compress_to(recipe(source()), tmp_path / "out", memory="8GB", work=tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


def test_memory_that_does_not_suffice_is_refused_with_what_is_needed(
    source: Any, recipe: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"memory 1 MB: this run needs [\d,]+ MB, most of it for .* \([\d,]+ MB\)"
    ):
        compress_to(recipe(source()), tmp_path / "out", memory="1MB")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused(
    source: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("eckart.streaming.need.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(StoreError, match=r"has 0 MB left and the run needs [\d,]+ MB there"):
        compress_to(recipe(source()), tmp_path / "out", memory="8GB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"heal": Healing()},
            "heal needs the whole model.*heal what was written afterwards",
        ),
        ({"stock": True}, "stock needs the whole model"),
        ({"depth": True}, "depth needs the whole model"),
        ({"method": "basis-sharing"}, "form 'shared' needs"),
        ({"method": "nystrom-mlp"}, "form 'width' needs"),
        ({"method": "aa-svd"}, "method 'aa-svd' needs"),
        ({"split": "fused"}, "split 'fused' needs"),
        ({"keep": 1.0, "storage": "nf4", "correction": "lqer"}, "correction needs"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    options: dict[str, Any], message: str, recipe: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compress_to(recipe(tmp_path / "anything", **options), tmp_path / "out", memory="8GB")


def test_damaged_shards_are_named_and_leave_nothing(source: Any, recipe: Any, tmp_path: Path) -> None:
    folder = source()
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=f"{shard.name} is no whole safetensors file .*cut short or damaged"):
        compress_to(recipe(folder), tmp_path / "out", memory="8GB")
    shard.unlink()
    with pytest.raises(StoreError, match=r"weights of LlamaForCausalLM are in none of the .* files"):
        compress_to(recipe(folder), tmp_path / "out", memory="8GB")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"holds no .safetensors files"):
        compress_to(recipe(folder), tmp_path / "out", memory="8GB")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_lost_on_the_way_stops_with_what_is_finished(
    source: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source()
    whole = recipe(folder)
    compress_to(whole, tmp_path / "whole", memory="8GB")
    kept = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    forward = passes.forward

    def losing(*args: Any) -> None:
        forward(*args)
        for file in kept:
            file.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr("eckart.streaming.decompose.forward", losing)
        with pytest.raises(StoreError, match="cannot be read: .*what is finished is kept"):
            compress_to(whole, tmp_path / "out", memory="8GB")
    for file, data in kept.items():
        file.write_bytes(data)
    compress_to(whole, tmp_path / "out", memory="8GB")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_is_an_error_that_keeps_what_is_finished(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no device that is always full")
    found = Work.opened(tmp_path / "work", {"a": 1})
    found.write_json("first", {"b": 2})
    (tmp_path / "work" / "second.json.partial").symlink_to(full)
    with pytest.raises(StoreError, match=r"second.json cannot be written: .*No space left"):
        found.write_json("second", {"c": "3" * 10_000})
    assert found.read_json("first") == {"b": 2}
    assert not found.has("second.json")
    rows = Activations(tmp_path / "work" / "rows", (1, 64, 64), torch.float32)
    (tmp_path / "work" / "rows.partial").symlink_to(full)
    with pytest.raises(StoreError, match="rows cannot be written"), rows.written() as append:
        append(torch.zeros(1, 64, 64))
    assert not rows.exists()


def test_activations_come_back_bit_for_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = Activations(tmp_path / f"rows-{dtype}", (1, 5, 3), dtype)
        written = torch.randn(4, 1, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        with rows.written() as append:
            for row in written:
                append(row)
            assert not rows.exists()
        assert torch.equal(torch.stack([rows.read(index) for index in range(4)]), written)
        with pytest.raises(StoreError, match="ends before window 4"):
            rows.read(4)


def test_a_budget_out_of_reach_is_refused_before_any_pass(source: Any, recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="cannot be reached"):
        compress_to(recipe(source(), size="1KB"), tmp_path / "out", memory="8GB")
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "opt", "qwen3", "gpt2", "mixtral"])
@torch.no_grad()
def test_the_blocks_one_by_one_compute_what_the_model_does(name: str, source: Any) -> None:
    folder, ids = source(name), tiny.tokens()
    empty = skeleton(str(folder), torch.float32)
    stream = Stream(empty, Shards(empty, folder), torch.device("cpu"))
    stream.learn([ids.shape[1]])
    with stream.entrance():
        rows = [stream.enter(window) for window in ids]
    for index in range(len(stream.names)):
        with stream.block(index) as block:
            assert all(parameter.device.type == "cpu" for parameter in block.parameters())
            rows = [stream.run(index, row) for row in rows]
    with stream.exit():
        found = torch.stack([stream.leave(row) for row in rows])
    expected = logits(tiny.build(name), ids)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


def test_every_block_is_read_once_a_pass(source: Any) -> None:
    folder = source("llama-bias-untied")
    empty = skeleton(str(folder), torch.float32)
    shards = Shards(empty, folder)
    stream = Stream(empty, shards, torch.device("cpu"))
    stream.learn([16])
    before = shards.read_bytes
    for index in range(len(stream.names)):
        with stream.block(index):
            pass
    inside = sum(t.numel() * 4 for n, t in empty.state_dict().items() if models.owner(n, stream.names))
    assert shards.read_bytes - before == inside


def test_work_keeps_tensors_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    found = work.Work.opened(tmp_path / "work", {"a": [1, 2], "b": "x" * 200})
    found.write_tensors("one/two", {"t": torch.arange(3)}, {"k": "v"})
    read, metadata = found.read_tensors("one/two")
    assert torch.equal(read["t"], torch.arange(3))
    assert metadata["k"] == "v"
    (tmp_path / "work" / "one" / "two.safetensors").write_bytes(b"no")
    with pytest.raises(StoreError, match="cannot be read .*delete the work folder"):
        found.read_tensors("one/two")
    (tmp_path / "work" / "key.json").write_text("{")
    with pytest.raises(StoreError, match=r"key.json cannot be read"):
        work.Work.opened(tmp_path / "work", {"a": 1})
