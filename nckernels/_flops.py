"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for the operators: matrix products, as for PyTorch's.

The package does not import that module, which imports Triton. A counter that is active when an operator is to be called
is given the formulas then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def tell_counters() -> None:
    """Give the formulas to all counters that are active."""
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(known, dict):
            known.setdefault(torch.ops.nckernels.cosine_lse, _forward)
            known.setdefault(torch.ops.nckernels.cosine_lse_backward, _backward)


def _forward(*args: Any, **_: Any) -> int:
    """2 d for each similarity, M K in all.

    With ``present_only`` K is at most M, as if no two samples were of one class. Samples against themselves count as
    the whole matrix, of which a CPU computes half.
    """
    return 2 * args[0].shape[1] * _similarities(args, present_only=args[8])


def _backward(*args: Any, **_: Any) -> int:
    """2 d for each similarity in each gradient of features and prototypes, and for those that are computed once more
    because the forward pass has not kept them.

    Samples against themselves have one gradient, one product instead of two, and keep half of the matrix.
    """
    kept, present_only, symmetric, needs = args[11], args[17], args[20], args[22]
    number = _similarities(args, present_only)
    again = max(0, number - kept.numel() * (1 + symmetric))
    return int(2 * args[0].shape[1] * (number * (needs[0] + needs[1]) + again))


def _similarities(args: tuple[Any, ...], present_only: bool) -> int:
    m, k = args[0].shape[0], args[1].shape[0]
    return m * (min(m, k) if present_only else k)
