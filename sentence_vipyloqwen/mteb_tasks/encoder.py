"""A model of ours as `mteb` calls it: what it reads, which prompt it gets, and a revision of what decides scores."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash
from mteb.abstasks import AbsTask
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.fingerprint import Fingerprint, fingerprint
from sentence_vipyloqwen.tasks import PROMPTS

MODALITIES = ["text", "image"]
TYPE_PROMPTS: Mapping[str, str] = {
    "STS": "text_pair",
    "PairClassification": "text_pair",
    "InstructionRetrieval-query": "instr",
    "InstructionReranking-query": "instr",
    "VisionCentricQA-query": "vqa_single",
}
"""Kind of task -> our prompt; `mteb`'s keys, with ``-query`` where documents get none. All other inputs bear none."""

_IDLE = ("_name_or_path", "transformers_version", "use_cache")
"""What a backbone's config says that no vector depends on."""


def task_prompts(tasks: Iterable[AbsTask]) -> dict[str, str]:
    """What is put in front of the inputs of tasks, as `mteb` looks it up: by task and side, then by kind of task.

    - Graded or labelled pairs of texts: ``<text_pair>`` on both sides, as in training.
    - Retrieval by an instruction: ``<instr>`` on the query.
    - Questions on a picture, answered by a text (``it2t``): ``<vqa_single>`` on the question.
    - Documents, captions, pictures, and queries for them: nothing, as in training.
    """
    names = {
        f"{task.metadata.name}-{PromptType.query.value}": "vqa_single"
        for task in tasks
        if task.metadata.category == "it2t"
    }
    return {key: PROMPTS[name] for key, name in {**TYPE_PROMPTS, **names}.items()}


def revision_of(model: SentenceTransformer, known: Fingerprint | None = None) -> str:
    """A hash of what decides a model's scores, 32 hexadecimal digits: models of equal ones need not be measured twice.

    1. Its fingerprint: weights, dimensions, prompts, pixel budget, vocabulary, quantisation.
    2. How its modules are set up, pooling among them, and the backbone's own config.
    3. The chat template, and how two vectors are compared.
    4. The prompts that tasks get here.

    Args:
        model: The model.
        known: Its fingerprint, if it has been taken already.
    """
    backbone = getattr(getattr(model[0], "model", None), "config", None)
    facts = {
        "fingerprint": (known or fingerprint(model)).to_dict(),  # 1
        "modules": [module.get_config_dict() for module in model if hasattr(module, "get_config_dict")],  # 2
        "backbone": _settings(backbone.to_dict()) if backbone else None,
        "jpeg_draft": bool(getattr(model[0], "jpeg_draft", False)),
        "template": getattr(getattr(model[0], "tokenizer", None), "chat_template", None),  # 3
        "similarity": model.similarity_fn_name,
        "task_prompts": task_prompts(()),  # 4
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _IDLE}
    return {name: _settings(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


class ViPyloQwenEncoder(SentenceTransformerEncoderWrapper):
    """`mteb`'s wrapper of a Sentence Transformers model, for a model of this package, packed or plain.

    Args:
        model: The model.
        name: What results are filed under, ``owner/name``.
        tasks: The tasks that it will be measured on; they decide the prompts.

    Attributes:
        fingerprint: The model's.
    """

    def __init__(self, model: SentenceTransformer, name: str, tasks: Iterable[AbsTask]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mteb warns of every prompt that is not named as one of its tasks
            super().__init__(model)
        self.model_prompts = task_prompts(tasks)
        self.fingerprint = fingerprint(model)
        self.mteb_model_meta = self.mteb_model_meta.model_copy(
            update={
                "name": name,
                "revision": revision_of(model, self.fingerprint),
                "modalities": MODALITIES,
                "languages": ["vie-Latn", "eng-Latn", "zho-Hans"],
            }
        )
