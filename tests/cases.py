"""Random runs and the expected result of each, computed in a few lines without ftaccum."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from heads import CLASSES, IGNORED, PAD, VOCABULARY, one_batch
from lazy_rows import LazyRows

_LENGTHS = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 12, 40])
_COUNTED = st.sampled_from(["all", "all", "all", "some", "none"])  # labels of a row that count
_TINY = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model in float64, rows for it, and its loss on a batch of them."""

    model: Callable[[], nn.Module]
    row: Callable[[torch.Generator, int, str], Any]
    loss: Callable[[nn.Module, Sequence[Any]], Tensor]
    items: Callable[[Any], int]
    forms: tuple[str, ...]


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_TINY, num_key_value_heads=2))


def _bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**_TINY, **off, num_labels=CLASSES))


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def _ids(draw: torch.Generator, length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()


def _next_token(draw: torch.Generator, length: int, counted: str) -> Any:
    ids = _ids(draw, length)
    ignored = {"all": 0, "some": (length + 1) // 2, "none": length}[counted]
    return {"input_ids": ids, "labels": [IGNORED] * ignored + ids[ignored:]}


def _one_class(draw: torch.Generator, length: int, counted: str) -> Any:
    ids = _ids(draw, length or 1)  # the output for a row of padding alone depends on the amount of padding
    return {"input_ids": ids, "labels": IGNORED if counted == "none" else ids[0] % CLASSES}


def _pair(draw: torch.Generator, length: int, counted: str) -> Any:
    target = IGNORED if counted == "none" else length % CLASSES
    return torch.randn(4, generator=draw, dtype=torch.float64), torch.tensor(target)


def _of_model(model: nn.Module, rows: Sequence[Any]) -> Tensor:
    return model(**one_batch([row for row in rows if row["input_ids"]])).loss


def _of_pairs(model: nn.Module, rows: Sequence[Any]) -> Tensor:
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    return nn.functional.cross_entropy(model(inputs), targets)


KINDS = {
    "causal LM": Kind(
        _llama, _next_token, _of_model, lambda row: sum(label != IGNORED for label in row["labels"][1:]),
        ("list", "table", "torch", "ids", "stream"),
    ),
    "classifier": Kind(
        _bert, _one_class, _of_model, lambda row: int(row["labels"] != IGNORED), ("list", "table", "torch", "stream")
    ),
    "pairs": Kind(_linear, _pair, _of_pairs, lambda row: int(row[1] != IGNORED), ("list", "torch")),
}  # fmt: skip


def _stream(rows: Sequence[Any]) -> Any:
    return IterableDataset.from_generator(lambda: iter(rows))


def _shifted(batch: Any) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Case:
    """A run: a kind of model, rows in one of their possible forms, and arguments of `test_fine_tuning`."""

    kind: str
    form: str
    shapes: tuple[tuple[int, str], ...]  # for each row, its length and which of its labels count
    counted: str  # how loss items are counted: measured ("as it is"), "by the user", or for a loss "as a sum"
    arguments: dict[str, Any]

    @cached_property
    def rows(self) -> list[Any]:
        draw = torch.Generator().manual_seed(len(self.shapes))
        return [KINDS[self.kind].row(draw, *shape) for shape in self.shapes]

    def data(self) -> Any:
        """Return the rows in the form that a user might pass."""
        if self.form == "ids":
            return [torch.tensor(row["input_ids"], dtype=torch.int64) for row in self.rows]
        forms = {"list": list, "table": Dataset.from_list, "torch": LazyRows, "stream": _stream}
        return forms[self.form](self.rows)

    def validation_data(self) -> Any:
        """Return the same rows if they are a stream, since no rows can be held out from a stream."""
        return self.rows if self.form == "stream" and self.validation_split else None

    def loss(self) -> dict[str, Any]:
        """Return the arguments for the loss, if the model does not compute it itself."""
        if self.kind != "pairs":
            return {"count_items": _shifted} if self.counted == "by the user" and self.kind == "causal LM" else {}
        sums = self.counted == "as a sum"
        item_counter = {"count_items": lambda batch: int((batch[1] != IGNORED).sum())}
        return {
            "loss_fn": nn.CrossEntropyLoss(reduction="sum" if sums else "mean"),
            "reduction": "sum" if sums else "mean",
        } | (item_counter if self.counted == "by the user" else {})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return KINDS[self.kind].model().double()

    def __getattr__(self, name: str) -> Any:
        """Return an argument or its default."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.arguments.get(name, _DEFAULTS[name])


_DEFAULTS = {
    "batch_size": 4, "gradient_accumulation_steps": 1, "effective_batch_size": None, "tokens_per_update": None,
    "remainder": "flush", "n_epochs": 3, "max_updates": None, "max_tokens": None, "planner": True,
    "planner_costs": None, "padding_free": False, "validation_split": 0.1, "learning_rate_scaling": "none",
    "lr_scheduler": "linear", "warmup_steps": 0, "warmup_ratio": 0.0, "gradient_clip_norm": 1.0, "random_seed": 42,
    "gradient_checkpointing": False,
}  # fmt: skip


@st.composite
def pairs(draw: st.DrawFn) -> Any:
    """Draw a number of accumulation steps that changes, as pairs or as text."""
    later = draw(st.lists(st.integers(1, 9), unique=True, max_size=3).map(sorted))
    found = [(update, draw(st.integers(1, 5))) for update in (0, *later)]
    return draw(st.sampled_from([found, ",".join(f"{update}:{k}" for update, k in found)]))


_SIZES = {
    "gradient_accumulation_steps": st.integers(1, 5) | pairs(),
    "effective_batch_size": st.integers(1, 30),
    "tokens_per_update": st.integers(1, 200),
}
_OTHERS: dict[str, st.SearchStrategy[Any]] = {
    "batch_size": st.integers(1, 6),
    "n_epochs": st.integers(1, 3),
    "max_updates": st.integers(1, 8),
    "remainder": st.sampled_from(["flush", "carry"]),
    "max_tokens": st.sampled_from([1, 12, 40, 100, "auto"]),
    "planner": st.booleans(),
    "planner_costs": st.sampled_from([[64, 1, 0.0005], [1, 0, 0], [0, 0, 1.0]]),
    "padding_free": st.booleans(),
    "validation_split": st.sampled_from([0.0, 0.1, 0.3, 0.9]),
    "learning_rate_scaling": st.sampled_from(["none", "sqrt", "linear"]),
    "lr_scheduler": st.sampled_from(["linear", "constant", "constant_with_warmup", "cosine", "reduce_lr_on_plateau"]),
    "warmup_steps": st.integers(0, 4),
    "warmup_ratio": st.sampled_from([0.0, 0.1, 0.5]),
    "gradient_clip_norm": st.sampled_from([None, 0.01, 1.0, 100.0]),
    "random_seed": st.integers(0, 2**32 - 1),
    "num_workers": st.just(0),
    "deterministic": st.booleans(),
    "gradient_checkpointing": st.booleans(),
    "accumulate_in_fp32": st.booleans(),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(KINDS)))
    form = draw(st.sampled_from(KINDS[kind].forms))
    counted = st.just("all") if form == "ids" else _COUNTED
    shapes = draw(st.lists(st.tuples(_LENGTHS, counted), min_size=1, max_size=24))
    sizes = draw(st.lists(st.sampled_from(sorted(_SIZES)), max_size=2, unique=True))
    others = draw(st.lists(st.sampled_from(sorted(_OTHERS)), max_size=8, unique=True))
    item_counter = draw(st.sampled_from(["as it is", "as it is", "by the user", "as a sum"]))
    names = dict.fromkeys(["batch_size", "remainder", *sizes, *others])  # the first two are in every case
    case = Case(kind, form, tuple(shapes), item_counter, {name: draw((_SIZES | _OTHERS)[name]) for name in names})
    return case if draw(st.integers(0, 4)) == 0 else _reconciled(case)


def _reconciled(case: Case) -> Case:
    """Return the case without contradictory arguments, for which most cases would be refused."""
    sizes = [name for name in case.arguments if name in _SIZES]
    drop = {
        "learning_rate_scaling": not _changes(case),
        "warmup_ratio": case.warmup_steps > 0,
        "planner_costs": not case.planner,
        "lr_scheduler": case.lr_scheduler == "reduce_lr_on_plateau",
        "padding_free": case.kind != "causal LM",
        "gradient_checkpointing": case.kind == "pairs",
        "max_tokens": _cap_is_refused(case),
    } | dict.fromkeys(sizes[1:], True)
    kept = replace(case, arguments={name: value for name, value in case.arguments.items() if not drop.get(name)})
    if case.form == "stream":
        kept = replace(kept, arguments={"max_updates": 5} | kept.arguments)
    return replace(kept, arguments=kept.arguments | {"validation_split": 0.0}) if refused(kept) else kept


def split(case: Case) -> tuple[list[Any], list[Any]]:
    """Return the training rows and the validation rows."""
    if case.form == "stream":
        return case.rows, case.validation_data() or []
    n, share = len(case.rows), case.validation_split
    held = sorted(
        np.random.RandomState((case.random_seed, 0)).permutation(n)[: max(1, round(share * n)) if share else 0]
    )
    return [row for at, row in enumerate(case.rows) if at not in held], [case.rows[at] for at in held]


def refused(case: Case) -> bool:
    """Return whether the run must be refused: for an invalid argument, a contradiction, or unusable rows."""
    train, val = split(case)
    return any(
        [
            case.form == "stream" and case.max_updates is None,
            case.gradient_checkpointing and case.kind == "pairs",
            case.lr_scheduler == "reduce_lr_on_plateau",
            bool(case.warmup_steps and case.warmup_ratio),
            case.learning_rate_scaling != "none" and not _changes(case),
            case.planner_costs is not None and not case.planner,
            _cap_is_refused(case),
            case.padding_free and case.kind != "causal LM",
            not train,
            not sum(map(KINDS[case.kind].items, train)),
            bool(val) and not sum(map(KINDS[case.kind].items, val)),
        ]
    ) or (bool(train) and not _sizes_agree(case, train))


def _cap_is_refused(case: Case) -> bool:
    if case.max_tokens == "auto":
        return case.form in ("torch", "stream") or case.kind == "pairs"
    return case.max_tokens is not None and (case.form == "torch" or max(map(_length, case.rows)) > case.max_tokens)


def _changes(case: Case) -> bool:
    return not isinstance(case.gradient_accumulation_steps, int)


def _length(row: Any) -> int:
    return len(row[0]) if isinstance(row, tuple) else len(row["input_ids"])


def _asked(case: Case, train: Sequence[Any]) -> list[int]:
    """Return the rows of an update that each argument other than k asks for."""
    mean = sum(map(_length, train)) / len(train)
    of_tokens = case.tokens_per_update and max(1, round(case.tokens_per_update / (mean or 1)))
    return [rows for rows in (case.effective_batch_size, of_tokens) if rows]


def _sizes_agree(case: Case, train: Sequence[Any]) -> bool:
    asked = _asked(case, train)
    if not asked or _changes(case):
        return not asked
    k = case.gradient_accumulation_steps
    return len(set(asked)) == 1 and (k == 1 or k == math.ceil(asked[0] / case.batch_size))


def steps(case: Case) -> list[tuple[int, int]]:
    """Return pairs (from_update, k)."""
    given = case.gradient_accumulation_steps
    if isinstance(given, str):
        return [(int(update), int(k)) for update, k in (pair.split(":") for pair in given.split(","))]
    return [(0, given)] if isinstance(given, int) else given


def k_of(case: Case, update: int) -> int:
    return [k for first, k in steps(case) if first <= update][-1]


def windows(case: Case) -> list[tuple[int, list[Any]]]:
    """Return, for each update, the epoch of its last row and its rows."""
    train, _ = split(case)
    asked = _asked(case, train)
    found: list[tuple[int, list[Any]]] = []
    waiting: list[Any] = []
    for epoch in range(case.n_epochs):
        of_seed = np.random.RandomState((case.random_seed, 1, epoch)).permutation(len(train))
        order = range(len(train)) if case.form == "stream" else of_seed
        for place, at in enumerate(order, 1):
            waiting.append(train[at])
            wanted = asked[0] if asked else k_of(case, len(found)) * case.batch_size
            ends = place == len(train) and (case.remainder == "flush" or epoch + 1 == case.n_epochs)
            if len(waiting) == wanted or ends:
                found.append((epoch, waiting))
                waiting = []
            if len(found) == case.max_updates:
                return found
    return found


def rates(case: Case, taken: Sequence[bool]) -> Iterator[float]:
    """Yield, for each update, the factor on the peak learning rate. The schedule does not count skipped updates.

    Args:
        taken: for each update, whether it was taken.
    """
    n = case.max_updates if case.form == "stream" else len(taken)
    warmup = case.warmup_steps or math.ceil(case.warmup_ratio * n)
    done = itertools.accumulate(taken, initial=0)
    for update, s in zip(range(len(taken)), done, strict=False):
        left = (s - warmup) / max(1, n - warmup)
        after = {
            "linear": max(0.0, 1 - left),
            "cosine": 0.5 * (1 + math.cos(math.pi * left)),
        }.get(case.lr_scheduler, 1.0)
        warming = s < warmup and case.lr_scheduler != "constant"
        ratio = k_of(case, update) / k_of(case, 0)
        follows = {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[case.learning_rate_scaling]
        yield follows * (s / warmup if warming else after)
