"""The ladder: its stages differ one step at a time and compile healthy; its table and files, on made-up times."""

import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from rich.console import Console

from cute_attn.kernels.tile_scheduler import DynamicLongest, OneTile, StaticTiles
from cute_attn.plan import EVERY_HEAD_DIM, HEAD_DIMS, Problem, plan
from cute_attn.tools import bench, inspect
from cute_attn.tools.benchmark import ablation, frame, implementations, machine, plot, timing
from cute_attn.tools.benchmark.workload import Spec
from tests.interpreter.cases import run
from tests.support.bench import CONDITIONS, EightHeads, FakeMonitor, FakeTimer, fake_setup, right_output
from tests.support.figures import assert_words_lie_apart, colours, committed, words_of
from tests.support.nightly import where
from tests.support.requirements import interpreter

SHAPE = Problem(16, 16, 16, 2048, 2048, 64, "bf16", "bhsd")
US = dict(zip(ablation.NAMES, (1000.0, 800.0, 750.0, 600.0, 500.0), strict=True))


# Stages


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_stages_differ_one_step_at_a_time(head_dim, causal):
    problem = SHAPE._replace(head_dim=head_dim, causal=causal)
    stages = ablation.configs(problem)
    first = stages[0]
    assert (first.stages, first.scheduler, first.overlap, first.pingpong) == (1, OneTile, False, False)
    assert first.tile_m == 128 and first.cluster == first.split == first.q_stages == 1 and not first.q_in_regs
    assert [ablation.changed(*pair) for pair in pairwise(stages[:-1])] == [
        {"stages": 2},
        {"scheduler": DynamicLongest if causal else StaticTiles},
        {"pingpong": True, "overlap": True},
    ]
    assert stages[-1] == plan(problem)
    assert all(_kind(c) == _kind(plan(problem)) for c in stages)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [d for d in EVERY_HEAD_DIM if d > 256])
def test_stages_of_shared_rows(head_dim, causal):
    """Where two warpgroups share them, in tiles that fit from the first stage on."""
    problem = SHAPE._replace(head_dim=head_dim, causal=causal)
    stages = ablation.configs(problem)
    assert {(c.tile_m, c.tile_n, c.head_dim_splits) for c in stages} == {(64, plan(problem).tile_n, 2)}
    assert [sorted(ablation.changed(*pair)) for pair in pairwise(stages[:-1])] == [
        ["stages"],
        ["scheduler"],
        ["overlap", "pingpong"],
    ]
    assert stages[-1] == plan(problem)


@interpreter
def test_a_stage_of_shared_rows_isright_output():
    """One after the other, which only the ladder has."""
    run(ablation.configs(SHAPE._replace(head_dim=320))[0], 33, 70)


def _kind(config):
    return config.head_dim, config.dtype, config.layout, config.mask


@pytest.mark.machine_code
@pytest.mark.parametrize("which", where((128, True).__eq__, product([64, 128], [False, True])), ids=str)
def test_every_stage_compiles_healthy(which):
    """Those of d64, full: `test_without_a_gpu_each_stage_is_compiled_and_nothing_timed`."""
    head_dim, causal = which
    problem = SHAPE._replace(head_dim=head_dim, causal=causal)
    assert {stage.name: inspect.report(stage.config(problem)).problems() for stage in ablation.STAGES} == {
        name: [] for name in ablation.NAMES
    }


