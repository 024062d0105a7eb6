"""Tokens on a grid: products over tokens become products over maps, so that blocks can be laid on them.

A network that cuts images into tokens computes with values [B, tokens, C]. Where the tokens are the pixels of a small
map, a product over their channels is a pointwise convolution of that map. The rewriting reshapes values before and
after such a product; elementwise operations in between work on the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdjax.graph.channel_rules import SEVERAL, UNARY
from fdjax.graph.network import Graph, Layer
from fdjax.graph.operations import Operation, Operations

# (rows, columns) of the map that the tokens form.
Grid = tuple[int, int]


def on_grids(graph: Graph, grid_of: Callable[[str], Grid | None]) -> Graph:
    """Rewrites a network so that the products over tokens on a grid are products over maps.

    Args:
      graph: the network.
      grid_of: layer name -> the (rows, columns) of its tokens; None leaves the layer as it is.

    Returns:
      A graph that computes the same.

    Raises:
      ValueError: the grids fit no layer.
    """
    wanted = {name: grid_of(name) for name, layer in graph.layers.items() if _on_tokens(graph, layer)}
    grids = {
        graph.layers[name].operation: (int(grid[0]), int(grid[1]))
        for name, grid in wanted.items()
        if grid is not None and math.prod(grid) == graph.layers[name].in_size[0]
    }
    if not grids:
        asked = sorted({tuple(grid) for name in graph.layers if (grid := grid_of(name)) is not None})
        tokens = sorted({graph.layers[name].in_size[0] for name in wanted})
        found = f"those on tokens have {', '.join(map(str, tokens))}" if tokens else "no layer works on tokens"
        sizes = ", ".join(f"{rows}x{columns}" for rows, columns in asked)
        raise ValueError(f"the grid {sizes} fits no layer: it must have as many places as there are tokens; {found}")
    return Graph(_Rewriting(graph, grids).operations())


def _on_tokens(graph: Graph, layer: Layer) -> bool:
    """Returns whether a layer is the product of a value [B, tokens, C] with a kernel."""
    operation = graph.operations.operations[layer.operation]
    if operation.kind != "dot_general" or len(layer.in_size) != 1 or operation.inputs[0] not in graph.walk.live:
        return False
    return operation.params["dimension_numbers"][0][0] == (2,)


class _Rewriting:
    """Holds values as in the traced function, as maps, or as both, and reshapes between the two on demand."""

    def __init__(self, graph: Graph, grids: Mapping[int, Grid]):
        self._old, self._live, self._grids = graph.operations, graph.walk.live, grids
        self._shapes, self._dtypes = list(self._old.shapes), list(self._old.dtypes)
        self._made: list[Operation] = []
        # Value -> its map and grid; below, the values that exist as maps alone.
        self._maps: dict[int, tuple[int, Grid]] = {}
        self._only_maps: set[int] = set()

    def operations(self) -> Operations:
        for index, operation in enumerate(self._old.operations):
            if index in self._grids:
                self._product(operation, self._grids[index])
            elif (grid := self._common_grid(operation)) is not None:
                inputs = [self._as_map(value, grid) for value in operation.inputs]
                self._emit_map(operation, inputs, grid, operation.params)
            else:
                for value in operation.inputs:
                    self._plain(value)
                self._made.append(operation)
        for value in self._old.outputs:
            self._plain(value)
        old = self._old
        shapes, dtypes = tuple(self._shapes), tuple(self._dtypes)
        return Operations(
            shapes, dtypes, tuple(self._made), old.constants, old.variables, old.images, old.outputs
        )  # fmt: skip

    def _common_grid(self, operation: Operation) -> Grid | None:
        """Returns the grid of an elementwise operation if all inputs that depend on the image are maps on one grid."""
        if operation.kind not in UNARY | SEVERAL:
            return None
        grids = {self._maps[v][1] if v in self._only_maps else None for v in operation.inputs if v in self._live}
        ranks = {len(self._old.shapes[value]) for value in operation.inputs}
        return grids.pop() if len(grids) == 1 and ranks <= {0, 3} else None

    def _product(self, operation: Operation, grid: Grid) -> None:
        (_, kernel_axes), batch = operation.params["dimension_numbers"]
        params = {**operation.params, "dimension_numbers": (((3,), kernel_axes), batch)}
        image, kernel = operation.inputs
        self._plain(kernel)
        self._emit_map(operation, [self._as_map(image, grid), kernel], grid, params)

    def _emit_map(self, operation: Operation, inputs: Sequence[int], grid: Grid, params: Mapping[str, Any]) -> None:
        (value,) = operation.outputs
        batch, _, channels = self._old.shapes[value]
        made = self._new((batch, *grid, channels), self._old.dtypes[value])
        self._made.append(Operation(operation.kind, tuple(inputs), (made,), params, operation.source))
        self._maps[value] = made, grid
        self._only_maps.add(value)

    def _as_map(self, value: int, grid: Grid) -> int:
        shape = self._old.shapes[value]
        if not shape:
            return value
        if value not in self._maps or self._maps[value][1] != grid:
            self._plain(value)
            # A value that all tokens share becomes a map of one pixel.
            sides = grid if shape[1] == math.prod(grid) else (1, 1)
            made = self._new((shape[0], *sides, shape[2]), self._old.dtypes[value])
            self._reshape(value, made)
            self._maps[value] = made, grid
        return self._maps[value][0]

    def _plain(self, value: int) -> None:
        if value in self._only_maps:
            self._reshape(self._maps[value][0], value)
            self._only_maps.discard(value)

    def _reshape(self, value: int, made: int) -> None:
        params = {"new_sizes": self._shapes[made], "dimensions": None, "sharding": None}
        self._made.append(Operation("reshape", (value,), (made,), params))

    def _new(self, shape: tuple[int, ...], dtype: str) -> int:
        self._shapes.append(shape)
        self._dtypes.append(dtype)
        return len(self._shapes) - 1
