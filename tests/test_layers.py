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
    "budget": 7,
    "mend": 9,
    "result": 6,
    "windows": 6,
    "factorize": 8,
    "rebuild": 7,
    "stock": 8,
    "assemble": 9,
    "selection": 10,
    "pipeline": 11,
    "bars": 12,
    "render": 4,
    "report_healing": 12,
    "report": 13,
    "api": 14,
    "cli": 15,
    "__main__": 16,
}
LOWEST_WITH_TRANSFORMERS = LAYERS["models"]
FILES = sorted(path for path in SOURCE.glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (module, runs at import of the file) of everything that `path` imports."""
    tree = ast.parse(path.read_text())
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(f"eckart.{name}", id(node) not in late) for name in names]
        elif isinstance(node, ast.ImportFrom):
            found.append((str(node.module), id(node) not in late))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_to_lower_layers(path: Path) -> None:
    own = LAYERS[path.stem]
    for name, at_import in imports(path):
        other = name.removeprefix("eckart.")
        if name.startswith("eckart.") and at_import:
            assert other == "__version__" or LAYERS[other] < own, f"{path.stem} ({own}) imports {other}"
        if name.split(".")[0] == "transformers":
            assert own >= LOWEST_WITH_TRANSFORMERS, f"{path.stem} imports transformers"


def test_every_module_has_a_layer() -> None:
    assert {path.stem for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call.id for call in calls if isinstance(call, ast.Name)]
    assert path.stem == "cli" or "print" not in names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes_of_modules_and_functions(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and path.stem not in ("api", "cli"):
            doc = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            # Keyword arguments, one a line, are a table, not code: only the body counts.
            assert lines <= 50, f"{path.stem}.{node.name} has {lines} lines"
