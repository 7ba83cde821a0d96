"""Qwen2-VL and its successors as a Sentence Transformers input module: from inputs to one vector for every token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import InputModule
from torch import Tensor
from transformers import PreTrainedModel, Qwen2VLImageProcessorPil
from transformers.utils import PROCESSOR_NAME

from sentence_vipyloqwen.modules.backbones import BACKBONES
from sentence_vipyloqwen.modules.checkpoint import load_parts, start_rows_at_mean
from sentence_vipyloqwen.modules.closed_images import CLOSED_IMAGES, ROW_INDEX, ClosedImages, RowImages, closed_key
from sentence_vipyloqwen.modules.features import (
    image_features,
    key_table,
    named_image,
    of_images,
    patch_features,
    text_features,
)
from sentence_vipyloqwen.modules.inputs import AnySource, ParsedInput, parse_inputs
from sentence_vipyloqwen.modules.mean_pooling import PACKED_EMBEDDINGS, PACKING
from sentence_vipyloqwen.modules.opening import closed_sizes, cut_image, cut_rows, measured, opened_patches
from sentence_vipyloqwen.modules.packed_forward import (
    PLAN,
    is_prepared,
    prepare,
    run_packed,
    run_vision,
    select_patches,
)
from sentence_vipyloqwen.modules.packing import Packing, content_keys, pack
from sentence_vipyloqwen.modules.padded_forward import run_padded
from sentence_vipyloqwen.modules.patches import CutImage, Grid, ImagePatchCache, to_pixel_values
from sentence_vipyloqwen.modules.rendering import (
    CHAT_TEMPLATE,
    ControlTokens,
    RenderedInput,
    add_task_tokens,
    has_own_template,
    render,
    render_by_template,
)
from sentence_vipyloqwen.modules.stock_config import stock_config, template_options_of
from sentence_vipyloqwen.modules.vision_cache import ShownImage, VisionCache, check_frozen

MAX_SEQ_LENGTH = 8192
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28
"""Pixel budget of one image: 4 to 1280 merged vision tokens, so that five images and a text fit 8192 tokens."""

_HUB_KEYS = ("token", "revision", "local_files_only", "cache_dir", "subfolder")


class Qwen2VLTransformer(InputModule):
    """Reads text, images and mixes of both, and runs the model over them: Qwen2-VL, or another of
    :data:`~sentence_vipyloqwen.modules.backbones.BACKBONES`.

    Its files are those of Sentence Transformers' own ``Transformer``, so that class loads what this one saved. It uses
    the tokenizer and the PIL image processor alone and never imports torchvision.

    Args:
        model: The transformers model, without a language-modelling head.
        tokenizer: Its tokenizer, task tokens included.
        image_processor: Its image processor, which holds the pixel budget.
        template_options: Further arguments of the chat template of a model that was made elsewhere.

    Attributes:
        allow_urls: Whether image URLs are fetched; ``False`` by default.
        jpeg_draft: Whether a JPEG far larger than the pixel budget is decoded at a fraction of its size, which is
            faster but not exact: see :func:`~sentence_vipyloqwen.modules.images.open_image`. ``False`` by default.
        lazy_images: Whether :meth:`preprocess` leaves images closed and :meth:`forward` opens them, so that a loss that
            runs a batch by mini-batches holds the pixels of one alone. They are then opened in the training process,
            and one that cannot be decoded is found in the step. ``False`` by default: patches are bytes, and data
            loader workers cut them ahead.
        vision_cache: Where the output of a frozen vision tower is kept, for packed batches; with :attr:`lazy_images` an
            image that it holds is not even opened. ``None`` by default.
        packed: Whether batches are packed, which changes no value: by default with every attention that can. Under
            dropout rows then share the masks of what they share; ``False`` gives each row its own.
    """

    config_file_name = "sentence_bert_config.json"
    save_in_root = True
    # `encode` may be given the budgets, which ViPyloQwen takes; it gives `forward` the other.
    forward_kwargs = {"token_budget", "patch_budget", "padded_output"}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        image_processor: Qwen2VLImageProcessorPil,
        allow_urls: bool = False,
        jpeg_draft: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.allow_urls = allow_urls
        self.jpeg_draft = jpeg_draft
        self.lazy_images = False
        self.vision_cache: VisionCache | None = None
        self.packed = prepare(model)
        self.template_options = dict(template_options or {})
        self.control = (ControlTokens.without_tasks if self._by_template else ControlTokens.of)(tokenizer)
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
        """Turn a batch of inputs into features: parse, :meth:`render` and :meth:`collate` them.

        Args:
            inputs: B inputs; see :data:`sentence_vipyloqwen.modules.inputs.ALLOWED_INPUTS`.
            prompt: Text put in front of each input's text.
            processing_kwargs: This call's own limit: ``{"text": {"max_length": 512}}``.
            max_length: The same limit as the trainer passes it.
            **kwargs: Accepted for Sentence Transformers' sake (``task``), without effect.

        Returns:
            The features of :meth:`collate`; with :attr:`lazy_images` those of :meth:`collate_closed`.

        Raises:
            ValueError: If an input is not allowed or its images do not fit the limit; the message names its position.
        """
        limit = self.token_limit(processing_kwargs, max_length)
        try:
            rows = self.render(self.parse(inputs, prompt), limit)
            return self.collate_closed(rows) if self.lazy_images else self.collate(rows)
        except TypeError as error:  # Sentence Transformers would swallow it and call again, without the prompt
            raise RuntimeError(f"preprocessing failed: {error}") from error

    @property
    def _by_template(self) -> bool:
        return has_own_template(self.tokenizer)

    def parse(self, inputs: Sequence[Any], prompt: str | None = None) -> list[ParsedInput]:
        """Read a batch of inputs, as this model's rows are rendered; what is parsed already is kept as it is.

        Args:
            inputs: The inputs.
            prompt: Text put in front of each input's own; for a model with a chat template of its own, the message of
                the system.

        Raises:
            ValueError: If an input is not allowed; the message names its position.
        """
        return parse_inputs(inputs, prompt, as_written=self._by_template)

    def token_limit(
        self, processing_kwargs: Mapping[str, Mapping[str, Any]] | None = None, max_length: int | None = None
    ) -> int:
        """Most tokens of an input in one call: its own limit where it has one, else :attr:`max_seq_length`.

        Args:
            processing_kwargs: ``{"text": {"max_length": 512}}``.
            max_length: The same limit as the trainer passes it.

        Raises:
            ValueError: If ``processing_kwargs`` has anything else, or the limit is not a whole number, at least 1.
        """
        limits = [limit for limit in (_text_limit(processing_kwargs), max_length) if limit is not None]
        limit = limits[0] if limits else self.max_seq_length
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_length is {limit!r}; allowed is a whole number of tokens, at least 1.")
        return limit

    def render(self, inputs: Sequence[ParsedInput], max_length: int) -> list[RenderedInput]:
        """Turn inputs into rows of token ids; images tell their sizes, none is decoded.

        Args:
            inputs: Parsed inputs.
            max_length: Most tokens of a row; only text is cut to fit.

        Returns:
            A row for each input. An image of a URL is fetched now and kept for the rows, on disk if there are many.

        Raises:
            ValueError: If an image's header cannot be read, or an input's images do not fit the limit.
        """
        items, grids = measured(inputs, self.image_processor, self.allow_urls)
        to_rows = partial(render_by_template, options=self.template_options) if self._by_template else render
        return to_rows(items, grids, self.tokenizer, self.control, self.image_processor.merge_size, max_length)

    def collate(self, rows: Sequence[RenderedInput], opened: ImagePatchCache | None = None) -> dict[str, Tensor]:
        """Turn rendered rows into features; each of their images is opened, resized and cut once.

        Args:
            rows: B rows.
            opened: Images of the batch before, which need not be opened again; receives this batch's.

        Returns:
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (B, L) int64, padded on the right; ``image_keys``
            (B, 5) int64, 0 = no image; and where the batch has I > 0 images of P patches in all: ``pixel_values``
            (P, 588) uint8, which :meth:`forward` normalises, ``image_grid_thw`` (I, 3) and ``num_images_per_sample``
            (B,) int64. An image that occurs twice has its patches twice, as in the stock features.

        Raises:
            ValueError: If an image cannot be decoded; the message names its input and position.
        """
        images = [RowImages.of(row) for row in rows]
        cut_images = cut_rows(images, self._cut, opened)
        return self._text_features(rows) | image_features(images, cut_images) | patch_features(cut_images)

    def collate_packed(self, rows: Sequence[RenderedInput], opened: ImagePatchCache | None = None) -> dict[str, Any]:
        """Turn rendered rows into features and plan their packed sequence, for a :meth:`forward` that takes them whole.

        Args:
            rows: B rows.
            opened: As for :meth:`collate`.

        Returns:
            As :meth:`collate`, but that each different image has its patches once, in the order of ``plan``, a
            :class:`Packing` on the CPU. Where batches are not packed, the features of :meth:`collate`.

        Raises:
            ValueError: If an image cannot be decoded; the message names its input and position.
        """
        if not self._packs:
            return self.collate(rows, opened)
        images = [RowImages.of(row) for row in rows]
        cut_images = cut_rows(images, self._cut, opened)
        features: dict[str, Any] = self._text_features(rows) | image_features(images, cut_images)
        plan = pack(features, self.image_processor.merge_size, self.control.image_pad)
        return features | {PLAN: plan} | patch_features(cut_images, plan.images)

    def collate_closed(self, rows: Sequence[RenderedInput]) -> dict[str, Any]:
        """Turn rendered rows into features without opening their images.

        Args:
            rows: B rows.

        Returns:
            As :meth:`collate`, but for pixels and grids. Where the batch has images, ``image_keys`` are those of
            :func:`closed_key`, and ``closed_images`` with ``row_index`` (B,) int64 say what to open.

        Raises:
            ValueError: If a file cannot be read; the message names its input and position.
        """
        images = tuple(RowImages.of(row) for row in rows)
        keys = of_images(images, lambda source, _: closed_key(source))
        features = self._text_features(rows) | {"image_keys": key_table(keys)}
        if any(keys):
            features |= {CLOSED_IMAGES: ClosedImages(images), ROW_INDEX: torch.arange(len(rows))}
        return features

    def cut_closed(self, row: RowImages, position: int) -> Tensor:
        """Open a closed image, resize it and cut it.

        Args:
            row: The images of its row.
            position: Its place among them.

        Returns:
            (P, 588) uint8.

        Raises:
            ValueError: If it cannot be decoded; the message names its input and position.
        """
        with named_image(row, position):
            return self._cut(row.sources[position], row.grids[position]).patches

    def _cut(self, source: AnySource, grid: Grid) -> CutImage:
        return cut_image(source, grid, self.image_processor, self.jpeg_draft)

    def _text_features(self, rows: Sequence[RenderedInput]) -> dict[str, Tensor]:
        return text_features(rows, self.control, self.tokenizer.pad_token_id)

    @property
    def _packs(self) -> bool:
        """Whether batches are packed now: as asked for, and as the model's attention allows."""
        return self.packed and is_prepared(self.model)

    # --- what comes out -----------------------------------------------------------------------------------------------

    def forward(self, features: dict[str, Any], padded_output: bool = True, **kwargs: Any) -> dict[str, Any]:
        """Add the last layer's output to the features.

        Args:
            features: What :meth:`preprocess` or Sentence Transformers' own module made of a batch.
            padded_output: Whether the output is padded, as whatever may follow expects it; this package's poolings
                do without.
            **kwargs: Accepted for Sentence Transformers' sake, without effect.

        Returns:
            The features with ``token_embeddings`` (B, L, hidden); or, if the batch is packed and the output not to be
            padded, with ``packing`` and ``packed_embeddings`` (T, hidden).
        """
        if CLOSED_IMAGES in features:
            features = {**features, **closed_sizes(features)}
        if not self._packs:
            features["token_embeddings"] = self._forward_padded(features)
            return features
        packing = self._plan(features)
        tokens = run_packed(self.model, packing, features["input_ids"], self._vision(features, packing))
        if padded_output:
            features["token_embeddings"] = packing.pad(tokens)
        else:
            features |= {PACKING: packing, PACKED_EMBEDDINGS: tokens}
        return features

    def _vision(self, features: Mapping[str, Any], packing: Packing) -> Tensor | None:
        """(merged patches, hidden) of the different images of a batch; ``None`` without images."""
        if not packing.images:
            return None
        if self.vision_cache is None:
            return self._see(features, packing, range(len(packing.images)))
        return self._see_once(features, packing, self.vision_cache)

    def _see(self, features: Mapping[str, Any], packing: Packing, places: Sequence[int]) -> Tensor:
        """(merged patches, hidden) of some of the different images, by their places among ``packing.images``."""
        if CLOSED_IMAGES in features:
            patches = opened_patches(features, [packing.images[place] for place in places], self.cut_closed)
        else:
            patches = select_patches(features, packing, places)
        grids = [packing.grids[place] for place in places]
        return run_vision(self.model, self._normalised(patches, frames=1), grids)

    @torch.compiler.disable  # it reads and writes files
    def _see_once(self, features: Mapping[str, Any], packing: Packing, cache: VisionCache) -> Tensor:
        """As :meth:`_see` of all, but only what the cache does not hold is opened and computed."""
        tower = self.model.visual
        check_frozen(tower)
        keys, device = content_keys(features), features["input_ids"].device
        grids = [(down, across) for _, down, across in packing.grids]
        images = [ShownImage(int(keys[image]), grid) for image, grid in zip(packing.images, grids, strict=True)]
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else tower.dtype
        return cache.features(images, lambda places: self._see(features, packing, places), dtype).to(device)

    @torch.compiler.disable  # the plan is a different one for each batch
    def _plan(self, features: Mapping[str, Any]) -> Packing:
        if PLAN in features:
            return features[PLAN].to(features["input_ids"].device)
        return pack(features, self.image_processor.merge_size, self.control.image_pad)

    def _forward_padded(self, features: Mapping[str, Any]) -> Tensor:
        """(B, L, hidden): the plain call of the transformers model, to which the packed one is held."""
        pixel_values = features.get("pixel_values")
        if CLOSED_IMAGES in features and "image_grid_thw" in features:
            pixel_values = opened_patches(features, range(len(features["image_grid_thw"])), self.cut_closed)
        return run_padded(self.model, features, self._normalised(pixel_values))

    def _normalised(self, patches: Tensor | None, frames: int | None = None) -> Tensor | None:
        """Our own uint8 patches in floats; the stock's floats as they are."""
        if patches is None or patches.dtype != torch.uint8:
            return patches
        return to_pixel_values(patches, self.image_processor, frames)

    def get_embedding_dimension(self) -> int:
        """Width of a token embedding."""
        return self.model.config.get_text_config().hidden_size

    # --- from and to a folder -----------------------------------------------------------------------------------------

    def get_config_dict(self) -> dict[str, Any]:
        """What Sentence Transformers' ``Transformer`` reads; without ``message`` it would be text only."""
        return stock_config(self.template_options)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write weights (safetensors), tokenizer, image processor, chat template and module configuration."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.image_processor.save_pretrained(output_path)
        # By this the stock path finds the processor even beside a LoRA adapter, where there is no config.json.
        processor_class = BACKBONES[self.model.config.model_type].processor_class
        Path(output_path, PROCESSOR_NAME).write_text(json.dumps({"processor_class": processor_class}))
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
            model_kwargs: For transformers' ``from_pretrained``: ``dtype``, ``attn_implementation``, ...
            processor_kwargs: For the tokenizer, and ``min_pixels`` / ``max_pixels`` for the image processor.
            config_kwargs: For the configuration.
            backend: ``"torch"``; there is no other.
            **kwargs: Accepted for Sentence Transformers' sake, without effect.

        Raises:
            ValueError: If the folder holds another architecture, if it has neither the task tokens nor a chat template
                of its own, or a configuration by which it is not run here, if another backend is asked for, or if code
                of the folder or pickled weights are.
        """
        if backend != "torch":
            raise ValueError(f"backend is {backend!r}; allowed is 'torch'.")
        hub = dict(
            zip(_HUB_KEYS, (token, revision, local_files_only, cache_folder, subfolder), strict=True),
            trust_remote_code=False,
        )
        parts = load_parts(model_name_or_path, hub, model_kwargs or {}, processor_kwargs or {}, config_kwargs or {})
        where = {"token": token, "revision": revision, "local_files_only": local_files_only, "subfolder": subfolder}
        config = cls.load_config(model_name_or_path, cache_folder=cache_folder, **where)
        return cls(*parts, template_options=template_options_of(config, model_name_or_path))

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
        """Make the module of a checkpoint: add the task tokens and give their rows a start.

        Args:
            base: Hub id or local folder of a checkpoint of a type in ``BACKBONES``.
            max_seq_length: Most tokens of an input.
            min_pixels: Fewest pixels of an image after resizing.
            max_pixels: Most pixels of an image after resizing.
            model_kwargs: For transformers' ``from_pretrained``.
            hub_kwargs: ``token``, ``revision``, ``cache_dir``, ``local_files_only``.

        Raises:
            ValueError: If the checkpoint is of another architecture.
        """
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        hub = {**(hub_kwargs or {}), "trust_remote_code": False}
        model, tokenizer, image_processor = load_parts(base, hub, model_kwargs or {}, pixels, {})
        known = len(tokenizer)
        add_task_tokens(tokenizer)
        start_rows_at_mean(model, known, len(tokenizer))
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.model_max_length = max_seq_length
        return cls(model, tokenizer, image_processor)


def _text_limit(processing_kwargs: Mapping[str, Mapping[str, Any]] | None) -> int | None:
    given = {f"{kind}.{key}" for kind, options in (processing_kwargs or {}).items() for key in options}
    if unknown := sorted(given - {"text.max_length"}):
        raise ValueError(f"processing_kwargs has {unknown}; allowed is {{'text': {{'max_length': int}}}}.")
    return (processing_kwargs or {}).get("text", {}).get("max_length")
