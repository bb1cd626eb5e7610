"""`python -m cute_attn.inspect` and the audit of control flow. No GPU needed; about 2 s for each kernel."""

import dataclasses
import re
import subprocess
import sys

import pytest

from cute_attn import plan
from cute_attn.tools import audit, inspect
from cute_attn.tools.inspect import __main__ as inspect_cli

KERNELS = [
    pytest.param(["--shape", "4,16,2048,64"], plan.Problem(4, 16, 16, 2048, 2048, 64, layout="bshd"), id="d64 full"),
    pytest.param(
        ["--shape", "4,16,2048,128", "--causal"],
        plan.Problem(4, 16, 16, 2048, 2048, 128, layout="bshd", causal=True),
        id="d128 causal",
    ),
]
kernels = pytest.mark.parametrize(("argv", "problem"), KERNELS)

# A loop with all that is explained; a barrier is polled behind the end.
SASS = """
MOV R5, 0x8 ;
.L_steady:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20+0x30050], R3 ;
@!P0 BRA `(.L_poll) ;
.L_arrived:
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0 ;
ISETP.GT.AND P0, PT, R17, -0x1, PT ;
VOTE.ANY P0, P0 ;
@!P0 BRA `(.L_no_rescale) ;
FMUL R88, R88, R15 ;
.L_no_rescale:
UIADD3 UR9, UR9, 0x1, URZ ;
ISETP.NE.U32.AND P1, PT, R5, UR9, PT ;
@P1 BRA `(.L_steady) ;
EXIT ;
.L_poll:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20+0x30050], R3 ;
@!P0 BRA `(.L_poll) ;
BRA `(.L_arrived) ;
"""
EXPLAINED = [audit.BARRIER, audit.LAZY_RESCALE, audit.TRIP_COUNT, audit.BARRIER]


def text(sass):
    """As nvdisasm writes it: lines of code have addresses."""
    lines = sass.split("\n")
    return "\n".join(x if x.endswith(":") else f"        /*{16 * i:04x}*/  {x}" for i, x in enumerate(lines))


def depends(sass):
    return [branch.depends for branch in audit.control_flow(text(sass))]


def test_constant_time(capsys):
    assert inspect_cli.main(["--shape", "4,16,2048,64", "--constant-time"]) == 0
    out = capsys.readouterr().out
    assert "constant_time=True" in out and "0 data: lazy rescale, 0 data: overflow check, 0 unknown" in out
    assert "the tuned table" in out and "constant time" in out and "speculative False, constant_time True" in out


@kernels
def test_output_has_the_reports_numbers(argv, problem, capsys):
    assert inspect_cli.main(argv) == 0
    out, config = capsys.readouterr().out, plan.plan(problem)
    report = inspect.report(config)
    loop, bounds = report.steady_loop, inspect.bounds(config, report)
    for words in (
        report.name,
        repr(config),
        f"{report.registers_at_launch} at launch, {report.registers_producer} producer, "
        f"{report.registers_consumer} consumer",
        f"{report.spill_stores} bytes stored, {report.spill_loads} loaded, {report.stack_bytes} of stack",
        f"{report.smem_bytes} bytes of shared memory",
        f"{report.wgmma} WGMMA, {report.tma_loads} TMA loads, {report.tma_stores} TMA stores",
        f"{loop.instructions} instructions: {loop.wgmma} WGMMA",
        f"{loop.mufu} MUFU, {loop.barriers} barriers, {loop.branches} branches",
        f"mma {bounds.mma:.0f}, mufu {bounds.mufu:.0f}, issue {bounds.issue:.0f}, smem {bounds.smem:.0f}",
        branches_of(config),
    ):
        assert words in out


def branches_of(config) -> str:
    lazy, speculative = int(not config.speculative), int(config.speculative)
    return f"1 trip count, {lazy} data: lazy rescale, {speculative} data: overflow check, 0 unknown"


@kernels
def test_one_branch_depends_on_data(argv, problem):
    config = plan.plan(problem)
    found = [branch.depends for branch in audit.audit(config)]
    on_data = audit.OVERFLOW_CHECK if config.speculative else audit.LAZY_RESCALE
    assert found.count(on_data) == found.count(audit.TRIP_COUNT) == 1
    assert set(found) == {audit.BARRIER, on_data, audit.TRIP_COUNT}


