"""Training with neural collapse measured on the way."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import nckernels
from nckernels import ClassifierResult
from nckernels.metrics import neural_collapse

from . import augment
from . import data as datasets
from .models import (
    ASSIGNMENTS,
    FEATURES,
    LOSSES,
    AnyHead,
    Assignment,
    ContrastiveHead,
    ConvNet,
    CrossEntropyHead,
    Features,
    LossName,
    make_head,
    make_loss,
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run.

    Optimiser and schedule are those of [NCD] App. E with another learning rate: the one of 0.025, 0.05, 0.1,
    0.2 and 0.4 at which the mean test accuracy of the four losses on the digits is best. The paper has 0.2
    for CIFAR with batches of 512. NONL collapses at all five; NormFace goes astray early from 0.2 on.
    """

    dataset: str = "digits"
    loss: LossName = "nonl"
    temperature: float = 0.1
    """Of the losses with cosine logits; cross-entropy, PSC* and dot regression have none."""
    assignment: Assignment = "dynamic"
    """Of the points of ``"dlp"`` to the classes: anew after every epoch, or at random for good."""
    queue: int = 0
    """Past features that NONL, NTCE and SupCon contrast with besides the batch (:class:`nckernels.QueueLoss`)."""
    decay: float = 0.0
    """Of the running denominators of NONL and NTCE (:class:`nckernels.RunningDenominatorLoss`); 0: none."""
    views: int = 2
    """Random views of each sample in a batch under ``"scl"``; the other losses see the images as they are."""
    epochs: int = 60
    batch_size: int = 256
    lr: float = 0.05
    """Initial learning rate of SGD with momentum 0.9; a cosine over the iterations takes it to lr * 0.1^3."""
    weight_decay: float = 1e-4
    dim: int = 64
    width: int = 16
    """Channels of the network's first block."""
    features: Features = "linear"
    seed: int = 42
    device: str = "auto"
    """``"auto"`` is the accelerator if there is one, else the CPU."""
    amp: bool = False
    """Run the network in bfloat16 autocast while training; evaluation is in float32."""
    eval_every: int = 10
    """Iterations between evaluations; there is one before the first iteration and one after the last."""
    backend: str | None = None
    """Backend of nckernels, None for its own choice."""
    threads: int = 1
    """CPU threads. For networks this small one is nearly as fast as several on an idle machine and many times
    faster on a busy one; and the result does not depend on the number of cores."""

    def __post_init__(self) -> None:
        known = {"dataset": datasets.DATASETS, "loss": LOSSES, "features": FEATURES, "assignment": ASSIGNMENTS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.assignment == "static" and self.loss != "dlp":
            raise ValueError(f"assignment: expected 'dynamic' for every loss but dlp, got {self.assignment!r}")
        for name in ("epochs", "batch_size", "dim", "width", "eval_every", "threads", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.queue < 0:
            raise ValueError(f"queue: expected at least 0, got {self.queue}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected a number >= 0 and < 1, got {self.decay}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")


@dataclass
class History:
    """What a run measured: one entry per evaluation in every list. NaN is written to JSON as null."""

    config: TrainConfig
    steps: list[int] = field(default_factory=list)
    """Iterations done at the time of the evaluation."""
    loss: list[float] = field(default_factory=list)
    """Mean training loss since the previous evaluation; NaN at the first."""
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """:class:`nckernels.metrics.NeuralCollapse` of the training set in eval mode, field by field."""
    seconds: float = 0.0
    """Time spent on training iterations, evaluations not included."""
    classifiers: list[ClassifierResult] = field(default_factory=list)
    """After ``"scl"``: fixed prototypes and the two linear probes on the trained network ([NCD] Table 2)."""
    num_classes: int = 0
    """K of the dataset, which the optima of the metrics depend on; 0 in files that were written without it."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(_nan_to_null(asdict(self)), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> History:
        values = _null_to_nan(json.loads(path.read_text()))
        config, results = TrainConfig(**values["config"]), [ClassifierResult(**r) for r in values["classifiers"]]
        return cls(**{**values, "config": config, "classifiers": results})


@dataclass(frozen=True)
class Run:
    """A finished training."""

    model: ConvNet
    head: AnyHead
    data: datasets.Dataset
    history: History

    def save(self, folder: Path) -> None:
        """Write ``history.json`` and ``checkpoint.pt`` (state dicts of model and head, and the config)."""
        folder.mkdir(parents=True, exist_ok=True)
        self.history.save(folder / "history.json")
        checkpoint = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "config": asdict(self.history.config),
        }
        torch.save(checkpoint, folder / "checkpoint.pt")


def fit(
    config: TrainConfig,
    *,
    progress: bool = True,
    loss_of: Callable[[AnyHead], Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Run:
    """Train a network and record its way to neural collapse.

    Args:
        config: all there is to choose from the command line.
        progress: show a bar.
        loss_of: makes another training loss for the head, of features and labels.

    The seed fixes initialisation and batches, so that runs of different losses see the same of both, and on
    one CPU the same seed gives the same history. The global random state is left as it was.

    Raises:
        ValueError: where device, backend or batch size do not fit the machine or the dataset, and for ``"etf-dr"``
            in too few dimensions.
        FloatingPointError: when loss or features are no longer finite.
    """
    device = _device(config.device)
    data = datasets.load(config.dataset).to(device)
    samples = len(data.train_labels)
    per_epoch = samples // config.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ConvNet(data.train_images.shape[1], config.dim, config.features, config.width).to(device)
        head = make_head(
            config.loss,
            config.dim,
            data.num_classes,
            config.temperature,
            device,
            assignment=config.assignment,
            refresh_every=max(1, per_epoch),
        )
    criterion = make_loss(head, config.queue, config.decay) if loss_of is None else loss_of(head)
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    run = Run(model, head, data, History(config, num_classes=data.num_classes))
    total = config.epochs * per_epoch
    backend = contextlib.nullcontext() if config.backend is None else nckernels.use_backend(config.backend)

    bar = tqdm(total=total, desc=config.loss, unit="it", disable=not progress)
    with backend, _threads(config.threads), bar:
        bar.set_postfix_str(_record(run, step=0, loss=math.nan))
        step, since, losses = 0, 0, torch.zeros((), device=device)
        start = time.perf_counter()
        for _ in range(config.epochs):
            for indices in datasets.batches(samples, config.batch_size, generator):
                for group in optimiser.param_groups:
                    group["lr"] = cosine_lr(config.lr, step, total)
                indices = indices.to(device)
                images, labels = data.train_images[indices], data.train_labels[indices]
                losses += _train_step(run, criterion, images, labels, optimiser, generator)
                step, since = step + 1, since + 1
                bar.update()
                if step % config.eval_every == 0 or step == total:
                    loss = losses.item() / since  # waits for the device, so that the time is right
                    run.history.seconds += time.perf_counter() - start
                    bar.set_postfix_str(_record(run, step, loss))
                    since, losses = 0, torch.zeros((), device=device)
                    start = time.perf_counter()
        if isinstance(head, ContrastiveHead):
            bar.set_postfix_str("linear probes")
            run.history.classifiers = probe(run)
    return run


def probe(run: Run) -> list[ClassifierResult]:
    """Fixed prototypes on the features, linear probes on what lies below the head."""
    data, model = run.data, run.model
    return nckernels.compare_classifiers(
        extract(model, data.train_images),
        data.train_labels,
        extract(model, data.test_images),
        data.test_labels,
        train_encoded=extract(model, data.train_images, model.encode),
        test_encoded=extract(model, data.test_images, model.encode),
        num_classes=data.num_classes,
        seed=run.history.config.seed,
    )


def cosine_lr(lr: float, step: int, total: int) -> float:
    """eta_min + (lr - eta_min) (1 + cos(pi step / total)) / 2 with eta_min = 0.1^3 lr ([NCD] App. E)."""
    minimum = lr * 0.1**3
    return minimum + 0.5 * (lr - minimum) * (1 + math.cos(math.pi * step / total))


def _train_step(
    run: Run,
    criterion: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> Tensor:
    run.model.train()
    config = run.history.config
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp):
        if isinstance(run.head, ContrastiveHead):
            views = augment.views(images, config.views, generator)
            features = run.model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        else:
            features = run.model(images)
        loss = criterion(features, labels)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.detach()


@torch.no_grad()
def extract(
    model: nn.Module, images: Tensor, function: Callable[[Tensor], Tensor] | None = None, chunk: int = 1024
) -> Tensor:
    """Features in eval mode, or what another ``function`` of the model makes of the images."""
    model.eval()
    return torch.cat([(function or model)(part) for part in images.split(chunk)])


@torch.no_grad()
def _record(run: Run, step: int, loss: float) -> str:
    """Append one evaluation to the history; returns a summary for the progress bar."""
    history, data = run.history, run.data
    features = extract(run.model, data.train_images)
    if step and not (math.isfinite(loss) and features.isfinite().all()):
        raise FloatingPointError(
            f"training diverged before iteration {step}: the loss is {loss}, and the features are "
            f"{'finite' if features.isfinite().all() else 'not finite'}; a smaller lr may help"
        )
    if isinstance(run.head, ContrastiveHead):
        run.head.fit(features, data.train_labels)
    history.steps.append(step)
    history.loss.append(loss)
    history.train_accuracy.append(_accuracy(run.head(features), data.train_labels))
    test_logits = run.head(extract(run.model, data.test_images))
    history.test_accuracy.append(_accuracy(test_logits, data.test_labels))
    bias = run.head.bias if isinstance(run.head, CrossEntropyHead) else None
    collapse = neural_collapse(features, data.train_labels, run.head.prototypes, bias=bias)
    for name, value in asdict(collapse).items():
        history.metrics.setdefault(name, []).append(value)
    return f"loss {loss:.3f}, test {history.test_accuracy[-1]:.1%}, NC1 {collapse.nc1:.1e}"


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as various as the backends
        raise ValueError(f"device: {name!r} cannot be used here: {error}") from error
    return device


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _null_to_nan(value: Any) -> Any:
    """Only inside lists: elsewhere null is a None."""
    if isinstance(value, dict):
        return {key: _null_to_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else item for item in value]
    return value
