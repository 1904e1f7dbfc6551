"""Sums of numbers with random signs, to which large tensors are reduced without a copy of them.

The number at position i gets a random sign and is added to sum i modulo the number of sums (Charikar, Chen and
Farach-Colton, 2002). The product of two tensors' sums is on average that of the tensors themselves.
"""

import functools

import torch
from torch import Tensor

# The signs repeat after a prime number of positions, so that numbers that share a sum have different signs.
_PERIOD = (1 << 20) + 7
_SEED = 0
_LARGEST = 1 << 17  # numbers to add at once on a CPU, which fit in its cache
_LARGEST_ON_DEVICE = 1 << 20


def add_signed(sums: Tensor, numbers: Tensor, position: int = 0) -> None:
    """Add the numbers of a tensor to sums, without waiting for the device.

    Args:
        sums: the sums, in float32 or float64.
        numbers: a tensor of any shape and dtype; a sparse one takes a dense copy. A complex number counts as two.
        position: the position of the first number.
    """
    dense = numbers.to_dense() if numbers.is_sparse else numbers
    flat = (torch.view_as_real(dense) if dense.is_complex() else dense).detach().reshape(-1)
    # A product with 1 or -1 is exact in any type, and takes less time in the type of the numbers than in a wider one.
    signs, n_sums = _random_signs(sums.device, flat.dtype if flat.is_floating_point() else sums.dtype), len(sums)
    most = max(n_sums, _LARGEST if sums.device.type == "cpu" else _LARGEST_ON_DEVICE) // n_sums * n_sums
    start = 0
    while start < len(flat):
        first, sign = (position + start) % n_sums, (position + start) % _PERIOD
        left = len(flat) - start
        n = min(left, n_sums - first) if first or left < n_sums else min(most, left // n_sums * n_sums)
        signed = flat[start : start + n].to(sums.device) * signs[sign : sign + n]
        if n <= n_sums:
            sums[first : first + n] += signed.to(sums.dtype)
        else:
            sums += signed.view(-1, n_sums).sum(0, dtype=sums.dtype)
        start += n


@functools.lru_cache(maxsize=8)
def _random_signs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return random signs for a period and the longest piece after it."""
    drawn = torch.randint(0, 2, (_PERIOD,), generator=torch.Generator().manual_seed(_SEED), dtype=torch.int8)
    signs = 2 * drawn - 1
    return torch.cat([signs, signs[:_LARGEST_ON_DEVICE]]).to(device=device, dtype=dtype)
