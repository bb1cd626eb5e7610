"""What becomes of P before it is multiplied by V: nothing, where no feature says otherwise."""

from .part import Part
from .state import At, Problem, Warpgroup
from .tile_scheduler import Tile


class Weights(Part):
    """P as the softmax leaves it."""

    def begin(self, tile: Tile, problem: Problem):
        """What a warpgroup keeps for a tile: `at.rows.weights`."""
        return ()

    def apply(self, w: Warpgroup, P, at: At):
        """P (rows, cols), unnormalised, becomes what V is multiplied by."""
