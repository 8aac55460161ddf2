"""Speed of whole models: laws that do not depend on time, by a clock that ticks when it is read."""

import io
import itertools
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, NotFinite, api, environment, fusing
from eckart.cli import app
from eckart.speed import alone, compiled, decoding, report_speed, run, timing
from eckart.speed.options import Options, Rounds, Setting
from eckart.speed.result import Figures, Machine, Row
from eckart.speed.spread import Quotient, Spread, quotient

from . import tiny
from .conftest import logits

SHORT = Options((9,), (4,), (2,), Rounds(runs=4, warmup=1), loads=0)
CLOSE = 1e-12


def ticking() -> timing.Clock:
    """Return a clock that says 0, 1, 2, ... s."""
    times = itertools.count()
    return lambda: float(next(times))


def listen(models: dict[str, Any], heard: list[str]) -> None:
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: heard.append(name))


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_rounds_go_to_and_fro_and_the_first_ones_do_not_count() -> None:
    done: list[str] = []

    def number(name: str) -> int:
        done.append(name)
        return len(done)

    tasks = {name: partial(number, name) for name in "abc"}
    ticks: list[tuple[int, int]] = []
    found = timing.in_turn(tasks, Rounds(runs=3, warmup=2), lambda *tick: ticks.append(tick))
    assert "".join(done) == "abc" "cba" "abc" "cba" "abc"  # fmt: skip
    assert found == {"a": [7, 12, 13], "b": [8, 11, 14], "c": [9, 10, 15]}
    assert ticks == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


VALUES = st.lists(st.floats(0.1, 10), min_size=3, max_size=12)


@given(VALUES, st.floats(0.2, 5))
def test_what_hits_both_of_a_pair_is_in_neither_quartile(values: list[float], factor: float) -> None:
    other = Spread(tuple(values))
    found = quotient(Spread(tuple(factor * value for value in values)), other)
    assert (found.value, found.lower, found.upper) == pytest.approx([factor] * 3, rel=CLOSE)


@given(VALUES)
def test_quartiles_lie_around_the_median_and_turn_over_with_the_quotient(values: list[float]) -> None:
    spread = Spread(tuple(values))
    lower, upper = spread.quartiles
    assert min(values) <= lower <= spread.median <= upper <= max(values)
    ones = Spread((1.0,) * len(values))
    turned = quotient(ones, spread)
    assert turned.value == pytest.approx(1 / spread.median, rel=CLOSE)
    assert turned.lower <= turned.upper
    assert quotient(spread, ones).value == pytest.approx(spread.median, rel=CLOSE)


def test_quartiles_and_ratio_of_known_runs() -> None:
    own, other = Spread((2.0, 4.0, 6.0, 8.0, 10.0)), Spread((1.0, 2.0, 2.0, 2.0, 5.0))
    assert (own.median, own.quartiles) == (6.0, (4.0, 8.0))
    assert quotient(own, other) == Quotient(3.0, 2.0, 3.0)  # of 2, 2, 3, 4, 2: 2 to 3
    with pytest.raises(ConfigError, match="5 runs against 1: pairs need as many of both"):
        quotient(own, Spread((1.0,)))
    with pytest.raises(ConfigError, match="no runs"):
        Spread(())


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_decoding_with_the_cache_equals_decoding_without(name: str) -> None:
    model = tiny.build(name)
    ids = decoding.prompt(Setting(2, 40, 5), tiny.VOCABULARY, 1)  # beyond the sliding window of 32
    found = decoding.greedy(model, ids, 5, finite=True).tokens
    whole, forgotten = ids, []
    for place in range(5):
        whole = torch.cat([whole, logits(model, whole)[:, -1:].argmax(-1)], dim=1)
        forgotten.append(logits(model, found[:, place : place + 1])[:, -1].argmax(-1))
    assert torch.equal(found, whole[:, 40:])
    if name == "llama":  # that a token alone would not do shows that the cache is used
        assert not torch.equal(found[:, 1:], torch.stack(forgotten[:-1], dim=1))


def test_tokens_per_second_are_tokens_divided_by_seconds() -> None:
    setting = Setting(batch=2, prompt_tokens=9, new_tokens=4)
    done = decoding.greedy(tiny.build("llama"), decoding.prompt(setting, 50, 0), 4, clock=ticking())
    # Read at the start, after the prompt, at the first token and at the end.
    assert (done.prefill, done.first_token, done.decode) == (1, 2, 1)
    assert (done.prefill_rate(setting), done.decode_rate(setting)) == (18, 6)
    assert done.tokens.shape == (2, 4)


