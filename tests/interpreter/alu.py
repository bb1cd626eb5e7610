"""Arithmetic: an instruction becomes a function of a warp, which computes its 32 lanes with NumPy.

`where=w.where` writes the active lanes only; True: all of them.
"""

from collections.abc import Callable

import numpy as np

from .parse import SINK, Instruction, Not, Pair, Register, Vector
from .slots import TYPES, Slots
from .waits import for_lanes

TINY = np.finfo(np.float32).tiny
Step = Callable  # Warp -> None; or why it cannot go on, a Wait


def binary(op: np.ufunc):
    """d = a op b."""

    def make(i: Instruction, s: Slots) -> Step:
        kind = i.words[-1]
        d, a, b = (s.of(x, kind) for x in i.operands)

        def step(w):
            v = w.rows
            op(v[a], v[b], out=v[d], where=w.where)

        return step

    return make


def extremum(with_nan: np.ufunc, without: np.ufunc):
    """min and max; relu: 0 where that is below 0."""

    def make(i: Instruction, s: Slots) -> Step:
        op = with_nan if "NaN" in i.words or i.words[-1][0] != "f" else without
        if "relu" in i.words:
            return ternary(lambda a, b: np.maximum(op(a, b), 0), lambda kind: (kind,) * 3)(i, s)
        return binary(op)(i, s)

    return make


def unary(function: Callable):
    """d = op a."""

    def make(i: Instruction, s: Slots) -> Step:
        kind = i.words[-1]
        d, a = (s.of(x, kind) for x in i.operands)
        ftz = "ftz" in i.words

        def step(w):
            x = w.rows[a]
            w.put(d, flushed(function(flushed(x))) if ftz else function(x))

        return step

    return make


def ternary(function: Callable, kinds: Callable = lambda kind: (kind,) * 4):
    """d = op(a, b, c), of types that depend on the instruction's."""

    def make(i: Instruction, s: Slots) -> Step:
        d, *sources = (s.of(x, kind) for x, kind in zip(i.operands, kinds(i.words[-1]), strict=True))

        def step(w):
            w.put(d, function(*(w.rows[x] for x in sources)))

        return step

    return make


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormals as zeros of their sign."""
    small = np.abs(x) < TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def wide(a):
    """In twice the bits."""
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def high(a, b):
    if a.itemsize == 4:
        return (wide(a) * wide(b)) >> 32
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype)


def quotient(a, b):
    """Rounded to zero; of a division by 0, all ones."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    q = a // safe
    q = q + ((a % safe != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), q)


def remainder(a, b):
    return np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype))


def _multiply(i: Instruction, s: Slots) -> Step:
    if "hi" in i.words:
        return ternary(high, lambda kind: (kind,) * 3)(i, s)
    if "wide" in i.words:
        return ternary(lambda a, b: wide(a) * wide(b), lambda kind: (_wider(kind), kind, kind))(i, s)
    return binary(np.multiply)(i, s)


def _multiply_add(i: Instruction, s: Slots) -> Step:
    if "hi" in i.words:
        return ternary(lambda a, b, c: high(a, b).astype(a.dtype) + c)(i, s)
    if "wide" in i.words:
        return ternary(lambda a, b, c: wide(a) * wide(b) + c, lambda k: (_wider(k), k, k, _wider(k)))(i, s)
    return ternary(fma if i.words[-1][0] == "f" else lambda a, b, c: a * b + c)(i, s)


