"""benchmarks/accuracy.py and odd_shapes.py: truth, inputs, padding and verdicts, on the CPU and on made-up numbers."""

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cute_attn import reference
from cute_attn.plan import HEAD_DIMS, Problem, plan, prebuilt, prebuilt_varlen
from cute_attn.tools.benchmark import cells, frame, implementations, report, timing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules; they import their neighbours in benchmarks/ by name, as when they are run."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        names = "accuracy", "gpu_tests", "lists", "modifiers", "odd_shapes", "sanitize", "script", "varlen", "window"
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def accuracy(scripts):
    return scripts["accuracy"]


@pytest.fixture
def odd_shapes(scripts):
    return scripts["odd_shapes"]


def test_every_prebuilt_kernel_is_sanitized(scripts):
    reached = {plan(p) for head_dim in HEAD_DIMS for p in scripts["sanitize"].problems(head_dim)}
    assert {c for c in reached if c.pack == 1} == {config for config in prebuilt() if config.layout == "bhsd"}
    assert {c.mask.name for c in reached if c.pack > 1} == {"full", "causal", "window"}


def test_what_the_sanitizer_runs_is_whole(scripts, monkeypatch):
    """One case of each sort, on the CPU; each names the kernel that it runs on a GPU."""
    sanitize = scripts["sanitize"]
    monkeypatch.setattr(sanitize, "DEVICE", CPU)
    problems = [p for p in sanitize.problems(32) if p.features.softcap or p.features.alibi]
    found = [sanitize.run_problem(p._replace(heads=2, heads_kv=2)) for p in problems]
    assert [config.score.name for config in found] == ["alibi", "softcap", "softcapalibi"]
    assert sanitize.run_varlen(32, "fp16", "window") in prebuilt_varlen()
    assert all(sanitize.run_cache(32, *which).name in sanitize.kernels() for which in sanitize.CACHES[::5])
    lists = sanitize.run_lists(32)
    assert lists.sparse.has_full and lists.mask.name == "causal_mask_mod" and lists.score.name == "score_mod"


def test_a_kernel_is_clean_where_a_run_of_each_tool_was(scripts, tmp_path):
    sanitize, here = scripts["sanitize"], dict(kernels_sha256="a", gpu="H200", versions={})
    names = [name for _, name in sanitize.not_clean([])]
    runs = [dict(tool=tool, clean=True, kernels=names) for tool in sanitize.TOOLS]
    assert len(set(names)) > 300 and sanitize.not_clean(runs) == []
    runs[1] = dict(tool="memcheck", clean=False, kernels=names)
    assert {tool for tool, _ in sanitize.not_clean(runs)} == {"memcheck"}
    path = tmp_path / "before.json"
    path.write_text(json.dumps({**here, "runs": runs}))
    assert sanitize.kept(None, here, []) == []
    assert [run["tool"] for run in sanitize.kept(path, here, ["racecheck"])] == ["memcheck", "initcheck"]
    with pytest.raises(SystemExit, match="kernels_sha256 is a there, and b here"):
        sanitize.kept(path, {**here, "kernels_sha256": "b"}, ["racecheck"])


def test_lists_are_right_and_beside_dense(scripts):
    lists, p = scripts["lists"], Problem(2, 2, 2, 400, 300, 16)
    dense, *others = frame.measure(partial(lists.rows, p), setup(100.0, 20.0, 10.0, 25.0, 5.0))
    assert dense["x_baseline"] == 1.0 and [x["x_baseline"] for x in others] == [5.0, 10.0, 4.0, 20.0]
    assert [(x["features"]["block_size"], x["us_per_head"]) for x in others[:3]] == [
        *(([128, 128], 5.0), ([128, 128], 2.5)),
        ([192, 128], 6.25),
    ]
    assert all(x["reason"] is None and x["relative_error"] < 1e-2 for x in others)
    assert all(x["flops"] < 0.5 * dense["flops"] and x["bytes"] == dense["bytes"] for x in others)


