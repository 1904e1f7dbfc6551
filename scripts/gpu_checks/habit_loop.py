"""A loop of accumulated batches, with and without each of some habits that should save memory or time.

The page docs/teaching/large_batch.md shows this loop and runs it on a CPU, `scripts/gpu_check` on a GPU.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

# Each habit: the loop that has it, and the loop that has not.
HABITS = {
    "del outputs, loss": ("del", "plain"),
    "empty_cache()": ("empty_cache", "plain"),
    "zero_grad(set_to_none=True)": ("plain", "set_to_none=False"),  # the default
    "pin_memory=True": ("pin_memory", "plain"),
    "num_workers=2": ("workers", "plain"),
}
LOOPS = ["plain", "del", "empty_cache", "set_to_none=False", "pin_memory", "workers"]


def digit_images(n: int, pixels: int) -> TensorDataset:
    """Return handwritten digits, enlarged from 8 × 8 pixels."""
    flat, digits = load_digits(return_X_y=True)
    images = torch.tensor(flat[:n].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    return TensorDataset(F.interpolate(images, size=(pixels, pixels)), torch.tensor(digits[:n]))


def classifier(channels: int) -> nn.Module:
    """Return a convolutional network for images of any size."""
    layers: list[nn.Module] = []
    for inputs in (1, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * channels, 10))


def train(loop: str, batch_size: int = 10, n_images: int = 80, pixels: int = 32, channels: int = 32) -> float:
    """Train for an epoch of updates of 4 batches each, and return its seconds."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(0)
    model = classifier(channels).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = digit_images(n_images, pixels)
    workers = 2 if loop == "workers" else 0
    loader = DataLoader(data, batch_size, pin_memory=loop == "pin_memory", num_workers=workers)

    started, total = time.perf_counter(), torch.zeros((), device=device)
    for n, (batch, targets) in enumerate(loader, start=1):
        inputs, targets = batch.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets) / 4
        loss.backward()
        total += loss.detach()
        if loop == "del":
            del outputs, loss
        if loop == "empty_cache":
            torch.cuda.empty_cache()
        if n % 4 == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=loop != "set_to_none=False")
    total.item()  # waits for the device
    return time.perf_counter() - started
