"""The direction of imports and the modules that stay free of torch, read from the source.

The layers are those of docs/architecture.md, top to bottom: a module imports from layers below
its own, or from its own package.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "wasi_edge"

# Narrower than "anything below": these keep to what is listed (or lies under it) and to themselves.
ONLY_FROM = {
    "wasi_edge.data": ("errors", "units", "preprocess", "preprocessing"),
    "wasi_edge.memory": ("errors", "units"),
    "wasi_edge.planner": (
        "chunks",
        "keep",
        "method",
        "models.geometry",
        "models.geometry_swin",
        "artefact",
        "memory",
        "errors",
        "units",
        "subspace.ranks",
    ),
}
# No torch at any level. In `inference` everything but the torch backend, which others import late.
TORCH_FREE = (
    "planner", "data", "memory", "artefact", "tensorfile", "atomic", "onnx_runtime", "preprocess", "errors", "units",
    "chunks", "keep", "children",
    "method",
    "metrics", "preprocessing", "report", "inference", "subspace.ranks", "models.geometry", "api", "doctor",
    "models.geometry_swin", "models.keys", "models.keys_", "models.hub", "models.locate", "models.windows",
    "models.resample", "export",
    "bench.synthetic",
)  # fmt: skip
TORCH_ALLOWED = ("inference.torch_backend",)
IMPORTERS = ("importlib.import_module", "import_module", "__import__")


@dataclass(frozen=True)
class Import:
    """One imported module, `late` when it happens inside a function or only for type checkers."""

    module: str
    line: int
    late: bool


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively; write the whole name"
            base = node.module or ""
            for alias in node.names:  # `from wasi_edge.subspace import ranks` names a module
                whole = f"{base}.{alias.name}"
                found.append(Import(whole if whole in MODULES else base, node.lineno, late))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found.extend(Import(str(name), node.lineno, late) for name in names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, late or function or typing_only)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


def test_onnx_runtime_is_imported_where_its_reports_are_switched_off():
    importers = {name for name, imports in IMPORTS.items() if any(i.module.startswith("onnxruntime") for i in imports)}
    assert not importers, "use wasi_edge.onnx_runtime"
    assert "import_onnxruntime" in (PACKAGE / "inference" / "onnx_backend.py").read_text()


def _layers() -> list[str]:
    """Names in docs/architecture.md's first block, lowest first.

    Lines are read from the bottom up and a line's names from left to right. A single module of a
    package may have a line of its own (`models/geometry.py`), and then a place of its own.
    """
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines: list[list[str]] = []
    for line in text.splitlines():
        match = re.match(r"    ((?:[\w/]+(?:/|\.py)(?:, )?)+)(?:\s|$)", line)
        if match:
            names = [name.strip().removesuffix(".py").strip("/") for name in match[1].split(",")]
            lines.append([name.replace("/", ".") for name in names])
        elif lines:
            break
    return [name for line_names in reversed(lines) for name in line_names]


RANK = {f"wasi_edge.{name}": rank for rank, name in enumerate(_layers(), start=1)}
RANK["wasi_edge"] = 0  # the version only


def _part(module: str) -> str:
    """What `module` is ranked as: itself where the document names it, else its package."""
    return module if module in RANK else ".".join(module.split(".")[:2])


def _under(module: str, names: tuple[str, ...]) -> bool:
    return any(
        module == f"wasi_edge.{name}"
        or module.startswith(f"wasi_edge.{name}.")
        or (name.endswith("_") and module.startswith(f"wasi_edge.{name}"))
        for name in names
    )


def _may_use_torch(module: str) -> bool:
    return _under(module, TORCH_ALLOWED) or not _under(module, TORCH_FREE)


def _is_torch(module: str) -> bool:
    return module.split(".")[0] in ("torch", "torchvision")


def test_the_layers_are_read_from_the_document() -> None:
    assert len(RANK) >= 15
    order = ("errors", "units", "memory", "data", "layers", "models", "planner", "cli")
    ranks = [RANK[f"wasi_edge.{name}"] for name in order]
    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    part = _part(module)
    assert part in RANK, f"{part} has no place in docs/architecture.md"
    wrong = []
    for found in IMPORTS[module]:
        target = _part(found.module)
        if not found.module.startswith("wasi_edge") or target == part:
            continue
        if (module, found.module) == ("wasi_edge", "wasi_edge.api") and found.late:
            continue  # the door that programs come in by
        assert target in RANK, f"{module}:{found.line} imports {found.module}, which has no place in the layers"
        if RANK[target] >= RANK[part]:
            wrong.append(f"{module}:{found.line} imports {found.module} from above")
        elif part in ONLY_FROM and not _under(found.module, ONLY_FROM[part]):
            wrong.append(f"{module}:{found.line} imports {found.module}; {part} may only use {ONLY_FROM[part]}")
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in MODULES if not _may_use_torch(name)])
def test_torch_free_modules_stay_so(module: str) -> None:
    wrong = [f"{module}:{found.line} imports {found.module}" for found in IMPORTS[module] if _is_torch(found.module)]
    wrong += [
        f"{module}:{found.line} imports {found.module}, which may import torch"
        for found in IMPORTS[module]
        if found.module in MODULES and MODULES[found.module].name != "__init__.py"
        if not found.late and _may_use_torch(found.module)
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in MODULES if _part(name) == "wasi_edge.cli"])
def test_commands_import_torch_only_when_they_run(module: str) -> None:
    """Module-level imports are followed through the package: none of them may reach torch."""
    waiting, reached = [module], {module}
    while waiting:
        for found in IMPORTS[waiting.pop()]:
            assert found.late or not _is_torch(found.module), f"importing {module} imports torch through {reached}"
            if not found.late and found.module in MODULES and found.module not in reached:
                reached.add(found.module)
                waiting.append(found.module)


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_packages_import_nothing(module: str) -> None:
    assert [found.module for found in IMPORTS[module] if found.module != "__future__" and not found.late] == []