def test_scores_beside_the_plain_kernel(scripts):
    p = Problem(1, 4, 4, 60, 60, 16, causal=True)
    plain, *others = frame.measure(partial(scripts["modifiers"].changed, p), setup(80.0, 100.0, 160.0, 80.0, 160.0))
    assert [x["case"] for x in others] == ["softcap", "alibi_slopes", "sinks", "all"]
    assert [x["x_baseline"] for x in (plain, *others)] == [1.0, 0.8, 0.5, 1.0, 0.5]
    assert all(x["reason"] is None and x["flops"] == plain["flops"] for x in others)


def test_functions_and_masks_are_right(scripts):
    """Those that both mean, beside a stand-in for FlexAttention."""
    modifiers, p = scripts["modifiers"], Problem(1, 2, 2, 96, 96, 16)
    for case in modifiers.CASES:
        (row,) = modifiers.beside_flex(p, case, CPU)
        alone = replace(row, implementations={"cute_attn": row.implementations["cute_attn"]})
        (found,) = frame.measure(lambda on, alone=alone: [alone], setup(1.0))
        assert found["reason"] is None and found["relative_error"] < 1e-2
        half = "causal" in case or case == "document"
        assert found["flops"] == 2 * 2 * 2 * 16 * (96 * 97 / 2 if half else 96 * 96)


def test_a_window_is_right_and_a_baseline_that_fails_says_why(scripts):
    p = Problem(1, 2, 2, 200, 200, 16, "bf16", "bshd", True)
    ours, flash, fa4 = frame.measure(partial(scripts["window"].rows, p, 64), setup(1.0))
    assert ours["reason"] is None and ours["relative_error"] < 1e-2 and ours["x_baseline"] is None
    assert flash["reason"].startswith("not supported (Could not run") and fa4["reason"].startswith("not installed")
    assert ours["features"] == {"window": [64, 0]} and ours["flops"] == 4 * 16 * 2 * (65 * 66 / 2 + 135 * 65)


def case(seqlen_q, seqlen_k, causal=False, dtype="bf16", heads=2, head_dim=16, batch=2):
    return Problem(batch, heads, heads, seqlen_q, seqlen_k, head_dim, dtype, "bshd", causal)


def inputs(*sizes, **options):
    return implementations.make_inputs(case(*sizes, **options), CPU)


def logits(x):
    return x.q.double() @ x.k.double().mT * x.q.shape[3] ** -0.5  # (B, H, Sq, Sk)


ALONE = "integrations", "lists", "modifiers", "serving", "varlen", "window"  # that take --out alone


@pytest.mark.parametrize("script", ["accuracy", "odd_shapes", *ALONE])
def test_without_a_hopper_gpu_a_script_says_so_and_writes_nothing(script, tmp_path, monkeypatch, capsys):
    path = ROOT / "benchmarks" / f"{script}.py"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(path), "--out", str(tmp_path / "x.json")])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    refused(script, tmp_path, stop.value.code, *capsys.readouterr())


def test_a_script_is_run_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "window.py"), "--out", str(tmp_path / "x.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    refused("window", tmp_path, done.returncode, done.stdout, done.stderr)


def refused(script, folder, code, out, err):
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"benchmarks/{script}.py: a Hopper GPU") and "no CUDA device is available" in line
    assert not list(folder.iterdir())


# Accuracy: the truth


def naive(x, b, h):
    """All scores at once; a row whose every score is -inf, as where it sees no key, gives 0."""
    scores, p = logits(x)[b, h], x.problem
    if p.causal:
        rows, keys = torch.arange(p.seqlen_q)[:, None], torch.arange(p.seqlen_k)
        scores = scores.masked_fill(keys > rows + p.seqlen_k - p.seqlen_q, -torch.inf)
    weights = torch.softmax(scores, dim=1).masked_fill((scores == -torch.inf).all(dim=1, keepdim=True), 0.0)
    return weights @ x.v[b, h].double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(24, 24), (9, 31), (31, 9), (1, 1)])
