"""The data of the embedded demo: every task, in Vietnamese, English and Chinese, from what pip installs.

`build_demo_data` writes a folder:

| file | content |
|---|---|
| `train.jsonl`, `eval.jsonl` | records of all five tasks and captions without a prefix, as DESIGN.md section 6 says |
| `eval_lines.jsonl` | the lines of text of `eval.jsonl` alone, so that its retrieval candidates are exactly these |
| `items.jsonl` | a collection to index and search: held-out pictures, documents and texts, and pictures with a text |
| `images/` | the pictures that they name, relative to the folder |
| `made_by.json` | the seed and the sizes |

| task | domain | lang | source |
|---|---|---|---|
| vqa_single | easy-vqa | en | easy-vqa, its own split |
| vqa_multi | easy-vqa-turns, easy-vqa-images | en; vi, en, zh | easy-vqa, composed |
| ocr | line, invoice, receipt, form, plate, contract | vi | rendered |
| text_pair | names, dates, amounts | vi, en, zh | CLDR |
| instr | translation, conversation, date, number | vi, en, zh | CLDR |
| general | caption, document | vi, en, zh; vi | easy-vqa; rendered |

Train and eval share no image (by content), no anchor, and no open-set text: no line, no answer on a document, no text
of a pair, no answer to an instruction. What is a closed set they share by necessity: easy-vqa's 13 answers, their
translations, its question templates, and the captions of its 24 kinds of image.

A picture of easy-vqa has a caption in each language, so in `eval.jsonl` one anchor has three right answers, and other
pictures have the same ones: without a prefix nothing says which language is wanted.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TypeVar

from PIL import Image

from sentence_vipyloqwen.demo.sources import Record, cldr, documents, easy_vqa, keys_of

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` while files are written."""

T = TypeVar("T")

MADE_BY_FILE = "made_by.json"
TRAIN, EVAL = "train", "eval"
_PROGRESS_EVERY = 100
_PER_IMAGE = ("vqa_questions", "questions_per_page")
_PNG_LEVEL = 2  # twice as fast as the default, for files of the same size


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """How much of everything one split holds.

    Attributes:
        vqa_images: Images of easy-vqa, which has 4,000 to train on and 1,000 to test on.
        vqa_questions: Most questions asked of each of them; easy-vqa has 5 to 16.
        vqa_multi: Questions of several turns (half) or several images (half).
        captions: Captions of easy-vqa's images, in three languages each.
        lines: Rendered lines of text.
        pages: Rendered pages of each of the five kinds of document.
        questions_per_page: Fields asked for on each page (a number plate has only one).
        text_pairs: Graded pairs of texts.
        instructions: Instructions with their answers.
    """

    vqa_images: int
    vqa_questions: int
    vqa_multi: int
    captions: int
    lines: int
    pages: int
    questions_per_page: int
    text_pairs: int
    instructions: int

    def __post_init__(self) -> None:
        """Refuse sizes that no data can have."""
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value}: allowed is 1 or more")

    def scaled(self, factor: float) -> SplitSizes:
        """These sizes times `factor`, at least 1; as many questions on each picture and page as before."""
        sizes = {name: max(1, round(value * factor)) for name, value in vars(self).items()}
        return SplitSizes(**{**sizes, **{name: getattr(self, name) for name in _PER_IMAGE}})


@dataclass(frozen=True, kw_only=True)
class DemoSizes:
    """How much of everything `build_demo_data` makes; the defaults suit twenty minutes on two CPU cores.

    Attributes:
        train: Sizes of `train.jsonl`.
        eval: Sizes of `eval.jsonl`.
        items: Pieces of each kind in `items.jsonl`; fewer where the eval split holds fewer.
    """

    train: SplitSizes = SplitSizes(
        vqa_images=4000,
        vqa_questions=4,
        vqa_multi=5000,
        captions=4000,
        lines=20_000,
        pages=150,
        questions_per_page=2,
        text_pairs=18_000,
        instructions=5000,
    )
    eval: SplitSizes = SplitSizes(
        vqa_images=1000,
        vqa_questions=100,
        vqa_multi=1000,
        captions=600,
        lines=200,
        pages=90,
        questions_per_page=1,
        text_pairs=600,
        instructions=520,
    )
    items: int = 60

    def scaled(self, factor: float) -> DemoSizes:
        """Everything times `factor`, for a trial: `DemoSizes().scaled(0.02)` takes a second.

        >>> DemoSizes().scaled(0.02).eval.lines
        4
        """
        items = max(1, round(self.items * factor))
        return DemoSizes(train=self.train.scaled(factor), eval=self.eval.scaled(factor), items=items)

    def replaced(self, sizes: Mapping[str, int]) -> DemoSizes:
        """These sizes, with some of the train split's replaced, or of the eval split's as ``eval.NAME``.

        >>> sizes = DemoSizes().replaced({"lines": 500, "eval.lines": 20})
        >>> sizes.train.lines, sizes.eval.lines
        (500, 20)

        Raises:
            ValueError: If there is no size of that name, or one is below 1.
        """
        names = list(vars(self.train))
        train = {name: number for name, number in sizes.items() if name in names}
        held_out = {name: sizes[f"{EVAL}.{name}"] for name in names if f"{EVAL}.{name}" in sizes}
        if unknown := sorted(sizes.keys() - train.keys() - {f"{EVAL}.{name}" for name in held_out}):
            raise ValueError(f"Unknown sizes {unknown}; allowed are {names}, and {EVAL}.NAME for what is held out.")
        return replace(self, train=replace(self.train, **train), eval=replace(self.eval, **held_out))


