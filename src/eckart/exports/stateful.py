"""OpenVINO's own format from an ONNX graph: keys and values as internal state, weights in few bits."""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

from .options import Form

_LEAST_GROUP = 16


def convert(source: Path, target: Path, form: Form) -> None:
    """Write the ONNX graph at `source` as OpenVINO's `target` (.xml, and .bin beside it).

    int8 is asymmetric with a scale for each row. int4 is asymmetric in groups of `form.block`; where those do
    not divide a row, in the largest power of two from 16 on that does, else the matrix is stored as in int8,
    as embeddings and output head are.
    """
    import openvino
    from openvino import passes

    model = openvino.Core().read_model(source)
    names = [name for port in model.inputs for name in port.get_names() if name.startswith("past_")]
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful({name: name.replace("past_", "present_") for name in names}))
    manager.run_passes(model)
    if form.storage in ("int8", "int4"):
        model = _compressed(model, form)
    openvino.save_model(model, target, compress_to_fp16=form.storage == "float16")


def _compressed(model: Any, form: Form) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    # Its bars are for a terminal of its own, and stdout is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        if form.storage == "int8":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        advanced = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST,
            min_adjusted_group_size=_LEAST_GROUP,
        )
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            ratio=1.0,
            group_size=form.block,
            advanced_parameters=advanced,
        )