@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_truth_is_naive_attention_in_float64(accuracy, monkeypatch, seqlen_q, seqlen_k, causal, rows):
    monkeypatch.setattr(reference, "CHUNK_BYTES", rows * seqlen_k * 8)  # so many rows at a time
    x = inputs(seqlen_q, seqlen_k, causal)
    chosen = accuracy.pairs(x.problem)
    assert chosen == [(0, 0), (1, 1)]
    true = accuracy.truth(x, chosen)
    assert true.dtype == torch.float64 and true.shape == (2, seqlen_q, 16)
    torch.testing.assert_close(true, torch.stack([naive(x, b, h) for b, h in chosen]), rtol=0, atol=1e-12)
    if causal:
        assert not true[:, : max(seqlen_q - seqlen_k, 0)].any(), "rows that see no key give 0"


def test_truth_of_a_row_whose_every_score_is_minus_inf_is_0(accuracy):
    x = inputs(8, 12)
    x.q[:, :, 3, 0] = -torch.inf
    x.k[..., 0] = x.k[..., 0].abs() + 0.1
    true = accuracy.truth(x, [(0, 1)])
    assert (logits(x)[0, 1, 3] == -torch.inf).all() and not true[0, 3].any()
    torch.testing.assert_close(true[0], naive(x, 0, 1), rtol=0, atol=1e-12)


# Accuracy: the inputs


def test_no_kernel_takes_fewer_keys_at_a_time_than_rise_together(accuracy):
    assert min(keys_of_blocks()) >= accuracy.GROUP


def keys_of_blocks() -> set[int]:
    """Of the kernels that the adversarial inputs are for: nothing changes their scores."""
    return {config.tile_n for config in prebuilt() if not config.score.name}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("to_first", [False, True])
def test_the_maximum_of_every_row_grows_at_every_block(accuracy, dtype, head_dim, to_first):
    seqlen = accuracy.ADVERSARIAL_SEQLEN
    plain = inputs(seqlen, seqlen, dtype=dtype, head_dim=head_dim, heads=1, batch=1)
    x = accuracy.growing(plain, to_first=to_first)
    scores = logits(x)[0, 0]
    for tile_n in {accuracy.GROUP, *keys_of_blocks()}:
        blocks = scores.split(tile_n, dim=1)
        if not to_first:  # a partial last block may hold keys of one group only, its neighbour's last
            blocks = [block for block in blocks if block.shape[1] == tile_n]
        rise = torch.stack([block.amax(dim=1) for block in blocks]).diff(dim=0)  # (blocks - 1, Sq)
        assert (rise < 0 if to_first else rise > 0).all(), tile_n
    assert x.q.dtype == plain.q.dtype and x.q.stride() == plain.q.stride() and x.v is plain.v
    assert torch.equal(x.q[..., 1:], plain.q[..., 1:]) and not torch.equal(x.k, plain.k)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_large_logits_reach_1e4_on_both_sides(accuracy, dtype):
    x = accuracy.large_logits(inputs(256, 256, dtype=dtype, head_dim=64))
    scores = logits(x)
    assert scores.abs().max().item() == pytest.approx(1e4, rel=1e-2)
    assert scores.max() > 5e3 and scores.min() < -5e3
    assert x.q.isfinite().all() and x.q.dtype == x.k.dtype


def test_cases_are_the_sweep_and_the_adversarial_inputs_at_one_length(accuracy):
    every = accuracy.cases("fp16")
    normal = [problem for kind, problem in every if kind == "normal"]
    assert [((p.batch, p.heads, p.seqlen_q, p.head_dim), p.causal) for p in normal] == cells.sweep()
    hard = [(kind, problem.head_dim, problem.causal) for kind, problem in every if kind != "normal"]
    assert len(set(hard)) == len(hard) == 3 * 3 * 2 and len(every) == 54
    assert {p.seqlen_q for kind, p in every if kind != "normal"} == {2048} and {p.dtype for _, p in every} == {"fp16"}


def test_two_pairs_are_checked_up_to_4096_and_the_last_one_above(accuracy):
    assert accuracy.pairs(case(4096, 4096, heads=16, batch=4)) == [(0, 0), (3, 15)]
    assert accuracy.pairs(case(8192, 8192, heads=16, batch=2)) == [(1, 15)]


