"""Training from scratch: in one call and one command, what is written, how a run goes on, what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

import eckart
from eckart import hub, models
from eckart.adapt import tune
from eckart.adapt.session import work_folder
from eckart.adapt.trainer import TuneTrainer
from eckart.cli import app
from eckart.errors import ConfigError, ModelError, RankError, StoreError
from eckart.scratch import pretraining
from eckart.scratch.persuasion import Persuasion
from eckart.scratch.pretraining import Pretraining

from . import adapters, tiny, tuning
from .conftest import logits, reload

pytestmark = adapters.QUIET
SMALL: dict[str, Any] = {
    "keep": 0.6, "of": "linears", "steps": 8, "batch": 4, "micro": 4, "seq_len": 32, "evaluations": 4,
    "eval_limit": 8, "rate": 1e-2, "precision": "float32",
}  # fmt: skip
PENALTY = Persuasion("tail", 0.1, keep=0.4, every=3)


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny.build("llama").config.save_pretrained(folder)
    return folder


class Cut(Exception):
    """An interruption."""


def test_a_folder_that_loads_everywhere(config_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model, done = eckart.pretrain(config_folder, data=str(text_file), vocabulary=300, out=out, **SMALL)
    loaded = reload(out)
    tokenizer = hub.load_tokenizer(str(out))
    assert loaded.config.vocab_size == len(tokenizer) == done.vocabulary <= 300
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    ids = tiny.tokens() % len(tokenizer)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert done.tuned.end.loss < done.tuned.prospect.start.loss - 0.5
    assert done.parameters == models.parameter_count(loaded) < done.dense
    assert done.ranks == {name: module.rank for name, module in models.low_rank_modules(model).items()}
    assert len(done.ranks) == 14
    report = json.loads((out / "eckart.json").read_text())["pretrained"]
    assert report["tuned"]["end"]["loss"] == done.tuned.end.loss
    assert report["settings"]["keep"] == 0.6
    card = (out / "README.md").read_text()
    assert "import eckart" in card
    assert f"{done.parameters:,} parameters, {done.parameters / done.dense:.1%} of full rank" in card
    assert not (out / "spectra.png").exists()
    assert not work_folder(out).exists()


def test_full_rank_needs_no_eckart(config_folder: Path, text_file: Path, tmp_path: Path) -> None:
    given = {key: value for key, value in SMALL.items() if key not in ("keep", "of")}
    _, done = eckart.pretrain(
        config_folder, data=str(text_file), vocabulary=257, out=tmp_path / "out", dtype="bfloat16", **given
    )
    assert done.ranks == {}
    assert done.parameters == done.dense
    loaded = reload(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "import eckart" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_an_interrupted_run_goes_on_to_the_same_result(
    form: str, config_folder: Path, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    settings = Pretraining(
        data=(str(text_file),), form=form, dense_steps=4, penalty=PENALTY,  # type: ignore[arg-type]
        **SMALL | {"keep": 0.8},
    )  # fmt: skip

    def run(name: str, watch: Any) -> Any:
        return eckart.pretrain(
            config_folder, settings, work=tmp_path / name, tokenizer=tokenizer, watch=watch
        )

    whole, done = run("whole", lambda *seen: None)
    assert len(done.switched.projected) >= 2 * len(done.ranks)
    expected = dict(whole.named_parameters())
    for cut in (4, 6):  # before the switch, and after it
        name = f"cut-{cut}"

        def stop(stage: str, at: int, of: int, cut: int = cut) -> None:
            if (stage, at) == ("train", cut):
                raise Cut

        seen: list[int] = []

        def note(stage: str, at: int, of: int, seen: list[int] = seen) -> None:
            if stage == "train":
                seen.append(at)

        with pytest.raises(Cut):
            run(name, stop)
        again, other = run(name, note)
        assert min(seen) == cut - 1
        for key, value in again.named_parameters():
            assert torch.allclose(value, expected[key], atol=1e-6), key
        assert torch.allclose(logits(again, tiny.tokens()), logits(whole, tiny.tokens()), atol=1e-5)
        for (step, loss), (same, own) in zip(other.tuned.curve, done.tuned.curve, strict=True):
            assert step == same
            assert loss == pytest.approx(own, abs=1e-5)
        assert [step["step"] for step in other.tuned.decline["steps"]] == [0, 2, 4, 6, 8]
        assert other.tuned.best >= 4
        # What came after the switch in the first run is not known to the second.
        assert (other.switched is None) == (cut > 5)


def test_a_state_from_before_the_switch_is_never_chosen(
    config_folder: Path, text_file: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[int, float]] = []
    real = TuneTrainer.evaluate

    def seen(self: TuneTrainer, *args: Any, **kwargs: Any) -> Any:
        found = real(self, *args, **kwargs)
        chosen.append((self.state.global_step, found["eval_chosen"]))
        return found

    monkeypatch.setattr(TuneTrainer, "evaluate", seen)
    _, done = eckart.pretrain(
        config_folder, data=str(text_file), dense_steps=5, work=tmp_path / "work", tokenizer=tokenizer,
        **SMALL | {"keep": 0.1},
    )  # fmt: skip
    assert [step for step, value in chosen if value < float("inf")] == [6, 8]
    assert done.tuned.best in (6, 8)


def test_the_penalty_ends_with_the_steps_at_full_rank() -> None:
    late = replace(PENALTY, until=31)
    assert Pretraining(keep=0.5, dense_steps=30, penalty=late).tuning().penalty == late
    with pytest.raises(ConfigError, match=r"penalty: until 31: must be a whole number in \[1, 30\]"):
        Pretraining(keep=0.5, dense_steps=30, penalty=late, form="pivoted")
    made = Pretraining(keep=0.5, dense_steps=30, penalty=PENALTY).tuning()
    assert made.penalty is not None
    assert made.penalty.until == 30
    assert Pretraining(keep=0.5, penalty=PENALTY).tuning().penalty == PENALTY


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, ConfigError, "no data: give at least one source"),
        ({"keep": 0.5, "rank": 4}, ConfigError, "give exactly one"),
        ({"dense_steps": 4}, ConfigError, "dense_steps 4: nothing is low-rank; give keep or rank"),
        ({"exclude": "v_proj"}, ConfigError, "exclude .*: nothing is low-rank"),
        ({"rank": 16}, RankError, "above break-even"),
        ({"tokenizer": "x", "vocabulary": 300}, ConfigError, "one is taken, the other is trained"),
        ({"vocabulary": 12}, ConfigError, "vocabulary 12: must be a whole number of at least 257"),
        ({"keeep": 0.5}, ConfigError, "unknown key 'keeep': did you mean 'keep'"),
        ({"penalty": {"kind": "tail", "strength": 1.0}}, ConfigError, "keep None with penalty 'tail'"),
        ({"dtype": "int4"}, ConfigError, "dtype 'int4'"),
        ({"frobenius": -1}, ConfigError, "frobenius -1"),
    ],
)
def test_what_cannot_be_done_is_refused(
    given: dict[str, Any], error: type[Exception], match: str, config_folder: Path, tokenizer: Any,
    text_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    data = {} if given == {} else {"data": str(text_file)}
    own: dict[str, Any] = {} if given.keys() & {"tokenizer", "vocabulary"} else {"tokenizer": tokenizer}
    with pytest.raises(error, match=match):
        eckart.pretrain(config_folder, work=tmp_path / "work", **own | {"seq_len": 32} | data | given)


def test_what_the_folders_lack_is_said(
    config_folder: Path, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": str(text_file), "keep": 0.5}
    with pytest.raises(ModelError, match=r"no tokenizer at .*: name one \(tokenizer\), or have one trained"):
        eckart.pretrain(config_folder, work=tmp_path / "work", **given)
    with pytest.raises(ConfigError, match="neither out nor work"):
        eckart.pretrain(config_folder, tokenizer=tokenizer, **given)
    with pytest.raises(ConfigError, match=r"got settings and keep, data|got settings and data, keep"):
        eckart.pretrain(config_folder, Pretraining(), work=tmp_path / "work", **given)
    small = copy.deepcopy(tiny.build("llama").config)
    small.vocab_size = 100
    with pytest.raises(ConfigError, match=r"the tokenizer has 258 tokens and the config a vocab_size of 100"):
        eckart.pretrain(small, work=tmp_path / "work", tokenizer=tokenizer, **given)
    with pytest.raises(ConfigError, match="got a tokenizer, and settings that name 300: give one"):
        eckart.pretrain(config_folder, work=tmp_path / "work", tokenizer=tokenizer, vocabulary=300, **given)
    with pytest.raises(ModelError, match=f"no tokenizer at {config_folder}"):
        eckart.pretrain(config_folder, work=tmp_path / "work", tokenizer=config_folder, **given)
    with pytest.raises(StoreError, match="choose another --out"):
        eckart.pretrain(config_folder, out=config_folder, tokenizer=tokenizer, **given)


def test_settings_of_a_mapping_are_those_of_a_recipe() -> None:
    values: dict[str, Any] = {
        "data": "text.txt", "rank": 3, "exclude": ["v_proj"], "overrides": [{"match": "q", "dense": True}],
        "penalty": {"kind": "nuclear", "strength": 0.5, "include": "mlp.*"},
    }  # fmt: skip
    made = pretraining.from_mapping(values)
    structure = made.structure()
    assert structure is not None
    assert (structure.rank, structure.exclude, structure.overrides[0].match) == (3, ("v_proj",), "q")
    assert made.tuning().data == ("text.txt",)
    assert made.penalty == Persuasion("nuclear", 0.5, include=("mlp.*",))


def invoke(command: str, *arguments: object) -> Any:
    return CliRunner().invoke(app, [command, *(str(argument) for argument in arguments)])


OPTIONS = (
    "--steps", 6, "--batch", 4, "--micro", 4, "--seq-len", 32, "--evaluations", 3, "--eval-limit", 8,
    "--precision", "float32",
)  # fmt: skip


def test_the_command_writes_what_it_says(config_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pretrain: {keep: 0.9, of: linears, penalty: {kind: tail, keep: 0.3, strength: 5}}\n")
    out = tmp_path / "out"
    given = ("--data", text_file, "--recipe", recipe, "--vocabulary", 280, "--dense-steps", 4, "--out", out)
    done = invoke("pretrain", config_folder, *given, "--keep", 0.5, "--strength", 0.1, *OPTIONS, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["keep"] == 0.5
    assert found["settings"]["penalty"] == {**found["settings"]["penalty"], "strength": 0.1, "keep": 0.3}
    assert (out / "spectra.png").stat().st_size > 10_000
    assert "![decline of the spectra](spectra.png)" in (out / "README.md").read_text()
    bare = (config_folder, *given[:2], "--vocabulary", 280, *OPTIONS)
    table = invoke("pretrain", *bare, "--out", tmp_path / "o")
    assert table.exit_code == 0, table.output
    assert "perplexity" in table.stdout
    assert "written to" in table.stdout
    refused = invoke("pretrain", *bare, "--out", out)
    assert refused.exit_code == 2
    assert "exists: choose another --out" in " ".join(refused.stderr.split())
    assert not list(tmp_path.glob(".*"))


def test_full_tuning_takes_a_penalty_and_adapters_do_not(llama_folder: Path, tmp_path: Path) -> None:
    data, out = tuning.data(tmp_path), tmp_path / "out"
    given = (llama_folder, "--data", data, *OPTIONS, "--hold", 0.2, "--out", out)
    penalty = ("--penalty", "nuclear", "--strength", 0.1, "--schedule", "cosine")
    refused = invoke("tune", *given, *penalty)
    assert refused.exit_code == 2
    assert "which method lora leaves as they are: use method full" in " ".join(refused.stderr.split())
    galore = invoke("tune", *given, "--optimizer", "galore_adamw")
    assert galore.exit_code == 2
    assert "optimizer 'galore_adamw' is for method full" in " ".join(galore.stderr.split())
    alone = invoke("tune", *given, "--method", "full", "--penalty", "nuclear")
    assert alone.exit_code == 2
    assert "strength" in alone.stderr
    done = invoke("tune", *given, "--method", "full", *penalty)
    assert done.exit_code == 0, done.output
    assert (out / "spectra.png").stat().st_size > 10_000
    decline = json.loads((out / "eckart.json").read_text())["tuned"]["decline"]
    assert [entry["step"] for entry in decline["steps"]] == [0, 2, 4, 6]


def test_galore_is_transformers_own(
    llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tuning.settings(
        tuning.data(tmp_path), method="full", optimizer="galore_adamw", optimizer_args="rank=4", steps=2
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r"optimizer 'galore_adamw' needs GaLore: pip install galore-torch"):
        tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    path = tuning.data(tmp_path)
    with pytest.raises(ConfigError, match="optimizer 'galore_adamw' is for method full, not for lora"):
        tuning.settings(path, optimizer="galore_adamw")
    with pytest.raises(ConfigError, match=r"optimizer_args 'rank=4': they are for the GaLore"):
        tuning.settings(path, method="full", optimizer_args="rank=4")


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
def test_galore_projects_the_blocks_and_goes_on_to_the_same_bits(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("galore_torch")
    chosen = tuning.settings(
        tuning.data(tmp_path), method="full", optimizer="galore_adamw", optimizer_args="rank=4", rate=1e-2
    )
    groups: list[Any] = []

    class Seen(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            groups[:] = [
                (group.get("rank"), [optimizer.state[one]["exp_avg"].shape for one in group["params"]])
                for group in optimizer.param_groups
            ]

    loaded = [tuning.loaded(llama, tokenizer) for _ in range(2)]
    whole, done = tune.tune(loaded[0], chosen, work=tmp_path / "whole", callbacks=[Seen()])
    assert [rank for rank, _ in groups] == [None, 4]
    assert len(groups[1][1]) == 14
    assert all(min(shape) == 4 for shape in groups[1][1])
    assert done.end.loss < done.prospect.start.loss

    def stop(stage: str, at: int, of: int) -> None:
        if (stage, at) == ("train", 5):
            raise Cut

    with pytest.raises(Cut):
        tuning.run(llama, tokenizer, chosen, tmp_path / "cut", watch=stop)
    again, _ = tune.tune(loaded[1], chosen, work=tmp_path / "cut")
    expected = tuning.trained(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in tuning.trained(again.model).items())
