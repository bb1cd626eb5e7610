"""The interpreter of PTX itself: instructions on 32 lanes, lanes that part and meet, and what it must refuse."""

import numpy as np
import pytest
import torch

from tests.interpreter.host import Launch
from tests.interpreter.machine import Deadlock, Machine
from tests.interpreter.memory import Fault, Global
from tests.interpreter.parse import parse
from tests.interpreter.translate import Kernel

LANE = np.arange(32)
KERNEL = """
.visible .entry one(.param .align 8 .b8 one_param_0[8], .param .align 8 .b8 one_param_1[8])
.reqntid {threads}, 1, 1
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [one_param_0];
    ld.param.b64 %rd2, [one_param_1];
    mov.u32 %r1, %tid.x;
    cvt.u64.u32 %rd3, %r1;
    mad.lo.s64 %rd4, %rd3, 16, %rd1;
    mad.lo.s64 %rd5, %rd3, 8, %rd2;
    mov.b32 %r0, __dynamic_shmem__0;
    {code}
    ret;
}}
"""


def run(code, given=None, threads=32, seed=0):
    """Of threads that have 16 bytes each at %rd4, and 8 at %rd5 for what they find, which comes back."""
    given = torch.zeros(threads, 4, dtype=torch.int32) if given is None else torch.from_numpy(np.array(given))
    found = torch.full((threads, 2), -1, dtype=torch.int32)
    addresses = given.data_ptr(), found.data_ptr()
    (program,) = parse(KERNEL.format(code=code, threads=threads)).values()
    launch = Launch(1, threads, 1, 1024, tuple(a.to_bytes(8, "little") for a in addresses), "one")
    Machine(Kernel(program), launch, Global(addresses), seed=seed).run()
    return found.numpy()


RNG = np.random.default_rng(0)
A, B, C = RNG.integers(0, 1 << 32, (3, 32), dtype=np.uint32)
N = RNG.integers(0, 40, 32).astype(np.uint32)


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def truncated(a: int, b: int) -> int:
    return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def bytes_of(a, b, selector):
    both, found = a | b << 32, 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = both >> 8 * (pick & 7) & 255
        found |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return found


WHOLE = {  # of a, b and c or n as Python's numbers, modulo 2^32
    "add.s32 %r9, %r2, %r3": lambda a, b, c: a + b,
    "sub.s32 %r9, %r2, %r3": lambda a, b, c: a - b,
    "mul.lo.s32 %r9, %r2, %r3": lambda a, b, c: a * b,
    "mul.hi.u32 %r9, %r2, %r3": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r9, %r2, %r3": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r9, %r2, %r3, %r4": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r9, %r2, %r3, %r4": lambda a, b, c: (a * b >> 32) + c,
    "div.s32 %r9, %r2, %r3": lambda a, b, c: truncated(signed(a), signed(b)),
    "div.u32 %r9, %r2, %r3": lambda a, b, c: a // b,
    "rem.s32 %r9, %r2, %r3": lambda a, b, c: signed(a) - signed(b) * truncated(signed(a), signed(b)),
    "rem.u32 %r9, %r2, %r3": lambda a, b, c: a % b,
    "min.s32 %r9, %r2, %r3": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r9, %r2, %r3": lambda a, b, c: max(a, b),
    "min.relu.s32 %r9, %r2, %r3": lambda a, b, c: max(min(signed(a), signed(b)), 0),
    "and.b32 %r9, %r2, %r3": lambda a, b, c: a & b,
    "not.b32 %r9, %r2": lambda a, b, c: ~a,
    "neg.s32 %r9, %r2": lambda a, b, c: -a,
    "abs.s32 %r9, %r2": lambda a, b, c: abs(signed(a)),
    "shl.b32 %r9, %r2, %r5": lambda a, b, c: a << c,
    "shr.u32 %r9, %r2, %r5": lambda a, b, c: a >> c,
    "shr.s32 %r9, %r2, %r5": lambda a, b, c: signed(a) >> c,
    "shf.l.wrap.b32 %r9, %r2, %r3, %r5": lambda a, b, c: (b << 32 | a) << c % 32 >> 32,
    "shf.r.wrap.b32 %r9, %r2, %r3, %r5": lambda a, b, c: (b << 32 | a) >> c % 32,
    "shf.r.clamp.b32 %r9, %r2, %r3, %r5": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "lop3.b32 %r9, %r2, %r3, %r4, 0xE8": lambda a, b, c: a & b | a & c | b & c,
    "lop3.b32 %r9, %r2, %r3, %r4, 0x1A": lambda a, b, c: (a & b | c) ^ a,
    "prmt.b32 %r9, %r2, %r3, %r4": lambda a, b, c: bytes_of(a, b, c),
    "bfe.u32 %r9, %r2, %r5, 7": lambda a, b, c: a >> c & 127,
    "bfi.b32 %r9, %r2, %r3, 5, 9": lambda a, b, c: b & ~(511 << 5) | (a & 511) << 5,
    "clz.b32 %r9, %r5": lambda a, b, c: 32 - c.bit_length(),
    "popc.b32 %r9, %r2": lambda a, b, c: a.bit_count(),
    "bfind.s32 %r9, %r2": lambda a, b, c: (signed(a) if signed(a) >= 0 else ~signed(a)).bit_length() - 1,
}


