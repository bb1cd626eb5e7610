"""`python -m cute_attn.inspect --timeline`: clock samples, spans, picture."""

import json
from itertools import pairwise

import pytest
import torch

from cute_attn.kernels.parts import parts_of
from cute_attn.kernels.trace import EVENTS, HEAD, SAMPLES
from cute_attn.plan import Problem
from cute_attn.tools import inspect
from cute_attn.tools.benchmark import timeline, timeline_plot
from cute_attn.tools.benchmark.timeline import Sample, Span
from cute_attn.tools.inspect import __main__ as inspect_cli
from tests.support.figures import assert_words_lie_apart, committed

WARPGROUP = [("QK", 900), ("softmax", 1500), ("step", 2010), ("QK", 2100), ("PV", 2120)]
WARPGROUP += [("softmax", 2700), ("PV done", 3000), ("PV", 3310), ("PV done", 3700)]
WARPGROUP += [("store", 3710), ("store done", 4000)]
PRODUCER = [("load k", 0), ("load q", 30), ("load k", 60), ("load v", 90)]


def notes(*roles, start):
    """As the kernel leaves them, by a clock of 32 bits; signed, as an int32 tensor gives them back."""
    found = [0] * (HEAD + 2 * SAMPLES * len(roles))
    for role, events in enumerate(roles):
        for i, (event, clock) in enumerate(events):
            at = HEAD + 2 * (role * SAMPLES + i)
            found[at], found[at + 1] = EVENTS.index(event) + 1, (clock + start + (1 << 31)) % (1 << 32) - (1 << 31)
    return found


@pytest.mark.parametrize("start", [0, 12345, (1 << 31) - 1000, (1 << 32) - 1000], ids=str)
def test_samples_count_from_the_first(start):
    producer, warpgroup, other = timeline.samples(notes(PRODUCER, WARPGROUP, [], start=start))
    assert producer == [Sample(*one) for one in PRODUCER]
    assert warpgroup == [Sample(*one) for one in WARPGROUP]
    assert other == []


def test_spans():
    found = timeline.spans([[Sample(*one) for one in role] for role in (PRODUCER, WARPGROUP)])
    assert [span for span in found if span.role == 0] == [Span(0, what, at, at) for what, at in PRODUCER]
    assert [span[1:] for span in found if span.role == 1] == [
        ("QK", 900, 1500),
        ("softmax", 1500, 2010),
        ("step", 2010, 2100),
        ("QK", 2100, 2700),
        ("PV", 2120, 3000),
        ("softmax", 2700, 3310),
        ("PV", 3310, 3700),
        ("store", 3710, 4000),
    ]


def test_picture(tmp_path):
    spans = timeline.spans([[Sample(*one) for one in role] for role in (PRODUCER, WARPGROUP)])
    assert timeline_plot.window(spans) == 4000
    timeline_plot.draw(tmp_path / "t.png", spans, "a title")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def marks_of(figure):
    """The loads' marks, the letters above, and their boxes."""
    figure.canvas.draw()
    axes = figure.axes[0]
    letters = [text for text in axes.texts if text.get_gid() == timeline_plot.LOAD]
    marks = [line for line in axes.get_lines() if line.get_gid() == timeline_plot.LOAD]
    return [line.get_xdata() for line in marks], letters, [letter.get_window_extent() for letter in letters]


def committed_spans():
    return [Span(**span) for span in committed("timeline")["spans"]]


def close_loads(count, gap):
    """As many marks as a picture may have, closer than letters are wide."""
    loads = [Span(0, ("load k", "load v")[i % 2], 700 + gap * i, 700 + gap * i) for i in range(count)]
    return [*loads, Span(1, "QK", 1000, 5000), Span(1, "store", 19_000, 20_700)]


