"""The training loop: one process, or several under torchrun."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import nckernels

from .data import Batches, DataError, Dataset, open_data
from .evaluate import evaluate
from .folder import Folder
from .heads import Head
from .history import History, new_history
from .keeper import Keeper
from .logs import Log, Terminal, Window, describe
from .models import Network
from .probes import probe
from .processes import Stop, World, world
from .recipe import Recipe
from .step import Optimisation, TrainStep, build, check_labels, seed, warn_of_batchnorm

LossOf = Callable[[Any], Callable[[Tensor, Tensor], Tensor]]


@dataclass
class Run:
    """The result of :func:`fit`; ``history.finished`` is False if it was stopped before the end."""

    network: Network
    head: Head
    data: Dataset
    history: History
    folder: Path | None = None


class TrainingError(RuntimeError):
    """A training that cannot continue for an external reason, such as files that cannot be read."""


def fit(
    recipe: Recipe,
    folder: Path | None = None,
    *,
    resume: bool = False,
    progress: bool | None = None,
    loss_of: LossOf | None = None,
) -> Run:
    """Train by a recipe, and measure neural collapse during the training.

    Under torchrun (``RANK`` in the environment), or with a default process group, the processes share every batch.

    Args:
        folder: for checkpoints, history and logs; None: nothing is written. With a folder, SIGTERM and SIGINT end the
            training with a checkpoint after the current step (with several processes: at the next line of the log).
        resume: continue from the folder's checkpoint, if there is one. On a CPU, with the same number of processes, the
            result has the bits of an uninterrupted run. The recipe must be that of the checkpoint, except for the keys
            in ``checkpoint.FREE``.
        progress: a bar (True) or nothing (False); None: a bar on a terminal, elsewhere a line for each evaluation.
        loss_of: a function of the head that returns another training loss, of features and labels. If that is a
            module, its state is kept too.

    The seed determines initialisation and batches, which are the same for runs of different losses. The global random
    state is restored. Random numbers of the training, such as dropout's, are functions of seed, step and rank.

    Raises:
        ValueError: naming the key, if a setting does not fit the machine or the data set; naming the folder, if it
            already has a run, has a run of another recipe, or is in use; naming the file, if a checkpoint is damaged.
        FloatingPointError: if the loss or the gradient is not finite.
        TrainingError: if data cannot be read during the training.
        OSError: if the folder cannot be written to. The last checkpoint stays.

    Example:
        >>> from nckernels.train import fit, load_recipe
        >>> recipe = load_recipe("digits/nonl", ["schedule.epochs=1"])
        >>> run = fit(recipe, progress=False)
        >>> run.history.finished, run.history.epochs
        (True, [0.0, 1.0])
    """
    with ExitStack() as stack:
        place = world(recipe.run.device)
        stack.enter_context(_settings(recipe, place.device))
        saved = None
        if folder is not None:
            folder = Path(folder)
            saved = place.agreed(lambda: _open(stack, folder, recipe, resume))
        data = open_data(recipe.data, seed=recipe.run.seed)
        check_labels(recipe, data)
        training = _Training(recipe, place, data, folder, saved, loss_of, progress)
        with contextlib.closing(training), Stop(folder is not None) as stop:
            training.run(stop)
        return Run(training.network, training.head, data, training.history, folder)


class _Training:
    """The state of a run between two steps."""

    def __init__(
        self,
        recipe: Recipe,
        place: World,
        data: Dataset,
        folder: Path | None,
        saved: dict[str, Any] | None,
        loss_of: LossOf | None,
        progress: bool | None,
    ) -> None:
        self.recipe, self.world, self.data = recipe, place, data
        self.batches = Batches(data, recipe, place.device, **place.share)
        self.per_epoch = self.batches.steps_per_epoch
        self.total = recipe.schedule.epochs * self.per_epoch
        self.network, self.head = build(recipe, data, place, steps_per_epoch=self.per_epoch, start=saved is None)
        criterion = self.head.loss if loss_of is None else loss_of(self.head)
        self.step = TrainStep(self.network, self.head, criterion, recipe)
        self.optimisation = Optimisation(self.step, recipe, place, self.per_epoch)
        warn_of_batchnorm(self.network, place)
        self.done = 0
        self.recorded: list[Tensor] = []  # loss, gradient norm, feature norm of the steps since the last `_look`
        self.means, self.loss = Window("loss", "grad_norm", "feature_norm"), Window("loss")
        """Means since the last line of the log, and since the last evaluation."""
        self.history = new_history(recipe, data, self.step, place.device)
        parts = {
            "network": self.network,
            "head": self.head,
            "criterion": criterion,
            "optimizer": self.optimisation.optimizer,
            "scaler": self.optimisation.scaler,
            "means": self.means,
            "loss": self.loss,
        }
        self.keeper = Keeper(folder, recipe, place, parts)
        if saved is not None:
            self.done, self.history = self.keeper.restore(saved, self.history.versions)
        first = place.rank == 0
        self.log = Log(folder if first else None, self.done)
        self.terminal = Terminal(recipe.name or recipe.loss.name, self.total, self.done, progress if first else False)
        self.started, self.lines = 0.0, (self.done, self.history.seconds)

    def close(self) -> None:
        self.optimisation.close()
        self.log.close()
        self.terminal.close()

    def run(self, stop: Stop) -> None:
        """Train to the end, or to the step after which the processes were told to stop."""
        if self.history.finished:
            return
        if not self.history.steps:
            self._evaluate(math.nan)
        self.keeper.write(self.history)
        self.step.train()
        self.started = time.perf_counter()
        while self.done < self.total:
            with contextlib.closing(self._batches(self.done)) as batches:
                for images, labels in batches:
                    seed(self.world.device, self.recipe.run.seed, "step", self.done, self.world.rank)
                    self.recorded.append(self.optimisation.step(self.done, images, labels))
                    self.done += 1
                    self.terminal.step()
                    if self._between_steps(stop):
                        return
        if self.recipe.run.probes:
            with self._reading():
                self.history.classifiers = probe(
                    self.network, self.data, self.recipe, self.world.device, **self.world.share
                )
        self.history.finished = True
        self.keeper.write(self.history)

    def _batches(self, step: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batches from a step to the end of its epoch."""
        with self._reading():
            yield from self.batches.epoch(*divmod(step, self.per_epoch))

    def _between_steps(self, stop: Stop) -> bool:
        """Check the losses, write and evaluate if that is due; returns whether to stop."""
        run, step = self.recipe.run, self.done
        last = step == self.total
        line = step % run.log_every == 0
        evaluation = last or step % (run.eval_every or self.per_epoch) == 0
        save = last or (step % run.save_every == 0 if run.save_every else evaluation)
        # A single process may stop at once; several agree on it when they exchange the losses.
        if not (line or evaluation or save or (self.world.size == 1 and stop.requested)):
            return False
        stopping = self._look(stop.requested)
        if line:
            self._write_line()
        if evaluation:
            self._evaluate(self.loss.take()["loss"])
        if save or stopping:
            self.log.sync()
            self.keeper.save(self.done, self.history)
        if evaluation:
            self.keeper.write(self.history)
        self.started = time.perf_counter()
        return stopping and not last

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Context for code that reads data: its errors become a TrainingError that names the step."""
        try:
            yield
        except (DataError, OSError) as error:
            raise TrainingError(f"after step {self.done}: {error}; {self.keeper.last()}") from error

    def _look(self, stopping: bool) -> bool:
        """Copy the recorded values from the device and check them; returns whether any rank is to stop.

        Raises:
            FloatingPointError: for the first step whose loss or gradient is not finite.
        """
        flag = torch.full((1, 3), float(stopping), device=self.world.device)
        values = torch.cat([*self.recorded, flag.flatten()]).view(-1, 3)
        if self.world.size > 1:
            dist.all_reduce(values)
            values = values / self.world.size
        *rows, (wish, _, _) = values.tolist()
        now = time.perf_counter()
        self.history.seconds += now - self.started
        self.started = now
        scaled = self.optimisation.scaler.is_enabled()  # it skips steps whose gradients are not finite
        for i, (loss, gradient, feature) in enumerate(rows):
            if not math.isfinite(loss) or not (scaled or math.isfinite(gradient)):
                step = self.done - len(rows) + i
                what = f"the loss is {loss:g}, the norm of the gradient {gradient:g}, of the features {feature:g}"
                raise FloatingPointError(self._diverged(step, what))
            self.means.add(loss, gradient, feature)
            self.loss.add(loss)
        self.recorded = []
        return wish > 0

    def _diverged(self, step: int, what: str) -> str:
        """The message of a diverged run. The bad batch is made again, because batches are functions of their step."""
        with contextlib.closing(self._batches(step)) as batches:
            images, labels = next(batches)
        where = f"training diverged in step {step + 1} (epoch {step // self.per_epoch + 1})"
        return f"{where}: {what}; {describe(images, labels)}; {self.keeper.last()}; a smaller optimizer.lr may help"

    def _evaluate(self, loss: float) -> None:
        last = self.done == self.total
        if self.world.size > 1:  # on CPUs each rank has its own statistics of BatchNorm
            for buffer in self.network.buffers():
                dist.broadcast(buffer, src=0)
        try:
            with self._reading():
                evaluation = evaluate(
                    self.network, self.head, self.data, self.recipe, self.world.device, cosines=last, **self.world.share
                )
        except FloatingPointError as error:
            raise FloatingPointError(f"after step {self.done}: {error}; {self.keeper.last()}") from error
        self.history.add(self.done, self.done / self.per_epoch, loss, evaluation)
        values = {"loss": loss, "train_accuracy": evaluation.train_accuracy, "test_accuracy": evaluation.test_accuracy}
        self.log.scalars(self.done, "evaluation", {**values, **evaluation.metrics})
        nc1 = f", NC1 {evaluation.metrics['nc1']:.1e}" if "nc1" in evaluation.metrics else ""
        self.terminal.evaluation(self.done, f"loss {loss:.3f}, test {evaluation.test_accuracy:.1%}{nc1}")

    def _write_line(self) -> None:
        means = self.means.take()
        before, seconds = self.lines
        steps, self.lines = self.done - before, (self.done, self.history.seconds)
        rate = steps * self.recipe.run.batch_size / max(self.history.seconds - seconds, 1e-9)
        values = {
            "epoch": self.done / self.per_epoch,
            "loss": means["loss"],
            "lr": self.optimisation.learning_rate(self.done - 1),
            "grad_norm": means["grad_norm"],
            "feature_norm": means["feature_norm"],
            "samples_per_second": rate,
            "seconds": self.history.seconds,
        }
        if isinstance(self.head, nckernels.FixedPrototypeHead) and self.head.dynamic:
            values["reassigned"] = self.head.reassigned / len(self.head.points)
        self.log.line(self.done, values)


def _open(stack: ExitStack, folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    opened = stack.enter_context(contextlib.closing(Folder(folder)))
    return opened.open(recipe, resume)


@contextlib.contextmanager
def _settings(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Apply the recipe's settings of torch and nckernels, and restore them afterwards."""
    before, threads, backend = torch.get_num_threads(), recipe.run.threads, recipe.run.backend
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if backend:
            stack.enter_context(nckernels.use_backend(backend))
        if threads:
            stack.callback(torch.set_num_threads, before)
            torch.set_num_threads(threads)
        yield
