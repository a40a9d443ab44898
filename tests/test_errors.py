"""What is refused: a ValueError or TypeError that names the argument, what came and what was expected."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Backend
from oracle import LOSSES, package_loss
from torch import Tensor, nn

import nckernels

ROOT = str(Path(nckernels.__file__).resolve().parents[1])
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, **kw: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(**kw)


@dataclasses.dataclass(frozen=True)
class Refused:
    """Arguments to replace in a valid call; patterns for the argument, what came and what was expected."""

    id: str
    arguments: dict[str, Any]
    name: str
    came: str
    expected: str

    def check(self, call: Callable[..., Any], rename: dict[str, str] | None = None) -> None:
        rename = rename or {}
        arguments = {rename.get(key, key): value for key, value in self.arguments.items()}
        with pytest.raises((ValueError, TypeError)) as info:
            call(**arguments)
        message = str(info.value)
        for what, pattern in (
            ("argument", rf"\b{rename.get(self.name, self.name)}\b"),
            ("what came", self.came),
            ("what was expected", self.expected),
        ):
            assert re.search(pattern, message), f"{what} ({pattern}) is missing from {message!r}"


def shape(*sizes: int) -> str:
    """The shape as a tuple or a list."""
    inner = ", ".join(map(str, sizes)) + (",?" if len(sizes) == 1 else "")
    return rf"[(\[]{inner}[)\]]"


M, K, D = 6, 5, 4
TARGET = torch.tensor([0, 1, 2, 3, 4, 0])

# For the primitive and for every loss; "features" and "inv_temperature" are renamed for the losses.
COMMON = [
    Refused("features-1d", {"features": randn(M)}, "features", shape(M), r"\bd\b|2"),
    Refused("features-3d", {"features": randn(2, 3, D)}, "features", shape(2, 3, D), r"\bd\b|2-?d"),
    Refused("prototypes-1d", {"prototypes": randn(D)}, "prototypes", shape(D), r"\bd\b|2"),
    Refused("prototypes-3d", {"prototypes": randn(1, K, D)}, "prototypes", shape(1, K, D), r"\bd\b|2-?d"),
    Refused("dimensions", {"prototypes": randn(K, D + 1)}, "prototypes", shape(K, D + 1), shape(M, D) + "|4"),
    Refused(
        "no-classes",
        {"prototypes": randn(0, D)},
        "prototypes",
        shape(0, D),
        r">= ?1|at least|empty|non-?zero|positive",
    ),
    Refused(
        "no-dimensions",
        {"features": randn(M, 0), "prototypes": randn(K, 0)},
        "features",
        shape(M, 0),
        r">= ?1|at least|empty|non-?zero|positive",
    ),
    Refused("features-integer", {"features": torch.ones(M, D, dtype=torch.int64)}, "features", "int64", "float"),
    Refused("features-complex", {"features": randn(M, D, dtype=torch.complex64)}, "features", "complex64", "float"),
    Refused("features-bool", {"features": torch.ones(M, D, dtype=torch.bool)}, "features", "bool", "float"),
    Refused(
        "prototypes-integer",
        {"prototypes": torch.ones(K, D, dtype=torch.int32)},
        "prototypes",
        "int32",
        "float",
    ),
    Refused("dtypes", {"prototypes": randn(K, D, dtype=torch.float64)}, "prototypes", "float64", "float32"),
    Refused("dtypes-half", {"features": randn(M, D, dtype=torch.bfloat16)}, "features", "bfloat16", "float32"),
    Refused("features-list", {"features": [[1.0] * D] * M}, "features", "list", "[Tt]ensor"),
    Refused("features-numpy", {"features": randn(M, D).numpy()}, "features", "ndarray", "[Tt]ensor"),
    Refused("features-none", {"features": None}, "features", "None", "[Tt]ensor"),
    Refused("prototypes-module", {"prototypes": nn.Linear(D, K)}, "prototypes", "Linear", "[Tt]ensor"),
    Refused("prototypes-meta", {"prototypes": torch.empty(K, D, device="meta")}, "prototypes", "meta", "cpu"),
    Refused("target-meta", {"target": TARGET.to("meta")}, "target", "meta", "cpu"),
    Refused("target-list", {"target": TARGET.tolist()}, "target", "list", "[Tt]ensor"),
    Refused("target-2d", {"target": TARGET[:, None]}, "target", shape(M, 1), shape(M) + r"|\(M,?\)|1-?d"),
    Refused("target-0d", {"target": torch.tensor(1)}, "target", r"\(\)|\[\]", shape(M) + r"|\(M,?\)|1-?d"),
    Refused("target-short", {"target": TARGET[:4]}, "target", shape(4) + r"|\b4\b", r"\b6\b"),
    Refused("target-float", {"target": TARGET.float()}, "target", "float32", r"(integer|int64).*target\.long\(\)"),
    Refused("target-bool", {"target": TARGET.bool()}, "target", "bool", "integer|int64"),
    Refused("target-soft", {"target": randn(M, K)}, "target", shape(M, K) + "|float32", shape(M) + r"|integer"),
    Refused("target-too-large", {"target": TARGET + 1}, "target", r"\b5\b", r"\[0, 5\)|\[0, 4\]|< 5|\[0, K\)"),
    Refused("target-negative", {"target": TARGET - 1}, "target", r"-1\b", r"\[0, 5\)|\[0, 4\]|>= 0|\[0, K\)"),
    Refused("target-int32", {"target": (TARGET + 1).int()}, "target", r"\b5\b", r"\[0, 5\)|\[0, 4\]|< 5|\[0, K\)"),
    Refused("beta-bool", {"inv_temperature": True}, "inv_temperature", "bool|True", "number|float|Tensor"),
    Refused("beta-str", {"inv_temperature": "hot"}, "inv_temperature", "str|hot", "number|float|Tensor"),
    Refused("beta-none", {"inv_temperature": None}, "inv_temperature", "None", "number|float|Tensor"),
    Refused("beta-zero", {"inv_temperature": 0.0}, "inv_temperature", r"\b0(\.0)?\b", "positive|> ?0|greater"),
    Refused("beta-negative", {"inv_temperature": -1.5}, "inv_temperature", r"-1\.5", "positive|> ?0|greater"),
    Refused("beta-nan", {"inv_temperature": NAN}, "inv_temperature", "nan", "positive|> ?0|finite"),
    Refused("beta-inf", {"inv_temperature": INF}, "inv_temperature", "inf", "finite"),
    Refused("beta-rows", {"inv_temperature": torch.ones(M)}, "inv_temperature", shape(M), r"0-?d|scalar|\(\)"),
    Refused("beta-integer", {"inv_temperature": torch.tensor(3)}, "inv_temperature", "int64", "float"),
    Refused("beta-meta", {"inv_temperature": torch.ones((), device="meta")}, "inv_temperature", "meta", "cpu"),
    Refused("ignore-float", {"ignore_index": 1.5}, "ignore_index", r"float|1\.5", "int"),
    Refused("ignore-none", {"ignore_index": None}, "ignore_index", "None", "int"),
    Refused("ignore-str", {"ignore_index": "pad"}, "ignore_index", "str|pad", "int"),
]

PRIMITIVE = [
    Refused("beta-1d", {"inv_temperature": torch.ones(1)}, "inv_temperature", shape(1), r"0-?d|scalar|\(\)"),
    Refused("direction", {"direction": "column"}, "direction", "column", "class.*instance.*both"),
    Refused("direction-none", {"direction": None}, "direction", "None", "class.*instance.*both"),
    Refused("exclude", {"exclude": "diagonal"}, "exclude", "diagonal", "none.*target.*self.*same_label"),
    Refused(
        "present-instance",
        {"present_only": True, "direction": "instance"},
        "present_only",
        "instance",
        "class",
    ),
    Refused("present-both", {"present_only": True, "direction": "both"}, "present_only", "both", "class"),
    Refused(
        "present-self",
        {"present_only": True, "prototypes": randn(M, D), "exclude": "self"},
        "present_only",
        "self",
        "none",
    ),
    Refused(
        "present-label",
        {"present_only": True, "prototypes": randn(M, D), "exclude": "same_label"},
        "present_only",
        "same_label",
        "none",
    ),
    Refused(
        "self-not-square",
        {"exclude": "self"},
        "exclude",
        shape(K, D) + r"|\b5\b",
        r"\b6\b|K == M|M == K|K = M",
    ),
    Refused(
        "label-not-square",
        {"exclude": "same_label"},
        "exclude",
        shape(K, D) + r"|\b5\b",
        r"\b6\b|K == M|M == K|K = M",
    ),
    Refused("bias-class", {"logit_bias": randn(K)}, "logit_bias", shape(K), shape(M) + r"|\b6\b"),
    Refused(
        "bias-instance",
        {"logit_bias": randn(M), "direction": "instance"},
        "logit_bias",
        shape(M),
        shape(K) + r"|\b5\b",
    ),
    Refused("bias-matrix", {"logit_bias": randn(M, 1)}, "logit_bias", shape(M, 1), shape(M) + r"|\b6\b"),
    Refused("bias-not-a-pair", {"logit_bias": randn(M), "direction": "both"}, "logit_bias", "Tensor", "pair|tuple"),
    Refused("bias-pair", {"logit_bias": (randn(M), None)}, "logit_bias", "tuple", "[Tt]ensor"),
    Refused(
        "bias-pair-shapes",
        {"logit_bias": (randn(K), randn(K)), "direction": "both"},
        "logit_bias",
        shape(K),
        shape(M) + r"|\b6\b",
    ),
    Refused(
        "bias-triple",
        {"logit_bias": (None, None, None), "direction": "both"},
        "logit_bias",
        "3|tuple",
        "pair|2|two",
    ),
    Refused("bias-list", {"logit_bias": [0.0] * M}, "logit_bias", "list", "[Tt]ensor"),
    Refused("bias-integer", {"logit_bias": torch.ones(M, dtype=torch.int64)}, "logit_bias", "int64", "float"),
    Refused("bias-meta", {"logit_bias": torch.empty(M, device="meta")}, "logit_bias", "meta", "cpu"),
]

LOSS = [
    Refused("reduction", {"reduction": "avg"}, "reduction", "avg", "none.*mean.*sum"),
    Refused("reduction-none", {"reduction": None}, "reduction", "None", "none.*mean.*sum"),
    Refused("weight-short", {"weight": torch.ones(K - 1)}, "weight", shape(K - 1) + r"|\b4\b", r"\b5\b"),
    Refused("weight-2d", {"weight": torch.ones(K, 1)}, "weight", shape(K, 1), shape(K) + r"|\(K,?\)|1-?d"),
    Refused("weight-0d", {"weight": torch.tensor(1.0)}, "weight", r"\(\)|\[\]", shape(K) + r"|\(K,?\)|1-?d"),
    Refused("weight-list", {"weight": [1.0] * K}, "weight", "list", "[Tt]ensor"),
    Refused("weight-integer", {"weight": torch.ones(K, dtype=torch.int64)}, "weight", "int64", "float"),
    Refused("weight-meta", {"weight": torch.ones(K, device="meta")}, "weight", "meta", "cpu"),
    Refused("sample-weight-short", {"sample_weight": torch.ones(2)}, "sample_weight", shape(2), shape(M) + r"|\(M,?\)"),
    Refused("sample-weight-negative", {"sample_weight": torch.full((M,), -1.0)}, "sample_weight", r"-1", "negative"),
]

NORMFACE = [
    Refused(
        "smoothing-negative",
        {"label_smoothing": -0.1},
        "label_smoothing",
        r"-0\.1",
        r"\[0(\.0)?, 1(\.0)?\]|between",
    ),
    Refused(
        "smoothing-large",
        {"label_smoothing": 1.1},
        "label_smoothing",
        r"1\.1",
        r"\[0(\.0)?, 1(\.0)?\]|between",
    ),
    Refused("smoothing-nan", {"label_smoothing": NAN}, "label_smoothing", "nan", r"\[0(\.0)?, 1(\.0)?\]|between"),
    Refused("smoothing-str", {"label_smoothing": "some"}, "label_smoothing", "str|some", "number|float"),
    Refused(
        "angular-negative",
        {"angular_margin": -0.1},
        "angular_margin",
        r"-0\.1",
        r"\[0|>= ?0|between 0|non-?negative",
    ),
    Refused("angular-nan", {"angular_margin": NAN}, "angular_margin", "nan", r"\[0|>= ?0|between 0|non-?negative"),
    Refused("angular-inf", {"angular_margin": INF}, "angular_margin", "inf", r"\[0|between 0|finite"),
    Refused(
        "cosine-negative",
        {"cosine_margin": -0.1},
        "cosine_margin",
        r"-0\.1",
        r"\[0|>= ?0|between 0|non-?negative",
    ),
    Refused("cosine-nan", {"cosine_margin": NAN}, "cosine_margin", "nan", r"\[0|>= ?0|between 0|non-?negative"),
    Refused("cosine-str", {"cosine_margin": "some"}, "cosine_margin", "str|some", "number|float"),
]


def cosine_lse(**arguments: Any) -> Any:
    given = {
        "features": randn(M, D),
        "prototypes": randn(K, D),
        "target": TARGET,
        "inv_temperature": 10.0,
        **arguments,
    }
    positional = [given.pop(n) for n in ("features", "prototypes", "target", "inv_temperature")]
    return nckernels.cosine_lse(*positional, **given)


def loss_call(name: str) -> Callable[..., Tensor]:
    def call(**arguments: Any) -> Tensor:
        given = {"input": randn(M, D), "prototypes": randn(K, D), "target": TARGET, **arguments}
        positional = [given.pop(n) for n in ("input", "prototypes", "target")]
        return package_loss(name)(*positional, **given)

    return call


RENAMED = {"features": "input", "inv_temperature": "temperature"}
case_ids = {"ids": lambda case: case.id}


def test_the_unspoilt_calls_are_accepted() -> None:
    """Otherwise every test below could pass for a reason of its own."""
    cosine_lse()
    cosine_lse(inv_temperature=10, ignore_index=-1)
    for name in LOSSES:
        assert loss_call(name)().isfinite()


@pytest.mark.parametrize("case", COMMON + PRIMITIVE, **case_ids)
def test_primitive_refuses(case: Refused) -> None:
    case.check(cosine_lse)


@pytest.mark.parametrize("case", COMMON + LOSS, **case_ids)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse(name: str, case: Refused) -> None:
    case.check(loss_call(name), RENAMED)


@pytest.mark.parametrize("case", NORMFACE, **case_ids)
def test_normface_refuses(case: Refused) -> None:
    case.check(loss_call("normface"))


def test_nonl_refuses_an_unknown_direction() -> None:
    case = Refused("direction", {"direction": "row"}, "direction", "row", "class.*instance.*both")
    case.check(loss_call("nonl"))


@pytest.mark.parametrize("case", [c for c in COMMON if "target" in c.name], **case_ids)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bad_targets_are_refused_by_every_backend(backend: str, case: Refused) -> None:
    with nckernels.use_backend(backend):
        case.check(cosine_lse)
        case.check(loss_call("ntce"), RENAMED)


def test_target_out_of_range_only_counts_where_it_is_used() -> None:
    """ignore_index itself may lie outside [0, K), and labels of "same_label" may be anything."""
    target = torch.where(TARGET == 0, 77, TARGET)
    assert loss_call("normface")(target=target, ignore_index=77).isfinite()
    cosine_lse(prototypes=randn(M, D), target=TARGET - 10**12, exclude="same_label")
    with pytest.raises(ValueError, match=r"target.*77"):
        loss_call("normface")(target=target)


# --------------------------------------------------------------------------------------------------
# DTensor


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    if not dist.is_available():
        pytest.skip("torch.distributed is not available")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("argument", ["features", "prototypes", "target"])
@pytest.mark.parametrize("name", ["cosine_lse", *LOSSES])
def test_distributed_tensors_are_refused(mesh: Any, name: str, argument: str) -> None:
    """A sharded tensor must not be taken for its local shard."""
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = {"features": randn(M, D), "prototypes": randn(K, D), "target": TARGET}[argument]
    case = Refused(
        "dtensor",
        {argument: distribute_tensor(plain, mesh, [Shard(0)])},
        argument,
        "DTensor",
        r"fully_shard" if argument == "prototypes" else r"rows of this rank, \w+\.to_local\(\)",
    )
    if name == "cosine_lse":
        case.check(cosine_lse)
    else:
        case.check(loss_call(name), RENAMED)


@pytest.mark.parametrize("placement", ["Shard", "Replicate"])
@pytest.mark.parametrize("name", ["cosine_lse", *LOSSES])
def test_distributed_parameters_are_refused(mesh: Any, name: str, placement: str) -> None:
    """Replicas too: from plain features nobody can tell how the gradient has to be reduced."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if placement == "Shard" else Replicate()]
    spread = torch.nn.Parameter(distribute_tensor(randn(K, D), mesh, placements))
    advice = (
        r"fully_shard.*classifier\(input, target\).*prototypes\.full_tensor\(grad_placements=\[Partial\('avg'\)\]\)"
    )
    case = Refused("dtensor", {"prototypes": spread}, "prototypes", "DTensor", advice)
    if name == "cosine_lse":
        case.check(cosine_lse)
        return
    case.check(loss_call(name), RENAMED)
    module = {"nonl": nckernels.NONLLoss, "ntce": nckernels.NTCELoss, "normface": nckernels.NormFaceLoss}[name]
    with pytest.raises(
        TypeError, match=r"prototypes is a DTensor.*make modules that share a parameter before fully_shard"
    ):
        module(prototypes=spread)
    criterion = module(D, K)
    criterion.prototypes = spread  # as fully_shard of a network leaves it, outside of the network's forward
    with pytest.raises(TypeError, match=r"prototypes is a DTensor.*call that module"):
        criterion(randn(M, D))


