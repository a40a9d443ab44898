"""What ranks exchange, how they report differing options, and what happens if a rank fails."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import LOSSES
from ranks import Dead, Failure, Ranks
from torch import Tensor

from .global_cases import package

COLLECTIVES = re.compile("all|reduce|gather|scatter|broadcast|send|recv|barrier")


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that are called, and the bytes of the tensors that they are given, in and out."""

    def size(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    def recorded(name: str) -> Any:
        method = getattr(dist.ProcessGroup, name)

        def call(*args: object, **kwargs: object) -> object:
            log.append((name, size(args) + size(tuple(kwargs.values()))))
            return method(*args, **kwargs)

        return call

    log: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist.ProcessGroup):
            if COLLECTIVES.search(name) and callable(getattr(dist.ProcessGroup, name)):
                patch.setattr(dist.ProcessGroup, name, recorded(name))
        yield log


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nonl": ("nonl", {}),
    "nonl-instance": ("nonl", {"direction": "instance"}),
    "nonl-both": ("nonl", {"direction": "both"}),
    "ntce": ("ntce", {}),
    "normface": ("normface", {}),
    "normface-all": ("normface", {"label_smoothing": 0.1, "angular_margin": 0.2, "cosine_margin": 0.1}),
}


def traffic(rank: int, world_size: int, shapes: list[tuple[int, int, int]]) -> dict[Any, list[int]]:
    """Bytes of forward and of backward by variant, reduction and (M, K, d), after a first call that compares."""
    found = {}
    for variant, reduction, (m, k, d) in itertools.product(VARIANTS, ("none", "mean", "sum"), shapes):
        loss, options = VARIANTS[variant]
        x, w = torch.randn(m + rank, d, requires_grad=True), torch.randn(k, d, requires_grad=True)
        y = torch.randint(k, (m + rank,))
        tau = torch.tensor(0.2, requires_grad=True)
        bytes_of = []
        for _ in range(2):
            with counted() as forward:
                value = package(loss)(
                    x, w, y, temperature=tau, reduction=reduction, process_group="world", **options
                )  # fmt: skip
            with counted() as backward:
                value.sum().backward()
            bytes_of = [sum(b for _, b in log) for log in (forward, backward)]
        found[variant, reduction, (m, k, d)] = bytes_of
    return found


def test_bytes_do_not_depend_on_samples_or_dimension(ranks2: Ranks) -> None:
    """At most 100 bytes per class of sent and received tensors, and a constant."""
    shapes = [(20, 100, 8), (200, 100, 8), (20, 100, 64), (20, 200, 8), (20, 1100, 8), (20, 16_384, 8)]
    for result in ranks2.run(traffic, shapes):
        for variant, reduction in itertools.product(VARIANTS, ("none", "mean", "sum")):
            case = (variant, reduction)
            forward, backward = ([result[variant, reduction, s][i] for s in shapes] for i in range(2))
            for way in (forward, backward):
                base, samples, dimension, twice, more, most = way
                assert base == samples == dimension, case
                per_class = (twice - base) / 100
                assert more - base == 1000 * per_class, case
                assert most - base == 16_284 * per_class, case
                assert per_class <= 100, case
                assert base - 100 * per_class <= 256, case
            of_classes = variant in ("nonl", "nonl-both", "ntce")
            assert (forward[3] > forward[0]) == of_classes, case
            if reduction == "mean":
                assert forward[0] > 0, case  # the sum of the weights, at least
            # The class's upstream gradient of "mean" and "sum" is known. Where it is not linear in the samples',
            # or they have one each, it takes an exchange.
            exchange = variant == "nonl-both" or (of_classes and reduction == "none")
            assert (backward[0] > 0) == exchange, case


# --------------------------------------------------------------------------------------------------
# ranks that disagree


def call(
    name: str = "nonl",
    m: int = 6,
    k: int = 5,
    d: int = 4,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    **options: Any,
) -> Tensor:
    """A loss of random samples, with gradient."""
    x, w = (torch.randn(n, d, dtype=dtype, requires_grad=True) for n in (m, k))
    y = torch.arange(m) % k
    rows = {"clip": (x, x * 2), "info_nce": (x, x * 2), "alignment": (x, x * 2), "uniformity": (x,)}
    args = rows.get(name, (x, w, y) if name in LOSSES else (x, y))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return package(name)(*args, **{"process_group": "world", **options})


