"""python -m benchmarks correctness --device cuda: every kernel on small ragged problems, against float64.

The cases cover backends, dtypes (and tf32 products of float32), masks, directions, reductions, rows that fit the chip
and rows that do not, and on GPUs loss and gradient in one step, with one panel and with several. Each case is one call
of the package and its gradients. Values and gradients are compared row by row; the error of the worst row may be at
most

    2 x that of eager PyTorch in the same dtype + a few roundings, see `allowed`

where eager PyTorch means the formulas of the reference backend, with unit rows and similarities in the dtype. Rows of
ignored samples hold NaN, which must not reach a result. With --processes, worker processes run the cases, so that
Triton compiles on several cores and a crash does not affect other cases. Exits with 1 if a case is wrong or fails.
Cases that were not reached in time are listed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import nckernels
from nckernels.backends import reference, registry, tiled
from nckernels.backends.base import Exclude, Inputs, Spec, norm_eps
from nckernels.backends.tiled import plan

from . import problems

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32, "float16": torch.float16}
BETA = 10.0
UPSTREAM = 37.0
"""The upstream gradient of a loss: not 1, and large enough to keep gradients in float16's range."""
SHORT, LONG = 72, 328
"""Row lengths whose gradients are accumulated on the chip, and not."""
SMALL_WORKSPACE = 480 << 10
"""Gives several panels in problems with long rows."""

Status = Literal["ok", "wrong", "fails", "unfinished", "not run"]


@dataclass(frozen=True)
class Case:
    """One call: the primitive (``cosine_lse``) or a loss by its name."""

    call: str
    backend: str
    dtype: str
    m: int
    k: int
    d: int
    direction: str = "class"
    exclude: str = "none"
    reduction: str = "none"
    itself: bool = False
    """Features against themselves, as one tensor."""
    present_only: bool = False
    bias: bool = False
    weighted: bool = False
    workspace: int | None = None
    one_step: bool = False
    """Loss and gradient in one step, also where two passes would be chosen."""

    @property
    def primitive(self) -> bool:
        return self.call == "cosine_lse"

    @property
    def alone(self) -> bool:
        """Whether features are compared with themselves."""
        return self.itself or self.call in ("supcon", "simclr")

    @property
    def decoupled(self) -> bool:
        """Whether SupCon sums over the negatives only."""
        return self.call == "supcon" and self.exclude == "same_label"

    def __str__(self) -> str:
        flags = [name for name in ("itself", "present_only", "bias", "weighted", "one_step") if getattr(self, name)]
        words = [self.call, self.direction, *([self.exclude] if self.primitive else [self.reduction]), *flags]
        words += ["decoupled"] if self.decoupled else []
        size = f"M={self.m} K={self.k} d={self.d}"
        workspace = "" if self.workspace is None else f" workspace={self.workspace}"
        return f"{self.backend} {self.dtype}: {' '.join(words)}, {size}{workspace}"


@dataclass
class Finding:
    """The result of a case."""

    case: Case
    status: Status
    note: str = ""
    errors: dict[str, list[float]] = field(default_factory=dict)
    """By output and gradient: the error, that of eager PyTorch, and the allowed error."""
    seconds: float = 0.0


# --- the cases ---------------------------------------------------------------------------------------------


def cases(backends: list[str], device: str) -> list[Case]:
    """The cases that a speed campaign depends on first, then the rest, alternating backends and dtypes."""
    chosen = [
        Case(p.loss, backend, "bfloat16" if device == "cuda" else "float32", p.m, p.k, p.d, reduction="mean")
        for p in (row.shrunk() for row in problems.suite("campaign", device))
        for backend in backends
    ]
    kinds = list(itertools.product(DTYPES if device == "cuda" else ("float32", "bfloat16"), backends))
    every = [list(_cases(backend, dtype)) for dtype, backend in kinds]
    chosen += [case for turn in itertools.zip_longest(*every) for case in turn if case is not None]
    return list(dict.fromkeys(chosen))


