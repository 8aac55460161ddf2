"""Merging: exact where weights are dense, the best map of the same rank where they are not, else refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn

import eckart
from eckart import ModelError, StoreError, measure, models, plugin
from eckart.adapt import quantised, store
from eckart.adapt.store import Adapter, Factors, Nf4
from eckart.embeddings import build_embedding, tied_head
from eckart.factors import FactoredLinear, Form, LowRank, NarrowLinear
from eckart.linalg import truncated_svd

from . import adapters, tiny, wards
from .adapters import VARIANTS, Variant, differ
from .conftest import logits, reload

pytestmark = adapters.QUIET
CLOSE = 2e-5
FORMS: tuple[Form, ...] = ("factored", "pivoted")
QUERY = "model.layers.0.self_attn.q_proj"


def trained(model: Any, variant: Variant, folder: Path) -> Any:
    """Return PEFT's model, whose adapter is in `folder`."""
    made = adapters.wrap(model, variant.config())
    adapters.save(made, folder)
    return made


def cut(dense: Any, rank: int = 8, form: Form = "factored") -> Any:
    model = wards.cut(dense, rank, form)
    plugin.mark(model)
    return model


def dense_map(model: Any, name: str) -> torch.Tensor:
    """Return the matrix of the module `name`, in float64."""
    module = copy.deepcopy(model.get_submodule(name)).double()
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    found: torch.Tensor = module.map().dense()
    return found


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_merged_is_unmerged(variant: Variant, tmp_path: Path, tokenizer: Any) -> None:
    """In memory, and written and loaded by plain transformers."""
    model, tokens = adapters.base(variant), tiny.tokens()
    wanted = logits(trained(model, variant, tmp_path / "adapter"), tokens)
    assert differ(logits(model, tokens), wanted) > 1e-2
    merged, done = eckart.merge(model, tmp_path / "adapter", out=tmp_path / "out", tokenizer=tokenizer)
    assert merged is model
    assert differ(logits(merged, tokens), wanted) < CLOSE
    assert torch.equal(logits(reload(tmp_path / "out"), tokens), logits(merged, tokens))
    assert (done.rows, done.lost, done.comparison) == ([], 0, None)
    found = store.read(tmp_path / "adapter")
    assert (done.exact, done.whole) == (len(found.factors), list(found.extras))


def test_a_tied_head_stays_tied_unless_the_adapter_parts_it(tmp_path: Path) -> None:
    for name, tied in {
        "plain": True,
        "tied whole": True,
        "tied embeddings": True,
        "embeddings": False,
    }.items():
        model = tiny.build("llama")
        trained(model, VARIANTS[name], tmp_path / name)
        merged, _ = eckart.merge(model, tmp_path / name)
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
        assert merged.config.tie_word_embeddings is tied


