"""From a model to a folder for an engine: traced, stored, checked; there, or nothing."""

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import hub, modelcard, models, plugin, render
from ..modelcard import Facts
from ..stages import Watch
from . import check, graph, stateful, trace
from .options import FLOAT, ONNX, Form, need_to_make
from .prepare import prepare
from .result import EngineExport
from .session import REPORT, start
from .trace import Kept

_VERSIONS = ("torch", "transformers", "onnx", "onnxscript")


def export(
    source: str,
    out: Path,
    form: Form,
    *,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    watch: Watch,
) -> EngineExport:
    """Write the causal language model at `source` to the folder `out` in `form`.

    Args:
        source: a compressed folder, a dense one, a hub id or a .gguf file.
        out: what appears, by rename, once the check is passed.
        form: engine and storage.
        cache: a folder to keep traced graphs in, for later exports of the same model.
        trust_remote_code: run code that a model brings along.
        overwrite: replace `out`.
        watch: is told of progress.

    Raises:
        ConfigError: what the engine needs is not installed.
        ModelError: the model cannot be read or traced, keeps something else than keys and values, or the
            engine computes something else.
        NotFinite: a logit is NaN or infinite.
        StoreError: `out` exists.
    """
    need_to_make(form.target)
    hub.check_output(out, overwrite, source)
    watch("load", 0, 1)
    loaded = hub.load(source, compute=torch.float32, trust_remote_code=trust_remote_code)
    model, parameters = loaded.model, models.parameter_count(loaded.model)
    layers = trace.kept(model)
    watch("ask PyTorch", 0, 1)
    expected = check.reference(model)
    with hub.new_folder(out, overwrite) as folder:
        few_bits = form.storage == "int4"
        prepare(model, few_bits, 1 if form.target == ONNX else form.block)
        watch("trace", 0, 1)
        with _traced(model, layers, cache, out) as traced:
            watch(form.storage, 0, 1)
            _store(traced, folder, form, models.vocabulary(model))
        files = [path for path in folder.iterdir() if path.name.startswith(Path(form.graph).stem)]
        size = sum(path.stat().st_size for path in files)
        _describe(folder, model, loaded.tokenizer)
        watch("check", 0, 1)
        found = check.compare(start(folder, form.target), expected)
        found.judge(form.tolerance, f"{source} in {form.target}, {form.storage}")
        engine = {ONNX: "onnxruntime"}.get(form.target, form.target)
        result = EngineExport(
            source=source,
            target=form.target,
            storage=form.storage,
            block=_block(form),
            parameters=parameters,
            bytes=(loaded.bytes, size),
            positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            check=found,
            tolerance=form.tolerance,
            engine=f"{engine} {metadata.version(engine)}",
        )
        documents = {"README.md": _card(result), REPORT: render.to_json(result.to_dict())}
        modelcard.write(folder, out.name, documents, _facts(result, out.name))
    watch("check", 1, 1)
    return result


def _block(form: Form) -> int | None:
    blocks = form.storage == "int4" or (form.target == ONNX and form.storage != FLOAT)
    return form.block if blocks else None


def _store(traced: Path, folder: Path, form: Form, vocabulary: int) -> None:
    target = folder / form.graph
    if form.target != ONNX:
        stateful.convert(traced, target, form)
    elif form.storage == FLOAT:
        for path in (traced, traced.with_name(traced.name + ".data")):
            shutil.copyfile(path, folder / path.name)
    else:
        import onnx

        bits = int(form.storage.removeprefix("int"))
        graph.write(graph.in_few_bits(onnx.load(traced), bits, form.block, vocabulary), target)


@contextmanager
def _traced(model: Any, layers: Sequence[Kept], cache: Path | None, out: Path) -> Iterator[Path]:
    """Give the float32 graph of `model`: kept in `cache`, else in a folder beside `out` that vanishes."""
    if cache is None:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".traced", dir=out.parent) as scratch:
            path = Path(scratch) / "model.onnx"
            trace.write(model, layers, path)
            yield path
        return
    place = cache / digest(model)
    if not place.is_dir():
        with hub.new_folder(place) as folder:
            trace.write(model, layers, folder / "model.onnx")
    yield place / "model.onnx"


def digest(model: Any) -> str:
    """Return a hash of all that the graph of `model` depends on."""
    found = hashlib.sha256()
    found.update(repr([(name, metadata.version(name)) for name in _VERSIONS]).encode())
    found.update(f"{hashlib.sha256(Path(trace.__file__).read_bytes()).hexdigest()}".encode())
    found.update(f"{_config(model).to_json_string(use_diff=False)}{model}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _config(model: Any) -> Any:
    """Return the config of the architecture, without how eckart stores weights."""
    config = plugin.without_guard(copy.deepcopy(model.config))
    for name in ("quantization_config", "attn_implementation", "_is_quantized"):
        config.__dict__.pop(name, None)
    return config


def _describe(folder: Path, model: Any, tokenizer: Any) -> None:
    _config(model).save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _card(result: EngineExport) -> str:
    return f"## Exported\n\n{render.markdown_table(('', 'found'), result.rows())}\n"


def _facts(result: EngineExport, name: str) -> Facts:
    code = f'''import eckart  # pip install eckart

session = eckart.open_export("{name}")
tokens = session.generate([1, 2, 3], max_new_tokens=8)
'''
    return Facts(
        f"{Path(result.source).name}, exported by eckart for {result.engine.partition(' ')[0]}.",
        (result.source,),
        tags=(result.target,),
        continued=True,
        code=code,
        library=result.target,
    )
