"""Exports to engines: the same function as PyTorch, through their own caches; refusals that leave nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, models
from eckart.cli import app
from eckart.exports import check, graph, options, prepare, session, trace, write
from eckart.exports.options import Form
from eckart.exports.result import EngineExport
from eckart.factors import FactoredLinear, LowRank, NarrowLinear, PartialLinear, PivotedLinear, build

from . import tiny
from .conftest import Compress, logits, reload

onnx = pytest.importorskip("onnx", reason="pip install 'eckart[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'eckart[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'eckart[onnx]'")
needs_openvino = pytest.mark.skipif(
    any(not options.installed(name) for name in ("openvino", "nncf")), reason="pip install 'eckart[openvino]'"
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traced graphs: a trace takes seconds, and most tests here are of what comes after it."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, compressed_folder: Path, kept: Path) -> Path:
    """The compressed model for onnxruntime, float32."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    eckart.export(compressed_folder, out, "onnx", cache=kept)
    return out


def in_pieces(opened: session.Session, ids: Tensor) -> Tensor:
    opened.reset()
    return torch.cat([opened.feed(piece, every=True) for piece in torch.split(ids, [9, 6, 1, 1, 7])])


def test_floats_are_the_same_function_through_the_cache(exported: Path, compressed_folder: Path) -> None:
    small, ids = reload(compressed_folder, dtype=torch.float32), tiny.tokens()
    opened = eckart.open_export(exported, threads=1)
    for row in ids:
        expected = logits(small, row[None])[0]
        found = in_pieces(opened, row)
        assert opened.length == len(row)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
        opened.reset()  # what a forgotten cache gives is another function
        assert not torch.allclose(opened.feed(row[9:], every=True), expected[9:], atol=1e-2)


