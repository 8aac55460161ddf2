"""Streamed runs in processes of their own: killed, shared by two, on other numbers of threads."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eckart
from eckart.recipe import Recipe, to_yaml
from eckart.stats import Moment, Stats
from eckart.streaming.execute import compress_to
from eckart.streaming.team import Team, by_cost

from . import tiny
from .conftest import logits, reload
from .test_streaming import content, tensors

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A dense tiny model in several shards."""
    where = tmp_path_factory.mktemp("source") / "llama"
    tiny.build("llama-bias-untied").save_pretrained(where, max_shard_size="20KB")
    tokenizer.save_pretrained(where)
    return where


def recipe(folder: Path, text: Path, **options: Any) -> Recipe:
    """Return a small recipe for the model in `folder`."""
    small: dict[str, Any] = {"tokens": 512, "gradient_tokens": 256, "seq_len": 64, "eval_tokens": 256}
    return Recipe(model=str(folder), text=(str(text),), **small | {"keep": 0.6, "of": "linears"} | options)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_it_goes_on_to_the_same_bytes(
    seed: int, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe(folder, text_file)))
    script = Path(__file__).with_name("killed.py")
    paths = [str(tmp_path / name) for name in ("recipe.yaml", "out", "work")]
    done = run(str(script), *paths, "5", str(seed))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 2
    assert content(tmp_path / "out") == content(tmp_path / "out-whole")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("options", [{}, {"storage": "int4", "keep": 0.9}], ids=["float", "few bits"])
def test_two_processes_give_what_one_gives(
    options: dict[str, Any], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(folder, text_file, **options)
    (tmp_path / "recipe.yaml").write_text(to_yaml(wanted))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eckart"]
    files = ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two"), "--memory", "8GB"]
    done = run(*torchrun, "compress", *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    alone = compress_to(wanted, tmp_path / "one", memory="8GB")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in two.items()}
    own, theirs = (logits(reload(tmp_path / which), tiny.tokens()) for which in ("one", "two"))
    dense = logits(tiny.build("llama-bias-untied"), tiny.tokens())
    # Few bits are steps: moments that differ by rounding may take another one here and there.
    close = 1e-4 if not options else 0.2
    assert float((own - theirs).norm()) < close * float((own - dense).norm())
    assert alone.compressed is not None
    assert not (tmp_path / ".two.work").exists()


def test_other_numbers_of_threads_agree_to_rounding(folder: Path, text_file: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            compress_to(recipe(folder, text_file), tmp_path / f"out{threads}", memory="8GB")
    finally:
        torch.set_num_threads(before)
    own, theirs = (logits(reload(tmp_path / which), tiny.tokens()) for which in ("out1", "out2"))
    dense = logits(tiny.build("llama-bias-untied"), tiny.tokens())
    assert float((own - theirs).norm()) < 1e-4 * float((own - dense).norm())


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_work_is_dealt_out_within_one_task_of_evenly(costs: list[float], size: int) -> None:
    owners = by_cost(costs, size)
    loads = [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(size)]
    # Longest processing time first is within 4/3 of the best schedule (Graham 1969).
    best = max(sum(costs) / size, max(costs))
    assert max(loads) <= best * 4 / 3 + max(costs) / 3 + 1e-9
    assert max(loads) - min(loads) <= max(costs) + 1e-9


def test_statistics_of_several_processes_are_those_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 4, generator=generator) for count in (5, 9)]

    def stats(part: Tensor, name: str) -> Stats:
        return Stats({("gram", name): Moment(part.T @ part, len(part))}, {name: name})

    own, other = stats(rows[0], "a"), stats(rows[1], "a")
    other.moments["gram", "b"], other.leaders["b"] = Moment(torch.ones(2, 2), 3), "b"
    team = Team(0, 2)
    monkeypatch.setattr(Team, "gathered", lambda self, value: [value, _about(other)])
    sent = iter([other.moments["gram", "a"].total, other.moments["gram", "b"].total])
    monkeypatch.setattr("eckart.streaming.team.distributed.all_reduce", lambda total: total.add_(next(sent)))
    team.add(own)
    both = torch.cat(rows)
    assert torch.allclose(own.moments["gram", "a"].total, both.T @ both, atol=1e-5)
    assert own.moments["gram", "a"].count == 14
    assert own.moments["gram", "b"].count == 3
    assert torch.equal(own.moments["gram", "b"].total, torch.ones(2, 2))
    assert own.leaders == {"a": "a", "b": "b"}


def _about(stats: Stats) -> Any:
    moments = {key: (tuple(m.total.shape), m.total.dtype, m.count) for key, m in stats.moments.items()}
    return moments, stats.leaders


def test_compress_to_is_public() -> None:
    assert eckart.compress_to is compress_to
