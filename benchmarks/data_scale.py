"""Records at scale: rows a second and memory of checking, loading and shuffled reading, by the number of rows.

Records of all tasks are generated; 6 in 10 show an image, four of them the same one. The image files, ``--images`` of
them, are small, so that their opening does not hide the rest; what opening takes is measured apart, on photographs of
1200 x 900. Each stage runs in a process of its own:

  validate       every line is parsed, every image's header read
  first load     load_tasks parses the file and writes the Arrow cache
  second load    load_tasks maps what is there
  shuffled read  the first ``--reads`` rows of an epoch of this package's samplers, one row at a time, as a data
                 loader reads them

  rows/s         rows / seconds, in thousands where that is said; where other work shares the cores, seconds are longer
                 than the processor's time
  CPU, s         processor time of the stage
  rise, MB       how far the memory that is the process's own rises above what its imports take
  mapped, MB     how far what is mapped from files rises: the system takes that back when it is needed
  files, MB      what is read or mapped

Examples:
  python benchmarks/data_scale.py --rows 1000 10000
  python benchmarks/data_scale.py --rows 100000 1000000 11000000 --folder /large/disk
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import common
import numpy as np
import psutil
from corpora import WORDS
from PIL import Image
from torch.utils.data import ConcatDataset

from sentence_vipyloqwen.modules.images import image_size, open_image
from sentence_vipyloqwen.train.dataset import load_tasks
from sentence_vipyloqwen.train.sampling import grouped_batch_sampler, task_mix_sampler
from sentence_vipyloqwen.train.validation import validate

MEGABYTE = 1e6
SAMPLE_SECONDS = 0.02
COLUMNS = ("rows", "stage", "seconds", "CPU, s", "thousand rows/s", "rise, MB", "mapped, MB", "files, MB")

TASKS = ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "general")
WEIGHTS = (25, 15, 25, 20, 10, 5)
WITH_IMAGES = ("ocr", "vqa_single", "vqa_multi", "general")
ROWS_ON_A_PAGE = 4
TEXTS = 4096
PHOTOGRAPH = (1200, 900)
BATCH_SIZE = 24


@dataclass(frozen=True)
class Measured:
    """What a stage took.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of the processor.
        own: How far memory that is not mapped from files rises, in bytes.
        mapped: How far memory that is rises, in bytes.
    """

    seconds: float
    cpu_seconds: float
    own: int
    mapped: int


def main() -> None:
    """Measure the sizes asked for and report them."""
    options = parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    options.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="numbers of records")
    options.add_argument("--reads", type=int, default=100_000, help="rows read of a shuffled epoch, at most")
    options.add_argument("--images", type=int, default=1000, help="distinct image files")
    options.add_argument("--photographs", type=int, default=50, help="photographs that are opened, to time it")
    options.add_argument("--folder", type=Path, help="where the files are written, and deleted; about 1.3 KB a row")
    options.add_argument("--output", type=Path, help="markdown file; this benchmark's section in it is replaced")
    options.set_defaults(threads=1)
    return options


def run(folder: Path, options: argparse.Namespace) -> list[list[Any]]:
    """Measure each number of rows; report a table and return its lines."""
    make_images(folder / "images", options.images)
    lines = []
    for rows in options.rows:
        place = folder / str(rows)
        place.mkdir()
        lines += measure(place, rows, options)
        shutil.rmtree(place)
    body = "\n\n".join([common.table(COLUMNS, lines), "\n".join(notes(folder, options))])
    common.report("Records at scale", body, options.output)
    return lines


def measure(folder: Path, rows: int, options: argparse.Namespace) -> list[list[Any]]:
    """Generate records, take them through the stages, and give a line of the table for each."""
    file, cache = folder / "train.jsonl", folder / "cache"
    print(f"{rows:,} rows: generating ...", flush=True)
    write_records(file, rows, options.images)
    reads = min(rows, options.reads)
    stages: dict[str, tuple[Callable[[], None], int, Path]] = {
        "validate": (partial(check, file), rows, file),
        "first load": (partial(load, file, cache), rows, cache),
        "second load": (partial(load, file, cache), rows, cache),
        "shuffled read": (partial(read_shuffled, file, cache, reads), reads, cache),
    }
    lines = []
    for name, (stage, count, place) in stages.items():
        print(f"{rows:,} rows: {name} ...", flush=True)
        lines.append(line(rows, name, apart(stage), count, size_of(place)))
    return lines


def line(rows: int, stage: str, measured: Measured, count: int, size: int) -> list[Any]:
    """A stage's cells, in the order of :data:`COLUMNS`; mapping is not told by rows a second, as it reads none."""
    rate = "" if stage == "second load" else f"{count / measured.seconds / 1000:.1f}"
    return [
        f"{rows:,}",
        stage,
        f"{measured.seconds:.1f}",
        f"{measured.cpu_seconds:.1f}",
        rate,
        *(f"{size / MEGABYTE:,.0f}" for size in (measured.own, measured.mapped, size)),
    ]


