"""Embeddings kept on disk by model and content, so that a killed job goes on where it stopped.

```
folder/keys.u64      a content's 64-bit key; entry i belongs to vector i
folder/vectors.f16   the vectors, (N, dim) float16, one after the other
folder/lock          held by the process that appends
```

Both files only grow. Vectors reach the disk before their keys do, so a vector with a key is whole; what a kill or a
full disk leaves behind the last whole one is cut off by the next writer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.fingerprint import fingerprint

FORMAT_VERSION = 1
"""Part of a folder's name; raised when the same key would stand for another content."""

KEY = np.dtype("<u8")
VALUE = np.dtype("<f2")


class VectorCache:
    """The embeddings of one model.

    On disk, 2 * dim + 8 bytes a content: 2 GB for a million of 1024 dimensions. In memory, 16 bytes a content, for the
    keys and their order; vectors are mapped.

    Args:
        folder: Where the files lie; made if it is not there.
        dim: Dimensions of a vector.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.dim = dim
        self._keys_path, self._vectors_path = folder / "keys.u64", folder / "vectors.f16"
        self._forget()

    @classmethod
    def of(cls, model: SentenceTransformer, parent: Path) -> VectorCache:
        """The cache of a model: a folder of its own, named by its fingerprint.

        Args:
            model: Any model that tells its embedding dimension.
            parent: The folder of all caches.

        Raises:
            ValueError: If the model does not tell its embedding dimension.
        """
        known = fingerprint(model)
        facts = json.dumps([FORMAT_VERSION, known.to_dict()], sort_keys=True, default=str)
        return cls(parent / hashlib.sha256(facts.encode()).hexdigest()[:32], known.dim)

    def __len__(self) -> int:
        """How many whole vectors there are."""
        keys = _size(self._keys_path) // KEY.itemsize
        return min(keys, _size(self._vectors_path) // self._vector_bytes)

    @property
    def bytes_on_disk(self) -> int:
        """Size of both files."""
        return _size(self._keys_path) + _size(self._vectors_path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other process appends, cut off what is not whole, and keep others from appending."""
        with FileLock(self.folder / "lock"):
            for path, width in ((self._keys_path, KEY.itemsize), (self._vectors_path, self._vector_bytes)):
                path.touch()
                os.truncate(path, len(self) * width)
            self._forget()
            yield

    def append(self, keys: NDArray[np.uint64], vectors: NDArray[np.floating]) -> None:
        """Add vectors and bring them to the disk; call it within :meth:`writing`.

        Args:
            keys: (N,) keys that are not held yet.
            vectors: (N, dim) of unit length; kept as float16, which moves a cosine by less than 0.001.

        Raises:
            ValueError: If the vectors are of another dimension.
        """
        if vectors.shape != (len(keys), self.dim):
            raise ValueError(f"vectors have the shape {vectors.shape}; allowed is {(len(keys), self.dim)}")
        _append(self._vectors_path, vectors.astype(VALUE))
        _append(self._keys_path, keys.astype(KEY))
        self._forget()

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where the vectors of some contents stand.

        Returns:
            The numbers of their vectors, shaped as `keys`, int64; -1 where there is none.
        """
        held, order = self._held()
        if not len(held):
            return np.full(keys.shape, -1, dtype=np.int64)
        place = np.searchsorted(held, keys).clip(max=len(held) - 1)
        return np.where(held[place] == keys, order[place], -1)

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some vectors, (n, dim) float32, of unit length."""
        if self._map is None:
            self._map = np.memmap(self._vectors_path, VALUE, "r", shape=(len(self), self.dim))
        vectors = self._map[numbers].astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # half precision leaves them a little off 1
        return vectors

    def _held(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The keys in rising order, and the number of the vector of each."""
        if self._sorted is None:
            keys = np.fromfile(self._keys_path, KEY, len(self)) if len(self) else np.empty(0, KEY)
            order = keys.argsort(kind="stable")
            self._sorted = keys[order], order
        return self._sorted

    def _forget(self) -> None:
        self._sorted: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None
        self._map: np.memmap | None = None

    @property
    def _vector_bytes(self) -> int:
        return self.dim * VALUE.itemsize


def _append(path: Path, values: NDArray) -> None:
    with path.open("ab") as file:
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
