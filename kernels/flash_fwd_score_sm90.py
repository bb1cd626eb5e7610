"""Scores that are not plain products, and denominators that hold more than keys."""

from cutlass import Float32, cute

from .flash_fwd_sm90 import At, Problem, Rows, Warpgroup
from .softmax import LOG2_E
from .tile_scheduler import Tile


class Scored:
    """Goes before a kernel's class: `type(name, (Scored, FlashFwdSm90), {})`. The config's score is applied to S."""

    def _scale_log2(self, problem: Problem):
        return self.config.score.scale_log2(problem)

    def _rows(self, tile: Tile, row0, problem: Problem) -> Rows:
        rows = super()._rows(tile, row0, problem)
        return rows._replace(score=self.config.score.begin(tile.head, tile.batch, problem))

    def _score(self, w: Warpgroup, S, at: At):
        self.config.score.apply(S, w.frag.cS, at, self.config.tile_n, w.problem)


class Sinks:
    """Goes before a kernel's class. A logit of each head joins its rows' denominators (arXiv:2309.17453)."""

    def _totals(self, w: Warpgroup, tile: Tile):
        _, seen = super()._totals(w, tile)
        (address,) = w.problem.others
        sinks = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=4)
        sink = cute.make_tensor(sinks + tile.head, 1)[0]
        return w.frag.softmax.join(sink * LOG2_E, seen), seen
