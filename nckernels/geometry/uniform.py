"""Any number of prototypes in any dimension, as uniform as possible ([DLP] §3.2.1)."""

from __future__ import annotations

import io
import math
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..contrastive import uniformity_loss
from .frames import check_sizes, checked_dtype, cross_polytope, placed, simplex_etf
from .quality import check_potential, prototype_quality

#: Version in the names of cached files. Raise it with every change that leads to other prototypes.
RECIPE = 1

#: Problems of K^2 d up to this are optimised in float64, larger ones in float32.
DOUBLE_UP_TO = 10**9
#: Problems of K^2 d up to this are solved from several starts. Larger ones take minutes, and their minima differ less.
RESTART_UP_TO = 2**20
STARTS = 8
_HISTORY = 10  # length of the history of L-BFGS


def uniform_prototypes(
    num_classes: int,
    dim: int,
    t: float = 2.0,
    *,
    seed: int = 0,
    steps: int = 500,
    progress: bool = False,
    cache: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Unit vectors that minimise the uniformity loss over pairs of different vectors ([DLP] Eqs. 3-5).

    .. math:: \log \frac{1}{K (K - 1)} \sum_{i \neq j} e^{-t \lVert w_i - w_j \rVert^2}

    (Wang & Isola 2020.) The minimum is known for every t, and is returned in closed form with a random rotation, for

    - K <= d + 1: the simplex, :func:`simplex_etf`;
    - K = 2d: the :func:`cross_polytope`;
    - d = 2: the regular polygon, in order around the circle;
    - d = 1, where there are only two unit vectors: both of them alternately. Of three or more prototypes some coincide.

    In all other cases the loss is minimised by L-BFGS from a random start, in float64 if :math:`K^2 d \le 10^9` and in
    float32 otherwise. It has many local minima, whose values are nearly the same but whose closest pairs differ. Small
    problems (:math:`K^2 d \le 2^{20}`: a few seconds) are therefore solved from eight starts, and the result with the
    widest closest pair is returned. No K x K matrix is made: memory is the workspace (:func:`nckernels.set_workspace`)
    and about thirty times the prototypes.

    Args:
        num_classes: number of prototypes K, at least 1. One is a random direction.
        dim: dimension d, at least 1.
        t: > 0, scale of the Gaussian potential; 2 in [DLP]. A larger t puts more weight on the closest pairs: 100
            prototypes in 10 dimensions have a largest cosine of 0.36 with t = 20 and 0.43 with t = 2.
        seed: determines the starts, which are drawn on the CPU, and the rotation of closed forms. The same seed gives
            the same bits on one machine with the same versions, backend, workspace and number of threads. Otherwise
            rounding leads to another local minimum, of about the same value.
        steps: largest number, approximately, of evaluations of the loss and its gradient per start. The search ends
            earlier if the loss no longer falls within the precision of its dtype.
        progress: whether to show a bar with the loss (needs tqdm).
        cache: folder in which optimised prototypes are kept; created if missing. Files are written atomically. A file
            that cannot be read or does not fit is replaced, with a warning. A file serves every ``dtype`` and
            ``device``. Closed forms are not kept.
        dtype: floating-point dtype of the result, torch's default if None.
        device: device of the optimisation and the result.

    Returns:
        Tensor of shape (num_classes, dim).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        ImportError: ``progress`` without tqdm.

    Example:
        >>> w = nckernels.geometry.uniform_prototypes(20, 4)
        >>> nckernels.geometry.prototype_quality(w).max_cosine < 0.6  # 0.9 and more at random
        True
    """
    check_sizes(num_classes, dim)
    check_potential(t)
    _checks.integer("seed", seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    _checks.positive_integer("steps", steps)
    dtype = checked_dtype(dtype)
    generator = torch.Generator("cpu").manual_seed(seed)
    if num_classes <= dim + 1:
        return simplex_etf(num_classes, dim, generator=generator, dtype=dtype, device=device)
    if num_classes == 2 * dim:
        return cross_polytope(num_classes, dim, generator=generator, dtype=dtype, device=device)
    if dim == 1:
        return placed(_poles(num_classes, generator), dtype, device)
    if dim == 2:
        return placed(_polygon(num_classes, generator), dtype, device)

    where = torch.device("cpu" if device is None else device)
    if cache is None:
        rows = minimise_uniformity(
            num_classes, dim, t, generator=generator, steps=steps, progress=progress, device=where
        )
        return placed(rows, dtype, device)
    request: dict[str, object] = {
        "num_classes": num_classes,
        "dim": dim,
        "t": float(t),
        "seed": seed,
        "steps": steps,
        "recipe": RECIPE,
    }
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)  # fails now, not after the optimisation
    path = folder / f"uniform-K{num_classes}-d{dim}-t{float(t)!r}-seed{seed}-steps{steps}-v{RECIPE}.pt"
    kept = _read(path, request)
    if kept is None:
        kept = minimise_uniformity(
            num_classes, dim, t, generator=generator, steps=steps, progress=progress, device=where
        )
        _write(path, {"request": request, "prototypes": kept.cpu()})
    return placed(kept, dtype, device)


def minimise_uniformity(
    num_classes: int,
    dim: int,
    t: float = 2.0,
    *,
    generator: torch.Generator,
    steps: int = 500,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """:func:`uniform_prototypes` by optimisation, also where there is a closed form. K >= 2, d >= 2.

    Returns:
        (K, d) unit rows in the dtype of the optimisation.
    """
    cost = num_classes**2 * dim
    wide = cost <= DOUBLE_UP_TO and torch.device(device).type != "mps"
    dtype = torch.float64 if wide else torch.float32
    starts = STARTS if cost <= RESTART_UP_TO else 1
    best, narrowest = None, math.inf
    with _Bar(starts * steps if progress else 0) as bar, torch.inference_mode(False), torch.enable_grad():
        for _ in range(starts):
            start = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64, device="cpu")
            rows = _descend(_unit(start).to(device=device, dtype=dtype), t, steps, bar)
            closest = prototype_quality(rows, t).max_cosine if starts > 1 else 0.0
            if closest < narrowest:
                best, narrowest = rows, closest
    assert best is not None
    return best


def _descend(rows: Tensor, t: float, steps: int, bar: _Bar) -> Tensor:
    """The unit rows of the local minimum that L-BFGS reaches from ``rows``."""
    # The loss does not depend on the lengths of the rows. The first step of L-BFGS has a 1-norm of 1, which would
    # hardly rotate unit rows; shorter rows rotate by about a tenth of a right angle.
    w = (rows * (10.0 / rows.numel() * math.sqrt(rows.shape[1]))).requires_grad_()
    finest = 1e-13 if w.dtype == torch.float64 else 0.0
    optimiser = torch.optim.LBFGS(
        [w], max_iter=steps, max_eval=steps, history_size=_HISTORY, tolerance_grad=0.0, tolerance_change=finest,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        with _checks.no_autocast(w):
            loss = uniformity_loss(w, t=t)
            (w.grad,) = torch.autograd.grad(loss, w)
        value = loss.item()
        bar.update(value)
        return value

    optimiser.step(closure)
    return _unit(w.detach())


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _poles(num_classes: int, generator: torch.Generator) -> Tensor:
    """+1 and -1 alternately, which has the fewest coinciding pairs; the first sign is random."""
    first = torch.randn(1, generator=generator, dtype=torch.float64, device="cpu").sign()
    return (first * (-1.0) ** torch.arange(num_classes, device="cpu"))[:, None]


def _polygon(num_classes: int, generator: torch.Generator) -> Tensor:
    """The corners of a regular polygon, rotated at random."""
    turn = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
    angle = 2.0 * math.pi * (turn + torch.arange(num_classes, dtype=torch.float64, device="cpu") / num_classes)
    return torch.stack([angle.cos(), angle.sin()], 1)


class _Bar:
    """A progress bar of evaluations with the loss; nothing if ``total`` is 0."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if total:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError('progress=True needs tqdm: pip install "nckernels[lab]"') from error
            self._bar = tqdm(total=total, desc="uniform prototypes", unit="eval")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.7f}", refresh=False)
            self._bar.update()


def _read(path: Path, request: dict[str, object]) -> Tensor | None:
    """The cached prototypes of a request, or None, with a warning if the file does not hold them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken archive raises is not documented
        fault: str | None = f"it cannot be read ({type(error).__name__})"
    else:
        fault = _fault(found, request)
        if fault is None:
            return found["prototypes"]
    warnings.warn(f"nckernels: {path} is recomputed: {fault}", stacklevel=3)
    return None


def _fault(found: object, request: dict[str, object]) -> str | None:
    """Why the content of a file does not fit the request; None if it does."""
    if not isinstance(found, dict) or found.get("request") != request:
        return "it was made for another request"
    rows = found.get("prototypes")
    if not isinstance(rows, Tensor) or rows.shape != (request["num_classes"], request["dim"]):
        return "it holds no prototypes of this shape"
    if not bool(((rows.double().norm(dim=1) - 1.0).abs() < 1e-5).all()):
        return "its rows are not unit vectors"
    return None


def _write(path: Path, content: dict[str, object]) -> None:
    """Write atomically: first to a unique name, then rename."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:  # a full disk must not cost the result
        warnings.warn(f"nckernels: the prototypes could not be cached in {path}: {error}", stacklevel=3)
    finally:
        part.unlink(missing_ok=True)
