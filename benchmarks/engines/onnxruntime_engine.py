"""onnxruntime: the folder exported by torch.onnx, in float32 or with its linears in int8 or int4.

A head that is tied to the embedding stays in float32: it is no MatMul by a constant in the graph.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx
import onnx_export
import onnxruntime
import torch
from harness import Options, Row
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch import Tensor


class Onnx:
    """An onnxruntime session as a harness.Session; the cache stays in onnxruntime's own values."""

    def __init__(self, path: Path, threads: int) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.inputs = [found.name for found in self.session.get_inputs()]
        self.outputs = [found.name for found in self.session.get_outputs()]
        shape = self.session.get_inputs()[2].shape
        self.nothing = np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32)
        self.reset()

    def reset(self) -> None:
        self.past = [_value(self.nothing) for _ in self.inputs[2:]]

    def feed(self, ids: Tensor, every: bool) -> Tensor:
        keep = np.arange(0 if every else len(ids) - 1, len(ids))
        values = [_value(ids[None].numpy()), _value(keep), *self.past]
        logits, *self.past = self.session.run_with_ort_values(
            self.outputs, dict(zip(self.inputs, values, strict=True))
        )
        return torch.from_numpy(logits.numpy()[0])


def _value(array: Any) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def weight_only(source: Path, storage: str) -> Path:
    """Return the file with each MatMul by a constant in blocks of 32 integers, made once."""
    target = source.with_name(f"{storage}.onnx")
    if not target.is_file():
        bits = int(storage.removeprefix("int"))
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, accuracy_level=4, bits=bits)
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        partial = source.with_name(f"partial-{storage}.onnx")
        quantizer.model.save_model_to_file(str(partial))
        partial.replace(target)
    return target


def rows(folders: list[Path], text: Path, options: Options) -> Iterator[Row]:
    cut = harness.windows(folders[0], text, options)
    exported = [onnx_export.export(folder, options) for folder in folders]
    whole = options.storage == "float32"
    paths = exported if whole else [weight_only(path, options.storage) for path in exported]
    sessions = [Onnx(path, options.threads) for path in paths]
    speeds = harness.sessions_in_turn(sessions, cut.flatten()[: options.prompt], options)
    for folder, path, session, own in zip(folders, paths, sessions, speeds, strict=True):
        yield {
            **harness.row(
                folder,
                own,
                size=sum(part.stat().st_size for part in path.parent.glob(path.name + "*")),
                size_of="ONNX file with its weights",
                perplexity=harness.perplexity(session, cut),
            ),
            "check": onnx_export.difference(folder, session, cut[0]),
            "version": harness.version("onnxruntime", "onnx", "torch", "transformers"),
        }
