"""Mutants of source files: mutmut makes them, a seed draws some, and a file lists the equivalent ones.

This uses only mutmut's operators. Its runner cannot draw by seed, keeps no list of equivalent mutants, and replaces
every function by a trampoline, which breaks pickling, `torch.compile` and the architecture tests.
"""

import difflib
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import Mutation, create_mutations


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        package: package or module that the mutant is drawn for.
        file: path relative to the repository's root.
        function: top-level function or method that contains the change.
        lines: first and last line of the expression or statement that changes.
        function_lines: first and last line of that function.
        kind: syntax node that changes.
        removed, added: source lines that change, stripped.
        source: the whole changed file.
    """

    package: str
    file: str
    function: str
    lines: tuple[int, int]
    function_lines: tuple[int, int]
    kind: str
    removed: str
    added: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.source}".encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.file}:{self.lines[0]} {self.function} [{self.kind}]\n  - {self.removed}\n  + {self.added}"


@dataclass(frozen=True)
class Equivalent:
    """A mutant that no test can kill. It is matched by its text, so that it still matches if lines move."""

    file: str
    function: str
    removed: str
    added: str
    reason: str

    def matches(self, mutant: Mutant) -> bool:
        return (self.file, self.function, self.removed, self.added) == (
            mutant.file,
            mutant.function,
            mutant.removed,
            mutant.added,
        )


@dataclass(frozen=True)
class Exclusions:
    """Code whose mutants say nothing about the tests.

    Attributes:
        functions: functions that only make text.
        calls: calls that only log or warn.
        arguments: keyword arguments that only assert something or affect time.
    """

    functions: Sequence[str] = ()
    calls: Sequence[str] = ()
    arguments: Sequence[str] = ()

    def roots(self, module: cst.Module) -> Iterator[cst.CSTNode]:
        """Yield the excluded nodes. Everything below them is excluded too."""
        for node in _walk(module):
            if (
                isinstance(node, cst.BaseString | cst.Annotation)
                or (isinstance(node, cst.FunctionDef) and node.name.value in self.functions)
                or (isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value in self.arguments)
                or (isinstance(node, cst.Call) and module.code_for_node(node.func) in self.calls)
            ):
                yield node

    def only_touches_arguments(self, module: cst.Module, mutation: Mutation) -> bool:
        """Return whether the mutation changes only excluded arguments of a call."""
        before, after = mutation.original_node, mutation.mutated_node
        if not (isinstance(before, cst.Call) and isinstance(after, cst.Call)):
            return False
        return before.func is after.func and self._kept(module, before) == self._kept(module, after)

    def _kept(self, module: cst.Module, call: cst.Call) -> list[str]:
        return [
            module.code_for_node(arg).rstrip(", \n")
            for arg in call.args
            if arg.keyword is None or arg.keyword.value not in self.arguments
        ]


@dataclass(frozen=True)
class SourceFile:
    """A parsed file and its mutations, without excluded ones."""

    package: str
    name: str
    module: cst.Module
    mutations: Sequence[Mutation]

    @cached_property
    def _positions(self) -> Mapping[cst.CSTNode, CodeRange]:
        return MetadataWrapper(self.module, unsafe_skip_copy=True).resolve(PositionProvider)

    def mutant(self, mutation: Mutation) -> Mutant | None:
        """Return the file with one mutation, or None if that is the same program or does not compile."""
        node, function, code = mutation.original_node, mutation.contained_by_top_level_function, self.module.code
        changed = self.module.deep_replace(node, mutation.mutated_node)
        assert isinstance(changed, cst.Module)
        assert isinstance(function, cst.FunctionDef)
        if changed.code == code or not _compiles(changed.code):
            return None
        place = self._positions.get(node) or self._positions[function]
        lines, whole = _lines(place), _lines(self._positions[function])
        removed, added = _difference(code, changed.code)
        method = _qualified_name(self.module, function)
        return Mutant(self.package, self.name, method, lines, whole, type(node).__name__, removed, added, changed.code)


def files_of(root: Path, package: str, exclusions: Exclusions) -> list[SourceFile]:
    """Return the files of a package or module, with their mutations in source order."""
    path = root / "src" / package
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [_read(root, package, file, exclusions) for file in files]


def _read(root: Path, package: str, file: Path, exclusions: Exclusions) -> SourceFile:
    name = str(file.relative_to(root))
    module, mutations, _, _ = create_mutations(name, file.read_text())
    left_out = {id(node) for top in exclusions.roots(module) for node in _walk(top)}
    counting = [
        mutation
        for mutation in mutations
        if id(mutation.original_node) not in left_out
        and isinstance(mutation.contained_by_top_level_function, cst.FunctionDef)
        and not exclusions.only_touches_arguments(module, mutation)
    ]
    return SourceFile(package, name, module, counting)


def _lines(place: CodeRange) -> tuple[int, int]:
    return place.start.line, place.end.line


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _qualified_name(module: cst.Module, function: cst.FunctionDef) -> str:
    for statement in module.body:
        if isinstance(statement, cst.ClassDef) and function in statement.body.body:
            return f"{statement.name.value}.{function.name.value}"
    return function.name.value


def _difference(before: str, after: str) -> tuple[str, str]:
    """Return the changed lines before and after the change, each joined into one line."""
    changes = [
        line
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    return tuple(  # type: ignore[return-value]
        " ".join(line[1:].strip() for line in changes if line.startswith(sign)) for sign in "-+"
    )


def draw(packages: Mapping[str, Sequence[SourceFile]], n: int, seed: int) -> list[Mutant]:
    """Draw `n` mutants, from each package in proportion to its number of mutants (largest remainder method).

    With the same seed, a smaller draw from a package is the beginning of a larger one.
    """
    candidates = {
        package: [(file, mutation) for file in files for mutation in file.mutations]
        for package, files in packages.items()
    }
    total = sum(len(found) for found in candidates.values())
    shares = {package: n * len(found) / total for package, found in candidates.items()}
    sizes = {package: int(share) for package, share in shares.items()}
    by_remainder = sorted(shares, key=lambda package: sizes[package] - shares[package])
    for package in by_remainder[: n - sum(sizes.values())]:
        sizes[package] += 1
    drawn: list[Mutant] = []
    for package, found in candidates.items():
        shuffled = random.Random(f"{seed}:{package}").sample(found, len(found))
        distinct: dict[str, Mutant] = {}
        for file, mutation in shuffled:
            if len(distinct) == sizes[package]:
                break
            if (mutant := file.mutant(mutation)) is not None:
                distinct.setdefault(mutant.key, mutant)
        drawn += distinct.values()
    return drawn
