"""The architecture: what loads without torch, and which names are public. (`lint-imports` checks the layers.)"""

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ftaccum

WITHOUT_TORCH = [
    "apps.advise.noise",
    "apps.advise.statistics",
    "apps.cli",
    "apps.options",
    "apps.parser",
    "apps.plan",
    "apps.report",
    "apps.search.settings",
    "apps.verify.settings",
    "apps.yaml",
    "errors",
    "fields",
    "insight.model_card",
    "insight.run_report",
    "insight.noise_scale",
    "planning.halves",
    "planning.micro_batches",
    "planning.plan",
    "planning.stream_plan",
    "porting.keywords",
    "runtime.atomic_files",
    "settings.recipe",
    "settings.runtime",
    "tasks.arguments",
    "tasks.reading.options",
    "tracking.ledger",
    "tracking.result",
    "tracking.run_reports",
]


def test_modules_load_without_torch() -> None:
    """One process imports all of them, as starting each takes a third of a second."""
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(f'ftaccum.{module}')\n"
        "    if 'torch' in sys.modules: sys.exit(f'{module} loads torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_planning_on_the_command_line_needs_no_torch() -> None:
    code = (
        "import sys; from ftaccum.apps.cli import main\n"
        "assert main(['plan', '--n_rows', '100']) == 0\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit as done: sys.exit(done.code or 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Updates per epoch: 23" in done.stdout


def test_public_names() -> None:
    assert ftaccum.__all__ == [
        "F1",
        "Accuracy",
        "CallbackError",
        "CheckpointError",
        "ClassificationMetrics",
        "DataError",
        "DivergedError",
        "ExactAccumulation",
        "InexactLossError",
        "InexactLossWarning",
        "LossScaleWarning",
        "LostProcessError",
        "MeanSquaredError",
        "MetricsError",
        "ModelAndDataOptions",
        "ModelWrapper",
        "OutputWarning",
        "PaddingWarning",
        "Plan",
        "Preempted",
        "Result",
        "ScriptOptions",
        "SettingsError",
        "TextWarning",
        "UntrainedLossWarning",
        "Verification",
        "callbacks",
        "exact",
        "load_task",
        "losses",
        "plan",
        "run_script",
        "search",
        "test_fine_tuning",
        "tokenize_columns",
        "verify",
    ]
    for name in ftaccum.__all__:
        found = getattr(ftaccum, name)
        kinds = (inspect.isclass, inspect.isfunction, inspect.ismodule)
        assert any(is_kind(found) for is_kind in kinds), f"{name} is no class, function or module"
        assert found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ftaccum.nothing


@pytest.mark.slow
def test_pytest_does_not_collect_the_public_function(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from ftaccum import test_fine_tuning\ndef test_of_the_user(): pass\n")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_the_package_runs_from_a_source_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout has no package metadata, unlike an installation."""
    distribution = importlib.metadata.distribution

    def not_installed(name: str) -> importlib.metadata.Distribution:
        if name == "ftaccum":
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    rows = [(torch.ones(3), n % 2) for n in range(8)]
    arguments: dict[str, Any] = {"loss_fn": nn.CrossEntropyLoss(), "progress": False}
    result = ftaccum.test_fine_tuning(
        nn.Linear(3, 2), train_data=rows, n_epochs=1, output_dir=str(tmp_path), **arguments
    )
    assert result.unwritten == []
    assert ftaccum.verify(nn.Linear(3, 2), rows, **arguments).exact
