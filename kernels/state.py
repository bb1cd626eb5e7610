"""What travels together through a kernel: one NamedTuple each, of tensors, pipelines and run-time numbers."""

from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import warpgroup

from .softmax import Softmax
from .tile_scheduler import ClusterBroadcast, Grid

ROWS = 64  # query rows of a warpgroup: the M of one WGMMA
L2_KV_BYTES = 16 << 20  # K/V of the heads worked on at a time, of 50 MB
SLACK = 1 << 30  # of a sequence that is not causal: no key is further from the diagonal
ELEMENT = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}


class Tma(NamedTuple):
    atom: cute.CopyAtom
    tensor: cute.Tensor


class Gmem(NamedTuple):
    q: Tma
    k: Tma
    v: Tma
    o: Tma | cute.Tensor  # cute.Tensor: (s, d, h, b), stored from registers
    lse: cute.Tensor  # (b, h, s), or (b, h, 0): not asked for; varlen: (h, total), or (h, 0)
    tile_counter: cute.Tensor  # (1,) Int32 of the dynamic scheduler, 0 between launches


class Smem(NamedTuple):
    q: cute.Tensor  # (64, d, warpgroups * q_stages)
    k: cute.Tensor  # (tile_n, d, stages)
    v: cute.Tensor  # (tile_n, d_v, stages)
    o: cute.Tensor | None  # (64, d_v, warpgroups)
    partials: cute.Tensor | None  # (128, d_v / 2 + 4, split - 1) float32: what the other CTAs of a split have found
    counts: cute.Tensor | None  # (1 + warpgroups,): how many events each role has written down
    tile: cute.Tensor  # (fields of the tile, 2): the work tiles
    broadcast: ClusterBroadcast | None  # of a dynamic scheduler in a cluster


class Pipes(NamedTuple):
    q: pipeline.PipelineAsync
    k: pipeline.PipelineAsync
    v: pipeline.PipelineAsync
    tile: pipeline.PipelineAsync


class Tiling(NamedTuple):
    """Static tiling: MLIR values, so it crosses into the kernel as an argument, never via self."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    sQ: cute.ComposedLayout  # (64, d, warpgroups * q_stages)
    sO: cute.ComposedLayout  # (64, d_v, warpgroups)
    sK: cute.ComposedLayout  # (tile_n, d, stages)
    sV: cute.ComposedLayout  # (tile_n, d_v, stages)


class Arguments(NamedTuple):
    """The run-time arguments behind the stream, by the part that takes them, and in the order in which they come."""

    mask: tuple = ()
    score: tuple = ()
    sinks: tuple = ()
    dropout: tuple = ()
    row_max: tuple = ()
    block_indices: tuple = ()
    sequences: tuple = ()
    plan: tuple = ()
    split: tuple = ()


class Problem(NamedTuple):
    grid: Grid
    seqlen_q: Int32
    seqlen_k: Int32
    group: Int32  # query heads per K/V head
    scale_log2: Float32  # |scale| * log2(e)
    q_sign: Float32  # 1, 0 or -1: the scale's sign, applied to Q
    args: Arguments
    of_mask: Any = None  # what the mask needs to know of a tile's sequence


class Rows(NamedTuple):
    """A warpgroup's 64 query rows of a tile."""

    row0: Int32
    head: Int32
    batch: Int32
    score: tuple  # what the score keeps of them
    weights: Any  # what dropout does
    blocks: tuple = ()  # what block sparsity does


class At(NamedTuple):
    """A block of scores: its rows, and which block of keys."""

    rows: Rows
    n_block: Int32
    partial: Any = None  # of block-sparse indices: whether mask_mod may hide some of it


class Frag(NamedTuple):
    """What one warpgroup multiplies, and where it accumulates."""

    wg: Int32  # which one
    thread: Int32  # of its 128
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tOrV: cute.Tensor
    tOrP: cute.Tensor
    acc_O: cute.Tensor  # ((2, 2, d_v / 8), 1, 1)
    softmax: Softmax
    cS: cute.Tensor  # (rows, cols) coordinates of this thread's S


class Warpgroup(NamedTuple):
    """All that an MMA warpgroup works with, from its first tile to its last."""

    gmem: Gmem
    smem: Smem
    pipes: Pipes
    tiling: Tiling
    problem: Problem
    frag: Frag


def wait_for_stream():
    """For what ran before on this stream; what comes next may set itself up."""
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()


def cluster_sync(size: int):
    """Of a cluster's CTAs, or of one CTA's threads."""
    if size > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


def rank():
    """This CTA's place in its cluster."""
    return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())


def address(dtype, value: Int64):
    return cute.make_ptr(dtype, value, cute.AddressSpace.gmem, assumed_align=4)


def nth(done: Int32, stages: int):
    """A consumer's state in a ring after so many loads: one counter serves the rings that move on once a tile."""
    return pipeline.PipelineState(stages, done, done % stages, done // stages % 2)


def before(state):
    """The state a block ago."""
    state = state.clone()
    state.reverse()
    return state


def release_if(when, pipe, state):
    if when:
        pipe.consumer_release(state)


def issue(mma, acc, A, B, accumulate):
    """One asynchronous GEMM, acc (+)= A B: one commit group."""
    warpgroup.fence()
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in range(cute.size(A.shape[2])):
        cute.gemm(atom, acc, A[None, None, k], B[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


@cute.jit
def publish(smem: Smem, pipes: Pipes, state, tile):
    """The producer hands the next work tile to the MMA warpgroups, decoded: divisions stay off their path."""
    pipes.tile.producer_acquire(state)
    with cute.arch.elect_one():
        for i in cutlass.range_constexpr(len(tile)):
            smem.tile[i, state.index] = Int32(tile[i])
        pipes.tile.producer_commit(state)
    state.advance()
    return state


@cute.jit
def consume(smem: Smem, pipes: Pipes, state, tile_type: cutlass.Constexpr):
    """A work tile, as the producer published it."""
    pipes.tile.consumer_wait(state)
    fields = [cute.arch.make_warp_uniform(smem.tile[i, state.index]) for i in range(len(tile_type._fields))]
    pipes.tile.consumer_release(state)
    tile = tile_type(*fields)
    return tile._replace(valid=tile.valid != 0)
