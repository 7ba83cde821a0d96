"""The model card: Sentence Transformers' own, with what is particular to these models.

The stock template has no blocks to fill, so the further sections follow the usage snippet, the one piece of it that a
subclass writes: usage with this package, tasks and prompts, what a training run left, limits, licence. Citations,
metadata and the stock sections go where they always do.

An embedder that was made without this package has no task tokens: its card speaks of no prefixes, no languages and no
method but those that it is known to have.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import load_file_path
from torch import nn
from transformers.tokenization_utils_base import LARGE_INTEGER

from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.modules import AttentionPooling
from sentence_vipyloqwen.modules.backbones import BACKBONES
from sentence_vipyloqwen.pages import load_markdown
from sentence_vipyloqwen.tasks import ALL_TASKS, TRIPLET, Task

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
CURVES_FILE = "assets/curves.svg"
"""Where a saved folder keeps the curves of its training."""

TAGS = ("multimodal", "vipyloqwen")
"""Beside those of every dense Sentence Transformers model, and the architecture."""

LANGUAGES = ("vi", "en", "zh")
"""What these models are made for; it stands in the metadata until records say which languages were measured."""

LOSS_WORDS: Mapping[str, Mapping[str, str]] = {
    "negatives": {
        "same_task": "the rows of one task are each other's negatives",
        "all": "all rows, whatever their tasks, are each other's negatives",
    },
    "pair_weight": {
        "score": "`info_nce` weighs a scored pair by its score",
        "uniform": "`info_nce` weighs every scored pair alike, whatever its score",
    },
    "triplet_scale": {
        "cosine": "margins are in units of cosine",
        "temperature": "margins are in units of cosine divided by the temperature",
    },
}
"""Option of the loss -> its value -> what that says."""

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
"""Title -> BibTeX of what every model that this package made builds on, beside its base and what its losses cite."""

BASE_CITATIONS: Mapping[str, str] = {
    "qwen2_vl": """
@misc{wang2024qwen2vl,
    title = {Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution},
    author = {Peng Wang and Shuai Bai and Sinan Tan and Shijie Wang and others},
    year = {2024},
    eprint = {2409.12191},
    archivePrefix = {arXiv},
    primaryClass = {cs.CV},
}
""",
    "qwen2_5_vl": """
@misc{bai2025qwen25vl,
    title = {Qwen2.5-VL Technical Report},
    author = {Shuai Bai and Keqin Chen and Xuejing Liu and Jialin Wang and others},
    year = {2025},
    eprint = {2502.13923},
    archivePrefix = {arXiv},
    primaryClass = {cs.CV},
}
""",
    "qwen3_vl": """
@misc{bai2025qwen3vl,
    title = {Qwen3-VL Technical Report},
    author = {Shuai Bai and Yuxuan Cai and Ruizhe Chen and Keqin Chen and others},
    year = {2025},
    eprint = {2511.21631},
    archivePrefix = {arXiv},
    primaryClass = {cs.CV},
}
""",
}
"""Type of a base, as its configuration has it -> BibTeX of its technical report."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LANGUAGE = re.compile(r"([a-z]{2,3})(-[A-Z][a-z]{3})?(-[A-Z]{2})?")
"""An ISO 639 code, which the metadata take, with or without a script and a region, which they do not."""


@dataclass(frozen=True)
class Figure:
    """What a task reached: its headline metric on held-out records, before and after a training.

    Attributes:
        task: The task's name.
        metric: The metric's name.
        queries: How many queries (for text_pair: pairs) it is the mean over.
        before: Of the untrained model; ``None`` where it was not measured, or is undefined.
        after: Of the trained model; ``None`` where it is undefined.
        candidates: How many candidates a query is ranked among; 0 for text_pair, which ranks none.
        language: The language of the queries, as their records have it; empty for all of the task's queries.
    """

    task: str
    metric: str
    queries: int
    before: float | None
    after: float | None
    candidates: int = 0
    language: str = ""


