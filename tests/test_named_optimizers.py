"""Optimizers by name: their updates, their options, resuming, a search over them, and what is refused."""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from transformers import BertConfig, BertForSequenceClassification

from ftaccum import Result, SettingsError, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.arguments import parse_settings
from ftaccum.checkpoint.manager import CheckpointManager
from ftaccum.rules.optimization import OPTIMIZERS
from ftaccum.settings.recipe import Recipe
from ftaccum.training.named_optimizers import NAMED
from ftaccum.training.optimizer import make_optimizer
from searching import quick
from silent_errors.rates import distance, train_plainly
from slow_parameters import some_slow

RATE, DECAY, N_ROWS = 1e-2, 0.1, 8
Optimizers = Callable[["Regression"], list[Optimizer]]


class Regression(nn.Module):
    """A regression with a base model and a head. One of its matrices has the 4096 weights that 8 bits need."""

    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 2)

    def forward(self, inputs_BD: Tensor) -> Tensor:
        return self.head(self.base(inputs_BD))


def regression(dtype: torch.dtype = torch.float64) -> tuple[Regression, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return Regression().to(dtype), [(torch.randn(5, dtype=dtype), torch.randn(2, dtype=dtype)) for _ in range(N_ROWS)]


def train(model: nn.Module, rows: Any, **arguments: Any) -> Result:
    """Train for three updates of all rows, in micro-batches of three."""
    defaults: dict[str, Any] = {
        "loss_fn": nn.MSELoss(), "batch_size": 3, "effective_batch_size": N_ROWS, "n_epochs": 3,
        "validation_split": 0.0, "learning_rate": RATE, "weight_decay": DECAY, "lr_scheduler": "constant",
        "gradient_clip_norm": None, "progress": False,
    }  # fmt: skip
    return test_fine_tuning(model, train_data=rows, **defaults | arguments)


def both(*parameters: nn.Parameter) -> list[dict[str, Any]]:
    """Return a group of matrices, with weight decay, and one of biases, without."""
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "lr": RATE, "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "lr": RATE, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def of_class(kind: Any, **options: Any) -> Optimizers:
    return lambda model: [kind(both(*model.parameters()), **options)]


def of_library(module: str, kind: str) -> Optimizers:
    return lambda model: [getattr(importlib.import_module(module), kind)(both(*model.parameters()))]


def muon(**options: Any) -> Optimizers:
    def make(model: Regression) -> list[Optimizer]:
        hidden = [model.base[0].weight, model.base[2].weight]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
        scaled = Muon(hidden, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        return [scaled, AdamW(both(*others), **options)]

    return make


PLAIN = {
    "adamw": of_class(AdamW),
    "sgd": of_class(SGD),
    "adafactor": of_class(Adafactor),
    "lion": of_library("lion_pytorch", "Lion"),
    "muon": muon(),
    "adamw_8bit": of_library("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": of_library("bitsandbytes.optim", "PagedAdamW8bit"),
    "schedule_free_adamw": of_library("schedulefree", "AdamWScheduleFree"),
}
# 8-bit optimizers compute in float32.
TOLERANCES = dict.fromkeys(("adamw_8bit", "paged_adamw_8bit"), 1e-5)
on_cpu = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


class Several(Optimizer):
    """Optimizers that step one after the other."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        for optimizer in self._optimizers:
            optimizer.step(closure)


def error_of(plain: Optimizers, **arguments: Any) -> float:
    """Return the distance of a run with an optimizer by name from plain PyTorch, relative to the reference's way."""
    model, rows = regression()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = plain(reference)
    switched: list[Any] = [optimizer for optimizer in optimizers if hasattr(optimizer, "train")]
    for optimizer in switched:
        optimizer.train()
    train_plainly(reference, rows, Several(optimizers))
    for optimizer in switched:
        optimizer.eval()
    train(model, rows, **arguments)
    return distance(model, reference, start)


def test_every_name_is_known_and_tested() -> None:
    assert tuple(NAMED) == tuple(PLAIN) == OPTIMIZERS


@on_cpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_named_optimizer_updates_as_in_plain_pytorch(name: str) -> None:
    if NAMED[name].module:
        pytest.importorskip(NAMED[name].module)
    assert error_of(PLAIN[name], optimizer=name) < TOLERANCES.get(name, 1e-9)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("adamw", of_class(AdamW, betas=(0.8, 0.95))),
        (None, of_class(AdamW, betas=(0.8, 0.95))),
        ("muon", muon(betas=(0.8, 0.95))),
    ],
)
def test_betas_are_those_of_the_settings(name: str | None, plain: Optimizers) -> None:
    assert error_of(plain, optimizer=name, adam_beta1=0.8, adam_beta2=0.95) < 1e-9
    assert error_of(plain, optimizer=name, adam_beta1=0.8) > 1e-3


@on_cpu
@pytest.mark.parametrize("name", some_slow(OPTIMIZERS, ["muon", "schedule_free_adamw", "adamw_8bit"]))
def test_a_run_with_a_named_optimizer_resumes_to_the_last_bit(tmp_path: Path, name: str) -> None:
    if NAMED[name].module:
        pytest.importorskip(NAMED[name].module)
    arguments: dict[str, Any] = {"optimizer": name, "lr_scheduler": "cosine", "n_epochs": 5}
    whole, rows = regression(torch.float32)
    with patch.object(CheckpointManager, "finish"):  # keep all checkpoints
        train(whole, rows, output_dir=str(tmp_path), checkpoint_every=1, keep_checkpoints=9, **arguments)
    again, _ = regression(torch.float32)
    train(again, rows, resume=str(tmp_path / "checkpoints" / "update-00000002-epoch-0002"), **arguments)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_muon_saves_and_loads_the_state_of_both_optimizers() -> None:
    model, _ = regression()
    one = make_optimizer(model, None, Recipe(optimizer="muon"), ())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    one.step()
    other: Any = make_optimizer(model, None, Recipe(optimizer="muon", learning_rate=1.0), ())
    other.load_state_dict(one.state_dict())
    assert {frozenset(state) for state in other.state.values()} == {
        frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})
    }  # fmt: skip
    for group in other.param_groups:
        group["lr"] *= 2
    before = [p.detach().clone() for p in model.parameters()]
    other.step()
    assert [group["lr"] for group in other.param_groups] == [1e-4] * 3
    moved = [float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(0 < distance < 1e-3 for distance in moved)  # of the loaded rates, doubled, not of 1.0
    assert all(state["step"] == 2 for state in other.state.values() if "step" in state)


def test_muon_leaves_embeddings_and_heads_to_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = make_optimizer(model, None, Recipe(optimizer="muon"), ())
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    layer = "bert.encoder.layer.0"
    assert found == {
        *(f"{layer}.attention.self.{name}.weight" for name in ("query", "key", "value")),
        f"{layer}.attention.output.dense.weight", f"{layer}.intermediate.dense.weight", f"{layer}.output.dense.weight",
        "bert.pooler.dense.weight",
    }  # fmt: skip
    rows = [{"input_ids": [1, 2, 3], "label": 0}, {"input_ids": [4, 5], "label": 1}]
    test_fine_tuning(model, train_data=rows, optimizer="muon", n_epochs=1, validation_split=0.0, progress=False)
    shown = capsys.readouterr().out
    assert "Optimizer: MuonWithAdamW, learning rate 5e-05, weight decay 0.01 and 0" in shown
    assert "Parameter groups (3):\n" in shown
    assert "  hidden matrices (Muon): 512 parameters, learning rate 5e-05, weight decay 0.01\n" in shown


def test_muon_without_a_hidden_matrix_is_refused() -> None:
    model, _ = regression()
    model.base.requires_grad_(False)
    with pytest.raises(SettingsError, match=r"'muon', which updates hidden matrices, but Regression has no trainable"):
        make_optimizer(model, None, Recipe(optimizer="muon"), ())


def test_the_banner_names_an_optimizer_that_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = regression()
    train(model, rows, optimizer="schedule_free_adamw", lr_scheduler="linear")
    shown = capsys.readouterr().out
    assert "Optimizer: AdamWScheduleFree, learning rate 0.01, weight decay 0.1 and 0\n" in shown
    assert "Note: a schedule-free optimizer is meant for `lr_scheduler='constant'`" in shown
    assert "Parameter groups" not in shown
    train(model, rows)
    assert "Optimizer:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("adamW", "adamw"), ("adam", "adamw"), ("adamw_torch_fused", "adamw"), ("adamw_bnb_8bit", "adamw_8bit"),
     ("schedule-free-adamw", "schedule_free_adamw"), ("muom", "muon")],
)  # fmt: skip
def test_a_name_that_is_unknown_is_answered_with_the_nearest_one(wrong: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=rf"`optimizer` must be 'adamw', .* but is '{wrong}' instead\. Did you "
                       rf"mean '{meant}'\? It means"):  # fmt: skip
        parse_settings({"optimizer": wrong})
    with pytest.raises(SettingsError) as caught:
        parse_settings({"optimizer": "zzz"})
    assert "Did you mean" not in str(caught.value)


