"""Loss and gradient in one step, for rows too long for the kernels that accumulate gradients on the chip.

The gradient of a mean or a sum is known, up to a factor, when the loss is. The *anchors* P, classes in the class
direction and samples in the instance direction, are contrasted with the *others* Q. A panel has some anchors with all
others, so its sums are complete. The vendor's library computes its products once, and they become entries of the
gradient before the next panel begins:

    T = P Q^T          library, or a product whose epilogue includes the next line, see engines.py
    sums, entries H    two readings of T, see triton/panel.py
    dP = H Q           library; finished at once
    dQ += H^T P        library; finished after the last panel

That is 6 M K d operations. A forward and a backward pass take 8 M K d, half of them in our own kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step, accumulation_dtype, number
from .backward import dense
from .engines import Engine, EpilogueEngine, LibraryEngine
from .kernels import StepKernels, Vectors
from .plan import StepPanels, pad16, step_panels
from .sides import Result, Side


def fits(features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
    """Whether a step takes the problem and is expected to be faster than two passes, for rows too long for the chip."""
    if features.shape[0] == 0 or spec.square or spec.direction == "both":
        return False
    return _panels(features, prototypes, spec) is not None


def _panels(features: Tensor, prototypes: Tensor, spec: Spec, epilogue: bool = False) -> StepPanels | None:
    (m, d), k = features.shape, prototypes.shape[0]
    anchors, others = (min(m, k) if spec.present_only else k, m) if spec.by_class else (m, k)
    return step_panels(anchors, others, d, features.element_size(), spec.workspace, epilogue)


def known(inputs: Inputs, reduced: Reduced) -> tuple[Inputs, Reduced, float | None]:
    """What a step is called with, in the accumulation dtype and on its device; and the inverse temperature if the host
    knows it without waiting for the device."""
    z, beta, dtype = inputs.features, inputs.inv_temperature, accumulation_dtype(inputs.features.dtype)
    if reduced.weight is not None:
        reduced = reduced._replace(weight=reduced.weight.to(dtype).contiguous())
    if isinstance(beta, Tensor) and beta.device.type != "cpu":
        return inputs._replace(inv_temperature=beta.to(device=z.device, dtype=dtype)), reduced, None
    return inputs, reduced, number(beta, z.dtype)


def step(kernels: StepKernels, reduced: Reduced, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for problems that ``fits``.

    Gradients are in the inputs' dtype, except that those of float16 are float32: they fit the range of float16 only
    after they are multiplied by the upstream gradient, which contains a gradient scaler's factor.
    """
    inputs, spec = kernels.inputs, kernels.spec
    z, w = inputs.features, inputs.prototypes
    panels = _panels(z, w, spec)
    assert panels is not None
    found = kernels.epilogue_product()
    if found is not None:
        wider = _panels(z, w, spec, epilogue=True)
        found, panels = (None, panels) if wider is None else (found, wider)
    # The rows of classes that do not occur are looked at only where ``_by_panels`` may have to mend sums over them.
    m, k = z.shape[0], w.shape[0]
    looks = spec.present_only and k <= m and panels.rows >= k and needs.features
    vectors, samples, classes = prepared(kernels, reduced, needs, looks)
    scale = None
    if z.dtype == torch.float16:
        three = torch.empty(3, dtype=torch.float32, device=z.device)
        kernels.half_scale(samples._replace(lse=None), classes._replace(lse=None), three)  # there are no lse yet
        scale = three[2:]
    for_samples, for_classes = results(samples, classes, needs, vectors)
    p, q = (for_classes, for_samples) if spec.by_class else (for_samples, for_classes)
    engine: Engine
    if found is None:
        engine = LibraryEngine(kernels, p.side, q.side, panels.rows, scale)
    else:
        engine = EpilogueEngine(*found, p.side, q.side, panels.rows, vectors.pos)
    _by_panels(kernels, engine, panels, p, q, scale, vectors)
    dot = vectors.dot
    return Step(vectors.loss, for_samples.out, for_classes.out, None if dot is None else dot.sum())


