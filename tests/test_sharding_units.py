"""The blocks that sharding gathers separately, the order in which passes run them, and predictions of memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import SettingsError
from ftaccum.runtime.process_group import SINGLE
from ftaccum.runtime.sharding.shard import fits_whole
from ftaccum.runtime.sharding.units import CallOrder, candidate_units
from ftaccum.training.batch_size_finder import largest_batch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Model(nn.Module):
    """A model with any parts, whose pass runs the named ones."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.embed, self.runs = nn.Linear(2, 2), [""]
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.runs:
            x = self.get_submodule(name)(x)
        return x


def blocks(n: int = 3) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(n))


def units(model: nn.Module, *classes: str) -> list[str]:
    return list(candidate_units(model, classes))


def test_the_blocks_of_lists_are_units_in_the_order_of_the_model() -> None:
    model = Model(decoder=nn.ModuleDict({"layers": blocks(2)}), encoder=nn.Sequential(blocks(2)), head=Block())
    assert units(model) == ["decoder.layers.0", "decoder.layers.1", "encoder.0.0", "encoder.0.1"]


def test_lists_inside_of_blocks_are_not_looked_into() -> None:
    outer = Block()
    outer.experts = blocks(2)
    assert units(Model(layers=nn.ModuleList([outer, Block()]))) == ["layers.0", "layers.1"]


def test_blocks_that_only_hold_modules_are_no_units() -> None:
    """A list of lists, or of dicts, has no forward pass that could gather it, and its parts are not in the list."""
    assert units(Model(nested=nn.ModuleList([blocks(2), blocks(1)]))) == []
    assert units(Model(parts=nn.ModuleList([nn.ModuleDict({"a": Block()}), Block()]))) == ["parts.1"]
    assert units(Model(parts=nn.ModuleDict({"a": Block(), "b": Block()}))) == []


def test_blocks_without_weights_are_no_units() -> None:
    assert units(Model(layers=nn.ModuleList([nn.GELU(), Block()]))) == ["layers.1"]


def test_a_model_without_lists_has_no_units() -> None:
    assert units(Model(first=Block(), second=nn.Sequential(Block(), Block()))) == []
    assert units(nn.Linear(2, 2)) == []


def test_a_model_that_is_a_list_itself_has_its_blocks_as_units() -> None:
    assert units(blocks(2)) == ["0", "1"]


def test_blocks_that_share_a_weight_with_others_stay_with_the_rest_of_the_model() -> None:
    model = Model(layers=blocks(4), head=nn.Linear(2, 2))
    model.layers[0].first.weight = model.embed.weight
    model.layers[1].second.weight = model.layers[2].second.weight
    assert units(model) == ["layers.3"]


def test_a_module_that_several_blocks_share_keeps_them_with_the_rest() -> None:
    model = Model(layers=blocks(3))
    model.layers[0].second = model.layers[2].second
    assert units(model) == ["layers.1"]
    same = Block()
    assert units(Model(layers=nn.ModuleList([same, Block(), same]))) == ["layers.1"]


def test_weights_tied_within_a_block_do_not_matter() -> None:
    model = Model(layers=blocks(2))
    model.layers[0].first.weight = model.layers[0].second.weight
    assert units(model) == ["layers.0", "layers.1"]


def test_the_names_of_classes_replace_the_search_for_lists() -> None:
    model = Model(layers=blocks(2), head=Block(), rest=nn.Sequential(nn.Linear(2, 2)))
    assert units(model, "Block") == ["layers.0", "layers.1", "head"]
    assert units(model, "Linear", "Block") == ["embed", "layers.0", "layers.1", "head", "rest.0"]
    assert units(nn.Linear(2, 2), "Linear") == [], "the model itself is gathered anyway"


def order_of(model: Model, *passes: list[str]) -> CallOrder:
    order = CallOrder(model, candidate_units(model))
    for runs in passes:
        model.runs = runs
        with order.observed():
            model(torch.zeros(1, 2))
    return order


def test_units_are_in_the_order_in_which_passes_run_them() -> None:
    model = Model(late=blocks(1), early=blocks(2))
    assert order_of(model, ["early.0", "early.1", "late.0"]).names == ["early.0", "early.1", "late.0"]


def test_passes_that_skip_blocks_agree_with_those_that_do_not() -> None:
    model = Model(layers=blocks(3))
    every = ["layers.0", "layers.1", "layers.2"]
    assert order_of(model, ["layers.1"], every, ["layers.0", "layers.2"]).names == every


def test_a_block_that_a_pass_runs_twice_is_no_unit() -> None:
    model = Model(layers=blocks(3))
    twice = ["layers.0", "layers.1", "layers.0", "layers.2"]
    assert order_of(model, twice, ["layers.0", "layers.1", "layers.2"]).names == ["layers.1", "layers.2"]


def test_passes_in_different_orders_leave_no_units() -> None:
    model = Model(layers=blocks(2))
    assert order_of(model, ["layers.0", "layers.1"], ["layers.1", "layers.0"]).names == []


