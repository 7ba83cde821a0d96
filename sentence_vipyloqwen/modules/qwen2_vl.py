"""Qwen2-VL as a Sentence Transformers input module: from inputs to one vector for every token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers.sentence_transformer.modules import InputModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel
from transformers.utils import PROCESSOR_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.modules.images import image_key, open_image
from sentence_vipyloqwen.modules.inputs import MAX_IMAGES, ParsedInput, parse_inputs
from sentence_vipyloqwen.modules.rendering import CHAT_TEMPLATE, ControlTokens, add_task_tokens, render

MODEL_TYPE = "qwen2_vl"
MAX_SEQ_LENGTH = 8192
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28
"""Pixel budget of one image: 4 to 1280 merged vision tokens, so that five images and a text fit 8192 tokens."""

_PIXEL_KEYS = ("min_pixels", "max_pixels")
_HUB_KEYS = ("token", "revision", "local_files_only", "cache_dir", "subfolder")


class Qwen2VLTransformer(InputModule):
    """Reads text, images and mixes of both, and runs ``Qwen2VLModel`` over them.

    Its files are those of Sentence Transformers' own ``Transformer``, so that class loads what this one saved. It uses
    the tokenizer and the PIL image processor alone and never imports torchvision.

    Args:
        model: The transformers model, without a language-modelling head.
        tokenizer: Its tokenizer, task tokens included.
        image_processor: Its image processor, which holds the pixel budget.

    Attributes:
        allow_urls: Whether image URLs are fetched; ``False`` by default.
    """

    config_file_name = "sentence_bert_config.json"
    save_in_root = True

    def __init__(
        self, model: Qwen2VLModel, tokenizer: Any, image_processor: Qwen2VLImageProcessorPil, allow_urls: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.allow_urls = allow_urls
        self.control = ControlTokens.of(tokenizer)
        tokenizer.padding_side = "right"

    # --- what goes in -------------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> list[Any]:
        """Kinds of input, in Sentence Transformers' terms."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        """Most tokens of an input, images included."""
        return self.tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.model_max_length = value

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Turn a batch of inputs into features.

        Args:
            inputs: B inputs; see :data:`sentence_vipyloqwen.modules.inputs.ALLOWED_INPUTS`.
            prompt: Text put in front of each input's text.
            processing_kwargs: This call's own limit: ``{"text": {"max_length": 512}}``.
            max_length: The same limit as the trainer passes it.
            **kwargs: Accepted for Sentence Transformers' sake (``task``), without effect.

        Returns:
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (B, L) int64, padded on the right; ``image_keys``
            (B, 5) int64, 0 = no image; and where the batch has I > 0 images of P patches in all: ``pixel_values``
            (P, 1176) float32, ``image_grid_thw`` (I, 3) and ``num_images_per_sample`` (B,) int64.

        Raises:
            ValueError: If an input is not allowed or its images do not fit the limit; the message names its position.
        """
        limits = [limit for limit in (_text_limit(processing_kwargs), max_length) if limit is not None]
        limit = limits[0] if limits else self.max_seq_length
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_length is {limit!r}; allowed is a whole number of tokens, at least 1.")
        try:
            return self._preprocess(parse_inputs(inputs, prompt), limit)
        except TypeError as error:  # Sentence Transformers would swallow it and call again, without the prompt
            raise RuntimeError(f"preprocessing failed: {error}") from error

    def _preprocess(self, inputs: list[ParsedInput], max_length: int) -> dict[str, Tensor]:
        images = [self._open_images(item) for item in inputs]
        vision = self._vision_features([image for row in images for image in row])
        lengths = self._image_lengths(vision, [len(row) for row in images])
        rows = render(inputs, lengths, self.tokenizer, self.control, max_length)
        if vision:
            vision["num_images_per_sample"] = torch.tensor([len(row) for row in images])
        return self._text_features(rows) | vision | {"image_keys": _image_keys(images)}

    def _open_images(self, item: ParsedInput) -> list[Image.Image]:
        opened = []
        for position, source in enumerate(item.images):
            try:
                opened.append(open_image(source, allow_urls=self.allow_urls))
            except ValueError as error:
                raise ValueError(f"Input {item.index}, image {position}: {error}") from error
        return opened

    def _vision_features(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.image_processor(images=images, return_tensors="pt")) if images else {}

    def _image_lengths(self, vision: Mapping[str, Tensor], counts: Sequence[int]) -> list[list[int]]:
        if not vision:
            return [[] for _ in counts]
        merged = vision["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2
        return [row.tolist() for row in merged.split(list(counts))]

    def _text_features(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row) for row in rows]
        mask = [torch.ones_like(row) for row in ids]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)  # (B, L)
        return {
            "input_ids": input_ids,
            "attention_mask": pad_sequence(mask, batch_first=True),
            "mm_token_type_ids": (input_ids == self.control.image_pad).long(),
        }

    # --- what comes out -----------------------------------------------------------------------------------------------

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``token_embeddings`` (B, L, hidden) to the features: the last layer's output."""
        output = self.model(
            input_ids=features["input_ids"],
            attention_mask=features["attention_mask"],
            mm_token_type_ids=features["mm_token_type_ids"],
            pixel_values=features.get("pixel_values"),
            image_grid_thw=features.get("image_grid_thw"),
            use_cache=False,
        )
        features["token_embeddings"] = output.last_hidden_state
        return features

    def get_embedding_dimension(self) -> int:
        """Width of a token embedding."""
        return self.model.config.get_text_config().hidden_size

    # --- from and to a folder -----------------------------------------------------------------------------------------

    def get_config_dict(self) -> dict[str, Any]:
        """What Sentence Transformers' ``Transformer`` reads; without ``message`` it would be text only."""
        method = {"method": "forward", "method_output_name": "last_hidden_state"}
        return {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": method,
                "image": method,
                "image+text": method,
                "message": {**method, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
        }

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write weights (safetensors), tokenizer, image processor, chat template and module configuration."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.image_processor.save_pretrained(output_path)
        # By this the stock path finds the processor even beside a LoRA adapter, where there is no config.json.
        Path(output_path, PROCESSOR_NAME).write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> Qwen2VLTransformer:
        """Load a saved module from a folder or the Hub; weights come from safetensors only.

        Args:
            model_name_or_path: Folder or Hub id.
            subfolder: Folder of the module inside it.
            token: Hub token.
            cache_folder: Where Hub files are kept.
            revision: Hub revision.
            local_files_only: Whether to stay off the network.
            model_kwargs: For ``Qwen2VLModel.from_pretrained``: ``dtype``, ``attn_implementation``, ...
            processor_kwargs: For the tokenizer, and ``min_pixels`` / ``max_pixels`` for the image processor.
            config_kwargs: For the configuration.
            backend: ``"torch"``; there is no other.
            **kwargs: Accepted for Sentence Transformers' sake, without effect.

        Raises:
            ValueError: If the folder holds another architecture or lacks the task tokens, if another backend is asked
                for, or if code of the folder or pickled weights are.
        """
        if backend != "torch":
            raise ValueError(f"backend is {backend!r}; allowed is 'torch'.")
        hub = dict(
            zip(_HUB_KEYS, (token, revision, local_files_only, cache_folder, subfolder), strict=True),
            trust_remote_code=False,
        )
        parts = _load_parts(model_name_or_path, hub, model_kwargs or {}, processor_kwargs or {}, config_kwargs or {})
        return cls(*parts)

    @classmethod
    def from_base(
        cls,
        base: str,
        *,
        max_seq_length: int = MAX_SEQ_LENGTH,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        model_kwargs: Mapping[str, Any] | None = None,
        hub_kwargs: Mapping[str, Any] | None = None,
    ) -> Qwen2VLTransformer:
        """Make the module of a Qwen2-VL checkpoint: add the task tokens and give their rows a start.

        Args:
            base: Hub id or local folder of a Qwen2-VL checkpoint.
            max_seq_length: Most tokens of an input.
            min_pixels: Fewest pixels of an image after resizing.
            max_pixels: Most pixels of an image after resizing.
            model_kwargs: For ``Qwen2VLModel.from_pretrained``.
            hub_kwargs: ``token``, ``revision``, ``cache_dir``, ``local_files_only``.

        Raises:
            ValueError: If the checkpoint is of another architecture.
        """
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        hub = {**(hub_kwargs or {}), "trust_remote_code": False}
        model, tokenizer, image_processor = _load_parts(base, hub, model_kwargs or {}, pixels, {})
        known = len(tokenizer)
        add_task_tokens(tokenizer)
        _start_rows_at_mean(model, known, len(tokenizer))
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.model_max_length = max_seq_length
        return cls(model, tokenizer, image_processor)


def _load_parts(
    path: str,
    hub: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    processor_kwargs: Mapping[str, Any],
    config_kwargs: Mapping[str, Any],
) -> tuple[Qwen2VLModel, Any, Qwen2VLImageProcessorPil]:
    for options in (model_kwargs, processor_kwargs, config_kwargs):
        if options.get("trust_remote_code") or options.get("use_safetensors") is False:
            raise ValueError(f"Code of a folder is never run, nor are pickled weights loaded; got {dict(options)}.")
    config = _load_config(path, hub, config_kwargs)
    model = Qwen2VLModel.from_pretrained(path, config=config, **{**hub, "use_safetensors": True, **model_kwargs})
    tokenizer_kwargs = {key: value for key, value in processor_kwargs.items() if key not in _PIXEL_KEYS}
    pixels = {key: value for key, value in processor_kwargs.items() if key in _PIXEL_KEYS}
    tokenizer = AutoTokenizer.from_pretrained(path, **{**hub, **tokenizer_kwargs})
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path, **hub, **pixels)
    low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    if not 0 < low <= high:
        raise ValueError(f"min_pixels is {low} and max_pixels {high}; allowed is 0 < min_pixels <= max_pixels.")
    return model, tokenizer, image_processor


