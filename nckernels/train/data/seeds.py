"""Random numbers as functions of what they are for: nothing depends on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """A seed of 63 bits, from blake2b of the parts: other parts, or the same in another order, give another seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU with the seed ``mix(*parts)``."""
    return torch.Generator().manual_seed(mix(*parts))