PICTURES = {
    "committed": committed_spans(),
    "close": close_loads(12, 3),
    "equal": close_loads(9, 0),
    "many": close_loads(40, 450),
    "at the end": [*close_loads(2, 100), *[Span(0, "load q", 20_400 + i, 20_400 + i) for i in range(4)]],
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_mark_has_its_letter(name):
    spans = PICTURES[name]
    figure = timeline_plot.figure_of(spans, "One CTA")
    marks, letters, boxes = marks_of(figure)
    first, end = min(span.start for span in spans if span.role == 0), figure.axes[0].get_xlim()[1]
    loads = [span for span in spans if span.role == 0 and span.start - first < end]
    assert [x[0] for x in marks] == [span.start - first for span in loads]
    assert [letter.get_text() for letter in letters] == [span.what[-1].upper() for span in loads]
    assert [x[-1] for x in marks] == [letter.get_position()[0] for letter in letters]  # a line leads to each
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert_words_lie_apart(figure)


def test_letters_stay_above_their_marks_where_there_is_room():
    assert timeline_plot.spread([0, 10, 20], 5) == [0, 10, 20]
    assert timeline_plot.spread([0, 1, 2, 50], 5) == [-4, 1, 6, 50]
    assert timeline_plot.spread([0, 0, 4, 4], 4) == [-4, 0, 4, 8]
    assert timeline_plot.spread([], 4) == []


@pytest.mark.parametrize("shift", [0, 5000])
def test_the_picture_begins_at_the_first_load(shift):
    """By whatever clock the spans are; what ended before it is left out, and what lasted until then is cut."""
    moved = [span._replace(start=span.start + shift, end=span.end + shift) for span in committed_spans()]
    early = [Span(1, "step", 0, shift - 100), Span(2, "step", 0, shift + 500)] if shift else []
    figure = timeline_plot.figure_of([*early, *moved], "One CTA")
    axes = figure.axes[0]
    marks, _, _ = marks_of(figure)
    assert axes.get_xlim()[0] == 0 == marks[0][0] and axes.get_xlim()[1] == 21811
    assert min(patch.get_x() for patch in axes.patches) == (0 if shift else 7249)
    assert [tick for tick in axes.get_xticks() if tick < 0] == []


def test_of_many_blocks_a_few_are_drawn():
    blocks = [Span(1, "QK", 1000 * i, 1000 * i + 500) for i in range(40)]
    assert timeline_plot.window([*blocks, Span(1, "store", 40_000, 41_000)]) == 8000


@pytest.mark.parametrize(
    ("shape", "split"), [((4, 16, 16, 2048, 2048, 128), 1), ((1, 8, 8, 64, 8192, 64), 8)], ids=["many", "split"]
)
def test_the_kernel_that_notes(shape, split):
    """Of the plan's tiles; where the plan splits keys, of its class. Only this kernel reads the clock."""
    problem = Problem(*shape)
    config = timeline.timeline_config(problem)
    assert timeline.plan(problem).split == split and config.split == 1 and config.timeline
    plain = timeline.replace(config, timeline=False)
    notes, silent = (parts_of(c)._asdict() for c in (config, plain))
    assert {name for name in notes if type(notes[name]) is not type(silent[name])} == {"trace"}
    assert "CS2R" in inspect.sass(config) or "SR_CLOCKLO" in inspect.sass(config)
    assert "SR_CLOCK" not in inspect.sass(plain)
    assert not inspect.report(config).serialised


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inspect_cli.main(["--shape", "1,2,64,64", "--timeline", str(tmp_path / "t.png")]) == 1
    assert "--timeline: a kernel must run for it, and no CUDA device is available" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--json", "t.json"], "--json: it takes what --timeline draws"),
        (["--timeline", "t.jpg"], "--timeline"),
        (["--timeline", "t.png", "--sass"], "not allowed with argument"),
    ],
)
def test_bad_arguments(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        inspect_cli.parse(["--shape", "1,2,64,64", *argv])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_timeline_of_the_gpu(head_dim, causal, tmp_path):
    """Each warpgroup's events alternate as its program does, and a step takes 100 cycles to 20,000."""
    argv = ["--shape", f"4,16,1024,{head_dim}", *(["--causal"] if causal else [])]
    assert inspect_cli.main([*argv, "--timeline", str(tmp_path / "t.png"), "--json", str(tmp_path / "t.json")]) == 0
    assert (tmp_path / "t.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "t.json").read_text())
    spans = [Span(**one) for one in content["spans"]]
    config = timeline.timeline_config(Problem(4, 16, 16, 1024, 1024, head_dim, "bf16", "bshd", causal))
    assert {span.role for span in spans} == set(range(1 + config.warpgroups))
    assert content["kernel"] == config.name
    for role in range(1, 1 + config.warpgroups):
        mine = [span for span in spans if span.role == role]
        assert {span.what for span in mine} == {"step", "QK", "PV", "softmax", "store"}
        starts = [span.start for span in mine if span.what == "softmax"]
        assert all(b - a > 100 for a, b in pairwise(starts))
        assert all(0 <= span.end - span.start < 50_000 for span in mine)
