"""A LoRA out of a fine-tuned model: exact at the rank of the difference, streamed, checked before work."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

import eckart
from eckart import ConfigError, ModelError, NotFinite, RankError, StoreError, hub, models
from eckart.adapt import checkpoints, extract, store

from . import adapters, tiny
from .adapters import differ
from .conftest import logits, reload

pytestmark = adapters.QUIET
RANK = 3
Change = Callable[[str, nn.Parameter], torch.Tensor | None]


def random(shape: Any, seed: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(seed.encode())))


def of_rank(rank: int, size: float = 0.1) -> Change:
    """Change every matrix of the blocks by a random one of `rank`."""

    def change(name: str, value: nn.Parameter) -> torch.Tensor | None:
        if "layers" not in name or value.ndim != 2:
            return None
        left, right = (
            random(shape, name + part)
            for part, shape in (("l", (value.shape[0], rank)), ("r", (rank, value.shape[1])))
        )
        return size * left @ right

    return change


def full(name: str, value: nn.Parameter) -> torch.Tensor | None:
    """Change everything a little, in every direction."""
    return 0.05 * random(value.shape, name)


@torch.no_grad()
def tuned(model: Any, *changes: Change) -> Any:
    other = copy.deepcopy(model)
    for name, value in other.named_parameters():
        for change in changes:
            by = change(name, value)
            if by is not None:
                value.add_(by)
    return other


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    def save(name: str, model: Any) -> Path:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "phi3", "gpt-neox", "opt", "gemma2", "qwen3"])
def test_it_is_exact_where_the_difference_has_that_rank(
    name: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Base and adapter, in plain PEFT, are the tuned model; norms and biases go along."""

    def small(name: str, value: nn.Parameter) -> torch.Tensor | None:
        return 0.1 * random(value.shape, name) if value.ndim == 1 else None

    model = tiny.build(name)
    other, tokens = tuned(model, of_rank(RANK), small), tiny.tokens()
    base = saved("base", model)
    adapter, done = eckart.extract(base, saved("tuned", other), rank=RANK, out=tmp_path / "out")
    assert {one.rank for one in adapter.factors.values()} == {RANK}
    assert done.error < 1e-6
    again = adapters.load(reload(base), tmp_path / "out")
    assert differ(logits(again, tokens), logits(other, tokens)) < 2e-5
    assert differ(logits(model, tokens), logits(other, tokens)) > 1e-2
    merged, _ = eckart.merge(base, tmp_path / "out")
    assert differ(logits(merged, tokens), logits(other, tokens)) < 2e-5


def test_every_matrix_is_the_eckart_young_optimum(saved: Callable[..., Path]) -> None:
    model = tiny.build("llama")
    other = tuned(model, full)
    adapter, done = eckart.extract(saved("base", model), saved("tuned", other), rank=RANK, carry="none")
    assert not adapter.extras
    for row in done.rows:
        own, now = (models.find(one, row.name).weight.detach().double() for one in (model, other))
        values = torch.linalg.svdvals(now - own)
        assert float((now - own - adapter.delta(row.name)).norm()) == pytest.approx(
            float(values[RANK:].norm()), rel=1e-5
        )
        assert row.error == pytest.approx(float(values[RANK:].norm() / values.norm()), rel=1e-5)
        assert row.change == pytest.approx(float((now - own).norm() / own.norm()))
    assert len(done.rows) == 14
    assert (done.weighted, done.before, done.after) == (None, None, None)


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.6}, {"params": 1500}])
def test_weighted_by_its_inputs_no_output_error_is_larger(
    saved: Callable[..., Path], text_file: Path, options: dict[str, Any]
) -> None:
    """At the ranks that the weighted extraction chose, measured on the very text, independently."""
    model = tiny.build("llama")
    base, other = saved("base", model), saved("tuned", tuned(model, full))
    text: dict[str, Any] = {"text": text_file, "tokens": 512, "eval_tokens": 192, "seq_len": 64}
    aware, done = eckart.extract(base, other, carry="none", damp=0.0, **options, **text)
    rows = adapters.reading(text_file, hub.load_tokenizer(str(base)), 512, 192, 64).calibration
    assert rows is not None
    inputs = adapters.inputs(model, [row.name for row in done.rows], rows)
    now = reload(other)
    for row in done.rows:
        own, tuned_ = (models.find(one, row.name).weight.detach().double() for one in (model, now))
        change = tuned_ - own
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        plain = left[:, : row.rank] * values[: row.rank] @ right[: row.rank]
        found = aware.delta(row.name) if row.rank else torch.zeros_like(change)
        errors = [
            float((inputs[row.name] @ part.T).norm()) for part in (change - plain, change - found, change)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-4)
        assert row.weighted == pytest.approx(errors[1] / errors[2], rel=1e-3, abs=1e-5)


