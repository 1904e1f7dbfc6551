"""The loss of many labelled positions by Liger's kernels: when they run, and their numbers in Triton's interpreter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum.objective import liger_loss
from ftaccum.objective.chunked_loss import ChunkedLoss

N, H, V = 12, 8, 30
MODULE = "liger_kernel.transformers.functional"
Head = Callable[[], nn.Linear]


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = False, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    torch.manual_seed(0)
    return kind(H, V, bias=bias, dtype=dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, H, dtype=dtype, requires_grad=True), torch.randint(V, (N,))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Liger run on a CPU, and forget the function that was found."""
    monkeypatch.setattr(liger_loss, "_DEVICES", ("cpu",))
    liger_loss._function.cache_clear()
    yield
    liger_loss._function.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor] | None) -> None:
    """Install a package in place of Liger, with this function; None to install none."""
    module: Any = ModuleType(MODULE)
    module.liger_fused_linear_cross_entropy = function
    for name in ("liger_kernel", "liger_kernel.transformers", MODULE):
        monkeypatch.setitem(sys.modules, name, None if function is None else module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Install a package in place of Liger, and collect the calls of its function after the first, which tries it."""
    found: list[dict[str, Any]] = []

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if len(targets) == N:
            found.append({"types": {hidden.dtype, weight.dtype}, "bias": bias, **options})
            assert not torch.is_autocast_enabled("cpu")
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)

    install(monkeypatch, fused)
    return found


def loss_of(head: nn.Module, hidden: Tensor, targets: Tensor, size: int = 4) -> Tensor:
    loss = ChunkedLoss(head, size)(hidden, targets)
    assert loss is not None
    return loss


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_computes_the_loss_of_a_linear_layer(dtype: torch.dtype, bias: bool, calls: list[dict[str, Any]]) -> None:
    head = linear(dtype, bias=bias)
    loss_of(head, *inputs(dtype))
    (call,) = calls
    assert call["types"] == {dtype}
    assert (call["bias"] is not None) == bias
    assert call["accum_dtype"] == torch.float32


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("size", [1, 4, 10])
def test_chunks_have_about_as_many_positions_as_asked_for(size: int, calls: list[dict[str, Any]]) -> None:
    vocabulary = 480  # so large that chunks of one position have more logits than all positions have inputs
    loss_of(nn.Linear(H, vocabulary, bias=False), *inputs(), size)
    n_chunks = -(-vocabulary // (calls[0]["chunk_mem_const"] * H))  # as Liger computes it, before it rounds sizes up
    assert size / 2 <= N / n_chunks <= 2 * size


@pytest.mark.usefixtures("on_cpu")
def test_under_autocast_liger_gets_the_types_that_the_layer_would_compute_in(calls: list[dict[str, Any]]) -> None:
    head, (hidden, targets) = linear(bias=True), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(head, hidden, targets).backward()
    assert calls[0]["types"] == {torch.bfloat16}
    assert calls[0]["bias"].dtype == torch.bfloat16
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


class Doubled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


class Subclass(Tensor):
    pass


def replaced() -> nn.Linear:
    head = linear()
    head.forward = lambda hidden: F.linear(hidden, head.weight)  # type: ignore[method-assign]
    return head


def quantized() -> nn.Linear:
    head = linear()
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Subclass))
    return head


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "head", [lambda: linear(kind=Doubled), replaced, quantized], ids=["class", "forward", "weight"]
)
def test_liger_does_not_compute_the_loss_of_other_layers(head: Head, calls: list[dict[str, Any]]) -> None:
    loss_of(head(), *inputs())
    assert calls == []


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_liger_does_not_compute_the_loss_in(dtype: torch.dtype, calls: list[dict[str, Any]]) -> None:
    loss_of(linear(dtype), *inputs(dtype))
    assert calls == []


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("of_hidden", "autocast"), [(torch.float32, torch.float16), (torch.float64, torch.bfloat16)])
def test_liger_does_not_compute_the_loss_under_autocast_of(
    of_hidden: torch.dtype, autocast: torch.dtype, calls: list[dict[str, Any]]
) -> None:
    with torch.autocast("cpu", autocast):
        loss_of(linear(of_hidden), *inputs(of_hidden))
    assert calls == []


@pytest.mark.usefixtures("on_cpu")
def test_a_head_alone_gets_its_gradient_in_another_way(calls: list[dict[str, Any]]) -> None:
    head, (hidden, targets) = linear(), inputs()
    loss_of(head, hidden.detach(), targets).backward()
    assert calls == []
    assert head.weight.grad is not None


@pytest.mark.usefixtures("on_cpu")
def test_liger_also_computes_the_loss_of_an_evaluation(calls: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        loss_of(linear(), *(t.detach() for t in inputs()))
    assert len(calls) == 1


def test_liger_computes_the_loss_on_cuda_devices_only(calls: list[dict[str, Any]]) -> None:
    loss_of(linear(), *inputs())
    assert calls == []


@pytest.mark.usefixtures("on_cpu")
def test_few_positions_are_not_computed_in_chunks(calls: list[dict[str, Any]]) -> None:
    assert ChunkedLoss(linear(), N)(*inputs()) is None
    assert ChunkedLoss(linear())(*inputs()) is None
    assert calls == []


@pytest.mark.usefixtures("on_cpu")
def test_labels_out_of_range_fail(calls: list[dict[str, Any]]) -> None:
    hidden, targets = inputs()
    for label in (V, -1):
        targets[3] = label
        with pytest.raises(RuntimeError, match="out of bounds"):
            loss_of(linear(), hidden, targets)
    assert calls == []


def failing(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler.")


def older(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("function", [None, failing, older], ids=["absent", "without a compiler", "an older version"])
def test_other_ways_are_used_where_liger_is(
    function: Callable[..., Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, function)
    head, (hidden, targets) = linear(), inputs()
    assert liger_loss.liger_loss(hidden, targets, head, 4) is None
    assert loss_of(head, hidden, targets).item() == pytest.approx(F.cross_entropy(head(hidden), targets).item())


@pytest.mark.skipif(not (find_spec("liger_kernel") and find_spec("triton")), reason="needs liger_kernel and triton")
def test_loss_and_gradient_equal_those_of_all_logits_in_tritons_interpreter() -> None:
    script = Path(__file__).parent / "interpreted_liger.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    # The interpreter cuts numbers off where a GPU rounds them to bf16, so errors are twice as large.
    off = {
        (case, name): error
        for case, numbers in json.loads(ended.stdout.splitlines()[-1]).items()
        for name, error in numbers.items()
        if not error["liger"] < 3 * error["all logits"] + 1e-6
    }
    assert off == {}