def test_the_end_of_text_ends_nothing() -> None:
    model = tiny.build("llama")
    ids = decoding.prompt(Setting(1, 9, 4), tiny.VOCABULARY, 0)
    tokens = decoding.greedy(model, ids, 6).tokens
    ending = int(tokens[0, 0])
    model.config.eos_token_id = model.generation_config.eos_token_id = ending
    assert torch.equal(decoding.greedy(model, ids, 6).tokens, tokens)
    stopped = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    assert stopped.shape[1] == 10  # generate() does end


def test_two_models_run_in_turn_and_their_ratio_is_that_of_their_rates() -> None:
    given = {"model": tiny.build("llama"), "against": tiny.build("gpt2", vocab_size=300)}
    heard: list[str] = []
    listen(given, heard)
    (row,) = run.measure(given, SHORT, clock=ticking())
    there, back = ["model"] * 4 + ["against"] * 4, ["against"] * 4 + ["model"] * 4
    # A check, one round to warm up, in reverse, and four that count.
    assert heard == there + back + there + back + there + back
    assert row.model.decode.values == (6.0,) * 4
    assert row.against is not None
    assert row.against.prefill.values == (18.0,) * 4
    assert {ratio.value for ratio in row.ratios().values()} == {1.0}


def test_every_combination_is_measured_with_prompts_that_both_know() -> None:
    given = {"model": tiny.build("llama"), "against": tiny.build("gpt2", vocab_size=40)}
    seen: list[torch.Tensor] = []
    given["model"].register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    options = Options((9, 7, 9), (3,), (1, 2), Rounds(runs=3, warmup=1), loads=0)
    rows = run.measure(given, options, clock=ticking())
    assert [row.setting for row in rows] == [
        Setting(1, 9, 3),
        Setting(1, 7, 3),
        Setting(2, 9, 3),
        Setting(2, 7, 3),
    ]
    prompts = [ids for ids in seen if ids.shape[1] > 1]
    assert len(prompts) == 4 * 5
    assert max(int(ids.max()) for ids in prompts) < 40
    assert options.largest() == Setting(2, 9, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 2}, "runs 2: give an integer of at least 3"),
        ({"warmup": 0}, "warmup 0: give an integer of at least 1"),
        ({"threads": 0}, "threads 0: give an integer of at least 1"),
        ({"new_tokens": [4, 1]}, "new_tokens 1: give an integer of at least 2"),
        ({"prompt_tokens": []}, "prompt_tokens: none given"),
        ({"batch": 0}, "batch 0: give an integer of at least 1"),
        ({"loads": -1}, "loads -1: give an integer of at least 0"),
        ({"prompt_tokens": [8, 100], "new_tokens": 29}, "of 100 and 29 new tokens are 129: .* has 128"),
        ({"dtype": "int9"}, "dtype 'int9'"),
        ({"device": "abacus"}, "device 'abacus' is not usable here"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_weights_are_read(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(api, "loaded", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        eckart.bench(llama_folder, **{"prompt_tokens": 8} | change)


def test_what_is_no_model_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="no model at ./nowhere: give a folder, a .gguf file or a hub id"):
        eckart.bench(llama_folder, against="./nowhere", prompt_tokens=8)
    with pytest.raises(ModelError, match="got a int: give a hub id, a path or a model of transformers"):
        eckart.bench(3)


def test_models_that_do_not_decode_are_refused() -> None:
    model = tiny.build("llama")
    forward = model.forward
    model.forward = lambda input_ids, **_: forward(input_ids=input_ids, use_cache=False)
    with pytest.raises(ModelError, match="LlamaForCausalLM keeps no cache when it decodes"):
        run.measure({"model": model}, SHORT)
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NotFinite, match="a logit is NaN or infinite"):
        run.measure({"model": model}, SHORT)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), r"made tokens of shape \(2, 3\), not \(2, 4\)"),
        (torch.full((2, 4), 258), "made a token that is none of its 258"),
    ],
)
def test_a_pass_that_made_something_else_has_no_time(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoding.check_tokens(decoding.Pass(1, 1, 1, tokens), Setting(2, 9, 4), 258)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with timing.fixed_threads(before + 2) as count:
        assert count == torch.get_num_threads() == before + 2
    with pytest.raises(KeyError), timing.fixed_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
    with timing.fixed_threads(None) as count:
        assert count == before


@pytest.mark.parametrize(
    ("kind", "owner"),
    [("cuda", torch.cuda), ("mps", torch.mps), ("xpu", torch.accelerator)],
)
def test_devices_that_work_ahead_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, kind: str, owner: Any
) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(owner, "synchronize", lambda *place: waited.append(place))
    timing.synchronise(torch.device("cpu"))
    assert not waited
    timing.synchronise(torch.device(kind))
    assert len(waited) == 1


