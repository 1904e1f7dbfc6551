"""Launch files that ask for FSDP or other parallelism: what a run takes from them, and what it refuses."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule

from ftaccum import SettingsError, verify
from ftaccum.apps.run_arguments import default_arguments
from ftaccum.apps.search.trial import train_new_model
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.sharding.launcher import find_sharding, hidden_modes, sharding_notes
from ftaccum.runtime.sharding.options import ShardingOptions
from ftaccum.settings.runtime import Runtime
from ftaccum.tasks.arguments import ModelArguments
from ftaccum.tasks.model_source import ModelSource
from ftaccum.training.base_run import Run
from ftaccum.training.callbacks import Callback
from ftaccum.training.config import RunConfig
from heads import HEADS

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "accelerate"
HEAD = HEADS["sequence classification, BERT"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
PARALLELISM = {**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
METHODS = ("reset_iter_state", "set_reduce_scatter_unused_params")


@pytest.fixture(autouse=True)
def _a_new_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in METHODS:
        monkeypatch.setattr(FSDPModule, name, None, raising=False)


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name in os.environ.keys() | variables.keys():
        if name in variables:
            monkeypatch.setenv(name, variables[name])
        elif name.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(name)


def launched_environment(file: Path, *options: str) -> tuple[dict[str, str], int]:
    """Return the environment that `accelerate launch` gives to a script, and the number of processes."""
    words = ["--config_file", str(file), "--main_process_port", "0", *options, "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return prepare_multi_gpu_env(arguments), int(arguments.num_processes)


def refusal(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], n: int = 2, **settings: Any) -> str:
    set_environment(monkeypatch, variables)
    with pytest.raises(SettingsError) as raised:
        find_sharding(Runtime(**settings), n)
    (fault,) = raised.value.faults
    return fault


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("ddp_1x8", 8, None),
        ("fsdp2_1x8", 8, ShardingOptions(checkpoints_activations=True)),
        ("fsdp2_2x8", 16, ShardingOptions(checkpoints_activations=True)),
        ("fsdp2_2_cpus", 2, ShardingOptions()),
    ],
)
def test_the_launch_files_of_the_recipes_give_their_options(
    monkeypatch: pytest.MonkeyPatch, name: str, n: int, expected: ShardingOptions | None
) -> None:
    # The second machine does not need the port, which may be in use here.
    machine = ("--machine_rank", "1") if name == "fsdp2_2x8" else ()
    environment, num_processes = launched_environment(RECIPES / f"{name}.yaml", *machine)
    assert num_processes == n
    set_environment(monkeypatch, environment)
    assert find_sharding(Runtime(), n) == expected
    assert sharding_notes(Runtime(), n) == []


def test_every_launch_file_is_tested() -> None:
    text = inspect.getsource(sys.modules[__name__])
    assert [path.stem for path in RECIPES.glob("*.yaml") if f'("{path.stem}", ' not in text] == []


def test_a_users_launch_file_sets_all_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 4\n"
        "mixed_precision: bf16\nfsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: false\n"
        "  fsdp_offload_params: true\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
        "  fsdp_transformer_layer_cls_to_wrap: BertLayer, BertEmbeddings\n  fsdp_activation_checkpointing: true\n"
        "  fsdp_state_dict_type: SHARDED_STATE_DICT\n  fsdp_backward_prefetch: BACKWARD_PRE\n"
    )
    set_environment(monkeypatch, launched_environment(file)[0])
    assert find_sharding(Runtime(sync="last"), 4) == ShardingOptions(
        reshard_after_forward=False,
        cpu_offload=True,
        block_classes=("BertLayer", "BertEmbeddings"),
        syncs_each_pass=False,
        checkpoints_activations=True,
    )
    assert capsys.readouterr().err == ""  # Accelerate does not log the options that the notes name
    assert sharding_notes(Runtime(), 4) == [
        "These options of FSDP have no effect: `fsdp_backward_prefetch`, `fsdp_state_dict_type`"
    ]


@pytest.mark.parametrize(
    ("variable", "value", "option"),
    [
        ("FORWARD_PREFETCH", "true", "forward_prefetch"),
        ("USE_ORIG_PARAMS", "false", "use_orig_params"),
        ("SYNC_MODULE_STATES", "false", "sync_module_states"),
        ("SHARDING_STRATEGY", "HYBRID_SHARD", "sharding_strategy"),
        ("IGNORED_MODULES", ".*norm", "ignored_modules"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "min_num_params"),
    ],
)
def test_an_option_without_effect_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, option: str
) -> None:
    set_environment(monkeypatch, FSDP2 | {f"FSDP_{variable}": value})
    assert find_sharding(Runtime(), 2) == ShardingOptions()
    assert sharding_notes(Runtime(), 2) == [f"These options of FSDP have no effect: `fsdp_{option}`"]


@pytest.mark.parametrize("launcher", [{}, FSDP1, FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}])
def test_the_setting_shards_with_any_launcher(monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]) -> None:
    set_environment(monkeypatch, launcher)
    runtime = Runtime(sharding="fsdp2")
    keeps = launcher.get("FSDP_RESHARD_AFTER_FORWARD") == "false"
    assert find_sharding(runtime, 2) == ShardingOptions(reshard_after_forward=not keeps)
    expected = ["`sharding` is 'fsdp2', so the launcher's options of FSDP version 1 have no effect"]
    assert sharding_notes(runtime, 2) == (expected if launcher == FSDP1 else [])


def test_without_a_setting_and_a_launch_file_nothing_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {})
    assert find_sharding(Runtime(), 2) is None
    assert sharding_notes(Runtime(), 2) == []


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ({}, ""),
        (FSDP1, "FSDP"),
        (FSDP2 | {"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP and DeepSpeed"),
        (PARALLELISM | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "FSDP"),
    ],
)
def test_off_shards_nothing_whatever_the_launcher_asks(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], names: str
) -> None:
    set_environment(monkeypatch, launcher)
    runtime = Runtime(sharding="off")
    assert find_sharding(runtime, 2) is None
    note = f"`sharding` is 'off': each process trains a whole copy, without the launcher's {names}"
    assert sharding_notes(runtime, 2) == ([note] if names else [])


@pytest.mark.parametrize(
    ("launcher", "settings", "asks"),
    [
        ({}, {"sharding": "fsdp2"}, "`sharding` is 'fsdp2'"),
        (FSDP2, {}, "The launcher asks for FSDP (`distributed_type: FSDP`)"),
        (FSDP1, {}, "The launcher asks for FSDP (`distributed_type: FSDP`)"),
    ],
)
def test_one_process_trains_a_whole_model_and_says_so(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], settings: dict[str, str], asks: str
) -> None:
    set_environment(monkeypatch, launcher)
    runtime = Runtime(**settings)  # type: ignore[arg-type]
    assert find_sharding(runtime, 1) is None
    assert sharding_notes(runtime, 1) == [f"{asks}, but there is only one process, so nothing is sharded"]


@pytest.mark.parametrize("launcher", [FSDP1, {"ACCELERATE_USE_FSDP": "true"}])
def test_version_1_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]) -> None:
    message = refusal(monkeypatch, launcher)
    assert message.startswith(
        "The launcher asks for FSDP with `fsdp_version: 1` (1 is the default), but ftaccum shards"
    )
    assert "Write `fsdp_version: 2` into the config file of `accelerate launch` (`accelerate to-fsdp2`" in message


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")]
)
@pytest.mark.parametrize("n", [1, 2])
def test_other_engines_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, name: str, n: int) -> None:
    for settings in ({}, {"sharding": "fsdp2"}):
        message = refusal(monkeypatch, {variable: "true"}, n, **settings)
        assert message.startswith(f"The launcher asks for {name}, which ftaccum does not support. To shard the model, ")
        assert "write `distributed_type: FSDP` and `fsdp_version: 2`" in message


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"TP": 2}, "`parallelism_config_tp_size` is 2, but ftaccum does not support tensor parallelism. Set it to 1"),
        ({"CP": 4}, "`parallelism_config_cp_size` is 4, but ftaccum does not support context parallelism. Set it to 1"),
        ({"DP_REPLICATE": 2, "DP_SHARD": 2}, "`parallelism_config_dp_replicate_size` is 2, but ftaccum does not supp"),
        ({"DP_SHARD": 2}, "`parallelism_config_dp_shard_size` is 2, but there are 4 processes, and ftaccum shards ove"),
        ({"TP": 0}, "Accelerate does not accept the launcher's `parallelism_config`: tp_size must be at least 1"),
    ],
)
def test_other_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], expected: str) -> None:
    variables = {f"PARALLELISM_CONFIG_{name}_SIZE": str(size) for name, size in sizes.items()}
    assert refusal(monkeypatch, PARALLELISM | variables, 4).startswith(expected)


@pytest.mark.skipif(not hasattr(accelerate.ParallelismConfig, "sp_enabled"), reason="this version has none")
def test_sequence_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, PARALLELISM | {"PARALLELISM_CONFIG_SP_SIZE": "4"}, 4)
    assert "`parallelism_config_sp_size` is 4, but ftaccum does not support sequence parallelism" in message


@pytest.mark.parametrize("size", ["1", "4"])
def test_a_parallelism_config_over_all_processes_shards(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    set_environment(monkeypatch, PARALLELISM | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": size})
    assert find_sharding(Runtime(), 4) == ShardingOptions()


@pytest.mark.parametrize("variable", [{"RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {"STATE_DICT_TYPE": "UNKNOWN"}])
def test_options_that_accelerate_refuses_are_a_settings_error(
    monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    message = refusal(monkeypatch, FSDP2 | {f"FSDP_{name}": value for name, value in variable.items()})
    assert message.startswith("Accelerate does not accept the launcher's options of FSDP: ")
    assert message.endswith("Correct `fsdp_config` in the config file of `accelerate launch`.")


@pytest.mark.parametrize("missing", METHODS)
def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delattr(FSDPModule, missing)
    expected = f", which needs torch 2.13, but {re.escape(torch.__version__)} is installed. Update torch, or set `shard"
    assert re.match("`sharding` is 'fsdp2'" + expected, refusal(monkeypatch, {}, sharding="fsdp2"))
    assert re.match(r"The launcher asks for FSDP \(.*\)" + expected, refusal(monkeypatch, FSDP2))


def test_accelerate_does_not_see_what_the_launcher_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
    set_environment(monkeypatch, dict.fromkeys((f"ACCELERATE_USE_{name}" for name in engines), "true"))
    before = dict(os.environ)
    with accelerator_session(Runtime(), 0, None) as accelerator:
        assert AcceleratorState._shared_state.get("fsdp_plugin") is None
        assert accelerator.state.deepspeed_plugins is None
        assert accelerator.parallelism_config is None
        assert dict(os.environ) == before
    with pytest.raises(KeyError), hidden_modes():
        os.environ["ACCELERATE_USE_FSDP"]
    assert dict(os.environ) == before


def test_an_accelerator_of_the_user_under_fsdp_does_not_change_a_run() -> None:
    state = PartialState(cpu=True)
    before = state.distributed_type
    state.distributed_type = DistributedType.FSDP  # as an Accelerator sets it on GPUs
    try:
        with accelerator_session(Runtime(), 0, None) as accelerator:
            assert accelerator.distributed_type == DistributedType.MULTI_CPU
        assert PartialState().distributed_type == DistributedType.FSDP
    finally:
        state.distributed_type = before
    assert AcceleratorState._shared_state == {}


class ShardingRun(Run):
    can_shard = True


def start(**settings: Any) -> None:
    """Start a run that shards nothing, and end it before its data are read."""
    arguments = default_arguments() | {"model": HEAD.model(), "train_data": HEAD.rows(4)}
    with ShardingRun(RunConfig.from_arguments(arguments | settings)) as run:
        assert run.sharding is None


def test_a_run_logs_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    set_environment(monkeypatch, {})
    start(sharding="fsdp2")
    assert "`sharding` is 'fsdp2', but there is only one process, so nothing is sharded\n" in capsys.readouterr().err


def test_a_run_under_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(SettingsError, match="The launcher asks for DeepSpeed, which ftaccum does not support"):
        start()
    start(sharding="off")


def test_a_run_checks_what_it_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, FSDP2)
    monkeypatch.setattr("ftaccum.training.base_run.find_sharding", lambda runtime, _: find_sharding(runtime, 2))
    with pytest.raises(SettingsError, match="the adapters of a sharded model cannot be merged"):
        start(lora=True, save="merged")


def test_models_are_loaded_as_without_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, FSDP2)
    seen: list[str | None] = []

    def load(*_: Any, **__: Any) -> None:
        seen.append(os.environ.get("ACCELERATE_USE_FSDP"))
        raise ValueError("seen")

    with pytest.raises(SettingsError, match="seen"):
        ModelSource(ModelArguments("folder"), SimpleNamespace(from_pretrained=load), None).load_model(None)
    with pytest.raises(ValueError, match="seen"):
        train_new_model(load, {"random_seed": 1}, Callback())
    assert seen == [None, None]
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_verify_is_refused_when_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, FSDP2)
    monkeypatch.setattr("ftaccum.training.base_run.find_sharding", lambda runtime, _: find_sharding(runtime, 2))
    with pytest.raises(SettingsError, match="asks for FSDP, but `verify` measures a whole model on each"):
        verify(HEAD.model(), HEAD.rows(4), progress=False)


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        (FSDP1, {}),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}),
        (PARALLELISM | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}),
        (PARALLELISM | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, {}),
        ({}, {"sharding": "fsdp2"}),
    ],
)
def test_the_page_on_launching_quotes_the_messages(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], settings: dict[str, str]
) -> None:
    if settings:
        monkeypatch.delattr(FSDPModule, METHODS[0])
        monkeypatch.setattr(torch, "__version__", "2.9.0")
    page = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    assert f"| {refusal(monkeypatch, launcher, 8, **settings)} |" in page


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("version", ["2", "1"])
def test_two_cpu_processes_under_a_launch_file(tmp_path: Path, version: str) -> None:
    file, config = tmp_path / "fsdp.yaml", (RECIPES / "fsdp2_2_cpus.yaml").read_text()
    file.write_text(config.replace("fsdp_version: 2", f"fsdp_version: {version}").replace(": false", ": true"))
    script = Path(__file__).parent / "processes" / "launched_sharding_of_two.py"
    command = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    found = re.findall(r"^found: (.*)", done.stdout, re.MULTILINE)
    needs_newer = not all(hasattr(FSDPModule, name) for name in METHODS)
    expected = "refused, `fsdp_version: 1`" if version == "1" else f"{ShardingOptions()}"
    assert needs_newer or found == [f"MULTI_CPU gloo 2, whole weights, {expected}"] * 2, said