def test_without_a_pass_there_are_no_units() -> None:
    model = Model(layers=blocks(2))
    assert order_of(model).names == []
    order = CallOrder(model, candidate_units(model))
    with order.observed():
        model.layers[0](torch.zeros(1, 2))  # a part of the model alone
    assert order.names == []


def test_passes_are_observed_only_within_the_context() -> None:
    model = Model(layers=blocks(1))
    order = order_of(model, ["layers.0"])
    model.runs = ["layers.0", "layers.0"]
    model(torch.zeros(1, 2))
    assert order.names == ["layers.0"]


GPU = torch.device("cuda")


def test_a_model_fits_whole_if_a_quarter_of_the_free_memory_holds_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.BatchNorm1d(100, track_running_stats=True)
    n_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert n_bytes == 4 * 400 + 8
    free = [4 * n_bytes + 1]
    monkeypatch.setattr("torch.accelerator.get_memory_info", lambda _: (free[0], 10**12), raising=False)
    assert fits_whole(model, GPU, SINGLE)
    free[0] -= 1
    assert not fits_whole(model, GPU, SINGLE)
    assert fits_whole(model, torch.device("cpu"), SINGLE), "a host has no free memory that is known so exactly"
    monkeypatch.setattr("ftaccum.runtime.sharding.shard.free_per_process", lambda: 4 * n_bytes - 1)
    with pytest.raises(SettingsError, match="its loss is measured on the whole model"):
        fits_whole(model, GPU, SINGLE)


def test_unknown_classes_of_blocks_are_refused() -> None:
    with pytest.raises(SettingsError, match="names Blok, but the model has no module of this class"):
        candidate_units(nn.Sequential(nn.Linear(2, 2)), ["Linear", "Blok"])


class Together:
    """Stands in for the strategy of sharded weights. The other process runs out of memory above `most` rows."""

    def __init__(self, most: int) -> None:
        self.most, self.tried, self.finished, self.resets = most, list[int](), 0, 0

    def run_together(self, forward: Any) -> Tensor | None:
        self.tried.append(ROWS[-1] if forward() is not None else 0)
        return forward() if self.tried[-1] <= self.most else None

    def end_pass(self) -> None:
        self.finished += 1

    def reset(self) -> None:
        self.resets += 1


ROWS: list[int] = []


def found_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, *, free: int, row: int, most: int = 99, other: bool = False
) -> tuple[int, Together]:
    """Return the largest batch of up to 32 rows on a device with `free` bytes, of which a row takes `row`.

    Args:
        other: whether the other process has no room for more than one row.
    """
    model, peak, strategy = nn.Linear(10, 10, bias=False), [0], Together(most)  # 400 bytes
    loader = SimpleNamespace(longest_rows=lambda n: ROWS.append(n) or n)

    def loss(model: nn.Module, _: Any, n_rows: int, __: Any) -> Tensor:
        peak[0] = max(peak[0], 1000 + n_rows * row)
        return model(torch.zeros(1, 10)).sum()

    group = SimpleNamespace(is_single=False, any=lambda flag: flag or (other and ROWS != []), min=lambda number: number)
    finder = "ftaccum.training.batch_size_finder"
    monkeypatch.setattr(f"{finder}._loss", loss)
    monkeypatch.setattr(f"{finder}.free_memory", lambda _: free)
    monkeypatch.setattr("torch.accelerator.max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr("torch.accelerator.reset_peak_memory_stats", lambda: peak.__setitem__(0, 1000))
    ROWS.clear()
    accelerator: Any = SimpleNamespace(device=GPU)
    objective: Any = SimpleNamespace(modules=())
    found = largest_batch(
        model,
        objective,
        loader,
        accelerator,
        group,
        at_most=32,
        wide=False,
        sharded=strategy,  # type: ignore[arg-type]
    )
    assert model.weight.grad is None
    return found, strategy


def test_auto_predicts_what_fits_where_running_out_would_stop_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 11 000 bytes a fifth stays free, and 1200 are for moments and sums: 7600 for rows of 700."""
    found, strategy = found_on_a_gpu(monkeypatch, free=11_000, row=700)
    assert found == 10
    assert max(strategy.tried) == 10, "more would not fit, so they were not tried"
    assert strategy.tried[:4] == [1, 2, 4, 8]
    assert strategy.finished == len(strategy.tried)
    assert strategy.resets == 1


def test_auto_takes_what_fits_on_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, strategy = found_on_a_gpu(monkeypatch, free=10**9, row=700, most=5)
    assert (found, max(strategy.tried)) == (5, 8)
    assert found_on_a_gpu(monkeypatch, free=10**9, row=700)[0] == 32
    found, strategy = found_on_a_gpu(monkeypatch, free=10**9, row=700, other=True)
    assert (found, strategy.tried) == (1, [1]), "what does not fit elsewhere was not tried"


def test_auto_is_an_error_if_a_single_row_fits_on_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="even the longest row alone does not fit"):
        found_on_a_gpu(monkeypatch, free=10**9, row=700, most=0)