def test_quality_is_that_of_base_and_adapter_against_the_tuned_model(
    saved: Callable[..., Path], text_file: Path
) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    _, done = eckart.extract(
        base, other, rank=64, carry="all", eval_text=text_file, eval_tokens=192, seq_len=64
    )
    assert done.before is not None
    assert done.after is not None
    found = eckart.evaluate(base, text_file, against=other, tokens=192, seq_len=64)
    assert done.before == found
    assert done.after.kl == pytest.approx(0, abs=1e-6)
    assert done.before.kl > 1e-2
    assert done.weighted is None
    assert "base and adapter" in str(done)


def test_the_noise_threshold_finds_the_rank_of_each_matrix(saved: Callable[..., Path]) -> None:
    model = tiny.build("llama", hidden_size=64, intermediate_size=96)

    def noise(name: str, value: nn.Parameter) -> torch.Tensor | None:
        return 1e-3 * random(value.shape, name)

    other = tuned(model, of_rank(2), noise)
    adapter, done = eckart.extract(saved("base", model), saved("tuned", other), noise=True)
    assert {row.rank for row in done.rows} == {2}
    assert {one.rank for one in adapter.factors.values()} == {2}
    with pytest.raises(
        ModelError, match="every one of 14 differences has rank 0 by this rule: choose a rank"
    ):
        eckart.extract(saved("base", model), saved("tuned", tuned(model, noise)), noise=True, carry="none")


@pytest.mark.parametrize("limit", [300, 2000])
def test_a_budget_is_kept(saved: Callable[..., Path], limit: int) -> None:
    model = tiny.build("llama")
    base, other = saved("base", model), saved("tuned", tuned(model, full))
    adapter, done = eckart.extract(base, other, params=limit, carry="none")
    assert limit - 96 < done.parameters == adapter.parameters <= limit
    with pytest.raises(
        RankError, match="a budget of 47 parameters holds no term of any matrix: the least is"
    ):
        eckart.extract(base, other, params=47)


