"""Compute the digest of the code that a result depends on: a module and all modules that it imports."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache as memoised
from pathlib import Path

from compress.cache.digests import compute_digest

OURS = __name__.partition(".")[0]
FOR_TYPING = {ast.dump(ast.parse(test, mode="eval").body) for test in ("TYPE_CHECKING", "typing.TYPE_CHECKING")}


def digest_source(*modules: str) -> str:
    """Return the digest of the code of modules and of everything that they import, here or in their own packages.

    Comments, docstrings and layout do not count, nor do imports for type checking. Imports inside functions count;
    a module that is imported by a computed name must be passed.

    Raises:
        ModuleNotFoundError: one of ``modules`` has no source file.
    """
    if missing := [name for name in modules if find_source(name) is None]:
        raise ModuleNotFoundError(f"the source of {missing[0]} is no file", name=missing[0])
    return compute_digest(list_sources(*modules))


def digest_package() -> str:
    """Return the digest of all code of this package."""
    root = Path(__file__).parents[1]
    files = (file.relative_to(root).with_suffix("") for file in root.rglob("*.py"))
    return digest_source(*(".".join((OURS, *file.parts)) for file in files))


def list_sources(*modules: str) -> dict[str, str]:
    """Return the digests of the code that :func:`digest_source` covers, by the modules' names."""
    followed = {OURS, *(name.partition(".")[0] for name in modules)}
    digests: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in digests or name.partition(".")[0] not in followed or (file := find_source(name)) is None:
            continue
        # The process runs the code of ours that it imported, whatever becomes of the file; others' may be reloaded.
        changed = 0 if name.partition(".")[0] == OURS else file.stat().st_mtime_ns
        digests[name], imported = parse_source(name, file, changed)
        waiting += imported
    return dict(sorted(digests.items()))


@memoised
def find_source(name: str) -> Path | None:
    """Return the source file of a module; None if there is none, e.g. because ``name`` is that of a class."""
    if (module := sys.modules.get(name)) is not None:
        file = getattr(module, "__file__", None)
        return Path(file) if file and file.endswith(".py") else None
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__
        return None
    if spec is None or not rest:
        return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        for file in (Path(folder, *rest).with_suffix(".py"), Path(folder, *rest, "__init__.py")):
            if file.is_file():
                return file
    return None


@memoised
def parse_source(name: str, file: Path, changed: int) -> tuple[str, tuple[str, ...]]:
    """Return the digest of a module's code and the names that it imports."""
    tree = ast.parse(file.read_bytes())
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imported = tuple(dict.fromkeys(find_imports(tree, package)))
    remove_docstrings(tree)
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=16).hexdigest(), imported


def remove_docstrings(node: ast.AST) -> None:
    for child in list_statements(node):
        remove_docstrings(child)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        node.body = [line for line in node.body if not is_string(line)]


def list_statements(node: ast.AST) -> list[ast.AST]:
    """Return the statements in the blocks of a statement. Its expressions, the most of a tree, hold none."""
    blocks = (getattr(node, name, ()) for name in ("body", "handlers", "cases", "orelse", "finalbody"))
    return [child for block in blocks for child in block]


def is_string(node: ast.stmt) -> bool:
    """Return whether a statement is a string alone, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def find_imports(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the names that a module of ``package`` imports, except for type checking; some are of classes."""
    for child in list_statements(node):
        if isinstance(child, ast.If) and ast.dump(child.test) in FOR_TYPING:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*parents, *([child.module] if child.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in child.names)
        else:
            yield from find_imports(child, package)
