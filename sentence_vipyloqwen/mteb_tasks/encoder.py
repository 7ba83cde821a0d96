"""A model of ours as `mteb` calls it: what it reads, which prompt it gets, and a revision that follows its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from mteb.abstasks import AbsTask
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.hashing import hash_tensors
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


class ViPyloQwenEncoder(SentenceTransformerEncoderWrapper):
    """`mteb`'s wrapper of a Sentence Transformers model, for a model of this package, packed or plain.

    Args:
        model: The model.
        name: What results are filed under, ``owner/name``.
        tasks: The tasks that it will be measured on; they decide the prompts.
    """

    def __init__(self, model: SentenceTransformer, name: str, tasks: Iterable[AbsTask]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mteb warns of every prompt that is not named as one of its tasks
            super().__init__(model)
        self.model_prompts = task_prompts(tasks)
        self.mteb_model_meta = self.mteb_model_meta.model_copy(
            update={
                "name": name,
                "revision": hash_tensors(model.state_dict().items()),
                "modalities": MODALITIES,
                "languages": ["vie-Latn", "eng-Latn", "zho-Hans"],
            }
        )
