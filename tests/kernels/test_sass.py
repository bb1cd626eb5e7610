"""The machine code of every prebuilt kernel, and the checker itself. No GPU needed; about 2 s for each kernel.

Of kernels of fp16, which differ from those of bf16 by the type alone, one of each class runs every time; of those that
have a window, run in constant time or change scores, a head dim of each class. The others run at night.
"""

import dataclasses
import subprocess

import pytest

from cute_attn import compile, plan
from cute_attn.kernels.config import FwdConfig
from cute_attn.kernels.parts import parts_of
from cute_attn.tools import inspect
from tests.support.nightly import HEAD_DIM_OF_EACH_CLASS, where

# The layout only permutes modes on the host: `test_layout_leaves_the_machine_code_alone`.
PREBUILT = [c for c in dict.fromkeys(plan.prebuilt()) if c.layout == "bhsd"]


def case(config):
    return f"{config.name.removeprefix('flash_fwd_sm90_')}_{'dynamic' if config.scheduler.dynamic else 'static'}"


def parts(config):
    """Of which classes a kernel is made."""
    return tuple(type(part) for part in parts_of(config)), config.mask


FIRST_OF_FP16 = {parts(c): c for c in reversed(PREBUILT) if c.dtype == "fp16"}.values()


def every_time(config):
    if config.dtype == "fp16":
        return config in FIRST_OF_FP16
    usual = not (config.mask.windowed or config.constant_time or config.score.name)
    return usual or config.head_dim in HEAD_DIM_OF_EACH_CLASS


def of_each(configs):
    def decorate(test):
        return pytest.mark.machine_code(pytest.mark.parametrize("config", cases, ids=case)(test))

    cases = where(every_time, configs)
    return decorate


each = of_each(PREBUILT)
each_with_edges = of_each([c for c in PREBUILT if c.mask.causal or c.mask.windowed])


def test_what_runs_at_night_has_a_twin():
    fp16 = [c for c in PREBUILT if c.dtype == "fp16"]
    assert {dataclasses.replace(c, dtype="bf16") for c in fp16} <= set(PREBUILT)
    assert len(FIRST_OF_FP16) == len({parts(c) for c in fp16}) > 10
    assert {parts(c) for c in PREBUILT if every_time(c)} == {parts(c) for c in PREBUILT}


def test_both_layouts_have_the_same_kernels():
    assert {dataclasses.replace(c, layout="bhsd") for c in plan.prebuilt()} == set(PREBUILT)


@each
def test_healthy(config):
    assert inspect.report(config).problems() == []


@each
def test_steady_loop(config):
    loop = inspect.report(config).steady_loop
    assert loop.wgmma == config.head_dim // 16 + config.tile_n // 16, "QK by 16 columns, PV by 16 keys"
    assert loop.warpgroup_ops == warpgroup_ops(config)
    rescales = 2 if config.constant_time else 0  # one for each of a thread's rows
    assert loop.mufu == config.tile_n // 2 + rescales, "64 x tile_n scores over 128 threads"
    if config.constant_time:
        assert loop.maxima >= config.tile_n // 2
    else:
        assert loop.maxima == 0, "the maximum is looked for only where a score exceeds the running max"
    assert loop.selects < config.tile_n // 4, "a mask would take tile_n / 2"
    assert loop.instructions <= loop.length


@each_with_edges
def test_only_the_edge_loops_mask(config):
    """One loop on the right of what rows see whole, and under a window one on the left."""
    report = inspect.report(config)
    edges = [loop for loop in report.loops if loop != report.steady_loop]
    assert len(edges) == (2 if config.mask.windowed else 1)
    for edge in edges:
        assert edge.instructions > report.steady_loop.instructions
        assert edge.selects - report.steady_loop.selects >= config.tile_n // 2
        assert edge.maxima >= config.tile_n // 2
        assert edge.wgmma == report.steady_loop.wgmma
        assert edge.warpgroup_ops == warpgroup_ops(config)


def warpgroup_ops(config):
    """An arrive for QK and for PV, and a wait for either; four warpgroups wait for both at once."""
    return 3 if config.warpgroups == 4 else inspect.LOOP_WARPGROUP_OPS


@pytest.mark.machine_code
def test_layout_leaves_the_machine_code_alone():
    config = plan.config(128, "bf16", "bhsd", causal=True)
    assert inspect.sass(dataclasses.replace(config, layout="bshd")) == inspect.sass(config)