# What the last rank does differently, and what the message is to say.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "classes": ({}, {"k": 6}, r"\bK\b|prototypes|classes"),
    "dimension": ({}, {"d": 3}, r"\bd\b|columns|dimension"),
    "dimension-supcon": ({"name": "supcon"}, {"d": 3}, r"\bd\b|columns|dimension"),
    "dimension-clip": ({"name": "clip"}, {"d": 3}, r"\bd\b|columns|dimension"),
    "dtype": ({}, {"dtype": torch.float64}, "dtype|float64"),
    "dtype-supcon": ({"name": "supcon"}, {"dtype": torch.float64}, "dtype|float64"),
    "autocast": ({}, {"autocast": True}, "autocast"),
    "temperature": ({"temperature": 0.1}, {"temperature": 0.2}, "temperature"),
    "temperature-supcon": ({"name": "supcon"}, {"temperature": 0.2}, "temperature"),
    "direction": ({}, {"direction": "both"}, "direction"),
    "reduction": ({}, {"reduction": "sum"}, "reduction"),
    "reduction-clip": ({"name": "clip"}, {"reduction": "none"}, "reduction"),
    "loss": ({}, {"name": "ntce"}, "loss"),
    "loss-supcon": ({"name": "supcon"}, {"name": "prototype"}, "loss"),
    "margin": ({"name": "normface"}, {"angular_margin": 0.1}, "angular_margin"),
    "t": ({"name": "uniformity"}, {"t": 3.0}, r"agree on t\b"),
    "alpha": ({"name": "alignment"}, {"alpha": 3.0}, "alpha"),
    "empty-and-classes": ({}, {"m": 0, "k": 6}, r"\bK\b|prototypes|classes"),
}


def disagreements(rank: int, world_size: int) -> dict[str, str]:
    """In a group that knows no configuration yet: what other tests have called is compared no more."""
    group, found = dist.new_group(), {}
    for name, (common, differently, _) in DIFFERENT.items():
        try:
            value = call(process_group=group, **{**common, **(differently if rank == world_size - 1 else {})})
            found[name] = f"returned {value}"
        except ValueError as error:
            found[name] = f"ValueError: {error}"
        except Exception as error:
            raise RuntimeError(f"{name}: {error!r}") from error
    return found


def test_ranks_that_disagree_get_an_error_that_names_the_option(ranks: Ranks) -> None:
    """The error is raised on all ranks, and the ranks are in step afterwards."""
    for rank, found in enumerate(ranks.run(disagreements)):
        for name, (_, _, expected) in DIFFERENT.items():
            assert found[name].startswith("ValueError: "), (rank, name, found[name])
            assert re.search(expected, found[name].removeprefix("ValueError: ")), (rank, name, found[name])


def numbers_of_collectives(rank: int, world_size: int, check: bool) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCKERNELS_CHECK_RANKS", str(int(check)))
        call(k=5)  # by the ranks of another group
        group, found = dist.new_group(), []
        for k, temperature in ((5, 0.1), (5, 0.2), (7, 0.2)):  # a new number is no new configuration
            with counted() as log:
                call(k=k, temperature=temperature, process_group=group)
            found.append(len(log))
    return found


def test_ranks_compare_once_per_configuration(ranks2: Ranks) -> None:
    for compared, trusted in zip(
        ranks2.run(numbers_of_collectives, True), ranks2.run(numbers_of_collectives, False), strict=True
    ):
        assert trusted[0] == trusted[1] == trusted[2] > 0
        assert compared[1] == trusted[0]
        assert compared[0] == compared[2] > trusted[0]


# --------------------------------------------------------------------------------------------------
# groups


def of_other_ranks(rank: int, world_size: int) -> list[str]:
    """Errors on ranks outside of a group, while the others use it."""
    group, found = dist.new_group([0]), []
    names = ("nonl", "ntce", "normface", "supcon", "prototype", "info_nce", "clip", "alignment", "uniformity")
    for name in names:
        if rank == 0:
            call(name, process_group=group)
        else:
            with pytest.raises(ValueError, match="group") as error:
                call(name, process_group=group)
            found.append(str(error.value))
    return found