@pytest.mark.parametrize("instruction", WHOLE)
def test_whole_numbers(instruction):
    given = np.stack([A, B, C, N], axis=1).view(np.int32)
    found = run(f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd4]; {instruction}; st.global.b32 [%rd5], %r9;", given)
    third = N if "%r5" in instruction else C
    want = [WHOLE[instruction](int(a), int(b), int(c)) % (1 << 32) for a, b, c in zip(A, B, third, strict=True)]
    assert found[:, 0].view(np.uint32).tolist() == want


F = np.concatenate([RNG.standard_normal(26), [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40]]).astype(np.float32)
G = np.roll(F, 5)
REAL = {
    "add.f32 %r9, %r2, %r3": lambda f, g: f + g,
    "fma.rn.f32 %r9, %r2, %r3, %r2": lambda f, g: (f.astype(float) * g + f).astype(np.float32),
    "max.f32 %r9, %r2, %r3": np.fmax,
    "min.NaN.f32 %r9, %r2, %r3": np.minimum,
    "ex2.approx.ftz.f32 %r9, %r2": lambda f, g: np.exp2(np.where(np.abs(f) < 1e-38, 0, f)),
    "copysign.f32 %r9, %r2, %r3": lambda f, g: np.copysign(g, f),
}


@pytest.mark.parametrize("instruction", REAL)
def test_real_numbers(instruction):
    given = np.stack([F, G, G, G], axis=1).view(np.int32)
    found = run(f"ld.global.v2.b32 {{%r2, %r3}}, [%rd4]; {instruction}; st.global.b32 [%rd5], %r9;", given)
    with np.errstate(all="ignore"):
        want = REAL[instruction](F, G)
    np.testing.assert_array_equal(found[:, 0].view(np.float32), want.astype(np.float32))


COMPARED = {
    "eq": lambda f, g: f == g,
    "ne": lambda f, g: (f < g) | (f > g),
    "lt": lambda f, g: f < g,
    "neu": lambda f, g: ~(f == g),
    "gtu": lambda f, g: ~(f <= g),
    "nan": lambda f, g: np.isnan(f) | np.isnan(g),
}


@pytest.mark.parametrize("word", COMPARED)
def test_comparisons(word):
    code = f"""ld.global.v2.b32 {{%r2, %r3}}, [%rd4];
    setp.{word}.f32 %p1, %r2, %r3; setp.{word}.and.f32 %p2|%p3, %r2, %r3, !%p1;
    selp.b32 %r4, 1, 0, %p1; selp.b32 %r5, 2, 0, %p3; or.b32 %r6, %r4, %r5; selp.b32 %r7, 1, 0, %p2;
    st.global.v2.b32 [%rd5], {{%r6, %r7}};"""
    holds = COMPARED[word](F, G)
    found = run(code, np.stack([F, G, G, G], axis=1).view(np.int32))
    assert (found[:, 0] == np.where(holds, 1, 2)).all()
    assert (found[:, 1] == 0).all()


def test_conversions():
    code = """ld.global.v2.b32 {%r2, %r3}, [%rd4]; cvt.rn.bf16x2.f32 %r4, %r2, %r3; cvt.rn.f16x2.f32 %r5, %r2, %r3;
    st.global.v2.b32 [%rd5], {%r4, %r5};"""
    found = run(code, np.stack([F, G, G, G], axis=1).view(np.int32))
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        want = torch.from_numpy(np.stack([G, F], axis=1)).to(dtype).view(torch.int16).numpy()
        halves = np.ascontiguousarray(found[:, column]).view(np.int16).reshape(32, 2)
        known = ~np.isnan(np.stack([G, F], axis=1))
        assert (halves == want)[known].all()
    code = """ld.global.v2.b32 {%r2, %r3}, [%rd4]; cvt.rzi.s32.f32 %r4, %r2; cvt.rmi.f32.f32 %r5, %r2;
    st.global.v2.b32 [%rd5], {%r4, %r5};"""
    values = np.array([-1.5, 1.5, -0.5, 2.0, 3e9, -3e9, np.nan, 7.9] * 4, np.float32)
    found = run(code, np.stack([values] * 4, axis=1).view(np.int32))
    assert found[:8, 0].tolist() == [-1, 1, 0, 2, 2**31 - 1, -(2**31), 0, 7]
    np.testing.assert_array_equal(found[:, 1].view(np.float32), np.floor(values))


