"""Measure the cost of the self-check before the first update, and print its warnings for three faulty losses.

    .venv/bin/python scripts/self_check.py
    .venv/bin/python scripts/self_check.py --passes           # every pass of it, for three models

The cost is for MiniLM on film reviews at batch 8 × 4, in forward passes and as a share of the time of 100 updates.
"""

import argparse
import contextlib
import copy
import inspect
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import ftaccum
from ftaccum.objective.self_check import measured_objective
from ftaccum.tasks.load import load_task
from measuring import DEVICE, machine, now, quiet
from workloads import Workload, movies

import packaged  # isort: skip; `workloads` adds its folder

_UPDATES, _BATCH_SIZE, _K = 100, 8, 4
_OBJECTIVE = str(Path("ftaccum") / "objective")


def cost(workload: Workload, rounds: int) -> None:
    """Print the forward passes and the seconds of the check, and the seconds of a run."""
    rows = workload.rows.select(range(_UPDATES * _BATCH_SIZE * _K))
    shares, checks = [], []
    for number in range(rounds):
        model, passes, check = workload.new_model().to(DEVICE), [0], [0.0, 0.0]
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.__setitem__(0, passes[0] + 1))

        def timed(*args: Any, check: Any = check, passes: Any = passes, **given: Any) -> Any:
            before, started = passes[0], now()
            found = measured_objective(*args, **given)
            check[:] = [passes[0] - before, now() - started]
            return found

        with quiet(number), patch("ftaccum.training.build_objective.measured_objective", timed):
            result = ftaccum.test_fine_tuning(
                model, train_data=rows, n_epochs=1, validation_split=0.0, batch_size=_BATCH_SIZE,
                gradient_accumulation_steps=_K, progress=False,
            )  # fmt: skip
        checks.append(check)
        shares.append(check[1] / result.training_time)
        print(f"{check[0]:.0f} forward passes, {check[1]:.2f} s; {_UPDATES} updates {result.training_time:.1f} s")
    print(f"Median: {100 * median(shares):.2f}% of {_UPDATES} updates, {median(c[1] for c in checks):.2f} s")


@dataclass
class Watch:
    """A record of the passes of a start, and its time.

    Attributes:
        passes: one line per forward pass.
        tokens: positions of all forward passes, padding included.
        backward: number of backward passes.
        check: seconds of `measured_objective`.
        start: seconds from the call to the start of training.
        shows: whether to record passes. Its hooks keep a verdict from being cached.
    """

    passes: list[str] = field(default_factory=list)
    tokens: int = 0
    backward: int = 0
    check: float = 0.0
    start: float = 0.0
    shows: bool = True

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        began = [0.0]

        def before(module: nn.Module, _: Any, given: dict[str, Any]) -> None:
            ids = given["input_ids"]
            self.tokens += ids.numel()
            kind = ("train" if module.training else "eval") + (", gradients" if torch.is_grad_enabled() else "")
            weights = str(next(module.parameters()).dtype).removeprefix("torch.")
            self.passes.append(f"{ids.shape[0]} × {ids.shape[1]:<4} {weights} {kind:<16} {_caller()}")
            began[0] = now()

        def after(*_: Any) -> None:
            self.passes[-1] = f"{now() - began[0]:6.2f} s  {self.passes[-1]}"

        def backward(*args: Any, real: Any = torch.autograd.backward, **given: Any) -> Any:
            self.backward += 1
            return real(*args, **given)

        handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
        with patch("torch.autograd.backward", backward):
            yield
        for handle in handles:
            handle.remove()

    def timed(self, *args: Any, **given: Any) -> Any:
        """Run `measured_objective`."""
        started = now()
        with self.watching(args[0]) if self.shows else contextlib.nullcontext():
            found = measured_objective(*args, **given)
        self.check = now() - started
        return found


def _caller() -> str:
    """Return the functions of `objective/` that lead to this pass, the innermost first."""
    names, frame = list[str](), inspect.currentframe()
    while frame is not None:
        if _OBJECTIVE in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    dull = {"__call__", "run", "_means", "outputs", "<lambda>", "_outputs", "answered", "_losses", "<genexpr>", "of"}
    shown = [name for name in names if name not in dull and not name.startswith("<")]
    return " < ".join(shown[:3])