@pytest.mark.parametrize("kind", ["sass", "ptx"])
def test_code_is_printed_as_it_is(kind, capsys):
    assert inspect_cli.main(["--shape", "4,16,2048,64", f"--{kind}"]) == 0
    config = plan.plan(plan.Problem(4, 16, 16, 2048, 2048, 64, layout="bshd"))
    assert capsys.readouterr().out == getattr(inspect, kind)(config)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--shape"),
        (["--shape", "1,2,3"], "argument --shape: '1,2,3' is not four positive integers"),
        (["--shape", "1,2,3,520"], "head_dim 520 is not supported"),
        (["--shape", "1,6,64,64", "--kv-heads", "4"], "argument --kv-heads: 4 does not divide the 6 heads"),
        (["--shape", "1,6,64,64", "--seqlen-k", "0"], "argument --seqlen-k: '0' is not a positive integer"),
        (["--shape", "1,6,64,64", "--dtype", "fp8"], "argument --dtype"),
        (["--shape", "1,6,64,64", "--sass", "--ptx"], "not allowed with argument --sass"),
    ],
)
def test_bad_arguments(argv, words, capsys):
    with pytest.raises(SystemExit) as error:
        inspect_cli.main(argv)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "cute_attn.inspect", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m cute_attn.inspect" in done.stdout and not done.stderr


def test_without_rich_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; import cute_attn.tools.inspect.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'python -m cute_attn.inspect: rich is missing; pip install "cute_attn[bench]"\n'


def test_crafted_loop_is_explained():
    assert depends(SASS) == EXPLAINED
    assert depends("EXIT ;") == []


SIGNS = "ISETP.GT.AND P0, PT, R17, -0x1, PT ;"
SUMS = "FSETP.GTU.AND P0, PT, R3, 1073741824, PT ;\nFSETP.GTU.OR P0, PT, R4, 1073741824, P0 ;"
LESS, MORE = SUMS.replace("R4, 1073741824", "R4, 256"), SUMS.replace("PT ;\n", "P3 ;\n")


def test_sums_that_are_too_large_are_known():
    recomputed = [audit.OVERFLOW_CHECK if kind == audit.LAZY_RESCALE else kind for kind in EXPLAINED]
    assert depends(SASS.replace(SIGNS, SUMS)) == recomputed


CAPPED = SUMS + "\nISETP.GT.OR P0, PT, R14, -0x1, P0 ;"


def test_a_softcaps_doubt_joins_the_sums():
    recomputed = [audit.OVERFLOW_CHECK if kind == audit.LAZY_RESCALE else kind for kind in EXPLAINED]
    assert depends(SASS.replace(SIGNS, CAPPED)) == recomputed
    assert audit.UNKNOWN in depends(SASS.replace(SIGNS, CAPPED.replace("-0x1, P0", "0x7, P0")))
    assert audit.UNKNOWN in depends(SASS.replace(SIGNS, CAPPED.replace("-0x1, P0", "-0x1, P3")))


LARGE = """LOP3.LUT R6, R48, R6, R47, 0xfe, !PT ;
SHF.R.U32.HI R6, RZ, 0x1e, R6 ;
LOP3.LUT P0, RZ, R6, 0x1, RZ, 0xc0, !PT ;"""


def test_a_vote_on_large_scores_is_known():
    softcap = [audit.SOFTCAP if kind == audit.LAZY_RESCALE else kind for kind in EXPLAINED]
    assert depends(SASS.replace(SIGNS, LARGE)) == softcap


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0xfe", "0x80"),
        ("0x1e", "0x1f"),
        ("R6, 0x1, RZ", "R6, 0x3, RZ"),
        ("SHF", "@P3 SHF"),
        ("LOP3.LUT R6", "FADD R6"),
    ],
)
def test_a_vote_on_other_bits_is_not(old, new):
    assert old in LARGE
    assert audit.UNKNOWN in depends(SASS.replace(SIGNS, LARGE.replace(old, new)))


