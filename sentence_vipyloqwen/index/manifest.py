"""``index.json``: what an index is, and the one file that says which others belong to it.

```
folder/index.json            format, model, shards, sizes and checksums; replaced in one step, so it is old or new
folder/shards/NAME.parquet   id, text, image, metadata (JSON), vector: the durable truth, readable by any tool
folder/vectors/NAME.faiss    the same vectors as FAISS maps them into memory; made anew from the Parquet file at need
folder/deleted/NAME.parquet  ids and rows that were removed
folder/search/NAME.faiss     an approximate index over the first shards, where the kind has one; made anew at need
folder/images/               images that came as pixels, arrays, data URIs or pages, as PNG named by their content
```

Every file but ``index.json`` is written once, under a name made of its content, and never changed. A reader reads
``index.json`` and opens what it names; a writer adds files and then replaces ``index.json``. So whatever is killed,
whenever, the index is as before or as after. Rows are numbered through the shards in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from sentence_vipyloqwen.files import check, replacing
from sentence_vipyloqwen.fingerprint import Fingerprint

FORMAT = "sentence-vipyloqwen-index"
FORMAT_VERSION = 3
UNSIGNED_VERSION = 2
"""Read as well: all that it lacks is the checksum of ``index.json`` itself, and where the model is."""

METRIC = "cosine"
MANIFEST_FILE = "index.json"
CHECKSUM = "xxh3_128"
"""Field of ``index.json``: what it says of all its other fields."""

_FILE = re.compile(r"(shards|vectors|deleted|search)/[0-9a-f]{32}\.(parquet|faiss)")
"""A name that leads out of the folder is no name of ours: files of it would be read, and deleted, elsewhere."""

REBUILD = "Build the index again with overwrite=True; vectors in whole shards are used again"


@dataclass(frozen=True)
class Shard:
    """A part of the items.

    Attributes:
        name: Of its files, without the ending: a hash of what was embedded, and by which model.
        rows: How many items it holds.
    """

    name: str
    rows: int

    @property
    def table(self) -> str:
        """Its Parquet file, relative to the index."""
        return f"shards/{self.name}.parquet"

    @property
    def vectors(self) -> str:
        """Its FAISS file, relative to the index."""
        return f"vectors/{self.name}.faiss"


@dataclass(frozen=True)
class Approximate:
    """An approximate index over the first rows.

    Attributes:
        file: Its FAISS file, relative to the index.
        factory: The factory string it was made by.
        rows: How many rows it covers; those behind are searched one by one.
    """

    file: str
    factory: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What ``index.json`` holds.

    Attributes:
        fingerprint: Of the model that embedded the items.
        dim: Dimensions of a vector.
        count: Items that can be found.
        prompt_name: Prompt the items were embedded with, ``None`` for none.
        kind: What was asked for: ``"auto"``, or a kind of :mod:`~sentence_vipyloqwen.index.kinds`.
        shards: The parts, in the order of their rows.
        deleted: File of the rows that were removed, ``None`` for none.
        approximate: What is searched before vectors are compared, ``None`` where all of them are.
        files: File name -> ``{"bytes": size, "xxh3_128": checksum}``, of every file.
        model: Where the model is: see :mod:`~sentence_vipyloqwen.index.origin`. ``None`` where nobody knows.
        metric: What a score is.
        format: Says that this is one of our indexes.
        format_version: Raised whenever an older release could no longer read the folder.
    """

    fingerprint: Fingerprint
    dim: int
    count: int
    prompt_name: str | None
    kind: str = "auto"
    shards: tuple[Shard, ...] = ()
    deleted: str | None = None
    approximate: Approximate | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model: str | None = None
    metric: str = METRIC
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def rows(self) -> int:
        """Rows of all shards, removed ones included."""
        return sum(shard.rows for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, with its checksum."""
        return signed(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If it is no index, of another format version, altered, or has other fields.
        """
        data, version = dict(data), data.get("format_version")
        if data.get("format") != FORMAT:
            raise ValueError(f"'format' is {data.get('format')!r}, allowed is {FORMAT!r}")
        if version not in (UNSIGNED_VERSION, FORMAT_VERSION):
            raise ValueError(f"format version {version!r}, this release reads {UNSIGNED_VERSION} and {FORMAT_VERSION}")
        if version == FORMAT_VERSION and data != signed(data):
            raise ValueError("it was altered after it was written: its checksum differs")
        if version == FORMAT_VERSION:
            del data[CHECKSUM]
        data.setdefault("model", None)  # earlier folders do not have it
        allowed = {item.name for item in fields(cls)}
        if set(data) != allowed:
            raise ValueError(f"its fields are {sorted(data)}, allowed are {sorted(allowed)}")
        if not (data["model"] is None or (isinstance(data["model"], str) and data["model"])):
            raise ValueError(f"'model' is {data['model']!r}, allowed is a folder, a Hub id or null")
        data["format_version"] = FORMAT_VERSION
        approximate = data["approximate"] and Approximate(**data["approximate"])
        shards = tuple(Shard(**shard) for shard in data["shards"])
        known = Fingerprint.from_dict(data["fingerprint"])
        named = [path for shard in shards for path in (shard.table, shard.vectors)]
        named += [data["deleted"]] if data["deleted"] else []
        named += [approximate.file] if approximate else []
        if wrong := [path for path in named if not _FILE.fullmatch(path)] or set(data["files"]) ^ set(named):
            raise ValueError(f"it names the files {sorted(wrong)[:3]}, which do not belong to an index")
        return cls(**{**data, "fingerprint": known, "shards": shards, "approximate": approximate})


def signed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``index.json`` with their checksum, as it is now."""
    rest = {key: value for key, value in data.items() if key != CHECKSUM}
    return rest | {CHECKSUM: xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace ``index.json``: from here on the index is the new one."""
    text = json.dumps(manifest.to_dict(), ensure_ascii=False, indent=2)
    with replacing(folder / MANIFEST_FILE) as draft:
        draft.write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read ``index.json``: what an index is, without loading it.

    Raises:
        ValueError: If there is no index, or the file is damaged or of a format that this release does not read.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ValueError(f"There is no index at {folder}: no such folder.")
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"holds a {type(data).__name__}, allowed is an object")
        return Manifest.from_dict(data)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {folder} is no index, or one whose first build has not ended.") from error
    except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} cannot be read: {error}. {REBUILD}.") from error


def check_files(folder: Path, manifest: Manifest, *, checksum: bool) -> None:
    """Compare every file of an index with what is known of it.

    Raises:
        ValueError: If one is missing, cut short or altered.
    """
    for name, expected in manifest.files.items():
        check(folder, name, expected, checksum=checksum, way_out=REBUILD)
