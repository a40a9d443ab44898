"""Modules with a process group: the numbers of the functions, and the usual behaviour of nn.Module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn

import nckernels

MODULES: dict[str, Callable[..., nn.Module]] = {
    "nonl": lambda **kw: nckernels.NONLLoss(6, 5, direction="both", **kw),
    "ntce": lambda **kw: nckernels.NTCELoss(6, 5, temperature=torch.tensor(0.3), **kw),
    "normface": lambda **kw: nckernels.NormFaceLoss(6, 5, label_smoothing=0.1, **kw),
    "supcon": lambda **kw: nckernels.SupConLoss(decoupled=True, **kw),
    "prototype": lambda **kw: nckernels.PrototypeLoss(num_classes=5, **kw),
    "info_nce": lambda **kw: nckernels.InfoNCELoss(**kw),
    "clip": lambda **kw: nckernels.CLIPLoss(**kw),
    "uniformity": lambda **kw: nckernels.UniformityLoss(**kw),
    "alignment": lambda **kw: nckernels.AlignmentLoss(**kw),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nonl": {"direction": "both"},
    "ntce": {"temperature": 0.3},
    "normface": {"label_smoothing": 0.1},
    "supcon": {"decoupled": True},
    "prototype": {"num_classes": 5},
}
HAVE_PROTOTYPES, PAIRS, UNLABELLED = ("nonl", "ntce", "normface"), ("info_nce", "clip", "alignment"), ("uniformity",)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name](**options)


def arguments(name: str, rank: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(rank)
    x, other = torch.randn(4 + rank, 6, generator=g), torch.randn(4 + rank, 6, generator=g)
    if name in PAIRS:
        return x, other
    return (x,) if name in UNLABELLED else (x, torch.randint(5, (4 + rank,), generator=g))


def values(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """Of a module, of its copies, of the function; of a module without a group."""
    found = {}
    for name in MODULES:
        module, args = build(name, process_group="world"), arguments(name, rank)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), with_group(name)]
        function = getattr(nckernels, f"{name}_loss")
        positional = (args[0], module.prototypes, args[1]) if name in HAVE_PROTOTYPES else args
        own = function(*positional, process_group="world", **OPTIONS.get(name, {}))
        found[name] = [f(*args).detach() for f in (module, *copies)] + [own.detach(), build(name)(*args).detach()]
    head = build_head(process_group="world")
    args = arguments("nonl", rank)
    criterion = nckernels.NONLLoss(prototypes=head.prototypes, process_group="world")
    found["classifier"] = [f(*args).detach() for f in (head.loss, copy.deepcopy(head).loss, criterion)]
    found["classifier"].append(build_head().loss(*args).detach())
    return found


def with_group(name: str) -> nn.Module:
    """A deep copy of a module that holds the group itself: groups are not copied."""
    module = build(name, process_group=dist.group.WORLD)
    copied = copy.deepcopy(module)
    assert copied.process_group is module.process_group is dist.group.WORLD
    return copied


def build_head(**options: Any) -> nckernels.PrototypeClassifier:
    torch.manual_seed(0)
    return nckernels.PrototypeClassifier(6, 5, loss="nonl", **options)


def test_modules_equal_the_functions(ranks2: Ranks) -> None:
    """Bit for bit, copies too; and the result differs from that without a group."""
    for found in ranks2.run(values):
        assert len(found) == len(MODULES) + 1
        for name, (first, *same, without) in found.items():
            for i, other in enumerate(same):
                assert torch.equal(first, other), (name, i)
            assert not torch.allclose(first, without), name


def logits_and_states(rank: int, world_size: int) -> list[bool]:
    """What does not depend on the group."""
    plain, grouped = build_head(), build_head(process_group="world")
    x = arguments("nonl", rank)[0]
    found = [torch.equal(plain(x), grouped(x))]
    for name in MODULES:
        one, other = build(name), build(name, process_group=dist.group.WORLD)
        found.append(one.state_dict().keys() == other.state_dict().keys())
        buffer = io.BytesIO()
        torch.save(other.state_dict(), buffer)
        buffer.seek(0)
        one.load_state_dict(torch.load(buffer))
    return found


def test_state_and_logits_do_not_depend_on_the_group(ranks2: Ranks) -> None:
    assert ranks2.run(logits_and_states) == [[True] * (len(MODULES) + 1)] * 2


@pytest.mark.parametrize("name", MODULES)
def test_repr_shows_the_group(name: str) -> None:
    """The repr has the group only if there is one."""
    assert "process_group='world'" in repr(build(name, process_group="world"))
    assert "process_group" not in repr(build(name))
    assert build(name).process_group is None


def test_repr_of_the_classifier_shows_the_group() -> None:
    assert "process_group='world'" in repr(build_head(process_group="world"))


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_built_copied_and_stored_without_processes(name: str) -> None:
    """The default group is looked up when the module is called."""
    assert not dist.is_initialized()
    module = build(name, process_group="world")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.process_group == "world"
    with pytest.raises((TypeError, ValueError), match="process_group"):
        build(name, process_group="everybody")