ITSELF = "FSETP.GTU.OR P4, PT, R4, 1073741824, P4 ;\n" + SUMS.replace("PT ;\n", "P4 ;\n")
ALWAYS = SIGNS.replace("P0", "P3") + "\nVOTE.ANY P0, PT ;"


@pytest.mark.parametrize(
    "tests", [LESS, MORE, ITSELF, ALWAYS], ids=["another bound", "another reason", "a lap ago", "no test at all"]
)
def test_sums_by_another_test_are_not(tests):
    assert audit.UNKNOWN in depends(SASS.replace(SIGNS, tests))


SCORES = "FSETP.GT.AND P2, PT, R24, RZ, PT ;\n@P2 BRA `(.L_no_rescale) ;\nVOTE"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("VOTE", SCORES, id="on a score"),
        pytest.param("VOTE", SCORES.split("\n", 1)[1], id="on a predicate from before the loop"),
        pytest.param("VOTE", "BRA.DIV UR4, `(.L_no_rescale) ;\nVOTE", id="divergence"),
        pytest.param("VOTE", "@P0 EXIT ;\nVOTE", id="exit"),
        pytest.param("ISETP.GT.AND P0, PT, R17, -0x1, PT", "FSETP.GT.AND P0, PT, R17, R18, PT", id="other vote"),
        pytest.param("PT, R5, UR9", "PT, R24, UR9", id="trip count by a score"),
        pytest.param("UIADD3 UR9, UR9, 0x1, URZ", "R2UR UR9, R24", id="no counter"),
        pytest.param("FMUL", "@P3 ISETP.NE.U32.AND P1, PT, R5, UR9, PT ;\n@P1 BRA `(.L_arrived) ;\nFMUL", id="inner"),
    ],
)
def test_crafted_branch_without_explanation(old, new):
    assert old in SASS
    found = depends(SASS.replace(old, new))
    assert audit.UNKNOWN in found


# A split kernel's trip count, anew in each lap: of what the loop leaves alone, in registers that held others before.
ANEW = """FSEL R23, R24, RZ, P5 ;
IADD3 R6, R3.reuse, 0x7, RZ ;
SHF.R.U32.HI R6, RZ, 0x3, R6 ;
IMAD R36, R6, UR23, RZ ;
VIMNMX R36, R3, R36, PT ;
VIADDMNMX R23, R36.reuse, R6, R3, PT ;
ISETP.NE.U32.AND P1, PT, R23, UR9, PT ;"""
COMPARE = "ISETP.NE.U32.AND P1, PT, R5, UR9, PT ;"


def test_a_trip_count_computed_anew_is_known():
    assert depends(SASS.replace(COMPARE, ANEW)) == EXPLAINED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("IADD3 R6, R3", "IADD3 R6, R24", id="a score"),
        pytest.param("IMAD R36, R6, UR23, RZ", "FMUL R36, R6, R7", id="floating point"),
        pytest.param("IADD3 R6, R3", "IADD3 R6, R36", id="its own value of the lap before"),
        pytest.param("IMAD R36, R6", "LDS R36, [R7] ;\nIMAD R36, R36", id="memory"),
        pytest.param("IADD3 R6, R3.reuse, 0x7, RZ", "S2R R6, SR_CLOCKLO", id="the clock"),
        pytest.param("VIMNMX R36", "@P3 VIMNMX R36", id="guarded by another predicate"),
        pytest.param("VIMNMX R36, R3, R36, PT", "VIMNMX R36, R3, R36, P3", id="selected by another predicate"),
        pytest.param("VIMNMX R36", "SHFL.BFLY PT, R36, R24, 0x2, 0x1f ;\nVIMNMX R36", id="another lane's score"),
        pytest.param("VIMNMX R36", "IMAD.WIDE.U32 R36, R24, R3, R6 ;\nVIMNMX R36", id="a wide product"),
        pytest.param("VIMNMX R36", "LDSM.16.M88.4 R34, [R7] ;\nVIMNMX R36", id="matrices from memory"),
        pytest.param("VIADDMNMX", "@P0 BRA `(.L_over) ;\nMOV R36, R7 ;\n.L_over:\nVIADDMNMX", id="one of two"),
        pytest.param("UR9, PT ;", "UR9, P3 ;", id="and another predicate"),
        pytest.param("ISETP", "@P3 ISETP", id="compared by another predicate"),
    ],
)
def test_a_trip_count_of_something_else_is_not(old, new):
    assert old in ANEW
    assert depends(SASS.replace(COMPARE, ANEW.replace(old, new)))[-2] == audit.UNKNOWN


