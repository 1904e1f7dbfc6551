"""Every message that the package can show a user, with its kind and what triggers it, by module.

    .venv/bin/python scripts/messages.py                       # all of them
    .venv/bin/python scripts/messages.py --module data         # one module or package
    .venv/bin/python scripts/messages.py --json

Reads the source and imports nothing of it. A message may be written in parts; each part is listed by itself, and ⟨…⟩
stands for what is filled in. Texts of four words or more whose way to a user was not found are listed as "other text".
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from message_flow import Flow, Source, Use
from structure import Function, Module, modules

_MANY_WORDS = 4  # of a text that counts as a message wherever it is
_FEW_WORDS = 2  # of a text that reaches a user through names
_INSIDE = "; inside: "
OTHER = "other text"


@dataclass(frozen=True)
class Message:
    """A text that a user may see, or a part of one.

    Attributes:
        function: the classes and functions around it; empty at the top of its module.
        kind: the classes of errors and warnings, log levels, … that it is shown as.
        trigger: the conditions around it, the nearest first, or the name of its function or variable.
    """

    module: str
    line: int
    function: str
    kind: str
    trigger: str
    text: str

    def __str__(self) -> str:
        place = f"{self.module}:{self.line}  {self.function}".rstrip()
        return f"{place}\n  kind  {self.kind}\n  when  {self.trigger}\n  text  {self.text!r}"


def find_messages(found: Sequence[Module]) -> list[Message]:
    """Return the messages of a package in the order of its source."""
    flow = Flow(found)
    messages = [
        message
        for source in flow.sources
        for node in source.nodes
        if isinstance(node, ast.expr)
        and _is_whole_text(source, node)
        and (message := _message(flow, source, node)) is not None
    ]
    return sorted(messages, key=lambda message: (message.module, message.line))


def _message(flow: Flow, source: Source, node: ast.expr) -> Message | None:
    """Return the message at a text; None for a text that is none."""
    text = "".join(_pieces(node))
    words = [word for word in re.sub("⟨[^⟩]*⟩", "…", text).split() if re.search("[^\\W\\d_]|…", word)]
    has_letters = any(re.search("[^\\W\\d_]", word) for word in words)
    end = flow.follow(source, node)
    if not (has_letters or (end.is_direct and isinstance(node, ast.JoinedStr))):
        return None
    if len(words) < (1 if end.is_direct else _FEW_WORDS if end.kinds else _MANY_WORDS):
        return None
    kind = ", ".join(end.kinds) or OTHER
    return Message(source.name, node.lineno, source.qualified(node), kind, _trigger(source, node, end.uses), text)


def _trigger(source: Source, node: ast.AST, uses: Sequence[Use]) -> str:
    """Return the nearest conditions under which a text is reached, or a name that holds it is read in its module."""
    if conditions := _conditions(source, node):
        return _INSIDE.join(conditions[:2])
    for use in (use for where, use in uses if where is source):
        if conditions := _conditions(source, use):
            return f"{_INSIDE.join(conditions[:2])}  (in {source.qualified(use) or source.name})"
    named = [part for part in (source.qualified(node), _assigned_to(source, node)) if part]
    return f"always, in {'.'.join(named) or source.name}"


def _is_text(node: ast.AST | None) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_whole_text(source: Source, node: ast.AST) -> bool:
    """Return whether a node is a text that is no docstring, format or part of a longer text."""
    parent = source.parent(node)
    if not _is_text(node) or _is_text(parent) or isinstance(parent, ast.Expr):
        return False
    return not (isinstance(parent, ast.FormattedValue) and node is parent.format_spec)


def _pieces(node: ast.expr) -> Iterator[str]:
    """Yield a text piece by piece, with the source of what is filled in between ⟨ and ⟩."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from _pieces(part.value if isinstance(part, ast.FormattedValue) else part)
    elif isinstance(node, ast.BinOp) and _is_text(node):
        yield from (piece for side in (node.left, node.right) for piece in _pieces(side))
    else:
        yield f"⟨{ast.unparse(node)}⟩"