def _load_config(path: str, hub: Mapping[str, Any], config_kwargs: Mapping[str, Any]) -> Any:
    """The configuration of a checkpoint, or of the base model that a LoRA adapter's folder names."""
    where = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    if find_adapter_config_file(path, **where) is not None:
        path = require("peft", "lora").PeftConfig.from_pretrained(path, **where).base_model_name_or_path
    config = AutoConfig.from_pretrained(path, **{**hub, **config_kwargs})
    if config.model_type != MODEL_TYPE:
        raise ValueError(f"{path!r} holds a model of type {config.model_type!r}; allowed is {MODEL_TYPE!r} (Qwen2-VL).")
    return config


@torch.no_grad()
def _start_rows_at_mean(model: Qwen2VLModel, known: int, total: int) -> None:
    """Give the new tokens' rows the mean of the known ones; the matrix grows only where it is too short.

    Qwen2-VL's matrix has more rows than its tokenizer has tokens, so resizing to the tokenizer would shrink it.
    """
    if total > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(total, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    weight[known:total] = weight[:known].float().mean(dim=0).to(weight.dtype)


def _text_limit(processing_kwargs: Mapping[str, Mapping[str, Any]] | None) -> int | None:
    given = {f"{kind}.{key}" for kind, options in (processing_kwargs or {}).items() for key in options}
    if unknown := sorted(given - {"text.max_length"}):
        raise ValueError(f"processing_kwargs has {unknown}; allowed is {{'text': {{'max_length': int}}}}.")
    return (processing_kwargs or {}).get("text", {}).get("max_length")


def _image_keys(images: Sequence[Sequence[Image.Image]]) -> Tensor:
    keys = torch.zeros(len(images), MAX_IMAGES, dtype=torch.int64)
    for index, row in enumerate(images):
        keys[index, : len(row)] = torch.tensor([image_key(image) for image in row], dtype=torch.int64)
    return keys