@dataclass(frozen=True)
class MixPhase:
    """How the batches of a run, or of a part of it, were divided.

    Attributes:
        until: Where the part ends, as a share of the run's steps.
        shares: What is named in the mix -> its share of the batches.
    """

    until: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class TrainingNotes:
    """What a run tells the card.

    Attributes:
        recipe: Its settings as YAML; of paths the names alone, as the rest is nobody's business.
        figures: What each task reached.
        by_language: What each task reached in each language that its records name.
        evaluator: What measured that; none without held-out records.
        evaluated: The file name of the held-out records.
        sampling: How batches were drawn, in a few words of Markdown.
        mix: The shares that were in force, phase by phase; none where they followed from the rows.
    """

    recipe: str
    figures: Sequence[Figure] = ()
    sampling: str = ""
    mix: Sequence[MixPhase] = ()
    by_language: Sequence[Figure] = ()
    evaluator: BaseEvaluator | None = None
    evaluated: str = ""

    @property
    def languages(self) -> list[str]:
        """The languages that were measured, each once, as their records have them."""
        return list(dict.fromkeys(figure.language for figure in self.by_language))


@dataclass
class ViPyloQwenModelCardData(SentenceTransformerModelCardData):
    """``SentenceTransformerModelCardData`` with the sections and metadata of this package's models.

    Takes the same arguments. Base model and licence, where not given, come from the checkpoint that a model began with:
    its id on the Hub, and what its own card says. So do the languages of an embedder that was made elsewhere. The
    languages of others are those that the held-out records of a run name, and :data:`LANGUAGES` where none are named.
    """

    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=lambda: [*SentenceTransformerModelCardData().tags, *TAGS])
    generate_widget_examples: bool = False
    widget: list[dict[str, Any]] = field(default_factory=lambda: [dict(EXAMPLE)], init=False)
    usage_examples: list[Any] | None = field(
        default_factory=lambda: [EXAMPLE["source_sentence"], *EXAMPLE["sentences"][::2]], init=False
    )
    notes: TrainingNotes | None = field(default=None, init=False, repr=False)
    loss_config: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    curves: str = field(default="", init=False, repr=False)
    _languages_assumed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """See ``SentenceTransformerModelCardData``."""
        self._languages_assumed = self.language is None
        if self._languages_assumed:
            self.language = list(LANGUAGES)
        super().__post_init__()

    def register_model(self, model: SentenceTransformer) -> None:
        """See ``SentenceTransformerModelCardData``; adds the architecture, such as ``qwen2_vl``, and what is cited."""
        super().register_model(model)
        self.add_tags(model.transformers_model.config.model_type)
        self.citations |= self._own_citations()
        if self._languages_assumed and not model.task_token_ids:
            self.language, self._languages_assumed = [], False

    def _own_citations(self) -> dict[str, str]:
        """Title -> BibTeX of the base and, of what this package made, the method."""
        kind = self.model.transformers_model.config.model_type
        return {**(CITATIONS if self.model.task_token_ids else {}), BACKBONES[kind].name: BASE_CITATIONS[kind]}

    def set_losses(self, losses: list[nn.Module]) -> None:
        """See ``SentenceTransformerModelCardData``; a training begins: what an earlier one left is not told any more.

        Remembers weights and margins, and keeps our citations.
        """
        super().set_losses(losses)
        self.citations |= self._own_citations()
        self.notes, self.curves = None, ""
        self.loss_config = next((loss.get_config_dict() for loss in losses if isinstance(loss, PrefixRoutedLoss)), None)

    def set_notes(self, notes: TrainingNotes) -> None:
        """Take what a run left to tell. The languages that it measured stand in for those that nobody has said."""
        self.notes = notes
        codes = [code[1] for language in notes.languages if (code := _LANGUAGE.fullmatch(language))]
        if codes and (self._languages_assumed or not self.language):
            self.language = list(dict.fromkeys(codes))

    def set_evaluation_metrics(
        self, evaluator: BaseEvaluator, metrics: dict[str, Any], epoch: int = 0, step: int = 0
    ) -> None:
        """See ``SentenceTransformerModelCardData``; what is undefined (NaN) is left out, as metadata cannot hold it."""
        defined = {name: value for name, value in metrics.items() if not math.isnan(value)}
        super().set_evaluation_metrics(evaluator, defined, epoch, step)

    def format_eval_metrics(self) -> dict[str, Any]:
        """See ``SentenceTransformerModelCardData``; of what a run measured, the metadata bear headlines and their mean.

        They name the file of the held-out records. The card's own tables keep all figures.
        """
        formatted = super().format_eval_metrics()
        own = self.notes.evaluator if self.notes else None
        if own is None:
            return formatted
        headlines = {own.primary_metric, *(f"{figure.task}_{figure.metric}" for figure in self.notes.figures)}
        minor = self.eval_results_dict[own].keys() - headlines
        name, results = model_index_to_eval_results(formatted["model-index"])
        index = [of for of in results if of.task_name != own.description]
        index += [
            replace(of, dataset_name=self.notes.evaluated)
            for of in results
            if of.task_name == own.description and of.metric_type in headlines
        ]
        metrics = [metric for metric in formatted["metrics"] if metric not in minor]
        return {**formatted, "metrics": metrics, "model-index": eval_results_to_model_index(name, index)}

    def get_default_model_name(self) -> str:
        """See ``SentenceTransformerModelCardData``; a base that has no id is called what its kind is called."""
        name = super().get_default_model_name()
        kind = BACKBONES[self.model.transformers_model.config.model_type].name
        return name if self.base_model else f"{name} based on {kind}"

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
        if not self.language and (spoken := told.get("language")):
            self.set_language(spoken)

    def to_dict(self) -> dict[str, Any]:
        """See ``SentenceTransformerModelCardData``; without what only serves to make the card."""
        values = super().to_dict()
        for key in ("notes", "loss_config", "curves", "_languages_assumed"):
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
            tasks=[_task_row(task, self.loss_config) for task in ALL_TASKS.values() if self.model.task_token_ids],
            max_length=_limit(self.model.max_seq_length),
            rows=[(of.get("name") or "unnamed", of["size"]) for of in self.train_datasets if of.get("size")],
            mix=_mix_rows(self.notes.mix) if self.notes else [],
            loss=self.loss_config,
            loss_words=[words[self.loss_config[option]] for option, words in LOSS_WORDS.items() if self.loss_config],
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

    def read_assets(self, source: str, card: str | None, **hub: Any) -> None:
        """Keep the pictures of the folder or repository that the model comes from, to be saved along with its card.

        Args:
            source: The folder, or the repository's id on the Hub.
            card: Its card. A picture that it does not show is not asked for.
            **hub: ``token``, ``cache_folder``, ``revision``, ``local_files_only``.
        """
        if CURVES_FILE not in (card or ""):
            return
        hub["cache_folder"] = hub.get("cache_folder") or os.getenv("SENTENCE_TRANSFORMERS_HOME")  # as for the model
        try:
            path = load_file_path(source, CURVES_FILE, **hub)
            self.curves = Path(path).read_text(encoding="utf-8") if path else self.curves
        except (OSError, HTTPError, UnicodeDecodeError) as error:  # disk, Hub, network, picture: no model needs it
            logger.warning("%s of %r was not had, and the model loads without: %r", CURVES_FILE, source, error)


