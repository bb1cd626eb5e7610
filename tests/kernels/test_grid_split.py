"""Keys shared by all CTAs: the list of blocks by brute force, on plain ints, with the kernel's own functions."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from cute_attn.kernels.grid_split import EqualShares, begin_of, row_of, rows_with_runs


class Share(NamedTuple):
    tile: int
    first: int
    end: int
    first_row: int
    last_row: int


def shares(sequences, rows):
    """Of each row of CTAs: (sequence, its Share), where a sequence is (tiles, blocks of each)."""
    begins = [0]
    for tiles, each in sequences:
        begins.append(begins[-1] + tiles * each)
    total, found = begins[-1], []
    rows = rows_with_runs(total, rows, EqualShares.min_blocks, 0)
    for row in range(rows):
        block, stop = begin_of(row, total, rows), begin_of(row + 1, total, rows)
        found.append([])
        while block < stop:
            s = next(s for s in range(len(sequences)) if block < begins[s + 1])
            tile, first = divmod(block - begins[s], sequences[s][1])
            start, end = block - first, min(first + stop - block, sequences[s][1])
            whose = (row_of(x, total, rows) for x in (start, start + sequences[s][1] - 1))
            found[-1].append((s, Share(tile, first, end, *whose)))
            block += end - first
    return found


@given(
    sequences=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=1, max_size=9),
    rows=st.integers(1, 140),
)
def test_every_block_is_taken_once(sequences, rows):
    found, parts = shares(sequences, rows), {}
    for row, run in enumerate(found):
        assert sum(share.first > 0 for _, share in run) <= 1, "a row has one place for a tile that goes on"
        assert sum(share.last_row > row for _, share in run) <= 1, "and one for a tile that it begins"
        assert all(share.first == 0 for _, share in run[1:])
        assert all(share.last_row == row for _, share in run[:-1])
        for s, share in run:
            parts.setdefault((s, share.tile), []).append((row, share))
    loads = [sum(share.end - share.first for _, share in run) for run in found]
    assert max(loads) - min(loads) <= 1
    assert list(parts) == [(s, t) for s, (tiles, _) in enumerate(sequences) for t in range(tiles)], "the list's order"
    for (s, _), of_tile in parts.items():
        assert [n for _, share in of_tile for n in range(share.first, share.end)] == list(range(sequences[s][1]))
        assert [row for row, _ in of_tile] == list(range(of_tile[0][0], of_tile[-1][0] + 1)), "neighbours"
        assert {share[3:] for _, share in of_tile} == {(of_tile[0][0], of_tile[-1][0])}, "each knows all of them"


@given(total=st.integers(1, 10**6), rows=st.integers(1, 140), data=st.data())
def test_whose_a_block_is(total, rows, data):
    block = data.draw(st.integers(0, total - 1))
    row = row_of(block, total, rows)
    assert begin_of(row, total, rows) <= block < begin_of(row + 1, total, rows)
    assert begin_of(0, total, rows) == 0 and begin_of(rows, total, rows) == total


@given(total=st.integers(0, 10**4), rows=st.integers(1, 140), least=st.integers(2, 6), few=st.sampled_from([0, 16]))
def test_runs_are_not_shorter_than_worth_their_merge(total, rows, least, few):
    found = rows_with_runs(total, rows, least, few)
    assert 1 <= found <= rows
    assert found == 1 or total // found >= (2 if found <= few else least)
    more = found + 1
    assert more > rows or total // more < (2 if more <= few else least), "no fewer than may be"


@given(heads=st.integers(1, 200), room=st.integers(1, 264))
def test_every_head_has_a_cta_in_each_row(heads, room):
    rows = EqualShares.rows(heads, room)
    assert rows >= 1 and (rows == 1 or rows * heads <= room)