# Accuracy: the verdict


def test_errors_of_made_up_outputs(accuracy):
    true = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)  # the pair (0, 1)
    o = torch.tensor([[[[9.0, 9.0], [9.0, 9.0]], [[3.5, 0.0], [0.0, 4.0]]]])
    found = accuracy.errors(o, [(0, 1)], true)
    assert found == (pytest.approx(0.5 / 4), 0.5, pytest.approx(0.1))
    for bad in (torch.nan, torch.inf, -torch.inf):
        o[0, 0, 1, 1] = bad  # in a pair that is not compared
        assert accuracy.errors(o, [(0, 1)], true) == (math.inf,) * 3


@pytest.mark.parametrize(
    ("largest", "bf16", "fp16"), [(1.0, -8, -11), (1.99, -8, -11), (2.0, -7, -10), (0.3, -10, -13)]
)
def test_half_an_ulp(accuracy, largest, bf16, fp16):
    assert accuracy.half_ulp(largest, torch.bfloat16) == 2.0**bf16
    assert accuracy.half_ulp(largest, torch.float16) == 2.0**fp16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_an_ulp_is_what_rounding_may_be_off_by(accuracy, dtype):
    x = torch.rand(100_000) + 1  # of one binade
    error = (x.to(dtype) - x).abs().max().item()
    assert 0.9 < error / accuracy.half_ulp(1.5, dtype) <= 1


@pytest.mark.parametrize(
    ("ours", "cudnn", "said"),
    [
        (1e-3, 1e-3, "ok"),
        (2**-8, 0.0, "ok"),  # the floor: half an ulp of 1.5 in bf16
        (2**-8 + 1e-6, 0.0, "error too large"),
        (1.25 * 0.02 + 2**-8, 0.02, "ok"),
        (1.25 * 0.02 + 2**-8 + 1e-6, 0.02, "error too large"),
        (math.inf, 0.02, "NaN or inf"),
        (math.inf, math.inf, "NaN or inf"),
        (0.5, math.inf, "ok"),  # cuDNN's is not finite
    ],
)
def test_verdicts(accuracy, ours, cudnn, said):
    ours, cudnn = (accuracy.Errors(worst / 2, worst, worst) for worst in (ours, cudnn))
    assert accuracy.verdict(ours, accuracy.allowed(cudnn, 1.5, torch.bfloat16)) == said


@pytest.mark.parametrize("kind", ["normal", "growing to the first key", "growing to the last key", "logits of 1e4"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_cell_on_the_cpu(accuracy, kind, causal):
    """torch's math stands for cuDNN."""
    ours, peer = accuracy.measure(kind, case(200, 200, causal), implementations.BASELINES["math"], CPU)
    assert (ours["contender"], peer["contender"]) == ("cute_attn", "math") and ours["verdict"] == "ok"
    assert ours["inputs"] == kind and ours["checked_pairs"] == 2 and ours["shape"] == "2,2,200,16"
    for entry in (ours, peer):
        assert 0 < entry["mean_error"] < entry["max_error"] < 0.05 and entry["relative_error"] < 2e-2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.mul_(1.5), "error too large"),
        (lambda o: o.index_fill_(1, torch.tensor(0), torch.nan), "NaN or inf"),
    ],
)
def test_a_wrong_kernel_fails_and_is_recorded(accuracy, monkeypatch, tmp_path, capsys, change, said):
    right = implementations.cute_attn.flash_fwd
    monkeypatch.setattr(implementations.cute_attn, "flash_fwd", lambda *a, **k: change(right(*a, **k)))
    entries = accuracy.measure("normal", case(64, 64), implementations.BASELINES["math"], CPU)
    assert accuracy.finish(entries, tmp_path / "x.json", {"math": "1"}) == 1
    record, printed = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr()
    assert record["failed"] == [f"2,2,64,16 full bf16, normal: {said}"] == printed.err.splitlines()
    assert (record["cells"][0]["max_error"] is None) == (said == "NaN or inf")
    assert "0 of 1 cells are within what is allowed" in printed.out


