"""Imports point downward, transformers stays out of the maths, print lives in the command line."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "eckart"
LAYERS = {
    "errors": 0,
    "bars": 1,
    "batches": 1,
    "checkpoint": 1,
    "front": 1,
    "prediction": 1,
    "curves": 5,
    "report_curve": 8,
    "report_search": 7,
    "points": 14,
    "curving": 16,
    "sweeps": 6,
    "report_sweep": 8,
    "sweep_group": 19,
    "sweeping": 20,
    "seeking": 1,
    "shelf": 3,
    "identity": 7,
    "cached": 11,
    "decomposing": 12,
    "planning": 12,
    "construct": 1,
    "divergence": 1,
    "environment": 1,
    "experts": 1,
    "fused": 1,
    "linalg": 1,
    "measure": 1,
    "memory": 1,
    "quiet": 5,
    "origins": 1,
    "modelcard": 8,
    "pushing": 12,
    "commands_push": 13,
    "zeroshot": 0,
    "zeroshot.scores": 1,
    "zeroshot.evaluated": 2,
    "zeroshot.harness": 2,
    "zeroshot.report_tasks": 3,
    "report_written": 14,
    "commands_eval": 18,
    "mixtures": 2,
    "stats": 1,
    "text": 1,
    "factors": 2,
    "spectra": 2,
    "objectives": 2,
    "groups": 2,
    "healing": 2,
    "interpolative": 2,
    "nystrom": 2,
    "render": 2,
    "stages": 2,
    "width": 2,
    "consensus": 3,
    "common_pivots": 3,
    "lean": 4,
    "embeddings": 3,
    "lessons": 3,
    "losses": 3,
    "several": 3,
    "methods": 3,
    "ranks": 3,
    "shared": 4,
    "latency": 4,
    "method_checks": 4,
    "joint": 3,
    "stacking": 2,
    "overrides": 4,
    "yaml_files": 4,
    "kinds": 5,
    "channels": 5,
    "recipe": 5,
    "models": 6,
    "result": 6,
    "terminal": 6,
    "panels": 6,
    "joined": 7,
    "windows": 6,
    "calibrate": 7,
    "chain": 7,
    "dense": 7,
    "fusing": 7,
    "dimensions": 7,
    "stores": 7,
    "tasks": 7,
    "running": 7,
    "teacher": 7,
    "training": 7,
    "blockwise": 8,
    "choices": 8,
    "closed": 8,
    "declaration": 8,
    "distil": 8,
    "heads": 8,
    "reallocate": 9,
    "readings": 8,
    "routing": 8,
    "sharing": 8,
    "splitting": 8,
    "factorize": 9,
    "menus": 9,
    "timed": 9,
    "rebuild": 9,
    "refine": 10,
    "resizing": 9,
    "skeleton": 9,
    "assemble": 10,
    "budget": 10,
    "timekeeping": 10,
    "correcting": 10,
    "plugin": 10,
    "stock": 10,
    "hub": 11,
    "selection": 11,
    "storing": 11,
    "accounting": 12,
    "commands_params": 12,
    "commands_export": 14,
    "exporting": 13,
    "exports": 0,
    "exports.options": 1,
    "exports.graph": 1,
    "exports.stateful": 2,
    "exports.session": 2,
    "exports.trace": 6,
    "exports.check": 7,
    "exports.result": 8,
    "exports.prepare": 8,
    "exports.write": 12,
    "mend": 12,
    "report_healing": 12,
    "reading": 12,
    "samples": 8,
    "report_sizes": 12,
    "report_quality": 9,
    "report_sharing": 13,
    "pipeline": 13,
    "report": 13,
    "api": 15,
    "api_sharing": 16,
    "commands_quantise": 16,
    "evaluating": 16,
    "commands_share": 17,
    "commands_curve": 17,
    "commands_heal": 16,
    "commands_spectrum": 17,
    "commands_sweep": 21,
    "survey": 3,
    "files": 2,
    "comparing": 17,
    "report_compare": 18,
    "reporting": 9,
    "commands_report": 19,
    "pages": 0,
    "pages.notebook": 0,
    "pages.html": 1,
    "pages.parts": 1,
    "pages.scales": 1,
    "pages.facts": 2,
    "pages.svg": 2,
    "pages.pictures": 3,
    "pages.spectra": 3,
    "pages.modules": 4,
    "pages.surveyed": 4,
    "pages.healed": 4,
    "pages.speeds": 4,
    "pages.tying": 4,
    "pages.curved": 4,
    "pages.compared": 5,
    "pages.tuned": 5,
    "pages.compressed": 5,
    "pages.fronts": 6,
    "pages.documents": 7,
    "pages.page": 8,
    "report_survey": 4,
    "surveying": 16,
    "cli": 22,
    "__main__": 23,
    "quant": 0,
    "quant.formats": 1,
    "quant.grid": 1,
    "quant.waves": 1,
    "quant.rounding": 2,
    "quant.storage": 2,
    "quant.corrected": 3,
    "quant.kernels": 3,
    "quant.leaves": 3,
    "quant.noise": 3,
    "quant.correction": 4,
    "quant.stored": 4,
    "quant.tables": 4,
    "quant.cells": 5,
    "quant.straight": 6,
    "joining": 13,
    "quantising": 13,
    "tying": 13,
    "scratch": 0,
    "scratch.options": 1,
    "scratch.penalties": 2,
    "scratch.persuasion": 2,
    "scratch.decline": 4,
    "scratch.decay": 6,
    "scratch.tokens": 6,
    "scratch.persuade": 9,
    "scratch.preset": 17,
    "scratch.switch": 18,
    "scratch.pretraining": 18,
    "scratch.report_pretrain": 18,
    "scratch.pretrain": 19,
    "scratch.commands_pretrain": 20,
    "serving": 0,
    "serving.shards": 1,
    "serving.fused": 2,
    "serving.vllm_plugin": 9,
    "speed": 0,
    "speed.options": 1,
    "speed.spread": 1,
    "speed.timing": 2,
    "speed.passing": 3,
    "speed.times": 3,
    "speed.decoding": 5,
    "speed.grid": 5,
    "speed.layers": 5,
    "speed.timetable": 6,
    "speed.shapes": 13,
    "speed.compiled": 6,
    "speed.alone": 16,
    "speed.result": 17,
    "speed.report_speed": 18,
    "speed.run": 18,
    "speed.commands_bench": 19,
    "streaming": 0,
    "streaming.activations": 2,
    "streaming.shards": 10,
    "streaming.work": 2,
    "streaming.team": 2,
    "streaming.parts": 10,
    "streaming.publish": 11,
    "streaming.stream": 12,
    "streaming.matrices": 13,
    "streaming.passes": 13,
    "streaming.job": 14,
    "streaming.decompose": 16,
    "streaming.need": 16,
    "streaming.write": 17,
    "streaming.execute": 18,
    "adapt": 0,
    "adapt.store": 3,
    "adapt.tuning": 3,
    "adapt.examples": 4,
    "adapt.spectrum": 4,
    "adapt.losses": 5,
    "adapt.apply": 7,
    "adapt.batches": 7,
    "adapt.quantised": 7,
    "adapt.judge": 8,
    "adapt.reading": 8,
    "adapt.targets": 8,
    "adapt.allocation": 9,
    "adapt.attach": 9,
    "adapt.sizes": 9,
    "adapt.tuned": 9,
    "adapt.adalora": 10,
    "adapt.footprint": 10,
    "adapt.trainer": 11,
    "adapt.checkpoints": 12,
    "adapt.loading": 12,
    "adapt.report_tune": 12,
    "adapt.resize": 12,
    "adapt.tune": 12,
    "adapt.difference": 13,
    "adapt.fitting": 13,
    "adapt.merge": 13,
    "adapt.session": 13,
    "adapt.commands_tune": 14,
    "adapt.extract": 14,
    "adapt.cards": 16,
    "adapt.toolbox": 17,
    "adapt.commands_adapters": 18,
}
LOWEST_WITH_TRANSFORMERS = LAYERS["kinds"]
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
PRINTING = (
    "cli", "terminal", "panels", "commands_tune", "commands_adapters", "commands_params", "commands_quantise",
    "commands_export", "commands_share", "commands_pretrain", "commands_spectrum", "commands_bench",
    "commands_eval", "commands_push", "commands_curve", "commands_heal", "commands_sweep",
    "commands_report",
)  # fmt: skip


def module_name(path: Path) -> str:
    """Return the dotted name of `path` inside the package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, node: ast.ImportFrom) -> list[str]:
    """Return the dotted names, inside the package, of what a relative import takes."""
    own = path.relative_to(SOURCE).parent.parts
    base = [*own[: len(own) - node.level + 1], *(node.module or "").split(".")]
    whole = [".".join(filter(None, [*base, alias.name])) for alias in node.names]
    return [name if name in LAYERS else ".".join(filter(None, base)) or name for name in whole]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (module, runs at import of the file) of everything that `path` imports."""
    tree = ast.parse(path.read_text())
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found += [(f"eckart.{name}", id(node) not in late) for name in imported(path, node)]
        elif isinstance(node, ast.ImportFrom):
            found.append((str(node.module), id(node) not in late))
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_to_lower_layers(path: Path) -> None:
    own = LAYERS[module_name(path)]
    for name, at_import in imports(path):
        other = name.removeprefix("eckart.")
        if name.startswith("eckart.") and at_import:
            assert other == "__version__" or LAYERS[other] < own, (
                f"{module_name(path)} ({own}) imports {other}"
            )
        if name.split(".")[0] == "transformers":
            assert own >= LOWEST_WITH_TRANSFORMERS, f"{module_name(path)} imports transformers"


def test_every_module_has_a_layer() -> None:
    assert {module_name(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call.id for call in calls if isinstance(call, ast.Name)]
    assert path.stem in PRINTING or "print" not in names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes_of_modules_and_functions(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and path.stem not in ("api", *PRINTING):
            doc = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            # Keyword arguments, one a line, are a table, not code: only the body counts.
            assert lines <= 50, f"{module_name(path)}.{node.name} has {lines} lines"
