"""Where an index's model came from, as ``index.json`` remembers it, and the way back to it.

A Hub id stands as it is. A folder is written with slashes and begins with ``./``, ``../`` or the root, which no Hub id
does: relative to the index where both lie in one folder other than the root, so that this folder may be moved, or
mounted elsewhere; absolute where they do not.
"""

from __future__ import annotations

import os
from pathlib import Path

from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.model import ViPyloQwen, is_finished_model


def origin_of(model: SentenceTransformer, folder: Path) -> str | None:
    """What a model was loaded from, as an index remembers it.

    1. The tokenizer knows; the weights do not, as those of a LoRA adapter name its base.
    2. It must be a finished model: one that ``create`` made names the checkpoint it began with. The network is not
       asked, as what came from the Hub lies in its cache.

    Args:
        model: What embeds the items.
        folder: The index folder, resolved.

    Returns:
        A Hub id or a folder; ``None`` for a model that was made in memory. One that was changed in memory since it was
        loaded is not told apart: the fingerprint does that, when the index is opened.
    """
    source = getattr(getattr(model, "tokenizer", None), "name_or_path", None)  # 1
    if not source or not is_finished_model(source, {"local_files_only": True}):  # 2
        return None
    return _folder_from(folder, Path(source).resolve()) if Path(source).is_dir() else source


def _folder_from(folder: Path, path: Path) -> str:
    if path.parts[:2] != folder.parts[:2]:  # the root, or drive, and the first folder in it
        return path.as_posix()
    relative = Path(os.path.relpath(path, folder)).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


def place_of(origin: str, folder: Path) -> Path | str:
    """Where a model is: a folder, or a Hub id as it is.

    >>> str(place_of("../models/a", Path("/home/me/index"))), place_of("me/a", Path("/home/me/index"))
    ('/home/me/models/a', 'me/a')
    """
    if origin.split("/")[0] in (".", "..") or Path(origin).is_absolute():
        return Path(os.path.normpath(folder / origin))
    return origin


def load_origin(origin: str | None, folder: Path, dim: int, device: str | None = None) -> ViPyloQwen:
    """Load the model that an index remembers, as ``ViPyloQwen`` loads any: safetensors, and no code of a folder.

    Args:
        origin: What the index says.
        folder: The index folder, resolved.
        dim: Dimensions of the index's vectors; a model of more is cut to them, as it was when the index was built.
        device: Where the model goes; by default the best at hand.

    Raises:
        ValueError: If the index does not say, or the model is gone or cannot be loaded.
    """
    if origin is None:
        raise ValueError(
            f"The index {folder} does not say where its model is, which was made in memory, or the index is from a "
            "release that did not write it down: give the model."
        )
    place = place_of(origin, folder)
    built = f"The index {folder} was built with the model at {place}"
    if isinstance(place, Path) and not place.is_dir():
        raise ValueError(f"{built}, which is not there: give the model.")
    try:
        model = ViPyloQwen(place, device=device)
    except (ValueError, OSError) as error:
        raise ValueError(f"{built}, which cannot be loaded: give the model. What went wrong: {error}") from error
    if model.get_embedding_dimension() > dim:
        model.truncate_dim = dim
    return model