def prepared(kernels: StepKernels, reduced: Reduced, needs: Needs, looks: bool) -> tuple[Vectors, Side, Side]:
    """The vectors of a step after ``prepare_step``, and its two sides; ``looks``: whether to look for broken rows of
    the classes that do not occur."""
    inputs, spec = kernels.inputs, kernels.spec
    z, w = inputs.features, inputs.prototypes
    m, k = z.shape[0], w.shape[0]
    compacted = spec.present_only and k > m
    slots, dots = (m if compacted else k), 0
    if needs.inv_temperature:
        dots = m if needs.features else slots
    vectors = _vectors(m, k, spec, looks, reduced.mean, dots, kernels.index_dtype, z.device)
    # Atomics add in any order, which shows if weights differ within a class.
    in_order = reduced.weight is not None and torch.are_deterministic_algorithms_enabled()
    without = vectors._replace(of_class=None) if in_order else vectors
    kernels.prepare_step(reduced.weight, without, nothing_is_zero=reduced.of_nothing == 0.0)
    if in_order and vectors.of_class is not None:
        shares = vectors.share if vectors.instance_grad is None else vectors.instance_grad
        vectors.of_class.index_add_(0, inputs.target.clamp(0, k - 1), shares[:m])
    label, skip, used = vectors.mark, 0, None
    if label is not None and compacted:
        label, skip = _compact(kernels, label, m, k), -1
        used = label[m:]
    instance_lse, instance_grad = vectors.instance_lse, vectors.instance_grad
    if not spec.by_class:
        instance_lse, instance_grad = vectors.lse, vectors.share
    samples = Side(
        z, vectors.z_rnorm, True, m, inputs.target, spec.ignore_index,
        lse=instance_lse, grad=instance_grad, pos=vectors.pos_grad,
    )  # fmt: skip
    classes = Side(
        w, vectors.w_rnorm, False, slots, label, skip, compacted, unread=not looks, used=used,
        lse=vectors.lse if spec.by_class else None, grad=vectors.of_class,
    )  # fmt: skip
    return vectors, samples, classes


def results(samples: Side, classes: Side, needs: Needs, vectors: Vectors) -> tuple[Result, Result]:
    """Tensors for the wanted gradients of samples and classes. The gradient of beta is a sum over the rows of either
    side: that of the samples, if their gradient is computed anyway."""
    z, w = samples.x, classes.x
    dtype = torch.float32 if z.dtype == torch.float16 else z.dtype
    z_out = torch.empty(z.shape, dtype=dtype, device=z.device) if needs.features else None
    w_out = None
    if needs.prototypes:  # of compacted classes the kernels write only those that occur
        w_out = (torch.zeros if classes.gather else torch.empty)(w.shape, dtype=dtype, device=z.device)
    by_samples, dot = needs.features, vectors.dot
    return Result(samples, z_out, dot if by_samples else None), Result(classes, w_out, None if by_samples else dot)