def test_a_missing_library_is_reported_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    arguments = ["train", "--model", "none", "--train_data", "none.csv", "--optimizer", "lion"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "ftaccum train: `optimizer` is 'lion', which needs the package lion-pytorch. Install it with "
        "`pip install lion-pytorch`, or with `pip install 'ftaccum[optimizers]'`.\n"
    )
    model, rows = regression()
    with pytest.raises(SettingsError, match="needs the package lion-pytorch"):
        train(model, rows, optimizer="lion")


def test_a_broken_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "schedulefree.py").write_text("raise OSError('libcuda.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "schedulefree", raising=False)
    model, rows = regression()
    with pytest.raises(SettingsError, match=r"its package schedulefree cannot be imported: libcuda\.so is missing"):
        train(model, rows, optimizer="schedule_free_adamw")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer": "sgd", "adam_beta1": 0.8}, "`adam_beta1` is 0.8, but 'sgd' has no betas"),
        ({"optimizer": "adafactor", "adam_beta2": 0.9}, "`adam_beta2` is 0.9, but 'adafactor' has no betas"),
        ({"optimizer": SGD, "adam_beta1": 0.8}, "`adam_beta1` is 0.8, but `optimizer` is not a name"),
        ({"optimizer": "schedule_free_adamw", "adam_beta1": 0.0}, "'schedule_free_adamw' divides by it"),
        ({"adam_beta2": 1.0}, "`adam_beta2` must be a number from 0 to below 1 or None"),
        ({"optimizer": ""}, "`optimizer` must be 'adamw'"),
    ],
)
def test_options_that_an_optimizer_does_not_have_are_refused(arguments: dict[str, Any], words: str) -> None:
    model, rows = regression()
    with pytest.raises(SettingsError, match=words):
        train(model, rows, **arguments)


