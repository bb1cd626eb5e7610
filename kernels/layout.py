"""Views of WGMMA accumulators, and what is done to their rows."""

import cutlass
from cutlass import Float32, Int32, cute


def acc_mn(acc):
    """((2, 2, V), MMA_M, MMA_N) accumulator -> (rows, cols) view."""
    l = acc.layout
    s, d = l.shape, l.stride
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((s[0][1], s[1]), (s[0][0], s[0][2], s[2])), stride=((d[0][1], d[1]), (d[0][0], d[0][2], d[2]))
        ),
    )


def acc_as_A(acc):
    """S accumulator ((2,2,N/8), M, N') -> A operand ((2,2,2), M, (N/16, N'))."""
    l = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
    s, d = l.shape, l.stride
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((s[0][0], s[0][1], s[0][2][0]), s[1], (s[0][2][1], s[2])),
            stride=((d[0][0], d[0][1], d[0][2][0]), d[1], (d[0][2][1], d[2])),
        ),
    )


def within_thread(r: int, c: int) -> tuple[int, int]:
    """Row and column of `acc_mn`'s (r, c), less those of the thread's first (PTX ISA, WGMMA's fragment D)."""
    return 8 * r, c // 2 * 8 + c % 2


def scale_rows(acc, scale):
    """acc's row r times scale[r]."""
    rows = acc_mn(acc)  # (rows, cols)
    for r in range(cute.size(scale)):
        rows[r, None].store(rows[r, None].load() * scale[r])


@cute.jit
def normalise_rows(acc: cute.Tensor, scale: cute.Tensor, seen: cute.Tensor):
    """acc's row r times scale[r]; 0 where the row saw no key, whatever 0 * V left there: seen[r] is then -inf."""
    scale_rows(acc, scale)
    rows = acc_mn(acc)  # (rows, cols)
    for r in cutlass.range_constexpr(cute.size(scale)):
        if seen[r] == -Float32.inf:
            rows[r, None].fill(0.0)


def scale_and_add(row: cute.Tensor, scale, others: list, factors: list):
    """A row of O times scale, and other CTAs' parts of it, each times its factor."""
    for i in range(cute.size(row)):
        total = row[i] * scale
        for other, factor in zip(others, factors, strict=True):
            total = cute.math.fma(other[i], factor, total)
        row[i] = total


def in_registers(t: cute.Tensor) -> cute.Tensor:
    """A copy."""
    own = cute.make_rmem_tensor(t.shape, t.element_type)
    cute.autovec_copy(t, own)
    return own


def not_before(S: cute.Tensor, n: Int32) -> Int32:
    """n, but known no sooner than S: ptxas would work ahead between the WGMMAs of PV, while other warpgroups wait."""
    zero = cute.arch.inline_ptx(
        "{{ .reg .b32 t; popc.b32 t, {$r0}; shr.u32 {$w0}, t, 6; }}",
        write_only_types=[Int32],
        read_only_args=[S[0].bitcast(Int32)],
    )
    return n + zero


@cute.jit
def quad_transpose(x, thread):
    """Thread t of four has x[0] to x[3]; it gets the four threads' x[t]."""
    x = list(x)
    for bit in cutlass.range_constexpr(2):
        step = 1 << bit
        high = (thread >> bit) % 2 == 1
        for i in cutlass.range_constexpr(4):
            if cutlass.const_expr(i & step == 0):
                give = x[i] if high else x[i + step]
                got = cute.arch.shuffle_sync_bfly(give, step)
                low_word, high_word = x[i], x[i + step]
                x[i] = got if high else low_word
                x[i + step] = high_word if high else got
    return x
