"""Run hand-written loops with `ExactAccumulation` on two processes. Print a JSON line of what each case found."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from ftaccum import ExactAccumulation, SettingsError
from heads import HEADS, Row, all_in_float64, one_batch, one_batch_gradient, relative_error

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
RANK = state.process_index
BERT, SPANS = HEADS["masked LM, BERT"], HEADS["question answering, BERT"]
found: dict[str, Any] = {}


class Stream(IterableDataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def new_accelerator(**arguments: Any) -> Accelerator:
    for shared in (AcceleratorState, GradientState):
        shared._shared_state.clear()
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**arguments), gradient_accumulation_steps=3)


def wide_batch(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as a batch of width 12."""
    batch = one_batch(rows)
    return {
        name: F.pad(column, (0, 12 - column.shape[1]), value=-100 if name == "labels" else 0)
        for name, column in batch.items()
    }


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(values: Sequence[float]) -> float:
    """Return the largest value of both processes."""
    return max(gather_object([max(values)]))


def errors_of_windows(
    model: nn.Module, wrapped: nn.Module, loader: Any, rows: Sequence[Sequence[Row]], accelerator: Accelerator | None
) -> float:
    """Return the largest error of the gradients and losses of an epoch's windows, each of which has these rows."""
    accumulation = ExactAccumulation(wrapped, accelerator, on_inexact="error")
    errors, wanted = [], iter(rows)
    for window in accumulation.windows(loader, 2):
        whole = next(wanted)
        loss = accumulation.backward(window)
        gradient = gradient_of(model)
        with torch.no_grad():
            errors.append(abs(loss / model(**one_batch(whole)).loss.item() - 1))
        errors.append(relative_error(gradient, one_batch_gradient(model, whole)))
        model.zero_grad()
    assert next(wanted, None) is None, "too few windows"
    return worst(errors)


def with_accelerate(head: Any, *, stream: bool = False, size: int = 2, bar: bool = False, **arguments: Any) -> float:
    accelerator, model, rows = new_accelerator(**arguments), head.model(), head.rows(11)
    # Accelerate cannot join batches of unequal widths before it deals their rows.
    collate = wide_batch if stream or "dispatch_batches" in arguments else one_batch
    loader = DataLoader(Stream(rows) if stream else rows, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]
    wrapped, prepared = accelerator.prepare(model, loader)
    prepared = tqdm(prepared, disable=True) if bar else prepared
    return errors_of_windows(model, wrapped, prepared, [rows[:8], rows[8:]], accelerator)


def with_sampler(**arguments: Any) -> float:
    model, rows = BERT.model(), BERT.rows(11)
    sampler = DistributedSampler(rows, shuffle=False)  # type: ignore[arg-type, var-annotated]
    loader = DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=one_batch)  # type: ignore[arg-type, var-annotated]
    wrapped = DistributedDataParallel(model, **arguments)
    return errors_of_windows(model, wrapped, loader, [rows[:8], rows[8:]], None)