def test_a_run_does_not_resume_with_another_optimizer_or_another_beta(tmp_path: Path) -> None:
    model, rows = regression()
    train(model, rows, optimizer="lion", output_dir=str(tmp_path))
    assert '"optimizer": "lion"' in (tmp_path / "run.json").read_text()
    for changed, words in (
        ({"optimizer": "muon"}, "`optimizer` was 'lion', but is 'muon'"),
        ({"optimizer": "lion", "adam_beta1": 0.8}, "`adam_beta1` was None, but is 0.8"),
    ):
        with pytest.raises(SettingsError, match=words):
            train(model, rows, output_dir=str(tmp_path), resume="auto", **changed)


def test_a_run_that_resumes_with_other_groups_starts_with_a_fresh_optimizer(tmp_path: Path) -> None:
    model, rows = regression()
    arguments: dict[str, Any] = {"output_dir": str(tmp_path)}
    train(model, rows, optimizer_groups={"base.0": {"lr": 0.1}}, **arguments)
    arguments |= {"resume": "auto", "n_epochs": 4, "allow_changed": ["optimizer_groups", "n_epochs"]}
    result = train(model, rows, optimizer_groups={"base.2": {"lr": 0.1}}, **arguments)
    assert len(result.loss_history) == 4


def test_a_search_varies_the_optimizer() -> None:
    study = quick(
        space={"optimizer": CategoricalDistribution(["sgd", "lion"])}, accumulation_steps=(1,), n_epochs=1, n_trials=4,
        sampler="random",
    )  # fmt: skip
    assert {trial.params["optimizer"] for trial in study.trials} == {"sgd", "lion"}
    with pytest.raises(SettingsError, match=r"`optimizer` must be 'adamw', .* but is 'lyon' instead\. Did you mean"):
        quick(space={"optimizer": CategoricalDistribution(["sgd", "lyon"])})
    with pytest.raises(SettingsError, match=r"`adam_beta1` is 0\.8, but 'sgd' has no betas"):
        quick(space={"optimizer": CategoricalDistribution(["lion", "sgd"])}, adam_beta1=0.8)


@pytest.mark.slow
def test_a_search_with_a_function_continues_with_it_and_not_with_a_name(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "accumulation_steps": (1,), "n_epochs": 1, "n_trials": 1,
        "optimizer_groups": {"weight": {"lr": 0.1}},
    }  # fmt: skip
    for _ in range(2):
        assert len(quick(optimizer=SGD, **arguments).trials) == 1
    with pytest.raises(SettingsError, match=r"was created with `optimizer` None, and this search has 'lion'"):
        quick(optimizer="lion", **arguments)


def test_a_search_couples_the_beta2_of_a_named_optimizer() -> None:
    study = quick(
        couple_beta2=True, optimizer="muon", adam_beta2=0.99, accumulation_steps=(2,), n_epochs=1, n_trials=3,
        pruner="none",
    )  # fmt: skip
    assert {t.params["gradient_accumulation_steps"] for t in study.trials} == {1, 2}
    for trial in study.trials:
        k = trial.params["gradient_accumulation_steps"]
        assert trial.user_attrs["beta2"] == pytest.approx(0.99**k)
