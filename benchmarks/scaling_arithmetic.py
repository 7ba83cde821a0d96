"""From published figures to the run of 11 million samples: arithmetic, not measurement. No GPU was at hand.

Every assumption is a field of `Run`, `Gpu` or `Data` below, with its source or the word "assumed". Those of the run and
the GPU are options, too. The tables it prints are those of docs/scaling.md.

Operations are counted as in benchmarks/flops.py, off a Qwen2-VL-2B without weights: matrix products and attention, two
for a multiplication with its addition. A training step takes three times its forward pass (one product forward, two
backward), four times where activations are computed anew (gradient checkpointing, GradCache).

Examples:
  python benchmarks/scaling_arithmetic.py
  python benchmarks/scaling_arithmetic.py --gpus 8 --low 0.2 --high 0.3
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import common
import torch
from flops import Costs
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

TERA, GIGA, DAY = 1e12, 1e9, 86_400

# --- Assumptions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The published run (EraX-AI, viPyloQwen README and paper drafts, 2025).

    Attributes:
        samples: Rows of the data.
        epochs: Passes over them: the recipe's; what the 15 days held is not certain.
        gpus: Full sharding over as many.
        batch_size: Rows on each GPU.
        accumulation: Batches of each GPU a step.
        days: What it took.
    """

    samples: int = 11_000_000
    epochs: int = 2
    gpus: int = 4
    batch_size: int = 24
    accumulation: int = 8
    days: float = 15.0

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.gpus * self.accumulation

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return math.ceil(self.samples / self.rows) * self.epochs


@dataclass(frozen=True)
class Gpu:
    """An H100 SXM.

    Attributes:
        peak: Dense bfloat16 products, TFLOP/s: NVIDIA's data sheet gives 1,979 with sparsity, half of it without.
        memory: GB.
        low: Share of the peak that all arithmetic of a step reaches, recomputation included; assumed. Llama 3 reached
            0.38 to 0.43 on H100s, with far larger matrices and much work on it.
        high: As `low`, the better case.
    """

    peak: float = 989.0
    memory: float = 80.0
    low: float = 0.35
    high: float = 0.45


@dataclass(frozen=True)
class Data:
    """What an average row is like: all assumed, as no figures are published.

    Attributes:
        name: Of these assumptions.
        multimodal: Share of rows with images. The drafts' curriculum ends at two thirds.
        images: Images of such a row.
        image_tokens: Merged tokens of an image, four patches each; 576 are 672 x 672 pixels, 1280 this package's most.
        question: Tokens beside the images.
        answer: Tokens of such a row's positive.
        text: Tokens of either side of a row without images.
        padding: Share of the tokens in a padded batch that are padding.
        together: Rows of a batch that show the same images, where they are drawn together (group_images).
    """

    name: str
    multimodal: float
    images: float
    image_tokens: int
    question: int
    answer: int
    text: int
    padding: float
    together: float

    @property
    def prefix(self) -> float:
        """Tokens of an anchor's images, with the two around each."""
        return self.images * (self.image_tokens + 2)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return 4 * self.image_tokens


DATA = (
    Data("light", 1 / 3, 1.0, 256, 24, 32, 64, padding=0.2, together=1),
    Data("middle", 1 / 2, 1.1, 576, 32, 96, 128, padding=0.35, together=2),
    Data("heavy", 2 / 3, 1.3, 1280, 48, 200, 256, padding=0.5, together=4),
)

BYTES_A_TOKEN, BYTES_A_PATCH = 118_840, 58_960
"""What one layer, or block, keeps of a token, or patch, for its backward pass, with bfloat16 autocast over float32
weights: counted by torch's saved_tensors_hooks on layers of full size, in this script's test."""

TRAINED = 16
"""Bytes of a trained parameter: weight, gradient and AdamW's two moments in float32."""

FROZEN = 4
"""Bytes of a frozen one in float32, the recipe's dtype; bfloat16 would halve it."""

NF4 = (4 + 0.127) / 8
"""Bytes of a parameter in NF4 with double quantisation (Dettmers et al. 2023)."""

CHECKPOINT = 4
"""Bytes of a value that checkpointing keeps of each layer's input: float32, the most it can be."""

LORA_RANK = 16
PART = 4
"""Rows of a GradCache mini-batch."""

IMAGE_SECONDS = 0.024
"""Of one core, to open a JPEG of 1200 x 900, and to resize and cut it: about 12 ms each, as measured here."""

PADDINGS = (0.2, 0.5)
TOGETHERS = (1, 2, 4)

