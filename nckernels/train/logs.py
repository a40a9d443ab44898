"""Output of a run while it trains: ``log.jsonl``, TensorBoard, and a bar or lines on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .files import write_text


class Window:
    """Means over steps. The values are added in the order of the steps, so the result does not depend on when they were
    copied from the device, and a resumed run has the digits of an uninterrupted one."""

    def __init__(self, *names: str) -> None:
        self.count = 0
        self.sums = dict.fromkeys(names, 0.0)

    def add(self, *values: float) -> None:
        self.count += 1
        for name, value in zip(self.sums, values, strict=True):
            self.sums[name] += value

    def take(self) -> dict[str, float]:
        """The means, NaN without values; starts the next window."""
        means = {name: value / self.count if self.count else math.nan for name, value in self.sums.items()}
        self.count, self.sums = 0, dict.fromkeys(self.sums, 0.0)
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.sums = state["count"], dict(state["sums"])


class Log:
    """``log.jsonl``, one JSON object per line, and TensorBoard's events if it is installed.

    Args:
        folder: folder of the run; None: nothing is written.
        step: the step from which the run continues. Later lines, from a process that was killed after its last
            checkpoint, are removed.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._file: Any = None
        self._board: Any = None
        if folder is None:
            return
        path = folder / "log.jsonl"
        if path.exists():
            write_text(path, "".join(_up_to(path.read_text(errors="replace"), step)))
        self._file = open(path, "a")  # noqa: SIM115 - closed by close()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def line(self, step: int, values: dict[str, float]) -> None:
        """Write a line of the log; numbers that are not finite become null."""
        if self._file is not None:
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **known}) + "\n")
            self._file.flush()
        self.scalars(step, "train", values)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Write scalars to TensorBoard only."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def sync(self) -> None:
        """Flush to disk. Called before a checkpoint, so that the log has all lines up to its step."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        for part in (self._file, self._board):
            if part is not None:
                part.close()


class Terminal:
    """Progress on standard error: a bar on a terminal, otherwise a line for each evaluation.

    Args:
        progress: True: always the bar; False: nothing; None: as above.
    """

    def __init__(self, name: str, total: int, step: int, progress: bool | None) -> None:
        self._lines = progress is None and not sys.stderr.isatty()
        hidden = not progress if progress is not None else self._lines
        self._bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=hidden)
        self._total = total

    def step(self) -> None:
        self._bar.update()

    def evaluation(self, step: int, text: str) -> None:
        """Show the result of an evaluation."""
        self._bar.set_postfix_str(text)
        if self._lines:
            print(f"step {step}/{self._total}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


def describe(images: Tensor, labels: Tensor) -> str:
    """Statistics of a batch, for the message of a diverged run."""
    x = images.detach().double()
    text = f"images: min {x.min():.4g}, max {x.max():.4g}, mean {x.mean():.4g}, std {x.std(correction=0):.4g}"
    counts = torch.bincount(labels.cpu()) if labels.dim() == 1 else labels.cpu().sum(0).long()
    present = counts.nonzero().flatten().tolist()
    if len(present) > 20:
        numbers = counts[counts > 0]
        return f"{text}; labels: {len(present)} classes, {int(numbers.min())} to {int(numbers.max())} samples of each"
    return f"{text}; labels: {', '.join(f'{int(counts[c])} of {c}' for c in present)}"


def _up_to(text: str, step: int) -> list[str]:
    """The lines up to ``step``; a crash may have cut off the last one."""
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(line)
    return lines
