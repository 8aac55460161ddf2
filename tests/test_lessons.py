"""Laws of the windows that healing learns from."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart import ConfigError, lessons, text
from eckart.healing import Healing
from eckart.lessons import Lessons, Source

from . import tiny

SMALL = Healing(tokens=640, seq_len=16, fit_tokens=160, hold_tokens=160)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Three texts of different letters, 2000 tokens each, every window of which is unlike the others."""
    made = torch.Generator().manual_seed(1)
    found = []
    for name, letters in (("a", "abcdefgh"), ("k", "klmnopqr"), ("s", "stuvwxyz")):
        picks = torch.randint(8, (2000,), generator=made).tolist()
        (tmp_path / name).write_text("".join(letters[pick] for pick in picks))
        found.append(str(tmp_path / name))
    return found


def _letters(rows: torch.Tensor, tokenizer: Any) -> Counter[str]:
    """Count windows by the source that they are from."""
    return Counter(
        next(name for name, end in (("a", "i"), ("k", "s"), ("s", "{")) if tokenizer.decode(row[-1:]) < end)
        for row in rows
    )


def _windows(rows: torch.Tensor) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row.tolist()) for row in rows)


def test_proportions_follow_weights(sources: list[str], tokenizer: Any) -> None:
    weighted = [f"{sources[0]}=3", f"{sources[1]}=1.0", sources[2]]
    found = lessons.read(weighted, SMALL, tokenizer)
    assert _letters(found.rows, tokenizer) == {"a": 24, "k": 8, "s": 8}
    assert _letters(found.fit, tokenizer) == {"a": 6, "k": 2, "s": 2}
    assert _letters(found.held_out, tokenizer) == {"a": 6, "k": 2, "s": 2}
    # In every stretch of the run, not only at its end.
    assert _letters(found.rows[:10], tokenizer) == {"a": 6, "k": 2, "s": 2}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=6), st.integers(1, 60))
