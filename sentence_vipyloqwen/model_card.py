"""The model card: Sentence Transformers' own, with what is particular to these models.

The stock template has no blocks to fill, so the further sections follow the usage snippet, the one piece of it that a
subclass writes: usage with this package, tasks and prompts, what a training run left, limits, licence. Citations,
metadata and the stock sections go where they always do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import load_file_path
from torch import nn

from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.modules import AttentionPooling
from sentence_vipyloqwen.pages import load_markdown
from sentence_vipyloqwen.tasks import ALL_TASKS, Task

CARD_FILE = "README.md"
CURVES_FILE = "assets/curves.svg"
"""Where a saved folder keeps the curves of its training."""

TAGS = ("multimodal", "vipyloqwen")
"""Beside those of every dense Sentence Transformers model, and the architecture."""

LANGUAGES = ("vi", "en", "zh")
EXAMPLE: Mapping[str, Any] = {
    "source_sentence": "hóa đơn tiền điện",
    "sentences": ["electricity bill", "a red circle", "电费账单"],
}
"""The model card's example; one drawn from the training data would publish its texts and paths."""

CITATIONS: Mapping[str, str] = {
    "viPyloQwen": """
@misc{erax2025vipyloqwen,
    title = {viPyloQwen: Unified Multimodal Embeddings via Prefix-Guided Dynamic Loss Optimization},
    author = {{EraX-AI}},
    year = {2025},
    note = {README and paper drafts},
}
""",
    "Qwen2-VL": """
@misc{wang2024qwen2vl,
    title = {Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution},
    author = {Peng Wang and Shuai Bai and Sinan Tan and Shijie Wang and others},
    year = {2024},
    eprint = {2409.12191},
    archivePrefix = {arXiv},
    primaryClass = {cs.CV},
}
""",
    "ColPali": """
@misc{faysse2024colpali,
    title = {ColPali: Efficient Document Retrieval with Vision Language Models},
    author = {Manuel Faysse and Hugues Sibille and Tony Wu and Bilel Omrani and Gautier Viaud and others},
    year = {2024},
    eprint = {2407.01449},
    archivePrefix = {arXiv},
    primaryClass = {cs.IR},
}
""",
}
"""Title -> BibTeX of what every model of this package builds on, beside what its losses cite."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Figure:
    """What a task reached: its headline metric on held-out records, before and after a training.

    Attributes:
        task: The task's name.
        metric: The metric's name.
        queries: How many queries (for text_pair: pairs) it is the mean over.
        before: Of the untrained model; ``None`` where it was not measured.
        after: Of the trained model; ``None`` where it is undefined.
    """

    task: str
    metric: str
    queries: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class TrainingNotes:
    """What a run tells the card.

    Attributes:
        recipe: Its settings as YAML; of paths the names alone, as the rest is nobody's business.
        figures: What each task reached.
        curves: The curves as one SVG picture; ``""`` where there are none.
    """

    recipe: str
    figures: Sequence[Figure] = ()
    curves: str = ""


@dataclass
class ViPyloQwenModelCardData(SentenceTransformerModelCardData):
    """``SentenceTransformerModelCardData`` with the sections and metadata of this package's models.

    Takes the same arguments. Base model and licence, where not given, come from the checkpoint that a model began with:
    its id on the Hub, and what its own card says.
    """

    language: str | list[str] | None = field(default_factory=lambda: list(LANGUAGES))
    tags: list[str] = field(default_factory=lambda: [*SentenceTransformerModelCardData().tags, *TAGS])
    generate_widget_examples: bool = False
    widget: list[dict[str, Any]] = field(default_factory=lambda: [dict(EXAMPLE)], init=False)
    usage_examples: list[Any] | None = field(
        default_factory=lambda: [EXAMPLE["source_sentence"], *EXAMPLE["sentences"][::2]], init=False
    )
    citations: dict[str, str] = field(default_factory=lambda: dict(CITATIONS), init=False)
    notes: TrainingNotes | None = field(default=None, init=False, repr=False)
    loss_config: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    curves: str = field(default="", init=False, repr=False)

    def register_model(self, model: SentenceTransformer) -> None:
        """See ``SentenceTransformerModelCardData``; adds the architecture, such as ``qwen2_vl``, to the tags."""
        super().register_model(model)
        self.add_tags(model.transformers_model.config.model_type)

    def set_losses(self, losses: list[nn.Module]) -> None:
        """See ``SentenceTransformerModelCardData``; remembers weights and margins, and keeps our citations."""
        super().set_losses(losses)
        self.citations |= CITATIONS
        self.loss_config = next((loss.get_config_dict() for loss in losses if isinstance(loss, PrefixRoutedLoss)), None)

    def set_evaluation_metrics(
        self, evaluator: BaseEvaluator, metrics: dict[str, Any], epoch: int = 0, step: int = 0
    ) -> None:
        """See ``SentenceTransformerModelCardData``; what is undefined (NaN) is left out, as metadata cannot hold it."""
        defined = {name: value for name, value in metrics.items() if not math.isnan(value)}
        super().set_evaluation_metrics(evaluator, defined, epoch, step)

    def extract_dataset_metadata(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """See ``SentenceTransformerModelCardData``; without sample rows, which would publish texts and paths."""
        datasets = super().extract_dataset_metadata(*args, **kwargs)
        hidden = ("examples", "examples_table", "_example_columns")
        return [{key: value for key, value in of.items() if key not in hidden} for of in datasets]

    def try_to_set_base_model(self) -> None:
        """Also without a look at the Hub: by the id that the model was loaded by, else by the card in its folder."""
        super().try_to_set_base_model()
        source = self.model.transformers_model.config._name_or_path
        if self.base_model is None and not Path(source).exists() and _HUB_ID.fullmatch(source):
            self.base_model = source
        told = _read_metadata(source, self.local_files_only)
        self.base_model = self.base_model or told.get("base_model")
        self.license = self.license or told.get("license")

    def to_dict(self) -> dict[str, Any]:
        """See ``SentenceTransformerModelCardData``; without what only serves to make the card."""
        values = super().to_dict()
        for key in ("notes", "loss_config", "curves"):
            values.pop(key)
        return values

    def generate_usage_snippet(self) -> str:
        """The stock usage, then the sections that are particular to these models."""
        name = self.model_id or "sentence_transformers_model_id"
        stock = super().generate_usage_snippet()
        portable = not any(isinstance(module, AttentionPooling) for module in self.model)
        if not portable:
            stock = stock.replace(
                f'SentenceTransformer("{name}")', f'SentenceTransformer("{name}", trust_remote_code=True)'
            )
        sections = load_markdown("sentence_vipyloqwen", "model_card.md.jinja").render(
            model_id=name,
            portable=portable,
            dimensions=self.model.get_embedding_dimension(),
            tasks=[_task_row(task, self.loss_config) for task in ALL_TASKS.values()],
            max_length=self.model.max_seq_length,
            rows=[(of["name"], of["size"]) for of in self.train_datasets if of.get("size")],
            loss=self.loss_config,
            notes=self.notes,
            curves=CURVES_FILE if self.curves else "",
            license=self.license,
            base_model=self.base_model,
        )
        return f"{stock}\n\n{sections}\n"

    def write_assets(self, folder: Path) -> None:
        """Write the pictures that the card of a saved folder shows."""
        if self.curves:
            (folder / CURVES_FILE).parent.mkdir(exist_ok=True)
            (folder / CURVES_FILE).write_text(self.curves, encoding="utf-8")

    def read_assets(self, folder: Path) -> None:
        """Keep the pictures of the folder that the model comes from, so that they are saved along with its card."""
        if (folder / CURVES_FILE).is_file():
            self.curves = (folder / CURVES_FILE).read_text(encoding="utf-8")


def _task_row(task: Task, loss: Mapping[str, Any] | None) -> dict[str, str]:
    weights = loss["weights"][task.name] if loss else task.weights
    margin = loss["margins"].get(task.name) if loss else task.margin
    return {
        "name": task.name,
        "prefix": f"`{task.token}`" if task.token else "none",
        "sides": "both sides" if task.prefix_on_positive else "the query" if task.token else "",
        "terms": " + ".join(f"{weight:g} · {term}" for term, weight in weights.items()),
        "margin": "" if margin is None else f"{margin:g}",
    }


def _read_metadata(source: str, local_files_only: bool) -> Mapping[str, Any]:
    """The metadata of a checkpoint's own card; none where it has no card."""
    path = load_file_path(source, CARD_FILE, local_files_only=local_files_only)
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
