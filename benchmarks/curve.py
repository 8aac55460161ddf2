"""Loss against size: predicted, corrected, measured; with an empty cache and from it; a size by perplexity.

    python benchmarks/curve.py MODEL --text CALIBRATION --eval-text TEST --cache NEW_FOLDER

Four runs: the curve with an empty cache; the same again, with points measured; compress to one keep; and
compress to a percentage of perplexity. The cache is left for the caller to delete.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import eckart
from eckart import environment, render, report_curve, report_search
from eckart.bars import Bars
from eckart.shelf import Shelf


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--eval-text", required=True, nargs="+")
    parser.add_argument("--cache", required=True, type=Path, help="a folder that is not there")
    parser.add_argument("--measure", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--keep", type=float, default=0.8, help="of the plain compression")
    parser.add_argument("--increase", default="3%")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--eval-tokens", type=int, default=6_144)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/curve.json"))
    return parser.parse_args()


def figures(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def stages(seconds: Any) -> dict[str, float]:
    return {name: round(value, 1) for name, value in seconds.items() if value >= 0.05}


def main() -> None:
    options = arguments()
    if options.cache.exists():
        raise SystemExit(
            f"{options.cache} is there: name a new folder, so that the first run is without cache"
        )
    common: dict[str, Any] = {
        "text": options.text, "eval_text": options.eval_text, "of": "linears", "tokens": options.tokens,
        "gradient_tokens": options.tokens // 2, "dtype": options.dtype, "cache": options.cache,
    }  # fmt: skip
    spent: dict[str, Any] = {}
    with Bars() as bars:

        def timed(name: str, run: Any, **given: Any) -> Any:
            start = time.perf_counter()
            found = run(options.model, **common, **given, watch=bars.watch)
            spent[name] = {"all": round(time.perf_counter() - start, 1)}
            return found

        recipe = eckart.Recipe(keep=1.0, eval_tokens=options.eval_tokens)
        cold = timed("curve, empty cache", eckart.curve, recipe=recipe)
        spent["curve, empty cache"]["stages"] = stages(cold.seconds)
        size = Shelf(options.cache).bytes()
        warm = timed("curve, from the cache", eckart.curve, recipe=recipe)
        spent["curve, from the cache"]["stages"] = stages(warm.seconds)
        whole = timed("curve with measured points", eckart.curve, recipe=recipe, measure=options.measure)
        spent["curve with measured points"]["stages"] = stages(whole.seconds)
        _, plain = timed("compress, from the cache", eckart.compress, recipe=recipe, keep=options.keep)
        spent["compress, from the cache"]["stages"] = stages(plain.seconds)
        _, found = timed(
            "compress by perplexity", eckart.compress, recipe=recipe, max_ppl_increase=options.increase
        )
        spent["compress by perplexity"]["stages"] = stages(found.seconds)
    rows = [
        {name: figures(value) if isinstance(value, float) else value for name, value in row.items()}
        for row in whole.to_dict()["rows"]
    ]
    names = {key: [Path(f).name for f in getattr(options, key)] for key in ("text", "eval_text")}
    result = {
        "protocol": {"model": Path(options.model).name, **names, "of": "linears", "dtype": options.dtype,
                     "tokens": options.tokens, "gradient_tokens": options.tokens // 2,
                     "eval_tokens": options.eval_tokens, "seq_len": recipe.seq_len, "method": whole.method},
        "dense": figures(whole.dense.perplexity), "rows": rows, "knots": whole.correction.knots,
        "cache_bytes": size, "seconds": spent, "search": asdict(found.search),
        "found": {"keep": found.recipe.keep, "keep_model": found.keep_model, "bytes": found.after.bytes,
                  "perplexity": figures(found.compressed.perplexity), "predicted": found.predicted_increase},
        "environment": environment.describe(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render.markdown_table(report_curve.CURVE, [report_curve.curve_row(row) for row in whole.rows]))
    print(render.markdown_table(report_curve.CHECKS, [report_curve.check_row(row) for row in whole.measured]))
    print(render.markdown_table(report_search.COLUMNS, report_search.search_rows(found.search)))
    print(f"cache: {size / 1e6:,.0f} MB; seconds: {json.dumps(spent)}")


if __name__ == "__main__":
    main()
