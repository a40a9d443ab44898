"""The learning rate of a step."""

from __future__ import annotations

import math

from .recipe import Optimizer, Schedule


def learning_rate(schedule: Schedule, optimizer: Optimizer, step: int, steps_per_epoch: int, batch_size: int) -> float:
    r"""The learning rate after ``step`` steps. It is a function of its arguments, so resuming needs no saved state.

    The highest learning rate is :math:`\eta_0` = lr, times batch size / lr_batch if ``lr_batch`` is set. Warm-up is
    linear from ``warmup_lr`` to :math:`\eta_0`. After t of the T steps that follow, the cosine is ([NCD] App. E.3)

    .. math::
        \eta_{min} + (\eta_0 - \eta_{min}) (1 + \cos(\pi t / T)) / 2, \qquad \eta_{min} = \text{final} \; \eta_0.

    With ``every`` = "epoch", the first step of the epoch is used. Milestones count epochs from the start of the run.
    """
    high = optimizer.lr * (batch_size / optimizer.lr_batch if optimizer.lr_batch else 1.0)
    epoch = step // steps_per_epoch
    if schedule.every == "epoch":
        step = epoch * steps_per_epoch
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return schedule.warmup_lr + (high - schedule.warmup_lr) * step / warmup
    if schedule.name == "constant":
        return high
    if schedule.name == "step":
        return high * schedule.gamma ** sum(milestone <= epoch for milestone in schedule.milestones)
    low = schedule.final * high
    share = (step - warmup) / (schedule.epochs * steps_per_epoch - warmup)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * share))
