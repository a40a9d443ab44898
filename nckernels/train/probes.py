"""Classifiers on the features of a trained network: class means and linear probes, ``run.probes``."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

from nckernels import ClassifierResult, FixedPrototypes, LinearProbe
from nckernels.classifiers import _compared, _seconds

from . import data as datasets
from .evaluate import accuracy, features, measuring, of_the_first_rank
from .recipe import Recipe


def probe(
    network: Any,
    dataset: datasets.Dataset,
    recipe: Recipe,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> list[ClassifierResult]:
    """The classifiers of ``run.probes`` ([NCD] Table 2), without augmentation.

    Fixed prototypes (FP) take one pass over the training set and keep sums only. Linear probes (LP, NLP) train on the
    encoder's output, below the projection, and hold it in memory for the whole training set, on every rank.

    Raises:
        ValueError: if samples have several labels.
    """
    if dataset.train.labels.ndim > 1:
        raise ValueError("run.probes: expected none, because a sample of the data set has several labels")
    results = []
    if "FP" in recipe.run.probes:
        results.append(_fixed_prototypes(network, dataset, recipe, device, rank, world_size))
    linear = [name for name in ("LP", "NLP") if name in recipe.run.probes]
    if linear:
        (train, train_labels), (test, test_labels) = (
            features(network, dataset, split, recipe, device, network.encode, rank=rank, world_size=world_size)
            for split in (dataset.train, dataset.test)
        )
    for name in linear:
        classifier = LinearProbe(
            dataset.num_classes, train.shape[1], normalize=name == "NLP", seed=recipe.run.seed, device=device
        )
        results.append(_compared(name, classifier, train, train_labels, test, test_labels))
    return cast("list[ClassifierResult]", of_the_first_rank(results, rank, world_size))


@torch.no_grad()
def _fixed_prototypes(
    network: Any, dataset: datasets.Dataset, recipe: Recipe, device: torch.device, rank: int, world_size: int
) -> ClassifierResult:
    """FP, batch by batch. The seconds do not include the network."""
    classifier = FixedPrototypes(dataset.num_classes, network.dim, device=device)
    share, seconds = {"rank": rank, "world_size": world_size}, 0.0
    with measuring(network, None, device):
        for images, labels in datasets.passes(dataset, dataset.train, recipe, device, **share):
            z = network(images)
            seconds += _seconds(device, partial(classifier.partial_fit, z, labels))
    if world_size > 1:
        classifier.all_reduce()
    score = accuracy(network, classifier, dataset, dataset.test, recipe, device, **share)
    return ClassifierResult("FP", score, seconds)
