"""What the losses without prototypes refuse, and whether the message says what, where and what was expected."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from contrastive_cases import MODULES
from oracle_contrastive import TEMPERATURE, package
from torch import Tensor

import nckernels


def randn(*shape: int, **kw: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(**kw)


def shape_of(*sizes: int) -> str:
    inner = ", ".join(map(str, sizes)) + (",?" if len(sizes) == 1 else "")
    return rf"[(\[]{inner}[)\]]"


N, D = 6, 4
TARGET = torch.tensor([0, 1, 2, 1, 0, 0])
VALID: dict[str, dict[str, Any]] = {
    "supcon": {"input": randn(N, D), "target": TARGET},
    "prototype": {"input": randn(N, D), "target": TARGET},
    "info_nce": {"query": randn(N, D), "key": randn(3, D), "target": TARGET},
    "clip": {"a": randn(N, D), "b": randn(N, D) + 1},
    "uniformity": {"input": randn(N, D)},
    "alignment": {"input": randn(N, D), "other": randn(N, D) + 1},
}
FIRST = {name: next(iter(arguments)) for name, arguments in VALID.items()}
NAN, INF = float("nan"), float("inf")
ALL = tuple(VALID)
TEMPERATURES = tuple(TEMPERATURE)
LABELS_OF = ("supcon", "prototype", "info_nce")
ROWS = ("supcon", "prototype")
REDUCE = tuple(n for n in ALL if n != "uniformity")
SHAPE_1D = r"1-?d|" + shape_of(N) + r"|\b6\b"


@dataclasses.dataclass(frozen=True)
class Refused:
    """Losses, arguments to replace in a valid call, and patterns: the argument, what came, what was expected."""

    id: str
    losses: tuple[str, ...]
    arguments: dict[str, Any]
    name: str
    came: str
    expected: str


REFUSED = [
    Refused("1d", ALL[:-1], {"FIRST": randn(N)}, "FIRST", shape_of(N), r"\bd\b|2"),
    Refused("1d-and-2d", ("alignment",), {"input": randn(N)}, "input", shape_of(N), "same shape"),
    Refused("0d", ("alignment",), {"input": torch.tensor(1.0), "other": torch.tensor(1.0)}, "input", r"\(\)", r"\bd\b"),
    Refused("4d", ROWS, {"input": randn(2, 3, 2, D)}, "input", shape_of(2, 3, 2, D), r"\bd\b|2|3"),
    Refused("3d", ("info_nce", "clip"), {"FIRST": randn(2, 3, D)}, "FIRST", shape_of(2, 3, D), r"\bd\b|2"),
    Refused("no-columns", ("supcon", "prototype", "uniformity"), {"FIRST": randn(N, 0)}, "FIRST", shape_of(N, 0), "1"),
    Refused("integer", ALL, {"FIRST": torch.ones(N, D, dtype=torch.int64)}, "FIRST", "int64", "float"),
    Refused("bool", ALL, {"FIRST": torch.ones(N, D, dtype=torch.bool)}, "FIRST", "bool", "float"),
    Refused("complex", ALL, {"FIRST": randn(N, D, dtype=torch.complex64)}, "FIRST", "complex64", "float"),
    Refused("list", ALL, {"FIRST": [[1.0] * D] * N}, "FIRST", "list", "[Tt]ensor"),
    Refused("numpy", ALL, {"FIRST": randn(N, D).numpy()}, "FIRST", "ndarray", "[Tt]ensor"),
    Refused("none", ALL, {"FIRST": None}, "FIRST", "None", "[Tt]ensor"),
    # operands that do not go together
    Refused("key-width", ("info_nce",), {"key": randn(3, D + 1)}, "key", shape_of(3, D + 1), shape_of(N, D) + "|4"),
    Refused("key-1d", ("info_nce",), {"key": randn(D)}, "key", shape_of(D), r"\bd\b|2"),
    Refused("key-list", ("info_nce",), {"key": [[1.0] * D]}, "key", "list", "[Tt]ensor"),
    Refused("key-none", ("info_nce",), {"key": randn(0, D)}, "key", shape_of(0, D), r"1|empty|least"),
    Refused("key-dtype", ("info_nce",), {"key": randn(3, D, dtype=torch.float64)}, "key", "float64", "float32"),
    Refused("key-meta", ("info_nce",), {"key": torch.empty(3, D, device="meta")}, "key", "meta", "cpu"),
    Refused("b-width", ("clip",), {"b": randn(N, D + 1)}, r"\bb", shape_of(N, D + 1), shape_of(N, D)),
    Refused("b-rows", ("clip",), {"b": randn(N + 1, D)}, r"\bb", shape_of(N + 1, D), shape_of(N, D)),
    Refused("b-dtype", ("clip",), {"b": randn(N, D, dtype=torch.float64)}, r"\bb", "float64", "float32"),
    Refused("b-list", ("clip",), {"b": [[1.0] * D] * N}, r"\bb", "list", "[Tt]ensor"),
    Refused("other-rows", ("alignment",), {"other": randn(5, D)}, "other", shape_of(5, D), shape_of(N, D)),
    Refused("other-width", ("alignment",), {"other": randn(N, 3)}, "other", shape_of(N, 3), shape_of(N, D)),
    Refused("other-list", ("alignment",), {"other": [[1.0] * D] * N}, "other", "list", "[Tt]ensor"),
    # targets
    Refused("target-list", LABELS_OF, {"target": TARGET.tolist()}, "target", "list", "[Tt]ensor"),
    Refused("target-2d", LABELS_OF, {"target": TARGET[:, None]}, "target", shape_of(N, 1), SHAPE_1D),
    Refused("target-0d", LABELS_OF, {"target": torch.tensor(1)}, "target", r"\(\)|\[\]", SHAPE_1D),
    Refused("target-short", LABELS_OF, {"target": TARGET[:4]}, "target", shape_of(4) + r"|\b4\b", r"\b6\b"),
    Refused("target-float", LABELS_OF, {"target": TARGET.float()}, "target", "float32", "integer|int64"),
    Refused("target-bool", LABELS_OF, {"target": TARGET.bool()}, "target", "bool", "integer|int64"),
    Refused("target-meta", LABELS_OF, {"target": TARGET.to("meta")}, "target", "meta", "cpu"),
    Refused("key-too-large", ("info_nce",), {"target": TARGET + 1}, "target", r"\b3\b", r"\[0, 3\)|\[0, 2\]|< 3"),
    Refused("key-negative", ("info_nce",), {"target": TARGET - 1}, "target", r"-1\b", r"\[0, 3\)|\[0, 2\]|>= 0"),
    Refused("prototype-none", ("prototype",), {"target": None}, "target", "None", "[Tt]ensor"),
    Refused("views-target", ROWS, {"input": randn(3, 2, D)}, "target", shape_of(N), r"\b3\b"),
    Refused("flat-none", ("supcon",), {"target": None}, "target", shape_of(N, D), r"B, V, d|views"),
    Refused(
        "one-view-none",
        ("supcon",),
        {"input": randn(N, 1, D), "target": None},
        "target|input",
        shape_of(N, 1, D),
        r"2|two",
    ),
    Refused("unequal-none", ("info_nce",), {"target": None}, "target", shape_of(3, D), shape_of(N, D)),
    Refused("ignore-float", LABELS_OF, {"ignore_index": 1.5}, "ignore_index", r"float|1\.5", "int"),
    Refused("ignore-none", LABELS_OF, {"ignore_index": None}, "ignore_index", "None", "int"),
    # temperature, weights, reduction
    Refused("tau-bool", TEMPERATURES, {"temperature": True}, "temperature", "bool|True", "number|float|Tensor"),
    Refused("tau-str", TEMPERATURES, {"temperature": "hot"}, "temperature", "str|hot", "number|float|Tensor"),
    Refused("tau-none", TEMPERATURES, {"temperature": None}, "temperature", "None", "number|float|Tensor"),
    Refused("tau-zero", TEMPERATURES, {"temperature": 0.0}, "temperature", r"\b0(\.0)?\b", "positive|> ?0|greater"),
    Refused("tau-negative", TEMPERATURES, {"temperature": -1.5}, "temperature", r"-1\.5", "positive|> ?0"),
    Refused("tau-nan", TEMPERATURES, {"temperature": NAN}, "temperature", "nan", "positive|> ?0|finite"),
    Refused("tau-inf", TEMPERATURES, {"temperature": INF}, "temperature", "inf", "finite"),
    Refused("tau-1d", TEMPERATURES, {"temperature": torch.ones(2)}, "temperature", shape_of(2), r"0-?d|scalar|\(\)"),
    Refused("tau-integer", TEMPERATURES, {"temperature": torch.tensor(3)}, "temperature", "int64", "float"),
    Refused("weight-short", TEMPERATURES, {"sample_weight": torch.ones(5)}, "sample_weight", shape_of(5), r"\b6\b"),
    Refused("weight-2d", TEMPERATURES, {"sample_weight": torch.ones(N, 1)}, "sample_weight", shape_of(N, 1), SHAPE_1D),
    Refused("weight-list", TEMPERATURES, {"sample_weight": [1.0] * N}, "sample_weight", "list", "[Tt]ensor"),
    Refused(
        "weight-integer",
        TEMPERATURES,
        {"sample_weight": torch.ones(N, dtype=torch.int64)},
        "sample_weight",
        "int64",
        "float",
    ),
    Refused(
        "weight-negative",
        TEMPERATURES,
        {"sample_weight": torch.linspace(-0.5, 1, N)},
        "sample_weight",
        r"-0\.5",
        r"non-?negative|>= ?0|negative",
    ),
    Refused(
        "weight-views",
        ROWS,
        {"input": randn(N, 2, D), "sample_weight": torch.ones(N, 2)},
        "sample_weight",
        shape_of(N, 2),
        SHAPE_1D,
    ),
    Refused("reduction", REDUCE, {"reduction": "avg"}, "reduction", "avg", "none.*mean.*sum"),
    Refused("reduction-none", REDUCE, {"reduction": None}, "reduction", "None", "none.*mean.*sum"),
    # uniformity and alignment
    Refused("one-row", ("uniformity",), {"input": randn(1, D)}, "input", shape_of(1, D), r"2|two"),
    Refused("no-row", ("uniformity",), {"input": randn(0, D)}, "input", shape_of(0, D), r"2|two"),
    *(
        Refused(f"{name}-{value}", (loss,), {name: value}, rf"\b{name}", came, expected)
        for loss, name in (("uniformity", "t"), ("alignment", "alpha"))
        for value, came, expected in (
            (0.0, r"\b0(\.0)?\b", "positive|> ?0|greater"),
            (-2.5, r"-2\.5", "positive|> ?0|greater"),
            (NAN, "nan", "positive|> ?0|finite"),
            ("two", "str|two", "number|float"),
            (None, "None", "number|float"),
        )
    ),
]


def call_with(name: str, arguments: dict[str, Any]) -> Tensor:
    given = {**VALID[name], **{FIRST[name] if k == "FIRST" else k: v for k, v in arguments.items()}}
    return package(name)(**given)


@pytest.mark.parametrize("name", ALL)
def test_the_unspoilt_calls_are_accepted(name: str) -> None:
    """Otherwise every test below could pass for a reason of its own; arguments have the contract's names."""
    assert call_with(name, {}).isfinite()
    if name in TEMPERATURES:
        assert call_with(name, {"temperature": 1, "sample_weight": torch.ones(N)}).isfinite()