def test_models_in_memory_are_measured_without_a_process(
    llama: Any, compressed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "measure", lambda _: pytest.fail("a process was started"))
    told: list[tuple[str, int, int]] = []
    found = eckart.bench(
        llama, against=compressed_folder, prompt_tokens=8, new_tokens=3, runs=3, warmup=1, loads=0,
        threads=1, watch=lambda *step: told.append(step),
    )  # fmt: skip
    assert found.model.alone is None
    assert found.model.file_bytes is None
    assert found.against is not None
    assert found.against.file_bytes == (compressed_folder / "model.safetensors").stat().st_size
    assert found.against.parameters < found.model.parameters
    assert told == [("run", done, 4) for done in range(1, 5)]
    text = str(found)
    for words in ("model / against", "decode, tokens/s", "batch 1, prompt 8, 3 new", "greedy", "threads: 1"):
        assert words in text


def test_bench_prints_json_with_what_it_was_made_with(llama_folder: Path) -> None:
    options = ["--prompt-tokens", 8, "--prompt-tokens", 6, "--new-tokens", 3, "--runs", 3, "--threads", 1]
    done = invoke("bench", llama_folder, "--against", llama_folder, *options, "--loads", 0, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {
        "command", "format", "model", "against", "settings", "options", "device", "dtype", "threads",
        "load_average", "environment",
    }  # fmt: skip
    assert set(found["environment"]) == {"date", "python", "versions", "machine"}
    machine = found["environment"]["machine"]
    assert (found["threads"], machine["torch_threads"]) == (1, 1)
    assert {"processor_model", "accelerator_model", "cpus"} <= set(machine)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["options"]["rounds"] == {"runs": 3, "warmup": 2, "threads": 1}
    names = {"prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds"}
    assert [one["prompt_tokens"] for one in found["settings"]] == [8, 6]
    for setting in found["settings"]:
        assert set(setting) == {"batch", "prompt_tokens", "new_tokens", "model", "against", "ratio"}
        for name in names:
            own, other, ratio = (setting[side][name] for side in ("model", "against", "ratio"))
            assert set(own) == set(other) == {"median", "lower", "upper", "values"}
            assert len(own["values"]) == 3
            assert min(own["values"]) > 0
            assert ratio["value"] == pytest.approx(own["median"] / other["median"])
        assert setting["ratio"].keys() == names


def test_load_time_and_peak_memory_are_those_of_a_process_alone(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny.build("llama", vocab_size=400_000)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights > 50_000_000
    found = alone.measure(alone.Request(str(tmp_path), Setting(1, 8, 3), 2, 1, 0, "float32", "cpu", False))
    assert len(found.load.values) == 2
    assert min(found.load.values) > 0
    # This process held the model as well: it counts once, beside interpreter and libraries.
    assert 0.9 * weights < found.running - found.resting < 3 * weights
    assert found.resting <= found.loading
    text = json.dumps(found.to_dict())
    assert json.loads(text)["load_seconds"]["values"] == list(found.load.values)


def test_why_a_process_ended_early_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = alone.Request(
        str(tmp_path / "none"), Setting(1, 8, 3), 1, torch.get_num_threads(), 0, None, None, False
    )
    monkeypatch.setattr(alone, "_START", "import sys; sys.exit('the last words')")
    with pytest.raises(ModelError, match=r"alone ended with 1: the last words; .*--loads 0"):
        alone.measure(request)
    monkeypatch.setattr(alone, "_START", "import os; os._exit(9)")
    with pytest.raises(ModelError, match="alone ended with 9: it said nothing"):
        alone.measure(request)
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asdict(request))))
    monkeypatch.setattr(sys, "stdout", written)
    alone.main()
    message = json.loads(written.getvalue())["error"]
    assert message.startswith("no model at ")
    monkeypatch.setattr(alone, "_START", f"print('chatter'); print({written.getvalue().strip()!r})")
    with pytest.raises(ModelError, match="no model at "):
        alone.measure(request)


def test_files_of_a_hub_id_are_found_where_they_were_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert run._cached_bytes("owner/name") is None
    commit = "0" * 40
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(commit)
    (folder / "model.safetensors").write_bytes(bytes(123))
    assert run._cached_bytes("owner/name") == 123
    assert run._cached_bytes("a model in memory") is None


