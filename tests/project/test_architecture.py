"""The rules of docs and review that a program can check: layers, sizes, late imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "linfusion_cli"
ROOT = PACKAGE.parent
LAYERS = {
    0: ["errors", "units", "geometry", "files"],
    1: ["request", "events", "report", "stopping", "allocator", "memory"],
    2: ["presets", "cuda", "diagnosis", "failures", "device", "journal", "attention", "images", "strips"],
    3: ["models", "unet", "vae", "sampling"],
    4: ["planning", "training"],
    5: ["jobs"],
    6: ["cli"],
    7: ["__main__"],
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
SOURCES = sorted(path for folder in (PACKAGE, ROOT / "tests", ROOT / "tools") for path in folder.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60


def unit_of(path: Path) -> str:
    """The module or package of linfusion_cli that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """The units of linfusion_cli that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "linfusion_cli":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("linfusion_cli."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("linfusion_cli."))


def forbidden_imports(path: Path) -> set[str]:
    """The units that a file of the package imports and must not."""
    unit = unit_of(path)
    if unit == "__init__":
        return set(imports_of(path))
    return {imported for imported in set(imports_of(path)) - {unit} if not may_import(unit, imported)}


def may_import(unit: str, imported: str) -> bool:
    lower, same = LAYER_OF[imported] < LAYER_OF[unit], LAYER_OF[imported] == LAYER_OF[unit]
    both_modules = not (PACKAGE / unit).is_dir() and not (PACKAGE / imported).is_dir()
    return lower or (same and both_modules)


def test_imports_point_down():
    found = {str(path.relative_to(PACKAGE)): forbidden_imports(path) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 100 and not {path: imports for path, imports in found.items() if imports}


def test_every_unit_has_a_layer():
    units = {unit_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert units == set(LAYER_OF)


def too_long(path: Path) -> Iterator[str]:
    """A file, and functions in it, that have too many lines."""
    text = path.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > FILE_LINES:
        yield f"{path.relative_to(ROOT)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_files_and_functions_are_short():
    assert len(SOURCES) > 250 and not [problem for path in SOURCES for problem in too_long(path)]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom linfusion_cli.cli import app\nsys.argv = ['linfusion', '--help']\napp.guarded()\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "generate" in printed and printed.endswith("[]\n")
