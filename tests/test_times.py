"""Tables of times: files, steps, interpolation, and measurement by a clock that ticks when it is read."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart import ConfigError, StoreError
from eckart.factors import FORMS, FactoredLinear, PivotedLinear
from eckart.ranks import legal_ranks
from eckart.speed import grid, passing, times, timetable
from eckart.speed.options import Rounds
from eckart.speed.times import Kind, Row, Times, Where

CPU = torch.device("cpu")
HERE = Where("cpu", "a processor", "float32", 1, "2.0")
SHAPES = st.tuples(st.integers(2, 300), st.integers(2, 300))
POINTS = st.dictionaries(st.integers(1, 500), st.floats(1e-6, 1.0), min_size=1, max_size=12)


def row(kind: Kind = "dense", rank: int = 8, seconds: float = 1.0) -> Row:
    return Row((16, 8), kind, rank, 1, seconds, seconds, seconds, 3)


def exact(seconds: dict[int, float]) -> dict[int, Row]:
    return {rank: row("pivoted", rank, took) for rank, took in seconds.items()}


# the grid


@given(shape=SHAPES)
def test_every_measured_rank_is_one_that_may_be_chosen_and_the_largest_is_there(
    shape: tuple[int, int],
) -> None:
    for form in FORMS:
        legal = legal_ranks(form, shape)
        found = times.grid(form, shape)
        assert set(found) <= set(legal)
        assert found == sorted(set(found))
        assert found[-1:] == legal[-1:]
        assert len(found) <= 16
    assert times.grid("dense", shape) == [min(shape)]
    assert max(times.grid("rows", shape)) <= shape[0]
    assert max(times.grid("columns", shape)) <= shape[1]


# steps


@given(form=st.sampled_from(FORMS), multiple=st.sampled_from((1, 4, 8, 16, 32)))
def test_steps_of_a_device_are_found(form: Any, multiple: int) -> None:
    shape = (1024, 768)
    seconds = {rank: float(-(-rank // multiple)) for rank in times.grid(form, shape)}
    # Ranks that are no multiple take as long as the next multiple and a bit.
    seconds = {rank: took * (1.0 if rank % multiple == 0 else 1.1) for rank, took in seconds.items()}
    found, why = times.step(form, shape, exact(seconds))
    assert found == multiple
    assert ("not clearly more" in why) == (multiple == 1)
    # Quartiles that reach into each other show nothing.
    unsure = {rank: replace(one, lower=0.8 * one.seconds) for rank, one in exact(seconds).items()}
    assert times.step(form, shape, unsure)[0] == 1


def test_noise_is_no_step_and_too_few_ranks_show_none() -> None:
    shape = (1024, 768)
    ranks = times.grid("pivoted", shape)
    noisy = {rank: 1.0 + 0.01 * (rank % 3) for rank in ranks}
    assert times.step("pivoted", shape, exact(noisy))[0] == 1
    assert times.step("pivoted", shape, exact({64: 1.0})) == (1, "there are too few ranks to see steps in")


def test_where_every_smaller_rank_is_slower_the_step_is_the_power_of_two() -> None:
    shape = (1024, 1024)
    ranks = times.grid("pivoted", shape)
    anchor = max(rank for rank in ranks if rank + 1 not in ranks and rank - 1 in ranks and rank < 1000)
    slow = {rank: 1.0 if rank == anchor else 2.0 for rank in ranks}
    found, _ = times.step("pivoted", shape, exact(slow))
    assert anchor % found == 0
    assert found >= 64


# monotone interpolation


@given(points=POINTS)
def test_monotone_never_falls_and_is_nearest(points: dict[int, float]) -> None:
    given_points = list(points.items())
    made = times.monotone(given_points)
    assert [rank for rank, _ in made] == sorted(points)
    levels = [seconds for _, seconds in made]
    assert levels == sorted(levels)
    assert sum(levels) == pytest.approx(sum(points.values()))  # pooling keeps means
    ordered = [points[rank] for rank in sorted(points)]
    if ordered == sorted(ordered):
        assert levels == ordered
    # Optimal: no other monotone vector, such as running maxima or the mean, is nearer.
    distance = sum((a - b) ** 2 for a, b in zip(levels, ordered, strict=True))
    for other in (list(itertools.accumulate(ordered, max)), [sum(ordered) / len(ordered)] * len(ordered)):
        assert distance <= sum((a - b) ** 2 for a, b in zip(other, ordered, strict=True)) + 1e-12


@given(points=POINTS, rank=st.integers(1, 600))
def test_between_goes_through_the_points_and_never_falls(points: dict[int, float], rank: int) -> None:
    made = times.monotone(list(points.items()))
    for known, seconds in made:
        assert times.between(made, known) == seconds
    assert times.between(made, rank) <= times.between(made, rank + 1) + 1e-12
    assert made[0][1] <= times.between(made, rank) <= made[-1][1]


def test_between_is_linear() -> None:
    assert times.between(((10, 1.0), (20, 3.0)), 15) == pytest.approx(2.0)
    assert times.between(((10, 1.0), (20, 3.0)), 5) == 1.0
    assert times.between(((10, 1.0), (20, 3.0)), 25) == 3.0


# files


def test_a_table_comes_back_from_its_file() -> None:
    table = Times(HERE, (row(), row("pivoted", 4, 0.5)))
    assert times.from_json(table.to_json(), "t.json") == table
    assert times.from_json(Times(HERE).to_json(), "t.json") == Times(HERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "t.json is no table of times .*delete it, or name another file"),
        ("[]", "t.json is no table of times"),
        ('{"format": 1, "rows": [], "where": {}}', "t.json is no table of times"),
        ('{"format": 2}', "of format 2: legal is 1"),
        (Times(HERE, (row(seconds=-1.0),)).to_json(), "no positive time"),
        (Times(HERE, (row(kind="odd"),)).to_json(), "unknown kind"),  # type: ignore[arg-type]
    ],
)
def test_damaged_tables_are_refused(text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        times.from_json(text, "t.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "device 'cuda', here 'cpu'"),
        ({"processor": "another"}, "processor 'another', here 'a processor'"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16', here 'float32'"),
        ({"threads": 4}, "threads 4, here 1"),
        ({"torch": "1.0"}, "torch '1.0', here '2.0'"),
    ],
)
def test_a_table_of_another_place_is_refused_with_what_differs(change: Any, message: str) -> None:
    times.check_same(Times(HERE), HERE, "t.json")
    with pytest.raises(ConfigError, match=f"t.json holds times of another place .{message}.: name another"):
        times.check_same(Times(replace(HERE, **change)), HERE, "t.json")


# measurement


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "WORKING_SET", 40_000)
    monkeypatch.setattr(grid, "_BLOCK_SECONDS", 1e-4)
    defaults = {**(grid.measure.__kwdefaults__ or {}), "rounds": Rounds(runs=3, warmup=1)}
    monkeypatch.setattr(grid.measure, "__kwdefaults__", defaults)


@pytest.mark.parametrize("kind", ["dense", "factored", "pivoted", "rows", "columns"])
def test_what_is_timed_is_the_map_that_would_be_made(kind: Kind) -> None:
    pool = torch.randn(5_000)
    made = grid.made(kind, (24, 16), 5, pool, 7)
    weights = list(made.parameters())
    assert all(weight.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr() for weight in weights)
    expected = {
        "dense": (24 * 16, torch.nn.Linear), "factored": (5 * 40, FactoredLinear),
        "pivoted": (5 * 40 - 25, PivotedLinear), "rows": (5 * 16, torch.nn.Linear),
        "columns": (5 * 24, torch.nn.Linear),
    }[kind]  # fmt: skip
    assert (sum(weight.numel() for weight in weights), type(made)) == expected
    inputs = torch.randn(3, 5 if kind == "columns" else 16)
    assert made(inputs).shape == (3, 5 if kind == "rows" else 24)
    other = grid.made(kind, (24, 16), 5, pool, 8)
    assert not torch.equal(made(inputs), other(inputs))


@pytest.mark.usefixtures("quick")
def test_every_kind_is_timed_at_every_rank_of_its_grid() -> None:
    ticks, seen = itertools.count(), []
    found = grid.measure(
        [((40, 24), "dense"), ((40, 24), "pivoted"), ((8, 24), "dense")], 2, CPU, torch.float32,
        clock=lambda: float(next(ticks)), watch=lambda *said: seen.append(said),
    )  # fmt: skip
    assert [(one.shape, one.kind, one.rank) for one in found] == [
        ((40, 24), "dense", 24),
        *(((40, 24), "pivoted", rank) for rank in times.grid("pivoted", (40, 24))),
        ((8, 24), "dense", 8),
    ]
    assert all(one.tokens == 2 and one.runs == 3 and one.seconds == 1.0 for one in found)
    assert seen[-1] == ("time maps", 8, 8)


@pytest.mark.usefixtures("quick")
def test_a_file_is_read_and_only_what_it_lacks_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "times.json"
    wanted: list[tuple[tuple[int, int], Kind]] = [((16, 8), "dense"), ((16, 8), "pivoted")]
    first = timetable.obtain(file, wanted, 1, CPU, torch.float32)
    assert timetable.read(file) == first
    assert json.loads(file.read_text())["format"] == times.FORMAT

    def none(*_: object, **__: object) -> Iterator[Row]:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(grid, "measure", none)
        assert timetable.obtain(file, wanted, 1, CPU, torch.float32) == first
        with pytest.raises(AssertionError, match="measured again"):
            timetable.obtain(file, wanted, 2, CPU, torch.float32)
    more = timetable.obtain(file, [*wanted, ((8, 8), "dense")], 1, CPU, torch.float32)
    assert more.rows[: len(first.rows)] == first.rows
    assert {(one.shape, one.kind) for one in more.rows} == {*wanted, ((8, 8), "dense")}
    # Of a shape with a new kind all is measured anew, in the same rounds.
    again = timetable.obtain(file, [((16, 8), "rows")], 1, CPU, torch.float32)
    assert not again.lacking([*wanted, ((16, 8), "rows"), ((8, 8), "dense")], 1)
    file.write_text(Times(replace(first.where, threads=64), first.rows).to_json())
    with pytest.raises(ConfigError, match="threads 64, here"):
        timetable.obtain(file, wanted, 1, CPU, torch.float32)
    with pytest.raises(StoreError, match="cannot be read"):
        timetable.read(tmp_path)


def test_a_pass_runs_every_map_once_a_round_on_as_many_tokens() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Recorder(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append((f"{self.in_features}", tuple(inputs.shape)))
            return super().forward(inputs)

    ticks, rounds = itertools.count(0, 3), []
    found = passing.seconds(
        [Recorder(4, 8), Recorder(8, 2)], 5, lambda *said: rounds.append(said),
        rounds=Rounds(runs=3, warmup=1), clock=lambda: float(next(ticks)),
    )  # fmt: skip
    assert found == 3.0
    assert seen == [("4", (5, 4)), ("8", (5, 8))] * 4
    assert rounds[-1] == (4, 4)