def test_what_a_stage_adds_is_what_its_config_changes():
    words = [stage.adds(SHAPE) for stage in ablation.STAGES]
    assert words[:4] == [
        "128x128 tiles; QK, softmax, PV in turn",
        "K/V ring of 2 stages",
        "a CTA per SM, tiles in turn",
        "ping-pong, PV beside the next softmax",
    ]
    assert (
        ablation.STAGES[2].adds(SHAPE._replace(causal=True)) == "a CTA per SM takes tiles by a counter, longest first"
    )
    one = ablation.configs(SHAPE)[3]
    assert ablation.difference(one, one) == "the same kernel"
    assert ablation.difference(one, replace(one, tile_m=192, q_in_regs=True)) == "192x128 tiles, Q in registers"
    assert ablation.difference(one, replace(one, dtype="fp16")) == "dtype fp16"


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_stage_is_launched_as_flash_fwd_launches_it(layout, causal, monkeypatch):
    """The compiled call and the GPU are fakes; the call's arguments and the output's order are held."""
    problem = Problem(2, 4, 2, 24, 24, 16, "bf16", layout, causal)
    inputs = implementations.make_inputs(problem, torch.device("cpu"))
    seen = []

    class Gpu:
        num_sms = 132

        def counters(self, each):
            return 4096 if each else 0

    def kernel(q, k, v, o, *rest):
        seen.append((q.shape, k.shape, o.stride() == q.stride(), *rest))
        right = right_output(inputs)
        o.copy_(right.transpose(1, 2) if layout == "bshd" else right)

    monkeypatch.setattr(ablation.compile, "get", lambda config: kernel)
    monkeypatch.setattr(ablation.device, "get", lambda index: Gpu())
    for stage in ablation.STAGES[:4]:
        prepared = stage.prepare(inputs)
        assert torch.equal(prepared.bhsd(prepared.call.run()), right_output(inputs))
    q, k = ((2, 24, 4, 16), (2, 24, 2, 16)) if layout == "bshd" else ((2, 4, 24, 16), (2, 2, 24, 16))
    counters = [0, 0, *([4096 if causal else 0] * 2)]
    assert seen == [(q, k, True, 0, counter, 0.25, 132) for counter in counters]


# Command line


def test_arguments_of_the_ladder():
    args, problems = bench.parse(["--ladder", "--shape", "1,2,128,64", "--shape", "1,2,256,128", "--causal"])
    assert args.vs == ("math", "cudnn", "flash", "fa3", "fa4")
    assert [(p.seqlen_q, p.head_dim, p.causal) for p in problems] == [(128, 64, True), (256, 128, True)]
    assert bench.parse(["--ablation", "--vs", "cudnn"])[0].vs == ("cudnn",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ladder --sweep", "argument --ablation: not allowed with --sweep; name shapes by --shape"),
        ("--ladder --peers x.json", "argument --ablation: not allowed with --baselines"),
        ("--ladder --vs fa5", "argument --vs: fa5 is not known"),
    ],
)
def test_bad_arguments_exit_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_each_stage_is_compiled_and_nothing_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "no_hopper", lambda: "no CUDA device is available")
    path, png = tmp_path / "x.json", tmp_path / "x.png"
    words = f"--shape 16,16,2048,64 --layout bhsd --ladder --json {path} --plot {png}"
    assert bench.main(words.split()) == 0
    out, err = capsys.readouterr()
    assert bench.NOT_TIMED in out and "--plot: not written" in err and not png.exists()
    for i, name in enumerate(ablation.NAMES):
        assert f"{i + 1}. {name}" in out
    content = json.loads(path.read_text())
    assert content["timed"] is False and content["records"] == []
    stages = ablation.configs(SHAPE)
    assert [(k["stage"], k["contender"], k["name"], k["smem_bytes"]) for k in content["kernels"]] == [
        (i + 1, name, config.name, config.smem_bytes)
        for i, (name, config) in enumerate(zip(ablation.NAMES, stages, strict=True))
    ]
    assert all(k["steady_loop"]["instructions"] > 100 and k["problems"] == [] for k in content["kernels"])


# A whole run, on a fake clock


class Run:
    """A stage's call: the right output, and a time for the fake clock."""

    def __init__(self, us, o):
        self.us, self.o = us, o

    def __call__(self):
        return self.o.clone()


@pytest.fixture
def fake_gpu(monkeypatch):
    """bench.main runs as on a GPU: the stages are the reference on the CPU, with made-up times."""

    def launch(config, inputs):
        number = ablation.configs(inputs.problem).index(config)
        return implementations.Prepared(timing.Call(Run(US[ablation.NAMES[number]], right_output(inputs))), lambda o: o)

    def setup(monitor, **options):
        timer = FakeTimer(lambda function: getattr(function, "us", 5000.0))
        return frame.Setup(torch.device("cpu"), timer, lambda: nullcontext(FakeMonitor()), **options)

    monkeypatch.setattr(machine, "no_hopper", lambda: None)
    monkeypatch.setattr(machine, "cublas", lambda nvml: timing.summarise([[1600.0]], 1, 690.0, 1400.0))
    monkeypatch.setattr(frame, "gpu_setup", setup)
    monkeypatch.setattr(ablation, "launch", launch)


