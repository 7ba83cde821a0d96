"""From records on disk to the `DatasetDict` that a trainer takes: Arrow, memory-mapped, flat in memory at any size.

1. The files are read once, line by line; the first bad line stops it with its `RecordError`.
2. Each record becomes a row of columns ``anchor``, ``positive``, then ``negative_1``, ``negative_2``, ... and ``score``
   as far as it has them. A side is always ``{"image": [path, ...], "text": "..."}``: `datasets` holds no column of
   mixed types. What is not an input is left out: a trainer would embed it.
3. Rows with the same task and the same columns form one split, since a column must not have gaps. Its name is the task,
   and where there are negatives their number: ``ocr``, ``ocr.negatives_1``, ``ocr.negatives_4``. (A dot, as the Hub
   takes no hyphen in the name of a split.)
4. The splits are kept in the cache under a key of the files' paths, sizes and times; the next call maps them directly.

Images stay paths, opened by the model when it makes a batch. One that cannot be opened stops the training there, as a
row left out of a batch would change what the others are contrasted with, and the ranks would no longer run alike. With
``on_error="skip"`` such rows are found before, while the cache is built: every image is decoded once, and a row with a
broken one is left out of the data and listed in a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import config as datasets_config
from filelock import FileLock

from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train.record_lines import (
    ImageError,
    RecordError,
    StrPath,
    check_records,
    read_records,
    report_line,
)
from sentence_vipyloqwen.train.records import Record, Side

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the cache key; raised when the same file would give other rows."""

ROWS_PER_BATCH = 1000
CHARACTERS_PER_BATCH = 1 << 24
"""A record batch is written at either bound, so that data URIs do not fill the memory."""

MANIFEST = "splits.json"
SKIPPED = "skipped.jsonl"
"""Beside the splits, the rows that ``on_error="skip"`` left out."""

OnError = Literal["raise", "skip"]
SIDE_FEATURES = {"image": List(Value("string")), "text": Value("string")}


def load_tasks(
    path_or_paths: StrPath | Sequence[StrPath],
    *,
    cache_dir: StrPath | None = None,
    on_error: OnError = "raise",
    show_progress_bar: bool = False,
) -> DatasetDict:
    """Load training records by task, ready for `SentenceTransformerTrainer`.

    Args:
        path_or_paths: One JSONL file of records, or several (see `sentence_vipyloqwen.train.records`).
        cache_dir: Where the Arrow files are kept; ``vipyloqwen`` in the cache of `datasets` if not given. Files that
            changed are read anew; old entries stay until deleted.
        on_error: What a broken image does. ``"raise"``: nothing here, where no image is opened; the batch that has it
            raises a ``ValueError`` that names it. ``"skip"``: every image is decoded while the cache is built, by all
            cores, which takes long for millions; a row with a broken one is left out, never given a placeholder, and
            listed with file, line, ``id``, image and reason in the file that `skipped_rows` names. It is done once:
            an image that breaks later raises, one that is mended stays out until the JSONL file changes or the cache
            entry is deleted. Ranks that share no cache look for themselves, and must find the same.
        show_progress_bar: Show the progress through the files on standard error, where they have to be read.

    Returns:
        Split -> dataset, in the order of the task table, then by number of negatives.

    Raises:
        RecordError: At the first line that is not a record, whatever `on_error`: see `validation.validate`.
        ValueError: If a file has no record, or none whose images can be opened, changes while it is read, or if the
            cache is damaged.
    """
    paths = [path_or_paths] if isinstance(path_or_paths, (str, os.PathLike)) else list(path_or_paths)
    if not paths:
        raise ValueError("load_tasks: got no path; allowed: one JSONL file or more")
    if on_error not in get_args(OnError):
        raise ValueError(f"load_tasks: on_error is {on_error!r}; allowed: {', '.join(get_args(OnError))}")
    cache = Path(cache_dir or Path(datasets_config.HF_DATASETS_CACHE, "vipyloqwen")).expanduser().absolute()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _cache_key(paths, on_error)
    with FileLock(f"{folder}.lock"):  # of several ranks on a machine, one builds and the others wait
        if not folder.exists():
            _build(paths, folder, on_error, show_progress_bar)
    splits = _map(folder)
    if report := skipped_rows(splits):
        logger.warning("Rows with broken images were left out; they are listed in %s", report)
    return splits


def skipped_rows(splits: DatasetDict) -> Path | None:
    """Where the rows are listed that `load_tasks` left out, one JSON object a line; ``None`` if it left out none."""
    files = (file["filename"] for split in splits.values() for file in split.cache_files)
    report = Path(next(files)).with_name(SKIPPED)
    return report if report.exists() and report.stat().st_size else None


