"""The tuned tables: which kernel serves a class of problems, as measured on one GPU. Needs no GPU.

A table is JSON: what it was measured on, and rows such as

    {"head_dim": 64, "causal": false, "max_seqlen_q": 4608, "min_free_rows": 64, "fields": {"tile_m": 192, ...}}

A class is a head dim, a mask and an element type. Of its rows, in the file's order, the first one serves whose bounds
the problem keeps: at most `max_seqlen_q` queries a head, cut into several tiles of which the last has at least
`min_free_rows` rows without a query; at most `max_row_blocks` blocks of 64 queries in all heads and sequences (few
tiles: smaller ones reach more SMs, or a cluster splits the keys), with at least `min_seqlen_k` keys. Each bound may be
left out, and so may `dtype`, for both types. `fields` are those of `FwdConfig`, the scheduler by its name; those left
out have its defaults.

The package's table is `tuned.json`. `CUTE_ATTN_TUNED` names a file that is used instead, whatever the GPU; the user's
config folder may hold files for one GPU each, `tuned/nvidia_h200.json`. `python -m cute_attn.tune` writes them. A class
that a table of the user lacks is taken from the package's, and so is everything where the table is damaged.
"""

import dataclasses
import importlib.resources
import json
import os
import re
import warnings
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from .kernels.config import DTYPES, FwdConfig
from .kernels.mask import Causal, Full
from .kernels.tile_scheduler import DynamicLongest, OneTile, StaticTiles

MASKS: dict[bool, Full | Causal] = {mask.causal: mask for mask in (Full(), Causal())}
SCHEDULERS = {scheduler.name: scheduler for scheduler in (StaticTiles, DynamicLongest, OneTile)}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(FwdConfig)}
TUNED = (  # what a table chooses
    *("tile_m", "tile_n", "stages", "scheduler", "pingpong", "q_in_regs"),
    *("cluster", "q_stages", "split", "speculative"),
)
KEYS = {"speculative": "redo"}  # a table's word for a field, where it is another: tables of users outlive a rename
FIELDS = {KEYS.get(name, name): name for name in TUNED}  # by a table's word
BOUNDS = ("max_seqlen_q", "min_free_rows", "max_row_blocks", "min_seqlen_k")
REQUIRED, OPTIONAL = ("head_dim", "causal", "fields"), ("dtype", *BOUNDS, "tflops")

Key = tuple[int, bool, str]  # head_dim, causal, dtype


