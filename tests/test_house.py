"""The house: what may import what, what starts without torch, and which names are public."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ftaccum

SOURCE = Path(ftaccum.__file__).parent

# A room may import only from rooms in the lines above its own.
FLOORS = [
    ["errors"],
    ["files"],
    ["rules"],
    ["settings", "mappings"],
    ["cutting"],
    ["planning"],
    ["history"],
    ["flags"],
    # from here on with torch
    ["side_effects", "metrics"],
    ["rehearsing"],
    ["objective"],
    ["data"],
    ["optim", "calibration", "embedding_gradients", "memory"],
    ["wide_gradients", "divergence"],
    ["loop", "adapting", "physical_batch"],
    ["evaluation"],
    ["trackers"],
    ["interrupts", "session", "others", "borrowing", "reading", "recording", "screen", "selection"],
    ["parts", "watching"],
    ["assembly"],
    ["arranging"],
    ["checkpointing", "outputs"],
    ["training"],
    ["preparing"],
    ["running"],
    ["fine_tuning"],
    ["search_settings", "verify_settings"],
    ["tuning", "verification"],
    ["sources"],
    ["cli"],
    ["__init__", "__main__"],
]
WITHOUT_TORCH = [
    "errors",
    "files",
    "rules",
    "settings",
    "mappings",
    "cutting",
    "planning",
    "history",
    "flags",
    "search_settings",
    "verify_settings",
    "cli",
]


def rooms() -> dict[str, list[Path]]:
    return {
        path.stem: [path] if path.is_file() else sorted(path.glob("*.py"))
        for path in sorted(SOURCE.iterdir())
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }


def imported_rooms(file: Path) -> set[str]:
    """Rooms that a file imports, at its top or anywhere else."""
    found = set()
    depth = len(file.relative_to(SOURCE).parts)  # 1 for a room that is a file, 2 inside a folder
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found & rooms().keys()


def test_every_room_has_a_floor() -> None:
    assert sorted(room for floor in FLOORS for room in floor) == sorted(rooms())


def test_no_import_points_upwards_or_in_a_circle() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upward = [
        f"{room} imports {other}"
        for room, files in rooms().items()
        for file in files
        for other in imported_rooms(file)
        if floor_of[other] >= floor_of[room]
    ]
    assert upward == []


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_room_needs_no_torch(room: str) -> None:
    code = f"import ftaccum.{room}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_planning_on_the_command_line_needs_no_torch() -> None:
    code = (
        "import sys; from ftaccum.cli import main\n"
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