def test_a_good_run_is_recorded(accuracy, tmp_path, capsys):
    entries = accuracy.measure("normal", case(64, 64), implementations.BASELINES["math"], CPU)
    assert accuracy.finish(entries, tmp_path / "x.json", {"math": "1"}) == 0
    record, printed = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr()
    assert {"date", "gpu", "versions", "kernels_sha256", "method", "peers"} <= set(record)
    assert record["failed"] == [] and record["cells"] == report.rounded(entries)
    assert "1 of 1 cells are within what is allowed" in printed.out and f"{entries[0]['max_error']:.2e}" in printed.out
    assert printed.err == ""


# Odd shapes


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((4096, 80), (4096, 128)),
        ((4096, 112), (4096, 128)),
        ((4096, 160), (4096, 256)),
        ((4096, 224), (4096, 256)),
        ((1000, 128), (1024, 128)),
        ((1337, 64), (2048, 64)),
        ((4097, 128), (8192, 128)),
        ((2048, 64), (2048, 64)),
        ((1, 8), (512, 64)),
    ],
)
def test_padding_to_the_next_cell_of_the_grid(odd_shapes, shape, grid):
    assert odd_shapes.padded(*shape) == grid


def test_every_odd_shape_has_a_neighbour_of_the_sweep_with_its_batch_and_heads(odd_shapes):
    found = odd_shapes.groups()
    assert all(((p.batch, p.heads, p.seqlen_q, p.head_dim), p.causal) in cells.sweep() for p in found)
    for beside, odd in found.items():
        for p in odd:
            assert p.seqlen_q <= beside.seqlen_q and p.head_dim <= beside.head_dim and p != beside
            same = ("batch", "heads", "heads_kv", "dtype", "layout", "causal")
            assert all(getattr(p, name) == getattr(beside, name) for name in same)
            assert p.dtype == "bf16" and p.seqlen_q == p.seqlen_k
    every = [(p.seqlen_q, p.head_dim, p.causal) for odd in found.values() for p in odd]
    lengths = [(s, d) for s in (1000, 1337, 4097) for d in (64, 128)]
    dims = [(4096, d) for d in (80, 96, 112, 160, 192, 224)]
    assert sorted(every) == sorted((s, d, causal) for s, d in lengths + dims for causal in (False, True))


class FakeTimer:
    """The next callable that comes takes the next of these times, us."""

    def __init__(self, *us):
        self._left, self._us = iter(us), {}

    def run(self, function, runs):
        if function not in self._us:
            self._us[function] = next(self._left)

    def sample(self, function, samples, runs):
        return [self._us[function]] * samples


def setup(*us):
    return frame.Setup(CPU, FakeTimer(*us), lambda: nullcontext(timing.NoMonitor()), rounds=2, gpu="NVIDIA H200")


def groups(odd_shapes):
    """A neighbour and two odd shapes beside it."""
    beside, odd = case(32, 32), [case(32, 32, head_dim=8), case(24, 24)]
    return {"all": partial(odd_shapes.rows, beside, odd)}


def test_the_baseline_of_an_odd_shape_is_its_neighbour(odd_shapes):
    neighbour, first, second = frame.measure(groups(odd_shapes)["all"], setup(100.0, 80.0, 125.0))
    assert (first["shape"], first["baseline"], neighbour["shape"]) == ("2,2,32,8", "2,2,32,16 full", "2,2,32,16")
    assert [one["x_baseline"] for one in (neighbour, first, second)] == [1.0, 1.25, 0.8]
    assert first["tflops"] == pytest.approx(4 * 4 * 32 * 32 * 8 / 80 / 1e6)
    assert second["rounds_us"] == [125.0] * 2


