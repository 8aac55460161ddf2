"""What a common right factor for matrices of one input gains and costs: quality and time, printed and kept.

    python benchmarks/shared_inputs.py MODEL --text wikitext2.valid.txt --eval-text wikitext2.test.txt
    python benchmarks/shared_inputs.py --speed

The model is calibrated and decomposed once (kept in `--cache`), and each row starts from it. Finished rows
are kept in the JSON file; the same command makes those that are missing. `--show` prints the tables alone.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import prepared
import torch
from torch import Tensor, nn

from eckart import environment, joint, models, pipeline, ranks, render
from eckart.factors import FORMS, MODULES, FactoredLinear, Form, parameters
from eckart.joint import JointLinear
from eckart.measure import Perplexity
from eckart.pipeline import Prepared
from eckart.recipe import Recipe, from_mapping
from eckart.speed import layers
from eckart.speed.options import Rounds
from eckart.speed.spread import Spread, quotient
from eckart.speed.timing import fixed_threads, in_turn

QUALITY = [
    "keep", "form", "common factors", "perplexity", "loss", "estimated", "q, k, v shared", "gate, up shared",
]  # fmt: skip
ESTIMATES = ["form", "keep", "of one input", "loss, common / apart", "common is better"]
SHARES = (0.2, 0.4, 0.6, 0.8)
STACKS = {
    "q, k, v of 576": (576, (576, 192, 192)),
    "gate, up of 576": (576, (1536, 1536)),
    "q, k, v of 4096": (4096, (4096, 1024, 1024)),
    "gate, up of 4096": (4096, (11008, 11008)),
}
WAYS = ("apart, factored", "apart, pivoted", "joint, recomputed", "joint, factored", "joint, pivoted")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--eval-text", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=6_144, help="to calibrate on, all with gradients")
    parser.add_argument("--eval-tokens", type=int, default=4_096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--forms", nargs="+", default=["factored", "pivoted", "mixed"])
    parser.add_argument("--cache", type=Path, default=Path(".cache/shared-inputs.pt"))
    parser.add_argument("--estimates", action="store_true", help="compare estimates, and measure nothing")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--stacks", nargs="+", default=list(STACKS))
    parser.add_argument("--at", type=int, nargs="+", default=[1, 16, 512], help="tokens at once")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shared-inputs.json"))
    return parser.parse_args()


def quality(recipe: Recipe, made: Prepared, keep: float, form: str, share: bool) -> dict[str, Any]:
    """Compress a copy of the prepared model, and measure it."""
    start = time.process_time()
    own = replace(recipe, keep=keep, form=form, share_inputs=share)  # type: ignore[arg-type]
    decomposed = made.decomposed if share else replace(made.decomposed, readings=())
    loaded = replace(made.loaded, model=copy.deepcopy(made.loaded.model))
    model, result = pipeline.finish(own, replace(made, loaded=loaded, decomposed=decomposed))
    groups = Counter(len(names) for names in _groups(model).values())
    assert isinstance(result.dense, Perplexity)
    assert isinstance(result.compressed, Perplexity)
    return {
        "keep": keep, "form": form, "share": share, "perplexity": result.compressed.perplexity,
        "loss": result.compressed.loss - result.dense.loss, "estimated": result.predicted_increase,
        "linears": result.after.linears / result.before.linears, "shared_3": groups[3], "shared_2": groups[2],
        "seconds": time.process_time() - start,
    }  # fmt: skip


def _groups(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, first in models.bases(model).items():
        found.setdefault(first, [first]).append(name)
    return found


def estimates(made: Prepared, keep: float, form: Form) -> dict[str, Any]:
    """Compare, group by group at equal parameters, what a common right factor is estimated to lose."""
    shapes = {target.name: target.shape for target in made.found}
    quotients: dict[int, list[float]] = {}
    for reading in made.decomposed.readings:
        tails = [made.decomposed.parts[name].losses() for name in reading.members]
        common = made.decomposed.parts[reading.name].losses()
        # Without anything, a stack loses what its maps lose.
        assert math.isclose(float(common[0]), sum(float(tail[0]) for tail in tails), rel_tol=1e-6)
        whole = (sum(shapes[name][0] for name in reading.members), shapes[reading.members[0]][1])
        budget = int(keep * whole[0] * whole[1])
        own = {
            name: ranks.curve(form, shapes[name], tail)
            for name, tail in zip(reading.members, tails, strict=True)
        }
        chosen = ranks.allocate(own, budget)
        apart = sum(curve.losses[chosen[name]] for name, curve in own.items())
        rank = max(r for r in range(1, len(common)) if parameters(form, whole, r) <= budget)
        quotients.setdefault(len(reading.members), []).append(float(common[rank]) / apart)
    return {
        f"{count} maps": {
            "median": statistics.median(found), "least": min(found), "most": max(found),
            "groups": len(found), "better": sum(value < 1 for value in found),
        }
        for count, found in quotients.items()
    }  # fmt: skip


class Holder(nn.Module):
    """Maps of one input, as an attention has them."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(inputs) for module in self.children())


