"""Pictures: their words and colours, and the records that they are drawn from."""

import json
from pathlib import Path

import numpy as np
from matplotlib.text import Text

from cute_attn.tools.benchmark import plot

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def colours(path):
    pixels = np.asarray(plot.plt.imread(path))[..., :3]
    return {tuple(round(255 * c) for c in pixel) for pixel in pixels.reshape(-1, 3)[::7]}


def committed(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def words_of(figure):
    """Every text that is drawn, with its box in pixels."""
    figure.canvas.draw()
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text not in hidden and text.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]


def assert_words_lie_apart(figure):
    """Within the picture, none on another; at the size of README none smaller than 10 pixels."""
    words = words_of(figure)
    for i, (word, box) in enumerate(words):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1, word
        on = [other for other, b in words[i + 1 :] if overlap(box, b)]
        assert not on, (word, on)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) * 100 / 72 > 10


def overlap(one, other):
    """By more than a pixel each way."""
    return min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
