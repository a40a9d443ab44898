"""Argument checks: every message names the argument, what came and what was expected.

Only what the host knows is checked here (types, shapes, dtypes, devices, Python numbers, and tensors that
live on the CPU). Reading a tensor on a GPU would make the host wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import Parameter

from .backends.base import bad_target

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NUMBERS = (float, int, numbers.Real)  # NumPy's are Real and Integral too; the first two are found faster
_INTEGERS = (int, numbers.Integral)

P = ParamSpec("P")


def options_by_name(init: Callable[P, None]) -> Callable[P, None]:
    """Let the ``__init__`` of a module say what to write instead of an option without its name.

    Python's own message would name the class that has the ``__init__``, which may be a private base.
    """
    parameters = list(inspect.signature(init).parameters.values())[1:]
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    most = len(parameters) - len(options)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        given = len(args) - 1
        if given > most:
            raise TypeError(
                f"{type(args[0]).__name__} takes {most or 'no'} positional argument{'s' * (most != 1)}, got {given}; "
                f"write options with their names: {'=..., '.join(options)}=..."
            )
        init(*args, **kwargs)

    return checked


def is_tensor(name: str, value: object) -> None:
    """A plain tensor: no other type, and no DTensor, whose shards a kernel would mistake for the whole."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        trained = isinstance(value, Parameter) or name in ("prototypes", "temperature")
        instead = (_OF_A_MODULE if trained else _OF_A_BATCH) + (_OF_CLASSES if name == "prototypes" else "")
        raise TypeError(f"{name} is a DTensor, which the kernels do not take. {instead.format(name=name)}")


def is_dtensor(value: Tensor) -> bool:
    """Whether PyTorch has spread the tensor over ranks; torch.distributed need not be there to ask."""
    return type(value).__name__ == "DTensor"


# Even a replicated parameter is not simply taken for its local copy: whether its gradient has to be averaged over the
# ranks (each with a batch of its own) or is the same everywhere (one batch for all) cannot be told from plain features.
_OF_A_MODULE = (
    "FSDP2 gathers parameters while the module that was given to fully_shard runs: call that module, "
    "classifier(input, target), not a part of it and not a function with its parameter, and make modules that share a "
    "parameter before fully_shard. Otherwise gather it yourself, {name}.full_tensor(grad_placements=[Partial('avg')]) "
    "where ranks have batches of their own"
)
_OF_CLASSES = ". Prototypes that every rank has a part of for good need process_group, see docs/scaling.md"
_OF_A_BATCH = "Pass the rows of this rank, {name}.to_local(), or the whole tensor, {name}.full_tensor()"


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device (asking about the meta device is an error in PyTorch)."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def host_knows(x: Tensor) -> bool:
    """Whether there are values, and looking at them stalls nobody: a CPU's, outside of a compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x).__name__ != "FakeTensor"


def no_autocast(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast was honoured on entry; inside, dtypes are chosen with care."""
    return torch.autocast(like.device.type, enabled=False) if autocast_enabled(like) else contextlib.nullcontext()


def matrix(name: str, value: Tensor, rows: str, columns: str, sharded: bool = False) -> None:
    """A (rows, columns) float tensor; ``sharded`` lets a DTensor pass."""
    if not (sharded and is_dtensor(value)):
        is_tensor(name, value)
    if value.dim() != 2:
        hint = f"; {name}.flatten(0, -2) has that shape" if value.dim() > 2 else ""
        raise ValueError(f"{name} must have shape ({rows}, {columns}), got {tuple(value.shape)}{hint}")
    floating(name, value)


def features(name: str, value: Tensor) -> None:
    """A (..., d) float tensor."""
    is_tensor(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have shape (N, d) or (..., d), got ()")
    floating(name, value)


def floating(name: str, value: Tensor) -> None:
    """A dense tensor of a dtype that the kernels have."""
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; {name}.to_dense() is one")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be of a floating dtype (float32, bfloat16, float16, float64), got {value.dtype}")


def some_columns(name: str, value: Tensor) -> None:
    """A tensor whose rows have at least one number."""
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have d >= 1 columns, got {tuple(value.shape)}")


def features_and_prototypes(
    features: Tensor,
    prototypes: Tensor,
    feature_name: str = "features",
    prototype_name: str = "prototypes",
    sharded: bool = False,
) -> None:
    """(M, d) and (K, d), K and d at least 1, one device and one dtype, at least after autocast.

    The prototypes may be a DTensor where they may be ``sharded``.
    """
    matrix(feature_name, features, "M", "d")
    matrix(prototype_name, prototypes, "K", "d", sharded)
    same_columns(feature_name, features, prototype_name, prototypes)
    if prototypes.shape[0] == 0:
        raise ValueError(f"{prototype_name} must have K >= 1 rows, got {tuple(prototypes.shape)}")
    same_device(feature_name, features, prototype_name, prototypes)
    dtypes = features.dtype, prototypes.dtype
    if dtypes[0] != dtypes[1] and (torch.float64 in dtypes or not autocast_enabled(features)):
        raise TypeError(
            f"{feature_name} and {prototype_name} must have the same dtype (under autocast, which "
            f"leaves float64 alone, float32 and smaller may mix), got {features.dtype} and {prototypes.dtype}"
        )


