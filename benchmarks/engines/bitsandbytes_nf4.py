"""bitsandbytes: the linears quantised to NF4 (double quantisation) while the folder is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Options, Row
from pytorch import Transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from eckart import measure

BYTES_OF = "memory footprint of the loaded model with its scales; its embedding stays in float32"
CONFIG = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CONFIG, device_map={"": "cpu"}
    ).eval()


@torch.no_grad()
def refusal(model: Any) -> str | None:
    """Return the first line of the error that bitsandbytes raises at the first product, or None.

    Its packed kernel for processors with AVX-512 BF16 takes only inputs that are a multiple of 64.
    """
    try:
        model(input_ids=torch.tensor([[1, 2]]))
    except RuntimeError as error:
        return f"RuntimeError: {str(error).splitlines()[0]}"
    return None


def footprint(model: Any) -> int:
    """Bytes of the parameters, the buffers, and the scales, which are neither."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return int(model.get_memory_footprint() + sum(state.absmax.nbytes for state in states if state))


def rows(folders: list[Path], text: Path, options: Options) -> Iterator[Row]:
    cut = harness.windows(folders[0], text, options)
    models = {folder: load(folder) for folder in folders}
    errors = {folder: refusal(model) for folder, model in models.items()}
    running = [folder for folder in folders if errors[folder] is None]
    sessions = [Transformers(models[folder]) for folder in running]
    speeds = dict(
        zip(
            running,
            harness.sessions_in_turn(sessions, cut.flatten()[: options.prompt], options),
            strict=True,
        )
    )
    for folder, model in models.items():
        if folder not in speeds:
            yield {"model": folder.name, "error": errors[folder]}
            continue
        yield {
            **harness.row(
                folder,
                speeds[folder],
                size=footprint(model),
                size_of=BYTES_OF,
                perplexity=measure.perplexity(model, cut).perplexity,
            ),
            "version": harness.version("bitsandbytes", "torch", "transformers"),
        }