# --- Stages ---


def check(file: Path) -> None:
    """Check the file; all of it is good."""
    report = validate(file)
    if not report.ok:
        raise RuntimeError(f"the generated records are bad: {report.errors[:3]}")


def load(file: Path, cache: Path) -> None:
    """Load the file."""
    load_tasks(file, cache_dir=cache)


def read_shuffled(file: Path, cache: Path, reads: int) -> None:
    """Read rows in the order of a shuffled epoch, as a map-style data loader does: one by one."""
    splits = list(load_tasks(file, cache_dir=cache).values())
    samplers = [grouped_batch_sampler()(split, batch_size=BATCH_SIZE, drop_last=False) for split in splits]
    data = ConcatDataset(splits)
    order = task_mix_sampler()(data, batch_samplers=samplers, seed=0)
    for place in islice(chain.from_iterable(order), reads):
        data[place]


def apart(stage: Callable[[], None]) -> Measured:
    """Run a stage in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(watched, [stage])


def watched(stage: Callable[[], None]) -> Measured:
    """Run a stage in this process, its memory watched by a thread."""
    process, done = psutil.Process(), threading.Event()
    before = memory_of(process)
    rise = [0, 0]

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            rise[:] = (max(most, now - then) for most, now, then in zip(rise, memory_of(process), before, strict=True))

    thread = threading.Thread(target=watch)
    thread.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        stage()
        return Measured(time.perf_counter() - start, time.process_time() - cpu, *rise)
    finally:
        done.set()
        thread.join()


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Memory of the process itself, and memory mapped from files, in bytes; off Linux all counts as the first."""
    memory = process.memory_info()
    shared = getattr(memory, "shared", 0)
    return memory.rss - shared, shared


# --- Records ---


def write_records(file: Path, rows: int, images: int) -> None:
    """Write records of all tasks, always the same ones."""
    with open(file, "w", encoding="utf-8") as output:
        output.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(rows, images))


def records(rows: int, images: int) -> Iterator[dict[str, Any]]:
    """Generate records: tasks in the shares of :data:`WEIGHTS`, texts of 5 to 60 words, one in five with a negative."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(TEXTS)]
    for row in range(rows):
        (task,) = chance.choices(TASKS, WEIGHTS)
        image = f"../images/{row // ROWS_ON_A_PAGE % images}.jpg"
        anchor = {"image": image, "text": f"{chance.choice(texts)} {row}"}
        record = {
            "task": task,
            "anchor": anchor if task in WITH_IMAGES else anchor["text"],
            "positive": chance.choice(texts),
            "id": str(row),
            "lang": "vi",
        }
        if task == "text_pair":
            record["score"] = round(chance.random(), 3)
        elif chance.random() < 0.2:
            record["negative"] = chance.choice(texts)
        yield record


def make_images(folder: Path, count: int, size: tuple[int, int] = (32, 32)) -> list[Path]:
    """Write JPEG files of coarse noise, blown up."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    files = [folder / f"{number}.jpg" for number in range(count)]
    for file in files:
        pixels = noise.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


# --- Notes ---


def notes(folder: Path, options: argparse.Namespace) -> list[str]:
    """What opening images takes, and where this ran."""
    header, decoded = open_photographs(folder / "photographs", options.photographs)
    width, height = PHOTOGRAPH
    return [
        f"- opening a JPEG of {width} x {height} on one core: its header {header * 1e3:.2f} ms, all of it "
        f"{decoded * 1e3:.1f} ms of processor time (validate --images, on_error=skip); the cores share the work",
        f"- shuffled read: {options.reads:,} rows at most, batches of {BATCH_SIZE} of one task each",
        common.machine(options),
    ]


def open_photographs(folder: Path, count: int) -> Sequence[float]:
    """Processor seconds for the header of a photograph, and for all of it."""
    files = make_images(folder, count, PHOTOGRAPH)
    seconds = []
    for look in (image_size, open_image):
        start = time.process_time()
        for file in files:
            look(file)
        seconds.append((time.process_time() - start) / count)
    return seconds


if __name__ == "__main__":
    main()
