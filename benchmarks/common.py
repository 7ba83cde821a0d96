"""What both benchmarks need: options, the model, the machine's description, markdown."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import sentence_transformers
import torch
import transformers
from corpora import WORDS
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import disable_progress_bar

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.demo.base_model import make_tiny_base

SIZES = {"hidden_size": 384, "layers": 6, "vision_size": 256, "vision_layers": 4}


HEAD = "# Benchmarks\n\nEach section is written by the command it names.\n"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows defaults."""


def parser(description: str, rows: int, corpora: Sequence[str]) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=Help)
    options.add_argument("--rows", type=int, default=rows, help="scales every corpus; see benchmarks/corpora.py")
    options.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    options.add_argument(
        "--corpus", nargs="+", default=list(corpora), choices=corpora, metavar="NAME", help="run these"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options.add_argument("--output", type=Path, help="markdown file; this benchmark's section in it is replaced")
    for name, size in SIZES.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help="of the random bench model")
    return options


def set_up(options: argparse.Namespace) -> None:
    """Threads as asked for, and no progress bars between the lines of the report."""
    torch.set_num_threads(options.threads)
    disable_progress_bar()


def make_model(folder: Path, sizes: Mapping[str, int]) -> str:
    """Save a random model.

    Args:
        folder: Where it goes.
        sizes: ``hidden_size``, ``layers``, ``vision_size`` and ``vision_layers``, as ``make_tiny_base`` takes them.

    Returns:
        The model's folder, for either side to load.
    """
    base = make_tiny_base(folder / "base", [" ".join(WORDS)] * 5, **sizes)
    model = ViPyloQwen.create(base, 256, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def load(side: str, path: str) -> SentenceTransformer:
    """Load one side: ``"ours"``, ``"int8"`` (ours, quantised) or ``"stock"``."""
    if side == "int8":
        return ViPyloQwen(path, device="cpu", quantize="int8")
    return (ViPyloQwen if side == "ours" else SentenceTransformer)(path, device="cpu")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table.

    >>> print(table(["inputs", "ratio"], [["text", 3.5]]))
    | inputs | ratio |
    |---|---|
    | text | 3.5 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    head, rule, *body = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return "\n".join([head, rule.replace(" ", ""), *body])


def machine(options: argparse.Namespace) -> str:
    """Where and how this run was made: no host name, no path."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"torch": torch, "transformers": transformers, "sentence-transformers": sentence_transformers}
    return "\n".join(
        [
            f"- machine: {_cpu()}, {cores} cores, threads used: {options.threads}, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}",
            f"- versions: Python {platform.python_version()}, "
            + ", ".join(f"{name} {module.__version__}" for name, module in versions.items()),
            f"- date: {datetime.date.today()}; command: `{_command(options.output)}`",
        ]
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _command(output: Path | None) -> str:
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return command.replace(str(output), "FILE") if output else command


def parameters(model: SentenceTransformer) -> str:
    """How many parameters the model has: language model, its embeddings, vision tower, in millions."""
    whole, visual = model[0].model, model[0].model.visual
    embeddings = whole.get_input_embeddings().weight.numel()
    vision = sum(parameter.numel() for parameter in visual.parameters())
    layers = sum(parameter.numel() for parameter in model.parameters()) - vision - embeddings
    counts = (f"{count / 1e6:.1f} M" for count in (layers, embeddings, vision))
    return "language model {}, its embeddings {}, vision tower {}".format(*counts)


def report(title: str, body: str, output: Path | None) -> None:
    """Print a section, and put it into a markdown file in place of the one of the same title."""
    section = f"## {title}\n\n{body}\n"
    print(f"\n{section}", flush=True)
    if output:
        text = output.read_text(encoding="utf-8") if output.exists() else HEAD
        output.write_text(with_section(text, title, section), encoding="utf-8")


def with_section(text: str, title: str, section: str) -> str:
    r"""The text of a markdown file with its section of that title replaced, or added at the end.

    >>> with_section("# A\n\n## B\n\nold\n\n## C\n\nc\n", "B", "## B\n\nnew\n")
    '# A\n\n## B\n\nnew\n\n## C\n\nc\n'
    """
    head, *sections = text.rstrip("\n").split("\n\n## ")
    bodies = {body.partition("\n")[0]: body for body in sections}
    bodies[title] = section.removeprefix("## ").rstrip("\n")
    return "\n\n## ".join([head, *bodies.values()]) + "\n"