def _holder(parts: list[nn.Module]) -> nn.Module:
    made = Holder()
    for place, part in enumerate(parts):
        made.add_module(f"map_{place}", part)
    joint.bind(made)
    return made.eval()


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(shape[-1])


def _joint(width: int, heights: tuple[int, ...], rank: int, pivoted: bool) -> list[JointLinear]:
    """Return maps with random weights that go on from one product; pivots are spread by height."""
    down, total, taken = nn.Linear(width, rank, bias=False), sum(heights), 0
    made, start = [], 0
    for height in heights:
        end = rank * (start + height) // total
        module = JointLinear(down, height, end - taken if pivoted else None)
        if module.order is not None:
            places = torch.cat([torch.arange(taken, end), rank + torch.arange(height - (end - taken))])
            module.order.copy_(places[torch.randperm(height, generator=torch.Generator().manual_seed(0))])
        made.append(module)
        start, taken = start + height, end
    return made


def ways(width: int, heights: tuple[int, ...], keep: float) -> dict[str, nn.Module]:
    """Return maps of one input, dense and in each way at the same share of parameters, random."""
    total = sum(heights)
    found = {"dense": _holder([nn.Linear(width, m, bias=False) for m in heights])}
    for form in FORMS:
        parts: list[nn.Module] = []
        for height in heights:
            own = ranks.uniform(ranks.Keep(keep), form, (height, width))
            whole = nn.Linear(width, height, bias=False)
            parts.append(whole if own is None else MODULES[form](width, height, own))
        found[f"apart, {form}"] = _holder(parts)
        rank = ranks.uniform(ranks.Keep(keep), form, (total, width))
        assert rank is not None
        made = _joint(width, heights, rank, form == "pivoted")
        found[f"joint, {form}"] = _holder(list(made))
        if form == "factored":
            again: list[nn.Module] = []
            for module in made:
                one = FactoredLinear(width, module.out_features, min(rank, module.out_features))
                one.rank, one.down = rank, module.down
                assert module.up is not None
                one.up = module.up
                again.append(one)
            found["joint, recomputed"] = _holder(again)
    return found


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@torch.no_grad()
def _calls(turns: Any, inputs: Tensor, calls: int) -> float:
    modules = list(itertools.islice(turns, calls))
    start = time.perf_counter()
    for module in modules:
        module(inputs)
    return (time.perf_counter() - start) / calls


