"""ONNX graphs: written with every weight once, and stored in few bits for onnxruntime."""

import hashlib
import importlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

_ALIGNED = 64
_INSIDE = 1024
"""Tensors of fewer bytes stay in the graph."""
_ACCURACY = 4
"""Of MatMulNBits: inputs are rounded to int8 in blocks as well, which its fast kernels want."""
_ENDS_BITS = 8
"""Of embeddings and output head: the storage that users of 4 bits leave them in, too."""


def clean(model: Any) -> Any:
    """Return `model` (an onnx.ModelProto) without the source lines and names that a trace leaves in it."""
    for part in (model, model.graph, *model.graph.node, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]
    return model


def write(model: Any, path: Path) -> None:
    """Write `model` to `path`, its weights to `path`.data beside it, equal bytes once whatever their names.

    Tied embeddings, bases that several maps share, and the packed rows that embedding and head both read
    take their place once.
    """
    import onnx

    data = path.with_name(path.name + ".data")
    places: dict[bytes, int] = {}
    with data.open("wb") as stream:
        for tensor in model.graph.initializer:
            raw = _raw(tensor)
            if len(raw) < _INSIDE:
                continue
            digest = hashlib.sha256(raw).digest()
            if digest not in places:
                stream.write(b"\0" * (-stream.tell() % _ALIGNED))
                places[digest] = stream.tell()
                stream.write(raw)
            _point(tensor, data.name, places[digest], len(raw))
    onnx.save(model, path)


def _raw(tensor: Any) -> bytes:
    from onnx import numpy_helper

    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    found: bytes = tensor.raw_data
    return found


def _point(tensor: Any, file: str, offset: int, length: int) -> None:
    from onnx import TensorProto

    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def in_few_bits(model: Any, bits: int, block: int, vocabulary: int) -> Any:
    """Return `model` with each product by a constant as MatMulNBits of `bits` bits in blocks of `block`.

    Embeddings and output head are stored in 8 bits whatever `bits` is, once where they are tied.

    Args:
        model: an onnx.ModelProto with its weights in memory; it is changed.
        bits: 8 or 4.
        block: how many weights of a row have scale and zero point in common.
        vocabulary: rows of the embeddings: what tells them from other tables.
    """
    _fold_transposes(model)
    wide = {node.name for node in _wide_products(model, vocabulary)}
    if bits != _ENDS_BITS:
        model = _rounded(model, bits, block, leaving=wide)
    model = _rounded(model, _ENDS_BITS, block)
    for node in [*_tables(model, vocabulary)]:
        _round_table(model, node, block)
    _drop_unused(model)
    return model


def _fold_transposes(model: Any) -> None:
    """Transpose constants now: the product by a tied head is one by a transposed table."""
    import numpy as np
    from onnx import numpy_helper

    weights = _weights(model)
    for node in [node for node in model.graph.node if node.op_type == "Transpose"]:
        if node.input[0] in weights and len(weights[node.input[0]].dims) == 2:
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).T)
            model.graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
            model.graph.node.remove(node)


def _weights(model: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _wide_products(model: Any, vocabulary: int) -> Iterator[Any]:
    weights = _weights(model)
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and vocabulary in weight.dims[-1:]:
            yield node


def _rounded(model: Any, bits: int, block: int, leaving: Collection[str] = ()) -> Any:
    kit = _kit()
    config = kit.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=False, accuracy_level=_ACCURACY, bits=bits
    )
    quantizer = kit.MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=list(leaving))
    quantizer.process()
    return quantizer.model.model


def _kit() -> Any:
    """Return onnxruntime's module for this; it must neither set up logging for us nor report each node."""
    root, name = logging.getLogger(), "onnxruntime.quantization.matmul_nbits_quantizer"
    stand_in = logging.NullHandler()
    root.addHandler(stand_in)
    try:
        found = importlib.import_module(name)
    finally:
        root.removeHandler(stand_in)
    logging.getLogger(name).setLevel(logging.ERROR)
    return found


def _tables(model: Any, vocabulary: int) -> Iterator[Any]:
    weights = _weights(model)
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in weights:
            dims = weights[node.input[0]].dims
            if len(dims) == 2 and dims[0] == vocabulary and weights[node.input[0]].data_type == 1:
                yield node


def _round_table(model: Any, node: Any, block: int) -> None:
    """Put GatherBlockQuantized where `node`, the look-up of embeddings, is.

    A head that is rounded with the same rows in the same blocks has the same bytes; `write` keeps them once.
    """
    import numpy as np
    from onnx import helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    table = numpy_helper.to_array(_weights(model)[node.input[0]])
    settings = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=_ENDS_BITS)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(
        np.ascontiguousarray(table.T)
    )
    if table.shape[1] % block:
        return  # the look-up knows no padding: such a table stays as it is
    name = node.input[0]
    parts = {"codes": packed.reshape(len(table), -1), "scales": scales, "zeros": zeros}
    for part, values in parts.items():
        model.graph.initializer.append(numpy_helper.from_array(values, f"{name}.{part}"))
    inputs = [f"{name}.codes", node.input[1], f"{name}.scales", f"{name}.zeros"]
    made = helper.make_node(
        "GatherBlockQuantized", inputs, list(node.output), f"{node.name}_Q{_ENDS_BITS}",
        domain="com.microsoft", bits=_ENDS_BITS, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    place = [*model.graph.node].index(node)
    model.graph.node.remove(node)
    model.graph.node.insert(place, made)


def _drop_unused(model: Any) -> None:
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for tensor in [*model.graph.initializer]:
        if tensor.name not in used:
            model.graph.initializer.remove(tensor)
