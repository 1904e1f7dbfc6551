"""The key of a cached verdict: a hash of everything that the verdict depends on."""

import functools
import hashlib
import importlib.util
import json
import platform
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.gradient_hooks import model_has_hooks
from ..runtime.model_wrapper import ModelWrapper, configs_in
from ..runtime.module_attributes import OF_EVERY_MODULE
from ..runtime.watched_state import names_in
from .item_counts import Batch
from .prefixed import is_tokens_column
from .sample import Sample

_PACKAGE = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "liger_kernel", "triton", "ftaccum")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OF_MODULES = OF_EVERY_MODULE - {"training"}
_DEPTH = 6  # levels of functions, containers and objects to follow
_MOST_NUMBERS = 1_000_000  # of a tensor that a loss holds
_SMALL = 4096  # numbers of a buffer of the model that may be weights of classes, say


class _UnknownError(Exception):
    """Something that a loss depends on has no hash that is the same in each process."""


def key_of(model: nn.Module, loss_fn: Any, sample: Sample, settings: Mapping[str, Any]) -> str | None:
    """Return the key; None if a verdict on this model must not be cached.

    That is so for code outside installed packages (`__main__`, notebooks, editable installs), which changes while one
    works on it, for functions that replaced those of a class, for hooks, and for a `loss_fn` with unknown state.

    Args:
        loss_fn: the function that computes the loss; None for the model's own.
        settings: other settings and numbers that the loss depends on.
    """
    try:
        parts = [_versions(), _ftaccum(), _of_model(model), _of(loss_fn), _of_sample(sample), _of(dict(settings))]
    except (_UnknownError, OSError, RuntimeError, ValueError, TypeError):  # empty closures, tensors without values, ...
        return None
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _versions() -> list[str]:
    found = [platform.python_version()]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(package)
    return found


@functools.cache
def _ftaccum() -> str:
    """Return a hash of ftaccum's own code of the objective, whose editable install does not prevent caching."""
    files = [*sorted((_PACKAGE / "objective").glob("*.py")), _PACKAGE / "losses.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _of_model(model: nn.Module) -> list[Any]:
    if model_has_hooks(model):
        raise _UnknownError
    described = [_of_config(config) for config in configs_in(model)]
    tensors = [
        (name, tuple(t.shape), str(t.dtype), t.device.type, t.requires_grad)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    models = [model, *(model.children() if isinstance(model, ModelWrapper) else ())]
    losses = [_of(getattr(each, "loss_function", None)) for each in models]  # of Transformers', looked up in a table
    attributes = [(name, sorted(_plain_attributes(module))) for name, module in model.named_modules()]
    held = [(name, _of(b)) for name, b in model.named_buffers() if b.numel() <= _SMALL]
    return [described, tensors, held, losses, attributes, [_of_class(kind) for kind in _classes(model)]]


def _of_config(config: Any) -> Any:
    to_dict = getattr(config, "to_dict", None)
    return _of(config) if to_dict is None else json.dumps(to_dict(), sort_keys=True, default=str)


def _classes(model: nn.Module) -> list[type]:
    """Return the classes of all modules, and their bases."""
    kinds = {base for module in model.modules() for base in type(module).__mro__ if base is not object}
    return sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) or name == "forward":  # replaces a method
            raise _UnknownError
        if name not in _OF_MODULES and (plain := _plain(value)) is not None:
            yield name, plain


def _plain(value: Any) -> str | None:
    """Return a value that has the same representation in each process, or a container of such values; else None."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, dict):
        pairs = [(_plain(name), _plain(each)) for name, each in value.items()]
        return repr(pairs) if not any(None in pair for pair in pairs) else None
    if isinstance(value, list | tuple | set | frozenset):
        found = [plain for each in value if (plain := _plain(each)) is not None]
        return (
            repr(sorted(found) if isinstance(value, set | frozenset) else found) if len(found) == len(value) else None
        )
    return None


def _of_class(kind: type) -> list[Any]:
    """Return the file of a class, its plain attributes and the code of its functions: some may have been replaced."""
    file = _of_file(sys.modules.get(kind.__module__))
    follows = not _is_within(str(getattr(sys.modules[kind.__module__], "__file__", "")), _folders_of_versions())
    found: list[Any] = []
    for name, value in sorted(vars(kind).items(), key=lambda item: item[0]):
        for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            if isinstance(function, FunctionType):
                given = [_plain(each) for each in (function.__defaults__, function.__kwdefaults__)]
                read = [(n, _plain(v)) for n, v in _globals_of(function)] if follows else []
                found.append((name, _of_code(function.__code__), given, read))
        if follows and (plain := _plain(value)) is not None:
            found.append((name, plain))
    return [kind.__qualname__, file, found]


def _of(value: Any, depth: int = _DEPTH) -> Any:
    """Return an identity of a value that is the same in every process."""
    if (plain := _plain(value)) is not None:
        return plain
    if not depth:
        raise _UnknownError
    if isinstance(value, Tensor):
        if value.numel() > _MOST_NUMBERS:
            raise _UnknownError
        return [str(value.dtype), value.detach().cpu().tolist()]
    if isinstance(value, list | tuple):
        return [_of(each, depth - 1) for each in value]
    if isinstance(value, dict):
        return [(_of(name, depth - 1), _of(each, depth - 1)) for name, each in value.items()]
    if isinstance(value, FunctionType):
        return _of_function(value, depth)
    if isinstance(value, functools.partial):
        return _of([value.func, value.args, value.keywords], depth)
    if isinstance(value, MethodType):
        return _of([value.__func__, value.__self__], depth)
    if isinstance(value, ModuleType):
        return [value.__name__, _of_file(value)]
    if isinstance(value, type):
        return [_of_class(base) for base in value.__mro__ if base is not object]
    if callable(value) and type(value).__module__ == "builtins":  # a function written in C
        if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType | type | None):
            raise _UnknownError  # a method of an object
        return [getattr(value, "__module__", None), getattr(value, "__qualname__", None)]
    if hasattr(value, "__dict__") and not any(vars(base).get("__slots__") for base in type(value).__mro__):
        bases = [_of_class(base) for base in type(value).__mro__ if base is not object]
        return [bases, _of(vars(value), depth - 1)]
    raise _UnknownError


def _of_function(function: FunctionType, depth: int) -> list[Any]:
    is_library = _is_within(function.__code__.co_filename, _folders_of_versions())
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    named = [] if is_library else [(name, _of(value, depth - 1)) for name, value in _globals_of(function)]
    given = [function.__defaults__, function.__kwdefaults__, vars(function)]
    more = [named, *(_of(value, depth - 1) for value in (held, *given))]
    return [_of_file(sys.modules.get(function.__module__)), _of_code(function.__code__), more]


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global names that a function may read, also those of modules, with their values."""
    names = sorted(names_in(function.__code__))
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            yield name, value
            if isinstance(value, ModuleType):  # a setting that may have been changed since
                yield name, [(n, vars(value)[n]) for n in names if _plain(vars(value).get(n)) not in (None, "None")]


def _of_code(code: CodeType) -> str:
    _check_place(code.co_filename)
    inner = [_of_code(c) if isinstance(c, CodeType) else _plain(c) or repr(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, inner)).encode()).hexdigest()