STEP, ARM = "UIADD3 UR9, UR9, 0x1, URZ ;\n", "FMUL R88, R88, R15 ;\n"
INNER = ".L_again:\nUIADD3 UR9, UR9, 0x1, URZ ;\nBAR.SYNC 0x1 ;\n@P3 BRA `(.L_again) ;\n"


@pytest.mark.parametrize(
    ("step", "arm"),
    [("", ARM + STEP), (f"@P3 {STEP}", ARM), (INNER, ARM)],
    ids=["in an arm", "guarded", "in a loop of its own"],
)
def test_a_counter_that_not_every_lap_steps_once_is_none(step, arm):
    assert depends(SASS.replace(STEP, step).replace(ARM, arm))[-2] == audit.UNKNOWN


# In clusters: a lane for each CTA's barrier.
LANE = "S2R R6, SR_TID.X ;\nLOP3.LUT R9, R6, 0x1f, RZ, 0xc0, !PT ;\nISETP.GT.U32.AND P2, PT, R9, 0x1, PT ;\n"
ARRIVE = "@P2 BRA `(.L_others) ;\nSYNCS.ARRIVE.TRANS64.RED.ART0 RZ, [R6+URZ], R9 ;\n.L_others:\n"


def test_a_branch_on_the_threads_index_is_known():
    with_lane = [*EXPLAINED[:2], audit.THREAD, *EXPLAINED[2:]]
    assert depends(SASS.replace(STEP, LANE + ARRIVE + STEP)) == with_lane


@pytest.mark.parametrize(
    "lane",
    [LANE.replace("S2R R6, SR_TID.X", "MOV R6, R24"), LANE.replace("S2R R6, SR_TID.X ;\n", "")],
    ids=["a score", "from before the loop"],
)
def test_a_branch_on_another_integer_is_not(lane):
    assert depends(SASS.replace(STEP, lane + ARRIVE + STEP))[2] == audit.UNKNOWN


# A vote on two running maxima, before the loop and in a slow step; a usual step leaves a constant: so is the next.
OFFSETS = """FSETP.GE.AND P6, PT, R10, -256, PT ;
FSETP.LTU.OR P6, PT, R12, -256, !P6 ;
VOTE.ANY P5, P6 ;
"""
RAISED = """FSETP.GTU.AND P6, PT, R10, 1048576, PT ;
FSETP.GTU.OR P6, PT, R12, 1048576, P6 ;
VOTE.ANY P5, P6 ;
"""
USUAL = "PLOP3.LUT P5, PT, PT, PT, PT, 0x8, 0x0 ;\n"
START, HEAD = "MOV R5, 0x8 ;\n", "ISETP.GT.AND P0, PT, R17"
SLOW = f"@!P5 BRA `(.L_usual) ;\n{OFFSETS}BRA `(.L_no_rescale) ;\n.L_usual:\n{USUAL}"
STEPS = SASS.replace(START, START + OFFSETS).replace(HEAD, SLOW + HEAD).replace(ARM, RAISED + ARM)
WITH_SLOW = [EXPLAINED[0], audit.SLOW_STEP, *EXPLAINED[1:]]


def test_a_slow_step_is_known():
    assert depends(STEPS) == WITH_SLOW
    assert depends(STEPS.replace(OFFSETS, OFFSETS.replace("GE.AND P6", "GE.AND P1").replace("!P6", "!P1"))) == WITH_SLOW


def test_a_slow_steps_vote_before_the_loop_may_have_a_guard():
    """As where a window may leave the loop no lap."""
    guarded = "".join(f"@P2 {line}\n" for line in OFFSETS.splitlines())
    assert depends(STEPS.replace(START + OFFSETS, START + guarded)) == WITH_SLOW


