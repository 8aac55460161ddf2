"""Imports point downward, transformers stays out of the maths, print lives in the command line."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "eckart"
LAYERS = {
    "errors": 0,
    "linalg": 1,
    "divergence": 1,
    "construct": 1,
    "healing": 2,
    "checkpoint": 1,
    "factors": 2,
    "width": 2,
    "stats": 2,
    "embeddings": 3,
    "ranks": 3,
    "methods": 3,
    "environment": 3,
    "memory": 3,
    "models": 4,
    "text": 4,
    "measure": 4,
    "teacher": 5,
    "lessons": 5,
    "training": 5,
    "distil": 6,
    "chain": 5,
    "closed": 7,
    "reallocate": 7,
    "refine": 8,
    "blockwise": 7,
    "plugin": 5,
    "recipe": 5,
    "dimensions": 5,
    "sharing": 6,
    "heads": 6,
    "hub": 6,
    "calibrate": 6,
    "choices": 6,
    "menus": 7,
    "budget": 8,
    "mend": 9,
    "result": 6,
    "windows": 6,
    "factorize": 8,
    "rebuild": 7,
    "stock": 9,
    "assemble": 10,
    "selection": 11,
    "pipeline": 12,
    "bars": 13,
    "render": 4,
    "report_healing": 13,
    "report": 14,
    "terminal": 15,
    "api": 15,
    "commands_params": 16,
    "cli": 17,
    "__main__": 18,
    "quant": 0,
    "quant.grid": 1,
    "quant.rounding": 2,
    "quant.formats": 1,
    "quant.storage": 2,
    "quant.kernels": 3,
    "quant.stored": 4,
    "quant.noise": 3,
    "quant.corrected": 3,
    "quant.correction": 4,
    "adapt": 0,
    "adapt.spectrum": 4,
    "adapt.store": 5,
    "adapt.checkpoints": 7,
    "adapt.fitting": 8,
    "adapt.reading": 7,
    "adapt.resize": 8,
    "adapt.difference": 8,
    "adapt.apply": 8,
    "adapt.extract": 9,
    "adapt.merge": 9,
    "adapt.cards": 12,
    "adapt.toolbox": 14,
    "adapt.commands_adapters": 15,
    "adapt.tuning": 3,
    "adapt.examples": 5,
    "adapt.batches": 6,
    "adapt.losses": 6,
    "adapt.targets": 6,
    "adapt.quantised": 7,
    "adapt.allocation": 7,
    "adapt.judge": 7,
    "adapt.attach": 8,
    "adapt.adalora": 9,
    "adapt.trainer": 10,
    "adapt.tuned": 10,
    "adapt.tune": 12,
    "adapt.loading": 9,
    "adapt.sizes": 7,
    "adapt.footprint": 9,
    "adapt.report_tune": 13,
    "adapt.session": 15,
    "adapt.commands_tune": 15,
}
LOWEST_WITH_TRANSFORMERS = LAYERS["models"]
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
PRINTING = ("cli", "terminal", "commands_tune", "commands_adapters", "commands_params")


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