def same_columns(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """(..., d) and (K, d), d at least 1."""
    if value.shape[-1] != other.shape[1]:
        maps = value.dim() > 2 and value.shape[1] == other.shape[1]  # (B, d, H, W), as F.cross_entropy takes them
        hint = f"; the d columns come last, {name}.movedim(1, -1)" if maps else ""
        raise ValueError(
            f"{name} and {other_name} must have the same number of columns d, "
            f"got {tuple(value.shape)} and {tuple(other.shape)}{hint}"
        )
    some_columns(name, value)


def columns(name: str, value: Tensor, d: int, of: str) -> None:
    """A (..., d) tensor."""
    is_tensor(name, value)
    if value.shape[-1:] != (d,):
        raise ValueError(f"{name} must have d={d} columns, as {of}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on the same device, got {value.device} and {other.device}")


def target(value: Tensor, features: Tensor, feature_name: str = "features", name: str = "target") -> Tensor:
    """(M,) integers on the device of the features, as int64. Values are checked where the kernels read them."""
    indices = class_indices(value, name)
    if value.shape != features.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({features.shape[0]},), one class index per row of {feature_name}, "
            f"got {tuple(value.shape)}{_hint(value)}"
        )
    same_device(name, value, feature_name, features)
    return indices


def class_indices(value: Tensor, name: str = "target") -> Tensor:
    """Integers, as int64: smaller ones wrap around where they are compared with numbers that they cannot hold. (For
    uint8, 156 == -100.)"""
    is_tensor(name, value)
    if value.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name} must hold class indices of an integer dtype (int64), got {value.dtype}{_hint(value)}")
    return value if value.dtype == torch.int64 else value.long()


def _hint(target: Tensor) -> str:
    """What to do about targets that F.cross_entropy or others take in this form."""
    if target.dim() > 1:
        return (
            "; one-hot rows and class probabilities are not taken: give argmax(-1), or for a mixture of classes, as in "
            "mixup, the weighted sum of their losses"
        )
    if target.dtype in _INTEGER_DTYPES:
        return ""
    return f"; target.long() makes indices of {'booleans' if target.dtype == torch.bool else 'whole numbers'}"


def leading(name: str, value: Tensor, features: Tensor, what: str) -> None:
    """A tensor of the shape of features (..., d) without their last dimension."""
    is_tensor(name, value)
    if value.shape != features.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(features.shape[:-1])}, {what} per feature of input (..., d) with shape "
            f"{tuple(features.shape)}, got {tuple(value.shape)}"
        )


def in_classes(target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Values of ``target`` in [0, num_classes) or ``ignore_index``, where looking at them stalls nobody."""
    if not host_knows(target):
        return
    if target.numel():
        least, most = target.aminmax()
        if int(least) >= 0 and int(most) < num_classes:  # for the sake of small batches
            return
    good = (target >= 0) & (target < num_classes)
    if ignore_index is not None:
        good |= target == ignore_index
    if not bool(good.all()):
        raise bad_target(target, num_classes, ignore_index)


def vector(name: str, value: Tensor, size: int, like: Tensor) -> None:
    """A (size,) float tensor on the device of ``like``."""
    is_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be of a floating dtype, as {name}.float() is, got {value.dtype}")
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the same device as the features, {like.device}, got {value.device}")


def finite(name: str, value: Tensor, *, wait: bool = False) -> None:
    """No inf or NaN, where looking for them stalls nobody, or on any device for callers that ``wait`` for it anyway."""
    if (wait or host_knows(value)) and not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got inf or NaN")


def not_negative(name: str, value: Tensor) -> None:
    """No value below 0, where looking at them stalls nobody."""
    if not host_knows(value):
        return
    bad = value.detach() < 0
    if bool(bad.any()):
        raise ValueError(f"{name} must not be negative, got {float(value.detach()[bad][0])}")


def positive_scalar(name: str, value: float | Tensor, like: Tensor) -> None:
    """A finite number > 0, or a 0-dimensional float tensor on the device of ``like``."""
    if isinstance(value, Tensor):
        is_tensor(name, value)
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dimensional tensor, got shape {tuple(value.shape)}")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating dtype, got a tensor of {value.dtype}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on the same device as the features, {like.device}, got {value.device}")
        if not host_knows(value):
            return  # the value is checked where it is read, see operators._check_values
        value = float(value.detach())
    number(name, value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def sparse(value: bool, direction: str) -> None:
    """Sparse gradients need a loss that leaves most classes alone."""
    if value and direction != "class":
        raise ValueError(f"sparse=True needs direction='class', got {direction!r}, which touches every class")


def sampling(class_fraction: float, label_smoothing: float, sparse: bool) -> None:
    """The part of the classes in a softmax, and what goes with it."""
    number("class_fraction", class_fraction)
    if not 0.0 < class_fraction <= 1.0:
        raise ValueError(f"class_fraction must be above 0 and at most 1, got {class_fraction}")
    if class_fraction < 1.0 and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} needs all classes, class_fraction=1, got {class_fraction}")
    if sparse and class_fraction == 1.0:
        raise ValueError("sparse=True needs class_fraction below 1: the whole softmax touches every class")


def temperature(value: float | Tensor, like: Tensor) -> None:
    """A :func:`positive_scalar`, or a tensor of shape (1,): ``fully_shard`` takes no 0-dimensional parameters."""
    if isinstance(value, Tensor):
        is_tensor("temperature", value)
        value = value.reshape(()) if value.shape == (1,) else value
    positive_scalar("temperature", value, like)


def number(name: str, value: object) -> None:
    """A number, Python's or NumPy's (no bool, no array, no tensor)."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """A number in [low, high]."""
    number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")


def integer(name: str, value: object) -> None:
    """An integer, Python's or NumPy's (no bool, no tensor)."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def positive_integer(name: str, value: object) -> None:
    """An integer of at least 1."""
    integer(name, value)
    if int(value) < 1:  # type: ignore[call-overload]
        raise ValueError(f"{name} must be at least 1, got {value}")


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of the given strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