def _of_file(module: ModuleType | None) -> str:
    """Return hashes of the source of a module, and of the loaded modules of its package, which it may call."""
    path = getattr(module, "__file__", None)
    if module is None or path is None or module.__name__ == "__main__":
        raise _UnknownError
    package = module.__name__.partition(".")[0]
    others = () if package in _PACKAGES else (m for n, m in list(sys.modules.items()) if n.startswith(f"{package}."))
    paths = {path, *(file for other in others if (file := getattr(other, "__file__", None)))}
    for each in paths:
        _check_place(each)
    return " ".join(_of_path(each, Path(each).stat().st_mtime_ns) for each in sorted(paths))


@functools.lru_cache(maxsize=4096)
def _of_path(path: str, _: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_place(path: str) -> None:
    if not _is_within(path, (*_library_folders(), str(_PACKAGE))):
        raise _UnknownError


@functools.lru_cache(maxsize=4096)
def _is_within(path: str, folders: tuple[str, ...]) -> bool:
    resolved = Path(path).resolve()
    return any(resolved.is_relative_to(Path(folder).resolve()) for folder in folders)


@functools.cache
def _library_folders() -> tuple[str, ...]:
    """Return the folders of installed packages and of the standard library."""
    user = site.getusersitepackages()
    paths = (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib"))
    return (*site.getsitepackages(), user, *(path for path in paths if path))


@functools.cache
def _folders_of_versions() -> tuple[str, ...]:
    """Return the folders of the packages whose versions are part of the key: their functions need not be followed.

    A package counts whether or not it is loaded yet, as a process may load it after its first key.
    """
    specs = (importlib.util.find_spec(name) for name in _PACKAGES)
    return tuple(str(Path(spec.origin).parent) for spec in specs if spec is not None and spec.origin)


def _of_sample(sample: Sample) -> list[Any]:
    """Return the columns of the rows, and the values of labels and of other columns, but not of tokens."""
    batches = [sample.together, *(group.together for group in sample.rare)]
    columns = [_columns(batch) for batch in batches]
    names = [name for name in columns[0] if not is_tokens_column(name, columns[0])]
    values = {
        name: sorted({value for of_batch in columns for value in of_batch[name].unique().tolist()}, key=repr)
        for name in names
        if not columns[0][name].is_floating_point() and all(name in c for c in columns)
    }
    shapes = [[(name, str(t.dtype), t.ndim) for name, t in of_batch.items()] for of_batch in columns]
    return [shapes, repr(values), sample.not_looked_at, sample.cut is None, sample.collated is None]


def _columns(batch: Batch) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise _UnknownError
    return dict(batch)
