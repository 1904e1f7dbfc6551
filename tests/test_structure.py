"""The structure of the source: sizes, and uses of private names of other packages."""

import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from structure import Module, body_lines, modules

MODULES = modules()
# Private names of Accelerate, torch, Transformers and Optuna that are used outside `runtime/`, and why.
ALLOWED = {
    ("apps.search.launcher", "_exit"): "ends a worker at once, whatever its threads do",
    ("data.workers", "_exit"): "ends a worker at once, whatever its threads do",
    ("errors", "_getframe"): "finds the line that called ftaccum",
    ("objective.deterministic_forward", "_DropoutNd"): "the one base class of all dropout modules",
    ("accumulation.buffers", "_buffers"): "buffers may be replaced in a forward pass; torch has no public setter",
    ("checkpoint.best_weights", "_non_persistent_buffers_set"): "torch has no public name for these buffers",
    ("data.workers", "_worker_info"): "what torch's `get_worker_info` returns to data sets in a worker",
    ("training.trainer_arguments", "_n_gpu"): "otherwise, reading `n_gpu` would set up a device",
    ("apps.parser", "_actions"): "argparse has no public list of a parser's options",
    ("apps.parser", "_defaults"): "argparse has no public way to take defaults back",
    ("bridges.trainer.trainer_support", "_prepare_inputs"): "trainers that generate their batches override it",
    ("apps.verify.peers", "_n_gpu"): "Trainer would use several GPUs at once",
}


def foreign_private_names(module: Module) -> set[str]:
    """Return the names with one underscore that a module reads from objects of other modules."""
    asked, own = set(), set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if is_self else asked).add(node.attr)
    return asked - own


# Modules that may be longer, with the reason.
LONG = {"fine_tuning": "one signature, with a description of every argument"}


def test_no_module_is_long() -> None:
    assert {module.name: module.n_lines for module in MODULES if module.n_lines > 300 and module.name not in LONG} == {}


def test_no_function_is_long() -> None:
    lengths = {name: body_lines(node) for module in MODULES for name, node in module.functions()}
    lengths.pop("fine_tuning.test_fine_tuning")  # it passes on each argument of its signature
    assert {name: n for name, n in lengths.items() if n > 50} == {}


def test_no_constructor_takes_many_arguments() -> None:
    counts = {name: n for module in MODULES for name, n in module.constructors()}
    assert {name: n for name, n in counts.items() if n > 8} == {}


def test_few_modules_are_at_the_top_level() -> None:
    assert sum("." not in module.name for module in MODULES) <= 9


def test_only_the_top_level_package_exports_names() -> None:
    packages = [module for module in MODULES if module.name.endswith(".__init__")]
    assert [module.name for module in packages if module.text.strip()] == []


def test_private_names_of_other_packages_are_used_only_in_runtime() -> None:
    found = {
        (module.name, name)
        for module in MODULES
        if not module.name.startswith("runtime.")
        for name in foreign_private_names(module)
    }
    assert found == set(ALLOWED)


def test_foreign_private_names_are_distinguished_from_a_modules_own() -> None:
    text = "class A:\n    def __init__(self):\n        self._x = 1\ndef f(a, model):\n    return a._x, model._buffers\n"
    assert foreign_private_names(Module("m", text, ast.parse(text))) == {"_buffers"}


def test_the_architecture_page_names_every_module() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = set(re.findall(r"\w+", page[page.index("### Files") : page.index("## One composition root")]))
    inner = [module.name for module in MODULES if "." in module.name]
    assert [name for name in inner if name.rsplit(".", 1)[1] not in {*files, "__init__", "__main__"}] == []