class TwoHeads(nn.Module):
    """A model with two losses, whose second head is used only by rows with a value, and tied, frozen and unused
    weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 1)
        self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(4, 4)
        self.tied = self.body
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor, values: Tensor) -> dict[str, Tensor]:
        hidden = self.tied(self.frozen(self.body(x).tanh()))
        is_known = ~values.isnan()
        outputs = {"logits": self.first(hidden)}
        return {**outputs, "values": self.second(hidden[is_known])[:, 0]} if is_known.any() else outputs


def two_losses(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = {"class": F.cross_entropy(outputs["logits"], batch["labels"])}
    if "values" not in outputs:
        return loss
    return {**loss, "value": F.mse_loss(outputs["values"], batch["values"][~batch["values"].isnan()])}


def items_of(batch: dict[str, Tensor]) -> dict[str, int]:
    return {"class": int((batch["labels"] != -100).sum()), "value": int((~batch["values"].isnan()).sum())}


draw = torch.Generator().manual_seed(3)
N = 12
ROWS = {
    "x": torch.randn(N, 4, generator=draw, dtype=torch.float64),
    "labels": torch.arange(N) % 3,
    "values": torch.randn(N, generator=draw, dtype=torch.float64),
}
ROWS["values"][[2, 3, 5, 8, 9, 10, 11]] = torch.nan


def part(*rows: int) -> dict[str, Tensor]:
    return {name: column[list(rows)] for name, column in ROWS.items()}


def with_two_heads(shares: Sequence[Sequence[Sequence[int]]], **arguments: Any) -> list[Any]:
    """Return the errors of gradient, loss and means over two windows, and the names of weights without a gradient."""
    model, reference = TwoHeads(), TwoHeads()
    wrapped = DistributedDataParallel(model, **arguments)
    accumulation = ExactAccumulation(wrapped, loss_fn=two_losses, count_items=items_of)
    batch = part(*itertools.chain.from_iterable(itertools.chain.from_iterable(shares)))
    terms = two_losses(reference(batch["x"], batch["values"]), batch)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    errors = []
    for _ in range(2):  # DDP complains in the second backward pass about the first
        loss = accumulation.backward([part(*rows) for rows in shares[RANK]])
        errors += [relative_error(gradient_of(model), gradient_of(reference)), abs(loss - sum(terms.values()).item())]  # type: ignore[union-attr]
        errors += [abs(accumulation.means[term] - mean.item()) for term, mean in terms.items()]
        without = sorted(name for name, p in model.named_parameters() if p.grad is None)
        model.zero_grad()
    return [worst(errors), without]


LACKING = ([(0, 1), (2, 3)], [(4, 6, 7), (5, 8)])  # the last pass of both processes has no value
UNEQUAL = ([(0, 1, 2), (4,), (8, 9)], [(3, 7)])
EMPTY = ([(0, 1, 2), (4,), (8, 9)], [])


def trained(*, exact: bool) -> list[Any]:
    """Train with clipping and AdamW for two epochs, and return the relative error of the weights."""
    accelerator, model, rows = new_accelerator(), BERT.model(), BERT.rows(15)
    loader = DataLoader(rows, batch_size=2, collate_fn=one_batch)  # type: ignore[arg-type, var-annotated]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    wrapped, prepared, optimizer = accelerator.prepare(model, loader, optimizer)
    accumulation = ExactAccumulation(wrapped, accelerator)
    settings = []
    for _ in range(2):
        for window in accumulation.windows(prepared, 2):
            if exact:
                accumulation.backward(window)
                settings.append([accelerator.sync_gradients, accelerator.gradient_accumulation_steps, accelerator.step])
            else:
                for batch in window:
                    (wrapped(**batch).loss / len(window)).backward()
            accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    reference = BERT.model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, eps=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for _ in range(2):
        for whole in (rows[:8], rows[8:]):
            reference(**one_batch(whole)).loss.backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    moved = [{n: p.detach() - start[n] for n, p in each.named_parameters()} for each in (model, reference)]
    return [worst([relative_error(*moved)]), settings]


def rows_seen(n_rows: int, **arguments: Any) -> list[list[int]]:
    """Return the rows of each of two shuffled epochs, over both processes, in order."""
    accelerator = new_accelerator(**arguments)
    loader = accelerator.prepare(DataLoader(torch.arange(n_rows), batch_size=2, shuffle=True))  # type: ignore[arg-type, var-annotated]
    accumulation = ExactAccumulation(nn.Linear(1, 1), accelerator)
    epochs = []
    for _ in range(2):
        windows = list(accumulation.windows(loader, 2))
        assert len(set(gather_object([len(windows)]))) == 1
        own = [int(n) for window in windows for batch in window for n in batch]
        epochs.append(sorted(gather_object(own)))
    next(accumulation.windows(loader, 1))  # and stop in mid-epoch
    return [*epochs, gather_object([len(loader)])]


def messages(function: Callable[[], object]) -> list[str]:
    """Return the SettingsError that each process raises."""
    try:
        function()
    except SettingsError as error:
        return gather_object([str(error)])
    return gather_object(["nothing"])


def with_other_weights() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight += RANK
    ExactAccumulation(model, loss_fn=F.cross_entropy).backward([(torch.ones(4, 4), torch.arange(4) % 3)])


def with_one_bad_window() -> None:
    accumulation = ExactAccumulation(DistributedDataParallel(nn.Linear(4, 3)), loss_fn=F.cross_entropy)
    window: Any = [(torch.ones(4, 4), torch.arange(4) % 3)]
    accumulation.backward(window[0] if RANK else window)


def with_gradients_in_evaluation() -> None:
    model = DistributedDataParallel(nn.Linear(4, 3))
    accumulation, batch = ExactAccumulation(model, loss_fn=F.cross_entropy), (torch.ones(4, 4), torch.arange(4) % 3)
    model(batch[0]).sum().backward()  # complete
    with torch.no_grad():
        model(batch[0])
    accumulation.backward([batch])
    model(batch[0])
    accumulation.backward([batch])


def with_a_group_of_its_own() -> None:
    groups = [distributed.new_group([rank]) for rank in range(2)]
    ExactAccumulation(DistributedDataParallel(nn.Linear(4, 3), process_group=groups[RANK]), loss_fn=F.cross_entropy)


def with_precision_of_the_wrapper() -> None:
    logging.getLogger("torch.nn.parallel.distributed").setLevel(logging.ERROR)  # it repeats the setting
    model = DistributedDataParallel(nn.Linear(4, 3), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    ExactAccumulation(model, loss_fn=F.cross_entropy)


def when_sharded() -> None:
    fully_shard(model := nn.Linear(4, 3), mesh=init_device_mesh("cpu", (2,)))
    ExactAccumulation(model, loss_fn=F.cross_entropy)


def when_sharded_later() -> None:
    accumulation = ExactAccumulation(model := nn.Linear(4, 3), loss_fn=F.cross_entropy)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    accumulation.backward([(torch.ones(4, 4), torch.arange(4) % 3)])


def with_synced_norms() -> None:
    ExactAccumulation(nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3)), loss_fn=F.cross_entropy)


def with_running_statistics() -> float:
    """Return how far the buffers of the processes are apart after the next window begins."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    accumulation = ExactAccumulation(model, loss_fn=F.cross_entropy, on_inexact="ignore")
    starts: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, _: starts.append(module[0].running_mean.clone()) if module.training else None  # type: ignore[index, operator]
    )
    for n in range(2):
        starts.clear()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * RANK + n))
        accumulation.backward([(x, torch.arange(6) % 3)])
    first, second = gather_object([starts[0].tolist()])
    return max(abs(a - b) for a, b in zip(first, second, strict=True)) if any(first) else float("nan")