def _vectors(
    m: int, k: int, spec: Spec, looks: bool, mean: bool, dots: int, index: torch.dtype, device: torch.device
) -> Vectors:  # fmt: skip
    """All vectors in one allocation of zeros, each at a multiple of 64 bytes.

    Not all of them must be zeros, but one operator less takes less time than fewer zeros.
    """
    by_class, both, marked = spec.by_class, spec.direction == "both", spec.present_only
    total, lengths = _lengths(m, k, by_class, both, k * index.itemsize // 4 if marked else 0, dots)
    # These are without the bookkeeping of views for autograd, which takes longer than the allocation.
    parts = torch.unsafe_split_with_sizes(torch.zeros(total, dtype=torch.float32, device=device), lengths)
    z_rnorm, pos, share, pos_grad, lse, other, half, w_rnorm, beta, divisor, z_broken, w_broken, mark, of_class, dot = (
        parts
    )
    return Vectors(
        z_rnorm, pos, share, pos_grad, lse, other if both else None, half if both else None, w_rnorm, beta,
        divisor if mean else None, z_broken, w_broken if looks else None,
        mark.view(index) if marked else None, of_class if by_class else None, dot if dots else None,
        # Not a part of the others, which it would keep alive.
        torch.empty((), dtype=torch.float32, device=device),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _lengths(m: int, k: int, by_class: bool, both: bool, marks: int, dots: int) -> tuple[int, list[int]]:
    of_both = m if both else 0
    lengths = [m, m, m, m, k if by_class else m, of_both, of_both, k, 1, 3, 1, 1]
    lengths += [marks, k if by_class else 0, dots]
    padded = [pad16(length) for length in lengths]
    return sum(padded), padded


def _compact(kernels: StepKernels, mark: Tensor, m: int, k: int) -> Tensor:
    """The list of the classes that occur, and its length, for more classes than samples."""
    present = torch.empty(m + 1, dtype=kernels.index_dtype, device=mark.device)
    kernels.compact(torch.cumsum(mark[:k], 0, dtype=kernels.index_dtype), present, k, m)
    return present


def _by_panels(
    kernels: StepKernels, engine: Engine, panels: StepPanels, p: Result, q: Result, scale: Tensor | None,
    vectors: Vectors,
) -> None:  # fmt: skip
    """Compute the log-sum-exps of the anchors p, both gradients and the loss."""
    x, y = p.side, q.side
    dtype, d, device = x.x.dtype, x.x.shape[1], x.x.device
    rows, block, once = panels.rows, panels.block, panels.rows >= x.slots

    def buffer(n: int, width: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor | None:
        return torch.empty(n, width, dtype=dtype, device=device) if wanted else None

    sums = torch.empty(min(block, max(rows, y.slots)), d, dtype=torch.float32, device=device)
    total = q.accumulator if q.accumulator is not None else buffer(y.slots, d, wanted=q.wanted and not once)
    # The library's products read whole matrices, in which 0 * NaN is NaN. A sum that one product completes is mended.
    # For a sum over several panels, the operand is a copy with zeros in left-out rows.
    copied = x.gather or (q.wanted and x.partial and (x.copied or not once))
    x_copy = buffer(rows, d, dtype, copied)
    finish_p = kernels.finisher(p, scale, y if y.partial else None, vectors)
    finish_q = kernels.finisher(q, scale, x if x.partial and not copied else None, vectors)
    y_rows = dense(kernels, y, 0, y.slots, None)
    for start in range(0, x.slots, rows):
        stop = min(start + rows, x.slots)
        last = stop == x.slots
        x_rows = dense(kernels, x, start, stop, x_copy)
        h = engine.entries(x_rows.matrix, start, stop)
        for begin, end, of_block, part in blocks_of(h, sums, block) if p.wanted else ():
            kernels.matmul(of_block, y_rows.matrix, part, accumulate=False)
            finish_p(part, of_block, start + begin, start + end, last and start + end == stop and not q.wanted)
        if total is not None and not last:
            kernels.matmul(h.t(), x_rows.matrix, total, accumulate=start > 0)
            continue
        for begin, end, of_block, part in blocks_of(h.t(), sums if total is None else total, block) if q.wanted else ():
            kernels.matmul(of_block, x_rows.matrix, part, accumulate=start > 0)
            finish_q(part, of_block, begin, end, end == y.slots)


def blocks_of(h: Tensor, sums: Tensor, block: int) -> Iterable[tuple[int, int, Tensor, Tensor]]:
    """Begin and end of each block of rows of h, the block, and a place for its sums: its own rows of ``sums`` if there
    are that many, else the first rows of it."""
    n = h.shape[0]
    own = sums.shape[0] == n
    if n <= block:
        return ((0, n, h, sums if own else sums[:n]),)
    begins = range(0, n, block)
    ends = (*begins[1:], n)
    rest = n - begins[-1]
    places: Iterable[Tensor] = [sums] * (len(begins) - 1) + [sums if rest == block else sums[:rest]]
    if own:
        places = torch.unsafe_split(sums, block)
    return zip(begins, ends, torch.unsafe_split(h, block), places, strict=True)
