"""One training step: the network and its classifier as a module, and their optimiser."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nckernels

from . import checkpoint
from .data.seeds import mix
from .heads import make_head
from .models import make_network
from .processes import World
from .recipe import Recipe
from .schedule import learning_rate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(recipe: Recipe, data: Any, world: World, *, steps_per_epoch: int = 1, start: bool = True) -> tuple[Any, Any]:
    """Network and head of a recipe on the device, initialised from its seed.

    The network is made first, so that all losses with one seed start from the same network. The global random state
    changes; the caller restores it.

    Args:
        start: whether to load ``model.init`` and ``loss.options.points``; False if a checkpoint will be loaded anyway.
    """
    torch.manual_seed(recipe.run.seed)
    network = make_network(recipe.model, data.channels, data.image_size)
    if recipe.model.init and start:
        checkpoint.start_from(network, recipe.model.init)
    if recipe.model.freeze:
        network.requires_grad_(False)
    network.to(world.device)
    if world.size > 1 and recipe.run.sync_batchnorm and world.device.type != "cpu":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    head = make_head(
        recipe.loss,
        network.dim,
        data.num_classes,
        steps_per_epoch=steps_per_epoch,
        process_group="world" if world.size > 1 and recipe.loss.global_batch else None,
        device=world.device,
        start=start,
    )
    return network, head


def check_labels(recipe: Recipe, data: Any) -> None:
    """Raises ValueError if the loss takes several labels per sample and the data set has one, or vice versa."""
    loss, several = recipe.loss.name, data.train.labels.dim() > 1
    if (loss == "bce") != several:
        labels, wanted = ("several labels", "'bce'") if several else ("one label", "any other than 'bce'")
        raise ValueError(f"loss.name: a sample of {recipe.data.name} has {labels}; expected {wanted}, got {loss!r}")


def seed(device: torch.device, *parts: int | str) -> None:
    """Seed the global generators of the CPU and of the device by a function of ``parts``, without synchronising.

    (``torch.manual_seed`` takes hundreds of times as long if CUDA is not in use.)
    """
    number = mix(*parts)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)


def warn_of_batchnorm(network: nn.Module, world: World) -> None:
    """Warn that there is no SyncBatchNorm on CPUs: each rank normalises with the statistics of its own samples."""
    local = world.device.type == "cpu" and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()
    )
    if world.size > 1 and world.rank == 0 and local:
        warnings.warn(
            'on CPUs BatchNorm normalises with the samples of its own rank only; model.norm = "group" avoids this',
            stacklevel=2,
        )


class TrainStep(nn.Module):
    """A module of images and labels that returns the loss; of images alone it returns their features.

    Args:
        criterion: the loss, a function of features and labels.
    """

    def __init__(
        self, network: Any, head: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], recipe: Recipe
    ) -> None:
        super().__init__()
        self.network, self.head, self.criterion = network, head, criterion
        self.frozen, self.channels_last = recipe.model.freeze, recipe.run.channels_last
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        # Compile the function, not the module: evaluations have other shapes and modes and stay uncompiled.
        self.encode: Callable[[Tensor], Tensor] = (
            torch.compile(network.forward, dynamic=False) if recipe.run.compile else network.__call__
        )
        self.feature_norm = torch.zeros(())
        """Mean length of the features of the last call of :meth:`loss`."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = images.flatten(0, 1) if images.dim() == 5 else images  # views
        if self.channels_last:
            rows = rows.contiguous(memory_format=torch.channels_last)
        if self.frozen:
            with torch.no_grad():
                features = self.encode(rows)
        else:
            features = self.encode(rows)
        if images.dim() == 5:
            features = features.unflatten(0, images.shape[:2])
        return features if labels is None else self.loss(features, labels)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        self.feature_norm = features.detach().float().norm(dim=-1).mean()
        return self.criterion(features, labels)

    def train(self, mode: bool = True) -> TrainStep:
        """A frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self


class Optimisation:
    """Runs training steps. The host never waits for the device in them.

    Raises:
        ValueError: for settings that do not go together on this machine.
    """

    def __init__(self, step: TrainStep, recipe: Recipe, world: World, steps_per_epoch: int) -> None:
        run, settings = recipe.run, recipe.optimizer
        half = run.precision == "float16"
        if half and world.device.type == "cpu":
            raise ValueError("run.precision: float16 needs an accelerator; bfloat16 works on a CPU too")
        if settings.nesterov and not (settings.name == "sgd" and settings.momentum):
            raise ValueError("optimizer.nesterov: expected sgd with a momentum above 0")
        self._step, self._recipe, self._per_epoch = step, recipe, steps_per_epoch
        self._parameters = [p for p in step.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError(f"model.freeze: loss.name = {recipe.loss.name!r} has no parameters to train")
        shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if half:
            shared["fused"] = True  # otherwise the gradient scaler waits for the device in every step
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self._parameters, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
            if settings.name == "sgd"
            else torch.optim.AdamW(self._parameters, betas=(settings.momentum, 0.999), **shared)
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=half)
        self._module: nn.Module = step
        if world.size > 1:
            self._module = _distributed(step, world.device)
        micro = run.micro_batch_size
        self._micro = nckernels.MicroBatches(self._module, micro) if micro else None
        self._device = world.device

    def learning_rate(self, step: int) -> float:
        recipe = self._recipe
        return learning_rate(recipe.schedule, recipe.optimizer, step, self._per_epoch, recipe.run.batch_size)

    def step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch after ``step`` steps; returns loss, gradient norm and feature norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad()
        with self._autocast():
            micro = self._micro
            loss = self._module(images, labels) if micro is None else self._step.loss(micro(images), labels)
        self.scaler.scale(loss).backward()
        if micro is not None:
            micro.backward()
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([x.detach().float() for x in (loss, norm, self._step.feature_norm)])

    def close(self) -> None:
        """Release DistributedDataParallel, so that it does not hold the last reference to its process group.

        Its reducer holds the GIL while it is freed. If the group were freed with it, the group would wait for gloo's
        threads, one of which may wait for the GIL: a deadlock.
        """
        self._module, self._micro = self._step, None

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self._recipe.run.precision]
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

    def _clip(self) -> Tensor:
        limit = self._recipe.optimizer.clip
        if limit:
            return torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])


def _distributed(step: TrainStep, device: torch.device) -> DistributedDataParallel:
    """Wrap the step so that gradients are averaged. Buffers are not synchronised: queues belong to their rank, and the
    statistics of BatchNorm are broadcast before an evaluation."""
    indices = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(step, device_ids=indices, **options)