def test_a_slow_steps_uniform_predicate_is_followed():
    uniform = STEPS.replace("VOTE.ANY P5, P6 ;\n", "VOTE.ANY P6, P6 ;\nVOTEU.ANY UP5, P6 ;\n")
    uniform = uniform.replace(USUAL, "UPLOP3.LUT UP5, UPT, UPT, UPT, UPT, 0x40, 0x0 ;\n")
    uniform = uniform.replace("@!P5 BRA", "PLOP3.LUT P6, PT, PT, PT, UP5, 0x40, 0x0 ;\n@P6 BRA")
    assert depends(uniform) == WITH_SLOW


# The same flag in a register.
HELD_FALSE = "IMAD.MOV.U32 R20, RZ, RZ, RZ ;\n"
HELD = STEPS.replace("VOTE.ANY P5, P6 ;\n", "VOTE.ANY P6, P6 ;\nSEL R20, RZ, 0x1, !P6 ;\n").replace(USUAL, HELD_FALSE)
HELD = HELD.replace("@!P5 BRA", "ISETP.EQ.U32.AND P6, PT, R20, RZ, PT ;\n@P6 BRA")


def test_a_slow_steps_register_is_followed():
    uniform = HELD.replace("SEL R20, RZ, 0x1, !P6", "VOTEU.ANY UP5, P6 ;\nUSEL UR20, URZ, 0x1, !UP5")
    false = "UPLOP3.LUT UP5, UPT, UPT, UPT, UPT, 0x40, 0x0 ;\nUSEL UR20, URZ, 0x1, !UP5 ;\n"
    uniform = uniform.replace(HELD_FALSE, false)
    uniform = uniform.replace("ISETP.EQ.U32.AND P6, PT, R20, RZ, PT", "ISETP.NE.U32.AND P6, PT, RZ, UR20, PT")
    assert depends(HELD) == depends(uniform) == WITH_SLOW


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("IMAD.MOV.U32 R20, RZ, RZ, RZ", "MOV R20, R24", id="a score"),
        pytest.param("IMAD.MOV.U32 R20, RZ, RZ, RZ", "LDS R20, [R7]", id="memory"),
        pytest.param("SEL R20, RZ, 0x1, !P6", "SEL R20, R24, 0x1, !P6", id="a score where no vote is"),
        pytest.param("SEL R20, RZ, 0x1, !P6", "SEL R20, RZ, 0x1, !P3", id="another predicate"),
        pytest.param("R20, RZ, PT", "R20, R24, PT", id="compared with a score"),
        pytest.param("R20, RZ, PT", "R20, RZ, P3", id="and another predicate"),
        pytest.param(HEAD, f"CALL ;\n{HEAD}", id="a call"),
    ],
)
def test_a_slow_steps_register_with_something_else_is_not(old, new):
    assert old in HELD
    assert depends(HELD.replace(old, new))[1] == audit.UNKNOWN


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        pytest.param(START + OFFSETS, "R10, -256", "R10, -255", id="another bound before the loop"),
        pytest.param(START + OFFSETS, OFFSETS, "", id="no vote before the loop"),
        pytest.param(START + OFFSETS, "VOTE", "@P2 BRA `(.L_steady) ;\nVOTE", id="a way round the one before the loop"),
        pytest.param(START + OFFSETS, "VOTE.ANY P5, P6 ;\n", "VOTE.ANY P5, P6 ;\nCALL ;\n", id="a call behind it"),
        pytest.param(START + OFFSETS, "!P6", "P6", id="a running max in bounds"),
        pytest.param(SLOW, "R12, -256", "R24, 0.5", id="a score"),
        pytest.param(SLOW, "GE.AND", "GE.OR", id="one in bounds of two"),
        pytest.param(SLOW, "R12, -256", "R12, R24", id="below a score"),
        pytest.param(SLOW, "@!P5", "@P3", id="a predicate from before the loop"),
        pytest.param(SLOW, "ANY", "ALL", id="another vote"),
        pytest.param(SLOW, USUAL, USUAL.replace("0x8,", "0x80,"), id="always after it"),
        pytest.param(SLOW, USUAL, "FSETP.GTU.AND P5, PT, R24, 1048576, PT ;\n", id="no vote"),
        pytest.param(RAISED, "1048576", "-256", id="above the least"),
        pytest.param(RAISED, "R10, 1048576, PT", "R10, 1048576, P6", id="a lap ago"),
        pytest.param(RAISED, "GTU.OR", "GTU.AND", id="two at once"),
    ],
)
def test_a_slow_step_by_another_test_is_not(part, old, new):
    assert part in STEPS and old in part
    assert depends(STEPS.replace(part, part.replace(old, new)))[1] == audit.UNKNOWN