@dataclass(frozen=True)
class DemoData:
    """What `build_demo_data` wrote.

    Attributes:
        folder: Where it stands.
        train: Training records.
        eval: Held-out records of every task.
        eval_lines: The held-out lines of text alone.
        items: What to put into an index.
        counts: By `"train"` and `"eval"`, the number of records by `"task/domain"`.
    """

    folder: Path
    train: Path
    eval: Path
    eval_lines: Path
    items: Path
    counts: Mapping[str, Mapping[str, int]]


def build_demo_data(
    folder: Path, *, seed: int = 0, sizes: DemoSizes = DemoSizes(), progress: Progress | None = None
) -> DemoData:
    """Write the demo's data into `folder`; equal seeds and sizes give equal files.

    1. Draw and render the eval split first: it is a fair sample, and what it says is reserved from then on.
    2. Draw the train split, which avoids every reserved text and content.
    3. Write the records, and choose items to index from what is held out.

    Args:
        folder: Where to write; made if missing, files of the same seed and sizes are replaced.
        seed: Seed of everything that is drawn.
        sizes: How much to make.
        progress: Told how far the work is, for a progress bar.

    Returns:
        The files and the counts.

    Raises:
        ValueError: If more is asked for than the sources can vary, or the folder holds data of another seed or of other
            sizes: a model may have been trained on them.
    """
    folder = Path(folder)
    _claim(folder, {"seed": seed, **asdict(sizes)})
    report = progress or _no_progress
    held_out = _draw_split(EVAL, sizes.eval, seed)  # 1
    eval_records = _records(held_out, sizes.eval)
    train = _draw_split(TRAIN, sizes.train, seed, held_out.claimed | _negatives(eval_records))  # 2
    train_records = _records(train, sizes.train)
    for split in (held_out, train):
        _write_images(split, folder, report)
    lines = [record for record in eval_records if record["domain"] == "line"]  # 3
    return DemoData(
        folder=folder,
        train=_write_jsonl(folder / "train.jsonl", train_records),
        eval=_write_jsonl(folder / "eval.jsonl", eval_records),
        eval_lines=_write_jsonl(folder / "eval_lines.jsonl", lines),
        items=_write_jsonl(folder / "items.jsonl", _items(held_out, sizes.items)),
        counts={TRAIN: _count(train_records), EVAL: _count(eval_records)},
    )