@pytest.mark.machine_code
def test_inspection_leaves_the_machine_code_alone(tmp_path):
    config = plan.config(64, "bf16", "bhsd", causal=False)
    with compile.lock:
        compile.compile(config, options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    done = subprocess.run([inspect._tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True)
    assert done.stdout == inspect.sass(config)


@pytest.mark.machine_code
def test_ptx():
    text = inspect.ptx(plan.config(64, "bf16", "bhsd", causal=False))
    assert ".target sm_90a" in text
    assert "wgmma.mma_async" in text


@pytest.mark.machine_code
def test_a_kernel_that_spills_is_reported():
    """Three MMA warpgroups have 160 registers a thread: S, O, P and Q together are too much."""
    report = inspect.report(FwdConfig(64, tile_m=192, q_in_regs=True))
    assert report.spill_stores > 0 and report.spill_loads > 0 and report.stack_bytes > 0
    assert report.serialised and report.steady_loop.warpgroup_ops > inspect.LOOP_WARPGROUP_OPS
    words = " ".join(report.problems())
    assert all(word in words for word in ("spills:", "stack:", "serialised WGMMA:", "ptxas: C7512"))


# The checker on text written by hand: a kernel of two loops, the edge loop with a mask. A barrier is polled behind the
# end, and the steady loop may skip the rescale of O.
NAME = FwdConfig(64).name
LOG = f"""
\x1b[96mremark[ptxas info]:\x1b[0m ptxas output: ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME}_cutlass_0' for 'sm_90a'
ptxas         .     0 bytes stack frame, 0 bytes spill
          stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
GEMMS = """
WARPGROUP.ARRIVE ;
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0 ;
WARPGROUP.ARRIVE ;
HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR20].tnspB, R88, gsb0 ;
WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
"""
SASS = f"""
.text.{NAME}_cutlass_0:
UTMALDG.4D [UR8], [UR4] ;
USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
.L_edge:
{GEMMS}
FSEL R24, R24, -INF , P1 ;
FSEL R25, R25, -INF , P1 ;
FSEL R26, R26, -INF , P1 ;
FSEL R27, R27, -INF , P1 ;
MUFU.EX2 R24, R24 ;
WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
@P0 BRA `(.L_edge) ;
.L_steady:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20+0x30050], R3 ;
@!P0 BRA `(.L_poll) ;
.L_arrived:
{GEMMS}
MUFU.EX2 R24, R24 ;
WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
@!P2 BRA `(.L_no_rescale) ;
FMUL R88, R88, R15.reuse ;
FMUL R89, R89, R15 ;
.L_no_rescale:
@P0 BRA `(.L_steady) ;
UTMASTG.4D [UR8], [UR4] ;
EXIT ;
.L_poll:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20+0x30050], R3 ;
@!P0 BRA `(.L_poll) ;
BRA `(.L_arrived) ;
"""


def crafted(sass=SASS, log=LOG):
    """The report on text; lines of code get their addresses."""
    lines = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line}" for i, line in enumerate(sass.split("\n"))
    ]
    return inspect.read(FwdConfig(64), inspect.Build("\n".join(lines), "", inspect.one_line(log)))


def test_crafted_healthy():
    report = crafted()
    assert report.problems() == []
    assert (report.registers_at_launch, report.registers_producer, report.registers_consumer) == (168, 24, 240)
    assert (report.wgmma, report.warpgroup_ops, report.tma_loads, report.tma_stores) == (4, 8, 1, 1)


def test_crafted_loops():
    edge, steady = crafted().loops
    assert edge == inspect.LoopReport(12, 12, wgmma=2, warpgroup_ops=4, mufu=1, selects=4, branches=1)
    assert steady == inspect.LoopReport(11, 13, wgmma=2, warpgroup_ops=4, mufu=1, barriers=1, branches=3)
    assert crafted().steady_loop == steady


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        pytest.param("UTMALDG.4D", "LDG.E", "no TMA load", id="no TMA load"),
        pytest.param("UTMASTG.4D", "STG.E", "no TMA store", id="no TMA store"),
        pytest.param("HGMMA", "HMMA", "no WGMMA", id="no WGMMA"),
        pytest.param("@P0 BRA", "@P0 CALL.REL.NOINC", "no loop with WGMMA", id="no loop"),
        pytest.param("gsb0 ;", "gsb0 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "serialised WGMMA: 6", id="serialised"),
        pytest.param("0x18", "0x38", "setmaxnreg: (56, 240) registers never fit in 64512", id="too many registers"),
        pytest.param(
            "USETMAXREG", "NOP", "setmaxnreg: (168, 168) registers, the config asks for (24, 240)", id="ignored"
        ),
    ],
)
def test_crafted_problem_in_the_code(old, new, problem):
    assert old in SASS
    assert any(text.startswith(problem) for text in crafted(SASS.replace(old, new)).problems())


@pytest.mark.parametrize(
    ("old", "new", "problems"),
    [
        ("0 bytes stack", "96 bytes stack", ["stack: 96 bytes"]),
        ("0 bytes spill\n", "8 bytes spill\n", ["spills: 8 bytes stored, 0 loaded"]),
        ("0 bytes spill loads", "4 bytes spill loads", ["spills: 0 bytes stored, 4 loaded"]),
        (
            "0 bytes gmem",
            "(C7510) wgmma.mma_async instructions are\n        serialized due to a call\nptxas info    : 0 bytes gmem",
            [
                "serialised WGMMA: 4 WARPGROUP ops in a loop, 4 are enough",
                "ptxas: C7510 wgmma.mma_async instructions are serialized due to a call",
            ],
        ),
        (
            "0 bytes gmem",
            "(C7508) 'setmaxnreg' ignored\nptxas info    : 0 bytes gmem",
            ["ptxas: C7508 'setmaxnreg' ignored"],
        ),
    ],
    ids=["stack", "spill stores", "spill loads", "serialised", "other advice"],
)
def test_crafted_problem_in_the_log(old, new, problems):
    assert old in LOG
    assert crafted(log=LOG.replace(old, new)).problems() == problems


def test_crafted_kernels_of_one_config():
    """The code and the registers are the forward's, spills those of both."""
    other = f".text.{NAME}_combine_cutlass_1:\nHGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0 ;\nEXIT ;"
    log = (
        LOG.replace(NAME, f"{NAME}_combine").replace("168", "70").replace("0 bytes spill loads", "4 bytes spill loads")
    )
    alone = crafted()
    for sass, text in ((f"\n{other}{SASS}", log + LOG), (f"{SASS}{other}", LOG + log)):
        both = crafted(sass, text)
        assert both.problems() == ["spills: 0 bytes stored, 4 loaded"]
        assert (both.wgmma, both.loops, both.registers_at_launch) == (alone.wgmma, alone.loops, 168)