RUN = "--ladder --shape 1,2,16,16 --shape 1,2,32,16 --vs math,fa3 --rounds 2"


def test_a_run_writes_everything(fake_gpu, tmp_path, capsys):
    files = {"json": tmp_path / "x.json", "csv": tmp_path / "x.csv", "plot": tmp_path / "x.png"}
    words = [*RUN.split(), *(word for name, path in files.items() for word in (f"--{name}", str(path)))]
    assert bench.main(words) == 0
    out = capsys.readouterr().out
    for word in ("1. one tile per CTA", "5. tuned plan", "1.25x", "1.07x", "1.20x", "fa3           not installed"):
        assert word in out, word
    content = json.loads(files["json"].read_text())
    assert content["complete"] and "fa3" in content["absent"] and list(content["conditions"]["peers"]) == ["math"]
    records = content["records"]
    assert [(r["stage"], r["contender"]) for r in records] == 2 * [
        *((i + 1, name) for i, name in enumerate(ablation.NAMES)),
        (None, "math"),
        (None, "fa3"),
    ]
    assert [r["gain"] for r in records[:6]] == [None, *map(pytest.approx, (1.25, 800 / 750, 1.25, 1.2)), None]
    assert records[0]["kernel"].endswith("_once") and "stages=1" in records[0]["config"]
    assert all(r["relative_error"] < 1e-2 and r["max_error"] is not None for r in records[:6])
    assert len(files["csv"].read_text().splitlines()) == 1 + 14
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_a_stage_that_fails_fails_the_run(fake_gpu, monkeypatch, capsys):
    right = ablation.launch

    def launch(config, inputs):
        if config.overlap:
            raise RuntimeError("no such kernel")
        return right(config, inputs)

    monkeypatch.setattr(ablation, "launch", launch)
    assert bench.main(RUN.split()) == 1
    assert "GEMM/softmax overlap: failed (RuntimeError: no such kernel)" in capsys.readouterr().out