def speed(stack: str, tokens: int, keep: float, runs: int) -> dict[str, Any]:
    """Time every way to compute a stack, in turn, each on weights that are in no cache."""
    width, heights = STACKS[stack]
    forms = ways(width, heights, keep)
    banks = {name: itertools.cycle(bank) for name, bank in layers.copies(forms).items()}
    inputs = _random(tokens, width) * math.sqrt(width)
    once = min(_calls(banks["dense"], inputs, 2) for _ in range(2))
    calls = max(1, math.ceil(0.02 / once))
    tasks = {name: partial(_calls, turns, inputs, calls) for name, turns in banks.items()}
    found = {name: Spread(tuple(v)) for name, v in in_turn(tasks, Rounds(runs=runs, warmup=2)).items()}
    whole = _size(forms["dense"])
    row: dict[str, Any] = {"stack": stack, "tokens": tokens, "keep": keep, "dense": found["dense"].median}
    row["ways"] = {
        name: {**quotient(found[name], found["dense"]).to_dict(), "share": _size(forms[name]) / whole}
        for name in WAYS
    }
    return row


def show(results: Mapping[str, Any]) -> str:
    lines = []
    if results["quality"]:
        rows = [
            (
                f"{row['keep']:g}", row["form"], "may be" if row["share"] else "none",
                f"{row['perplexity']:.2f}", f"{row['loss']:+.3f}", f"{row['estimated']:+.3f}",
                str(row["shared_3"]), str(row["shared_2"]),
            )
            for row in results["quality"].values()
        ]  # fmt: skip
        lines += [f"dense: {results['dense']:.2f}", "", render.markdown_table(QUALITY, rows)]
    if results.get("estimates"):
        compared = [
            (
                form, keep, count, f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
                f"{row['better']} of {row['groups']}",
            )
            for form, keeps in results["estimates"].items()
            for keep, counts in keeps.items()
            for count, row in counts.items()
        ]  # fmt: skip
        lines += ["", render.markdown_table(ESTIMATES, compared)]
    if results["speed"]:
        timed = [
            (
                row["stack"], str(row["tokens"]), f"{row['dense'] * 1e6:,.0f}",
                *(
                    f"{row['ways'][way]['value']:.2f} ({row['ways'][way]['lower']:.2f} to "
                    f"{row['ways'][way]['upper']:.2f})"
                    for way in WAYS
                ),
            )
            for row in results["speed"].values()
        ]  # fmt: skip
        lines += ["", render.markdown_table(["maps", "tokens", "dense, us", *WAYS], timed)]
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    results: dict[str, Any] = {"quality": {}, "speed": {}}
    if options.out.is_file():
        results = json.loads(options.out.read_text())

    def keep() -> None:
        results["environment"] = environment.describe()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    if options.speed and not options.show:
        with fixed_threads(1):
            for stack, tokens in itertools.product(options.stacks, options.at):
                if f"{stack}, {tokens}" not in results["speed"]:
                    results["speed"][f"{stack}, {tokens}"] = speed(stack, tokens, 0.6, options.runs)
                    keep()
    wanted = [
        (part, form, share)
        for part, form, share in itertools.product(options.keep, options.forms, (False, True))
        if f"{part:g}, {form}, {share}" not in results["quality"]
    ]
    if options.model and wanted and not options.show:
        common = prepared.base(
            options.model, options.text, options.eval_text, options.tokens, options.seq_len
        )
        common |= {
            "eval_tokens": options.eval_tokens,
            "gradient_tokens": options.tokens,
            "share_inputs": True,
        }
        made, results["seconds_to_prepare"] = prepared.made(
            common, options.cache, {"keep": 0.6, "of": "linears"}
        )
        recipe = from_mapping({**common, "keep": 0.6, "of": "linears"})
        assert isinstance(made.dense, Perplexity)
        results["dense"], results["protocol"] = made.dense.perplexity, {
            name: value for name, value in common.items() if name not in ("model", "text", "eval_text")
        }  # fmt: skip
        results["estimates"] = {
            form: {f"{share:g}": estimates(made, share, form) for share in SHARES} for form in FORMS
        }
        keep()
        for part, form, share in [] if options.estimates else wanted:
            results["quality"][f"{part:g}, {form}, {share}"] = quality(recipe, made, part, form, share)
            keep()
    print(show(results))


if __name__ == "__main__":
    main()
