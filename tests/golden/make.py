"""Make the golden folder of the current format; run it once per format, and keep what it made.

python -m tests.golden.make

What a format added is in its own folder: earlier ones hold the rest.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import eckart
from eckart import assemble, declaration, factors, joint, kinds, models, plugin
from eckart.linalg import truncated_svd

from .. import tiny


def joined(
    model: Any, holder: str, ends: tuple[str, ...], form: str, rank: int
) -> dict[str, torch.nn.Module]:
    """Return the modules of matrices in `holder` with a right factor in common."""
    names = [f"{holder}.{end}" for end in ends]
    linears = [models.find(model, name) for name in names]
    svd = truncated_svd(torch.cat([linear.weight.detach() for linear in linears]).double(), rank)
    stack = factors.LowRank(svd.left * svd.values, svd.right)
    made = joint.build(stack, [(linear.out_features, linear.bias) for linear in linears], form)
    return {name: module.float() for name, module in zip(names, made, strict=True)}


def main() -> None:
    folder = Path(__file__).parent / f"format-{declaration.FORMAT}"
    model: Any = kinds.unfold(tiny.build("qwen2"))
    made: dict[str, torch.nn.Module] = {}
    for block, form in zip(models.block_names(model), factors.FORMS, strict=True):
        made |= joined(model, f"{block}.self_attn", ("q_proj", "k_proj", "v_proj"), form, 11)
        made |= joined(model, f"{block}.mlp", ("gate_proj", "up_proj"), form, 9)
    assemble.put(model, made)
    plugin.mark(kinds.fold(model))
    eckart.save(models.cast(model, torch.bfloat16), None, folder)
    (folder / "expected").mkdir()
    with torch.no_grad():
        logits = models.cast(model, torch.float32)(input_ids=tiny.tokens()).logits
    save_file({"tokens": tiny.tokens(), "logits": logits}, folder / "expected" / "logits.safetensors")


if __name__ == "__main__":
    main()