@pytest.mark.parametrize(("us", "status"), [((85.0, 85.0, 100.0), 0), ((85.0, 85.0, 100.1), 1)])
def test_one_shape_below_the_bar_fails_the_run(odd_shapes, tmp_path, capsys, us, status):
    run = odd_shapes.Run(groups(odd_shapes), {"bar": odd_shapes.BAR}, Console(), tmp_path / "x.json")
    run.prepare = lambda: setup(*us)
    assert run.run() == status
    content, printed = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr()
    assert content["schema"] == 2 and content["complete"] and content["conditions"] == {"bar": 0.85}
    assert content["records"] == report.rounded(run.records) and len(printed.err.splitlines()) == status
    assert all("2,2,24,16 full: 0.849 of 2,2,32,16 full" in line for line in printed.err.splitlines())
    assert "2,2,24,16 full: cute_attn" in printed.out


def test_a_wrong_kernel_is_not_timed(odd_shapes, monkeypatch, capsys):
    right = implementations.cute_attn.flash_fwd
    monkeypatch.setattr(implementations.cute_attn, "flash_fwd", lambda *a, **k: right(*a, **k).mul_(1.5))
    run = odd_shapes.Run(groups(odd_shapes), {}, Console(), None)
    run.prepare = setup
    assert run.run() == 1
    assert "2,2,32,16 full: cute_attn: wrong (relative error 5.0e-01" in capsys.readouterr().err


def test_only_takes_groups_by_a_word_and_names_them_all_where_none_has_it(scripts, capsys):
    main, name = scripts["script"].main, "4,32,8192,64 256"
    with pytest.raises(SystemExit) as stop:
        main("window", None, scripts["window"].GROUPS, ["--only", "nothing"])
    assert (
        stop.value.code == 2
        and f"argument --only: no group's name has it; there are {name}; " in capsys.readouterr().err
    )


def test_varlen_lengths_and_their_work(scripts, monkeypatch):
    """Drawn once and for all; equal ones are of the same work; ours and dense agree."""
    varlen = scripts["varlen"]
    lengths = varlen.random_lengths()
    assert lengths == varlen.random_lengths() and len(set(lengths)) > 50 and 64 <= min(lengths) <= max(lengths) <= 8192
    even = varlen.equal(lengths)
    assert len(even) == 64 and sum(n * n for n in even) == pytest.approx(sum(n * n for n in lengths), rel=1e-3)
    monkeypatch.setattr(varlen, "HEADS", 2)
    packing = varlen.pack((33, 33), 16, CPU)
    assert packing.spec(False).workload().flops == 4 * 2 * 2 * 33 * 33 * 16
    assert torch.equal(varlen.dense(packing, True), varlen.ours(packing, True))


def test_sequences_are_right_beside_their_own_truth(scripts, monkeypatch):
    varlen = scripts["varlen"]
    monkeypatch.setattr(varlen, "HEADS", 2)
    monkeypatch.setattr(varlen, "random_lengths", lambda: (33, 100, 64, 7, 20))
    found = frame.measure(partial(varlen.rows, 16, True), setup(10.0, 20.0, 20.0))
    timed = {(r["case"], r["contender"]): r for r in found if r["reason"] is None}
    assert list(timed) == [("drawn", "cute_attn"), ("equal lengths", "cute_attn"), ("equal lengths", "dense")]
    assert all(r["relative_error"] < 1e-2 and r["checked_heads"] == 8 for r in timed.values())
    mixed = timed["drawn", "cute_attn"]
    assert mixed["features"] == {"sequences": 5, "tokens": 224} and mixed["shape"] == "5,2,7..100,16"
    packing = varlen.pack((33, 7), 16, CPU)
    o = varlen.ours(packing, True)
    truth = varlen.VarlenTruth(packing, True)
    assert truth.errors(o)[1] < 1e-2
    o[33:] += 1
    assert truth.errors(o)[0] == pytest.approx(1.0, rel=0.05)


