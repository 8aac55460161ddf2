"""OpenVINO: the ONNX file read, its KV cache made internal state, saved as IR, run in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx_export
import openvino
import torch
from harness import Options, Row
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor


class OpenVino:
    """A compiled stateful model as a harness.Session."""

    def __init__(self, path: Path, threads: int) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def reset(self) -> None:
        self.request.reset_state()

    def feed(self, ids: Tensor, every: bool) -> Tensor:
        keep = np.arange(0 if every else len(ids) - 1, len(ids))
        logits = self.request.infer({"input_ids": ids[None].numpy(), "keep": keep})["logits"]
        return torch.from_numpy(logits[0].copy())


def stateful(source: Path) -> Any:
    model = openvino.Core().read_model(source)
    names = [name for port in model.inputs for name in port.get_names() if name.startswith("past_")]
    apply_make_stateful_transformation(model, {name: name.replace("past_", "present_") for name in names})
    return model


def convert(source: Path, storage: str) -> Path:
    """Return the IR of an ONNX file with its weights stored in `storage`, made once."""
    target = source.with_name(f"openvino-{storage}.xml")
    if not target.is_file():
        model = stateful(source)
        if storage == "int8":
            import nncf

            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        partial = source.with_name(f"partial-{storage}.xml")
        openvino.save_model(model, partial, compress_to_fp16=storage == "float16")
        partial.with_suffix(".bin").replace(target.with_suffix(".bin"))
        partial.replace(target)
    return target


def rows(folders: list[Path], text: Path, options: Options) -> Iterator[Row]:
    cut = harness.windows(folders[0], text, options)
    paths = [convert(onnx_export.export(folder, options), options.storage) for folder in folders]
    sessions = [OpenVino(path, options.threads) for path in paths]
    speeds = harness.sessions_in_turn(sessions, cut.flatten()[: options.prompt], options)
    for folder, path, session, own in zip(folders, paths, sessions, speeds, strict=True):
        yield {
            **harness.row(
                folder,
                own,
                size=path.stat().st_size + path.with_suffix(".bin").stat().st_size,
                size_of="OpenVINO IR, .xml and .bin",
                perplexity=harness.perplexity(session, cut),
            ),
            "check": onnx_export.difference(folder, session, cut[0]),
            "version": harness.version("openvino", "onnx", "torch", "transformers"),
        }
