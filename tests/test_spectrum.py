"""The spectra of whole models: read from files as in memory, in the metrics of compress, per head, shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import eckart
from eckart import (
    ConfigError,
    ModelError,
    NotFinite,
    StoreError,
    heads,
    kinds,
    report_survey,
    survey,
    surveying,
)
from eckart.cli import app
from eckart.linalg import Metric
from eckart.recipe import Recipe
from eckart.spectra import resolution
from eckart.streaming import matrices
from eckart.streaming.shards import Shards
from eckart.survey import Matrix, Spectrum, Survey

from . import tiny

SMALL: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
CASES = {
    "grouped": "llama",
    "own head": "llama-bias-untied",
    "wide heads": "qwen3",
    "a scaled table that is tied": "gemma3",
    "fused": "phi3",
    "transposed": "gpt2",
    "experts, one by one in files": "mixtral",
    "experts, transposed": "gpt-oss",
    "latent attention": "deepseek-v3",
}


def same(one: Spectrum, other: Spectrum) -> bool:
    """Tell whether two spectra are equal to rounding."""
    return one.shape == other.shape and all(
        torch.allclose(one.values[m], other.values[m], rtol=1e-6,
                       atol=2 * resolution(one.shape) * float(other.values[m][0]))
        for m in other.values
    )  # fmt: skip


def by_name(found: Survey) -> dict[str, Matrix]:
    return {one.name: one for one in found.matrices}


@pytest.fixture(scope="module")
def on_text(llama_folder: Path, text_file: Path) -> Survey:
    return eckart.spectrum(llama_folder, text=text_file, **SMALL)


@pytest.mark.parametrize("name", CASES.values(), ids=CASES)
def test_one_matrix_at_a_time_gives_what_the_whole_model_does(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, expected = eckart.spectrum(tmp_path, ends=True), eckart.spectrum(model, ends=True)
    assert (found.how, expected.how) == ("files", "memory")
    assert [one.name for one in found.matrices] == [one.name for one in expected.matrices]
    for own, other in zip(found.matrices, expected.matrices, strict=True):
        assert same(own.whole, other.whole)
        assert (own.kind, own.side, len(own.heads)) == (other.kind, other.side, len(other.heads))
        assert all(same(*pair) for pair in zip(own.heads, other.heads, strict=True))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], value) for key, value in after.items())


def test_one_parameter_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """While a matrix is looked at, the others are on the meta device, and at the end all are."""
    tiny.build("mixtral").save_pretrained(tmp_path)
    model = matrices.skeleton(str(tmp_path), task="auto")
    unfolded = matrices.unfolded(model)
    found, held = eckart.models.targets(unfolded), []
    for target, weight in matrices.each(model, Shards(model, tmp_path), found):
        assert weight.shape == target.shape
        held.append([name for name, own in model.named_parameters() if own.device.type != "meta"])
    assert len(held) == len(found)
    assert all(len(names) == 1 for names in held)
    assert len({names[0] for names in held}) < len(found)  # the experts of a layer are one
    assert all(own.device.type == "meta" for own in model.parameters())


def test_stacked_experts_and_transposed_matrices_are_the_matrices_that_they_are() -> None:
    model = tiny.build("gpt-oss")
    stack = model.model.layers[1].mlp.experts.down_proj.detach().double()
    found = by_name(eckart.spectrum(model))
    for index, matrix in enumerate(stack):
        own = found[f"model.layers.1.mlp.experts.each.{index}.down"].whole
        assert torch.allclose(own.values["plain"], torch.linalg.svdvals(matrix), rtol=1e-5, atol=1e-5)
    weight = tiny.build("gpt2").transformer.h[0].attn.c_attn.weight.detach().double()
    conv = by_name(eckart.spectrum(tiny.build("gpt2")))["transformer.h.0.attn.c_attn"].whole
    assert conv.shape == (96, 32) == tuple(weight.T.shape)
    assert torch.allclose(conv.values["plain"], torch.linalg.svdvals(weight), rtol=1e-5, atol=1e-5)


def test_a_head_has_its_rows_or_columns(llama: Any, text_file: Path, tokenizer: Any) -> None:
    """Four query heads, two of keys and values; the energies of all heads sum to that of the matrix."""
    found = by_name(eckart.spectrum(llama, text=text_file, tokenizer=tokenizer, **SMALL))
    attention = llama.model.layers[0].self_attn
    for name, count, side in (
        ("q_proj", 4, "rows"), ("k_proj", 2, "rows"), ("v_proj", 2, "rows"), ("o_proj", 4, "columns"),
    ):  # fmt: skip
        weight = getattr(attention, name).weight.detach().double()
        own = found[f"model.layers.0.self_attn.{name}"]
        assert (len(own.heads), own.side) == (count, side)
        for index, head in enumerate(own.heads):
            place = slice(8 * index, 8 * index + 8)
            part = weight[place] if side == "rows" else weight[:, place]
            assert head.shape == part.shape
            assert torch.allclose(head.values["plain"], torch.linalg.svdvals(part), rtol=1e-5, atol=1e-5)
        energies = sum(head.measures["plain"].energy for head in own.heads)
        assert energies == pytest.approx(own.whole.measures["plain"].energy)
        if side == "rows":  # C is the identity on what the rows are: the sum is that of all rows
            weighted = sum(head.measures["activation"].energy for head in own.heads)
            assert weighted == pytest.approx(own.whole.measures["activation"].energy)
    assert all(not own.heads for name, own in found.items() if ".mlp." in name)


def test_heads_by_shape_are_those_that_are_found_by_behaviour() -> None:
    model = tiny.build("llama")
    cuts = heads.cuts(model)
    targets = eckart.models.targets(model)
    verified = heads.found(model, eckart.dimensions.find(model, targets))
    assert len(verified) == 2
    for own in verified:
        assert cuts[own.query] == heads.Cut("rows", own.count, own.size)
        assert cuts[own.key] == cuts[own.value] == heads.Cut("rows", own.groups, own.size)
        assert cuts[own.output] == heads.Cut("columns", own.count, own.size)
    single = heads.cuts(tiny.build("llama", num_key_value_heads=1))
    assert single["model.layers.0.self_attn.k_proj"] == heads.Cut("rows", 1, 8)
    assert heads.cuts(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))) == {}


def test_parts_of_a_fused_matrix_have_heads() -> None:
    model = tiny.build("phi3")
    whole, parts = eckart.spectrum(model), eckart.spectrum(model, split="fused")
    assert {"qkv_proj", "gate_up_proj"} <= set(whole.kinds())
    found = parts.kinds()
    assert [len(found[f"{part}_rows"][0].heads) for part in "qkv"] == [4, 2, 2]
    energies = sum(found[f"{part}_rows"][0].whole.measures["plain"].energy for part in "qkv")
    assert energies == pytest.approx(whole.kinds()["qkv_proj"][0].whole.measures["plain"].energy)


def test_the_metrics_are_those_that_compress_cuts_in(llama: Any, text_file: Path, tokenizer: Any) -> None:
    """The tail of the two-sided spectrum is the loss that compress foretells, rank by rank."""
    found = eckart.spectrum(llama, text=text_file, tokenizer=tokenizer, **SMALL)
    assert found.metrics == ("plain", "activation", "two-sided")
    assert (found.tokens, found.gradient_tokens) == (1024, 512)
    for method, metric, unit in (("svd", "plain", 1.0), ("svd-llm", "activation", 1.0),
                                 ("io-svd", "two-sided", 0.5)):  # fmt: skip
        recipe = Recipe(
            rank=3, method=method, text=(str(text_file),), tokens=1024, gradient_tokens=512, seq_len=64
        )
        loaded = eckart.hub.Loaded(llama, tokenizer, "llama", torch.float32, None)
        prepared = eckart.pipeline.prepare(recipe, loaded)
        for own in found.matrices:
            values: Tensor = own.whole.values[metric]  # type: ignore[index]
            losses = prepared.decomposed.parts[own.name].losses()
            expected = unit * float(values[3:].square().sum())
            assert float(losses[3]) == pytest.approx(expected, rel=1e-5)
        kinds.fold(llama)
    plain = found.matrices[0].whole
    assert not torch.allclose(plain.values["plain"], plain.values["activation"])


def test_a_tied_table_is_looked_at_on_text(llama_folder: Path, text_file: Path) -> None:
    found = eckart.spectrum(llama_folder, text=text_file, include="embed_tokens", **SMALL)
    table = load_file(llama_folder / "model.safetensors")["model.embed_tokens.weight"].double()
    assert [one.kind for one in found.matrices] == ["embed_tokens"]
    assert found.matrices[0].whole.shape == (32, tiny.VOCABULARY)
    values = found.matrices[0].whole.values
    assert torch.allclose(values["plain"], torch.linalg.svdvals(table), rtol=1e-5, atol=1e-5)
    assert set(values) == set(survey.METRICS)


def test_a_compressed_folder_shows_its_ranks(compressed_folder: Path, tmp_path: Path) -> None:
    model, _ = eckart.compress(tiny.build("llama"), rank=5, method="svd")
    eckart.save(model, None, tmp_path / "small")
    with pytest.raises(ModelError, match=r"low-rank or in few bits: eckart\.densify it first"):
        eckart.spectrum(model)
    with pytest.raises(ModelError, match="cannot load|tokenizer"):
        eckart.spectrum(tmp_path / "small")  # it was saved without one, which loading asks for
    found = eckart.spectrum(compressed_folder)
    assert found.how == "memory"
    assert any(one.whole.measures["plain"].condition == float("inf") for one in found.matrices)


def test_kinds_are_where_a_matrix_stands() -> None:
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "h.0.attn.c_proj",
        "h.1.mlp.c_proj", "encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense",
        "encoder.layer.0.intermediate.dense", "mlp.0", "experts.each.3.down", "head",
    ]  # fmt: skip
    assert list(survey.kinds(names).values()) == [
        "q_proj", "q_proj", "attn.c_proj", "mlp.c_proj", "attention.output.dense", "layer.output.dense",
        "intermediate.dense", "mlp", "down", "head",
    ]  # fmt: skip


def made(*spectra: Tensor, name: str = "net.{}.up") -> Survey:
    """Return a survey of matrices with these plain spectra, each of twice as many columns."""
    rows = []
    for index, values in enumerate(spectra):
        size = len(values)
        rows.append(
            Matrix(name.format(index), "up", Spectrum.of((size, 2 * size), {"plain": values.double()}))
        )
    return Survey("net", ("plain",), tuple(rows), 0, 0, 1e-4, "memory", {}, ())


def test_what_compresses_best_comes_first_and_words_have_the_numbers() -> None:
    flat, steep = torch.ones(300), torch.cat([torch.full((15,), 100.0), torch.ones(285)])
    found = made(flat, steep)
    assert [one.name for one in found.best()] == ["net.1.up", "net.0.up"]
    assert found.best()[0].whole.share("plain") == pytest.approx(15 / 200)
    every, verdict, up = found.answers()
    held, top = 15e4 / (15e4 + 285), (15e4 + 241) / (15e4 + 285)
    assert (
        "the top 5 % of the singular values hold 95 % of the energy in 1 of 2 matrices, the top 10 % in 1"
        in every
    )
    assert f"on average they hold {50 * (0.05 + held):.1f} %" in every
    assert (
        f"the top 256 do in 1 of the 2 that have so many (on average {50 * (256 / 300 + top):.1f} %)" in every
    )
    assert (
        'So "5 to 10 % of the singular values hold 95 %" is half true of this model in the plain' in verdict
    )
    assert "up: the top 15 and 30 of 300 singular values hold" in up
    assert "is true of this model" in made(steep).answers()[1]
    assert "is mostly true" in made(steep, steep, flat).answers()[1]
    assert "is mostly false" in made(steep, flat, flat).answers()[1]
    assert "is false" in made(flat[:40]).answers()[1]
    assert "256" not in made(flat[:40]).answers()[0]


def test_percentages_are_not_rounded_up_to_all() -> None:
    assert report_survey.percent(0.99999) == "99.9 %"
    assert report_survey.percent(1.0) == "100 %"
    assert report_survey.percent(0.5) == "50.0 %"


def test_the_table_shows_so_many_and_says_the_rest(on_text: Survey) -> None:
    shown = eckart.render.plain(report_survey.tables(on_text, 3), width=160)
    assert "note: 3 of 14 are shown; --limit shows more, --json has all" in shown
    best = [one.name for one in on_text.best()]
    assert all(name in shown for name in best[:3])
    assert not any(name in shown for name in best[3:])
    assert "second moments on 1,024 tokens, of gradients on 512" in shown
    assert "Heads of attention" in shown
    assert "of them are shown" not in str(on_text)
    assert all(name in str(on_text) for name in best)


def test_what_is_wrong_is_said(llama_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(ConfigError, match="tokens, at least 2 are needed"):
        eckart.spectrum(llama_folder, text=short)
    with pytest.raises(ModelError, match="'q_prj' matches none .* did you mean"):
        eckart.spectrum(llama_folder, include="q_prj")
    with pytest.raises(ModelError, match="no matrix left"):
        eckart.spectrum(llama_folder, exclude="*")
    with pytest.raises(ModelError, match="no model at"):
        eckart.spectrum(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="legal are none, fused"):
        eckart.spectrum(llama_folder, split="halves")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="got a int"):
        eckart.spectrum(3)


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in llama_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damaged_files_are_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NotFinite, match=r"model\.layers\.1\.mlp\.up_proj .* NaN or infinite"):
        eckart.spectrum(copied)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(StoreError, match=f"are in none of the 1 .* first {name}"):
        eckart.spectrum(copied)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(StoreError, match="no whole safetensors file"):
        eckart.spectrum(copied)
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no \.safetensors files"):
        eckart.spectrum(copied)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["spectrum", *(str(argument) for argument in arguments)])


def test_the_command_prints_and_writes(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "values.json"
    found = run(llama_folder, "--limit", 2, "--out", out)
    assert found.exit_code == 0, found.output
    assert f"written to {out}" in found.output
    assert "note: 2 of 14 are shown" in found.output
    written = json.loads(out.read_text())
    state = load_file(llama_folder / "model.safetensors")
    assert len(written["matrices"]) == 14
    for one in written["matrices"]:
        expected = torch.linalg.svdvals(state[f"{one['name']}.weight"].double())
        assert one["values"]["plain"] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
    assert len(written["matrices"][0]["heads"]) == 4
    again = run(llama_folder, "--out", out)
    assert again.exit_code == 2
    assert "exists: choose another --out, or pass --overwrite" in again.output
    assert run(llama_folder, "--out", out, "--overwrite").exit_code == 0
    for path, message in ((tmp_path, "name a file"), (tmp_path / "no" / "file", "is not a folder that")):
        refused = run(llama_folder, "--out", path)
        assert refused.exit_code == 2
        assert message in refused.output
    assert "limit -1: must be at least 0" in run(llama_folder, "--limit", -1).output
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]


def test_json_has_everything_but_the_values(llama_folder: Path, text_file: Path, on_text: Survey) -> None:
    options = ["--tokens", 1024, "--gradient-tokens", 512, "--seq-len", 64]
    found = run(llama_folder, "--text", text_file, *options, "--json")
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert set(values["environment"]) == {"date", "python", "versions", "machine"}
    assert list(values["metrics"]) == list(on_text.metrics)
    assert values["answers"] == on_text.answers()
    assert [one["name"] for one in values["matrices"]] == [one.name for one in on_text.best()]
    for row, own in zip(values["matrices"], on_text.best(), strict=True):
        measured = own.whole.measures["two-sided"]
        assert row["metrics"]["two-sided"]["ranks"]["95%"] == measured.ranks[1]
        assert row["metrics"]["two-sided"]["stable_rank"] == pytest.approx(measured.stable_rank)
        assert row["break_even"] == pytest.approx(own.whole.break_even)
        assert row["noise"]["above"] == own.whole.noise.above
        assert len(row["heads"]) == len(own.heads)
    assert values["kinds"]["q_proj"]["plain"]["count"] == 2
    assert json.dumps(made(torch.zeros(3)).to_dict(), allow_nan=False)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_head_is_measured_in_its_block_of_the_metric(side: str) -> None:
    made_of = torch.Generator().manual_seed(0)
    weight, first, second = (
        torch.randn(*shape, generator=made_of, dtype=torch.float64) for shape in ((6, 6), (20, 6), (20, 6))
    )
    inputs, outputs = Metric(6, first.T @ first), Metric(6, second.T @ second)
    cut = heads.Cut(side, 2, 3)  # type: ignore[arg-type]
    found = list(surveying._of_heads(weight, {"two-sided": (inputs, outputs)}, cut))
    assert len(found) == 2
    for own, place in zip(found, (torch.arange(3), torch.arange(3, 6)), strict=True):
        blank = torch.zeros(6, 6, dtype=torch.float64)  # the other heads are zero
        if side == "rows":
            blank[place] = weight[place]
        else:
            blank[:, place] = weight[:, place]
        expected = torch.linalg.svdvals(outputs.root_times(inputs.root_times(blank.T).T))
        assert torch.allclose(own.values["two-sided"], expected[:3], rtol=1e-6)
