"""Plain attributes of modules: changes are detected and undone."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ftaccum.objective.hidden_state import HiddenState, find_hidden_state
from ftaccum.runtime import module_attributes
from ftaccum.runtime.log import run_logging
from ftaccum.runtime.module_attributes import ModuleAttributes, preserve_attributes


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.name, self.average = 0, "a", torch.zeros(2)
        self.bank: list[Any] = [1]
        self.by_name: dict[str, int] = {"x": 1}
        self.counter, self.nested = Counter({"x": 1}), {"seen": [1]}
        self.config, self.array = SimpleNamespace(calls=0, inner=[1]), np.zeros(3)
        self.large = torch.zeros(70_000)


def changes(module: Any) -> dict[str, Any]:
    """Return functions that change the module, by the attribute that they change."""
    return {
        "calls": lambda: setattr(module, "calls", module.calls + 1),
        "name": lambda: setattr(module, "name", "b"),
        "average": lambda: module.average.add_(1),
        "bank": lambda: module.bank.append(2),
        "by_name": lambda: module.by_name.update(x=300),
        "counter": lambda: module.counter.update("x"),
        "nested": lambda: module.nested["seen"].append(2),
        "config": lambda: module.config.inner.append(vars(module.config).update(calls=1)),
        "array": lambda: module.array.__iadd__(1),
        "large": lambda: module.large.add_(1),
        "new": lambda: setattr(module, "new", 1),
    }


@pytest.mark.parametrize("name", list(changes(None)))
def test_a_change_is_detected_and_undone(name: str) -> None:
    module = Keeps()
    outer = nn.Sequential(module)
    before = ModuleAttributes(outer)
    bank, average = module.bank, module.average
    assert before.changed() == []
    changes(module)[name]()
    assert before.changed() == [f"`{name}` of Keeps"]
    before.restore()
    assert before.changed() == []
    assert (module.calls, module.name, module.bank, module.by_name) == (0, "a", [1], {"x": 1})
    assert module.average.tolist() == [0, 0]
    assert (module.counter, module.nested, module.config) == (
        Counter({"x": 1}),
        {"seen": [1]},
        SimpleNamespace(calls=0, inner=[1]),
    )
    assert not module.array.any()
    assert not module.large.any()
    assert not hasattr(module, "new")
    assert module.bank is bank
    assert module.average is average


def test_equal_values_are_not_a_change() -> None:
    module = Keeps()
    before = ModuleAttributes(module)
    module.calls, module.name = 1000 - 1000, "".join(["a"])
    assert before.changed() == []


def test_attributes_are_restored_after_an_error() -> None:
    module = Keeps()
    with pytest.raises(ZeroDivisionError), preserve_attributes(module):
        module.calls = 1 // 0 if module.__dict__.update(calls=7) is None else 0
    assert module.calls == 0


def test_generators_are_detected() -> None:
    module = Keeps()
    assert not ModuleAttributes(module).hold_generators()
    module.draws = np.random.default_rng(0)
    assert ModuleAttributes(module).hold_generators()


def hidden(model: Any, run: Any) -> HiddenState:
    return find_hidden_state(model, [], lambda: {"loss": run(model)}, 1e-6)


def test_a_counter_that_the_next_pass_depends_on_is_found() -> None:
    model = Keeps()

    def run(model: Any) -> float:
        model.calls += 1
        return 1.0 + model.calls

    assert hidden(model, run) == HiddenState(0.5, ["`calls` of Keeps"])
    assert model.calls == 0


def test_a_counter_that_nothing_depends_on_is_ignored() -> None:
    model = Keeps()

    def run(model: Any) -> float:
        model.calls += 1
        return 1.0

    assert hidden(model, run) == HiddenState()


def test_a_counter_outside_the_model_is_detected_without_its_location() -> None:
    calls = [0]

    def run(_: Any) -> float:
        calls[0] += 1
        return float(calls[0])

    found = hidden(Keeps(), run)
    assert found.off > 0
    assert found.places == ()


def test_random_draws_are_not_hidden_state() -> None:
    model = Keeps()
    model.draws = np.random.default_rng(0)
    assert hidden(model, lambda model: float(model.draws.random())) == HiddenState()
    assert hidden(Keeps(), lambda _: float(torch.rand(()))) == HiddenState()


def test_an_attribute_that_cannot_be_restored_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftaccum.runtime.module_attributes._BUDGET", 1000)
    module_attributes._warn_if_lost.cache_clear()  # it warns once per process
    module = Keeps()
    before = ModuleAttributes(module)
    module.large += 1
    with run_logging(enabled=True):
        before.restore()
    assert (
        "`large` of Keeps changes in the forward passes of ftaccum's checks and cannot be restored"
        in capsys.readouterr().err
    )
    assert before.changed() == ["`large` of Keeps"]


class InstallsHooks(nn.Module):
    """Collects the outputs of a layer with a hook that its first pass installs, as Transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.collected: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not getattr(self, "has_hooks", False):
            self.layer.register_forward_hook(lambda *given: self.collected.append(given[-1]))
            self.layer.register_forward_pre_hook(lambda _, given: given[0] + 1, with_kwargs=False)
            self.has_hooks = True
        self.collected.clear()
        self.layer(x)
        return list(self.collected)


def test_hooks_that_a_first_pass_installs_are_not_installed_twice() -> None:
    module, x = InstallsHooks(), torch.zeros(1, 2)
    for _ in range(3):
        with preserve_attributes(module):
            assert len(module(x)) == 1
    outputs = module(x)
    torch.testing.assert_close(outputs, [nn.functional.linear(x + 1, module.layer.weight, module.layer.bias)])
    assert len(module(x)) == 1


def test_a_hook_from_before_stays() -> None:
    module, calls = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    with preserve_attributes(module):
        module(torch.zeros(1, 2))
    module(torch.zeros(1, 2))
    assert len(calls) == 2