def _wider(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def shift(ufunc: np.ufunc):
    """By 32 bits or more everything is shifted out."""
    return ternary(
        lambda a, n: ufunc(a, np.minimum(n, 8 * a.itemsize).astype(a.dtype)) if a.dtype.kind == "i" else ufunc(a, n),
        lambda kind: (kind, kind, "u32"),
    )


def funnel_shift(i: Instruction, s: Slots) -> Step:
    left = "l" in i.words
    limit = 31 if "wrap" in i.words else 32

    def function(low, high, n):
        n = (n & 31 if limit == 31 else np.minimum(n, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return ternary(function)(i, s)


def lop3(i: Instruction, s: Slots) -> Step:
    d, a, b, c = (s.of(x, "b32") for x in i.operands[:4])
    table = i.operands[4].bits

    def step(w):
        v, found = w.rows, np.zeros(32, np.uint32)
        for bit in range(8):
            if table >> bit & 1:
                x, y, z = (v[r] if bit >> n & 1 else ~v[r] for r, n in ((a, 2), (b, 1), (c, 0)))
                found |= x & y & z
        w.put(d, found)

    return step


def prmt(a, b, selector):
    """Any four of eight bytes; with bit 3 of a selector, copies of its sign."""
    both = np.stack([a, b], axis=1).view(np.uint8)
    found = np.empty((len(a), 4), np.uint8)
    for i in range(4):
        pick = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = np.take_along_axis(both, (pick & 7)[:, None].astype(np.int64), 1)[:, 0]
        found[:, i] = np.where(pick & 8, np.where(byte & 128, 255, 0), byte)
    return found.view(np.uint32)[:, 0]


def bit_field(a, start, length):
    """bfe of unsigned numbers, and of signed ones."""
    bits, signed, places = 8 * a.itemsize, a.dtype.kind == "i", zip(a, start & 255, length & 255, strict=True)
    return np.array([_field(int(x), int(p), int(n), bits, signed) for x, p, n in places]).astype(a.dtype)


def _field(x: int, start: int, length: int, bits: int, signed: bool) -> int:
    sign = x >> min(start + length - 1, bits - 1) & 1 if signed and length else 0
    taken = x % (1 << bits) >> start
    kept = min(length, max(bits - start, 0))
    return (taken & ((1 << kept) - 1)) - (sign << kept)


def insert(a, b, start, length):
    """bfi: a's lowest bits into b."""
    start, length = np.minimum(start & 255, 32), np.minimum(length & 255, 32)
    ones = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
    return ((b & ~ones) | (a.astype(np.uint64) << start.astype(np.uint64) & ones)).astype(a.dtype)


def clz(a):
    return np.array([8 * a.itemsize - int(x).bit_length() for x in a], np.uint32)


def popc(a):
    return np.array([int(x).bit_count() for x in a], np.uint32)


def bfind(a):
    """The highest bit that is not the sign's; -1: none."""
    bits = [(int(x) if x >= 0 else ~int(x)).bit_length() - 1 for x in a]
    return np.array(bits, np.int32).view(np.uint32)


def _compare(word: str) -> Callable:
    ordered = {
        **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
        **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
        "ne": lambda a, b: (a != b) & (a == a) & (b == b),
        "num": lambda a, b: (a == a) & (b == b),
        "nan": lambda a, b: (a != a) | (b != b),
    }
    if word in ordered:
        return ordered[word]
    return lambda a, b: ordered[word[:-1]](a, b) | (a != a) | (b != b)  # the unordered ones: ltu, neu ...


def setp(i: Instruction, s: Slots) -> Step:
    """setp.CMP[.BOOL].type p[|q], a, b[, c]; without a type of its own, where the kernels' assembly leaves it out."""
    words, kind = i.words, i.words[-1]
    compare = _compare(words[1])
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(words[2])
    p, q = i.operands[0] if isinstance(i.operands[0], Pair) else (i.operands[0], SINK)
    p, q, a, b = s.of(p, "pred"), s.of(q, "pred"), s.of(i.operands[1], kind), s.of(i.operands[2], kind)
    c = predicate(i.operands[3], s) if join else None

    def step(w):
        holds = compare(w.rows[a], w.rows[b])
        if join:
            other = c(w)
            w.put(q, join(~holds, other))
            holds = join(holds, other)
        w.put(p, holds)

    return step


def predicate(operand, s: Slots) -> Callable:
    """What gives a warp's lanes of a predicate, or of its opposite."""
    if isinstance(operand, Not):
        row = s.of(operand.of, "pred")
        return lambda w: ~w.rows[row]
    row = s.of(operand, "pred")
    return lambda w: w.rows[row]


def selp(i: Instruction, s: Slots) -> Step:
    d, a, b = (s.of(x, i.words[-1]) for x in i.operands[:3])
    p = predicate(i.operands[3], s)

    def step(w):
        w.put(d, np.where(p(w), w.rows[a], w.rows[b]))

    return step


def mov(i: Instruction, s: Slots) -> Step:
    kind, (to, source) = i.words[-1], i.operands
    if isinstance(to, Vector) or isinstance(source, Vector):
        return _moves(_parts(to, source, kind, s))
    if getattr(source, "name", "").startswith(("clock", "globaltimer")):
        d = s.of(to, kind)
        return lambda w: w.put(d, w.clock())
    return _moves([(s.of(to, kind), s.of(source, kind))])


def _parts(to, source, kind: str, s: Slots) -> list[tuple[int, int]]:
    """Of a packed register, and of several that it is packed of."""
    vector, whole = (to, source) if isinstance(to, Vector) else (source, to)
    narrow = f"b{int(kind[1:]) // len(vector.items)}"
    if not isinstance(whole, Register):
        raise NotImplementedError(f"mov of {whole}")
    pairs = [(s.of(x, narrow), s.of(whole, narrow, n)) for n, x in enumerate(vector.items) if x != SINK]
    return [(a, b) if vector is to else (b, a) for a, b in pairs]


def _moves(pairs: list[tuple[int, int]]) -> Step:
    def step(w):
        for d, a in pairs:
            w.put(d, w.rows[a])

    return step


def shfl(i: Instruction, s: Slots) -> Step:
    """A lane's value from another, where that one is in its segment."""
    to, source, lane, clamp, _ = i.operands
    to, p = to if isinstance(to, Pair) else (to, SINK)
    d, p, a, b, c = s.of(to, "b32"), s.of(p, "pred"), s.of(source, "b32"), s.of(lane, "u32"), s.of(clamp, "u32")
    mode, own = i.words[2], np.arange(32)

    def step(w):
        if w.where is not True:
            return for_lanes("shfl.sync")
        by, packed = w.rows[b].astype(np.int64) & 31, w.rows[c].astype(np.int64)
        segment, most = packed >> 8 & 31, packed & 31
        last = (own & segment) | (most & ~segment)
        first = own & segment
        j = {"idx": first | (by & ~segment), "bfly": own ^ by, "up": own - by, "down": own + by}[mode]
        inside = j >= last if mode == "up" else j <= last
        w.put(d, w.rows[a][np.where(inside, j, own) & 31])
        w.put(p, inside)
        return None

    return step


def vote(i: Instruction, s: Slots) -> Step:
    mode, p = i.words[2], predicate(i.operands[1], s)
    d = s.of(i.operands[0], i.words[-1])
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    reduce = {
        "any": np.any,
        "all": np.all,
        "uni": lambda x: x.all() or not x.any(),
        "ballot": lambda x: np.sum(weights, where=x, dtype=np.uint32),
    }[mode]

    def step(w):
        if w.where is not True:
            return for_lanes("vote.sync")
        w.rows[d][...] = reduce(p(w))
        return None

    return step


def elect(i: Instruction, s: Slots) -> Step:
    leader, p = i.operands[0]
    d, p = s.of(leader, "b32"), s.of(p, "pred")

    def step(w):
        if w.where is not True:
            return for_lanes("elect.sync")
        w.rows[d][...] = 0
        w.rows[p][...] = False
        w.rows[p][0] = True
        return None

    return step


def redux(i: Instruction, s: Slots) -> Step:
    kind = i.words[-1]
    d, a = s.of(i.operands[0], kind), s.of(i.operands[1], kind)
    names = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    reduce = names[i.words[2]].reduce

    def step(w):
        if w.where is not True:
            return for_lanes("redux.sync")
        w.rows[d][...] = reduce(w.rows[a])
        return None

    return step


def rounded_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    up = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    found, nan = ((bits + up) >> np.uint32(16)).astype(np.uint16), np.isnan(x)
    if nan.any():
        found[nan] = 0x7FFF
    return found


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


HALF: dict[str, Callable] = {"bf16": rounded_bf16, "f16": rounded_f16}
FROM_HALF: dict[str, Callable] = {"bf16": from_bf16, "f16": from_f16}


def cvt(i: Instruction, s: Slots) -> Step:
    to, source = i.words[-2:]
    if to.endswith("x2"):
        return _pack(i, s, HALF[to[:-2]])
    d, a = s.of(i.operands[0], s.whole(i.operands[0], to)), s.of(i.operands[1], source)
    convert = _conversion(i.words, to, source)

    def step(w):
        w.put(d, convert(w.rows[a]).astype(TYPES[to]))

    return step


def _pack(i: Instruction, s: Slots, rounded: Callable) -> Step:
    if len(i.operands) != 3 or "relu" in i.words or "satfinite" in i.words:
        raise NotImplementedError(i.text)
    d, high, low = s.of(i.operands[0], "b32"), s.of(i.operands[1], "f32"), s.of(i.operands[2], "f32")

    def step(w):
        x = rounded(w.rows[high]).astype(np.uint32) << np.uint32(16)
        w.put(d, x | rounded(w.rows[low]))

    return step


def _conversion(words: list[str], to: str, source: str) -> Callable:
    if source in FROM_HALF:
        first, rest = FROM_HALF[source], _conversion(words, to, "f32")
        return lambda x: rest(first(x))
    if to in HALF and source == "f32":
        return HALF[to]
    if source[0] == "f" and to[0] in "us":
        rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[words[1]]
        info = np.iinfo(TYPES[to])
        return lambda x: np.clip(np.nan_to_num(rounding(x.astype(np.float64))), info.min, info.max)
    if source[0] == to[0] == "f" and words[1] in ("rni", "rzi", "rmi", "rpi"):
        return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[words[1]]
    if "sat" in words:
        low, high = (0, 1) if to[0] == "f" else (np.iinfo(TYPES[to]).min, np.iinfo(TYPES[to]).max)
        return lambda x: np.clip(x, low, high)
    return lambda x: x


def tanh(x):
    return np.tanh(x.astype(np.float64)).astype(x.dtype)


def _ternary_of_b32(function):
    return ternary(function, lambda kind: (kind, kind, kind, "b32"))


OPS = {
    "add": binary(np.add),
    "sub": binary(np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": ternary(quotient, lambda kind: (kind,) * 3),
    "rem": ternary(remainder, lambda kind: (kind,) * 3),
    "min": extremum(np.minimum, np.fmin),
    "max": extremum(np.maximum, np.fmax),
    "and": binary(np.bitwise_and),
    "or": binary(np.bitwise_or),
    "xor": binary(np.bitwise_xor),
    "not": unary(np.invert),
    "neg": unary(np.negative),
    "abs": unary(np.abs),
    "shl": shift(np.left_shift),
    "shr": shift(np.right_shift),
    "shf": funnel_shift,
    "lop3": lop3,
    "prmt": _ternary_of_b32(prmt),
    "bfe": ternary(bit_field, lambda kind: (kind, kind, "u32", "u32")),
    "bfi": ternary(insert, lambda kind: (kind, kind, kind, "u32", "u32")),
    "clz": ternary(clz, lambda kind: ("u32", kind)),
    "bfind": ternary(bfind, lambda kind: ("u32", kind)),
    "copysign": ternary(lambda sign, a: np.copysign(a, sign), lambda kind: (kind,) * 3),
    "popc": ternary(popc, lambda kind: ("u32", kind)),
    "ex2": unary(np.exp2),
    "lg2": unary(np.log2),
    "rcp": unary(np.reciprocal),
    "sqrt": unary(np.sqrt),
    "rsqrt": unary(lambda x: 1 / np.sqrt(x)),
    "sin": unary(np.sin),
    "cos": unary(np.cos),
    "tanh": unary(tanh),
    "setp": setp,
    "selp": selp,
    "mov": mov,
    "cvt": cvt,
    "shfl": shfl,
    "vote": vote,
    "elect": elect,
    "redux": redux,
}
