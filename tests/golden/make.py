"""Make the golden folder of the current format; run it once per format, and keep what it made.

python -m tests.golden.make
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import eckart
from eckart import (
    assemble,
    calibrate,
    correcting,
    declaration,
    dimensions,
    embeddings,
    factors,
    linalg,
    models,
    plugin,
    stats,
    storing,
)
from eckart.linalg import truncated_svd
from eckart.quant.corrected import CorrectedLinear
from eckart.quant.storage import STORAGES

from .. import tiny


def main() -> None:
    folder = Path(__file__).parent / f"format-{declaration.FORMAT}"
    model = tiny.build("llama-bias-untied")
    found = models.targets(model)
    mlp = next(d for d in dimensions.find(model, found) if d.kind == "mlp" and ".1." in d.name)
    assemble.put(model, dimensions.narrowed(model, mlp, torch.arange(0, mlp.units, 2)))
    half = torch.arange(0, 16, 2)
    key, output = (models.find(model, f"model.layers.1.self_attn.{n}_proj") for n in "ko")
    rows, columns = key.weight.detach()[half], output.weight.detach()[:, half]
    bias = key.bias.detach()[half]
    modules = {
        "model.layers.1.self_attn.k_proj": factors.PartialLinear.of(key, "rows", half, rows, bias),
        "model.layers.1.self_attn.o_proj": factors.PartialLinear.of(
            output, "columns", half, columns, output.bias
        ),
    }
    assemble.put(model, modules)
    whole = next(target for target in found if target.name.endswith("0.self_attn.v_proj"))
    recipe = eckart.Recipe(keep=1.0, method="svd", storage="nf4", correction="lorc", correction_rank=4)
    nothing = calibrate.Calibrated(stats.Stats(), 0, 0)
    correcting.correct(
        recipe, model, [correcting.Whole(whole, whole.name, "nf4")], nothing, lambda done, total: None
    )
    for index, target in enumerate(found):
        if type(model.get_submodule(target.name)) is not torch.nn.Linear:
            continue
        linear = models.find(model, target.name)
        svd = truncated_svd(linear.weight.detach().double(), 8 + index % 3)
        low_rank = factors.LowRank(svd.left * svd.values, svd.right)
        module = factors.build(low_rank, factors.FORMS[index % 2], linear.bias).to(torch.float32)
        models.replace(model, target.name, module)
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    pair = [factors.FactoredLinear(32, 32, 8, bias=True) for _ in names]
    pair[1].down = pair[0].down
    assemble.put(model, dict(zip(names, pair, strict=True)))
    for place, (name, small) in enumerate(models.low_rank_modules(model).items()):
        if name not in names and not isinstance(small, embeddings.FactoredEmbedding | CorrectedLinear):
            metrics = linalg.Metric(small.in_features), linalg.Metric(small.out_features)
            storing.round_module(model, name, list(STORAGES)[place % len(STORAGES)], *metrics)
    for end, kind in (("model.embed_tokens", "nf4-dq"), ("lm_head", "int3")):
        storing.round_module(model, end, kind, linalg.Metric(32), linalg.Metric(97))
    plugin.mark(model)
    eckart.save(models.cast(model, torch.bfloat16), None, folder)
    (folder / "expected").mkdir()
    with torch.no_grad():
        logits = models.cast(model, torch.float32)(input_ids=tiny.tokens()).logits
    save_file({"tokens": tiny.tokens(), "logits": logits}, folder / "expected" / "logits.safetensors")


if __name__ == "__main__":
    main()
