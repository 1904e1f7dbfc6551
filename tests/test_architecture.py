"""The architecture: what loads without torch, and which names are public. (`lint-imports` checks the layers.)"""

import inspect
import subprocess
import sys

import pytest

import ftaccum

WITHOUT_TORCH = [
    "apps.cli",
    "apps.parser",
    "apps.plan",
    "apps.search.settings",
    "apps.verify.settings",
    "apps.yaml",
    "errors",
    "fields",
    "planning.micro_batches",
    "planning.plan",
    "planning.stream_plan",
    "runtime.atomic_files",
    "settings",
    "tracking.ledger",
    "tracking.result",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_loads_without_torch(module: str) -> None:
    code = f"import ftaccum.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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
        "CheckpointError",
        "ClassificationMetrics",
        "DataError",
        "DivergedError",
        "InexactLossError",
        "InexactLossWarning",
        "LostProcessError",
        "MeanSquaredError",
        "MetricsError",
        "OutputWarning",
        "PaddingWarning",
        "Plan",
        "Preempted",
        "Result",
        "SettingsError",
        "Verification",
        "plan",
        "search",
        "test_fine_tuning",
        "verify",
    ]
    for name in ftaccum.__all__:
        found = getattr(ftaccum, name)
        assert inspect.isclass(found) or inspect.isfunction(found), f"{name} is no class and no function"
        assert found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ftaccum.nothing


def test_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(ftaccum.test_fine_tuning).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == {"model": inspect.Parameter.empty, "config": None, "train_data": None, "val_data": None}
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        "validation_split": 0.1,
        "n_epochs": 3,
        "max_updates": None,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "effective_batch_size": None,
        "tokens_per_update": None,
        "remainder": "flush",
        "max_tokens": None,
        "planner": True,
        "planner_costs": None,
        "padding_free": False,
        "learning_rate": 5e-5,
        "learning_rate_scaling": "none",
        "weight_decay": 0.01,
        "optimizer": None,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "gradient_clip_norm": 1.0,
        "use_amp": False,
        "mixed_precision": None,
        "accumulate_in_fp32": False,
        "gradient_checkpointing": False,
        "compile": False,
        "num_workers": 0,
        "tokenizer": None,
        "data_collator": None,
        "loss_fn": None,
        "reduction": "mean",
        "count_items": None,
        "compute_metrics": None,
        "early_stopping_patience": None,
        "restore_best_weights": False,
        "random_seed": 42,
        "on_inexact": "warn",
        "on_nonfinite": "skip",
        "nonfinite_patience": 25,
        "deterministic": False,
        "output_dir": None,
        "checkpoint_every": "15min",
        "keep_checkpoints": 2,
        "resume": None,
        "allow_changed": (),
        "log_with": None,
        "use_wandb": False,
        "progress": True,
    }


def test_every_argument_is_documented_and_has_the_default_of_its_setting() -> None:
    from ftaccum.settings import Recipe, Runtime

    parameters = inspect.signature(ftaccum.test_fine_tuning).parameters
    for name in parameters:
        assert f"        {name}: " in (ftaccum.test_fine_tuning.__doc__ or "")
    for settings in (Recipe(), Runtime()):
        for name, default in vars(settings).items():
            assert parameters[name].default == default


def test_pytest_does_not_collect_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from ftaccum import test_fine_tuning\ndef test_of_the_user(): pass\n")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
