"""The modules of the losses without prototypes: the functions' numbers, their defaults, a trained temperature."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import Backend
from contrastive_cases import CASES, LABELLED, MODULES, REDUCED, build, make_case
from oracle_contrastive import TEMPERATURE, package
from torch import nn


@pytest.mark.parametrize("case", CASES)
def test_modules_equal_the_functions(backend: Backend, case: str) -> None:
    """The same options, the same numbers and gradients, bit for bit."""
    c = build(case, ignore_index=3 if case in LABELLED else -100).to(torch.float32, backend.device)
    if case in REDUCED:
        c = c.with_options(reduction="sum")
    options = {**c.options, **({} if c.temperature is None else {"temperature": float(c.temperature)})}
    module = MODULES[c.name](**options)
    results = []
    for function in (module, lambda *args: package(c.name)(*args, **options)):
        leaves = [x.clone().requires_grad_() for x in c.inputs]
        value = function(*leaves, *(() if c.target is None else (c.target,)))
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODULES)
def test_module_defaults_are_the_functions(name: str) -> None:
    c = make_case(name, 12, 5, keys=12).to(torch.float32)
    args = (*c.inputs, *(() if c.target is None else (c.target,)))
    assert torch.equal(MODULES[name]()(*args), package(name)(*args))


@pytest.mark.parametrize("name", TEMPERATURE)
def test_module_temperature(name: str) -> None:
    """A Parameter is trained, a tensor is a buffer, a number is neither; all three pickle and give one value."""
    c = make_case(name, 12, 5, keys=12).to(torch.float32)
    args = (*c.inputs, *(() if c.target is None else (c.target,)))
    tau = nn.Parameter(torch.tensor(0.3))
    modules = [MODULES[name](temperature=t) for t in (tau, torch.tensor(0.3), 0.3)]
    assert [p is tau for p in modules[0].parameters()] == [True]
    assert [list(m.parameters()) for m in modules[1:]] == [[], []]
    assert [b.item() for b in modules[1].buffers()] == [pytest.approx(0.3)]
    values = [m(*args) for m in modules]
    for value in values:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=0)
    values[0].backward()
    assert tau.grad is not None
    assert bool(tau.grad)
    for module in modules:
        assert torch.equal(pickle.loads(pickle.dumps(module))(*args), module(*args))
    state = {k: torch.full_like(v, 0.7) for k, v in modules[1].state_dict().items()}
    assert len(state) == 1
    modules[1].load_state_dict(state)
    torch.testing.assert_close(modules[1](*args), package(name)(*args, temperature=0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_their_options(name: str) -> None:
    """repr() shows what differs from a bare call."""
    option = {"uniformity": ("t", 5.5), "alignment": ("alpha", 3.5)}.get(name, ("temperature", 0.25))
    assert f"{option[0]}={option[1]}" in repr(MODULES[name](**dict([option])))
