"""Full-batch minimisation to the precision of float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ROUNDING = 1e-15
NEWTON_SIZE = 2000  # largest number of variables for which a Hessian is worth its memory and time
_FLAT = 1e-9  # relative size of a Hessian's eigenvalue that counts as 0, as along rotations, which keep the value


def minimise(objective: Callable[[], Tensor], parameters: Sequence[Tensor], *, steps: int, tolerance: float) -> float:
    """Change the parameters in place until no entry of the gradient exceeds ``tolerance``; return the last value.

    It uses L-BFGS with a strong-Wolfe line search (:class:`torch.optim.LBFGS`), restarted without its history until the
    value no longer falls. This may happen before the gradient is small enough, because a line search compares values
    only.
    """
    value = float("inf")
    for _ in range(5):
        optimiser = torch.optim.LBFGS(
            parameters, max_iter=steps, max_eval=2 * steps, tolerance_grad=tolerance, tolerance_change=_ROUNDING / 10,
            history_size=30, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = objective()
            loss.backward()
            return loss

        optimiser.step(closure)
        before, value = value, float(closure().detach())
        slope = max((float(p.grad.abs().max()) for p in parameters if p.grad is not None), default=0.0)
        if slope <= tolerance or before - value <= _ROUNDING * max(1.0, abs(value)):
            break
    return value


def polish(objective: Callable[[Tensor], Tensor], at: Tensor, *, tolerance: float) -> Tensor:
    """Newton's method from a vector close to a minimum, as long as the gradient becomes smaller.

    It is more precise than a line search, which compares values only. The Hessian is singular along rotations, so its
    pseudo-inverse is used. Vectors of more than 2000 numbers are returned unchanged.
    """
    if at.numel() > NEWTON_SIZE:
        return at
    gradient_of = torch.func.grad(objective)
    hessian_of = torch.func.jacrev(gradient_of)
    gradient = gradient_of(at)
    for _ in range(20):
        if float(gradient.abs().max()) <= tolerance:
            break
        eigenvalues, basis = torch.linalg.eigh(hessian_of(at))
        steep = eigenvalues > _FLAT * eigenvalues[-1]
        step = basis[:, steep] @ ((basis[:, steep].T @ gradient) / eigenvalues[steep])
        slope = gradient_of(at - step)
        if not slope.norm() < gradient.norm():
            break
        at, gradient = at - step, slope
    return at
