"""Where a text of the source goes: through variables, parameters, fields and functions, to the calls that show it."""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from structure import Function, Module

Definition = Function | ast.ClassDef
Use = tuple["Source", ast.AST]

_ERROR = re.compile(r"(Error|Warning|Exception|Exit|Interrupt)$")
_TEXT_METHODS = {"__str__", "__repr__", "__format__"}
# Calls whose result contains the texts that they are given.
_PASSING = {
    *("str", "list", "tuple", "set", "dict", "sorted", "reversed", "next", "iter", "map", "filter", "zip", "enumerate"),
    *("chain", "join", "format", "fromkeys", "get", "dedent", "wrap", "removeprefix"),
}
_MUTATING = {"append", "appendleft", "extend", "insert", "add", "setdefault", "update", "put"}
_LONGEST = 8  # way from name to name
_HELP = {"help": "help text", "description": "help text", "unsearchable": "reason", "group": "help heading"}


class Source:
    """A module whose nodes know what is around them."""

    def __init__(self, module: Module) -> None:
        self.name, self.tree = module.name, module.tree
        self.nodes = list(ast.walk(module.tree))
        self._parents = {child: parent for parent in self.nodes for child in ast.iter_child_nodes(parent)}
        imports = [node for node in self.nodes if isinstance(node, ast.ImportFrom)]
        self.imported = {alias.asname or alias.name for node in imports for alias in node.names}

    def above(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """Yield each node around `node` from the inside out, after the one of its children that leads to `node`."""
        while (parent := self._parents.get(node)) is not None:
            yield node, parent
            node = parent

    def parent(self, node: ast.AST) -> ast.AST | None:
        return self._parents.get(node)

    def function(self, node: ast.AST) -> Function | None:
        """Return the innermost function around a node."""
        return next((around for _, around in self.above(node) if isinstance(around, Function)), None)

    def qualified(self, node: ast.AST) -> str:
        """Return the names of the classes and functions around a node; empty at the top of the module."""
        return ".".join([around.name for _, around in self.above(node) if isinstance(around, Definition)][::-1])


@dataclass(frozen=True)
class Holder:
    """A name that holds texts.

    Attributes:
        name: of a variable, field or function.
        source: the module that it is in.
        scope: the function in which a variable is read; None for the whole module and those that import the name.
        is_field: whether it is read as an attribute.
    """

    name: str
    source: Source
    scope: Function | None = None
    is_field: bool = False


@dataclass(frozen=True)
class Destination:
    """What becomes of a text.

    Attributes:
        kinds: the error classes, warning classes, log levels, … that it is shown as; empty where none was found.
        is_direct: whether it is written inside of a call that shows it.
        uses: where the names that hold it are read, the nearest first.
    """

    kinds: Sequence[str]
    is_direct: bool
    uses: Sequence[Use]


def name_of(node: ast.AST) -> str:
    """Return the last part of a dotted name; empty for other expressions."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class Flow:
    """Follows texts through a package by the names that hold them. Names of the same spelling are one to it, so that it
    finds kinds too many rather than too few; names farther from a text than the nearest kind are not followed."""

    def __init__(self, modules: Iterable[Module]) -> None:
        self.sources = [Source(module) for module in modules]
        self._reads: dict[str, list[Use]] = {}
        self._definitions: dict[str, list[tuple[Source, Definition]]] = {}
        for source in self.sources:
            for node in source.nodes:
                if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                    self._reads.setdefault(name_of(node), []).append((source, node))
                elif isinstance(node, Definition):
                    self._definitions.setdefault(node.name, []).append((source, node))
        self._known: dict[ast.AST, Sequence[str | Holder]] = {}
        self._errors = self._find_errors()
        self._declaring = {"setting", *self._partials_of_setting()}

    def follow(self, source: Source, node: ast.AST) -> Destination:
        """Return what becomes of the text at a node."""
        seen: set[Holder] = set()
        level: list[Use] = [(source, node)]
        uses: list[Use] = []
        for number in range(_LONGEST):
            targets = [target for use in level for target in self._risen(*use)]
            kinds = sorted({target for target in targets if isinstance(target, str)})
            holders = dict.fromkeys(target for target in targets if isinstance(target, Holder) and target not in seen)
            seen |= holders.keys()
            level = [use for holder in holders for use in self._uses(holder)]
            uses += level
            if kinds or not level:
                return Destination(kinds, bool(kinds) and number == 0, uses)
        return Destination([], False, uses)

    def _risen(self, source: Source, node: ast.AST) -> Sequence[str | Holder]:
        if node not in self._known:
            self._known[node] = list(self._rise(source, node))
        return self._known[node]

    def _rise(self, source: Source, node: ast.AST) -> Iterator[str | Holder]:
        """Yield the kind as which an expression's value is shown, or the names that hold it next."""
        for child, parent in source.above(node):
            match parent:
                case ast.Call() if child is not parent.func:
                    targets = self._enter(source, child, parent)
                    if targets is not None:
                        yield from targets
                        return
                case ast.If() | ast.While() | ast.IfExp() if child is parent.test:
                    return
                case ast.Subscript() if child is parent.slice:
                    return
                case ast.comprehension():
                    if child is not parent.iter:
                        return
                    yield from self._targets(source, parent.target)
                case ast.For() if child is parent.iter:
                    yield from self._targets(source, parent.target)
                case ast.Assign():
                    yield from (held for target in parent.targets for held in self._targets(source, target))
                case ast.AnnAssign() | ast.AugAssign() | ast.NamedExpr() if child is parent.value:
                    yield from self._targets(source, parent.target)
                case ast.Return() | ast.Yield() | ast.YieldFrom():
                    yield from self._returned(source, parent)
                case ast.Raise() if child is parent.exc:
                    yield "error"
                case ast.Assert() if child is parent.msg:
                    yield "AssertionError"
            if isinstance(parent, ast.stmt | ast.Compare | ast.match_case | ast.arguments):
                return

    def _enter(self, source: Source, child: ast.AST, call: ast.Call) -> Sequence[str | Holder] | None:
        """Return what a call does with its argument `child`; None where its result contains it."""
        name, keyword = name_of(call.func), child.arg if isinstance(child, ast.keyword) else None
        place = next((n for n, argument in enumerate(call.args) if argument is child), -1)
        if place < 0 and not keyword:  # **options
            return []
        if (kind := self._kind_of(source, call, name, keyword, place)) is not None:
            return [kind] if kind else []
        if name in _PASSING:
            return None
        if isinstance(call.func, ast.Attribute) and name in _MUTATING:
            return list(self._targets(source, call.func.value))
        if name == "replace" and keyword:
            return [Holder(keyword, source, is_field=True)]
        definitions = self._called(source, call.func)
        return [held for each in definitions for held in self._parameter(*each, keyword, place)]

    def _kind_of(self, source: Source, call: ast.Call, name: str, keyword: str | None, place: int) -> str | None:
        """Return the kind as which a call shows its argument, empty where it does not show it; None if it is no such
        call."""
        receiver = name_of(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if receiver == "logger":
            return f"log {name}"
        if name == "warn_user" or (receiver, name) == ("warnings", "warn"):
            return (name_of(call.args[1]) if len(call.args) > 1 else "UserWarning") if place == 0 else ""
        if name == "print" or (receiver, name) == ("tqdm", "write"):
            return "printed" if place >= 0 else ""
        if name == "refuse":
            return "SettingsError"
        if name in self._errors or _ERROR.search(name):
            return name
        if name == "__init__" and (around := source.qualified(call).split(".")[0]) in self._errors:
            return around
        if name == "Rule":
            return "rule" if place == 1 or keyword == "words" else ""
        declares = name in self._declaring and isinstance(call.func, ast.Name)
        if declares or name in ("add_argument", "partial") or name.endswith("Parser"):
            return _HELP.get(keyword or ("help" if place == 1 and declares else ""), "")
        return "error" if name[:1].isupper() and isinstance(source.parent(call), ast.Raise) else None

    def _called(self, source: Source, function: ast.AST) -> list[tuple[Source, Definition]]:
        """Return the definitions that a call may mean: those in its own module, if there are any."""
        name = name_of(function)
        if name == "cls":
            name = source.qualified(function).split(".")[0]
        found = self._definitions.get(name, [])
        own = [(where, definition) for where, definition in found if where is source]
        return own or (found if isinstance(function, ast.Attribute) or name in source.imported else [])

    def _parameter(self, source: Source, definition: Definition, keyword: str | None, place: int) -> Iterator[Holder]:
        """Yield the parameter or field that takes an argument of a call."""
        if isinstance(definition, ast.ClassDef):
            constructor = [each for each in definition.body if isinstance(each, Function) and each.name == "__init__"]
            if not constructor:
                fields = [name_of(each.target) for each in definition.body if isinstance(each, ast.AnnAssign)]
                chosen = [keyword] if keyword else fields[place : place + 1]
                yield from (Holder(name, source, is_field=True) for name in chosen)
                return
            definition = constructor[0]
        names = [each.arg for each in (*definition.args.posonlyargs, *definition.args.args)]
        rest = definition.args.vararg
        bound = names[:1] in (["self"], ["cls"])
        chosen = [keyword] if keyword else names[place + bound : place + bound + 1] or ([rest.arg] if rest else [])
        yield from (Holder(name, source, definition) for name in chosen)

    def _targets(self, source: Source, target: ast.AST) -> Iterator[Holder]:
        """Yield the names that an assignment to `target` gives a value."""
        if isinstance(target, ast.Tuple | ast.List):
            yield from (held for each in target.elts for held in self._targets(source, each))
        elif isinstance(target, ast.Starred | ast.Subscript):
            yield from self._targets(source, target.value)
        elif isinstance(target, ast.Attribute):
            yield Holder(target.attr, source, is_field=True)
        elif isinstance(target, ast.Name):
            around = [node for _, node in source.above(target) if isinstance(node, Definition)][:1]
            yield Holder(
                target.id,
                source,
                around[0] if around and isinstance(around[0], Function) else None,
                is_field=bool(around) and isinstance(around[0], ast.ClassDef),
            )

    def _returned(self, source: Source, node: ast.AST) -> Iterator[str | Holder]:
        """Yield the function that gives a text to its callers."""
        function = source.function(node)
        if function is None:
            return
        if function.name in _TEXT_METHODS:
            yield "printed"
        else:
            yield Holder(function.name, source, is_field=isinstance(source.parent(function), ast.ClassDef))

    def _uses(self, holder: Holder) -> Sequence[Use]:
        """Return where a name is read."""
        reads = self._reads.get(holder.name, [])
        if holder.is_field:
            fields = [use for use in reads if isinstance(use[1], ast.Attribute)]
            own = [use for use in fields if use[0] is holder.source]
            return own if holder.name.startswith("_") else fields
        if holder.scope is not None:
            first, last = holder.scope.lineno, holder.scope.end_lineno or 0
            names = [node for source, node in reads if source is holder.source and isinstance(node, ast.Name)]
            return [(holder.source, node) for node in names if first <= node.lineno <= last]
        return [
            (source, node)
            for source, node in reads
            if isinstance(node, ast.Name) and (source is holder.source or holder.name in source.imported)
        ]

    def _find_errors(self) -> set[str]:
        """Return the names of the package's classes of errors and warnings."""
        classes = [each for found in self._definitions.values() for _, each in found if isinstance(each, ast.ClassDef)]
        errors: set[str] = set()
        for _ in range(3):  # those of classes of errors as well
            errors |= {
                each.name
                for each in classes
                if any(name_of(base) in errors or _ERROR.search(name_of(base)) for base in each.bases)
            }
        return errors

    def _partials_of_setting(self) -> set[str]:
        """Return the names that stand for `setting` with some arguments given."""
        found = set()
        for source in self.sources:
            for node in source.nodes:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args:
                    first = name_of(node.value.args[0])
                    if name_of(node.value.func) == "partial" and (first == "setting" or first in found):
                        found.add(name_of(node.targets[0]))
        return found