def _limit(tokens: int | None) -> int | None:
    """The most tokens of an input; a tokenizer without a limit says one that no input reaches."""
    return tokens if tokens is not None and tokens < LARGE_INTEGER else None


def _task_row(task: Task, loss: Mapping[str, Any] | None) -> dict[str, str]:
    """A task's prefix and loss; a term of weight 0 takes no part."""
    terms = loss["weights"][task.name] if loss else task.weights
    weights = {term: weight for term, weight in terms.items() if weight}
    margin = (loss["margins"].get(task.name) if loss else task.margin) if TRIPLET in weights else None
    return {
        "name": task.name,
        "prefix": f"`{task.token}`" if task.token else "none",
        "sides": "both sides" if task.prefix_on_positive else "the query" if task.token else "",
        "terms": " + ".join(f"{weight:g} · {term}" for term, weight in weights.items()),
        "margin": "" if margin is None else f"{margin:g}",
    }


def _mix_rows(mix: Sequence[MixPhase]) -> list[dict[str, str]]:
    """A row of each phase, with a column of each name in any of them; of a lone phase nobody asks until when."""
    names = dict.fromkeys(name for phase in mix for name in phase.shares)
    return [
        {
            **({"until, of the steps": f"{100 * phase.until:.0f} %"} if len(mix) > 1 else {}),
            **{name: f"{100 * phase.shares.get(name, 0.0):.1f} %" for name in names},
        }
        for phase in mix
    ]


def _read_metadata(source: str, local_files_only: bool) -> Mapping[str, Any]:
    """The metadata of a checkpoint's own card; none where it has no card."""
    path = load_file_path(source, CARD_FILE, local_files_only=local_files_only)
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