# --------------------------------------------------------------------------------------------------
# modules


@pytest.mark.parametrize(
    ("arguments", "name", "came"),
    [
        ({"in_features": 0, "num_classes": 5}, "in_features", r"\b0\b"),
        ({"in_features": 4, "num_classes": 0}, "num_classes", r"\b0\b"),
        ({"in_features": -3, "num_classes": 5}, "in_features", r"-3"),
        ({"in_features": 4.5, "num_classes": 5}, "in_features", r"4\.5|float"),
        ({}, "in_features|prototypes", "None|in_features|prototypes"),
        ({"in_features": 4}, "num_classes", "None|num_classes"),
        ({"prototypes": randn(5)}, "prototypes", shape(5)),
        ({"prototypes": [[1.0]]}, "prototypes", "list"),
        ({"in_features": 4, "num_classes": 5, "prototypes": randn(5, 3)}, "prototypes", shape(5, 3)),
        ({"in_features": 4, "num_classes": 5, "temperature": 0.0}, "temperature", r"\b0(\.0)?\b"),
        ({"in_features": 4, "num_classes": 5, "reduction": "avg"}, "reduction", "avg"),
        ({"in_features": 4, "num_classes": 5, "weight": torch.ones(4)}, "weight", shape(4) + r"|\b4\b"),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", ["NONLLoss", "NTCELoss", "NormFaceLoss", "PrototypeClassifier"])
def test_modules_refuse_bad_construction(module: str, arguments: dict[str, Any], name: str, came: str) -> None:
    """At construction, where the mistake is, not at the first batch."""
    with pytest.raises((ValueError, TypeError)) as info:
        getattr(nckernels, module)(**arguments)
    for pattern in (name, came):
        assert re.search(pattern, str(info.value)), str(info.value)


def test_classifier_refuses_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"loss.*supcon|supcon.*loss") as info:
        nckernels.PrototypeClassifier(4, 5, loss="supcon")  # type: ignore[arg-type]
    assert re.search("nonl.*ntce.*normface", str(info.value))


@pytest.mark.parametrize("module", ["NONLLoss", "NTCELoss", "NormFaceLoss"])
def test_modules_refuse_a_bad_batch(module: str) -> None:
    criterion = getattr(nckernels, module)(D, K)
    with pytest.raises(ValueError, match=r"input.*\(6, 3\)"):
        criterion(randn(M, 3), TARGET)
    with pytest.raises(ValueError, match=r"target"):
        criterion(randn(M, D), TARGET + 1)


# --------------------------------------------------------------------------------------------------
# backends and workspace


@pytest.mark.parametrize("how", ["set_backend", "use_backend"])
@pytest.mark.parametrize("value", ["fast", "", "Chunked", 3, True])
def test_unknown_backend(how: str, value: object) -> None:
    def choose() -> None:
        if how == "set_backend":
            nckernels.set_backend(value)  # type: ignore[arg-type]
        else:
            with nckernels.use_backend(value):  # type: ignore[arg-type]
                pass

    with pytest.raises((ValueError, TypeError)) as info:
        choose()
    message = str(info.value)
    assert "backend" in message
    assert str(value) in message
    assert "reference" in message
    assert "chunked" in message
    cosine_lse()  # the refused choice left nothing behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_chosen_backend_that_cannot_run_says_why(dtype: torch.dtype) -> None:
    """No silent fallback from an explicit choice: CPU tensors, float64, or no Triton or GPU at all."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as info, nckernels.use_backend("triton"):
        cosine_lse(features=randn(M, D, dtype=dtype), prototypes=randn(K, D, dtype=dtype))
    message = str(info.value)
    assert "triton" in message.lower()
    assert re.search(r"cpu|CPU|float64|CUDA|cuda|GPU|install", message), message
    cosine_lse()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
def test_triton_refuses_float64_on_a_gpu() -> None:
    kw = {"device": "cuda", "dtype": torch.float64}
    with (
        pytest.raises((ValueError, TypeError), match=r"(?s)triton.*float64|float64.*triton"),
        nckernels.use_backend("triton"),
    ):
        cosine_lse(features=randn(M, D, **kw), prototypes=randn(K, D, **kw), target=TARGET.cuda())


def test_backend_choices_nest_and_are_restored() -> None:
    """After the outer choice a refused one inside leaves the outer in force."""
    x = randn(M, D).requires_grad_()

    def penalise() -> None:
        """Double backward, which only the reference has."""
        (grad,) = torch.autograd.grad(loss_call("ntce")(input=x), x, create_graph=True)
        grad.pow(2).sum().backward()

    with nckernels.use_backend("reference"):
        with nckernels.use_backend("chunked"):
            pass
        with pytest.raises((ValueError, TypeError)):
            nckernels.set_backend("nope")
        penalise()  # still the reference
    with nckernels.use_backend("chunked"), pytest.raises(NotImplementedError):
        penalise()


@pytest.mark.parametrize("how", ["set_workspace", "use_workspace"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "big", None, True])
def test_bad_workspace(how: str, value: object) -> None:
    def choose() -> None:
        if how == "set_workspace":
            nckernels.set_workspace(value)  # type: ignore[arg-type]
        else:
            with nckernels.use_workspace(value):  # type: ignore[arg-type]
                pass

    with pytest.raises((ValueError, TypeError)) as info:
        choose()
    message = str(info.value)
    assert re.search("workspace|size|bytes", message)
    assert str(value) in message
    assert re.search("positive|> ?0|>= ?1|int", message)
    cosine_lse()


def test_any_positive_workspace_works() -> None:
    """Too small for a single tile: the smallest tile is used all the same."""
    batch = {"input": randn(40, D), "target": torch.arange(40) % K}
    expected = loss_call("nonl")(**batch)
    with nckernels.use_backend("chunked"), nckernels.use_workspace(1):
        got = loss_call("nonl")(**batch)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # the same sums in other tiles


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )


USE = "import torch as t, nckernels as n; n.cosine_lse(t.ones(3, 2), t.ones(2, 2), t.tensor([0, 1, 1]), 9.0)"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("NCKERNELS_BACKEND", "fastest", "chunked"),
        ("NCKERNELS_WORKSPACE", "plenty", "bytes|int|positive"),
        ("NCKERNELS_WORKSPACE", "-5", "bytes|int|positive"),
    ],
)
def test_bad_environment_is_a_clear_error(variable: str, value: str, expected: str) -> None:
    result = python(USE, **{variable: value})
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(ValueError|TypeError)\b", error), error
    for pattern in (variable, value, expected):
        assert re.search(pattern, error), error


def test_environment_chooses_the_backend() -> None:
    """Told apart by double backward, which only the reference has."""
    code = (
        "import torch, nckernels; x = torch.randn(4, 3, requires_grad=True)\n"
        "v = nckernels.ntce_loss(x, torch.randn(2, 3), torch.tensor([0, 1, 1, 0]))\n"
        "g, = torch.autograd.grad(v, x, create_graph=True); g.sum().backward()\n"
    )
    assert python(code, NCKERNELS_BACKEND="reference").returncode == 0
    chunked = python(code, NCKERNELS_BACKEND="chunked")
    assert chunked.returncode != 0
    assert "NotImplementedError" in chunked.stderr


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1e-39, 1e46])
def test_temperatures_that_float32_cannot_hold(cpu_backend: Backend, temperature: float, reduction: str) -> None:
    x, w, y = torch.randn(64, 8, requires_grad=True), torch.randn(10, 8), torch.randint(10, (64,))
    for tau in (temperature, torch.tensor(temperature, dtype=torch.float64, requires_grad=True)):
        with pytest.raises(ValueError, match="inverse temperature must be positive and finite"):
            nckernels.normface_loss(x, w, y, temperature=tau, reduction=reduction)
        with pytest.raises(ValueError, match="inverse temperature must be positive and finite"):
            nckernels.supcon_loss(x, y, temperature=tau, reduction=reduction)
    x, w = x.detach().double().requires_grad_(), w.double()
    assert nckernels.normface_loss(x, w, y, temperature=temperature).isfinite()
