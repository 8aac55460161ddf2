"""Make the golden folder of the current format; run it once per format, and keep what it made.

python -m tests.golden.make
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import eckart
from eckart import factors, models, plugin
from eckart.linalg import truncated_svd

from .. import tiny


def main() -> None:
    folder = Path(__file__).parent / f"format-{plugin.FORMAT}"
    model = tiny.build("llama-bias-untied")
    for index, target in enumerate(models.targets(model)):
        linear = models.find(model, target.name)
        svd = truncated_svd(linear.weight.detach().double(), 8 + index % 3)
        low_rank = factors.LowRank(svd.left * svd.values, svd.right)
        module = factors.build(low_rank, factors.FORMS[index % 2], linear.bias).to(torch.float32)
        models.replace(model, target.name, module)
    plugin.mark(model)
    eckart.save(models.cast(model, torch.bfloat16), None, folder)
    (folder / "expected").mkdir()
    with torch.no_grad():
        logits = models.cast(model, torch.float32)(input_ids=tiny.tokens()).logits
    save_file({"tokens": tiny.tokens(), "logits": logits}, folder / "expected" / "logits.safetensors")


if __name__ == "__main__":
    main()