def test_readme_reads_records_of_both_schemas(scripts, readme, tmp_path, monkeypatch):
    """The committed files are of the first; a run of today's scripts writes the second."""
    before = readme.features()
    assert any("times as fast as dense" in line for line in before)
    p = Problem(1, 2, 2, 256, 256, 16)
    for name, make in (("lists", scripts["lists"].rows), ("modifiers", scripts["modifiers"].changed)):
        run = frame.Run({name: partial(make, p)}, {}, Console(), tmp_path / f"{name}.json")
        run.prepare = lambda: setup(100.0, 20.0, 10.0, 25.0, 5.0)
        assert run.run() == 0
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.features()
    assert any("lists of 192x128 blocks" in line and " 4.00 " in line for line in lines)
    assert "| ALiBi, 2k and 8k: time over the plain kernel's |  |  |  |" in lines
    assert [x for name, _, x in readme.scores() if name.startswith("ALiBi")] == [0.1]


SUITE = """
import os, pytest
from pathlib import Path

@pytest.mark.parametrize("n", [1, 2])
def test_good(n, request):
    request.node.user_properties.append(("launches", n))
    with (Path(__file__).parent / "ran").open("a") as file:
        file.write("x")

def test_bad():
    assert 1 == 2

@pytest.mark.skip(reason="needs more")
def test_skipped():
    pass

@pytest.fixture
def broken():
    yield
    raise ValueError("on the way out")

def test_bad_at_its_end(broken):
    pass

def test_the_end_of_the_process():
    if not (marker := Path(__file__).parent / "been").exists():
        marker.touch()
        os._exit(3)

def test_last():
    pass
"""


def test_gpu_tests_go_on_where_a_run_was_cut_off(scripts, tmp_path, monkeypatch):
    gpu_tests = scripts["gpu_tests"]
    suite, folder = tmp_path / "test_suite.py", tmp_path / "log"
    suite.write_text(SUITE)
    here = dict(kernels_sha256="5eed", gpu="NVIDIA H200", versions=dict(torch="2"), date="1")
    monkeypatch.setattr(gpu_tests, "where", lambda: here)
    parts = {"both": [str(suite)], "alone": [str(suite), "-k", "last"]}
    rest = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={tmp_path}"]
    first, second, third = (gpu_tests.in_parts(parts, folder, 600, rest) for _ in range(3))
    assert (first["passed"], first["failed"], first["skipped"], first["ended"]) == (3, 2, 1, False)
    assert first["parts"]["alone"]["ended"] and first["parts"]["alone"]["passed"] == 1
    part = second["parts"]["both"]
    assert (part["passed"], part["failed"], part["skipped"], part["launches"], second["ended"]) == (4, 2, 1, 3, True)
    assert part["failures"] == ["test_suite.py::test_bad", "test_suite.py::test_bad_at_its_end"]
    assert part["skips"] == {"test_suite.py::test_skipped": "needs more"}
    assert third == second and (tmp_path / "ran").read_text() == "xx"
    assert (second["passed"], second["kernels_sha256"]) == (5, "5eed")
    monkeypatch.setattr(gpu_tests, "where", lambda: dict(here, kernels_sha256="0ther"))
    with pytest.raises(ValueError, match="kernels_sha256 is 5eed there, and 0ther here"):
        gpu_tests.in_parts(parts, folder, 600, rest)


def test_gpu_tests_on_two_want_two(scripts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py", "--two", "--log", str(tmp_path / "log")])
    with pytest.raises(SystemExit) as stop:
        scripts["gpu_tests"].main()
    assert stop.value.code == 2 and "--two: two GPUs are needed, torch sees 1" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_a_run_ends_at_its_limit(scripts, tmp_path):
    (tmp_path / "test_suite.py").write_text("import time\n\ndef test_endless():\n    time.sleep(1000)\n")
    assert not scripts["gpu_tests"].run([str(tmp_path), "-q", "-p", "no:cacheprovider"], 0.5)


def test_gpu_tests_on_two_name_tests_that_there_are(scripts):
    gpu_tests = scripts["gpu_tests"]
    for name in (*gpu_tests.NEED_TWO, *gpu_tests.WANT_QUIET):
        path, _, test = name.partition("::")
        assert f"\ndef {test}(" in (ROOT / path).read_text() if test else (ROOT / path).exists()
