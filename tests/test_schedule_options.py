"""Options of the schedule (`lr_scheduler_kwargs`)."""

import math
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

from ftaccum import SettingsError
from ftaccum.apps.cli import main
from ftaccum.apps.options import OPTIONS
from ftaccum.apps.parser import parse
from ftaccum.settings.recipe import Recipe
from silent_errors.rates import regression, train

RATE = 0.1


def rates(optimizer: Any = None, **arguments: Any) -> list[float]:
    """Return the rates of six updates."""
    model, rows = regression()
    given = {"learning_rate": RATE, "n_epochs": 6} | arguments
    return train(model, rows, optimizer, **given).lr_history


def cosine(least: float) -> list[float]:
    """Return six rates of a cosine schedule that falls to a share of the peak."""
    return [RATE * (least + (1 - least) * (1 + math.cos(math.pi * n / 6)) / 2) for n in range(6)]


def test_a_schedule_falls_to_a_share_of_the_peak() -> None:
    found = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.2})
    assert found == pytest.approx(cosine(0.2))


def test_a_minimum_is_compared_with_the_peak_of_the_run() -> None:
    """Transformers divides it by the default rate of the optimizer's class, which is not in use."""
    options: dict[str, Any] = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.02}}
    for optimizer in (None, "sgd", SGD, lambda groups: SGD(groups, momentum=0.9)):
        assert rates(optimizer, **options) == pytest.approx(cosine(0.2))
    model, rows = regression()
    own = lambda groups: SGD(groups, lr=0.1)
    arguments = {"n_epochs": 6, **options}
    assert train(model, rows, own, **arguments).lr_history == pytest.approx(cosine(0.2))


def test_a_minimum_is_compared_with_the_learning_rate_if_all_groups_have_lower_ones() -> None:
    _, rows = regression()
    model = nn.Sequential(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 2).double()])}))
    model.forward = lambda inputs: model[0]["layers"][0](inputs)  # type: ignore[method-assign]
    options: dict[str, Any] = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.02}}
    found = train(model, rows, None, learning_rate=RATE, n_epochs=6, layerwise_lr_decay=0.5, **options).lr_history
    assert found == pytest.approx([rate / 2 for rate in cosine(0.2)])


def test_the_default_rate_of_an_optimizer_is_unchanged() -> None:
    made: list[SGD] = []
    rates(lambda groups: made.append(SGD(groups)) or made[0], lr_scheduler="polynomial")
    assert made[0].defaults["lr"] == 1e-3


def test_options_of_other_schedules() -> None:
    found = rates(lr_scheduler="polynomial", lr_scheduler_kwargs={"power": 2.0, "lr_end": 0.01})
    assert found == pytest.approx([0.01 + 0.09 * (1 - n / 6) ** 2 for n in range(6)])
    found = rates(
        lr_scheduler="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3, "decay_type": "linear"}
    )
    assert found == pytest.approx([RATE] * 4 + [RATE * 2 / 3, RATE / 3])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("linear", {"min_lr_rate": 0.1}, "has 'min_lr_rate', but the schedule 'linear' takes no options"),
        ("cosine", {"cycles": 2}, "has 'cycles', but the schedule 'cosine' takes 'num_cycles'"),
        ("cosine", {"num_training_steps": 2}, "has 'num_training_steps', but the schedule 'cosine' takes"),
        ("cosine_with_min_lr", None, "is None, which the schedule 'cosine_with_min_lr' cannot use: .*It takes"),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, "cannot use: Only one of"),
        ("cosine_with_min_lr", {"min_lr_rate": "a"}, "which the schedule 'cosine_with_min_lr' cannot use: "),
        ("polynomial", {"lr_end": -1.0}, "'polynomial' cannot use: the learning rate would be -"),
        ("polynomial", {"power": -1.0}, "'polynomial' cannot use: "),
        ("polynomial", {"lr_end": 1.0}, "'polynomial' cannot use: lr_end"),
        ("warmup_stable_decay", {}, "'warmup_stable_decay' cannot use: .*num_decay_steps"),
        ("linear", "{min_lr", r"`lr_scheduler_kwargs` must be a dict of options, .* This is not JSON text"),
        ("linear", [1], "`lr_scheduler_kwargs` must be a dict of options"),
        ("reduce_lr_on_plateau", {"factor": 0.5}, "`lr_scheduler` must be one of .*'cosine_with_min_lr'"),
    ],
)
def test_options_that_a_schedule_cannot_use_are_refused(name: str, options: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        rates(lr_scheduler=name, lr_scheduler_kwargs=options)


def test_an_end_above_the_rate_of_a_users_optimizer_is_refused() -> None:
    model, rows = regression()
    with pytest.raises(SettingsError, match=r"\{'lr_end': 1e-05\}, which cannot be used at the rate 1e-06"):
        train(
            model, rows, lambda groups: SGD(groups, lr=1e-6), lr_scheduler="polynomial",
            lr_scheduler_kwargs={"lr_end": 1e-5},
        )  # fmt: skip


def test_the_command_line_takes_json(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    words = ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', "--optimizer_groups", '{"bias": {"lr": 1e-4}}']
    *_, recipe, _ = parse(OPTIONS["train"], words).options
    assert (recipe.lr_scheduler_kwargs, recipe.optimizer_groups) == (words[1], words[3])
    file = tmp_path / "options.yaml"
    file.write_text("lr_scheduler_kwargs: {min_lr_rate: 0.1}\noptimizer_groups: [{pattern: bias, lr: 1e-4}]\n")
    *_, recipe, _ = parse(OPTIONS["train"], ["--config", str(file)]).options
    assert recipe == Recipe(
        lr_scheduler_kwargs={"min_lr_rate": 0.1},  # type: ignore[arg-type]
        optimizer_groups=[{"pattern": "bias", "lr": 1e-4}],  # type: ignore[arg-type]
    )
    assert main(["train", "--model", "none", "--train_data", "none.csv", "--lr_scheduler", "cosine", *words]) == 2
    expected = "ftaccum train: `lr_scheduler_kwargs` has 'min_lr_rate', but the schedule 'cosine' takes 'num_cycles'.\n"
    assert capsys.readouterr().err == expected