def test_a_constant_is_no_slow_step():
    assert audit.UNKNOWN in depends(STEPS.replace(OFFSETS, USUAL).replace(RAISED, USUAL))


# As a split kernel has it: one branch for both votes, taken where neither calls for the maximum.
JOINED = """VOTE.ANY P0, P0 ;
PLOP3.LUT P0, PT, P5, P0, PT, 0x2, 0x0 ;
@P0 BRA `(.L_no_rescale) ;
"""
ALONE = "VOTE.ANY P0, P0 ;\n@!P0 BRA `(.L_no_rescale) ;\n"
BOTH = SASS.replace(START, START + OFFSETS).replace(ALONE, JOINED + OFFSETS)


# Or one that reads both predicates.
READS_BOTH = BOTH.replace(JOINED, "VOTE.ANY P0, P0 ;\n@!P0 BRA !P5, `(.L_no_rescale) ;\n")


@pytest.mark.parametrize("sass", [BOTH, READS_BOTH], ids=["joined", "two predicates"])
def test_a_slow_step_joins_the_vote_on_signs(sass):
    assert depends(sass) == EXPLAINED


@pytest.mark.parametrize(
    ("old", "new"),
    [("BRA !P5", "BRA !P3"), ("R17, -0x1", "R17, 0x7"), ("R10, -256", "R10, 0.5"), ("@!P0 BRA", "@P3 BRA")],
)
def test_a_branch_on_a_slow_step_and_something_else_is_not(old, new):
    assert old in READS_BOTH
    assert depends(READS_BOTH.replace(old, new))[1] == audit.UNKNOWN


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("P0, PT, 0x2,", "P0, PT, 0x80,", id="only where both"),
        pytest.param("P5, P0, PT, 0x2", "P5, P0, P3, 0x2", id="and a third"),
        pytest.param("P5, P0", "P3, P0", id="another predicate"),
        pytest.param("P5, P0", "P5, P5", id="one of them twice"),
        pytest.param("R17, -0x1", "R17, 0x7", id="no signs"),
        pytest.param("R10, -256", "R10, 0.5", id="no running max"),
        pytest.param("VOTE.ANY P0, P0 ;\n", "", id="no vote"),
        pytest.param(JOINED, JOINED.split("\n", 1)[1].replace("P0", "P4"), id="its own value of the lap before"),
    ],
)
def test_a_slow_step_that_joins_another_is_not(old, new):
    assert old in BOTH
    assert depends(BOTH.replace(old, new))[1] == audit.UNKNOWN


SPLIT = plan.Problem(1, 8, 8, 512, 512, 64, layout="bshd")


@pytest.mark.parametrize(
    ("head_dim", "data"), [(64, {audit.OVERFLOW_CHECK}), (224, {audit.LAZY_RESCALE, audit.SLOW_STEP, audit.SOFTCAP})]
)
def test_a_softcaps_kernel_is_explained(head_dim, data):
    kinds = plan.FeatureKey(softcap=True)
    problem = plan.Problem(4, 16, 16, 2048, 2048, head_dim, layout="bshd", causal=True, features=kinds)
    found = [branch.depends for branch in audit.audit(plan.plan(problem))]
    assert set(found) == {audit.BARRIER, audit.TRIP_COUNT, *data}
    assert all(found.count(kind) == 1 for kind in data)