# --- The model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """How many parameters the parts have."""

    layers: int
    embeddings: int
    vision: int
    head: int
    lora: int

    @property
    def total(self) -> int:
        """All of a model without adapter."""
        return self.layers + self.embeddings + self.vision + self.head


def make_model() -> list[Any]:
    """Qwen2-VL-2B in the shape of ours: transformer, pooling and head, without memory for its weights."""
    text = {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    }
    vision = {"hidden_size": 1536, "embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4}
    with torch.device("meta"):
        transformer = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))
        return [SimpleNamespace(model=transformer), None, nn.Linear(1536, 1024)]


def parameters(model: Sequence[Any]) -> Parameters:
    """Count them; the adapter's are those of the recipe's default, on all linear layers of the language model."""
    transformer, head = model[0].model, model[2]
    language = transformer.language_model
    linear = [module for module in language.layers.modules() if isinstance(module, nn.Linear)]
    return Parameters(
        layers=_count(language) - _count(language.embed_tokens),
        embeddings=_count(language.embed_tokens),
        vision=_count(transformer.visual),
        head=_count(head),
        lora=sum(LORA_RANK * (module.in_features + module.out_features) for module in linear),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- Work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowWork:
    """Operations of an average row's forward pass.

    Attributes:
        text: The language model on texts.
        prefix: The language model on the images' tokens.
        vision: The vision tower.
    """

    text: float
    prefix: float
    vision: float

    def padded(self, padding: float) -> float:
        """Every row by itself, padded to the longest of its batch in the language model."""
        return (self.text + self.prefix) / (1 - padding) + self.vision

    def packed(self, together: float = 1) -> float:
        """No padding, and images once for all rows that are drawn together."""
        return self.text + (self.prefix + self.vision) / together


def row_work(costs: Costs, data: Data) -> RowWork:
    """The forward pass of an average row: anchor and positive, an explicit negative left out."""
    start, end = data.prefix, data.prefix + data.question
    both_texts = 2 * costs.tokens(0, data.text)
    beside_images = costs.tokens(start, end) + costs.tokens(0, data.answer)
    return RowWork(
        text=data.multimodal * beside_images + (1 - data.multimodal) * both_texts + 2 * costs.row,
        prefix=data.multimodal * costs.tokens(0, start),
        vision=data.multimodal * data.images * costs.image(data.patches),
    )


def seconds_a_step(forward: float, factor: float, run: Run, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a step at the better and at the worse share of the peak."""
    work = forward * factor * run.rows
    return tuple(work / (run.gpus * gpu.peak * TERA * share) for share in (gpu.high, gpu.low))


# --- Memory -----------------------------------------------------------------------------------------------------------


def states(count: Parameters, run: Run) -> dict[str, float]:
    """Mode -> bytes on a GPU of weights, gradients and optimiser; what is sharded, and what each GPU has whole."""
    language = count.layers + count.embeddings
    adapter = (count.lora + count.head) * TRAINED
    return {
        "full, sharded": count.total * TRAINED / run.gpus,
        "full, each GPU whole": count.total * TRAINED,
        "frozen tower, sharded": ((count.total - count.vision) * TRAINED + count.vision * FROZEN) / run.gpus,
        "LoRA, each GPU whole": (language + count.vision) * FROZEN + adapter,
        "QLoRA, each GPU whole": count.layers * NF4 + (count.embeddings + count.vision) * FROZEN + adapter,
    }


def tokens_and_patches(data: Data, rows: float, together: float, *, anchors: bool = False) -> tuple[float, float]:
    """Tokens and patches of rows that show images, packed: the worst batch. With `anchors`, of that column alone."""
    shown = rows / together
    tokens = shown * data.prefix + rows * (data.question + (0 if anchors else data.answer))
    return tokens, shown * data.images * data.patches


def kept(tokens: float, patches: float, model: Sequence[Any], checkpointing: bool) -> float:
    """Bytes kept for the backward pass; with checkpointing the layers' inputs, and all of one layer or block."""
    language, visual = model[0].model.language_model, model[0].model.visual
    layers, blocks = len(language.layers), len(visual.blocks)
    if not checkpointing:
        return tokens * BYTES_A_TOKEN * layers + patches * BYTES_A_PATCH * blocks
    inputs = tokens * layers * language.config.hidden_size + patches * blocks * visual.config.embed_dim
    return inputs * CHECKPOINT + max(tokens * BYTES_A_TOKEN, patches * BYTES_A_PATCH)


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(run: Run, gpu: Gpu) -> str:
    """All tables, as markdown."""
    model = make_model()
    costs, count = Costs.of(model), parameters(model)
    parts = [
        ("The model", model_table(costs, count)),
        ("The published run", run_table(run, gpu)),
        ("Data and work of a row", data_table(costs)),
        ("Steps, days and GPU-days", "\n\n".join([work_table(costs, run, gpu), implied(costs, run, gpu)])),
        ("What is saved of the published days", saved_table(costs, run)),
        ("Work by mode", mode_table(costs)),
        ("Memory on a GPU", memory_table(model, count, run, gpu)),
        ("Images to open", feeding_table(costs, run, gpu)),
    ]
    return "\n\n".join(f"### {title}\n\n{body}" for title, body in parts)


def model_table(costs: Costs, count: Parameters) -> str:
    """Parameters and operations."""
    lines = [
        ["language model, 28 layers", _millions(count.layers), f"{costs.token / GIGA:.2f} GFLOP a token"],
        ["its embeddings", _millions(count.embeddings), "a look-up"],
        ["vision tower, 32 blocks", _millions(count.vision), f"{costs.patch / GIGA:.2f} GFLOP a patch"],
        ["dense head", _millions(count.head), f"{costs.row / GIGA:.3f} GFLOP a side"],
        [
            "attention",
            "",
            f"{costs.token_pair / 1e6:.3f} MFLOP two tokens, {costs.patch_pair / 1e6:.3f} two patches",
        ],
        ["all", _millions(count.total), ""],
        [f"LoRA adapter, rank {LORA_RANK}", _millions(count.lora), ""],
    ]
    return common.table(["part", "parameters", "forward pass"], lines)


def run_table(run: Run, gpu: Gpu) -> str:
    """What the run's own figures give."""
    step = run.days * DAY / run.steps
    lines = [
        ["rows of a step", f"{run.batch_size} x {run.gpus} x {run.accumulation} = {run.rows}"],
        ["steps", f"{run.samples:,} / {run.rows} x {run.epochs} = {run.steps:,}"],
        ["GPU-days", f"{run.gpus} x {run.days:g} = {run.gpus * run.days:g}"],
        [
            "seconds a step",
            f"{step:.1f} ({step * run.epochs:.1f} if it was one epoch)",
        ],
        ["rows a second", f"{run.samples * run.epochs / run.days / DAY:.1f}, {_a_gpu(run):.1f} a GPU"],
        ["the GPUs' peak", f"{run.gpus} x {gpu.peak:g} = {run.gpus * gpu.peak:,.0f} TFLOP/s"],
    ]
    return common.table(["", "published, or following from it"], lines)


def data_table(costs: Costs) -> str:
    """The assumptions on data, and what they give."""
    lines = []
    for data in DATA:
        work = row_work(costs, data)
        total = work.packed()
        lines.append(
            [
                data.name,
                f"{data.multimodal:.0%}",
                f"{data.images:g} of {data.image_tokens}",
                f"{data.question} + {data.answer}",
                f"2 x {data.text}",
                f"{data.padding:.0%}",
                f"{data.together:g}",
                f"{total / TERA:.2f}",
                " / ".join(f"{part / total:.0%}" for part in (work.text, work.prefix, work.vision)),
            ]
        )
    columns = [
        "data",
        "rows with images",
        "images, tokens each",
        "tokens beside them",
        "tokens of a text row",
        "padding",
        "rows on the same images",
        "TFLOP a row, forward",
        "texts / image tokens / vision tower",
    ]
    return common.table(columns, lines)


def runtimes(work: RowWork, data: Data) -> Iterator[tuple[str, float, float]]:
    """What to compare: name, forward operations of a row, times they are done in a step."""
    yield "padded, checkpointing", work.padded(data.padding), 4
    yield "packed, checkpointing", work.packed(), 4
    yield "packed, shared images, checkpointing or GradCache", work.packed(data.together), 4
    yield "packed, shared images, nothing recomputed", work.packed(data.together), 3
    yield "packed, shared images, checkpointing and GradCache", work.packed(data.together), 5


def work_table(costs: Costs, run: Run, gpu: Gpu) -> str:
    """Step time and days of a full fine-tuning."""
    lines = []
    for data in DATA:
        for name, forward, factor in runtimes(row_work(costs, data), data):
            step = seconds_a_step(forward, factor, run, gpu)
            days = [seconds * run.steps / DAY for seconds in step]
            petaflop = f"{forward * factor * run.rows / 1e15:,.1f}"
            lines.append([data.name, name, petaflop, _range(step), _range(days), _range([d * run.gpus for d in days])])
    shares = f"at {gpu.high:.0%} to {gpu.low:.0%} of the peak"
    return common.table(["data", "runtime", "PFLOP a step", f"seconds a step, {shares}", "days", "GPU-days"], lines)


def implied(costs: Costs, run: Run, gpu: Gpu) -> str:
    """Which share of the peak the published days mean."""
    available = run.days * DAY * run.gpus * gpu.peak * TERA
    shares = (
        f"{row_work(costs, data).padded(data.padding) * 4 * run.rows * run.steps / available:.0%} ({data.name})"
        for data in DATA
    )
    return f"Share of the peak at which the padded runtime takes {run.days:g} days: {', '.join(shares)}."


def saved_table(costs: Costs, run: Run) -> str:
    """What is left of the padded runtime's work, by padding and by rows on the same images."""
    lines = []
    for data in DATA:
        work = row_work(costs, data)
        for padding in PADDINGS:
            left = [work.packed(together) / work.padded(padding) for together in TOGETHERS]
            cells = [f"{share:.0%}: {run.days * (1 - share):.1f} days saved" for share in left]
            lines.append([data.name, f"{padding:.0%}", *cells])
    rows = [f"{together} row{'s' * (together > 1)} on the same images" for together in TOGETHERS]
    return common.table(["data", "padding", *rows], lines)


def mode_table(costs: Costs) -> str:
    """Operations of a step by mode, beside those of full fine-tuning without recomputation."""
    factors = {
        "full": (3, 3),
        "full, checkpointing or GradCache": (4, 4),
        "frozen tower": (3, 1),
        "frozen tower, its features from disk": (3, 0),
        "LoRA or QLoRA (language model)": (2, 1),
    }
    lines = []
    for name, (language, vision) in factors.items():
        cells = []
        for data in DATA:
            work = row_work(costs, data)
            both = (work.text + work.prefix) * language + work.vision * vision
            cells.append(f"{both / (3 * work.packed()):.2f}")
        lines.append([name, f"{language} / {vision}", *cells])
    return common.table(["mode", "passes: language / vision", *(data.name for data in DATA)], lines)


def memory_table(model: Sequence[Any], count: Parameters, run: Run, gpu: Gpu) -> str:
    """Gigabytes by mode, for a batch in which every row shows images."""
    lines = []
    for data in DATA[1:]:
        for mode, state in states(count, run).items():
            frozen = not mode.startswith("full")
            cells = [f"{state / GIGA:.1f}"]
            for rows, together, anchors, checkpointing in (
                (run.batch_size, 1, False, False),
                (run.batch_size, 1, False, True),
                (run.batch_size, data.together, False, True),
                (PART, 1, True, False),
            ):
                tokens, patches = tokens_and_patches(data, rows, together, anchors=anchors)
                total = (state + kept(tokens, 0 if frozen else patches, model, checkpointing)) / GIGA
                cells.append(f"{total:.0f}" if total <= gpu.memory else f"({total:.0f})")
            lines.append([data.name, mode, *cells])
    columns = [
        "data",
        "mode",
        "weights, gradients, optimiser",
        f"with {run.batch_size} rows at once",
        "with checkpointing",
        "and shared images",
        f"GradCache, {PART} rows a part",
    ]
    return common.table(columns, lines)


def feeding_table(costs: Costs, run: Run, gpu: Gpu) -> str:
    """Images that the data loader has to open for the fastest runtime, each once for the rows that share it."""
    lines = []
    for data in DATA:
        seconds, _ = seconds_a_step(row_work(costs, data).packed(data.together), 3, run, gpu)
        images = run.rows * data.multimodal * data.images / data.together / seconds / run.gpus
        lines.append([data.name, f"{run.rows / seconds:,.0f}", f"{images:.1f}", f"{images * IMAGE_SECONDS:.1f}"])
    return common.table(["data", "rows a second", "images a second and GPU", "cores a GPU to open them"], lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _a_gpu(run: Run) -> float:
    return run.samples * run.epochs / run.days / DAY / run.gpus


def _range(values: Sequence[float]) -> str:
    return "-".join(f"{value:.1f}" for value in values)


# --- The command line -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """An option for every assumption on the run and the GPU."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    for kind in (Run, Gpu):
        for field in fields(kind):
            name = f"--{field.name.replace('_', '-')}"
            options.add_argument(name, type=type(field.default), default=field.default, help=kind.__name__)
    return options


def main() -> None:
    """Print the tables."""
    given = vars(parser().parse_args())
    run, gpu = (kind(**{field.name: given[field.name] for field in fields(kind)}) for kind in (Run, Gpu))
    print(tables(run, gpu))


if __name__ == "__main__":
    main()
