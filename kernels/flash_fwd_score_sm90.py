"""Scores that are not plain products, and denominators that hold more than keys."""

from cutlass import Float32, cute

from .flash_fwd_sm90 import ROWS, At, Problem, Rows, Warpgroup
from .softmax import Exponents
from .tile_scheduler import Tile


class Scored:
    """Goes before a kernel's class: `type(name, (Scored, FlashFwdSm90), {})`. The config's score is applied to S."""

    def _scale_log2(self, problem: Problem):
        return self.config.score.scale_log2(problem, problem.score_args)

    def _rows(self, tile: Tile, row0, problem: Problem) -> Rows:
        rows = super()._rows(tile, row0, problem)
        return rows._replace(score=self.config.score.begin(tile.head, tile.batch, problem.score_args))

    def _score(self, w: Warpgroup, S, at: At):
        self.config.score.apply(S, w.frag.cS, at, self.config.tile_n, w.problem, w.problem.score_args)

    def _exponents(self, w: Warpgroup, S, at: At) -> Exponents:
        """The score's own, where it has a shorter way to them."""
        c = self.config
        own = c.score.exponents(w.frag.cS, at, c.tile_n, w.problem, w.problem.score_args)
        if own is None or (c.score.peaked and not c.from_diagonal):
            self._score(w, S, at)
            return super()._exponents(w, S, at)
        return own


class Sinks:
    """Goes before a kernel's class. A logit of each head joins its rows' denominators (arXiv:2309.17453)."""

    def _totals(self, w: Warpgroup, tile: Tile):
        _, seen = super()._totals(w, tile)
        address = w.problem.others[0]
        sinks = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=4)
        logits = cute.make_rmem_tensor_like(seen, Float32)
        for r in range(cute.size(seen)):
            row = tile.m_block * self.config.tile_m + self._row_block(w.frag.wg) * ROWS + w.frag.cS[r, 0][0]
            _, head = self._whose(row, tile, w.gmem)
            logits[r] = cute.make_tensor(sinks + head, 1)[0]
        return w.frag.softmax.join(logits, seen), seen
