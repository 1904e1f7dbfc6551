"""The key of a cached verdict: losses, models and packages that differ in ways that code alone does not show."""

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum.objective import self_check_key
from ftaccum.objective.sample import Sample
from ftaccum.objective.self_check_key import key_of

SMOOTH = 0.0
OPTIONS = SimpleNamespace(smooth=0.0)
HERE = sys.modules[__name__]


class Loss:
    classes = 3

    def __init__(self, smooth: float) -> None:
        self.smooth = smooth

    def compute(self, outputs: Any) -> Any:
        return outputs[0] * self.smooth


class Model(nn.Linear):
    ignored = 3

    def loss(self, given: Tensor) -> Tensor:
        return given * SMOOTH

    @staticmethod
    def scaled(given: Tensor) -> Tensor:
        return given


def nested(outputs: Any) -> Any:
    return [each * SMOOTH for each in (lambda: outputs)()]


def of_module(outputs: Any) -> Any:
    return outputs[0] * HERE.SMOOTH


def of_class(outputs: Any) -> Any:
    return outputs[0] * Loss.classes


def wrapped(smooth: float) -> Any:
    return torch.no_grad()(of_class if smooth else nested)


def with_attribute(value: float) -> Any:
    def loss_fn(outputs: Any) -> Any:
        return outputs

    loss_fn.value = value  # type: ignore[attr-defined]
    return loss_fn


def unset() -> Any:
    def loss_fn() -> Any:
        return later

    if SMOOTH > 1:
        later = 1
    return loss_fn


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Return a function that returns the key, as if this file were installed."""
    found = self_check_key._library_folders()
    monkeypatch.setattr(self_check_key, "_library_folders", lambda: (*found, str(Path(__file__).parent)))
    batch = {"x": torch.ones(4, 2), "labels": torch.arange(4)}
    sample = Sample(batch, batch, None, lambda _: [])

    def of(loss_fn: Any = None, model: nn.Module | None = None) -> str | None:
        return key_of(model or Model(2, 2), loss_fn, sample, {})

    return of


@pytest.mark.parametrize(
    "losses",
    [
        (Loss(0.0).compute, Loss(0.1).compute),
        (functools.partial(of_class, 0.0), functools.partial(of_class, 0.1)),
        (with_attribute(0.0), with_attribute(0.1)),
        (wrapped(0.0), wrapped(0.1)),
        ((lambda o: o in {1, 2}), (lambda o: o in {1, 3})),
        (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 5.0]))),
    ],
    ids=["method", "partial", "attribute", "decorated", "set", "module"],
)
def test_losses_with_other_state_have_other_keys(losses: tuple[Any, Any], key: Any) -> None:
    first, other = (key(loss_fn) for loss_fn in losses)
    assert None not in (first, other)
    assert first == key(losses[0]) != other


@pytest.mark.parametrize("loss_fn", [nested, of_module])
def test_globals_of_inner_functions_and_of_modules_are_part_of_the_key(
    loss_fn: Any, key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, of_model = key(loss_fn), key()
    assert before is not None
    monkeypatch.setattr(HERE, "SMOOTH", 0.1)
    assert key(loss_fn) not in (None, before)
    assert key() not in (None, of_model), "a method of the model reads it"


def test_class_attributes_are_part_of_the_key(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, of_loss = key(), key(of_class)
    monkeypatch.setattr(Loss, "classes", 4)
    assert key(of_class) not in (None, of_loss)
    monkeypatch.setattr(Model, "ignored", 4)
    assert key() not in (None, before)
    monkeypatch.setattr(Model, "scaled", staticmethod(of_class))
    assert key() not in (None, before)


@pytest.mark.parametrize("value", [(1,), [2], {3}, {"a": 4}])
def test_containers_in_modules_are_part_of_the_key(value: Any, key: Any) -> None:
    model = Model(2, 2)
    model.kept = type(value)()
    before = key(model=model)
    model.kept = value
    assert key(model=model) not in (None, before)


def test_small_buffers_and_other_configurations_are_part_of_the_key(key: Any) -> None:
    model = Model(2, 2)
    weights = torch.ones(3)
    model.register_buffer("weights", weights)
    before = key(model=model)
    weights[2] = 5.0
    with_buffer = key(model=model)
    model.config = SimpleNamespace(ignored=3)  # type: ignore[assignment]
    with_config = key(model=model)
    model.config = SimpleNamespace(ignored=4)  # type: ignore[assignment]
    assert len({before, with_buffer, with_config, key(model=model), None}) == 5


def test_the_configuration_of_a_teacher_is_part_of_the_key(key: Any) -> None:
    model, teacher = Model(2, 2), Model(2, 2)
    model.teacher = teacher
    found = set()
    for number in (3, 4):
        teacher.config = SimpleNamespace(ignored=number)  # type: ignore[assignment]
        found.add(key(model=model))
    assert len(found | {None}) == 3


@pytest.mark.parametrize(
    "held", [torch.zeros(1_000_001), torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), object(), [].append]
)
def test_losses_that_hold_what_has_no_hash_are_not_cached(held: Any, key: Any) -> None:
    assert key(functools.partial(of_class, held)) is None
    assert key(unset()) is None


def test_edits_of_other_files_of_a_package_change_the_key(key: Any, tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "of_two_files"
    package.mkdir()
    (package / "__init__.py").write_text("from .model import Model\n")
    (package / "model.py").write_text("from torch import nn\nfrom . import loss\nclass Model(nn.Linear): pass\n")
    found = self_check_key._library_folders()
    monkeypatch.setattr(self_check_key, "_library_folders", lambda: (*found, str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    keys = []
    for code in ("A = 1", "A = 1", "A = 22"):
        (package / "loss.py").write_text(code)
        for name in [name for name in sys.modules if name.startswith("of_two_files")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        keys.append(key(model=importlib.import_module("of_two_files").Model(2, 2)))
    assert keys[0] == keys[1] != keys[2]
    assert None not in keys


def test_packages_that_are_imported_later_are_known_by_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = self_check_key._folders_of_versions()
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    self_check_key._folders_of_versions.cache_clear()
    assert self_check_key._folders_of_versions() == found
    assert str(Path(self_check_key.__file__).parents[1]) in found
