"""Lazy tensors: operations give what they give on plain tensors, and compute only the positions that are read."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum.runtime.lazy.tensor import LazyPass, LazyTensor
from ftaccum.runtime.lazy.value import LazyError

B, L, H = 3, 5, 8
WEIGHT = torch.randn(H, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PLACES = torch.tensor([4, 0, 2])


def hidden() -> Tensor:
    return torch.randn(B, L, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def lazy(given: Tensor) -> LazyTensor:
    return LazyPass(given).hidden


def heads(x: Tensor) -> Tensor:
    return F.linear(x, WEIGHT).view(*x.shape[:-1], -1, 4).transpose(1, 2)


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(float(L), dtype=torch.float64)[:, None] * torch.arange(1.0, H + 1, dtype=torch.float64)
    one, other = x[..., : H // 2], x[..., H // 2 :]
    return x * angles.cos() + torch.cat((-other, one), dim=-1) * angles.sin()[None]


def attended(x: Tensor, **options: Any) -> Tensor:
    found = F.scaled_dot_product_attention(heads(x), heads(2 * x), heads(x + 1), **options)
    return found.transpose(1, 2).reshape(*x.shape[:-1], -1).contiguous()


def eager_attention(x: Tensor) -> Tensor:
    scores = torch.matmul(heads(x), heads(x).transpose(2, 3)) / 2 + torch.zeros(B, 1, 1, L, dtype=torch.float64)
    weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(x.dtype)
    return (weights @ heads(x)).transpose(1, 2).flatten(2)


def rms_norm(x: Tensor) -> Tensor:
    return WEIGHT[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def mask(*shape: int) -> Tensor:
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed[..., 0] = True
    return allowed


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.gelu(F.linear(x, WEIGHT, WEIGHT[0])),
    "arithmetic": lambda x: 2 * x - x / 3 + (1 - x) * x**2 + -x,
    "operands of rows and positions": lambda x: x * torch.arange(B)[:, None, None] + torch.arange(L)[:, None],
    "norm": lambda x: F.layer_norm(x, (H,), WEIGHT[0], WEIGHT[1]),
    "root mean square norm": rms_norm,
    "rotary embedding": rotated,
    "attention": attended,
    "causal attention": lambda x: attended(x, is_causal=True),
    "mask of keys": lambda x: attended(x, attn_mask=mask(B, 1, 1, L)),
    "mask of queries and keys": lambda x: attended(x, attn_mask=mask(B, 2, L, L)),
    "one mask for all rows": lambda x: attended(x, attn_mask=mask(1, 1, L, L)),
    "eager attention": eager_attention,
    "parts of a projection": lambda x: sum(
        part * (n + 1) for n, part in enumerate(F.linear(x, WEIGHT).chunk(4, dim=-1))
    ),
    "permute": lambda x: x.view(B, L, 2, 4).permute(0, 2, 1, 3).permute(0, 2, 1, 3).reshape(B, L, H),
    "no rule: cumulative sum over positions": lambda x: (x + 1).cumsum(1) * x,
    "no rule: rows and positions joined": lambda x: (x.reshape(-1, H) @ WEIGHT).view(B, L, H) + x,
    "no rule: mean over positions": lambda x: x - x.mean(1, keepdim=True),
    "no rule: positions in another order": lambda x: x.flip(1) + x,
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda y: y[:, 0],
    "last": lambda y: y[:, -1],
    "first, kept": lambda y: y[:, :1],
    "some features": lambda y: y[:, 2, 1:3],
    "one of each row": lambda y: y[torch.arange(B), PLACES],
    "from the end": lambda y: y[torch.arange(B), PLACES - L],
    "a position twice": lambda y: y[torch.tensor([1, 0, 1]), torch.tensor([-1, 3, 4])],
    "other rows": lambda y: y[torch.tensor([2, 0, 0, 1]), torch.tensor([1, 3, 4, 1])],
    "all": lambda y: y.sum(),
    "two": lambda y: y[:, 0] + y[:, 1],
    "several": lambda y: y[:, 1:3],
    "by mask": lambda y: y[mask(B, L)],
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_and_gradients_are_those_of_plain_tensors(operation: str, read: str) -> None:
    found, gradients = [], []
    for is_lazy in (False, True):
        given = hidden().requires_grad_()
        result = READS[read](OPERATIONS[operation](lazy(given) if is_lazy else given))
        assert type(result) is Tensor
        result.square().sum().backward()
        found.append(result.detach())
        gradients.append(given.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not name.startswith("no rule")])
def test_only_the_positions_that_are_read_are_computed(operation: str) -> None:
    result = OPERATIONS[operation](lazy(hidden()))
    assert isinstance(result, LazyTensor)
    result[:, 0]
    assert result.value.is_partial


def test_a_position_has_one_dropout_mask() -> None:
    dropped = F.dropout(lazy(torch.ones(B, L, H)), 0.5) * 1.0
    assert torch.equal(dropped[:, 0], (dropped + 0)[:, 0])
    whole = F.dropout(lazy(torch.ones(B, L, H)), 0.5)
    assert torch.equal((whole * 2).sum(2)[:, 0], whole[:, 0].sum(1) * 2)


def test_a_position_that_is_read_twice_at_once_has_one_dropout_mask() -> None:
    dropped = F.dropout(lazy(torch.ones(B, L, H)), 0.5)
    one, other, again = dropped[torch.tensor([1, 2, 1]), torch.tensor([4, 0, -1])]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_dropout_of_other_positions_is_refused_once_some_were_read() -> None:
    dropped = F.dropout(lazy(torch.ones(B, L, H)), 0.5)
    dropped[:, 0]
    with pytest.raises(LazyError, match="random numbers"):
        dropped.sum()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.__setitem__((slice(None), 0), 0.0),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.add(x, 1, out=torch.empty(0)),
        lambda x: hidden().mul_(x),
    ],
)
def test_operations_in_place_are_refused(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(LazyError, match="in place"):
        change(lazy(hidden()))


def test_an_operand_that_changes_before_it_is_used_is_refused() -> None:
    operand = torch.ones(H)
    result = lazy(hidden().float()) * operand
    operand.add_(1)
    with pytest.raises(LazyError, match="changed in place"):
        result[:, 0]


def test_values_are_computed_with_the_autocast_of_the_forward_pass() -> None:
    given = hidden().float()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = F.linear(given, WEIGHT.float()), F.linear(lazy(given), WEIGHT.float())
    assert found.dtype is torch.bfloat16
    assert torch.equal(found[:, 0], wanted[:, 0])
    with torch.no_grad():
        without = F.linear(lazy(given), nn.Parameter(WEIGHT.float()))
    assert not without[:, 0].requires_grad


def test_a_call_that_passes_torch_functions_by_is_refused() -> None:
    with pytest.raises(LazyError), torch._C.DisableTorchFunctionSubclass():
        torch.add(lazy(hidden()), 1)


def test_a_function_of_autograd_is_refused() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: Tensor) -> Tensor:  # noqa: ARG004
            return 2 * given

    with pytest.raises(LazyError, match="without gradients"):
        Doubled.apply(lazy(hidden().requires_grad_()))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.register_hook(print),
        lambda x: x.retain_grad(),
        lambda x: torch.autograd.grad(x[:, 0].sum(), [x], allow_unused=True),
    ],
)
def test_gradients_of_lazy_tensors_are_refused(use: Callable[[Tensor], Any]) -> None:
    with pytest.raises(LazyError, match="in the graph"):
        use(lazy(hidden().requires_grad_()) * 2)


@pytest.mark.parametrize("convert", [lambda x, y: y.type_as(x), lambda x, y: y.to(x)])
def test_a_conversion_to_the_type_of_a_lazy_tensor_keeps_the_shape(convert: Callable[[Tensor, Tensor], Tensor]) -> None:
    converted = convert(lazy(hidden()[:1]), torch.ones(L, H))
    assert (converted.shape, converted.dtype) == ((L, H), torch.float64)


def test_results_that_are_changed_in_place_are_refused() -> None:
    doubled = lazy(hidden()) * 2
    doubled[:, 1:3].mul_(0)
    with pytest.raises(LazyError, match="changed in place"):
        doubled[:, 1]


def test_after_the_pass_a_lazy_tensor_is_as_a_plain_one() -> None:
    weight = WEIGHT.clone()
    one = LazyPass(hidden())
    result = F.linear(one.hidden, weight)
    one.close()
    weight.zero_()
    assert torch.equal(result, F.linear(hidden(), WEIGHT))
    assert result.add_(1).sum().isfinite()
    torch.zeros(B, L, H).copy_(result)


def test_a_pass_leaves_no_cycles_that_keep_hidden_states() -> None:
    gc.disable()
    try:
        given = hidden()
        kept = weakref.ref(given)
        one = LazyPass(given)
        F.linear(one.hidden, WEIGHT)[:, 0]
        one.close()
        del given, one
        assert kept() is None
    finally:
        gc.enable()