class Row(NamedTuple):
    """A kernel, its type and layout still open, and the problems that it serves."""

    config: FwdConfig
    dtype: str | None = None  # None: both
    max_seqlen_q: int | None = None  # None: any
    min_free_rows: int = 0
    max_row_blocks: int | None = None  # None: any
    min_seqlen_k: int = 0
    tflops: dict[str, float] | None = None  # where measured: S -> TFLOPS

    def serves(self, seqlen_q: int, seqlen_k: int = 0, row_blocks: int | None = None) -> bool:
        """row_blocks: None for more than any bound."""
        if self.max_seqlen_q is not None and seqlen_q > self.max_seqlen_q:
            return False
        if self.max_row_blocks is not None and (row_blocks is None or row_blocks > self.max_row_blocks):
            return False
        return seqlen_k >= self.min_seqlen_k and (not self.min_free_rows or self.uneven(seqlen_q))

    def uneven(self, seqlen_q: int) -> bool:
        """One tile of several has rows enough without a query: its warpgroups are idle, and it is done sooner."""
        tiles = -(-seqlen_q // self.config.tile_m)
        return tiles > 1 and tiles * self.config.tile_m - seqlen_q >= self.min_free_rows

    @property
    def always(self) -> bool:
        return not any(self.bounds().values())

    def bounds(self) -> dict[str, int | None]:
        return {name: getattr(self, name) or None for name in BOUNDS}

    def entry(self) -> dict[str, Any]:
        """The row as a table's file has it."""
        bounds = dict(dtype=self.dtype) | self.bounds()
        entry: dict[str, Any] = dict(head_dim=self.config.head_dim, causal=self.config.mask.causal)
        entry |= {name: value for name, value in bounds.items() if value is not None}
        return entry | dict(fields=in_words(self.config)) | (dict(tflops=self.tflops) if self.tflops else {})


class Table(NamedTuple):
    """gpu: what it was measured on; classes: the rows of each in the order of asking, the last one for any length."""

    gpu: str
    rows: tuple[Row, ...]
    classes: dict[Key, tuple[Row, ...]]


def in_words(config: FwdConfig) -> dict[str, Any]:
    """A config's fields as a row has them."""
    words: dict[str, Any] = {word: getattr(config, name) for word, name in FIELDS.items()}
    return words | dict(scheduler=config.scheduler.name)


@lru_cache
def prebuilt() -> Table:
    """The package's table."""
    return parse(json.loads((importlib.resources.files(__package__) / "tuned.json").read_text()))


@lru_cache
def table(gpu: str | None = None) -> Table:
    """What to plan by on a GPU of this name; the package's table where the user has none for it. Read once."""
    named = os.environ.get("CUTE_ATTN_TUNED")
    if named:
        return _read(Path(named)) or prebuilt()
    path = None if gpu is None else user_file(gpu)
    if path is None or not os.path.exists(path):  # Path.exists raises where the home is another user's
        return prebuilt()
    return _read(path, gpu) or prebuilt()


def user_folder() -> Path:
    """Where the user's tables lie, one for each GPU."""
    return Path(platformdirs.user_config_dir("cute_attn")) / "tuned"


def user_file(gpu: str) -> Path:
    """Of a GPU of this name, there or not."""
    return user_folder() / f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def file_in_use(gpu: str) -> Path:
    """Where a table of the user for this GPU is looked for."""
    return Path(os.environ.get("CUTE_ATTN_TUNED") or user_file(gpu))


def _read(path: Path, gpu: str | None = None) -> Table | None:
    """A table of the user, filled up from the package's; None, and a warning, where it does not serve."""
    try:
        own = parse(json.loads(path.read_text()))
        if gpu is not None and own.gpu != gpu:
            raise ValueError(f"it is of {own.gpu!r}, this GPU is {gpu!r}")
    except (OSError, ValueError) as error:  # json's and unicode's errors are ValueErrors
        text = f"{path}: this table of tuned kernels is ignored ({error}); the package's own is used instead"
        warnings.warn(f"{text}. `python -m cute_attn.tune` writes a new one", RuntimeWarning, stacklevel=3)
        return None
    return own._replace(classes=prebuilt().classes | own.classes)


def parse(content: Any) -> Table:
    """A table out of its JSON; ValueError says which row is wrong, and how."""
    if not isinstance(content, dict) or not isinstance(content.get("gpu"), str):
        raise ValueError("a table is an object with the GPU's name as `gpu` and a list of `rows`")
    if not isinstance(content.get("rows"), list):
        raise ValueError("`rows` is not a list")
    rows = tuple(_row(i, entry) for i, entry in enumerate(content["rows"]))
    return Table(content["gpu"], rows, by_class(rows))


def by_class(rows: tuple[Row, ...]) -> dict[Key, tuple[Row, ...]]:
    """The rows of each class up to the first that serves any length; ValueError where a class has none such."""
    classes: dict[Key, tuple[Row, ...]] = {}
    heads = {(row.config.head_dim, row.config.mask.causal) for row in rows}
    for (head_dim, causal), dtype in product(sorted(heads), DTYPES):
        mine = [r for r in rows if (r.config.head_dim, r.config.mask.causal) == (head_dim, causal)]
        mine = [r for r in mine if r.dtype in (None, dtype)]
        end = next((i for i, row in enumerate(mine) if row.always), None)
        if end is not None:
            classes[head_dim, causal, dtype] = tuple(mine[: end + 1])
        elif mine:
            word = f"head_dim {head_dim}, {'causal' if causal else 'full'}, {dtype}"
            raise ValueError(f"{word}: no row is for every length; the last one must have no bounds")
    return classes


def _row(i: int, entry: Any) -> Row:
    keys = set(entry) if isinstance(entry, dict) else set()
    if not set(REQUIRED) <= keys <= {*REQUIRED, *OPTIONAL}:
        allowed = f"{', '.join(REQUIRED)} are needed, {', '.join(OPTIONAL)} allowed"
        raise ValueError(f"row {i}: {allowed}; {', '.join(sorted(map(str, keys))) or 'no object'} came")
    bounds = {name: entry[name] for name in OPTIONAL if name in entry}
    for name in BOUNDS:
        if name in bounds and (type(bounds[name]) is not int or bounds[name] < 1):
            raise ValueError(f"row {i}: {name} {bounds[name]!r} is not a positive integer")
    if bounds.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"row {i}: dtype {bounds['dtype']!r} is not supported; use {' or '.join(DTYPES)}")
    try:
        return Row(config_of(entry["head_dim"], entry["causal"], entry["fields"]), **bounds)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"row {i}: {error or 'no kernel has these fields'}: {entry['fields']}") from None


def config_of(head_dim: Any, causal: Any, fields: Any) -> FwdConfig:
    """A row's kernel, its type and layout the defaults; ValueError or AssertionError where there is none."""
    if type(head_dim) is not int or head_dim < 32 or type(causal) is not bool or not isinstance(fields, dict):
        raise ValueError("head_dim is a multiple of 32, causal true or false, fields an object")
    for word, value in fields.items():
        if word not in FIELDS:
            raise ValueError(f"no field {word!r}, there are {', '.join(FIELDS)}")
        if word == "scheduler" and (type(value) is not str or value not in SCHEDULERS):
            raise ValueError(f"no scheduler {value!r}, there are {', '.join(SCHEDULERS)}")
        if word != "scheduler" and type(value) is not type(DEFAULTS[FIELDS[word]]):
            raise ValueError(f"{word} is of type {type(DEFAULTS[FIELDS[word]]).__name__}, {value!r} came")
    allowed = {"cluster": (1, 2), "q_stages": (1, 2), "split": (1, 2, 4, 8)}
    if fields.get("stages", 1) < 1 or any(fields.get(name, 1) not in values for name, values in allowed.items()):
        raise ValueError(f"stages from 1 on, and {allowed}")
    own = {FIELDS[word]: value for word, value in fields.items()}
    scheduler = SCHEDULERS[fields.get("scheduler", StaticTiles.name)]
    return FwdConfig(head_dim, mask=MASKS[causal], **{**own, "scheduler": scheduler})