def _cases(backend: str, dtype: str) -> Iterator[Case]:
    def case(call: str, d: int, m: int = 301, k: int = 133, **options: Any) -> Case:
        return Case(call, backend, dtype, m, k, d, **options)

    for d in (LONG, SHORT):
        step = {"one_step": True} if backend in ("triton", "cuda") and d == LONG else {}
        for loss, reduction in itertools.product(("nonl", "normface"), ("mean", "sum")):
            yield case(loss, d, reduction=reduction, **step)
        yield case("ntce", d, reduction="mean", weighted=True, **step)
        yield case("nonl", d, reduction="mean", direction="instance", weighted=True, **step)
        yield case("nonl", d, reduction="mean", m=133, k=301, **step)  # absent classes
        if step:
            for loss, direction in (("nonl", "class"), ("normface", "class"), ("nonl", "instance")):
                yield case(loss, d, reduction="mean", direction=direction, workspace=SMALL_WORKSPACE, **step)
        yield case("nonl", d, reduction="mean", direction="both")
        yield case("nonl", d, reduction="none")
        itself = {"one_step": backend == "triton"}
        for reduction, exclude in (("mean", "none"), ("sum", "same_label")):
            yield case("supcon", d, k=40, reduction=reduction, exclude=exclude, **itself)
        if step:
            yield case("supcon", d, k=40, reduction="mean", workspace=SMALL_WORKSPACE // 2, **itself)
        yield case("clip", d, k=301, reduction="mean")
    for d, exclude, direction in itertools.product(
        (SHORT, LONG), ("none", "target", "self", "same_label"), ("class", "instance", "both")
    ):
        if exclude in ("none", "target"):
            yield case("cosine_lse", d, direction=direction, exclude=exclude, bias=exclude == "none")
        elif direction != "both":
            yield case("cosine_lse", d, k=301, direction=direction, exclude=exclude, itself=True)
        else:
            yield case("cosine_lse", d, k=301, direction=direction, exclude=exclude, bias=True)
    for d in (SHORT, LONG):
        yield case("cosine_lse", d, m=133, k=301, exclude="target", present_only=True)
        yield case("cosine_lse", d, direction="both", exclude="target", workspace=SMALL_WORKSPACE)
    yield case("cosine_lse", 45, direction="both", exclude="target")  # rows at odd addresses


# --- one case ----------------------------------------------------------------------------------------------


def examine(case: Case, device: torch.device) -> Finding:
    """Run a case; never raises."""
    begin = time.perf_counter()
    try:
        status, note, errors = _examine(case, device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        status, note, errors = "fails", f"{type(error).__name__}: {lines[0][:200]}", {}
    return Finding(case, status, note, errors, round(time.perf_counter() - begin, 2))


def _examine(case: Case, device: torch.device) -> tuple[Status, str, dict[str, list[float]]]:
    with ExitStack() as stack:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
        stack.callback(torch.set_float32_matmul_precision, before)
        leaves, others = _tensors(case)
        exact = _outputs(case, leaves, others, "reference", torch.device("cpu"), torch.float64)
        with mock.patch.object(reference, "cosine_lse", eager):
            plain = _outputs(case, leaves, others, "reference", device, DTYPES[case.dtype])
        if case.call == "supcon" or (not case.alone and case.exclude in ("none", "target")):
            leaves["features"][others["target"] == -100] = math.nan
        if case.workspace is not None:
            stack.enter_context(nckernels.use_workspace(case.workspace))
        steps: list[bool] = []
        if case.one_step:
            for cost in ("two_passes_cost", "two_pair_passes_cost"):
                stack.enter_context(mock.patch.object(plan, cost, return_value=math.inf))
            for panels in (plan.step_panels, plan.pair_panels):
                panels.cache_clear()
                stack.callback(panels.cache_clear)
            where, asked = (registry, "can_step") if case.alone else (tiled, "fits")
            stack.enter_context(mock.patch.object(where, asked, _noting(getattr(where, asked), steps)))
        found = _outputs(case, leaves, others, case.backend, device, DTYPES[case.dtype])
    if case.one_step and steps != [True]:
        return "wrong", "took two passes", {}
    errors = {name: [worst_row(found[name], exact[name]), worst_row(plain[name], exact[name]), 0.0] for name in exact}
    wrong = []
    for name, numbers in errors.items():
        numbers[2] = allowed(case.dtype, name, numbers[1])
        if not numbers[0] <= numbers[2]:
            wrong.append(f"{name}: error {numbers[0]:.1e}, eager {numbers[1]:.1e}, allowed {numbers[2]:.1e}")
    return ("wrong", "; ".join(wrong), errors) if wrong else ("ok", "", errors)


def _noting(function: Any, answers: list[bool]) -> Any:
    def noted(*args: Any) -> bool:
        answers.append(function(*args))
        return answers[-1]

    return noted


def allowed(dtype: str, name: str, eager_error: float) -> float:
    """Twice eager's error, plus roundings of logits of size 1 / temperature and of a gradient's 16-bit entries."""
    unit = 2.0**-11 if dtype == "tf32" else 2.0**-24
    roundings = 4 * unit if dtype == "tf32" else 8 * unit * (1 + BETA)
    if name not in ("loss", "class", "instance", "pos") and dtype in ("bfloat16", "float16"):
        roundings += 0.5 * torch.finfo(DTYPES[dtype]).eps
    return 2 * (eager_error if eager_error < 0.1 else 0.1) + roundings  # eager's error is unbounded if it overflows


def worst_row(value: Tensor, exact: Tensor) -> float:
    """Largest relative error of a row, or of an element of a vector; small rows are compared with the average size.

    Infinite if -inf is in other places, or if other values are not finite.
    """
    a, b = value.detach().cpu().double(), exact.detach().cpu()
    a, b = (x.reshape(x.shape[0] if x.dim() else 1, -1) for x in (a, b))
    finite = b.isfinite()
    if not torch.equal(a == b, (a == b) | ~finite) or not a[finite].isfinite().all():
        return math.inf
    difference = (a - b).masked_fill(~finite, 0.0).norm(dim=1)
    length = b.masked_fill(~finite, 0.0).norm(dim=1)
    scale = length.clamp_min(max(float(length.square().mean().sqrt()), 1e-30))
    return float((difference / scale).max()) if len(scale) else 0.0


def eager(inputs: Inputs, spec: Spec) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The reference's formulas with unit rows and similarities in the inputs' dtype, as a user would write them."""
    z, w, target, beta, sample_bias, class_bias = inputs
    valid = target != spec.ignore_index
    rows = torch.arange(z.shape[0], device=z.device)
    positive = rows if spec.exclude == "same_label" else target.where(valid, 0)
    z, w = (F.normalize(x, eps=norm_eps(x.dtype)) for x in (z, w))
    logits = (beta * (z @ w.T)).to(beta.dtype)
    everything = reference.allowed_entries(target, valid, w.shape[0], spec)
    class_lse = instance_lse = None
    if spec.by_class:
        biased = logits if sample_bias is None else logits + sample_bias[:, None]
        class_lse = reference.masked_logsumexp(biased, everything, dim=0)
        if spec.present_only:
            class_lse = class_lse.where(reference.present_classes(target, valid, w.shape[0]), -torch.inf)
    if spec.by_instance:
        biased = logits if class_bias is None else logits + class_bias
        instance_lse = reference.masked_logsumexp(biased, everything, dim=1)
    return class_lse, instance_lse, logits[rows, positive].where(valid, 0.0)


def _tensors(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that require grad, and the others, on the CPU; features and prototypes are rounded to their dtype."""
    generator = torch.Generator().manual_seed(case.m + case.d)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    target = torch.randint(case.k, (case.m,), generator=generator)
    if case.exclude == "same_label" or case.call == "supcon":
        target %= 40
    if case.call == "simclr":
        target = torch.arange(case.m // 2).repeat(2)
    elif case.call == "clip":
        target = torch.arange(case.m)
    else:
        target[torch.rand(case.m, generator=generator) < 0.1] = -100
    dtype = DTYPES[case.dtype]
    prototypes = randn(case.k, case.d)
    features = randn(case.m, case.d) + 0.5 * prototypes[target.clamp_min(0) % case.k]
    features *= 0.2 + torch.rand(case.m, 1, generator=generator)
    leaves = {"features": features.to(dtype)}
    if not case.alone:
        leaves["prototypes"] = prototypes.to(dtype)
    leaves["scale"] = torch.tensor(BETA if case.primitive else 1 / BETA)
    others = {"target": target}
    if case.primitive:
        if case.bias and case.direction != "instance":
            leaves["sample_bias"] = randn(case.m)
        if case.bias and case.direction != "class":
            leaves["class_bias"] = randn(case.k)
        # Positive, so that sums in the gradients do not cancel, which would amplify roundings.
        sizes = {"class": case.k, "instance": case.m, "pos": case.m}
        others |= {name: 0.1 + torch.rand(n, generator=generator) for name, n in sizes.items()}
    elif case.weighted:
        others["weight"] = torch.rand(case.k, generator=generator)
    return leaves, others


def _outputs(
    case: Case,
    leaves: dict[str, Tensor],
    others: dict[str, Tensor],
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = {"features": dtype, "prototypes": dtype}
    leaves = {
        name: x.detach().to(device, kinds.get(name, wide), copy=True).requires_grad_() for name, x in leaves.items()
    }
    others = {name: x.to(device, wide) if x.is_floating_point() else x.to(device) for name, x in others.items()}
    with nckernels.use_backend(backend):
        results = _primitive(case, leaves, others) if case.primitive else {"loss": _loss(case, leaves, others)}
        upstream = {name: others.get(name, x.new_full((), UPSTREAM)) for name, x in results.items()}
        total = sum((x.masked_fill(x == -torch.inf, 0.0) * upstream[name]).sum() for name, x in results.items())
        gradients = torch.autograd.grad(cast(Tensor, total), list(leaves.values()))
    return {name: x.detach() for name, x in results.items()} | dict(zip(leaves, gradients, strict=True))


def _primitive(case: Case, leaves: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    features, biases = leaves["features"], (leaves.get("sample_bias"), leaves.get("class_bias"))
    direction = cast(Literal["both"], case.direction)  # or another: the result is taken apart by its name
    lse, pos = nckernels.cosine_lse(
        features, features if case.itself else leaves["prototypes"], others["target"], leaves["scale"],
        direction=direction, exclude=cast(Exclude, case.exclude), present_only=case.present_only,
        logit_bias=biases if case.direction == "both" else cast(Any, biases[case.direction == "instance"]),
    )  # fmt: skip
    named = dict(zip(("class", "instance"), lse, strict=True)) if case.direction == "both" else {case.direction: lse}
    return cast(dict[str, Tensor], named | {"pos": pos})


def _loss(case: Case, leaves: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    function: Any = getattr(nckernels, f"{'supcon' if case.call == 'simclr' else case.call}_loss")
    options: dict[str, Any] = {"temperature": leaves["scale"], "reduction": case.reduction}
    if case.call == "nonl":
        options["direction"] = case.direction
    if case.call == "supcon":
        options["decoupled"] = case.decoupled
    if case.weighted:
        options["weight"] = others["weight"]
    operands = [x for name, x in leaves.items() if name != "scale"]
    return function(*operands, *([] if case.call == "clip" else [others["target"]]), **options)


# --- all cases ---------------------------------------------------------------------------------------------


def examine_all(chosen: list[Case], device: torch.device, processes: int, deadline: float) -> Iterator[Finding]:
    """Findings as they are ready; at the end, cases that were not reached by the deadline."""
    left = list(reversed(chosen))
    if processes:
        yield from _by_workers(left, device, processes, deadline)
    while left and time.monotonic() < deadline:
        yield examine(left.pop(), device)
    yield from (Finding(case, "not run", "the time is over") for case in reversed(left))


def _by_workers(left: list[Case], device: torch.device, processes: int, deadline: float) -> Iterator[Finding]:
    """Run cases from the end of ``left`` in worker processes, until it is empty or the time is over."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports torch once
    workers: dict[Connection, tuple[ForkServerProcess, Case]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, device), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = (process, left.pop())
        ours.send(workers[ours][1])

    while left and len(workers) < processes:
        start()
    while workers and (seconds := deadline - time.monotonic()) > 0:
        for connection in cast(list[Connection], wait(list(workers), seconds)):
            process, case = workers.pop(connection)
            try:
                finding = connection.recv()
            except EOFError:
                process.join()
                finding = Finding(case, "fails", f"its process died, exit code {process.exitcode}")
            yield finding
            if finding.status == "fails":  # after an error in a kernel the process cannot use the device
                process.kill()
                if left:
                    start()
            elif left:
                workers[connection] = (process, left.pop())
                connection.send(workers[connection][1])
    for process, case in workers.values():
        process.kill()
        yield Finding(case, "unfinished", "the time was over")


def _work(connection: Connection, device: torch.device) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            connection.send(examine(connection.recv(), device))
        except (EOFError, OSError):  # the parent has closed the pipe
            return


# --- the command -------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Check; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks correctness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda: cpu")
    add("--backends", nargs="+", metavar="NAME", help="those that are ready on the device")
    add("--only", nargs="+", default=[], metavar="WORD", help="only cases whose name contains one of the words")
    add("--again", type=Path, metavar="FILE", help="only cases that were not ok in this record")
    add("--processes", type=int, default=0, help="worker processes; 0: this one")
    add("--budget", type=float, default=60.0, help="seconds in all: 60")
    add("--json", type=Path, metavar="FILE", help="where to write every case")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget
    if args.device not in ("cpu", "cuda"):
        raise SystemExit(f"--device {args.device}: cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here; use --device cpu")
    device = torch.device(args.device)
    backends = args.backends or ready(device)
    if unknown := set(backends) - set(registry.BACKENDS):
        raise SystemExit(f"--backends: there is no {', '.join(sorted(unknown))}")
    chosen = [case for case in cases(backends, args.device) if any(w in str(case) for w in args.only) or not args.only]
    if args.again is not None:
        names = {case["name"] for case in json.loads(args.again.read_text())["cases"] if case["status"] != "ok"}
        chosen = [case for case in chosen if str(case) in names]
    findings: list[Finding] = []
    saved = 0.0
    found = examine_all(chosen, device, args.processes, deadline)
    with suppress(KeyboardInterrupt):
        for finding in tqdm(found, total=len(chosen), unit="case", disable=None):
            findings.append(finding)
            if finding.status in ("wrong", "fails"):
                tqdm.write(f"{finding.status}: {finding.case}: {finding.note}")
            if args.json is not None and time.monotonic() > saved + 1:  # in case the run is cut off
                save(findings, args.json)
                saved = time.monotonic()
    if args.json is not None:
        save(findings, args.json)
    print(summary(findings))
    return 1 if any(f.status in ("wrong", "fails") for f in findings) else 0


def ready(device: torch.device) -> list[str]:
    """The backends that run on the device, except ``chunked`` on a GPU, which has no kernels of ours."""
    states = registry.explain(device, torch.float32)
    gpu = device.type == "cuda"
    return [name for name in registry.BACKENDS if states[name] == "ready" and not (gpu and name == "chunked")]


_ORDER: tuple[Status, ...] = ("fails", "wrong", "unfinished", "not run", "ok")


def save(findings: list[Finding], path: Path) -> None:
    """Write JSON, failures first."""
    ordered = sorted(findings, key=lambda f: _ORDER.index(f.status))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"  {json.dumps({'name': str(f.case), **asdict(f)})}" for f in ordered)
    path.write_text(f'{{"versions": {json.dumps({"torch": torch.__version__})}, "cases": [\n{rows}\n]}}\n')


def summary(findings: list[Finding]) -> str:
    """By backend and dtype the number of cases and the largest share of the allowed error; then all failures."""
    lines = [f"{'':<20} {'cases':>6} {'ok':>6} {'largest error / allowed':>24}"]
    for kind in dict.fromkeys((f.case.backend, f.case.dtype) for f in findings):
        group = [f for f in findings if (f.case.backend, f.case.dtype) == kind]
        shares = [error / most for f in group for error, _, most in f.errors.values()]
        good = sum(f.status == "ok" for f in group)
        lines.append(f"{' '.join(kind):<20} {len(group):>6} {good:>6} {max(shares, default=math.nan):>24.2f}")
    for status in _ORDER[:-1]:
        some = [f for f in findings if f.status == status]
        shown = 20 if status in ("fails", "wrong") else 3
        lines += [f"{status}: {f.case}: {f.note}" for f in some[:shown]]
        lines += [f"{status}: {len(some) - shown} more"] if len(some) > shown else []
    return "\n".join(lines)
