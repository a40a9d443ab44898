"""Image files: decoding them in worker processes, and finding those that cannot be decoded."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cache
from .seeds import mix
from .sets import DataError, Dataset, Files

Sample = tuple[int, tuple[int | str, ...]]
"""The row of a file and the parts of the seed of its views; no parts if the transform is not random."""


class FileReader:
    """Batches of image files, decoded and transformed by ``workers`` processes, which are kept if ``persistent``.

    Every view of a sample has its own seed, so the images do not depend on the process that makes them.
    """

    def __init__(
        self,
        files: Files,
        transform: Callable[[Any], Tensor],
        *,
        views: int = 1,
        workers: int,
        device: torch.device,
        persistent: bool = False,
    ) -> None:
        self._workers = workers
        self._batches = _Batches()
        self._loader = torch.utils.data.DataLoader(
            _Decoded(files.paths, transform, views),
            batch_sampler=self._batches,  # type: ignore[arg-type]
            collate_fn=_stack,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_leave_group,
            generator=torch.Generator(),  # otherwise the loader would draw from the global generator
        )

    def read(self, batches: Iterable[list[Sample]]) -> Iterator[Tensor]:
        """The images of each batch, on the CPU.

        Raises:
            DataError: for an image that cannot be read, naming it, and for a worker that died.
        """
        self._batches.content = batches
        reading = iter(self._loader)
        try:
            for images in reading:
                if isinstance(images, _Unreadable):
                    raise DataError(
                        f"{images.path}: the image cannot be read ({images.reason}); data.skip_unreadable=true leaves "
                        "out such images"
                    )
                yield images
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            # A worker that dies while it sends a batch leaves a broken connection.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            # Until the workers are shut down, PyTorch's signal handler may raise the same error again, anywhere.
            getattr(reading, "_shutdown_workers", lambda: None)()
            raise DataError(
                f"one of the {self._workers} processes that read images died ({str(error) or type(error).__name__}). "
                "A frequent cause is lack of memory, or of shared memory in /dev/shm: try a smaller data.workers; 0 "
                "reads in the main process"
            ) from error


def readable(dataset: Dataset, workers: int) -> Dataset:
    """``dataset`` without the files that cannot be decoded, with a warning that counts them.

    Each file is decoded once, on every rank. The result is kept in the cache folder, and is valid as long as the names,
    sizes and modification times of all files are the same.
    """
    found = {}
    for part in ("train", "test"):
        split = getattr(dataset, part)
        if isinstance(split, Files):
            found[part] = _unreadable(split, workers)
    bad = [split.paths[i] for part, rows in found.items() for split in [getattr(dataset, part)] for i in rows]
    if not bad:
        return dataset
    count = sum(len(getattr(dataset, part)) for part in found)
    listed = ", ".join(str(path) for path in bad[:5]) + (", ..." if len(bad) > 5 else "")
    warnings.warn(f"{len(bad)} of {count} images cannot be read and are left out: {listed}", stacklevel=3)
    kept = {}
    for part, rows in found.items():
        good = torch.ones(len(getattr(dataset, part)), dtype=torch.bool)
        good[rows] = False
        kept[part] = getattr(dataset, part).take(good.nonzero()[:, 0])
    return replace(dataset, **kept)


def _unreadable(files: Files, workers: int) -> list[int]:
    """Rows of files that cannot be decoded."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files.paths:
        try:
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        except OSError:
            digest.update(f"{path}\0".encode())
    kept = cache.cache_folder() / f"unreadable-{digest.hexdigest()}.json"
    try:
        rows = json.loads(kept.read_text())
        if isinstance(rows, list) and all(isinstance(i, int) and 0 <= i < len(files) for i in rows):
            return rows
    except (OSError, ValueError):
        pass
    with ThreadPoolExecutor(max(workers, 1)) as pool:  # PIL decodes without holding Python's lock
        failures = pool.map(_failure, files.paths)
        rows = [i for i, failure in enumerate(failures) if failure]
    cache.write(kept, lambda file: file.write(json.dumps(rows).encode()))
    return rows


def _failure(path: Path | str) -> str:
    try:
        _decode(path)
    except Exception as error:  # whatever PIL's decoders raise
        return str(error) or type(error).__name__
    return ""


def _decode(path: Path | str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class _Unreadable:
    """Sent in place of a batch, because an exception from a worker would arrive as a traceback in text."""

    path: str
    reason: str


class _Batches:
    """A batch sampler whose batches can be replaced for each pass, so that the workers can be kept."""

    content: Iterable[list[Sample]] = ()

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self.content)


class _Decoded(torch.utils.data.Dataset):
    def __init__(self, paths: tuple[Path | str, ...], transform: Callable[[Any], Tensor], views: int) -> None:
        self._paths, self._transform, self._views = paths, transform, views

    def __getitem__(self, sample: Sample) -> Tensor | _Unreadable:
        row, parts = sample
        try:
            image = _decode(self._paths[row])
        except Exception as error:  # whatever PIL's decoders raise
            return _Unreadable(str(self._paths[row]), str(error) or type(error).__name__)
        if not parts:
            return self._transform(image)
        with torch.random.fork_rng(devices=[]):
            made = [self._seeded(image, mix(*parts, view)) for view in range(self._views)]
        return made[0] if self._views == 1 else torch.stack(made)

    def _seeded(self, image: Any, seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerator
        return self._transform(image)


def _stack(samples: list[Tensor | _Unreadable]) -> Tensor | _Unreadable:
    for sample in samples:
        if isinstance(sample, _Unreadable):
            return sample
    return torch.stack([sample for sample in samples if isinstance(sample, Tensor)])


def _leave_group(_: int) -> None:
    """Leave the trainer's process group, so that signals to the group reach only the trainer, which ends its workers.

    Otherwise a signal that asks the trainer to save would kill a worker, and the dead worker would end the training.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
