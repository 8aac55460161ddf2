"""Accuracy on tasks: the statistics by hand and by simulation, the runs against lm_eval itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, NotFinite
from eckart.cli import app
from eckart.render import plain
from eckart.zeroshot import harness, report_tasks
from eckart.zeroshot.scores import Outcomes, TaskResult, mcnemar, of_tasks, paired, score

from .conftest import reload

FLIPS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)
SAMPLES = 14


def outcomes(values: list[float], task: str = "t", **changes: Any) -> Outcomes:
    documents = tuple(map(str, range(len(values))))
    return Outcomes(task, "1", 0, documents, {"acc": tuple(values)}, **changes)


def test_scores_are_those_of_the_textbook() -> None:
    found = score([1, 0, 1, 1])
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.25 / 4))  # s^2 = 3 * (1/4)^2 + (3/4)^2, over 3
    assert score([1.0]).standard_error is None
    with pytest.raises(ConfigError, match="no samples: raise limit"):
        score([])


@given(FLIPS)
def test_the_paired_error_is_that_of_independent_ones_less_twice_the_covariance(pairs: list[Any]) -> None:
    own, other = ([float(value) for value in side] for side in zip(*pairs))
    found = paired(own, other)
    n = len(own)
    mean_a, mean_b = sum(own) / n, sum(other) / n
    covariance = sum((a - mean_a) * (b - mean_b) for a, b in zip(own, other)) / (n - 1)
    variances = [(one.standard_error or 0) ** 2 for one in (score(own), score(other))]
    assert found.difference == pytest.approx(mean_a - mean_b)
    assert (found.standard_error or 0) ** 2 == pytest.approx(sum(variances) - 2 * covariance / n, abs=1e-12)
    gained, lost = found.gained or 0, found.lost or 0
    assert found.difference == pytest.approx((gained - lost) / n)
    backwards = paired(other, own)
    assert backwards.difference == pytest.approx(-found.difference)
    assert backwards.p == found.p


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_far_out(gained: int, lost: int) -> None:
    total = gained + lost
    far = abs(gained - lost)
    share = sum(math.comb(total, heads) for heads in range(total + 1) if abs(2 * heads - total) >= far)
    assert mcnemar(gained, lost) == pytest.approx(share / 2**total)


def test_mcnemar_of_many_is_exact_and_not_flooded() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 10) == 2 / 1024
    assert 0 < mcnemar(2_000, 2_600) < 1e-17


def test_figures_that_are_not_0_or_1_have_no_mcnemar() -> None:
    found = paired([0.5, 1.0], [0.25, 0.5])
    assert (found.gained, found.lost, found.p) == (None, None, None)
    assert found.difference == pytest.approx(0.375)


def test_the_mean_of_tasks_adds_variances() -> None:
    parts = [score([1, 0, 1, 1]), score([0, 1])]
    assert of_tasks(parts).value == pytest.approx((0.75 + 0.5) / 2)
    expected = math.sqrt(sum((part.standard_error or 0) ** 2 for part in parts)) / 2
    assert of_tasks(parts).standard_error == pytest.approx(expected)
    assert of_tasks([score([1.0]), score([1, 0])]).standard_error is None


def test_results_of_different_samples_are_not_paired() -> None:
    with pytest.raises(ConfigError, match="were run on different samples: run both with the same limit"):
        TaskResult(outcomes([1, 0]), outcomes([1]))
    with pytest.raises(ConfigError, match="2 samples of one model and 1 of the other"):
        paired([1, 0], [1])


def test_the_report_names_what_is_not_above_guessing() -> None:
    own, other = [1.0, 0.0] * 20, [1.0] * 30 + [0.0] * 10
    weak = TaskResult(outcomes(own, chance=0.5), outcomes(own, chance=0.5))
    strong = TaskResult(outcomes(own, chance=0.5), outcomes(other, chance=0.5))
    assert any("is not above guessing" in line for line in report_tasks.lines([weak]))
    assert not any("is not above guessing" in line for line in report_tasks.lines([strong]))
    text = plain(report_tasks.tasks_table([strong, weak]), width=200)
    for words in ("mean of the tasks", "75.0%", "-25.00", "gained", "McNemar"):
        assert words in text, words


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two multiple-choice tasks with local data, of two to four choices of unequal length."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(11)
    words = ["low", "rank", "matrix", "of the", "singular", "value is", "a", "sum and norm"]
    for task in ("first", "second"):
        rows = []
        for _ in range(SAMPLES):
            picks = torch.randperm(len(words), generator=generator).tolist()
            choices = [words[pick] for pick in picks[: 2 + picks[0] % 3]]
            rows.append(
                {"question": f"{words[picks[-1]]} {words[picks[-2]]}", "choices": choices, "target": 1}
            )
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "task": f"tiny_{task}", "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{target}}", "metadata": {"version": 3},
        }  # fmt: skip
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(values))
    return folder


TASKS = ["tiny_first", "tiny_second"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of tasks is cached where it vanishes with the test."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


def directly(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Return what lm_eval says when it is run as its own documentation runs it, a row at a time."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    known = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(wrapped, tasks=TASKS, task_manager=known, num_fewshot=0)


@quiet
@pytest.mark.usefixtures("cache")
def test_a_compressed_folder_gets_what_lm_eval_gives_it(
    compressed_folder: Path, llama_folder: Path, tokenizer: Any, task_folder: Path
) -> None:
    said: list[tuple[int, int]] = []
    found = eckart.evaluate(
        compressed_folder, tasks="tiny_first,tiny_second", task_path=task_folder, against=llama_folder,
        batch=5, watch=lambda done, total: said.append((done, total)),
    )  # fmt: skip
    assert found.language is None
    assert {done == total for done, total in said[-1:]} == {True}
    pad = tokenizer.pad_token
    for which, folder in (("scores", compressed_folder), ("reference_scores", llama_folder)):
        expected = directly(reload(folder), reload_tokenizer(folder), task_folder)
        for result in found.tasks:
            own = getattr(result, which)
            figures = expected["results"][result.model.task]
            for metric in ("acc", "acc_norm"):
                assert own[metric].value == pytest.approx(figures[f"{metric},none"])
                assert own[metric].standard_error == pytest.approx(figures[f"{metric}_stderr,none"])
    assert tokenizer.pad_token == pad
    first = found.tasks[0]
    assert first.model.version == "3"
    assert len(first.model.documents) == SAMPLES
    assert 0.25 < (first.model.chance or 0) < 0.5
    # The comparison would tell another model: of opposite logits, the choice is another one.
    other = reload(llama_folder)
    with torch.no_grad():
        other.get_decoder().norm.weight.neg_()
    opposite = eckart.evaluate(
        other, tasks=TASKS, task_path=task_folder, tokenizer=reload_tokenizer(llama_folder)
    )
    for result, turned in zip(found.tasks, opposite.tasks):
        assert result.reference is not None
        assert turned.model.documents == result.reference.documents
        assert turned.model.values != result.reference.values


def reload_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@quiet
@pytest.mark.usefixtures("cache")
def test_a_limit_is_the_first_samples(llama_folder: Path, task_folder: Path) -> None:
    limit = SAMPLES // 2
    model, tokenizer = reload(llama_folder), reload_tokenizer(llama_folder)
    known = harness.manager(TASKS[:1], task_folder)
    (part,) = harness.run(model, tokenizer, TASKS[:1], known, limit=limit)
    (whole,) = harness.run(model, tokenizer, TASKS[:1], known)
    assert part.documents == whole.documents[:limit]
    assert part.values["acc"] == whole.values["acc"][:limit]


@quiet
@pytest.mark.usefixtures("cache")
def test_the_command_prints_tasks_beside_perplexity_and_records_them(
    compressed_folder: Path, llama_folder: Path, task_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "small"
    shutil.copytree(compressed_folder, folder)
    arguments = ["eval", folder, "--tasks", ",".join(TASKS), "--task-path", task_folder,
                 "--against", llama_folder,
                 "--text", text_file, "--tokens", 640, "--seq-len", 64, "--limit", 8]  # fmt: skip
    invoke = CliRunner().invoke
    found = invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    for words in ("KL(reference || model)", "tiny_second", "acc_norm", "mean of the tasks", "McNemar"):
        assert words in found.output, words
    before = (folder / "README.md").read_text()
    assert "accuracy on tasks (`eckart eval" in before
    for _ in range(2):
        found = invoke(app, [*(str(argument) for argument in arguments), "--record", "--json"])
        assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)["result"]
    assert values["language"]["model"]["predicted"] == 630
    task = values["tasks"][0]
    assert task["samples"] == len(task["outcomes"]["acc"]) == 8
    assert task["differences"]["acc"]["difference"] == pytest.approx(
        task["scores"]["acc"]["value"] - task["reference"]["acc"]["value"]
    )
    card = (folder / "README.md").read_text()
    assert card.count("## Evaluated against llama") == 1
    assert "accuracy on tasks (`eckart eval" not in card
    from huggingface_hub import ModelCard

    known = {
        (one.dataset_name, one.metric_name): one.metric_value for one in ModelCard(card).data.eval_results
    }
    assert known["tiny_first", "acc"] == task["scores"]["acc"]["value"]
    assert len(json.loads((folder / "eckart.json").read_text())["evaluated"]) == 1


@quiet
@pytest.mark.usefixtures("cache")
def test_wrong_tasks_and_options_are_named(llama_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = reload(llama_folder), reload_tokenizer(llama_folder)
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (["tiny_frist"], {}, r"no task 'tiny_frist': did you mean tiny_first"),
        ([], {}, "no tasks: name one"),
        (TASKS, {"limit": 0}, "limit 0: must be at least 1"),
        (TASKS, {"batch": 0}, "batch 0: must be at least 1"),
        (TASKS, {"shots": -1}, "shots -1: must be at least 0"),
    ]
    for wanted, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            eckart.evaluate(model, tasks=wanted, tokenizer=tokenizer, task_path=task_folder, **options)
    with pytest.raises(ConfigError, match="no folder .*nowhere: task_path is a folder"):
        eckart.evaluate(model, tasks=TASKS, tokenizer=tokenizer, task_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither text nor tasks"):
        eckart.evaluate(model, tokenizer=tokenizer)  # type: ignore[call-overload]
    gone = yaml.safe_load((task_folder / "first.yaml").read_text())
    gone["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "gone.jsonl")}}
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(gone | {"task": "gone"}))
    with pytest.raises(ConfigError, match="the task gone cannot be run .*: its data must be cached"):
        eckart.evaluate(model, tasks="gone", tokenizer=tokenizer, task_path=tmp_path)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    known = harness.manager(TASKS, task_folder)
    with pytest.raises(NotFinite, match="there is no accuracy"):
        harness.run(model, tokenizer, TASKS, known)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'eckart\[tasks\]'"):
        eckart.evaluate(llama_folder, tasks="arc_easy")
    found = CliRunner().invoke(app, ["eval", str(llama_folder)])
    assert found.exit_code == 2
    assert "neither --text nor --tasks" in found.output