@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}-{c.id}") for c in REFUSED for n in c.losses])
def test_refuses(name: str, case: Refused) -> None:
    """A ValueError or TypeError that names the argument, what came and what was expected."""
    with pytest.raises((ValueError, TypeError)) as info:
        call_with(name, case.arguments)
    message, argument = str(info.value), FIRST[name] if case.name == "FIRST" else case.name
    for what, pattern in (
        ("argument", rf"(?:{argument})\b"),
        ("what came", case.came),
        ("what was expected", case.expected),
    ):
        assert re.search(pattern, message), f"{what} ({pattern}) is missing from {message!r}"


@pytest.mark.parametrize("backend_name", ["reference", "chunked"])
def test_a_key_out_of_range_is_refused_by_every_backend(backend_name: str) -> None:
    with nckernels.use_backend(backend_name):
        with pytest.raises(ValueError, match=r"target.*\b3\b"):
            call_with("info_nce", {"target": TARGET + 1})
        assert call_with("info_nce", {"target": torch.where(TARGET == 0, 77, TARGET), "ignore_index": 77}).isfinite()


@pytest.mark.parametrize(
    ("module", "arguments", "name", "came"),
    [
        *((m, {"temperature": 0.0}, "temperature", r"\b0(\.0)?\b") for m in TEMPERATURE),
        *((m, {"reduction": "avg"}, "reduction", "avg") for m in REDUCE),
        ("uniformity", {"t": -1.5}, r"\bt\b", r"-1\.5"),
        ("alignment", {"alpha": 0.0}, "alpha", r"\b0(\.0)?\b"),
    ],
    ids=str,
)
def test_modules_refuse_bad_construction(module: str, arguments: dict[str, Any], name: str, came: str) -> None:
    """At construction, where the mistake is, not at the first batch."""
    with pytest.raises((ValueError, TypeError)) as info:
        MODULES[module](**arguments)
    for pattern in (name, came):
        assert re.search(pattern, str(info.value)), str(info.value)
