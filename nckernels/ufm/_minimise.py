"""Full-batch minimisation to the last digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ROUNDING = 1e-15
NEWTON_SIZE = 2000  # numbers of which a Hessian is worth its memory and time
_FLAT = 1e-9  # eigenvalues of a Hessian, relative to the largest, that count as 0: rotations leave the value as it is


def minimise(objective: Callable[[], Tensor], parameters: Sequence[Tensor], *, steps: int, tolerance: float) -> float:
    """Change the parameters in place until no entry of the gradient exceeds ``tolerance``; return the last value.

    L-BFGS with a strong-Wolfe line search (:class:`torch.optim.LBFGS`), started again without its memory until the
    value stands still. That may be before the gradient is as small: a line search sees the digits of the value only.
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

    It finds the digits that no line search sees. The Hessian is singular along rotations, hence the pseudo-inverse.
    Nothing happens to vectors of more than 2000 numbers.
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
