"""Measure how the house is built: import circles, largest class, file and object, `dict[str, Any]` left, README bytes.

`scripts/check` runs it; it prints a table and exits with 1 where a figure is over its bound. Each file is parsed once and
walked once; `tests/test_architecture.py` reads the packages with the same functions, and decides who may import whom.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("fedsoda_edge", "fedsoda_hub")
MEASURED = (*PACKAGES, "scripts")  # tests are as long as what they specify
MAX_CIRCLES, MAX_CLASS_LINES, MAX_FILE_LINES, MAX_ATTRIBUTES, MAX_DICTS, MAX_README_BYTES = 0, 320, 500, 16, 30, 9000
SHOWN = 8  # places that are printed of a figure that is over its bound


@dataclass(frozen=True)
class Source:
    """A parsed file. path: from the root, with slashes. nodes: all nodes of its tree, from one walk."""

    path: str
    num_lines: int
    nodes: tuple[ast.AST, ...]

    @property
    def module(self) -> str:
        """The file's dotted name; for an `__init__` file, that of its package."""
        return ".".join(Path(self.path).with_suffix("").parts).removesuffix(".__init__")

    @property
    def imports(self) -> Iterator[tuple[str, int]]:
        """The (absolute dotted name, line) of everything that the file may import, at any depth, for types alone too.

        `from a import b` gives a.b, whether b is a module or a name in one, which `nearest` finds out.
        """
        package = Path(self.path).with_suffix("").parts[:-1]
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def parse(path: str, text: str) -> Source:
    """Parse one file."""
    return Source(path, text.count("\n") + (not text.endswith("\n")), tuple(ast.walk(ast.parse(text, path))))


def read(root: Path, folders: Iterable[str] = PACKAGES) -> list[Source]:
    """Parse every Python file in these folders, in the order of their names; a folder may be missing."""
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return [parse(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def nearest(name: str, among: Container[str]) -> str | None:
    """Find the longest of these dotted names that is `name` or contains it."""
    parts = name.split(".")
    return next((above for i in range(len(parts), 0, -1) if (above := ".".join(parts[:i])) in among), None)


def import_graph(sources: Sequence[Source]) -> dict[str, set[str]]:
    """Map each module to those of ours that it names. Packages that contain a named module run too, but do not count."""
    modules = {source.module for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        named = {nearest(name, modules) for name, _ in source.imports}
        graph[source.module] = {name for name in named if name is not None and name != source.module}
    return graph


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Find the groups of nodes that all reach each other, each sorted; a graph without circles has none."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, queue = set[str](), list(graph[start])
        while queue:
            node = queue.pop()
            if node not in found:
                found.add(node)
                queue.extend(graph.get(node, ()))
        reached[start] = found
    groups = {
        tuple(sorted({node} | {other for other in reached[node] if node in reached.get(other, ())}))
        for node in graph
        if node in reached[node]
    }
    return [list(group) for group in sorted(groups)]


# --- the figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A measured figure with its bound. where: its places, the worst first."""

    name: str
    found: int
    most: int
    where: Sequence[str] = ()

    @property
    def is_over(self) -> bool:
        """Whether the figure is over its bound."""
        return self.found > self.most


def attributes(node: ast.ClassDef) -> set[str]:
    """List the names that a class's own methods assign to `self`; declared fields of dataclasses and structs do not count."""
    found: set[str] = set()
    for method in node.body:
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for inner in ast.walk(method):
            if (
                isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            ):
                found.add(inner.attr)
    return found


MAPPINGS = {"dict", "Dict", "defaultdict", "OrderedDict", "Mapping", "MutableMapping"}


def is_untyped_dict(node: ast.AST) -> bool:
    """Whether this is `dict[str, Any]`, or another mapping to Any by its name.

    `dict[str, object]` is not: what reads a value of it has to say first what that is, and mypy sees to it.
    """
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple) or len(node.slice.elts) != 2:
        return False
    key, value = (ast.unparse(one).rpartition(".")[2] for one in node.slice.elts)
    return ast.unparse(node.value).rpartition(".")[2] in MAPPINGS and (key, value) == ("str", "Any")


def untyped_aliases(source: Source) -> set[str]:
    """Name what this file calls a type that is or holds an untyped dict."""
    found: set[str] = set()
    for node in source.nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        if isinstance(value, ast.Subscript | ast.BinOp) and any(map(is_untyped_dict, ast.walk(value))):
            found.add(name)
    return found


def count_untyped_dicts(sources: Sequence[Source]) -> Counter[str]:
    """Count untyped dicts by file: each that is written out, and each use of a name that stands for one."""
    aliases = {source.module: untyped_aliases(source) for source in sources}
    names = {f"{module}.{alias}" for module, found in aliases.items() for alias in found}
    counted = Counter[str]()
    for source in sources:
        here = {alias: f"{source.module}.{alias}" for alias in aliases[source.module]}
        for node in source.nodes:
            if isinstance(node, ast.ImportFrom) and node.module:  # no file here imports from "."
                here |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
            elif isinstance(node, ast.Import):
                here |= {one.asname or one.name: one.name for one in node.names}
        for node in source.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                first, dot, rest = ast.unparse(node).partition(".")
                counted[source.path] += here.get(first, first) + dot + rest in names
            else:
                counted[source.path] += is_untyped_dict(node)
    return +counted


def measure(root: Path) -> list[Figure]:
    """Measure all figures of a checkout."""
    sources = read(root, MEASURED)
    packages = [source for source in sources if source.path.startswith(PACKAGES)]
    found = circles(import_graph(packages))
    classes = [
        (node, f"{source.path}:{node.lineno} {node.name}")
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.ClassDef)
    ]
    files = [(source.num_lines, source.path) for source in sources]
    lengths = [((node.end_lineno or 0) - node.lineno + 1, where) for node, where in classes]
    objects = [(len(attributes(node)), where) for node, where in classes]
    dicts = count_untyped_dicts(packages)
    readme = root / "README.md"
    return [
        Figure("import circles", len(found), MAX_CIRCLES, [" <-> ".join(circle) for circle in found]),
        _largest("lines of the largest class", lengths, MAX_CLASS_LINES),
        _largest("lines of the largest file", files, MAX_FILE_LINES),
        _largest("attributes of the largest object", objects, MAX_ATTRIBUTES),
        Figure(
            "dict[str, Any] left",
            dicts.total(),
            MAX_DICTS,
            [f"{count:4} {path}" for path, count in dicts.most_common()],
        ),
        Figure("README bytes", readme.stat().st_size if readme.exists() else 0, MAX_README_BYTES),
    ]


def _largest(name: str, sizes: list[tuple[int, str]], most: int) -> Figure:
    """Make a figure of the largest size; its places are all that are over the bound, or else the largest one."""
    ordered = sorted(sizes, key=lambda size: (-size[0], size[1]))
    shown = [size for size in ordered if size[0] > most] or ordered[:1]
    return Figure(name, ordered[0][0] if ordered else 0, most, [f"{size:4} {where}" for size, where in shown])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and return 1 if a figure is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    figures = measure(parser.parse_args(arguments).root)
    for figure in figures:
        bound = f"{figure.found:6} of at most {figure.most:5}"
        print(f"{'OVER' if figure.is_over else 'ok':5}{figure.name:34}{bound}")
        shown = figure.where[: SHOWN if figure.is_over else 1]
        for place in shown:
            print(f"     {place}")
        if figure.is_over and len(figure.where) > len(shown):
            print(f"     and {len(figure.where) - len(shown)} more")
    return int(any(figure.is_over for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