def test_a_silent_ptxas_is_no_healthy_kernel():
    with pytest.raises(RuntimeError, match="ptxas: no registers and spills of flash_fwd_sm90_bf16_d64_full_128x128"):
        crafted(log="")


def test_no_nvdisasm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(inspect.importlib.metadata, "files", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r'nvdisasm: not found.*pip install "cute_attn\[bench\]"'):
        inspect.report(FwdConfig(64, stages=3))


# (config, instructions of the steady loop) -> mufu, issue, smem over mma; use without overlap and with ping-pong, in %
ROOFLINE = [
    (FwdConfig(64, tile_m=192), 426, (1.00, 0.83, 0.79), 50, 100, "mma"),
    (FwdConfig(64, tile_m=192), 542, (1.00, 1.06, 0.79), 49, 94, "issue"),
    (FwdConfig(64), 425, (1.00, 0.83, 0.88), 50, 84, "mma"),
    (FwdConfig(128), 455, (0.50, 0.44, 0.88), 67, 100, "mma"),
    (FwdConfig(128, q_in_regs=True), 395, (0.50, 0.39, 0.75), 67, 100, "mma"),
    (FwdConfig(256, tile_n=80), 431, (0.25, 0.34, 0.95), 75, 100, "mma"),
]


@pytest.mark.parametrize(("config", "instructions", "ratios", "no_overlap", "ping_pong", "binding"), ROOFLINE)
def test_bounds(config, instructions, ratios, no_overlap, ping_pong, binding):
    report = dataclasses.replace(crafted(), loops=(inspect.LoopReport(instructions),))
    bounds = inspect.bounds(config, report)
    assert tuple(x / bounds.mma for x in (bounds.mufu, bounds.issue, bounds.smem)) == pytest.approx(ratios, abs=0.0051)
    assert (round(100 * bounds.no_overlap), round(100 * bounds.ping_pong)) == (no_overlap, ping_pong)
    assert bounds.binding == binding
