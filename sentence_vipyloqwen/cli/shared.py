"""What the commands share: options, loading of models, and how they speak."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sentence_vipyloqwen.index import VectorIndex
    from sentence_vipyloqwen.model import ViPyloQwen

WIDTH_OF_A_PIPE = 140  # characters; a table of figures would be cut at the 80 that rich assumes


def _check_device(device: str | None) -> str | None:
    import torch

    try:
        return device and str(torch.device(device))
    except RuntimeError as error:
        raise ValueError(f"--device {device!r}: allowed are cpu, cuda, cuda:1 and so on, mps.") from error


def _check_model_and_index(places: list[str]) -> list[str]:
    if len(places) > 2:
        raise typer.BadParameter(f"{len(places)} came: {' '.join(places)}. Allowed are INDEX, or MODEL INDEX.")
    return places


Device = Annotated[
    str | None,
    typer.Option(help="Where to run: cpu, cuda, cuda:1, mps. The best at hand by default.", callback=_check_device),
]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of a finished model.")]
Index = Annotated[Path, typer.Argument(help="Folder of the index.")]
ModelAndIndex = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] INDEX",
        help="Folder of the index. Before it, where the index does not know or no longer finds its model: folder or "
        "Hub id of the model.",
        callback=_check_model_and_index,
    ),
]
"""One value or two: an optional argument before a required one would take the value of the required one."""

BatchSize = Annotated[int, typer.Option(min=1, help="Inputs in one forward pass.")]


def load(path: str, device: str | None) -> ViPyloQwen:
    """A finished model of ours.

    Raises:
        ValueError: If the path is that of a folder, and there is none.
    """
    from sentence_vipyloqwen import ViPyloQwen

    _check_folder(path)
    return ViPyloQwen(path, device=device)


def open_index(places: list[str], device: str | None) -> VectorIndex:
    """The index of ``[MODEL] INDEX``, with the model given or the one that it remembers."""
    from sentence_vipyloqwen.index import VectorIndex

    *model, index = places
    return VectorIndex.load(index, load(model[0], device)) if model else VectorIndex.load(index, device=device)


def load_any(path: str, device: str | None) -> SentenceTransformer:
    """A finished model: ours, or any other.

    Raises:
        ValueError: If the path is that of a folder, and there is none.
    """
    from sentence_transformers import SentenceTransformer

    _check_folder(path)
    return SentenceTransformer(path, device=device) if _is_stock(path) else load(path, device)


def _check_folder(path: str) -> None:
    """Refuse what can only be a folder and is none, before the Hub is asked for it."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    looks_like_one = path.startswith((".", "~", *separators)) or path.endswith(separators) or path.count("/") > 1
    if looks_like_one and not Path(path).is_dir():
        raise ValueError(
            f"There is no folder {path!r}; allowed are the folder of a finished model, or a Hub id such as owner/name."
        )


def _is_stock(path: str) -> bool:
    """Whether a folder or Hub id is a finished model of a type that the packed runtime does not know."""
    import json

    from sentence_transformers.util import load_file_path

    from sentence_vipyloqwen.modules.backbones import BACKBONES

    modules, config = (load_file_path(path, name) for name in ("modules.json", "config.json"))
    if modules is None:
        return False  # nor is it ours: loading it tells
    if not json.loads(Path(modules).read_bytes())[0]["type"].endswith(".Transformer"):
        return True
    return config is not None and json.loads(Path(config).read_bytes()).get("model_type") not in BACKBONES


def device_of_rank() -> str | None:
    """The accelerator of a process that torchrun started."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None or not torch.cuda.is_available() else f"cuda:{rank}"


def tell_error(error: Exception) -> None:
    """What went wrong, in a line; of the system's errors without their number."""
    told = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.filename2 is None:
        told = f"{error.filename}: {error.strerror}"
    Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {escape(told)}", soft_wrap=True)


def make_screen() -> Console:
    """Where a command speaks; as wide as the terminal, or as a table needs."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)


def silence_libraries() -> None:
    """transformers draws a bar for every load and save, torch warns of how torchao is written: no use to a command."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bar()


def parse_settings(pairs: list[str], option: str = "--set", example: str = "epochs=3") -> dict[str, Any]:
    """The settings of an option such as ``--set KEY=VALUE``, each value read as YAML.

    >>> parse_settings(["epochs=3", "frozen=[visual]"])
    {'epochs': 3, 'frozen': ['visual']}

    Raises:
        ValueError: If one has no ``=``, its value is not YAML, or a key is given twice.
    """
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"{option} {pair!r}: write it as KEY=VALUE, such as {option} {example}.")
        if key in settings:
            raise ValueError(f"{option} {pair!r}: {key} was given before, as {settings[key]!r}; allowed is once.")
        try:
            settings[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
            raise ValueError(f"{option} {pair!r}: the value is not YAML: {error}") from error
    return settings