def test_narrow_loads_fill_their_register():
    given = np.full((32, 4), -2, np.int32)
    code = """ld.global.b8 %rs1, [%rd4]; ld.global.s8 %r2, [%rd4]; cvt.u32.u16 %r3, %rs1;
    st.global.v2.b32 [%rd5], {%r3, %r2};"""
    assert run(code, given)[0].tolist() == [254, -2]


SHUFFLED = {
    "shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1": LANE ^ 5,
    "shfl.sync.idx.b32 %r9, %r1, 7, 31, -1": LANE * 0 + 7,
    "shfl.sync.up.b32 %r9, %r1, 3, 0, -1": np.where(LANE >= 3, LANE - 3, LANE),
    "shfl.sync.down.b32 %r9, %r1, 3, 31, -1": np.where(LANE < 29, LANE + 3, LANE),
    "shfl.sync.down.b32 %r9, %r1, 1, 6175, -1": np.where(LANE % 8 < 7, LANE + 1, LANE),  # segments of 8
    "redux.sync.add.s32 %r9, %r1, -1": LANE * 0 + 496,
    "setp.lt.u32 %p1, %r1, 3; vote.sync.ballot.b32 %r9, %p1, -1": LANE * 0 + 7,
}


@pytest.mark.parametrize("code", SHUFFLED)
def test_what_a_warp_does_together(code):
    assert (run(f"{code}; st.global.b32 [%rd5], %r9;")[:, 0] == SHUFFLED[code]).all()


def test_lanes_part_and_meet():
    """Each goes round a loop as often as its number says; then they shuffle, which needs all of them."""
    code = """mov.b32 %r2, 0; mov.b32 %r3, 0;
    $again: setp.ge.s32 %p1, %r3, %r1; @%p1 bra $out; add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; bra $again;
    $out: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
    @!%p1 mov.b32 %r2, 0; setp.eq.s32 %p2, %r1, 4; @%p2 mov.b32 %r4, 77;
    st.global.v2.b32 [%rd5], {%r2, %r4};"""
    sums = LANE * (LANE - 1) // 2
    found = run(code)
    assert (found[:, 0] == sums).all()
    assert (found[:, 1] == np.where(LANE == 4, 77, sums[LANE ^ 1])).all()


@pytest.mark.parametrize("seed", range(3))
def test_warps_hand_over_by_a_barrier(seed):
    code = """shl.b32 %r2, %r1, 2; add.s32 %r3, %r0, %r2; st.shared.b32 [%r3], %r1; bar.sync 0;
    xor.b32 %r4, %r2, 128; add.s32 %r4, %r4, %r0; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd5], %r5;"""
    assert (run(code, threads=64, seed=seed)[:, 0] == np.arange(64) ^ 32).all()


def test_a_counter_goes_round():
    found = run("atom.global.inc.u32 %r9, [%rd1], 9; st.global.b32 [%rd5], %r9;")
    assert found[:, 0].tolist() == [i % 10 for i in LANE]


def test_shared_memory_is_poisoned():
    assert (run("ld.shared.b32 %r9, [%r0+12]; st.global.b32 [%rd5], %r9;")[:, 0] == -1).all()


COPY = """mad.lo.s32 %r2, %r1, 16, %r0; add.s32 %r2, %r2, 64; setp.eq.s32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r0], 32; bar.sync 0; and.b32 %r3, %r1, 1; shl.b32 %r3, %r3, 4;
cp.async.cg.shared.global [%r2], [%rd4], 16, %r3; {}
ld.shared.b32 %r4, [%r2+8]; st.global.b32 [%rd5], %r4;"""
ARRIVAL = """cp.async.mbarrier.arrive.noinc.shared.b64 [%r0];
$a: mbarrier.try_wait.parity.shared.b64 %p2, [%r0], 0; @!%p2 bra $a;"""


