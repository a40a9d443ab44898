"""What signature help shows: every option of a module by name, with the default of its function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import nckernels

PAIRS: dict[type[nn.Module], Callable[..., Any]] = {
    nckernels.NONLLoss: nckernels.nonl_loss,
    nckernels.NTCELoss: nckernels.ntce_loss,
    nckernels.NormFaceLoss: nckernels.normface_loss,
    nckernels.DotRegressionLoss: nckernels.dot_regression_loss,
    nckernels.SupConLoss: nckernels.supcon_loss,
    nckernels.PrototypeLoss: nckernels.prototype_loss,
    nckernels.InfoNCELoss: nckernels.info_nce_loss,
    nckernels.CLIPLoss: nckernels.clip_loss,
    nckernels.UniformityLoss: nckernels.uniformity_loss,
    nckernels.AlignmentLoss: nckernels.alignment_loss,
}
OTHERS = [
    nckernels.PrototypeClassifier,
    nckernels.FixedPrototypeHead,
    nckernels.FeatureQueue,
    nckernels.QueueLoss,
    nckernels.RunningDenominatorLoss,
]
CLASSIFIERS = [nckernels.FixedPrototypes, nckernels.LinearProbe]
OF_CALLS = {"sample_weight"}
"""Options of the functions that modules take in forward()."""
OF_MODULES = {"in_features", "num_classes", "prototypes", "device", "dtype"}
"""What makes the prototypes of modules."""


def options(call: Callable[..., Any]) -> dict[str, object]:
    """Keyword-only parameters and their defaults."""
    parameters = inspect.signature(call).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("module", PAIRS, ids=lambda m: m.__name__)
def test_modules_have_the_options_of_their_functions(module: type[nn.Module]) -> None:
    expected = {name: value for name, value in options(PAIRS[module]).items() if name not in OF_CALLS}
    found = {name: value for name, value in options(module).items() if name in expected or name not in OF_MODULES}
    assert found == expected
    assert [name for name in found if name in expected] == list(expected)  # in the same order


@pytest.mark.parametrize("module", [*PAIRS, *OTHERS], ids=lambda m: m.__name__)
def test_nothing_hides_behind_stars(module: type[nn.Module]) -> None:
    kinds = {p.kind for p in inspect.signature(module).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("module", [*PAIRS, *OTHERS[:3], *CLASSIFIERS], ids=lambda m: m.__name__)
def test_options_by_position(module: type[nn.Module]) -> None:
    """A subclass, the user's too, is named, and not the private class that has its ``__init__``."""
    class_name, names = module.__name__, options(module)
    arguments = [1] * (len(inspect.signature(module).parameters) - len(names))
    told = rf"^{class_name} takes (no|1|2) positional arguments?, got {len(arguments) + 1}; .*: {'=..., '.join(names)}="
    for made in (module, type(class_name, (module,), {})):
        with pytest.raises(TypeError, match=told):
            made(*arguments, 0.1)


@pytest.mark.parametrize("loss", ["nonl", "ntce", "normface"])
def test_a_classifier_has_the_options_that_all_its_losses_have(loss: str) -> None:
    found = options(nckernels.PrototypeClassifier)
    assert found.pop("loss") == "nonl"
    of_loss = options(nckernels.nn.LOSSES[loss])
    assert found.items() <= of_loss.items()
    assert set(of_loss) - set(found) <= {
        *("direction", "label_smoothing", "angular_margin", "cosine_margin", "class_fraction", "generator")
    }


OPTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "nonl": (nckernels.NONLLoss, {"direction": "both", "ignore_index": -1}),
    "nonl-sparse": (nckernels.NONLLoss, {"sparse": True}),
    "ntce": (nckernels.NTCELoss, {"temperature": 0.3, "reduction": "sum"}),
    "normface": (nckernels.NormFaceLoss, {"label_smoothing": 0.1, "angular_margin": 0.2, "cosine_margin": 0.3}),
    "normface-sparse": (nckernels.NormFaceLoss, {"class_fraction": 0.5, "sparse": True}),
    "dot_regression": (nckernels.DotRegressionLoss, {"ignore_index": -1}),
    "supcon": (nckernels.SupConLoss, {"decoupled": True, "ignore_index": -1}),
    "prototype": (nckernels.PrototypeLoss, {"num_classes": 7}),
    "info_nce": (nckernels.InfoNCELoss, {"decoupled": True}),
    "clip": (nckernels.CLIPLoss, {"decoupled": True}),
    "uniformity": (nckernels.UniformityLoss, {"t": 3.0}),
    "alignment": (nckernels.AlignmentLoss, {"alpha": 3.0}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_repr_shows_what_is_not_the_default(case: str) -> None:
    module, given = OPTIONS[case]
    sizes = (4, 5) if "prototypes" in options(module) else ()
    text, default = repr(module(*sizes, **given)), repr(module(*sizes))
    for name, value in given.items():
        shown = f"{name}={value!r}" if isinstance(value, (str, bool)) else f"{name}={value:g}"
        assert shown in text
        assert shown not in default
    assert "decoupled" not in default
    assert "label_smoothing" not in default
