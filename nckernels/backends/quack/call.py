"""The call of quack's product with our epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contract import Operand, Product
from .epilogue import exponentials, exponentials_of_others


@dataclass(frozen=True)
class Tile:
    """The tile of quack's kernel, with its options."""

    rows: int
    columns: int
    cluster: int
    """Thread blocks that share the loads of the other operand."""
    pingpong: bool
    """Whether two groups of warps alternate, one in the epilogue while the other multiplies."""
    dynamic: bool
    """Whether tiles are assigned to thread blocks dynamically."""


TILES = {
    9: Tile(128, 160, 2, pingpong=True, dynamic=False),
    10: Tile(256, 192, 2, pingpong=False, dynamic=True),
    12: Tile(128, 128, 1, pingpong=True, dynamic=True),
}
"""By major compute capability: the widest of quack's tiles that leave registers for both epilogues."""


class QuackProduct(Product):
    """Compiled in the first call, which takes some seconds, and cached on disk by quack."""

    def __init__(self, major: int) -> None:
        self.tile = TILES[major]
        self.columns = self.tile.columns

    def __call__(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        self._gemm(p, q, shift, e, sums, launch=True)

    def compile(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        """Compile without launching; the tensors need not be on a GPU."""
        self._gemm(p, q, shift, e, sums, launch=False)

    def _gemm(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor, launch: bool) -> None:
        values: dict[str, Any] = {"p_scale": p.scale, "q_scale": q.scale, "shift": shift, "sums": sums}
        epilogue, tile = exponentials, self.tile
        if p.tag is not None:
            values |= {"p_tag": p.tag, "q_tag": q.tag}
            epilogue = exponentials_of_others
        epilogue.gemm(
            p.x, q.x, e, epi_args=values, tile_M=tile.rows, tile_N=tile.columns, cluster_M=tile.cluster,
            pingpong=tile.pingpong, is_dynamic_persistent=tile.dynamic, _launch=launch,
        )  # fmt: skip


def product_for(device: torch.device) -> QuackProduct:
    """The product for the device's architecture."""
    return QuackProduct(torch.cuda.get_device_capability(device)[0])