def _claim(folder: Path, asked: Mapping[str, object]) -> None:
    """Write down what the data are made by, before any are; refuse a folder that has others."""
    path = folder / MADE_BY_FILE
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else asked
    if held != asked:
        raise ValueError(f"{folder} holds data of {held}; asked for are {asked}. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def _no_progress(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Split:
    """What one split says and shows, by the name of the image where there is one, before it is written.

    Attributes:
        name: `"train"` or `"eval"`.
        seed: Of everything in it.
        reserved: The other split's texts, which this one avoids.
        pictures: Of easy-vqa.
        lines: Rendered lines of text.
        pages: Rendered documents.
        texts: Of CLDR.
    """

    name: str
    seed: int
    reserved: Set[str]
    pictures: Sequence[easy_vqa.Picture]
    lines: Mapping[str, documents.Line]
    pages: Mapping[str, documents.Page]
    texts: Sequence[cldr.Pair | cldr.Instruction]

    @property
    def claimed(self) -> frozenset[str]:
        """Every open-set text and content of this split."""
        return keys_of([*self.lines.values(), *self.pages.values(), *self.texts])

    def rng(self, what: str) -> random.Random:
        """The generator of one part."""
        return generator(self.seed, self.name, what)


def generator(seed: int, split: str, what: str) -> random.Random:
    """The generator of a part of a split: each has its own, so that the size of one leaves the others as they are."""
    return random.Random(f"{seed}/{split}/{what}")


def _draw_split(name: str, sizes: SplitSizes, seed: int, reserved: Set[str] = frozenset()) -> _Split:
    pages: dict[str, documents.Page] = {}
    for domain in documents.PAGE_SIZES:
        drawn = documents.draw_pages(domain, sizes.pages, generator(seed, name, domain), reserved)
        pages |= _named(f"images/{domain}/{name}", drawn)
    lines = documents.draw_lines(sizes.lines, generator(seed, name, "line"), reserved)
    pairs = cldr.draw_pairs(sizes.text_pairs, generator(seed, name, "text_pair"), reserved)
    instructions = cldr.draw_instructions(sizes.instructions, generator(seed, name, "instr"), reserved)
    return _Split(
        name=name,
        seed=seed,
        reserved=reserved,
        pictures=easy_vqa.load_pictures({TRAIN: "train", EVAL: "test"}[name], sizes.vqa_images),
        lines=_named(f"images/line/{name}", lines),
        pages=pages,
        texts=[*pairs, *instructions],
    )


def _named(stem: str, drawn: Sequence[T]) -> dict[str, T]:
    return {f"{stem}-{number:05d}.png": content for number, content in enumerate(drawn)}


def _records(split: _Split, sizes: SplitSizes) -> list[Record]:
    """All records of a split, by task, with their ids."""
    rng, asked = split.rng("questions"), sizes.questions_per_page
    records = [
        *easy_vqa.single_records(split.pictures, sizes.vqa_questions, split.rng("vqa_single")),
        *easy_vqa.multi_records(split.pictures, sizes.vqa_multi, split.rng("vqa_multi")),
        *(documents.line_record(line, image) for image, line in split.lines.items()),
        *(
            record
            for image, page in split.pages.items()
            for record in documents.page_records(page, image, asked, rng, split.reserved)
        ),
        *(text.record() for text in split.texts),
        *easy_vqa.caption_records(split.pictures, sizes.captions, split.rng("caption")),
        *(documents.caption_record(page, image) for image, page in split.pages.items()),
    ]
    return [record | {"id": f"{split.name}-{number:06d}"} for number, record in enumerate(records)]


def _negatives(records: Iterable[Record]) -> frozenset[str]:
    """The hard negatives of documents: open-set texts, too."""
    return frozenset(record["negative"] for record in records if record["task"] == "ocr" and "negative" in record)


def _items(split: _Split, count: int) -> list[Record]:
    """A mixed collection: up to `count` pictures, lines and texts, half as many pages of each kind and of pairs."""
    rng = split.rng("items")
    pictures = _sample([picture for picture in split.pictures if picture.shape and picture.color], count, rng)
    pages = [
        page
        for domain in documents.PAGE_SIZES
        for page in _sample([named for named in split.pages.items() if named[1].domain == domain], count // 2, rng)
    ]
    items = [
        *(_item("picture", image=picture.name, note=picture.caption("vi")) for picture in pictures),
        *(_item("line", image=image, note=line.text) for image, line in _sample(list(split.lines.items()), count, rng)),
        *(_item(page.domain, image=image, note=page.caption) for image, page in pages),
        *(_item("text", text=text.positive) for text in _sample(split.texts, count, rng)),
        *(
            _item("picture+text", image=picture.name, text=picture.caption(lang))
            for picture, lang in zip(_sample(pictures, count // 2, rng), cycle(easy_vqa.LANGUAGES), strict=False)
        ),
        *(
            _item(f"{page.domain}+text", image=image, text=page.caption)
            for image, page in _sample(pages, count // 2, rng)
        ),
    ]
    return [{"id": f"item-{number:04d}"} | item for number, item in enumerate(items)]


def _item(kind: str, *, image: str = "", text: str = "", note: str = "") -> Record:
    """One index item; the note is shown with a result, never embedded."""
    metadata = {"kind": kind, "note": note} if note else {"kind": kind}
    return {
        name: value
        for name, value in (("text", text), ("image", [image] if image else []), ("metadata", metadata))
        if value
    }


def _sample(values: Sequence[T], count: int, rng: random.Random) -> list[T]:
    return rng.sample(values, min(count, len(values)))


def _write_images(split: _Split, folder: Path, report: Progress) -> None:
    """Copy easy-vqa's pictures as they are, and render the rest."""
    rng = split.rng("render")
    writers: list[tuple[str, Callable[[Path], object]]] = [
        *((picture.name, partial(shutil.copyfile, picture.path)) for picture in split.pictures),
        *((name, partial(_render, documents.render_line, line, rng)) for name, line in split.lines.items()),
        *((name, partial(_render, documents.render_page, page, rng)) for name, page in split.pages.items()),
    ]
    for parent in {(folder / name).parent for name, _ in writers}:
        parent.mkdir(parents=True, exist_ok=True)
    for done, (name, write) in enumerate(writers, start=1):
        write(folder / name)
        if done % _PROGRESS_EVERY == 0 or done == len(writers):
            report(f"{split.name} images", done, len(writers))


def _render(paint: Callable[[T, random.Random], Image.Image], content: T, rng: random.Random, path: Path) -> None:
    paint(content, rng).save(path, compress_level=_PNG_LEVEL)


def _write_jsonl(path: Path, records: Iterable[Record]) -> Path:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def _count(records: Iterable[Record]) -> dict[str, int]:
    return dict(Counter(f"{record['task']}/{record['domain']}" for record in records))