@pytest.mark.parametrize("seed", range(3))
def test_threads_copy_and_arrive(seed):
    """16 bytes, or none of them: then these are zeros."""
    given = RNG.integers(1, 1 << 30, (32, 4), dtype=np.int32)
    assert (run(COPY.format(ARRIVAL), given, seed=seed)[:, 0] == given[:, 2] * (LANE % 2)).all()


def test_copies_that_nobody_has_waited_for():
    with pytest.raises(Fault, match=r"ends before cp\.async"):
        run(COPY.format(""), seed=2)


DEPENDENT = """griddepcontrol.wait; st.global.b32 [%rd5], %r1; griddepcontrol.launch_dependents;"""


def launches(*codes):
    """Of one call, one behind the other."""
    given, found = torch.arange(128, dtype=torch.int32).view(32, 4), torch.full((32, 2), -1, dtype=torch.int32)
    addresses = given.data_ptr(), found.data_ptr()
    memory = Global(addresses, track=True)
    for i, code in enumerate(codes):
        (program,) = parse(KERNEL.format(code=code, threads=32)).values()
        launch = Launch(1, 32, 1, 1024, tuple(a.to_bytes(8, "little") for a in addresses), "one")
        place = dict(prerequisite=i > 0, dependents=i + 1 < len(codes))
        Machine(Kernel(program), launch, memory, **place).run()
    return found.numpy()


def test_a_later_launch_may_read_early_what_the_first_has_not_written():
    read = "ld.global.b32 %r9, [%rd4+4]; griddepcontrol.wait; st.global.b32 [%rd5+4], %r9;"
    found = launches(DEPENDENT, read)
    assert (found[:, 0] == LANE).all() and (found[:, 1] == 4 * LANE + 1).all()


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (DEPENDENT, "ld.global.b32 %r9, [%rd5]; griddepcontrol.wait;", "before griddepcontrol.wait"),
        (DEPENDENT, "st.global.b32 [%rd4], %r1; griddepcontrol.wait;", "before griddepcontrol.wait"),
        (DEPENDENT, "setp.lt.s32 %p1, %r1, 0; @%p1 griddepcontrol.wait;", "no thread has waited"),
        ("griddepcontrol.launch_dependents; griddepcontrol.wait;", "griddepcontrol.wait;", "launch_dependents before"),
        ("ld.global.b32 %r9, [%rd4]; griddepcontrol.wait;", "griddepcontrol.wait;", "before griddepcontrol.wait"),
    ],
)
def test_what_launches_of_a_call_may_not(first, second, words):
    with pytest.raises(Fault, match=words):
        launches(first, second)


REFUSED = {
    "ld.global.b32 %r9, [%rd4+512];": "in no tensor of the launch",
    "ld.global.b32 %r9, [%rd4+2];": "not aligned to 4 bytes",
    "ld.shared.b32 %r9, [%r0+1024];": "beyond its end",
    "st.shared.b32 [%r0+-4], %r1;": "beyond its end",
    "mbarrier.arrive.shared.b64 _, [%r0];": "none has been initialised",
    "mbarrier.init.shared.b64 [%r0], 1; mbarrier.arrive.shared.b64 _, [%r0], 2;": "arrives where 1 of 1 arrivals",
    "mapa.shared::cluster.u32 %r2, %r0, 3; st.shared::cluster.b32 [%r2], %r1;": "of no CTA of the cluster",
}


@pytest.mark.parametrize("code", REFUSED)
def test_faults(code):
    with pytest.raises(Fault, match=REFUSED[code]):
        run(code)


@pytest.mark.parametrize(
    "code",
    [
        "bar.sync 1, 64;",
        "mbarrier.init.shared.b64 [%r0], 40; $a: mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 0; @!%p1 bra $a;",
        "setp.eq.s32 %p1, %r1, 0; @%p1 bra $out; shfl.sync.idx.b32 %r2, %r1, 0, 31, -1; $out:",
    ],
    ids=["too few", "no arrival", "not all lanes"],
)
def test_deadlocks(code):
    with pytest.raises(Deadlock, match="CTA 0, warp 0, at"):
        run(code)


UNKNOWN = ["add.sat.s32 %r9, %r1, %r1;", "max.ftz.f32 %r9, %r1, 0;", "brev.b32 %r9, %r1;", "cvt.rz.f32.s32 %r9, %r1;"]


@pytest.mark.parametrize("code", UNKNOWN)
def test_what_is_not_known_is_refused(code):
    with pytest.raises(NotImplementedError, match=code.split()[0]):
        run(code)