def test_a_peer_without_memory_is_named_and_the_rest_is_timed(fake_gpu, monkeypatch, capsys):
    def much(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(implementations, "scaled_dot_product_attention", much)
    assert bench.main(RUN.split()) == 0
    out = capsys.readouterr().out
    assert "math: out of memory" in out and "5. tuned plan" in out


# Table, plot and README, on made-up records


def made_up(problem=SHAPE, us=US | {"math": 7000.0, "cudnn": 600.0, "fa3": None}):
    attempts = {name: frame.Attempt(name, max_error=1.2e-3, relative_error=2.4e-3) for name in us}
    attempts["fa3"] = frame.Attempt("fa3", reason="out of memory")
    stats = {name: timing.summarise([[x]], 1, 650.0, 1500.0) for name, x in us.items() if x}
    row, setup = frame.Row(Spec(problem), {}, EightHeads()), fake_setup(cublas_tflops=674.0)
    records = [frame.record(row, attempt, stats.get(name), setup) for name, attempt in attempts.items()]
    return ablation.with_stages(frame.with_ratios(records))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_has_every_number_at_any_width(width):
    console = Console(width=width, record=True, file=io.StringIO())
    ablation.print_cell(console, made_up())
    text = console.export_text()
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    for word in ("what it adds", "1000.0", "549.8", "1.25x", "1.07x", "1.200", "1.2e-3", "2.4e-3", "8 of 256"):
        assert word in text, word
    assert "fa3: out of memory" in text


def test_gains_and_ratios_need_both_times():
    records = {r["contender"]: r for r in made_up(us=US | {"multi-stage ring": None, "fa3": None})}
    assert records["multi-stage ring"]["gain"] is None and records["persistent"]["gain"] is None
    assert records["GEMM/softmax overlap"]["gain"] == pytest.approx(1.25)


def test_the_plot_has_a_bar_for_every_stage_and_peer(tmp_path):
    records = made_up() + made_up(SHAPE._replace(causal=True))
    plot.draw_ablation(tmp_path / "x.png", records, CONDITIONS)
    seen = colours(tmp_path / "x.png")
    assert {tuple(bytes.fromhex(code[1:])) for code in plot.ABLATION} <= seen
    assert plot.plt.imread(tmp_path / "x.png").shape[1] > 1000


def pictures():
    """The committed ladder; those of other classes, with all peers; two cells at once."""
    yield committed("ladder")["records"], committed("ladder")["conditions"]
    peers = dict(
        zip(("math", "cudnn", "flash", "fa4", "efficient"), (7000.0, 600.0, 900.0, 550.0, 1000.0), strict=True)
    )
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            yield made_up(SHAPE._replace(head_dim=head_dim, causal=causal), US | peers | {"fa3": None}), CONDITIONS
    yield made_up() + made_up(SHAPE._replace(heads_kv=4, seqlen_k=4096)), CONDITIONS | {"cublas_tflops": 500.0}


def test_captions_lie_apart_and_bars_have_room():
    for records, conditions in pictures():
        figure = plot.ablation_figure(records, conditions)
        assert figure.get_figwidth() == 8.3
        assert_words_lie_apart(figure)
        texts = words_of(figure)
        for axes in figure.axes:
            assert axes.get_position().width > 0.58, "of the picture, for bars"
            bars = [patch.get_window_extent() for patch in axes.patches]
            cublas = axes.get_lines()[0].get_window_extent().x0
            assert [w for w, box in texts if box.x0 < cublas < box.x1 and _beside(box, bars)] == []


def _beside(box, bars):
    return any(bar.y0 < (box.y0 + box.y1) / 2 < bar.y1 and box.x0 > bar.x1 for bar in bars)


def test_the_longest_caption_is_whole():
    records = made_up()
    figure = plot.ablation_figure(records, CONDITIONS)
    drawn = " ".join(" ".join(word.split()) for word, _ in words_of(figure))
    for record in records:
        if record["tflops"]:
            assert f"{record['tflops']:.0f}" in drawn and (record["adds"] or record["contender"]) in drawn
    assert "cuBLAS bf16 8192³, settled: 674" in drawn


def test_readme_has_the_ladder_once_it_was_measured(readme, tmp_path, monkeypatch):
    (tmp_path / "sweep_bf16.json").write_text((readme.RESULTS / "sweep_bf16.json").read_text())
    before = (readme.ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(before)
    (tmp_path / "docs").mkdir()
    shutil.copy(readme.ROOT / "docs" / "how_it_works.md", tmp_path / "docs")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    readme.main()
    without = (tmp_path / "README.md").read_text()
    versions = {"torch": "2.11", "cudnn": "9.19"}
    (tmp_path / "ladder.json").write_text(json.dumps({"conditions": CONDITIONS | versions, "records": made_up()}))
    readme.main()
    with_ladder = (tmp_path / "README.md").read_text()
    assert "| 2. multi-stage ring | K/V ring of 2 stages | 800.0 | 344 | 1.25x | 0.75 | 2.4e-03 |" in with_ladder
    assert "| cudnn |  | 600.0 | 458 |  | 1.00 | 2.4e-03 |" in with_ladder and "| fa3 |" not in with_ladder
    assert with_ladder.split(readme.BEGIN_ABLATION)[0] == without.split(readme.BEGIN_ABLATION)[0]
    assert with_ladder.split(readme.END)[-1] == without.split(readme.END)[-1] == before.split(readme.END)[-1]
    how = (tmp_path / "docs" / "how_it_works.md").read_text()
    assert "| 800.0 | 344 | 1.25x |" in how and "](../benchmarks/results/ladder.png)" in how
    readme.main()
    assert (tmp_path / "README.md").read_text() == with_ladder


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["", "--causal", "--causal --dtype fp16 --layout bhsd"])
def test_a_small_real_run(tmp_path, words):
    path = tmp_path / "x.json"
    command = f"--ladder --shape 2,4,512,64 --rounds 1 --vs math,cudnn --json {path} {words}"
    assert bench.main(command.split()) == 0
    stages = [r for r in json.loads(path.read_text())["records"] if r["stage"]]
    assert [r["reason"] for r in stages] == [None] * 5
    assert all(r["relative_error"] < 1e-2 and r["p50_us"] > 1 for r in stages)