def _row(*factors: float) -> Row:
    def figures(*values: float) -> Figures:
        return Figures(*(Spread(tuple(value * scale for scale in (1.0, 1.1, 1.2))) for value in values))

    return Row(Setting(1, 8, 3), figures(*factors, 1.0), figures(1.0, 1.0, 1.0))


def test_where_it_is_not_faster_it_says_so() -> None:
    assert report_speed._not_faster(_row(1.5, 1.2)) == []
    (only,) = report_speed._not_faster(_row(1.5, 0.9))
    assert only.startswith("decode at batch 1, prompt 8, 3 new, 0.900 (0.900 to 0.900) times")
    assert len(report_speed._not_faster(_row(1.0, 1.0))) == 2


@pytest.mark.parametrize(("load", "threads", "warned"), [(None, 4, 0), (0.1, 4, 0), (3.0, 1, 0), (3.2, 2, 1)])
def test_a_busy_machine_is_told(load: float | None, threads: int, warned: int) -> None:
    machine = Machine("cpu", "float32", threads, load, {"machine": {"cpus": 4}})
    assert len(report_speed._busy(machine)) == warned


def test_the_processor_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "_CPUS", listing)
    listing.write_text("processor\t: 0\nmodel name\t: Abacus: 3000\nprocessor\t: 1\nmodel name\t: Other\n")
    assert environment.describe()["machine"]["processor_model"] == "Abacus: 3000"
    listing.write_text("processor\t: 0\n")
    assert environment.describe()["machine"]["processor_model"] is None


# compiled and fused


COMPILED = Options((9,), (4,), (2,), Rounds(runs=3, warmup=1), loads=0, compiled=True)


def test_a_compiled_pass_with_a_static_cache_makes_the_same_tokens() -> None:
    model, setting = tiny.build("llama"), Setting(2, 9, 5)
    ids = decoding.prompt(setting, tiny.VOCABULARY, 1)
    expected = decoding.greedy(model, ids, 5).tokens
    graphs = CompileCounter()
    ready = compiled.prepare(model, setting, ids, backend=graphs, clock=ticking())
    for _ in range(2):  # what the pass before left in the cache is gone
        done = ready.greedy(ids, 5, ticking())
        assert torch.equal(done.tokens, expected)
        assert (done.prefill, done.first_token, done.decode) == (1, 2, 1)
    assert graphs.frame_count == 2  # a prompt, and a token behind it
    assert ready.seconds == 5  # four readings of the pass lie between the two around it
    other = ids.flip(1)
    assert torch.equal(ready.greedy(other, 5).tokens, decoding.greedy(model, other, 5).tokens)
    assert not torch.equal(ready.greedy(other, 5).tokens, expected)


def test_compiled_models_run_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model": tiny.build("llama"), "against": tiny.build("qwen2")}
    (row,) = run.measure(given, COMPILED, clock=ticking(), backend="eager")
    assert row.compiled is not None
    assert row.compile_seconds == {"model": 5, "against": 5}
    assert row.compiled.against is not None
    assert row.compiled.against.decode.values == (6.0,) * 3
    found = row.to_dict()["compiled"]
    assert set(found) == {"model", "against", "ratio", "compile_seconds"}
    assert found["ratio"]["decode_tokens_per_second"]["value"] == 1
    labels = [line[0] for line in report_speed.setting_rows(row)]
    assert labels[-4:] == [
        "compiled: prefill, tokens/s", "compiled: decode, tokens/s", "compiled: time to first token, ms",
        "compiling, s",
    ]  # fmt: skip
    assert report_speed.setting_rows(row)[-1][1:] == ("5.0", "5.0", "")
    (plain,) = run.measure(given, SHORT, clock=ticking())
    assert plain.compiled is None
    assert "compiled" not in plain.to_dict()


def test_a_model_that_does_not_compile_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ModelError, match="LlamaForCausalLM does not compile with a static cache, .* without"):
        run.measure({"model": model}, COMPILED)


def test_a_model_is_fused_where_that_is_asked_for(compressed_folder: Path) -> None:
    model = eckart.load(compressed_folder)
    options: dict[str, Any] = {"prompt_tokens": 9, "new_tokens": 3, "runs": 3, "warmup": 1, "loads": 0}
    assert not eckart.bench(model, **options).options.fused
    assert not fusing.is_fused(model)
    assert eckart.bench(model, fuse=True, **options).options.fused
    assert fusing.is_fused(model)