def split_name(record: Record) -> str:
    """The split that a record belongs to: records of one split have the same columns."""
    negatives = len(record.negatives)
    return f"{record.task.name}.negatives_{negatives}" if negatives else record.task.name


def to_row(record: Record) -> dict[str, Any]:
    """A record as a row of its split, columns in the order that losses expect."""
    negatives = {f"negative_{number}": side.as_row() for number, side in enumerate(record.negatives, start=1)}
    score = {} if record.score is None else {"score": record.score}
    return {"anchor": record.anchor.as_row(), "positive": record.positive.as_row(), **negatives, **score}


def _cache_key(paths: Iterable[StrPath], on_error: OnError) -> str:
    files = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    policy = [] if on_error == "raise" else [on_error]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, files, *policy]).encode()).hexdigest()[:32]


def _build(paths: Sequence[StrPath], folder: Path, on_error: OnError, show_progress_bar: bool) -> None:
    """Write the splits beside their place, and move them there when they are complete."""
    logger.info("Building the dataset of %s in %s", ", ".join(map(os.fspath, paths)), folder)
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # what a killed run left; the lock is ours
    draft.mkdir()
    try:
        with open(draft / SKIPPED, "wb") as report:
            read = partial(_sound_records, report) if on_error == "skip" else read_records
            _write_splits(_records_of(paths, read, show_progress_bar), draft)
        if _cache_key(paths, on_error) != folder.name:
            raise ValueError(f"{', '.join(map(os.fspath, paths))}: changed while being read; load it again")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _records_of(
    paths: Iterable[StrPath], read: Callable[..., Iterator[Record]], show_progress_bar: bool
) -> Iterator[Record]:
    for path in paths:
        records = read(path, show_progress_bar=show_progress_bar)
        first = next(records, None)
        if first is None:
            raise ValueError(f"{os.fspath(path)}: no record in this file; allowed: at least one")
        yield from chain([first], records)


def _sound_records(report: BinaryIO, path: StrPath, *, show_progress_bar: bool) -> Iterator[Record]:
    """Read a file of records but for those with a broken image, which are written to the report.

    Raises:
        RecordError: At the first line that is not a record; or of the first image, if no record is left.
    """
    broken: ImageError | None = None
    sound = 0
    for checked in check_records(path, decode_images=True, show_progress_bar=show_progress_bar):
        if isinstance(checked.outcome, ImageError):
            broken = broken or checked.outcome
            report.write(report_line(checked.outcome))
        elif isinstance(checked.outcome, RecordError):
            raise checked.outcome
        else:
            sound += 1
            yield checked.outcome
    if broken and not sound:
        raise broken


def _write_splits(records: Iterable[Record], folder: Path) -> None:
    splits: dict[str, _SplitWriter] = {}
    with ExitStack() as stack:
        for record in records:
            name = split_name(record)
            if name not in splits:
                splits[name] = stack.enter_context(_open_split(_arrow_file(folder, name), record))
            splits[name].write(record)
    manifest = {name: splits[name].rows_written for name in sorted(splits, key=lambda name: splits[name].place)}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@contextmanager
def _open_split(path: Path, example: Record) -> Iterator[_SplitWriter]:
    """Open the Arrow file of a split, whose columns are those of its first record."""
    features = Features({name: Value("float64") if name == "score" else SIDE_FEATURES for name in to_row(example)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as stream:
        split = _SplitWriter(stream, features.arrow_schema, _place(example))
        yield split
        split.flush()


class _SplitWriter:
    """Writes the rows of one split in batches, into an Arrow stream that `Dataset.from_file` maps."""

    def __init__(self, stream: pa.RecordBatchStreamWriter, schema: pa.Schema, place: tuple[int, int]) -> None:
        self.place = place
        self.rows_written = 0
        self._stream, self._schema = stream, schema
        self._rows: list[dict[str, Any]] = []
        self._characters = 0

    def write(self, record: Record) -> None:
        self._rows.append(to_row(record))
        self._characters += sum(map(_characters, record.sides))
        if len(self._rows) >= ROWS_PER_BATCH or self._characters >= CHARACTERS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._rows, self._schema))
        self.rows_written += len(self._rows)
        self._rows, self._characters = [], 0


def _place(record: Record) -> tuple[int, int]:
    return list(ALL_TASKS).index(record.task.name), len(record.negatives)


def _characters(side: Side) -> int:
    return len(side.text) + sum(map(len, side.images))


def _map(folder: Path) -> DatasetDict:
    manifest: dict[str, int] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    splits = DatasetDict({name: Dataset.from_file(str(_arrow_file(folder, name))) for name in manifest})
    if splits.num_rows != manifest:
        raise ValueError(f"cache {folder}: got rows {splits.num_rows}, {manifest} were written; delete the folder")
    return splits


def _arrow_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.arrow"
