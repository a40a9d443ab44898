"""Seeds made of a purpose, an epoch and a step, so that random numbers do not depend on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """A seed of 63 bits, the blake2b hash of the parts in their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU with the seed ``mix(*parts)``."""
    return torch.Generator().manual_seed(mix(*parts))