def test_greedy_text_is_that_of_generate(exported: Path, compressed_folder: Path) -> None:
    small, prompt = reload(compressed_folder, dtype=torch.float32), tiny.tokens()[0, :7]
    expected = small.generate(
        prompt[None], attention_mask=torch.ones(1, 7), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    opened = eckart.open_export(exported)
    assert opened.generate(prompt, 12, stops=()).tolist() == expected[0, 7:].tolist()
    made = opened.generate(prompt.tolist(), 12, stops={int(expected[0, 9])})
    assert made.tolist() == expected[0, 7 : 7 + len(made)].tolist()
    assert made[-1] == expected[0, 9]


def test_the_folder_says_what_it_is(exported: Path, compressed_folder: Path) -> None:
    assert sorted(path.name for path in exported.iterdir() if path.name[:4] not in ("toke", "chat")) == [
        "README.md", "config.json", "eckart.json", "generation_config.json", "model.onnx", "model.onnx.data",
    ]  # fmt: skip
    report = json.loads((exported / "eckart.json").read_text())
    size = sum((exported / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert report["bytes"][1] == size
    assert report["check"]["largest"] < report["tolerance"]
    assert report["check"]["greedy"][0] == report["check"]["greedy"][1]
    config = AutoConfig.from_pretrained(exported)
    assert getattr(config, "quantization_config", None) is None
    assert config.hidden_size == AutoConfig.from_pretrained(compressed_folder).hidden_size
    assert AutoTokenizer.from_pretrained(exported)("low")["input_ids"]
    written = (exported / "model.onnx").read_bytes()
    assert b"site-packages" not in written  # a trace leaves the lines of source that each node came from


def test_equal_bytes_are_written_once(tmp_path: Path) -> None:
    values = torch.randn(40, 30).numpy()
    tensors = [onnx.numpy_helper.from_array(values, "a"), onnx.numpy_helper.from_array(values.T.copy(), "b")]
    same = onnx.numpy_helper.from_array(values.reshape(30, 40), "c")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [*tensors, same]))
    graph.write(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size < 3 * values.nbytes
    again = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    assert (again["a"] == values).all()
    assert (again["b"] == values.T).all()
    assert (again["c"] == values.reshape(30, 40)).all()


def rounded_bits(path: Path) -> dict[int, float]:
    """Return the bits of the products inside the blocks, and the share that has them."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    each = [{a.name: a.i for a in node.attribute} for node in nodes]
    assert all(one["bits"] == 8 for one in each if one["N"] == tiny.VOCABULARY)
    inner = [one["bits"] for one in each if one["N"] != tiny.VOCABULARY]
    return {bits: inner.count(bits) / len(inner) for bits in set(inner)}


def test_fewer_bits_are_smaller_and_further(compressed_folder: Path, kept: Path, tmp_path: Path) -> None:
    found = {}
    for storage in ("float", "int8", "int4"):
        made = eckart.export(compressed_folder, tmp_path / storage, "onnx", storage=storage, cache=kept)
        assert isinstance(made, EngineExport)
        found[storage] = made
    assert found["float"].storage == "float32"
    sizes = {name: (tmp_path / name / "model.onnx.data").stat().st_size for name in found}
    assert sizes["int8"] < 0.45 * sizes["float"]
    bits = {name: rounded_bits(tmp_path / name / "model.onnx") for name in found}
    assert bits == {"float": {}, "int8": {8: 1.0}, "int4": {4: 1.0}}  # of the products inside the blocks
    assert found["float"].check.divergence < 1e-6 < found["int8"].check.divergence
    assert found["int8"].check.divergence < found["int4"].check.divergence < 0.5
    assert found["int4"].block == 32
    assert found["float"].block is None


@needs_openvino
def test_openvino_is_the_same_function_in_every_storage(
    compressed_folder: Path, kept: Path, tmp_path: Path
) -> None:
    small, row = reload(compressed_folder, dtype=torch.float32), tiny.tokens()[0]
    expected, apart = logits(small, row[None])[0], {}
    for storage in ("float32", "float16", "int8", "int4"):
        out = tmp_path / storage
        eckart.export(compressed_folder, out, "openvino", storage=storage, cache=kept)
        found = in_pieces(eckart.open_export(out, threads=1), row)
        apart[storage] = float((found - expected).abs().max() / expected.abs().max())
    assert apart["float32"] < 1e-4
    assert apart["float32"] < apart["float16"] < apart["int8"] < apart["int4"] < 0.5
    assert eckart.open_export(tmp_path / "int8").target == "openvino"


def test_windows_and_narrow_layers(tmp_path: Path, compress: Compress, tokenizer: Any) -> None:
    """A sliding window that the text is longer than, and narrower hidden dimensions, in one model."""
    model, result = compress(tiny.build("mistral", sliding_window=16), form="width")
    assert any(isinstance(part, NarrowLinear | PartialLinear) for part in model.modules())
    eckart.save(model, tokenizer, tmp_path / "small", result)
    eckart.export(tmp_path / "small", tmp_path / "out", "onnx")
    row = tiny.tokens(40)[0]
    expected = logits(reload(tmp_path / "small", dtype=torch.float32), row[None])[0]
    opened = eckart.open_export(tmp_path / "out")
    found = torch.cat([opened.feed(row[:30], every=True), opened.feed(row[30:], every=True)])
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    model.config.sliding_window = None
    whole = reload(tmp_path / "small", dtype=torch.float32, sliding_window=None)
    assert not torch.allclose(logits(whole, row[None])[0], expected, atol=1e-3)


@torch.no_grad()
def test_experts_that_all_run_give_what_the_chosen_ones_give(compress: Compress) -> None:
    model, _ = compress(tiny.build("mixtral"), method="svd")
    expected = logits(model, tiny.tokens())
    prepare.prepare(model, few_bits=False)
    assert any(isinstance(part, prepare.EveryExpert) for part in model.modules())
    assert torch.allclose(logits(model, tiny.tokens()), expected, atol=1e-5 * float(expected.abs().max()))


def test_a_wrong_export_is_refused_and_leaves_nothing(
    compressed_folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = check.reference

    def other(model: Any) -> check.Reference:
        found = real(model)
        return replace(found, logits=tuple(row + 0.01 * row.abs().max() for row in found.logits))

    monkeypatch.setattr(check, "reference", other)
    with pytest.raises(ModelError, match="a logit differs by .* the engine computes something else"):
        eckart.export(compressed_folder, tmp_path / "out", "onnx", cache=kept)
    assert not list(tmp_path.iterdir())


def test_what_the_check_lets_pass() -> None:
    fine = check.Check(100, 1e-6, 1e-7, 0.0, 1.0, (72, 72), 0.0)
    fine.judge(1e-4, "x")
    near = replace(fine, greedy=(3, 72), gap=1e-6)
    near.judge(1e-4, "x")  # two tokens as likely as one another within rounding
    with pytest.raises(ModelError, match="greedy text leaves PyTorch's after 3 of 72"):
        replace(near, gap=1e-2).judge(1e-4, "x")
    with pytest.raises(ModelError, match=r"differs by 1\.0e-02"):
        replace(fine, largest=1e-2).judge(1e-4, "x")
    replace(fine, largest=1e-2, gap=1.0).judge(Form("onnx", "int8").tolerance, "x")


@torch.no_grad()
@pytest.mark.parametrize("multiple", [1, 8])
def test_four_bits_get_mixed_factors_of_the_same_map(multiple: int) -> None:
    model = tiny.build("llama-bias-untied")
    name, generator = "model.layers.0.mlp.up_proj", torch.Generator().manual_seed(1)
    linear = model.get_submodule(name)
    left, right = (torch.randn(shape, generator=generator).double() for shape in ((48, 9), (9, 32)))
    low = LowRank(left, right)
    models.replace(model, name, build(low, "pivoted", linear.bias.double()).float())
    before = model.get_submodule(name)
    assert isinstance(before, PivotedLinear)
    inputs = torch.randn(5, 32, generator=generator)
    expected = before(inputs)
    prepare.prepare(model, few_bits=True, multiple=multiple)
    after = model.get_submodule(name)
    assert isinstance(after, FactoredLinear)
    assert after.rank == -(-9 // multiple) * multiple
    assert torch.allclose(after(inputs), expected, atol=1e-4 * float(expected.abs().max()))


def test_sampling_follows_its_options() -> None:
    values = torch.tensor([0.0, 3.0, 2.0, 2.5, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> set[int]:
        return {session.choose(values, temperature, top_k, top_p, generator) for _ in range(200)}

    assert drawn(0.0) == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.3) == {1}
    assert drawn(top_p=0.7) == {1, 3}
    assert drawn(5.0) == {0, 1, 2, 3, 4}
    counts = torch.bincount(
        torch.tensor([session.choose(values, 1.0, None, None, generator) for _ in range(2000)]), minlength=5
    )
    assert torch.allclose(counts / 2000, values.softmax(0), atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: give at least 1"),
        ({"temperature": -1.0}, "temperature -1: give 0"),
        ({"top_k": 0}, "top_k 0: give at least 1"),
        ({"top_p": 1.5}, r"top_p 1\.5: must lie in \(0, 1\]"),
        ({"prompt": []}, "give one row of at least one token"),
        ({"prompt": [2] * 200}, "the model has 128 positions"),
    ],
)
def test_what_cannot_be_generated_is_refused(exported: Path, wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prompt": [2, 3], "max_new_tokens": 4} | wrong
    with pytest.raises(ConfigError, match=message):
        eckart.open_export(exported).generate(**given)


def test_what_cannot_be_exported_is_refused(
    compressed_folder: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for given, message in (
        (
            {"to": "onnx", "storage": "float16"},
            "storage 'float16': legal with --to onnx are float32, int8, int4",
        ),
        ({"to": "onnx", "block": 48}, "block 48: legal are 32, 64, 128"),
        ({"to": "onnx", "dtype": "float16"}, "dtype is not an option of --to onnx"),
        ({"to": "dense", "storage": "int8"}, "storage is not an option of --to dense"),
    ):
        with pytest.raises(ConfigError, match=message):
            eckart.export(compressed_folder, out, **given)
    with pytest.raises(ConfigError, match="target 'tvm': legal are onnx, openvino"):
        Form("tvm")
    with pytest.raises(ModelError, match=r"no model\.onnx or openvino_model\.xml in"):
        eckart.open_export(llama_folder)
    monkeypatch.setattr(options, "installed", lambda name: name != "onnxruntime")
    with pytest.raises(ConfigError, match=r"onnxruntime not installed: pip install 'eckart\[onnx\]'"):
        eckart.export(compressed_folder, out, "onnx")
    assert not list(tmp_path.iterdir())


def test_models_that_keep_something_else_are_refused_by_what_they_keep() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig, Qwen3NextConfig

    recurrent = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        trace.kept(recurrent)
    hybrid = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )
    with pytest.raises(ModelError, match="layer 0 of Qwen3NextForCausalLM keeps a"):
        trace.kept(hybrid)


def test_a_graph_is_kept_for_the_same_model_alone(llama: Any) -> None:
    first = write.digest(llama)
    assert write.digest(tiny.build("llama")) == first
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert write.digest(llama) != first
    assert write.digest(tiny.build("llama", rms_norm_eps=1e-4)) != first


def test_the_command_writes_what_runs(
    compressed_folder: Path, kept: Path, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*more: object) -> Any:
        words = ["export", compressed_folder, "--to", "onnx", "--storage", "int8", "--cache", kept, *more]
        return CliRunner().invoke(app, [str(word) for word in words])

    done = run("--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert (values["target"], values["storage"], values["block"]) == ("onnx", "int8", 32)
    assert "quantize" not in "".join(capfd.readouterr())
    done = run("--out", tmp_path / "out", "--overwrite", "--block", 64)
    assert done.exit_code == 0, done.output
    assert "KL from PyTorch" in done.stdout
    assert "written to" in done.stdout
    assert run("--out", tmp_path / "out").exit_code == 2
    assert len(eckart.open_export(tmp_path / "out").generate([2, 3, 4], 5, stops=())) == 5