@pytest.mark.parametrize(
    ("head_dim", "window"), [(128, False), (64, True), (224, True)], ids=["full", "a guard", "uniform predicates"]
)
def test_a_kernel_with_slow_steps_is_explained(head_dim, window):
    config = plan.plan(plan.Problem(4, 16, 16, 2048, 2048, head_dim, features=plan.FeatureKey(window=window)))
    found = [branch.depends for branch in audit.audit(config)]
    assert not config.speculative
    assert set(found) == {audit.BARRIER, audit.TRIP_COUNT, audit.LAZY_RESCALE, audit.SLOW_STEP}
    assert found.count(audit.LAZY_RESCALE) == found.count(audit.SLOW_STEP) == 1


def test_a_split_kernel_is_explained(capsys):
    """It computes its trip count anew in each lap."""
    config = plan.plan(SPLIT)
    assert config.split > 1
    assert inspect_cli.main(["--shape", "1,8,512,64"]) == 0
    assert branches_of(config) in capsys.readouterr().out


def test_a_split_kernel_that_counts_by_a_score_is_not():
    sass = inspect.sass(plan.plan(SPLIT))
    (branch,) = (branch for branch in audit.control_flow(sass) if branch.depends == audit.TRIP_COUNT)
    (compare,) = branch.writers
    assert sass.count(compare) == 1
    offset = re.search(r"FSETP\.LTU\.OR P\d, PT, (R\d+), -256", sass)[1]  # above the scores
    by_score = re.sub(r"PT, U?R\d+", f"PT, {offset}", compare)
    by_both = compare.removesuffix("PT") + "P6"
    for other in (by_score, by_both):
        assert other != compare and audit.UNKNOWN in {
            x.depends for x in audit.control_flow(sass.replace(compare, other))
        }


def test_a_split_kernel_that_rescales_by_another_test_is_not():
    """In place of a vote on running maxima, before the loop or in it, or of that on signs."""
    sass = inspect.sass(plan.plan(SPLIT))
    offsets = re.findall(r"FSETP\.LTU\.OR P\d, PT, R\d+, -256, !P\d", sass)
    signs = re.findall(r"ISETP\.GT\.AND P\d, PT, R\d+, -0x1, PT", sass)
    assert (len(offsets), len(signs)) == (2, 1)
    for test in offsets + signs:
        assert sass.count(test) == 1
        other = sass.replace(test, test.replace("-256", "0.5").replace("-0x1", "0x7"))
        assert audit.UNKNOWN in {x.depends for x in audit.control_flow(other)}


def test_a_copied_predicate_is_followed():
    compare = "UISETP.NE.U32.AND UP1, UPT, UR5, UR9, UPT ;\nPLOP3.LUT P1, PT, PT, PT, UP1, 0x80, 0x0 ;"
    assert depends(SASS.replace("ISETP.NE.U32.AND P1, PT, R5, UR9, PT ;", compare)) == EXPLAINED


@pytest.mark.parametrize(("sass", "status"), [(SASS, 0), (SASS.replace("VOTE", SCORES), 1)], ids=["healthy", "unknown"])
def test_exit_status_of_an_unexplained_branch(sass, status, monkeypatch, capsys):
    config = plan.plan(plan.Problem(4, 16, 16, 2048, 2048, 64, layout="bshd"))
    healthy = inspect.report(config)
    monkeypatch.setattr(inspect, "report", lambda _: healthy)
    monkeypatch.setattr(inspect, "build", lambda _: inspect.Build(text(sass), "", ""))
    assert inspect_cli.main(["--shape", "4,16,2048,64"]) == status
    assert f"{status} unknown" in capsys.readouterr().out


def test_exit_status_of_a_problem(monkeypatch, capsys):
    config = plan.plan(plan.Problem(4, 16, 16, 2048, 2048, 64, layout="bshd"))
    spills = dataclasses.replace(inspect.report(config), spill_stores=8)
    monkeypatch.setattr(inspect, "report", lambda _: spills)
    assert inspect_cli.main(["--shape", "4,16,2048,64"]) == 1
    assert "spills: 8 bytes stored" in capsys.readouterr().out
