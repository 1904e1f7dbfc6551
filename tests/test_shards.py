"""Tensors saved in parts by several processes, and read whole or by another number of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ftaccum import ModelWrapper
from ftaccum.checkpoint.best_weights import BestWeights, weights_of
from ftaccum.checkpoint.compatibility import model_identity
from ftaccum.checkpoint.format import BUFFERS, WEIGHTS
from ftaccum.checkpoint.manifest import damage, seal
from ftaccum.checkpoint.optimizer_state import load_optimizer_state, optimizer_state
from ftaccum.checkpoint.restored_state import StateRestorer
from ftaccum.checkpoint.saved_tensors import SavedTensors, load, local_parts
from ftaccum.checkpoint.serialization import on_host
from ftaccum.checkpoint.shard_index import FOLDER, read_indices
from ftaccum.checkpoint.shards import ShardTaker
from ftaccum.runtime.process_group import lasting_process_group
from ftaccum.runtime.sharding.layout import Layout, leading_values, shard_like
from ftaccum.runtime.sharding.tensors import local_part
from ftaccum.runtime.sharding.whole_weights import _to_gather
from sharding import as_process, needs_sharding, sharded, sharded_model, single_gloo, small_model

WHOLE = {
    "odd": torch.randn(7, 5, dtype=torch.float64),
    "fewer rows than processes": torch.randn(2, 3).bfloat16(),
    "vector": torch.arange(5),
    "one": torch.randn(1, 1),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}
PLAIN = {"number": torch.tensor(3.5), "table": torch.randn(2, 2).half()}


def saved_by(processes: int, folder: Path, checkpoint: str = "a") -> Path:
    """Write the shards of so many processes, one after the other."""
    (folder / FOLDER).mkdir(parents=True)
    for process in range(processes):
        with as_process(process, processes) as mesh:
            shards = ShardTaker(checkpoint, process, processes)
            shards.take("model", {name: sharded(t, mesh) for name, t in WHOLE.items()}, copy=False)
            shards.take("buffers", PLAIN, copy=True)
            shards.shard().write(folder)
    return folder


def in_whole_files(folder: Path) -> Path:
    (folder / WEIGHTS).parent.mkdir(parents=True)
    save_file(WHOLE, folder / WEIGHTS)
    save_file(PLAIN, folder / BUFFERS)
    return folder


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("writers", [0, 1, 3])
def test_any_number_of_processes_reads_its_parts(writers: int, readers: int, tmp_path: Path) -> None:
    folder = saved_by(writers, tmp_path / "it") if writers else in_whole_files(tmp_path / "it")
    saved = SavedTensors(folder)
    for process in range(readers):
        with as_process(process, readers) as mesh:
            own = {name: sharded(torch.zeros_like(t), mesh) for name, t in WHOLE.items()}
            load(own, saved.section("model"))
            for name, tensor in own.items():
                expected = sharded(WHOLE[name], mesh).to_local()
                assert torch.equal(tensor.to_local(), expected), (name, process)
                kept = local_parts({name: tensor}, saved.section("model"))[name]
                assert (kept.dtype, kept.tolist()) == (expected.dtype, expected.tolist())


@pytest.mark.parametrize("writers", [0, 1, 3])
def test_a_single_process_reads_whole_tensors(writers: int, tmp_path: Path) -> None:
    saved = SavedTensors(saved_by(writers, tmp_path / "it") if writers else in_whole_files(tmp_path / "it"))
    own = {name: torch.zeros_like(t) for name, t in (WHOLE | PLAIN).items()}
    load(own, saved.section("model") | saved.section("buffers"))
    assert [name for name, t in own.items() if not torch.equal(t, (WHOLE | PLAIN)[name])] == []
    assert saved.section("best") == {}


def test_only_the_main_process_saves_tensors_that_are_not_sharded(tmp_path: Path) -> None:
    first, second, third = read_indices(saved_by(3, tmp_path / "it"))
    assert {f"buffers/{name}" for name in PLAIN} < first.entries.keys()
    assert second.entries.keys() == third.entries.keys() == {f"model/{name}" for name in WHOLE}


def test_a_reader_opens_slices_and_not_whole_files(tmp_path: Path) -> None:
    saved = SavedTensors(in_whole_files(tmp_path / "it")).section("model")["odd"]
    ((part, (file, name)),) = saved.parts.items()
    taken: list[tuple[slice, ...]] = []

    class Watched:
        def get_tensor(self, _: str) -> Tensor:
            raise AssertionError("the whole tensor was read")

        def get_slice(self, _: str) -> "Watched":
            return self

        def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
            taken.append(slices)
            read: Tensor = file.get_slice(name)[slices]
            return read

    saved.parts[part] = (Watched(), name)
    with as_process(1, 3) as mesh:
        assert torch.equal(saved.read_as(sharded(WHOLE["odd"], mesh)), WHOLE["odd"][3:6])
    assert taken == [(slice(3, 6), slice(0, 5))]


def test_a_saved_tensor_of_another_shape_is_refused_or_skipped(tmp_path: Path) -> None:
    saved = SavedTensors(saved_by(2, tmp_path / "it")).section("model")
    own = {"odd": torch.zeros(7, 4, dtype=torch.float64), "unknown": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"its 'odd' has the shape \[7, 5\] instead of \[7, 4\]"):
        load(own, saved)
    load(own, saved, strict=False)
    assert not own["odd"].any()


def as_checkpoint(folder: Path, shards: int) -> Path:
    for name in ("optimizer.pt", "processes.pt", "state.json", "ledger.jsonl"):
        (folder / name).write_text(name)
    seal(folder, shards)
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder, _: (folder / "shards/1.safetensors").unlink(), "its shards/1.safetensors is missing"),
        (lambda folder, _: (folder / "shards/2.json").unlink(), "its shards/2.json is missing"),
        (
            lambda folder, _: (folder / "shards/1.safetensors").write_bytes(
                (folder / "shards/1.safetensors").read_bytes()[:-1]
            ),
            "its shards/1.safetensors has another size than in its manifest.json",
        ),
        (
            lambda folder, other: shutil.copy(other / "shards/1.safetensors", folder / "shards/1.safetensors"),
            "its shards/1.safetensors has other contents than in its manifest.json",
        ),
        (lambda folder, _: seal(folder, 4), "its manifest.json does not list shards/3.json"),
        (lambda folder, _: seal(folder), "its manifest.json does not list buffers.safetensors"),
    ],
)
def test_a_checkpoint_with_a_damaged_shard_is_damaged(
    harm: Callable[[Path, Path], None], said: str, tmp_path: Path
) -> None:
    folder = as_checkpoint(saved_by(3, tmp_path / "it"), 3)
    assert damage(folder) is None
    harm(folder, saved_by(3, tmp_path / "other", checkpoint="b"))
    assert damage(folder) == said


@pytest.mark.parametrize("names", [["1.safetensors"], ["1.json"], ["1.safetensors", "1.json"]])
def test_a_shard_of_another_checkpoint_is_refused_even_if_it_is_sealed(names: list[str], tmp_path: Path) -> None:
    folder, other = saved_by(2, tmp_path / "it"), saved_by(2, tmp_path / "other", checkpoint="b")
    for name in names:
        shutil.copy(other / FOLDER / name, folder / FOLDER / name)
    with pytest.raises(ValueError, match=rf"its shards/1\.({'json' if '1.json' in names else 'safetensors'}) belongs"):
        SavedTensors(folder).section("model")


def test_a_shard_without_a_part_that_the_others_need_is_refused(tmp_path: Path) -> None:
    folder = saved_by(2, tmp_path / "it")
    index = json.loads((folder / "shards/1.json").read_text())
    del index["entries"]["model/odd"]
    (folder / "shards/1.json").write_text(json.dumps(index))
    saved = SavedTensors(folder).section("model")["odd"]
    with as_process(0, 2) as mesh:
        assert torch.equal(saved.read_as(sharded(WHOLE["odd"], mesh)), WHOLE["odd"][:4])
    with pytest.raises(ValueError, match=r"its shards do not have all of a tensor of shape \[7, 5\]"):
        saved.read()


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    with as_process(0, 1):
        shards = ShardTaker("a", 0, 1)
        one = torch.arange(6.0)
        shards.take("beside", {"one": one, "same": one, "part": one[2:]}, copy=False)
        shards.shard().write(tmp_path)
    assert SavedTensors(tmp_path).section("beside")["part"].read().tolist() == [2, 3, 4, 5]


def updated(model: nn.Module, optimizer: Optimizer) -> None:
    torch.manual_seed(1)
    for _ in range(2):
        model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(parameters: nn.Module) -> list[nn.Parameter]:
    return [p for p in parameters.parameters() if p.requires_grad]


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def stateful(model: nn.Module, optimizer: Optimizer) -> set[str]:
    """Return the names of the weights with state."""
    return {name for name, p in model.named_parameters() if optimizer.state.get(p)}


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, amsgrad=True),
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "SGD in two groups": lambda ps: torch.optim.SGD(
        [{"params": ps[2:], "momentum": 0.5}, {"params": ps[:2]}], lr=0.1, momentum=0.9
    ),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.1),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
}


def written(model: nn.Module, optimizer: Optimizer, folder: Path, *, in_shards: bool) -> dict[str, object]:
    """Save a model and its optimizer, and return the optimizer's state as `optimizer.pt` would have it."""
    if not in_shards:
        (folder / WEIGHTS).parent.mkdir()
        save_file(weights_of(model), folder / WEIGHTS)
        return on_host(optimizer_state(optimizer), copy=True)  # type: ignore[no-any-return]
    (folder / FOLDER).mkdir()
    shards = ShardTaker("a", 0, 1)
    shards.take("model", weights_of(model), copy=True)
    steps = shards.take_nested("steps", optimizer_state(optimizer, names_of(model)), copy=True)
    shards.shard().write(folder)
    return on_host(steps, copy=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("way", ["sharded to sharded", "sharded to whole", "whole to sharded"])
def test_an_optimizer_continues_with_its_state(kind: str, way: str, tmp_path: Path) -> None:
    before, after = way.split(" to ")
    makes = {"sharded": sharded_model, "whole": small_model}
    with single_gloo():
        model = makes[before]()
        optimizer = OPTIMIZERS[kind](trained(model))
        updated(model, optimizer)
        steps = written(model, optimizer, tmp_path, in_shards=before == "sharded")
        updated(model, optimizer)

        again = makes[after]()
        resumed = OPTIMIZERS[kind](trained(again))
        saved = SavedTensors(tmp_path)
        load(weights_of(again), saved.section("model"))
        restorer = StateRestorer(saved, again)
        load_optimizer_state(resumed, steps, own_numbers=False, names=names_of(again), restore=restorer.restore)
        assert stateful(again, resumed) == stateful(model, optimizer)
        assert ("unused" in stateful(again, resumed)) is (kind == "Adagrad")  # which makes its state beforehand
        for p, values in resumed.state.items():
            of_shape = [value for value in values.values() if isinstance(value, Tensor) and value.ndim]
            assert all(isinstance(value, DTensor) is isinstance(p, DTensor) for value in of_shape)
        updated(again, resumed)
        pairs = zip(weights_of(model).values(), weights_of(again).values(), strict=True)
        assert all(torch.equal(local_part(one), local_part(other)) for one, other in pairs)


def test_state_is_saved_by_the_names_of_weights(tmp_path: Path) -> None:
    with single_gloo():
        model = sharded_model()
        optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
        updated(model, optimizer)
        steps = written(model, optimizer, tmp_path, in_shards=True)
        assert "steps/optimizer/state/2.weight/momentum_buffer" in read_indices(tmp_path)[0].entries

        other = sharded_model()
        other.renamed = other.unused
        del other.unused
        restorer = StateRestorer(SavedTensors(tmp_path), other)
        with pytest.raises(ValueError, match="its optimizer trains other weights, such as 'renamed'"):
            load_optimizer_state(
                torch.optim.SGD(trained(other), lr=0.1, momentum=0.9),
                steps, own_numbers=False, names=names_of(other), restore=restorer.restore,
            )  # fmt: skip


def test_state_of_another_shape_than_its_weight_is_restored(tmp_path: Path) -> None:
    """An optimizer may keep factors of a weight's state: split over the processes, or a copy on each."""
    rows, columns = torch.randn(7, 1), torch.randn(5)
    (tmp_path / FOLDER).mkdir()
    for process in range(2):
        with as_process(process, 2) as mesh:
            shards = ShardTaker("a", process, 2)
            copies = Layout((5,), mesh, (None,)).assemble(columns)
            state = {"state": [sharded(rows, mesh), copies, torch.tensor(3.0)]}
            steps = shards.take_nested("steps", state, copy=True)
            shards.shard().write(tmp_path)
    for process in range(3):
        with as_process(process, 3) as mesh:
            weight = nn.Parameter(sharded(WHOLE["odd"], mesh))
            model = nn.Module()
            model.weight = weight
            restorer = StateRestorer(SavedTensors(tmp_path), model)
            by_row, by_column, step = restorer.restore(steps, weight)["state"]
            assert torch.equal(by_row.to_local(), sharded(rows, mesh).to_local())
            assert torch.equal(by_column.to_local(), columns)
            assert (type(step), float(step)) == (Tensor, 3.0)
            of_whole = restorer.restore({"by_column": columns}, weight)["by_column"]
            assert isinstance(of_whole, DTensor)
            assert torch.equal(of_whole.to_local(), columns)


def test_the_best_weights_are_the_own_parts() -> None:
    with as_process(1, 2) as mesh:
        model = nn.Module()
        model.weight = nn.Parameter(sharded(WHOLE["odd"], mesh))
        best = BestWeights(is_kept=True)
        best.keep(model, 3)
        assert best.weights is not None
        assert torch.equal(best.weights["weight"], WHOLE["odd"][4:])
        shards = ShardTaker("a", 0, 1)
        shards.take_parts("best", best.weights, weights_of(model))
        (entry,) = shards.shard().index.entries.values()
        assert (entry.shape, entry.offset, entry.local) == ((7, 5), (4, 0), (3, 5))
        with torch.no_grad():
            model.weight.zero_()
        assert best.restore(model)
        assert torch.equal(model.weight.to_local(), WHOLE["odd"][4:])


@needs_sharding
@pytest.mark.parametrize("adapted", [False, True])
def test_a_sharded_model_has_the_identity_of_the_whole_one(adapted: bool) -> None:
    whole = small_model()
    with single_gloo():
        model = sharded_model()
        if adapted:
            whole.peft_config = model.peft_config = {}
        assert model_identity(model) == model_identity(whole)
        assert model_identity(whole).startswith("Sequential with 57 weights, 50 of them trained (")
        with torch.no_grad():
            model[2].bias[0] += 1  # type: ignore[index]
        assert (model_identity(model) == model_identity(whole)) is not adapted


@needs_sharding
def test_only_the_model_in_a_wrapper_is_gathered_to_be_saved() -> None:
    with single_gloo():
        wrapped = ModelWrapper(sharded_model())
        wrapped.teacher = sharded_model()
        gathered = _to_gather(wrapped, lasting_process_group(1))
        assert {id(p) for p in gathered} == {id(p) for p in wrapped.model.parameters()}


def test_leading_values_are_gathered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []

    def gather(parts: list[object], own: object) -> None:
        sent.append(own)
        parts[:] = sent

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    whole = [WHOLE["odd"], torch.randn(3, 2, 2), WHOLE["vector"]]
    for process in range(3):
        with as_process(process, 3) as mesh:
            found = leading_values([sharded(t, mesh) for t in whole], 12)
    assert found == [t.flatten()[:12].tolist() for t in whole] == leading_values(whole, 12)


def test_state_from_before_sharding_is_shared_as_its_weight_is() -> None:
    with as_process(1, 2) as mesh:
        weight = sharded(WHOLE["odd"], mesh)
        state = shard_like(WHOLE["odd"] * 2, weight)
        assert isinstance(state, DTensor)
        assert torch.equal(state.to_local(), WHOLE["odd"][4:] * 2)
        step = torch.tensor(3.0)
        assert shard_like(step, weight) is step
