"""Kernel launches with little overhead on the host.

Triton's own launch, ``kernel[grid](...)``, determines the compiled kernel for its arguments anew in every call, which
takes longer than many of these kernels run. A *direct* launch finds the compiled kernel by a short key and calls its
launcher. A *general* launch is Triton's.

The first two launches of a specialisation are general. The first one compiles it. The second one compares the arguments
that Triton passes to the launcher with those of a direct launch; if any differ, the specialisation stays with general
launches. Launches are also general with other versions of Triton, devices that are not NVIDIA's, the interpreter,
hooks, instrumentation, debugging, and arguments of other types, and with ``NCKERNELS_TRITON_LAUNCH=general`` in the
environment.

A direct launch omits two of Triton's checks. One is that the global variables of a kernel still have the values that it
was compiled with; here they are constants of this package. The other is that pointers belong to the device; the
arguments have been validated, and the first two launches of a specialisation check them.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.runtime.driver import driver

VERSIONS = ((3, 6), (3, 9))
"""The first and last version of Triton whose specialisation is known to depend only on the keys below."""


def _known() -> bool:
    """Whether direct launches are possible: a known version of Triton with the attributes that they read."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2] if part.isdigit())
    if os.environ.get("NCKERNELS_TRITON_LAUNCH") == "general":
        return False
    if torch.version.hip is not None or not VERSIONS[0] <= version <= VERSIONS[1]:
        return False
    names = ("launch_enter_hook", "launch_exit_hook", "debug", "add_stages_inspection_hook")
    return all(hasattr(knobs.runtime, name) for name in names) and hasattr(knobs.compilation, "instrumentation_mode")


def _undisturbed() -> bool:
    """Whether there are no hooks, no instrumentation and no debugging."""
    runtime = knobs.runtime
    begin, end = runtime.launch_enter_hook, runtime.launch_exit_hook
    try:
        return not (
            (begin is not None and begin.calls)
            or (end is not None and end.calls)
            or runtime.debug
            or runtime.add_stages_inspection_hook is not None
            or knobs.compilation.instrumentation_mode
        )
    except AttributeError:  # a hook that is not a list of hooks
        return False


KNOWN = _known()


class Options(dict[str, Any]):
    """A kernel's constexprs and compile options by name, with the specialisations compiled for them.

    Call sites create one object for each set of values and reuse it, so that a launch need not compare the values.
    """

    def __init__(self, *, warps: int = 4, stages: int = 2, **named: Any) -> None:
        super().__init__(named, num_warps=warps, num_stages=stages)
        self.compiled: dict[tuple[Any, ...], Compiled] = {}


class Form(NamedTuple):
    """The kinds of a kernel's parameters, learnt from its first launch."""

    kernel: Any
    tensors: int
    """The number of leading parameters that are tensors or None. Integers follow, then constexprs."""
    read: Callable[..., tuple[int, tuple[Any, ...], tuple[Any, ...]]]
    """See ``_reader``."""
    special: tuple[int, ...]
    """The indices of the integer arguments that Triton specialises on."""


