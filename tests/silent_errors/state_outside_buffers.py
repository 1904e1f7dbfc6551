"""Models and losses that keep state for the next forward pass outside of parameters and buffers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import plan, test_fine_tuning

from .case import case, update_error

N_ROWS, CLASSES = 8, 3
DEPENDS = "which the next one depends on"


class Counting(nn.Module):
    def __init__(self, *, in_training: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.calls, self.in_training = nn.Linear(4, CLASSES), 0, in_training
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.in_training:
            self.calls += 1
            return self.linear(x) * (1 + self.calls)
        return self.linear(x)


class Remembering(nn.Module):
    """A model that adds a running average of its earlier outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.average = nn.Linear(4, CLASSES), None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.linear(x)
        new = outputs.detach().mean(0)
        self.average = new if self.average is None else 0.5 * self.average + 0.5 * new
        return outputs + self.average


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def error_of(model: nn.Module, loss: Any = loss_fn) -> float:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return update_error(model, rows, lambda model: loss_fn(model(x), y), N_ROWS, loss_fn=loss)


@case(12, "`self.calls += 1` in `forward` changes what it returns", refused=f"calls.*{DEPENDS}")
def counting() -> float:
    return error_of(Counting())


@case(12, "the same in train mode alone", refused=f"calls.*{DEPENDS}")
def counting_in_train_mode() -> float:
    return error_of(Counting(in_training=True))


@case(12, "an average that is a plain attribute", refused=f"average.*{DEPENDS}")
def remembering() -> float:
    return error_of(Remembering())


@case(12, "`loss_fn` counts its calls in a closure", refused="differ by")
def counting_loss() -> float:
    calls = 0

    def annealed(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_fn(outputs, targets) * (1 + 1 / calls)

    return error_of(Net(), annealed)


@case(12, "a counter of calls that changes nothing", refused=None)
def harmless_counter() -> float:
    class Harmless(Counting):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    return error_of(Harmless())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Momentum(nn.Module):
    """A model that a copy of itself corrects. Each pass in train mode moves the copy towards the model."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.copy = Net(), Net().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for moved, p in zip(self.copy.parameters(), self.trained.parameters(), strict=True):
                moved.data = 0.9 * moved.data + 0.1 * p.data
        return 2 * self.trained(x) - self.copy(x)


@case(
    12, "a momentum encoder that `forward` moves, and that starts as a copy", refused=f"copy.linear.weight.*{DEPENDS}"
)
def momentum_encoder() -> float:
    return error_of(Momentum())


@case(12, "the same with a loss over the window", refused=f"copy.linear.weight.*{DEPENDS}")
def momentum_encoder_with_a_window_loss() -> float:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return update_error(
        Momentum(), rows, lambda model: loss_fn(model(x), y), N_ROWS, loss_fn=loss_fn, loss_over="window"
    )


class Annealing(Net):
    """A model that counts its passes in train mode in a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.data += 1
        return self.linear(x) * (1 + 1e-7 * self.calls)


@case(12, "a frozen weight counts the passes, with hardly any effect at first", refused=f"calls.*{DEPENDS}")
def counting_in_a_weight() -> float:
    return error_of(Annealing())


@case(12, "a frozen weight counts the passes, without any effect")
def harmless_counter_in_a_weight() -> float:
    class Harmless(Annealing):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return self.linear(x)

        def named_parameters(self, *args: Any, **options: Any) -> Any:  # those to compare
            return self.linear.named_parameters(*args, **options)

    return error_of(Harmless())


@case(12, "`max_norm` of an embedding, whose rows the checks must not touch")
def max_norm() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randint(9, (2,), generator=draw), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    before = model[0].weight.detach().clone()
    test_fine_tuning(
        model, train_data=rows, loss_fn=loss_fn, batch_size=2, n_epochs=1, validation_split=0.0, max_updates=1,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), weight_decay=0.0, progress=False,
    )  # fmt: skip
    (window,) = list(plan(N_ROWS, batch_size=2, n_epochs=1, validation_split=0.0, max_updates=1).windows(0))
    used = torch.cat([rows[n][0] for n in window.rows])
    unused = [n for n in range(9) if n not in used]
    return float((model[0].weight.detach() - before)[unused].abs().max())
