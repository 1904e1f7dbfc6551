"""Print figures about a source tree: layers, modules, statements, and the longest functions and constructors.

.venv/bin/python scripts/structure.py                 # this checkout
.venv/bin/python scripts/structure.py OTHER/src/ftaccum
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "ftaccum"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of a package.

    Attributes:
        name: dotted name relative to the package.
    """

    name: str
    text: str
    tree: ast.Module

    @property
    def n_lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def n_statements(self) -> int:
        """Number of statements, without docstrings."""
        docstrings = sum(ast.get_docstring(node, clean=False) is not None for node in _documented(self.tree))
        return sum(isinstance(node, ast.stmt) for node in ast.walk(self.tree)) - docstrings

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Yield each function with its name."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield f"{self.name}.{node.name}", node

    def constructors(self) -> Iterator[tuple[str, int]]:
        """Yield the name and number of constructor parameters of each class, except frozen dataclasses."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef) and not _is_frozen(node):
                yield f"{self.name}.{node.name}", _n_parameters(node)


def modules(source: Path = SOURCE) -> list[Module]:
    """Read all modules of a package."""
    found = []
    for path in sorted(source.rglob("*.py")):
        text = path.read_text()
        name = ".".join(path.relative_to(source).with_suffix("").parts)
        found.append(Module(name, text, ast.parse(text)))
    return found


def body_lines(function: Function) -> int:
    """Return the number of lines in a function's body, without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            yield node


def _is_frozen(node: ast.ClassDef) -> bool:
    return any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list)


def _n_parameters(node: ast.ClassDef) -> int:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return len(item.args.args) + len(item.args.kwonlyargs) - 1
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return 0
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return sum("init=False" not in ast.unparse(item) and "ClassVar" not in ast.unparse(item) for item in fields)


def main() -> None:
    found = modules(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
    functions = [(body_lines(node), name) for module in found for name, node in module.functions()]
    constructors = [(n, name) for module in found for name, n in module.constructors()]
    n_lines, longest = max((module.n_lines, module.name) for module in found)
    print(f"modules                {len(found)}, {sum('.' not in module.name for module in found)} at the top")
    print(f"longest module         {n_lines} lines ({longest})")
    print(f"statements             {sum(module.n_statements for module in found)}")
    print("longest functions      " + ", ".join(f"{n} ({name})" for n, name in sorted(functions)[:-4:-1]))
    print("longest constructors   " + ", ".join(f"{n} ({name})" for n, name in sorted(constructors)[:-4:-1]))
    print()
    layers: dict[str, list[Module]] = {}
    for module in found:
        layers.setdefault(module.name.partition(".")[0] if "." in module.name else "(top)", []).append(module)
    for layer, members in layers.items():
        lines, statements = (sum(getattr(m, name) for m in members) for name in ("n_lines", "n_statements"))
        print(f"{layer:<15} {len(members):>3} modules {lines:>6} lines {statements:>6} statements")


if __name__ == "__main__":
    main()
