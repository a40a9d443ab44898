"""Columns in parts: what a backend owes to keys that travel between ranks (nckernels/distributed/ring.py)."""

from __future__ import annotations

import dataclasses

import torch
from oracle import make_problem, package, run, worst

from nckernels import operators
from nckernels.backends import registry
from nckernels.backends.base import Inputs, Needs, OutputGrads, Spec, accumulation_dtype


def check_in_parts(direction: str, dtype: torch.dtype, d: int, device: str = "cpu", beta: float = 10.0) -> None:
    """A problem whose columns come in two parts, as keys do from other ranks, has the gradients of the whole.

    The backward pass of each part is given the log-sum-exp over both. Positives are in the first part.
    """
    p = make_problem(37, 40, d, direction=direction, exclude="target", bias=False, beta=beta)
    p = dataclasses.replace(p, target=p.target.where(p.target < 0, p.target % 17)).to(dtype, device)
    backend = registry.resolve(p.features.device, dtype)
    scalar = p.inv_temperature.detach().to(accumulation_dtype(dtype))
    needs = Needs(True, True, True, False, False)
    parts = []
    for columns, exclude in ((slice(0, 17), "target"), (slice(17, 40), "none")):
        target = p.target if columns.start == 0 else p.target.clamp_max(0)
        inputs = Inputs(p.features.detach(), p.prototypes.detach()[columns], target, scalar, None, None)
        spec = Spec(direction, exclude, False, -100, 2**25)  # type: ignore[arg-type]
        parts.append((columns, inputs, spec, operators.forward(inputs, spec, backend)))
    whole = torch.stack([forward.instance_lse for *_, forward in parts]).logsumexp(0)
    by_class, by_instance, by_pos = (p.upstream.get(name) for name in ("class", "instance", "pos"))
    features, beta_grad, prototypes = 0.0, 0.0, []
    for columns, inputs, spec, forward in parts:
        upstream = OutputGrads(
            by_class[columns] if spec.by_class else None, by_instance, by_pos if columns.start == 0 else None
        )
        grads = operators.backward(inputs, forward._replace(instance_lse=whole), upstream, spec, backend, needs)
        assert grads.features is not None
        assert grads.inv_temperature is not None
        features, beta_grad = features + grads.features, beta_grad + grads.inv_temperature
        prototypes.append(grads.prototypes)
    _, expected = run(package, p)
    found = {"features": features, "prototypes": torch.cat(prototypes), "inv_temperature": beta_grad}  # type: ignore[arg-type]
    for name, grad in found.items():
        value = expected[name]
        assert value is not None
        error = worst((grad.double() - value.double()).abs() / value.double().abs().max())  # type: ignore[union-attr]
        # Roundings of the result, and of exponents as large as beta.
        allowed = 4 * (torch.finfo(dtype).eps + beta * torch.finfo(scalar.dtype).eps)
        assert error <= allowed, (name, error)