def test_transposed_weights_are_merged(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    torch.manual_seed(0)
    model, tokens = transformers.AutoModelForCausalLM.from_config(config).eval(), tiny.tokens()
    variant = adapters.lora(target_modules=["c_attn", "c_proj", "c_fc", "wte"], fan_in_fan_out=True)
    wanted = logits(trained(model, variant, tmp_path), tokens)
    assert differ(logits(model, tokens), wanted) > 1e-2
    merged, _ = eckart.merge(model, tmp_path)
    assert differ(logits(merged, tokens), wanted) < CLOSE


def test_the_dtype_is_the_stored_one_or_the_one_asked_for(llama: Any, tmp_path: Path) -> None:
    """Sums are formed in float64 and rounded once, whatever the model is stored in."""
    trained(llama, VARIANTS["plain"], tmp_path)
    adapter = store.read(tmp_path)
    narrow = models.cast(copy.deepcopy(llama), torch.bfloat16)
    before = models.find(narrow, QUERY).weight.detach().double()
    merged, done = eckart.merge(narrow, adapter)
    assert done.dtype == "bfloat16"
    found = models.find(merged, QUERY).weight.detach()
    assert torch.equal(found, (before + adapter.delta(QUERY)).float().bfloat16())
    wide, done = eckart.merge(copy.deepcopy(llama), adapter, dtype="float16")
    assert (done.dtype, models.find(wide, QUERY).weight.dtype) == ("float16", torch.float16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_inside_low_rank_modules_it_is_exact(
    form: Form, options: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    """Ranks and the declaration of the folder stay, and it loads."""
    dense, tokens = tiny.build("llama"), tiny.tokens()
    folder = adapters.compressed(tmp_path / "small", dense, tokenizer, form=form)
    model = eckart.load(folder)
    wanted = logits(trained(model, adapters.lora(**options), tmp_path / "adapter"), tokens)
    merged, done = eckart.merge(folder, tmp_path / "adapter", out=tmp_path / "out")
    assert (done.rows, done.lost) == ([], 0)
    assert differ(logits(model, tokens), wanted) > 1e-2
    assert differ(logits(merged, tokens), wanted) < CLOSE
    again = eckart.load(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(merged, tokens))
    assert models.parameter_count(again) == models.parameter_count(model)


def test_narrow_modules_are_merged_exactly(tmp_path: Path, llama: Any) -> None:
    kept = torch.arange(0, 48, 2)
    for layer in llama.model.layers:
        for name, rows, columns in (
            ("up_proj", kept, None),
            ("gate_proj", kept, None),
            ("down_proj", None, kept),
        ):
            models.replace(layer.mlp, name, NarrowLinear.slice(getattr(layer.mlp, name), rows, columns))
    plugin.mark(llama)
    tokens = tiny.tokens()
    wanted = logits(trained(llama, VARIANTS["plain"], tmp_path / "adapter"), tokens)
    merged, done = eckart.merge(llama, tmp_path / "adapter")
    assert (done.exact, done.rows) == (14, [])
    assert differ(logits(merged, tokens), wanted) < CLOSE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["plain", "dora", "adalora", "lora bias"])
def test_on_a_low_rank_module_as_a_whole_it_is_the_eckart_young_optimum(
    name: str, form: Form, tmp_path: Path
) -> None:
    """An adapter of the dense model: the same rank, and the error that is measured on dense matrices."""
    variant = VARIANTS[name]
    dense = adapters.base(variant)
    trained(dense, variant, tmp_path)
    model = cut(dense, 8, form)
    # What the sum is: the adapter on the same maps, dense.
    whole, _ = eckart.merge(plugin.densify(copy.deepcopy(model)), tmp_path)
    before = copy.deepcopy(model)
    merged, done = eckart.merge(model, tmp_path)
    assert len(done.rows) == 14
    assert {(row.how, row.rank) for row in done.rows} == {("truncated", 8)}
    parts = []
    for row in done.rows:
        own, wanted, now = (dense_map(one, row.name) for one in (before, whole, merged))
        assert merged.get_submodule(row.name).rank == 8
        best = float(torch.linalg.svdvals(wanted)[8:].norm())
        error, update = float((wanted - now).norm()), float((wanted - own).norm())
        assert error == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert row.error == pytest.approx(error / float(wanted.norm()), rel=1e-4, abs=1e-6)
        assert row.lost == pytest.approx(error / update, rel=1e-4, abs=1e-6)
        parts.append((error, update))
        bias = merged.get_submodule(row.name).dense_bias()
        if bias is not None:
            assert torch.allclose(bias, models.find(whole, row.name).bias, atol=1e-5)
    lost = torch.tensor(parts).norm(dim=0)
    assert done.lost == pytest.approx(float(lost[0] / lost[1]), rel=1e-3)
    assert not done.weighted


def test_on_a_low_rank_module_it_is_exact_where_the_rank_allows(tmp_path: Path) -> None:
    dense = tiny.build("llama")
    model = cut(dense, 8)
    own = dense_map(model, QUERY)
    # An update within the rows that the module has: the rank of the sum is that of the module.
    svd = truncated_svd(own, 4)
    adapter = Adapter({QUERY: Factors(0.3 * svd.left.float(), svd.right.float(), 2.0)})
    merged, done = eckart.merge(model, adapter)
    assert done.rows[0].error < 1e-6
    assert torch.allclose(dense_map(merged, QUERY), own + adapter.delta(QUERY), atol=1e-5)


def test_with_text_the_cut_is_the_best_for_the_outputs(
    tmp_path: Path, text_file: Path, tokenizer: Any
) -> None:
    """Measured on the inputs themselves, independently; no larger than that of the plain cut."""
    dense = tiny.build("llama")
    trained(dense, VARIANTS["plain"], tmp_path)
    model = cut(dense, 6)
    whole, _ = eckart.merge(plugin.densify(copy.deepcopy(model)), tmp_path)
    plain, _ = eckart.merge(copy.deepcopy(model), tmp_path)
    options: dict[str, Any] = {"text": text_file, "tokens": 512, "eval_tokens": 192, "seq_len": 64}
    merged, done = eckart.merge(model, tmp_path, tokenizer=tokenizer, damp=1e-9, **options)
    assert done.weighted
    read = adapters.reading(text_file, tokenizer, 512, 192, 64)
    assert read.calibration is not None
    assert read.held_out is not None
    inputs = adapters.inputs(whole, [row.name for row in done.rows], read.calibration)
    for row in done.rows:
        wanted, now, other = (dense_map(one, row.name) for one in (whole, merged, plain))
        errors = [float((inputs[row.name] @ (wanted - one).T).norm()) for one in (now, other)]
        assert errors[0] <= errors[1] * (1 + 1e-4)
        assert row.error == pytest.approx(
            errors[0] / float((inputs[row.name] @ wanted.T).norm()), rel=1e-3, abs=1e-5
        )
    assert done.comparison is not None
    found = measure.compare(merged, whole, read.held_out)
    assert done.comparison.kl == pytest.approx(found.kl, rel=1e-3)
    assert "against the sum of base and adapter: KL" in str(done)


def test_a_shared_basis_stays_and_the_left_factor_is_the_least_squares_fit(
    tmp_path: Path, llama: Any
) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    stacked = torch.cat([models.find(llama, name).weight.detach() for name in names]).double()
    basis = nn.Linear(32, 8, bias=False)
    basis.weight = nn.Parameter(truncated_svd(stacked, 8).right.float())
    trained(llama, adapters.lora(target_modules=["q_proj"]), tmp_path)
    for name in names:
        dense = models.find(llama, name).weight.detach()
        made = FactoredLinear(32, dense.shape[0], 8)
        made.down = basis
        made.up.weight = nn.Parameter(dense @ basis.weight.detach().T)
        models.replace(llama, name, made)
    plugin.mark(llama)
    models.tie(llama)
    before = {name: dense_map(llama, name) for name in names}
    rows = basis.weight.detach().clone()
    merged, done = eckart.merge(llama, tmp_path)
    row = next(row for row in done.rows if row.name == QUERY)
    assert (row.how, row.rank) == ("basis", 8)
    assert torch.equal(merged.get_submodule(QUERY).down.weight, rows)
    for name in names[1:]:
        assert torch.equal(dense_map(merged, name), before[name])
    wanted = before[QUERY] + store.read(tmp_path).delta(QUERY)
    fit = torch.linalg.lstsq(rows.double().T, wanted.T).solution.T @ rows.double()
    assert torch.allclose(dense_map(merged, QUERY), fit, atol=1e-5)
    assert row.error == pytest.approx(float((wanted - fit).norm() / wanted.norm()), rel=1e-4)
    with pytest.raises(
        ModelError, match="self_attn.q_proj.down is shared by several modules and would change"
    ):
        eckart.merge(llama, Adapter({f"{QUERY}.down": Factors(torch.ones(8, 1), torch.ones(1, 32))}))


@pytest.mark.parametrize("double", [False, True])
def test_an_adapter_of_a_quantised_base_is_added_to_that(
    double: bool, tmp_path: Path, tokenizer: Any
) -> None:
    """The update belongs to Q: with eckart.json the merged model is Q + s B A, without it W + s B A."""
    llama = tiny.build("llama", hidden_size=64, intermediate_size=128)
    targets = tuple(name for name in models.linear_names(llama) if "layers.0" in name)
    rounded = copy.deepcopy(llama)
    for name in targets:
        other = copy.deepcopy(llama)
        quantised.quantise(other, name, double=double, compute=torch.float32)
        with torch.no_grad():
            models.find(rounded, name).weight.copy_(quantised.dequantised(other.get_submodule(name)))
    tokens = tiny.tokens()
    wanted = logits(trained(rounded, VARIANTS["plain"], tmp_path / "adapter"), tokens)
    plain, done = eckart.merge(copy.deepcopy(llama), tmp_path / "adapter")
    assert not done.warnings
    assert differ(logits(plain, tokens), wanted) > 1e-2
    report = {"base": Nf4(double, targets).to_dict()}
    (tmp_path / "adapter" / store.REPORT).write_text(json.dumps(report))
    merged, done = eckart.merge(copy.deepcopy(llama), tmp_path / "adapter")
    assert differ(logits(merged, tokens), wanted) < CLOSE
    assert done.warnings == [
        "the adapter was trained on NF4 weights: 7 matrices were rounded to NF4 before its updates were added"
    ]
    # A resized one belongs to the same base.
    eckart.resize(tmp_path / "adapter", rank=4, out=tmp_path / "resized")
    again, _ = eckart.merge(copy.deepcopy(llama), tmp_path / "resized")
    assert differ(logits(again, tokens), wanted) < CLOSE
    with pytest.raises(ModelError, match="model.layers.9 is not an nn.Linear of this LlamaForCausalLM"):
        eckart.merge(
            llama, replace(store.read(tmp_path / "adapter"), storage=Nf4(double, ("model.layers.9",)))
        )


def test_the_card_and_the_report_of_a_compressed_folder_go_along(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    folder = adapters.compressed(tmp_path / "small", llama, tokenizer)
    (folder / "eckart.json").write_text('{"method": "svd"}')
    trained(llama, VARIANTS["plain"], tmp_path / "adapter")
    eckart.merge(folder, tmp_path / "adapter", out=tmp_path / "once")
    eckart.merge(tmp_path / "once", tmp_path / "adapter", out=tmp_path / "twice")
    card = (tmp_path / "twice" / "README.md").read_text()
    assert "# twice\n" in card
    assert "## Merged\n\nThe adapter adapter, by eckart, into small." in card
    assert card.count("## Merged") == 2
    assert "14 merged at the rank of their module" in card
    report = json.loads((tmp_path / "twice" / "eckart.json").read_text())
    assert report["method"] == "svd"
    assert [one["source"] for one in report["merged"]] == [str(folder), str(tmp_path / "once")]
    assert (tmp_path / "twice" / "tokenizer.json").is_file()


def test_a_plain_model_gets_a_card(llama_folder: Path, llama: Any, tmp_path: Path) -> None:
    trained(llama, VARIANTS["plain"], tmp_path / "adapter")
    eckart.merge(llama_folder, tmp_path / "adapter", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers", "text-generation", "llama",
    )  # fmt: skip
    assert "- 14 updates merged exactly, to rounding in float32" in card


def factors(m: int, n: int, **more: Any) -> Factors:
    return Factors(torch.ones(m, 1), torch.ones(1, n), **more)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter({"model.layers.7.mlp.up_proj": factors(48, 32)}), "there is no model.layers.7.mlp.up_proj"),
        (Adapter({QUERY: factors(32, 64)}), f"{QUERY} is 32 x 32 and 32 x 64 in the adapter"),
        (
            Adapter({QUERY: factors(32, 32, embedding=True)}),
            f"{QUERY} is a Linear and the adapter is of an embedding",
        ),
        (
            Adapter({"model.embed_tokens": factors(258, 32)}),
            "model.embed_tokens is a Embedding and the adapter is of a linear map",
        ),
        (
            Adapter({QUERY: factors(32, 32, bias=torch.ones(32))}),
            f"{QUERY} has no bias and the adapter has one",
        ),
        (Adapter({}, {"model.norms": torch.ones(32)}), "model.norms is no tensor of the model"),
        (
            Adapter({}, {"model.norm.weight": torch.ones(33)}),
            "model.norm.weight is 32 and 33 in the adapter",
        ),
        (
            Adapter(
                {f"x.{index}": factors(2, 2) for index in range(7)}, config={"base_model_name_or_path": "a/b"}
            ),
            "7 of its 7 entries do not fit: .*and 2 more. It was made for a/b. Give the model that it was",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_changed(
    llama: Any, adapter: Adapter, message: str
) -> None:
    whole = Adapter({**adapter.factors, "lm_head": factors(258, 32)}, adapter.extras, adapter.config)
    given = adapter if "x.0" in adapter.factors else whole
    before = wards.weights(llama)
    with pytest.raises(ModelError, match=f"does not belong to this LlamaForCausalLM: .*{message}"):
        eckart.merge(llama, given)
    assert wards.equal(before, wards.weights(llama))


def test_factored_embeddings_are_refused(llama: Any) -> None:
    table = llama.model.embed_tokens.weight.detach().double()
    svd = truncated_svd(table.T, 8)
    made = build_embedding(LowRank(svd.left * svd.values, svd.right)).float()
    llama.model.embed_tokens, llama.lm_head = made, tied_head(made)
    for name in ("model.embed_tokens", "model.embed_tokens.up", "lm_head.codes"):
        with pytest.raises(
            ModelError, match=f"{name} is part of factored embeddings, which no adapter is merged"
        ):
            eckart.merge(llama, Adapter({name: factors(32, 8)}))


def test_what_is_no_model_and_text_without_a_tokenizer_are_refused(llama: Any, text_file: Path) -> None:
    adapter = Adapter({QUERY: factors(32, 32)})
    with pytest.raises(ModelError, match="got a dict: give a hub id, a path or a transformers model"):
        eckart.merge({}, adapter)
    before = wards.weights(llama)
    with pytest.raises(ModelError, match="text needs a tokenizer: pass tokenizer="):
        eckart.merge(llama, adapter, text=text_file)
    assert wards.equal(before, wards.weights(llama))


def test_a_folder_is_not_merged_over_itself(llama_folder: Path, llama: Any, tmp_path: Path) -> None:
    trained(llama, VARIANTS["plain"], tmp_path / "adapter")
    with pytest.raises(StoreError, match="llama is where the model comes from: choose another --out"):
        eckart.merge(llama_folder, tmp_path / "adapter", out=llama_folder, overwrite=True)
    with pytest.raises(StoreError, match="adapter is where the model comes from: choose another --out"):
        eckart.merge(llama_folder, tmp_path / "adapter", out=tmp_path / "adapter", overwrite=True)


def test_adapters_of_plain_peft_load_on_a_merged_model(llama: Any, tmp_path: Path, tokenizer: Any) -> None:
    trained(llama, VARIANTS["plain"], tmp_path / "adapter")
    eckart.merge(copy.deepcopy(llama), tmp_path / "adapter", out=tmp_path / "out", tokenizer=tokenizer)
    base = reload(tmp_path / "out")
    made = adapters.wrap(base, VARIANTS["dora"].config())
    assert isinstance(made, peft.PeftModel)
    adapters.save(made, tmp_path / "second")
    merged, _ = eckart.merge(tmp_path / "out", tmp_path / "second")
    assert differ(logits(merged, tiny.tokens()), logits(made, tiny.tokens())) < CLOSE
