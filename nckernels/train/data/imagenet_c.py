"""ImageNet-C: the validation images under corruptions, and the mean corruption error.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..typed import nearest
from .folders import scan
from .sets import DataError, Files

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error under each corruption, the mean over the severities."""

CORRUPTIONS = tuple(ALEXNET)
SEVERITIES = (1, 2, 3, 4, 5)
SOURCE = "https://zenodo.org/records/2235448"


def read(root: Path | str, corruption: str, severity: int, class_names: Sequence[str]) -> Files:
    """The images of a corruption and a severity, centre crops of 224 x 224 pixels.

    They are labelled by ``class_names``, which may be a part of ImageNet's classes.

    Raises:
        DataError: for a folder that is missing or lacks classes.
    """
    if corruption not in ALEXNET:
        raise ValueError(
            f"corruption: expected one of {', '.join(ALEXNET)}, got {corruption!r}{nearest(corruption, ALEXNET)}"
        )
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to 5, got {severity!r}")
    folder = Path(root).expanduser() / corruption / str(severity)
    if not folder.is_dir():
        raise DataError(
            f"imagenet-c: there is no {folder}; expected CORRUPTION/SEVERITY/CLASS/*.JPEG in {root}. The archives "
            f"blur.tar, digital.tar, noise.tar and weather.tar are at {SOURCE}"
        )
    return replace(scan(folder, class_names), cropped=True)


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE: the mean over the corruptions of the error, divided by AlexNet's. Papers print it in percent.

    Args:
        errors: the share of misclassified images at severities 1 to 5, for each of the fifteen corruptions.

    Raises:
        ValueError: naming the corruptions that are missing, unknown or lack severities.
    """
    missing = [name for name in ALEXNET if name not in errors]
    if missing:
        raise ValueError(f"errors: expected all {len(ALEXNET)} corruptions; {', '.join(missing)} missing")
    for name, values in errors.items():
        if name not in ALEXNET:
            raise ValueError(f"errors: there is no corruption {name!r}{nearest(name, ALEXNET)}")
        if len(values) != len(SEVERITIES) or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"errors: expected five shares, one for each severity, for {name}, got {list(values)}")
    return math.fsum(math.fsum(errors[name]) / len(SEVERITIES) / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)