def test_tensors_are_read_one_pair_at_a_time_and_no_model_is_loaded(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    reads = counted(monkeypatch)
    monkeypatch.setattr(hub, "load", forbidden)
    adapter, done = eckart.extract(base, other, energy=0.5, carry="none")
    assert sorted(reads[str(base)]) == sorted(reads[str(other)])
    assert len(reads[str(base)]) == len(set(reads[str(base)])) == 14 + 6
    assert done.unchanged == 0
    assert adapter.factors


def test_a_budget_reads_matrices_twice_and_nothing_else(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    reads = counted(monkeypatch)
    eckart.extract(base, other, params=1000, carry="none")
    assert len(reads[str(base)]) == 2 * 14 + 6


def pair() -> dict[str, Any]:
    model = tiny.build("llama")
    return {"base": model, "tuned": tuned(model, full)}


def forbidden(*given: Any, **options: Any) -> Any:
    raise AssertionError("a model was loaded or a tensor read")


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Let every checkpoint that is opened from now on note what is read from it."""
    reads: dict[str, list[str]] = {}
    plain = checkpoints.open_checkpoint

    def opened(source: str | Path, *, trust_remote_code: bool = False) -> checkpoints.Checkpoint:
        found = plain(source, trust_remote_code=trust_remote_code)
        assert found.how == "files"

        def read(name: str) -> torch.Tensor:
            reads.setdefault(str(source), []).append(name)
            return found.read(name)

        return replace(found, read=read)

    monkeypatch.setattr(checkpoints, "open_checkpoint", opened)
    return reads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 260},
            r"vocabularies of 258 and 260 tokens \(an adapter cannot add tokens: resize_tok",
        ),
        (
            {"intermediate_size": 64},
            r"of different shapes: model.layers.0.*down_proj.weight 32 x 48 and 32 x",
        ),
        ({"num_hidden_layers": 3}, r"only in the tuned: model.layers.2.* and 4 more"),
        ({"num_hidden_layers": 1}, "only in the base: model.layers.1"),
        ({"attention_bias": True}, "only in the tuned: model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_a_tensor_is_read(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    base, other = saved("base", tiny.build("llama")), saved("tuned", tiny.build("llama", **changes))
    reads = counted(monkeypatch)
    with pytest.raises(ModelError, match=f"base and .*tuned do not fit: .*{message}"):
        eckart.extract(base, other, rank=2)
    assert not reads


def test_tensors_under_old_names_are_found(saved: Callable[..., Path]) -> None:
    """What transformers renames on loading is loaded, the sum of all sizes being the same."""
    model = tiny.build("gpt-neox")
    base, other = saved("base", model), saved("tuned", tuned(model, of_rank(2)))
    assert "embed_out.weight" in checkpoints.open_checkpoint(base).shapes
    _, done = eckart.extract(base, other, rank=2)
    assert done.error < 1e-6
    assert sum("was loaded whole: its files do not hold tensors under" in line for line in done.warnings) == 2


def test_a_base_that_lacks_tensors_is_refused(saved: Callable[..., Path]) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"base does not hold every .* \(model.layers.0.mlp.up_proj.weight is"
    ):
        eckart.extract(base, other, rank=2)


def test_numbers_that_are_no_weights_are_refused(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    plain = checkpoints.open_checkpoint

    def narrow(source: str | Path, *, trust_remote_code: bool = False) -> checkpoints.Checkpoint:
        found = plain(source, trust_remote_code=trust_remote_code)
        return replace(found, dtypes=dict.fromkeys(found.dtypes, "F8_E4M3"), read=forbidden)

    monkeypatch.setattr(checkpoints, "open_checkpoint", narrow)
    with pytest.raises(ModelError, match=r"not floating-point: .*weight F8_E4M3"):
        eckart.extract(base, other, rank=2)


@pytest.mark.parametrize("carry", ["all", "small", "none"])
@pytest.mark.parametrize("name", ["llama", "llama-bias-untied"])
def test_what_is_carried_is_in_the_adapter_and_the_rest_is_named(
    saved: Callable[..., Path], tmp_path: Path, carry: extract.Carry, name: str
) -> None:
    """At full rank `all` is the tuned model, with tied embeddings too."""
    model = tiny.build(name)
    other, tokens = tuned(model, full), tiny.tokens()
    base = saved("base", model)
    adapter, done = eckart.extract(base, saved("tuned", other), rank=64, carry=carry, out=tmp_path / "out")
    carried = {one.name for one in done.others if one.carried}
    assert carried <= set(adapter.extras)
    table = "model.embed_tokens.weight"
    assert ((table in carried), ("model.norm.weight" in carried)) == (carry == "all", carry != "none")
    distance = differ(logits(adapters.load(reload(base), tmp_path / "out"), tokens), logits(other, tokens))
    assert (distance < 2e-5) is (carry == "all")
    left = [one for one in done.others if not one.carried]
    said = [
        line for line in done.warnings if "tensors differ and are not in the adapter, most of all" in line
    ]
    assert len(said) == (1 if left else 0)
    if left:
        worst = max(left, key=lambda one: one.change)
        assert f"{len(left)} tensors differ" in said[0]
        assert worst.name in said[0]


def test_a_head_that_was_untied_by_tuning_is_carried(saved: Callable[..., Path], tmp_path: Path) -> None:
    model, tokens = tiny.build("llama"), tiny.tokens()
    other = tiny.build("llama", tie_word_embeddings=False)
    other.load_state_dict(model.state_dict())
    other = tuned(other, of_rank(2), lambda name, value: full(name, value) if "lm_head" in name else None)
    base = saved("base", model)
    _, done = eckart.extract(base, saved("tuned", other), rank=2, carry="all", out=tmp_path / "out")
    assert [one.name for one in done.others] == ["lm_head.weight"]
    merged, _ = eckart.merge(base, tmp_path / "out", out=tmp_path / "merged")
    wanted = logits(other, tokens)
    assert differ(logits(merged, tokens), wanted) < 2e-5
    assert differ(logits(reload(tmp_path / "merged"), tokens), wanted) < 2e-5


def test_the_factors_are_in_the_dtype_of_the_tuned_model_or_the_one_asked_for(
    saved: Callable[..., Path],
) -> None:
    made = pair()
    base = saved("base", made["base"])
    other = saved("tuned", made["tuned"].to(torch.bfloat16))
    adapter, done = eckart.extract(base, other, rank=2)
    assert done.dtype == "bfloat16"
    assert {one.left.dtype for one in adapter.factors.values()} == {torch.bfloat16}
    assert (
        "the base is stored in float32 and the tuned in bfloat16: the difference holds the rounding"
        in str(done.warnings)
    )
    adapter, done = eckart.extract(base, other, rank=2, dtype="float32")
    assert {one.left.dtype for one in adapter.factors.values()} == {torch.float32}


def test_ranks_without_use_are_said(saved: Callable[..., Path]) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    _, done = eckart.extract(base, other, rank=40)
    assert any(
        "rank 40 is above min(m, n) of 14 matrices: they got their full" in one for one in done.warnings
    )
    assert any("14 updates have as many parameters as their dense matrix" in one for one in done.warnings)


def test_what_is_written_says_what_was_done(saved: Callable[..., Path], tmp_path: Path) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    adapter, done = eckart.extract(base, other, rank=2, out=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {store.CONFIG, store.WEIGHTS, "README.md", "eckart.json"}
    assert done.file_bytes == (tmp_path / "out" / store.WEIGHTS).stat().st_size
    report = json.loads((tmp_path / "out" / "eckart.json").read_text())["extracted"]
    assert report["file_bytes"] == done.file_bytes
    assert report["parameters"] == adapter.parameters == store.read(tmp_path / "out").parameters
    card = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "base", "adapter")
    assert "rank at most 2" in card
    assert store.read(tmp_path / "out").base == str(base)


def test_a_bias_from_zero_is_no_number_in_json(saved: Callable[..., Path]) -> None:
    model = tiny.build("llama-bias-untied")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.zero_()
    _, done = eckart.extract(saved("base", model), saved("tuned", tuned(model, full)), rank=1)
    assert json.loads(json.dumps(done.to_dict(), allow_nan=False))["others"]
    assert "from zero" in str(done)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ConfigError, "got no rule for ranks: give exactly one of rank, energy, a budget or"),
        ({"rank": 2, "noise": True}, ConfigError, "got rank and noise: give exactly one"),
        ({"rank": 2, "carry": "some"}, ConfigError, "carry 'some': legal are all, small, none"),
        ({"rank": 2, "dtype": "int8"}, ConfigError, "dtype 'int8': legal are float32, bfloat16, float16"),
        ({"rank": 0}, RankError, "rank 0: must be at least 1"),
    ],
)
def test_options_that_are_not_legal_are_refused_before_anything_is_opened(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        eckart.extract("none", "none", **options)


def test_models_that_do_not_differ_give_no_adapter(saved: Callable[..., Path]) -> None:
    model = tiny.build("llama")
    base = saved("base", model)
    with pytest.raises(ModelError, match="no adapter comes of it: the two models are equal"):
        eckart.extract(base, base, rank=2)
    norms = tuned(model, lambda name, value: full(name, value) if value.ndim == 1 else None)
    with pytest.raises(ModelError, match="no matrix differs; 5 other tensors do, which alone make no LoRA"):
        eckart.extract(base, saved("norms", norms), rank=2)


def test_bases_that_have_no_dense_weights_are_refused(
    saved: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    model = tiny.build("llama")
    base = saved("base", model)
    small = adapters.compressed(tmp_path / "small", model, tokenizer)
    with pytest.raises(ModelError, match="is already stored as 'eckart': eckart.densify it first"):
        eckart.extract(small, base, rank=2)
    _, done = eckart.extract(base, small, rank=32)
    assert done.error < 1e-6


def test_what_is_no_number_is_refused(saved: Callable[..., Path]) -> None:
    made = pair()
    with torch.no_grad():
        made["tuned"].model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match="layers.1.mlp.up_proj.weight is NaN or infinite in one of the two"):
        eckart.extract(saved("base", made["base"]), saved("tuned", made["tuned"]), rank=2)


def test_an_output_folder_that_exists_is_not_touched(saved: Callable[..., Path], tmp_path: Path) -> None:
    base, other = (saved(name, one) for name, one in pair().items())
    with pytest.raises(StoreError, match="base is where the model comes from: choose another"):
        eckart.extract(base, other, rank=2, out=base, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(StoreError, match="out exists: choose another --out, or pass --overwrite"):
        eckart.extract(base, other, rank=2, out=tmp_path / "out")
    with pytest.raises(StoreError, match="is not a model folder: --overwrite will not replace it"):
        eckart.extract(base, other, rank=2, out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "x"