def starts() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return functions that load the arguments of a run, by name."""
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN, packaged.SMOLLM, packaged.CHATS_TRAIN)
    texts = Path(tempfile.mkdtemp()) / "texts.jsonl"
    rows = datasets.Dataset.from_csv(str(packaged.MOVIES_TRAIN)).remove_columns("label")
    rows.select(range(4000)).to_json(str(texts))

    def of_task(*names: str, dtype: str = "float32", max_rows: int = 4000) -> Callable[[], dict[str, Any]]:
        return lambda: load_task(
            *names, dtype=dtype, max_train_rows=max_rows, max_length=384, validation_split=0.0
        ).arguments()

    chats = "chat", str(packaged.SMOLLM), str(packaged.CHATS_TRAIN)
    return {
        "MiniLM, masked LM": of_task("masked-lm", str(packaged.MINILM), str(texts)),
        "MiniLM, classification": of_task("text-classification", str(packaged.MINILM), str(packaged.MOVIES_TRAIN)),
        "SmolLM2-135M, chats": of_task(*chats, max_rows=1000),
        "SmolLM2-135M in bfloat16, chats": of_task(*chats, dtype="bfloat16", max_rows=1000),
    }


def passes(names: list[str], rounds: int, cache: str | None) -> None:
    """Print every pass of the check, and how long a start takes beyond loading."""
    for name, loaded in starts().items():
        if names and not any(each in name for each in names):
            continue
        arguments = loaded()
        model = arguments.pop("model")
        for number in range(rounds):
            watch = Watch(shows=cache is None)
            started = now()

            def begin(*_: Any, watch: Watch = watch, started: float = started) -> None:
                watch.start = now() - started
                raise KeyboardInterrupt

            with (
                quiet(0), contextlib.suppress(KeyboardInterrupt),
                patch("ftaccum.training.build_objective.measured_objective", watch.timed),
                patch("ftaccum.training.build_run.TrainingLoop.train", begin),
            ):  # fmt: skip
                ftaccum.test_fine_tuning(
                    copy.deepcopy(model), **arguments, max_updates=8, validation_split=0.0, batch_size=_BATCH_SIZE,
                    gradient_accumulation_steps=_K, progress=False, self_check_cache=cache or False,
                )  # fmt: skip
            if number == 0 and watch.shows:
                print("\n".join(["", f"{name}:", *(f"  {line}" for line in watch.passes)]))
            print(
                f"{name}: {len(watch.passes)} forward and {watch.backward} backward passes, {watch.tokens} positions; "
                f"check {watch.check:.2f} s, start {watch.start:.2f} s"
            )


class Classifier(nn.Module):
    """A classifier on the normalized mean embedding, over all positions or only those that are not padding."""

    def __init__(self, norm: nn.Module, heed_mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(100, 16), norm, nn.Linear(16, 3)
        self._heed_mask = heed_mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask if self._heed_mask else torch.ones_like(attention_mask)
        pooled = (self.embed(input_ids) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return self.head(self.norm(pooled))


def contrastive(outputs: Tensor, _: Any) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs), device=outputs.device))


def classes(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch["labels"])


def faults() -> None:
    """Print the warnings for three faulty losses."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(100, (n % 9 + 2,), generator=draw), "labels": n % 3} for n in range(_BATCH_SIZE)
    ]
    seeded = {
        "batch norm in train mode": (Classifier(nn.BatchNorm1d(16)), classes),
        "an in-batch contrastive loss": (Classifier(nn.LayerNorm(16)), contrastive),
        "a loss that ignores its mask": (Classifier(nn.LayerNorm(16), heed_mask=False), classes),
    }
    for name, (model, loss_fn) in seeded.items():
        with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            ftaccum.test_fine_tuning(
                model, train_data=rows, loss_fn=loss_fn, n_epochs=1, validation_split=0.0,
                gradient_accumulation_steps=2, progress=False,
            )  # fmt: skip
        print(f"\n{name}:")
        for each in told:
            print(f"  {each.category.__name__}: {each.message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-faults", action="store_true", help="skip the cost")
    parser.add_argument("--passes", nargs="*", metavar="NAME", help="print every pass, for models with such a name")
    parser.add_argument("--cache", help="with --passes: only time it, with verdicts in this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    print(machine())
    if options.passes is not None:
        passes(options.passes, options.rounds, options.cache)
        return
    if not options.only_faults:
        cost(movies(42), options.rounds)
    faults()


if __name__ == "__main__":
    main()