def _is_sentence(node: ast.AST) -> bool:
    return isinstance(node, ast.expr) and _is_text(node) and len("".join(_pieces(node)).split()) >= _MANY_WORDS


def _conditions(source: Source, node: ast.AST) -> list[str]:
    """Return what must hold for a node to be reached, from the inside out, within its function.

    Where nothing is around it, this is the contrary of the last condition before it that leaves the function."""
    around, before = [], []
    for child, parent in source.above(node):
        around += _conditions_of(child, parent)
        before += _left_before(child, parent)
        if isinstance(parent, Function | ast.ClassDef):
            break
    return around or before[:1]


def _conditions_of(child: ast.AST, parent: ast.AST) -> list[str]:
    """Return the conditions that one node sets for a child of its."""
    match parent:
        case ast.If() | ast.IfExp() | ast.While():
            return [_side(child, parent)] if child is not parent.test else []
        case ast.ExceptHandler():
            return [f"except {ast.unparse(parent.type)}" if parent.type else "except"]
        case ast.match_case():
            guard = f" if {ast.unparse(parent.guard)}" if parent.guard else ""
            return [f"case {ast.unparse(parent.pattern)}{guard}"]
        case ast.For() if child is not parent.iter and re.search(" if ", ast.unparse(parent.iter)):
            return [f"for {ast.unparse(parent.target)} in {ast.unparse(parent.iter)}"]
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            return [ast.unparse(each) for generator in parent.generators for each in generator.ifs]
        case ast.Dict() if child in parent.keys and _is_sentence(child):  # a table of messages and their conditions
            return [ast.unparse(value) for key, value in zip(parent.keys, parent.values, strict=True) if key is child]
        case ast.BoolOp() if child is not parent.values[0]:
            first = ast.unparse(parent.values[0])
            return [first if isinstance(parent.op, ast.And) else _contrary(parent.values[0])]
        case ast.Call() if child in parent.args[1:] and ast.unparse(parent.func) == "Rule":
            return [f"not {ast.unparse(parent.args[0])}"]
    return []


def _contrary(test: ast.expr) -> str:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return ast.unparse(test.operand)
    return f"not ({ast.unparse(test)})"


def _side(child: ast.AST, parent: ast.If | ast.IfExp | ast.While) -> str:
    otherwise = parent.orelse if isinstance(parent.orelse, list) else [parent.orelse]
    return _contrary(parent.test) if child in otherwise else ast.unparse(parent.test)


def _left_before(child: ast.AST, parent: ast.AST) -> list[str]:
    """Return the contraries of the conditions before a statement under which its block is left, the nearest first."""
    block: list[ast.stmt] = getattr(parent, "body", [])
    if not isinstance(block, list) or child not in block:
        return []
    return [
        _contrary(each.test)
        for each in reversed(block[: block.index(child)])
        if isinstance(each, ast.If) and isinstance(each.body[-1], ast.Return | ast.Continue | ast.Raise)
    ]


def _assigned_to(source: Source, node: ast.AST) -> str:
    """Return the variable, of a class or module, whose value a node is part of; empty within functions."""
    if source.function(node) is not None:
        return ""
    for _, parent in source.above(node):
        if isinstance(parent, ast.Assign | ast.AnnAssign):
            return ast.unparse(parent.targets[0] if isinstance(parent, ast.Assign) else parent.target)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Lists every message that the package can show a user.")
    parser.add_argument("--module", default="", help="a module or package, such as data or data.loader")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    arguments = parser.parse_args()
    messages = [
        message
        for message in find_messages(modules())
        if f"{message.module}.".startswith(arguments.module + ".") or not arguments.module
    ]
    if not messages:
        parser.error(f"no module or package {arguments.module!r} has messages")
    if arguments.json:
        print(json.dumps([asdict(message) for message in messages], indent=1, ensure_ascii=False))
        return
    for module, members in groupby(messages, key=lambda message: message.module):
        print(f"=== {module}\n")
        print("\n\n".join(map(str, members)) + "\n")


if __name__ == "__main__":
    main()