class Compiled:
    """One specialisation of a kernel on one device."""

    __slots__ = ("constants", "direct", "function", "head", "launch", "nested", "owner")

    def __init__(self, owner: Any, constants: tuple[Any, ...]) -> None:
        self.owner = owner
        """Triton's object, which keeps the module loaded."""
        self.launch, self.function = owner.run.launch, owner.function
        """The driver's launch function, and the compiled function to launch."""
        self.constants = constants
        """The values of the constexprs in the order of the kernel's parameters."""
        self.direct: bool | None = None
        """Whether a direct launch passes the same arguments to ``launch`` as Triton; None: not yet compared."""
        self.head: tuple[Any, ...] = ()
        """The arguments of ``launch`` between the function and the kernel's arguments."""
        self.nested = False
        """Whether ``launch`` takes the kernel's arguments as one tuple."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, options: Options | None = None, **named: Any) -> None:
    """Start a kernel.

    Args:
        kernel: a function under ``triton.jit``.
        grid: numbers of programs.
        args: the kernel's parameters but the constexprs: tensors or None, then integers.
        options: constexprs and compile options, ``warps`` and ``stages`` among them.
        named: the same by name, instead of ``options``; slower.
    """
    if options is None:
        options = _options(named)
    form = _FORMS.get(id(kernel)) or _form(kernel, args)
    if form is None:
        kernel[grid](*args, **options)
        return
    _, tensors, read, special = form
    active = driver.active
    device = active.get_current_device()
    try:
        bits, kinds, values = read(*args)
    except (AttributeError, TypeError, struct.error):  # other argument types than in the first launch
        kernel[grid](*args, **options)
        return
    at: tuple[Any, ...] = (id(kernel), device, kinds)
    if bits & 15:
        at += (tuple(pointer is None or pointer & 15 == 0 for pointer in values[:tensors]),)
    if special:
        at += tuple((values[i] == 1, values[i] & 15 == 0) for i in special)
    found = options.compiled.get(at)
    if found is None or not found.direct or kernel.pre_run_hooks or not _undisturbed():
        _general(kernel, grid, args, options, at, values)
        return
    sizes = len(grid)
    x, y, z = grid[0], grid[1] if sizes > 1 else 1, grid[2] if sizes > 2 else 1
    stream = active.get_current_stream(device)
    if found.nested:
        found.launch(x, y, z, stream, found.function, *found.head, (*values, *found.constants))
    else:
        found.launch(x, y, z, stream, found.function, *found.head, *values, *found.constants)


def _general(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    options: Options,
    at: tuple[Any, ...],
    values: tuple[Any, ...],
) -> None:
    """Launch through Triton, and learn from that unless hooks or debugging are active."""
    found = options.compiled.get(at)
    if kernel.pre_run_hooks or not _undisturbed() or (found is not None and found.direct is not None):
        kernel[grid](*args, **options)
    elif found is None:
        found = _compiled(kernel, kernel[grid](*args, **options), len(args), options)
        if found is not None:
            options.compiled[at] = found
    else:
        passed = _passed(found, lambda: kernel[grid](*args, **options))
        if passed is not None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            where = (*(*grid, 1, 1)[:3], stream, found.function)
            found.direct = _agrees(found, passed, where, (*values, *found.constants))


_FORMS: dict[int, Form] = {}
"""By the id of the kernel, because its own hash is slow."""

_OPTIONS: dict[tuple[Any, ...], Options] = {}


def _options(named: dict[str, Any]) -> Options:
    """The cached ``Options`` object for these names and values."""
    key = (*named, *named.values(), *map(type, named.values()))
    found = _OPTIONS.get(key)
    if found is None:
        found = _OPTIONS[key] = Options(**named)
    return found


def _form(kernel: Any, args: Sequence[Any]) -> Form | None:
    """The form of a kernel, learnt from these arguments and stored; None if direct launches cannot pass them."""
    if not KNOWN or type(kernel) is not triton.JITFunction or not hasattr(kernel, "pre_run_hooks"):
        return None
    tensors = 0
    while tensors < len(args) and (args[tensors] is None or isinstance(args[tensors], Tensor)):
        tensors += 1
    numbers, parameters = args[tensors:], kernel.params
    constexprs = [parameter.is_constexpr for parameter in parameters]
    if constexprs != sorted(constexprs) or constexprs.count(False) != len(args) or set(map(type, numbers)) - {int}:
        return None
    special = tuple(i for i in range(tensors, len(args)) if not parameters[i].do_not_specialize)
    form = _FORMS[id(kernel)] = Form(kernel, tensors, _reader(tensors, len(numbers)), special)
    return form


@cache
def _reader(tensors: int, numbers: int) -> Callable[..., tuple[int, tuple[Any, ...], tuple[Any, ...]]]:
    """A function that reads the given numbers of tensors (or None) and integers.

    It returns the bitwise or of the addresses, the dtypes, and the addresses and integers as one tuple. It raises an
    error for integers of more than 32 bits. The unrolled code takes half the time of a loop.
    """
    x, n = [f"x{i}" for i in range(tensors)], [f"n{i}" for i in range(numbers)]
    lines = [f"def read({', '.join(x + n)}):", f"    pack({', '.join(n)})", "    bits = 0"]
    for i in range(tensors):
        lines += [
            f"    if x{i} is None:",
            f"        p{i} = k{i} = None",
            "    else:",
            f"        p{i}, k{i} = x{i}.data_ptr(), x{i}.dtype",
            f"        bits |= p{i}",
        ]
    kinds, values = (f"k{i}, " for i in range(tensors)), (f"{name}, " for name in [f"p{i}" for i in range(tensors)] + n)
    lines.append(f"    return bits, ({''.join(kinds)}), ({''.join(values)})")
    space: dict[str, Any] = {"pack": struct.Struct(f"{numbers}i").pack}
    exec("\n".join(lines), space)
    return space["read"]


def _compiled(kernel: Any, owner: Any, first: int, options: Options) -> Compiled | None:
    """The specialisation that a general launch has returned, or None if it cannot be launched directly.

    The kernel's constexprs begin at parameter ``first``.
    """
    try:
        launcher = owner.run
        scratch = launcher.global_scratch_size or launcher.profile_scratch_size
        if owner.metadata.target.backend != "cuda" or scratch or getattr(launcher, "gsan_enabled", False):
            return None
        if "launch" not in vars(launcher):  # _passed replaces it
            return None
        return Compiled(owner, tuple(options.get(p.name, p.default) for p in kernel.params[first:]))
    except (AttributeError, TypeError):
        return None


def _passed(found: Compiled, start: Callable[[], Any]) -> tuple[Any, ...] | None:
    """The arguments that Triton passes to the driver's launch function in this thread; None if not found."""
    calls = []

    def recorder(*args: Any) -> Any:
        calls.append((threading.get_ident(), args))  # other threads may launch the same kernel meanwhile
        return found.launch(*args)

    launcher = found.owner.run
    launcher.launch = recorder
    try:
        start()
    finally:
        launcher.launch = found.launch
    mine = [args for thread, args in calls if thread == threading.get_ident()]
    return mine[0] if len(mine) == 1 and len(mine[0]) > 5 else None


def _agrees(found: Compiled, passed: tuple[Any, ...], where: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    """Whether a direct launch can pass the same arguments; if so, store their layout in ``found``.

    The arguments between the function and the kernel's arguments must be the same in every launch, except for the hooks
    and their data. Without hooks these have no effect, and None replaces them.
    """
    found.nested = isinstance(passed[-1], tuple)
    end = len(passed) - (1 if found.nested else len(values))
    if not _same(passed[:5], where) or not _same(passed[-1] if found.nested else passed[end:], values):
        return False
    owner, launcher, runtime = found.owner, found.owner.run, knobs.runtime
    names = ("launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature")
    fixed = [None, owner.packed_metadata, *(getattr(launcher, name, None) for name in names)]
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    head = [None if x in hooks or isinstance(x, LazyDict) else x for x in passed[5:end]]
    found.head = tuple(head)
    return all(any(x is y for y in fixed) for x in head)


def _same(passed: Sequence[Any], direct: Sequence[Any]) -> bool:
    """Whether two lists of arguments are the same; tensors are compared by address."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in passed]
    return len(plain) == len(direct) and all(type(a) is type(b) and a == b for a, b in zip(plain, direct, strict=True))