def test_exactly_as_many_windows_as_wanted_whatever_the_weights(weights: list[float], count: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    parts = [torch.full((3, 4), number) for number in range(len(weights))]
    rows = lessons._mixed(parts, shares, count, torch.Generator())
    assert len(rows) == count
    for number, share in enumerate(shares):
        assert abs(int((rows[:, 0] == number).sum()) - count * share) < 1 + 1e-6


def test_held_out_windows_are_never_learned(sources: list[str], tokenizer: Any) -> None:
    everything = Healing(tokens=10**5, seq_len=16, fit_tokens=10**5, hold_tokens=10**5)
    found = lessons.read(sources, everything, tokenizer)
    learned = _windows(found.rows) | _windows(found.fit)
    held_out = _windows(found.held_out)
    assert len(held_out) == len(found.held_out) == 3 * (200 // 16)
    assert not learned.keys() & held_out.keys()
    last = text.windows(text.tokenize(Path(sources[0]).read_text(), tokenizer)[1800:], 16)
    assert all(tuple(row.tolist()) in held_out for row in last)


def test_a_source_is_exhausted_before_it_repeats(sources: list[str], tokenizer: Any) -> None:
    windows = 1800 // 16
    healing = Healing(tokens=16 * int(2.5 * windows), seq_len=16, fit_tokens=10**6)
    found = lessons.read(sources[:1], healing, tokenizer)
    for start in (0, windows):
        assert len(_windows(found.rows[start : start + windows])) == windows
    assert set(_windows(found.rows).values()) == {2, 3}
    assert not torch.equal(found.rows[:windows], found.rows[windows : 2 * windows])
    assert set(_windows(found.fit).values()) == {1}
    assert len(found.fit) == windows


def test_the_same_seed_gives_the_same_rows_and_another_one_does_not(
    sources: list[str], tokenizer: Any
) -> None:
    def read(seed: int) -> Lessons:
        return lessons.read(sources, Healing(tokens=640, seq_len=16, seed=seed), tokenizer)

    assert torch.equal(read(1).rows, read(1).rows)
    assert torch.equal(read(1).fit, read(1).fit)
    assert not torch.equal(read(1).rows, read(2).rows)
    assert torch.equal(read(1).held_out, read(2).held_out)


def test_what_is_spared_is_in_no_window(sources: list[str], tokenizer: Any) -> None:
    everything = Healing(tokens=10**5, seq_len=10, fit_tokens=10**5, hold_tokens=10**5)
    end = text.windows(text.tokenize(Path(sources[0]).read_text(), tokenizer)[1900:], 10)
    seen = []
    for spare in (0.05, 0.0):
        found = lessons.read(sources[:1], everything, tokenizer, spare=spare)
        windows = _windows(torch.cat([found.rows, found.fit, found.held_out]))
        seen.append(sum(tuple(row.tolist()) in windows for row in end))
    assert seen == [0, 10]


def test_windows_can_begin_with_the_begin_token(sources: list[str], tokenizer: Any) -> None:
    found = lessons.read(sources, SMALL, tokenizer, bos=True)
    for rows in (found.rows, found.fit, found.held_out):
        assert rows.shape[1] == 16
        assert set(rows[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert tokenizer.bos_token_id not in lessons.read(sources, SMALL, tokenizer).rows


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.txt", Source("a.txt", 1.0)),
        ("a.txt=2", Source("a.txt", 2.0)),
        ("a=b.txt=0.5", Source("a=b.txt", 0.5)),
        ("a=b.txt", Source("a=b.txt", 1.0)),
        ("self=3", Source("self", 3.0)),
    ],
)
def test_a_weight_is_what_stands_after_the_last_mark(given: str, expected: Source) -> None:
    assert lessons.parse(given) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_are_above_zero(weight: str) -> None:
    with pytest.raises(ConfigError, match=f"text 'x={weight}': the weight {weight} must be above 0"):
        lessons.parse(f"x={weight}")


def test_what_cannot_be_learned_from_is_refused(sources: list[str], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="healing needs text: give at least one source"):
        lessons.read([], SMALL, tokenizer)
    with pytest.raises(ConfigError, match="'self' is what the dense model writes: it needs a teacher"):
        lessons.read(["self"], SMALL, tokenizer)
    with pytest.raises(ConfigError, match="'self' needs at least two windows: raise tokens"):
        lessons.read(["self"], SMALL, tokenizer, written=torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no file nowhere.txt"):
        lessons.read(["nowhere.txt=2"], SMALL, tokenizer)
    (tmp_path / "short").write_text("abcdefghi" * 10)
    with pytest.raises(ConfigError, match="shorter than one window of 16 tokens: lower seq_len"):
        lessons.read([str(tmp_path / "short")], SMALL, tokenizer)
    (tmp_path / "shorter").write_text("abcdefghi")
    with pytest.raises(ConfigError, match="the last tenth of .*shorter has 1 tokens, at least 2"):
        lessons.read([str(tmp_path / "shorter")], SMALL, tokenizer)


def test_written_windows_are_split_like_the_others(sources: list[str], tokenizer: Any) -> None:
    written = torch.arange(50)[:, None] + torch.zeros(16, dtype=torch.int64)
    found = lessons.read([f"{sources[0]}=1", "self=1"], SMALL, tokenizer, written=written)
    own = {int(row[0]) for row in found.rows if bool((row == row[0]).all())}
    judged = {int(row[0]) for row in found.held_out if bool((row == row[0]).all())}
    assert own
    assert own <= set(range(45))
    assert judged == set(range(45, 50))
    both = lessons.read(["self"], SMALL, tokenizer, written=written[:2])
    assert not _windows(both.rows).keys() & _windows(both.held_out).keys()


def test_the_model_writes_from_its_own_distribution() -> None:
    """A model that always says one token writes that one; drawn again from a seed, text is the same."""
    model = tiny.build("llama")

    def write(seed: int) -> torch.Tensor:
        return lessons.write(model, 18, 12, torch.Generator().manual_seed(seed))

    first = write(0)
    assert first.shape == (18, 12)
    assert torch.equal(first, write(0))
    assert not torch.equal(first, write(1))
    assert len(set(first[:, 1:].flatten().tolist())) > 20
    untied = tiny.build("qwen2")
    with torch.no_grad():
        untied.lm_head = torch.nn.Linear(32, tiny.VOCABULARY, bias=True)
        untied.lm_head.bias[7] = 1e4
    seen: list[tuple[int, int]] = []
    only = lessons.write(
        untied, 3, 20, torch.Generator().manual_seed(0), lambda done, total: seen.append((done, total))
    )
    assert set(only[:, 1:].flatten().tolist()) == {7}
    assert seen == [(48, 60)]


def test_windows_that_are_written_do_not_depend_on_the_cache_of_keys() -> None:
    """What is drawn with cached keys has the distribution of the whole prefix."""
    model = tiny.build("llama")
    rows = lessons.write(model, 1, 10, torch.Generator().manual_seed(4))
    again = torch.Generator().manual_seed(4)
    expected = torch.randint(tiny.VOCABULARY, (1, 1), generator=again)
    for _ in range(9):
        with torch.no_grad():
            chances = model(input_ids=expected).logits[:, -1].float().softmax(-1)
        expected = torch.cat([expected, torch.multinomial(chances, 1, generator=again)], dim=1)
    assert torch.equal(rows, expected)