def with_sparse_tables() -> list[Any]:
    """Return the error of a sparse table's gradient, and its layout."""

    def new_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True, mode="mean"), nn.Linear(4, 3)).double()

    model, reference = new_model(), new_model()
    ids, labels = torch.tensor([[1, 2], [2, 3], [3, 4], [1, 1], [7, 2]]), torch.tensor([0, 1, 2, 1, 0])
    F.cross_entropy(reference(ids), labels).backward()
    own = slice(0, 3) if RANK else slice(3, 5)
    ExactAccumulation(model, loss_fn=F.cross_entropy).backward([(ids[own], labels[own])])
    gradients = [{n: g.to_dense() for n, g in gradient_of(each).items()} for each in (model, reference)]
    return [worst([relative_error(*gradients)]), str(model[0].weight.grad.layout)]


with all_in_float64():
    found["repeats"] = with_accelerate(BERT)
    found["repeats, one width"] = with_accelerate(SPANS)
    found["repeats, in a bar"] = with_accelerate(BERT, bar=True)
    found["split_batches"] = with_accelerate(BERT, size=4, split_batches=True)
    found["even_batches=False"] = with_accelerate(BERT, even_batches=False)
    found["dealt stream"] = with_accelerate(BERT, stream=True)
    found["dealt rows"] = with_accelerate(BERT, dispatch_batches=True)
    found["split dealt stream"] = with_accelerate(BERT, stream=True, size=4, split_batches=True)
    found["own stream"] = with_accelerate(BERT, stream=True, dispatch_batches=False)
    found["sampler"] = with_sampler()
    found["sampler, static graph"] = with_sampler(static_graph=True)
    found["sampler, bucket views"] = with_sampler(gradient_as_bucket_view=True)
    found["trained"], found["trained by loss / k"] = trained(exact=True), trained(exact=False)
for name, shares in (("lacking", LACKING), ("unequal", UNEQUAL), ("empty", EMPTY)):
    found[name] = with_two_heads(shares)
found["empty, finding unused"] = with_two_heads(EMPTY, find_unused_parameters=True)
found["rows"] = {
    "even": rows_seen(11),
    "few": rows_seen(2),
    "split": rows_seen(11, split_batches=True),
}
found["messages"] = {
    "weights": messages(with_other_weights),
    "window": messages(with_one_bad_window),
    "norms": messages(with_synced_norms),
    "evaluation": messages(with_gradients_in_evaluation),
    "own group": messages(with_a_group_of_its_own),
    "precision": messages(with_precision_of_the_wrapper),
    "sharded": messages(when_sharded),
    "sharded later": messages(when_sharded_later),
}
found["statistics"] = with_running_statistics()
found["sparse"] = with_sparse_tables()
if RANK == 0:
    print(json.dumps(found))
