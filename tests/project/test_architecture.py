"""The rules that a program can check: layers, import cycles, docstrings of packages, sizes of files and folders."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "linfusion_cli"
# From the bottom up. A package imports packages of lower layers only.
LAYERS = (
    ("core",),
    ("settings", "hardware"),
    ("strips", "mixers", "images", "checkpoint"),
    ("unet", "vae", "sampling", "training"),
    ("models",),
    ("planning",),
    ("run",),
    ("batch",),
    ("cli",),
    ("__main__",),
)
# The same inside packages, for their sub-packages and modules; a package that is not named has no order inside.
SUB_LAYERS = {
    "settings": (
        ("kinds",),
        ("setting",),
        ("checks", "command_options", "execution", "groups"),
        ("request",),
        ("table",),
        ("json_schema", "request_json", "sources"),
    ),
    "images": (("metadata", "process"), ("write",), ("read",), ("verify",)),
    "sampling": (("noise", "phases", "schedulers"), ("guidance",), ("probe", "upscalers")),
    "models": (("files",), ("cache", "families"), ("locate",), ("load",), ("adapters",), ("text",), ("inspect",)),
    "run": (("progress",), ("inputs",), ("checkpoint",), ("outputs",), ("stages",), ("pipeline", "decode_latents")),
    "batch": (
        ("filenames", "results", "seeds", "shard"),
        ("parsers",),
        ("prompt_options", "queue", "watch"),
        ("runner",),
    ),
    "cli": (("output",), ("parsing",), ("commands",), ("app",)),
}
SOURCES = sorted(path for folder in (PACKAGE, ROOT / "tests", ROOT / "tools") for path in folder.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FILES_PER_FOLDER = 400, 60, 12


def module_of(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Return the modules of the package that `module` imports anywhere, in functions and for annotations too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "linfusion_cli":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "linfusion_cli"}
    return found - {module, "linfusion_cli"}


IMPORTS = {module: imports_of(module) for module in MODULES}


def part(module: str, depth: int) -> str | None:
    """Return the package (depth 1), or the sub-package or module in it (depth 2), that `module` belongs to."""
    parts = module.split(".")
    return parts[depth] if len(parts) > depth else None


def points_up(layers: Sequence[Sequence[str]], importer: str, imported: str) -> bool:
    """Return whether the import of one part by another is not one from a lower layer."""
    rank = {name: number for number, names in enumerate(layers) for name in names}
    return importer != imported and rank[imported] >= rank[importer]


def test_imports_point_down():
    wrong = []
    for module, imported in ((module, name) for module, names in IMPORTS.items() for name in names):
        packages = part(module, 1), part(imported, 1)
        if None in packages:
            continue
        if points_up(LAYERS, *packages):
            wrong.append(f"{module} imports {imported}")
        subs = part(module, 2), part(imported, 2)
        inside = packages[0] == packages[1] and packages[0] in SUB_LAYERS and None not in subs
        if inside and points_up(SUB_LAYERS[packages[0]], *subs):
            wrong.append(f"{module} imports {imported}")
    assert len(MODULES) > 150 and sum(map(len, IMPORTS.values())) > 500 and wrong == []


def test_every_package_and_module_has_a_layer():
    assert {part(module, 1) for module in MODULES} - {None} == {name for names in LAYERS for name in names}
    for package, layers in SUB_LAYERS.items():
        subs = {part(module, 2) for module in MODULES if part(module, 1) == package} - {None, "demo"}
        assert subs == {name for names in layers for name in names}


def find_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other: strongly connected components (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                cycles.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return cycles


def test_there_are_no_import_cycles():
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert find_cycles(IMPORTS) == []


def test_every_package_says_what_belongs_in_it():
    packages = [path for path in PACKAGE.rglob("__init__.py")]
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in packages}
    assert len(packages) > 30 and not [str(path) for path, text in docstrings.items() if not text or len(text) > 400]


def too_long(path: Path) -> Iterator[str]:
    """Yield a description of the file, and of the functions in it, that have too many lines."""
    text = path.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{path.relative_to(ROOT)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_files_functions_and_folders_are_small():
    assert len(SOURCES) > 300 and [problem for path in SOURCES for problem in too_long(path)] == []
    counts = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in SOURCES}}
    assert {str(folder): count for folder, count in counts.items() if count > MAX_FILES_PER_FOLDER} == {}


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom linfusion_cli.cli import app\nsys.argv = ['linfusion', '--help']\napp.run_app()\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "generate" in printed and printed.endswith("[]\n")
