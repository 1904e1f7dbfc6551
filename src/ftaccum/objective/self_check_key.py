"""The key of a cached verdict: a hash of everything that the verdict depends on."""

import functools
import hashlib
import json
import platform
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.gradient_hooks import has_hooks
from .item_counts import TOKEN_COLUMNS, Batch
from .sample import Sample

_PACKAGE = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "ftaccum")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 6  # levels of functions, containers and objects to follow
_MOST_NUMBERS = 1_000_000  # of a tensor that a loss holds


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
    except (_UnknownError, OSError):
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
    if has_hooks(model):
        raise _UnknownError
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    described = json.dumps(to_dict(), sort_keys=True, default=str)
    tensors = [
        (name, tuple(t.shape), str(t.dtype), t.device.type, t.requires_grad)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    loss = getattr(model, "loss_function", None)  # of Transformers' models, looked up in a table
    attributes = [(name, sorted(_plain_attributes(module))) for name, module in model.named_modules()]
    return [described, tensors, _of(loss), attributes, [_of_class(kind) for kind in _classes(model)]]


def _classes(model: nn.Module) -> list[type]:
    """Return the classes of all modules, and their bases."""
    kinds = {base for module in model.modules() for base in type(module).__mro__ if base is not object}
    return sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) or name == "forward":  # replaces a method
            raise _UnknownError
        if isinstance(value, _PLAIN):
            yield name, repr(value)


def _of_class(kind: type) -> list[Any]:
    """Return the file of a class, and the code of its functions, of which some may have been replaced since."""
    functions = [
        (name, f) for name, f in sorted(vars(kind).items(), key=lambda item: item[0]) if isinstance(f, FunctionType)
    ]
    file = _of_file(sys.modules.get(kind.__module__))
    return [kind.__qualname__, file, [(name, _of_code(f.__code__)) for name, f in functions]]


def _of(value: Any, depth: int = _DEPTH) -> Any:
    """Return what identifies a value in every process."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if not depth:
        raise _UnknownError
    if isinstance(value, Tensor) and value.numel() <= _MOST_NUMBERS:
        return [str(value.dtype), value.detach().cpu().tolist()]
    if isinstance(value, list | tuple):
        return [_of(each, depth - 1) for each in value]
    if isinstance(value, dict):
        return [(_of(name, depth - 1), _of(each, depth - 1)) for name, each in value.items()]
    if isinstance(value, FunctionType):
        return _of_function(value, depth)
    if isinstance(value, functools.partial):
        return _of([value.func, value.args, value.keywords], depth)
    if isinstance(value, ModuleType):
        return [value.__name__, _of_file(value)]
    if isinstance(value, type):
        return [_of_class(base) for base in value.__mro__ if base is not object]
    if callable(value) and type(value).__module__ == "builtins":  # a function written in C
        return [getattr(value, "__module__", None), getattr(value, "__qualname__", None)]
    if hasattr(value, "__dict__"):
        bases = [_of_class(base) for base in type(value).__mro__ if base is not object]
        return [bases, _of(vars(value), depth - 1)]
    raise _UnknownError


def _of_function(function: FunctionType, depth: int) -> list[Any]:
    names = function.__code__.co_names
    named = {name: function.__globals__[name] for name in names if name in function.__globals__}
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    is_library = _is_within(function.__code__.co_filename, _folders_of_versions())
    more = [] if is_library else [_of(value, depth - 1) for value in (held, named)]
    given = [_of(value, depth - 1) for value in (function.__defaults__, function.__kwdefaults__)]
    return [_of_file(sys.modules.get(function.__module__)), _of_code(function.__code__), given, more]


def _of_code(code: CodeType) -> str:
    _check_place(code.co_filename)
    inner = [
        _of_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts if not isinstance(c, frozenset)
    ]
    return hashlib.sha256(repr((code.co_code, code.co_names, inner)).encode()).hexdigest()


def _of_file(module: ModuleType | None) -> str:
    """Return a hash of the source of a module."""
    path = getattr(module, "__file__", None)
    if module is None or path is None or module.__name__ == "__main__":
        raise _UnknownError
    _check_place(path)
    return _of_path(path, Path(path).stat().st_mtime_ns)


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
    """Return the packages whose versions are part of the key, so that one need not follow what their functions call."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES)
    return tuple(str(Path(path).parent) for path in files if path)


def _of_sample(sample: Sample) -> list[Any]:
    """Return the columns of the rows, and the values of labels and of other columns, but not of tokens."""
    batches = [sample.together, *(group.together for group in sample.rare)]
    columns = [_columns(batch) for batch in batches]
    values = {
        name: sorted({value for of_batch in columns for value in of_batch[name].unique().tolist()}, key=repr)
        for name in columns[0]
        if name not in TOKEN_COLUMNS and not columns[0][name].is_floating_point() and all(name in c for c in columns)
    }
    shapes = [[(name, str(t.dtype), t.ndim) for name, t in of_batch.items()] for of_batch in columns]
    return [shapes, repr(values), sample.not_looked_at, sample.cut is None, sample.collated is None]


def _columns(batch: Batch) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise _UnknownError
    return dict(batch)
