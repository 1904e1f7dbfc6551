"""Train losses over the window on two processes. Print a JSON line {case: largest relative gradient error}.

The arguments are names of cases, or the name of a group of them: "whole" or "sharded".
"""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from embedding_losses import Drawing, Embedder, InfoNCE, by_place, cox, in_terms, info_nce, inputs_of, with_another
from exactness import windows_of
from ftaccum import test_fine_tuning
from heads import _LLAMA, HEADS, Row, all_in_float64, one_batch, relative_error, unsharded

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def mixtral(factor: float) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        **_LLAMA, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=factor,
        initializer_range=0.3,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped products do not support float64
    return MixtralForCausalLM(config)


def adapted() -> nn.Module:
    model = peft.get_peft_model(Embedder(), peft.LoraConfig(r=2, target_modules=["query", "value"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # if it stayed zero, lora_A would have no gradient
    return model


@dataclass(frozen=True)
class Case:
    """A loss, and how to train with it. Windows have 8 rows; 17 rows leave a remainder of one row.

    Attributes:
        loss: returns the loss, given the model; None for the model's own.
        inputs: returns what the loss reads.
        dtype: of the weights.
        n_rows: the number of rows.
    """

    loss: Callable[[Any], Any] | None = lambda _: info_nce
    model: Callable[[], nn.Module] = Embedder
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[..., Any] = inputs_of
    dtype: torch.dtype = torch.float64
    n_rows: int = 21
    factor: float = 0.0  # of the balance of experts


def of_model(model: Any) -> Any:
    return lambda inputs, batch: info_nce(inputs, batch, model.log_scale)


def with_module(_: Any) -> nn.Module:
    return InfoNCE()


_ONE_LEFT = {"n_rows": 17}
_DROPPING = partial(Embedder, dropout=0.5)
_FULLY: dict[str, Any] = {"sharding": "fsdp2"}
CASES = {
    "fixed scale": Case(),
    "scale in the model": Case(of_model),
    "scale in the loss": Case(with_module),
    "scale in the loss, one row left": Case(with_module, **_ONE_LEFT),
    "Cox": Case(lambda _: cox),
    "Cox, one row left": Case(lambda _: cox, **_ONE_LEFT),
    "by places": Case(lambda _: by_place),
    "by places, one row left": Case(lambda _: by_place, **_ONE_LEFT),
    "by places, not planned": Case(lambda _: by_place, arguments={"planner": False}, **_ONE_LEFT),
    "an input that the loss ignores": Case(inputs=with_another, **_ONE_LEFT),
    "two terms": Case(lambda _: in_terms),
    "drawing": Case(lambda _: Drawing(), **_ONE_LEFT),
    "dropout": Case(with_module, _DROPPING),
    "dropout, drawing": Case(lambda _: Drawing(), _DROPPING, **_ONE_LEFT),
    "dropout, checkpointing": Case(of_model, _DROPPING, {"gradient_checkpointing": True}),
    "checkpointing": Case(with_module, arguments={"gradient_checkpointing": True}),
    "LoRA": Case(with_module, adapted),
    "clipping": Case(with_module, arguments={"gradient_clip_norm": 0.01}),
    "float32": Case(with_module, dtype=torch.float32),
    "bf16 weights, float32 sums": Case(with_module, arguments={"accumulate_in_fp32": True}, dtype=torch.bfloat16),
    "bf16 weights": Case(with_module, dtype=torch.bfloat16),
    "bf16 autocast": Case(with_module, arguments={"mixed_precision": "bf16"}, dtype=torch.float32),
    "Mixtral, 1": Case(None, partial(mixtral, 1.0), factor=1.0),
    "Mixtral, 0.001": Case(None, partial(mixtral, 0.001), factor=0.001, **_ONE_LEFT),
    "Mixtral, 1, checkpointing": Case(None, partial(mixtral, 1.0), {"gradient_checkpointing": True}, factor=1.0),
}
# Not with "last", with which FSDP2 does not reduce 16-bit gradients beside weights that no row uses, as this model has.
CASES["sharded, each, bf16 weights"] = Case(with_module, arguments=_FULLY | {"sync": "each"}, dtype=torch.bfloat16)
for _sync in ("each", "last"):
    _sharded = _FULLY | {"sync": _sync}
    CASES |= {
        f"sharded, {_sync}": Case(arguments=_sharded, **_ONE_LEFT),
        f"sharded, {_sync}, scale in the loss": Case(with_module, arguments=_sharded, **_ONE_LEFT),
        f"sharded, {_sync}, an input that the loss ignores": Case(inputs=with_another, arguments=_sharded, **_ONE_LEFT),
        f"sharded, {_sync}, by places": Case(lambda _: by_place, arguments=_sharded, **_ONE_LEFT),
        f"sharded, {_sync}, dropout": Case(with_module, _DROPPING, _sharded),
        f"sharded, {_sync}, checkpointing": Case(with_module, _DROPPING, _sharded | {"gradient_checkpointing": True}),
        f"sharded, {_sync}, clipping": Case(with_module, arguments=_sharded | {"gradient_clip_norm": 0.01}),
        f"sharded, {_sync}, LoRA": Case(with_module, adapted, _sharded),
        f"sharded, {_sync}, Mixtral": Case(None, partial(mixtral, 1.0), _sharded, factor=1.0, **_ONE_LEFT),
    }


class Recorder(torch.optim.Optimizer):
    """Records the gradient of each update, and what was drawn in it, and does not change the weights."""

    takes_sharded_weights = True  # which a trial cannot show

    def __init__(self, groups: Any, modules: Mapping[str, nn.Module], loss: Any) -> None:
        self._modules, self._loss = modules, loss
        self.gradients: list[dict[str, Tensor]] = []
        self.masks: list[dict[int, Tensor]] = []
        self.drawn: list[Tensor] = []
        super().__init__(groups, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        held = {id(p) for group in self.param_groups for p in group["params"]}
        self.gradients.append(
            {
                name: unsharded(p.grad).clone().double()
                for name, p in named(self._modules).items()
                if id(p) in held and p.grad is not None
            }
        )
        masks: dict[int, Tensor] = {}
        for part in gather_object([dict(getattr(self._modules[""], "masks", {}))]):
            masks |= part
        self.masks.append(masks)
        getattr(self._modules[""], "masks", {}).clear()
        if isinstance(self._loss, Drawing):
            everyone = gather_object([self._loss.drawn])
            assert all(torch.equal(each, everyone[0]) for each in everyone), "processes draw the same numbers"
            self.drawn.append(everyone[0])


def named(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {prefix + name: p for prefix, module in modules.items() for name, p in module.named_parameters()}


def rows_of(case: Case) -> list[Row]:
    if case.loss is None:
        return HEADS["causal LM, Llama"].rows(case.n_rows)
    drawn = HEADS["regression, BERT"].rows(case.n_rows)
    return [{**row, "labels": row["labels"].to(case.dtype), "row": n} for n, row in enumerate(drawn)]


def wanted(case: Case, modules: Mapping[str, nn.Module], loss: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the gradient of one batch of the rows in plain PyTorch."""
    for module in modules.values():
        module.train()
        module.zero_grad()
    batch = one_batch(rows)
    autocast = "mixed_precision" in case.arguments
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        outputs = modules[""](**batch)
    if loss is None:
        total = expert_loss(outputs, batch, case.factor)
    else:
        found = loss({name: outputs[name].float() if autocast else outputs[name] for name in ("mean", "first")}, batch)
        total = sum(found.values()) if isinstance(found, dict) else found
    total.backward()
    gradient = {name: p.grad.clone() for name, p in named(modules).items() if p.grad is not None}
    if clip := case.arguments.get("gradient_clip_norm"):
        held = [p for p in named(modules).values() if p.grad is not None]
        nn.utils.clip_grad_norm_(held, clip)
        gradient = {name: p.grad.clone() for name, p in named(modules).items() if p.grad is not None}
    return {name: g.double() for name, g in gradient.items()}


def expert_loss(outputs: Any, batch: Mapping[str, Tensor], factor: float) -> Tensor:
    """Return the mean loss of tokens, and the balance of experts over the tokens that are no padding."""
    of_tokens = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    counted = batch["attention_mask"].flatten().bool()
    probabilities = torch.cat([layer[counted].softmax(-1) for layer in outputs.router_logits])
    chosen = F.one_hot(probabilities.topk(2).indices, probabilities.shape[-1]).sum(1).to(probabilities.dtype)
    return of_tokens + factor * probabilities.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def error(case: Case) -> float:
    """Return the largest error of any window on any process."""
    model = case.model().to(case.dtype)
    rows = rows_of(case)
    loss = None if case.loss is None else case.loss(model)
    modules = {"": model, **({"loss_fn.": loss.to(case.dtype)} if isinstance(loss, nn.Module) else {})}
    plain = copy.deepcopy(modules)
    if "loss_fn." in plain:
        plain["loss_fn."].load_state_dict(gather_object([plain["loss_fn."].state_dict()])[0])
    own = plain.get("loss_fn.", loss)
    if case.loss is of_model:
        own = of_model(plain[""])
    recorder: list[Recorder] = []

    def make(groups: Any) -> Recorder:
        recorder.append(Recorder(groups, modules, loss))
        return recorder[0]

    window: dict[str, Any] = (
        {} if loss is None else {"loss_over": "window", "loss_fn": loss, "loss_inputs": case.inputs}
    )
    sizes = {"batch_size": 2, "effective_batch_size": 8}
    arguments = {"gradient_clip_norm": None, "audit": False} | sizes | window | dict(case.arguments)
    with all_in_float64() if case.dtype == torch.float64 else nullcontext():
        test_fine_tuning(
            model, train_data=rows, optimizer=make, validation_split=0.0, n_epochs=1, progress=False,
            verbosity="quiet", **arguments,
        )  # fmt: skip
        return max(gather_object(_errors(case, plain, own, rows, recorder[0], arguments)))


def _errors(
    case: Case, plain: Mapping[str, nn.Module], loss: Any, rows: Sequence[Row], recorder: Recorder, arguments: Any
) -> list[float]:
    found = recorder.gradients
    windows = windows_of(rows, 2, **arguments)
    assert len(found) == len(windows) > 2
    assert len({len(w) for w in windows}) == 2, "there is a remainder"
    drawn = [tuple(each.tolist()[:1]) for each in recorder.drawn]
    assert len(set(drawn)) == len(drawn), "each window draws its own numbers"
    errors = []
    for n, window in enumerate(windows):
        if recorder.masks[n]:
            plain[""].masks = {**recorder.masks[n], -1: torch.ones(())}  # type: ignore[assignment]
        if recorder.drawn:
            loss.given = recorder.drawn[n]
        expected = wanted(case, plain, loss, window)
        assert found[n].keys() == expected.keys(), found[n].keys() ^ expected.keys()
        size = max(float(g.abs().max()) for g in expected.values())
        if size < 1e-12:  # InfoNCE of a single row
            errors.append(max(float(g.abs().max()) for g in found[n].values()))
        else:
            errors.append(relative_error(found[n], expected))
            for name in ("loss_fn.log_scale", "log_scale"):
                if name in expected:
                    errors.append(relative_error({name: found[n][name]}, {name: expected[name]}))
    return errors


GROUPS = {
    "sharded": [name for name in CASES if name.startswith("sharded")],
    "whole": [name for name in CASES if not name.startswith("sharded")],
}
found = {}
for name in GROUPS.get(sys.argv[1], sys.argv[1:]):
    try:
        found[name] = error(CASES[name])
    except Exception as failure:
        raise RuntimeError(f"This failed in the case {name!r}.") from failure
if state.is_main_process:
    print("ERRORS", json.dumps(found))
state.destroy_process_group()
