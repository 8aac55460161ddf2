"""Make the golden folder of the current format; run it once per format, and keep what it made.

python -m tests.golden.make

What a format added is in its own folder: earlier ones hold the rest.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import eckart
from eckart import assemble, declaration, factors, kinds, models, plugin, storing
from eckart.linalg import Metric, truncated_svd
from eckart.shared import SharedLinear

from .. import tiny


def low_rank(model: Any, name: str, rank: int, form: factors.Form) -> torch.nn.Module:
    """Return the module of the matrix `name` at a rank."""
    linear = models.find(model, name)
    svd = truncated_svd(linear.weight.detach().double(), rank)
    map_ = factors.LowRank(svd.left * svd.values, svd.right)
    return factors.build(map_, form, linear.bias).to(torch.float32)


def main() -> None:
    folder = Path(__file__).parent / f"format-{declaration.FORMAT}"
    model: Any = kinds.unfold(tiny.build("mixtral"))
    names = [target.name for target in models.targets(model)]
    experts = [name for name in names if ".experts." in name]
    made = {
        name: low_rank(model, name, 8 + place % 3, factors.FORMS[place % 2])
        for place, name in enumerate(experts[:4])
    }
    queries = [name for name in names if name.endswith("q_proj")]
    first = models.find(model, queries[0])
    base = torch.nn.Linear(first.in_features, first.out_features, bias=False)
    base.weight = first.weight
    for rank, name in zip((0, 3), queries, strict=True):
        made[name] = SharedLinear(base, rank, scaled=rank > 0)
    assemble.put(model, made)
    storing.round_module(
        model, names[-1], "int8", *map(Metric, reversed(models.find(model, names[-1]).weight.shape))
    )
    plugin.mark(kinds.fold(model))
    eckart.save(models.cast(model, torch.bfloat16), None, folder)
    (folder / "expected").mkdir()
    with torch.no_grad():
        logits = models.cast(model, torch.float32)(input_ids=tiny.tokens()).logits
    save_file({"tokens": tiny.tokens(), "logits": logits}, folder / "expected" / "logits.safetensors")


if __name__ == "__main__":
    main()
