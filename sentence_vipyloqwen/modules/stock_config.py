"""``sentence_bert_config.json``, the configuration of a module: written as stock reads it, and read from any folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOKENIZER_OPTIONS = {"padding", "truncation", "max_length", "restore_suffix"}


def stock_config(template_options: Mapping[str, Any]) -> dict[str, Any]:
    """What Sentence Transformers' ``Transformer`` reads; without ``message`` it would be text only.

    Args:
        template_options: Further arguments of the chat template.
    """
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    options = {"processing_kwargs": {"chat_template": template_options}} if template_options else {}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": method,
            "image": method,
            "image+text": method,
            "message": {**method, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        **options,
    }


def template_options_of(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a folder's ``sentence_bert_config.json`` has for the chat template.

    Args:
        config: What stands there.
        path: The folder; named in errors.

    Raises:
        ValueError: If it asks for what is not done here, and vectors would be others than Sentence Transformers'.
    """
    processing = config.get("processing_kwargs") or {}
    options = processing.get("chat_template", {})
    asked = {
        "transformer_task": config.get("transformer_task", "feature-extraction") != "feature-extraction",
        "modality_config": "message" not in config.get("modality_config", ()),
        "query_expansion": config.get("query_expansion") is not None,
        "processing_kwargs": bool(processing.keys() - {"chat_template"} or options.keys() & _TOKENIZER_OPTIONS),
    }
    if unknown := [key for key, differs in asked.items() if differs]:
        raise ValueError(
            f"{path!r} is configured by {', '.join(f'{key} = {config.get(key)!r}' for key in unknown)}; allowed are "
            "feature extraction, the modality 'message', and arguments for the chat template alone."
        )
    return options
