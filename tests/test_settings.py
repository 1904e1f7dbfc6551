"""Bad settings: one error reports every fault, with the argument, the value and the values that are allowed."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftaccum import SettingsError, plan
from ftaccum.arguments import parse_settings
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime


@pytest.mark.parametrize("value", [0, -1, 2.0, 1.5, True, "4", None])
def test_counts_must_be_positive_integers(value: Any) -> None:
    with pytest.raises(
        SettingsError, match=f"`n_epochs` must be a positive integer, but is {value!r} instead. It mean"
    ):
        parse_settings({"n_epochs": value})


@pytest.mark.parametrize(
    "value",
    [
        0,
        True,
        2.0,
        "4",
        "0:2,x:8",
        "1:2",
        "0:2:4",
        None,
        [],
        [2, 4],
        [(0, 2, 4)],
        [(1, 2)],
        [(0, 2), (5, 0)],
        [(0, 2), (9, 4), (9, 8)],
        [(0, 1.5)],
    ],
)
def test_steps_are_a_positive_integer_or_pairs_that_ascend(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"`gradient_accumulation_steps` must be a positive integer, or pairs"):
        parse_settings({"gradient_accumulation_steps": value})


def test_steps_that_an_error_recommends_are_accepted() -> None:
    with pytest.raises(SettingsError, match="such as '0:2,100:8', but is 0 instead"):
        parse_settings({"gradient_accumulation_steps": 0})
    with pytest.raises(SettingsError, match="to pairs, such as '0:2,100:8', or omit"):
        parse_settings({"learning_rate_scaling": "sqrt"})
    assert parse_settings({"gradient_accumulation_steps": "0:2,100:8"})[0].gradient_accumulation_steps == [
        [0, 2],
        [100, 8],
    ]
    shown = str(plan(1000, gradient_accumulation_steps="0:2,100:8"))
    assert shown == str(plan(1000, gradient_accumulation_steps=[(0, 2), (100, 8)]))


def test_steps_that_change_exclude_other_sizes_of_an_update() -> None:
    pairs = np.array([(0, 2), (100, 8)])
    assert parse_settings({"gradient_accumulation_steps": pairs})[0].gradient_accumulation_steps == [[0, 2], [100, 8]]
    for name in ("effective_batch_size", "tokens_per_update"):
        with pytest.raises(SettingsError, match=rf"is \[\[0, 2\], \[100, 8\]\] and `{name}` is 64, but both"):
            parse_settings({"gradient_accumulation_steps": pairs, name: 64})
    with pytest.raises(SettingsError, match=r"is 'auto', which determines k, but `gradient_accumulation_steps`"):
        parse_settings({"gradient_accumulation_steps": pairs, "batch_size": "auto"})
    with pytest.raises(
        SettingsError, match=r"`learning_rate_scaling` is 'sqrt', but `gradient_accumulation_steps` is 4"
    ):
        parse_settings({"gradient_accumulation_steps": 4, "learning_rate_scaling": "sqrt"})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch_size", 0, "a positive integer or 'auto'"),
        ("batch_size", "most", "a positive integer or 'auto'"),
        ("max_tokens", 0, "a positive integer or 'auto' or None"),
        ("planner_costs", [1, 2], "three non-negative numbers"),
        ("planner_costs", [0, 0, 0], "three non-negative numbers"),
        ("max_updates", 0, "a positive integer or None"),
        ("remainder", "drop", "'flush' or 'carry'"),
        ("learning_rate_scaling", "cube", "'none', 'sqrt' or 'linear'"),
        ("num_workers", -1, "a non-negative integer"),
        ("effective_batch_size", 0, "a positive integer or None"),
        ("tokens_per_update", -5, "a positive integer or None"),
        ("learning_rate", 0, "a positive number"),
        ("learning_rate", float("nan"), "a positive number"),
        ("learning_rate", "1e-4", "a positive number"),
        ("weight_decay", -0.1, "a non-negative number"),
        ("warmup_ratio", 1.0, "a number from 0 to below 1"),
        ("validation_split", 1, "a number from 0 to below 1"),
        ("gradient_clip_norm", 0, "a positive number or None"),
        ("random_seed", -1, "an integer from 0"),
        ("use_amp", "yes", "True or False"),
        ("mixed_precision", "fp8", "'no', 'bf16' or 'fp16' or None"),
        ("early_stopping_patience", 0, "a positive integer or None"),
        ("output_dir", "", "a non-empty string or None"),
        ("log_with", 3, "the name of a tracker"),
    ],
)
def test_an_error_names_the_values_that_are_allowed(name: str, value: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=f"`{name}` must be {words}"):
        parse_settings({name: value})


@pytest.mark.parametrize(
    ("word", "value"), [("no", False), ("off", False), ("True", True), ("yes", True), ("100", 100)]
)
def test_audit_takes_the_words_of_flags(word: str, value: Any) -> None:
    assert parse_settings({"audit": word})[1].audit == value


def test_one_error_reports_all_faults() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({"batch_size": 0, "learning_rate": -1, "use_amp": 1})
    assert len(caught.value.faults) == 3
    assert all(f"`{name}`" in str(caught.value) for name in ("batch_size", "learning_rate", "use_amp"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use_amp": True, "mixed_precision": "no"}, "`use_amp` is True, but `mixed_precision` is 'no'"),
        ({"use_wandb": True, "log_with": "tensorboard"}, "`use_wandb` is True, but `log_with` is 'tensorboard'"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "Set only one of the two"),
        ({"planner": False, "planner_costs": [1, 1, 0]}, "`planner_costs` is given, but `planner` is False"),
        ({"batch_size": "auto"}, "but the size of an update is not set"),
        (
            {"batch_size": "auto", "effective_batch_size": 8, "max_tokens": 99},
            "`max_tokens` is 99, which limits micro-batches by tokens, not rows",
        ),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_settings(given)


def test_an_error_can_be_sent_to_another_process() -> None:
    again = pickle.loads(pickle.dumps(SettingsError(["one", "two"])))
    assert (again.faults, str(again)) == (("one", "two"), "one\ntwo")


def test_a_setting_that_is_left_out_takes_its_default() -> None:
    assert parse_settings({"batch_size": 8}) == (Recipe(), Runtime(batch_size=8))


def test_numpy_numbers_and_paths_are_accepted() -> None:
    recipe, runtime = parse_settings(
        {"learning_rate": np.float64(1e-3), "batch_size": np.int64(8), "output_dir": Path("out")}
    )
    assert (recipe.learning_rate, runtime.batch_size, runtime.output_dir) == (1e-3, 8, "out")


def test_plan_checks_its_arguments_too() -> None:
    with pytest.raises(SettingsError, match="`gradient_accumulation_steps` must be a positive integer"):
        plan(10, gradient_accumulation_steps=0)
    with pytest.raises(SettingsError, match="`n_rows` must be a positive integer"):
        plan(0)
    with pytest.raises(SettingsError, match="`num_processes` must be a positive integer"):
        plan(10, num_processes=0)
    with pytest.raises(SettingsError, match="`tokens_per_update` needs `tokens_per_row`"):
        plan(10, tokens_per_update=100)
