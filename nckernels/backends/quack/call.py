"""The product with an epilogue, by quack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contract import Operand, Product
from .epilogue import exponentials, exponentials_of_others


@dataclass(frozen=True)
class Tile:
    """How quack's kernel cuts a panel, in its own words."""

    rows: int
    columns: int
    cluster: int
    """Thread blocks that share what they fetch of the others."""
    pingpong: bool
    """Whether two groups of warps take turns, one in the epilogue while the other multiplies."""
    dynamic: bool
    """Whether thread blocks ask for their next tile."""


TILES = {
    9: Tile(128, 160, 2, pingpong=True, dynamic=False),
    10: Tile(256, 192, 2, pingpong=False, dynamic=True),
    12: Tile(128, 128, 1, pingpong=True, dynamic=True),
}
"""By the major compute capability: the widest of quack's tiles that leave registers for both epilogues."""


class QuackProduct(Product):
    """Compiled when it is first called, in some seconds, and kept on disk by quack."""

    def __init__(self, major: int) -> None:
        self.tile = TILES[major]
        self.columns = self.tile.columns

    def __call__(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        self._gemm(p, q, shift, e, sums, launch=True)

    def compile(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        """All but the launch; for tensors that need not be on a GPU."""
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
    """That of the device's architecture."""
    return QuackProduct(torch.cuda.get_device_capability(device)[0])