def test_a_group_without_this_rank_is_an_error(ranks2: Ranks) -> None:
    member, other = ranks2.run(of_other_ranks)
    assert (len(member), len(other)) == (0, 9)


def test_world_without_init_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was started alone is the world; one of several must initialise it, and the message says so."""
    assert not dist.is_initialized()
    launched = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    for name in launched:
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    expected = call(process_group=None)
    torch.manual_seed(0)
    assert torch.equal(call(), expected)
    for name in launched:
        monkeypatch.setenv(name, "2")
        with pytest.raises(ValueError, match="init_process_group"):
            call()
        monkeypatch.setenv(name, "1")
        torch.manual_seed(0)
        assert torch.equal(call(), expected)


@pytest.mark.parametrize("group", ["all", 3, True])
def test_invalid_groups_are_errors(group: object) -> None:
    with pytest.raises((TypeError, ValueError), match="process_group"):
        call(process_group=group)


def noisy(rank: int, world_size: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("nonl", "normface", "supcon", "prototype", "info_nce", "clip", "alignment", "uniformity"):
            call(name).sum().backward()
            call(name, reduction="none").sum().backward() if name != "uniformity" else None
    return [str(w.message) for w in caught]


def test_losses_with_a_group_do_not_warn(ranks2: Ranks) -> None:
    assert ranks2.run(noisy) == [[], []]


# --------------------------------------------------------------------------------------------------
# ranks that fail


def bad_labels(rank: int, world_size: int) -> dict[str, Exception | None]:
    """What every rank raises when the last of a pair has a label out of range; each pair tries two losses."""
    names = [("nonl", "normface"), ("prototype", "info_nce")][rank // 2]
    seconds = datetime.timedelta(seconds=2)
    groups = [[dist.new_group(pair, timeout=seconds) for pair in ([0, 1], [2, 3])][rank // 2] for _ in names]
    found: dict[str, Exception | None] = {}
    for name, group in zip(names, groups, strict=True):
        x, w = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        y = torch.tensor([0, 1, 2, 3, 4, 5 if rank % 2 else 4])
        args, options = ((x, y), {"num_classes": 5}) if name == "prototype" else ((x, w, y), {})
        found[name] = None
        try:
            package(name)(*args, process_group=group, **options)
        except Exception as error:
            found[name] = error
        dist.barrier()  # the next one together
    return found


def test_a_label_out_of_range_on_one_rank_is_an_error(ranks4: Ranks) -> None:
    """That rank raises a ValueError that names the label, the others raise any error."""
    results = ranks4.run(bad_labels)
    for other, here in (results[:2], results[2:]):
        for name in other:
            assert isinstance(here[name], ValueError), (name, here[name])
            assert re.search("target|class|label", str(here[name])), (name, here[name])
            assert isinstance(other[name], ValueError | RuntimeError), (name, other[name])


def with_a_death(rank: int, world_size: int) -> dict[str, str]:
    """Rank 1 dies between a forward and its backward pass; returns the errors of the others then and later."""
    values = {reduction: call("ntce", reduction=reduction) for reduction in ("none", "mean")}
    call("supcon")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    outcomes = {}
    attempts = {
        "backward": lambda: values["none"].sum().backward(),
        "ntce": lambda: call("ntce"),
        "normface": lambda: call("normface"),
        "supcon": lambda: call("supcon"),
        "clip": lambda: call("clip"),
    }
    for name, attempt in attempts.items():
        try:
            outcomes[name] = f"returned {attempt()}"
        except Exception as error:
            outcomes[name] = type(error).__name__
    return outcomes


def test_a_killed_rank_is_an_error_on_the_others() -> None:
    with Ranks(3, timeout=3.0) as ranks:
        first, dead, last = ranks.outcomes(with_a_death, deadline=40.0)
    assert dead == Dead(-signal.SIGKILL)
    for outcomes in (first, last):
        assert not isinstance(outcomes, Failure), outcomes
        assert len(outcomes) == 5
        for name, outcome in outcomes.items():
            assert outcome.endswith("Error"), (name, outcome)
