"""Launches at little cost on the host.

Triton's own launch, ``kernel[grid](...)``, works out anew at every call which compiled kernel the arguments ask for.
That takes longer than many of these kernels run. Here the compiled kernel is looked up by the few things that it
depends on, and its launcher is called directly: the *direct* way, beside Triton's, the *general* way.

A specialisation goes the general way twice. The first launch compiles it. The second compares, argument by argument,
what Triton passes to the launcher with what the direct way would pass; where anything differs, that specialisation
stays with Triton. The general way is also for everything that the direct way does not know: other versions of Triton,
other devices than NVIDIA's, the interpreter, hooks, instrumentation and debugging, and arguments of other types. With
``NCKERNELS_TRITON_LAUNCH=general`` in the environment everything goes the general way.

The direct way leaves out two checks of Triton's. One is that global variables which a kernel uses still have the values
that it was compiled with: here these are constants of this package. The other is that pointers are the device's: the
arguments have been validated, and the first two launches of a specialisation still look.
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
"""The first and the last version of Triton whose specialisation is known to depend on nothing but the keys below."""


def _known() -> bool:
    """Whether launches can go the direct way: a version that is known, and nothing missing that it looks at."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2] if part.isdigit())
    if os.environ.get("NCKERNELS_TRITON_LAUNCH") == "general":
        return False
    if torch.version.hip is not None or not VERSIONS[0] <= version <= VERSIONS[1]:
        return False
    names = ("launch_enter_hook", "launch_exit_hook", "debug", "add_stages_inspection_hook")
    return all(hasattr(knobs.runtime, name) for name in names) and hasattr(knobs.compilation, "instrumentation_mode")


def _undisturbed() -> bool:
    """Whether nobody looks on: no hooks, no instrumentation, no debugging."""
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
    except AttributeError:  # a hook that is no list of hooks
        return False


KNOWN = _known()


class Options(dict[str, Any]):
    """A kernel's constexprs and compile options by name, with what was compiled for them.

    Call sites make one for each set of values and keep it, so that a launch does not look at the values again.
    """

    def __init__(self, *, warps: int = 4, stages: int = 2, **named: Any) -> None:
        super().__init__(named, num_warps=warps, num_stages=stages)
        self.compiled: dict[tuple[Any, ...], Compiled] = {}


class Form(NamedTuple):
    """What a kernel's parameters are, as its first launch showed."""

    kernel: Any
    tensors: int
    """The first so many are tensors or None. Integers follow, then constexprs."""
    read: Callable[..., tuple[int, tuple[Any, ...], tuple[Any, ...]]]
    """See ``_reader``."""
    special: tuple[int, ...]
    """The arguments that are integers which Triton specialises on."""


class Compiled:
    """One specialisation of a kernel on one device."""

    __slots__ = ("constants", "direct", "function", "head", "launch", "nested", "owner")

    def __init__(self, owner: Any, constants: tuple[Any, ...]) -> None:
        self.owner = owner
        """Triton's object, which keeps the module loaded."""
        self.launch, self.function = owner.run.launch, owner.function
        """The driver's launching function, and what it is to launch."""
        self.constants = constants
        """The values of the constexprs in the order of the kernel's parameters."""
        self.direct: bool | None = None
        """Whether the direct way passes to ``launch`` what Triton does; None: not compared yet."""
        self.head: tuple[Any, ...] = ()
        """What ``launch`` takes between the function and the kernel's arguments."""
        self.nested = False
        """Whether it takes the kernel's arguments as one tuple."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, options: Options | None = None, **named: Any) -> None:
    """Start a kernel.

    Args:
        kernel: a function under ``triton.jit``.
        grid: numbers of programs.
        args: the kernel's parameters but the constexprs: tensors or None, then integers.
        options: constexprs and compile options, ``warps`` and ``stages`` among them.
        named: the same by name, instead of ``options``; this takes longer.
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
    except (AttributeError, TypeError, struct.error):  # something else than was here at the first launch
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
    """Launch by Triton's own means; learn from it unless something disturbs."""
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
"""By the identity of the kernel, whose own hash takes long."""

_OPTIONS: dict[tuple[Any, ...], Options] = {}


def _options(named: dict[str, Any]) -> Options:
    """The options of these names and values."""
    key = (*named, *named.values(), *map(type, named.values()))
    found = _OPTIONS.get(key)
    if found is None:
        found = _OPTIONS[key] = Options(**named)
    return found


def _form(kernel: Any, args: Sequence[Any]) -> Form | None:
    """The form of a kernel by these arguments, remembered; None if the direct way cannot pass them."""
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
    """A function of so many tensors or None, and integers.

    It gives the bits that are set in any of the addresses, the dtypes, and addresses and integers together. It fails
    unless the integers have 32 bits. Written out, argument by argument, it takes half the time of a loop.
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
    """What a general launch has returned, as the direct way needs it; the constexprs begin at number ``first``."""
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
    """What Triton passes to the driver's launching function in this thread; None where that cannot be seen."""
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
    """Whether the direct way can pass the same, which ``found`` then knows how.

    Between the place of the launch and the kernel's arguments only what is the same at every launch may stand, and
    the hooks with what is meant for them. These do nothing now, and None takes their place.
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
    """Whether two lists of arguments are the same, tensors counting as their addresses."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in passed]
    return len(plain) == len(direct) and all(type(a) is type(b) and a == b for a, b in zip(plain, direct, strict=True))
