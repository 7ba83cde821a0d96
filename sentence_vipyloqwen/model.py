"""``ViPyloQwen``: a SentenceTransformer of our modules, saved as a folder that plain Sentence Transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from sentence_transformers.util import batch_to_device, fullname, load_file_path, truncate_embeddings
from torch import Tensor, nn
from tqdm.autonotebook import tqdm

from sentence_vipyloqwen.model_card import EXAMPLE, ViPyloQwenModelCardData
from sentence_vipyloqwen.modules import AttentionPooling, DenseHead, MeanPooling, Qwen2VLTransformer
from sentence_vipyloqwen.modules.batching import Load, batch_budget
from sentence_vipyloqwen.modules.encoding import embed
from sentence_vipyloqwen.modules.inputs import ParsedInput
from sentence_vipyloqwen.modules.qwen2_vl import MAX_PIXELS, MAX_SEQ_LENGTH, MIN_PIXELS
from sentence_vipyloqwen.modules.sharding import inference
from sentence_vipyloqwen.quantize import QuantizableMixin, check_request, quantize_int8
from sentence_vipyloqwen.tasks import PROMPTS

EMBEDDING_DIM = 1024
IMAGE_LENGTH = 1000
"""What an image counts for, in characters, where inputs are sorted by length to batch like with like."""

_HUB_ARGUMENTS = ("token", "cache_folder", "revision", "local_files_only")

_OURS_BY_STOCK_NAME: Mapping[str, type[nn.Module]] = {
    "Transformer": Qwen2VLTransformer,
    "Pooling": MeanPooling,
    "Dense": DenseHead,
}
_STOCK_BY_OURS: Mapping[str, type[nn.Module]] = {
    fullname(Qwen2VLTransformer): Transformer,
    fullname(MeanPooling): Pooling,
    fullname(DenseHead): Dense,
}
_OWN: Mapping[str, type[nn.Module]] = {fullname(AttentionPooling): AttentionPooling}
"""What has no stock counterpart, by the name that it is saved under."""


class ViPyloQwen(QuantizableMixin, SentenceTransformer):
    """One embedding space for text, images, and any mix of text with 1 to 5 images.

    Everything a ``SentenceTransformer`` does, it does: ``encode``, ``similarity``, ``save_pretrained``,
    ``push_to_hub``, training with ``SentenceTransformerTrainer``. What it saves, plain
    ``SentenceTransformer("path")`` loads, without this package and without ``trust_remote_code``. Only a model with
    :class:`~sentence_vipyloqwen.modules.AttentionPooling`, which Sentence Transformers does not have, needs both there.

    ``encode`` computes equal inputs once, and an image that several inputs begin with once for each batch. It forms
    batches within three bounds and takes two of them as further arguments: ``batch_size`` inputs, ``token_budget``
    language-model tokens (by default 1024 on a CPU, 16384 elsewhere) and ``patch_budget`` vision patches (by default 4
    times as many), each for one forward pass. Where memory runs out, it halves the budgets and goes on. Outputs other
    than embeddings know ``batch_size`` alone.

    Args:
        model_name_or_path: Folder or Hub id of a model that this class or plain Sentence Transformers saved, the
            latter also where it was made without this package: its own chat template then renders the inputs, and
            prefixes are plain text. To begin from a checkpoint, use :meth:`create`.
        quantize: ``"int8"`` for int8 linear layers on a CPU (extra ``int8``), for inference only: see
            :mod:`sentence_vipyloqwen.quantize` for when it pays. The folder is not changed.
        **kwargs: The keyword arguments of ``SentenceTransformer``, ``trust_remote_code`` excepted.

    Raises:
        ValueError: If the folder is a bare checkpoint or of another architecture, or if code of a folder is to be run.
            If ``quantize`` is unknown, the device is not a CPU, or the model has an adapter.

    Example::

        model = ViPyloQwen("path")
        model.encode({"image": "invoice.png", "text": "Số tiền?"}, prompt_name="ocr")  # (1024,)
    """

    model_card_data_class = ViPyloQwenModelCardData
    default_huggingface_organization = None  # a mistyped folder is not looked for under another's name

    def __init__(
        self, model_name_or_path: str | Path | None = None, *, quantize: str | None = None, **kwargs: Any
    ) -> None:
        check_request(quantize, kwargs.get("device"))
        if quantize is not None:
            kwargs["device"] = kwargs.get("device") or "cpu"
        if kwargs.get("trust_remote_code"):
            raise ValueError("ViPyloQwen never runs code from a model folder: trust_remote_code=True is not allowed.")
        path = str(model_name_or_path) if model_name_or_path is not None else None
        super().__init__(path, **kwargs)
        self.model_card_data.widget = self.model_card_data.widget or [dict(EXAMPLE)]
        if path is not None and isinstance(self.model_card_data, ViPyloQwenModelCardData):
            hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            self.model_card_data.read_assets(path, self._model_card_text, **hub)
        if quantize is not None:
            quantize_int8(self)

    @classmethod
    def create(
        cls,
        base: str | Path,
        embedding_dim: int = EMBEDDING_DIM,
        *,
        max_seq_length: int = MAX_SEQ_LENGTH,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        seed: int = 0,
        device: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        hub_kwargs: Mapping[str, Any] | None = None,
    ) -> ViPyloQwen:
        """Make a new model of a checkpoint of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

        Adds the five task tokens (the embedding matrix grows only if it must; new rows start at the mean), the prompts
        and the chat template, mean pooling, and a fresh dense head.

        Args:
            base: Hub id, e.g. ``"Qwen/Qwen2-VL-2B-Instruct"``, or local folder of the checkpoint.
            embedding_dim: Dimensions of an embedding.
            max_seq_length: Most tokens of an input; only text is ever cut.
            min_pixels: Fewest pixels of an image after resizing.
            max_pixels: Most pixels of an image after resizing; 28 x 28 of them make one token, 32 x 32 in Qwen3-VL.
            dtype: Of the weights, e.g. ``"bfloat16"``; by default the checkpoint's own.
            attn_implementation: ``"sdpa"``, ``"flash_attention_2"`` or ``"eager"``; by default transformers chooses.
            seed: Seed of the dense head.
            device: Where the model goes; by default the best device at hand.
            model_kwargs: More arguments for transformers' ``from_pretrained``, e.g. a quantisation configuration.
            hub_kwargs: ``token``, ``revision``, ``cache_dir``, ``local_files_only``.

        Raises:
            ValueError: If the base is of another architecture, or a finished model rather than a checkpoint.
        """
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim}; it must be at least 1.")
        if is_finished_model(str(base), hub_kwargs):
            raise ValueError(
                f"{str(base)!r} is a finished model (it has modules.json): load it with ViPyloQwen({str(base)!r}). "
                "create() starts from a checkpoint."
            )
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        transformer = Qwen2VLTransformer.from_base(
            str(base),
            max_seq_length=max_seq_length,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            model_kwargs={**{k: v for k, v in options.items() if v is not None}, **(model_kwargs or {})},
            hub_kwargs=hub_kwargs,
        )
        width = transformer.get_embedding_dimension()
        head = DenseHead(width, embedding_dim, bias=False, activation_function=None)
        head.reset(seed)
        modules = [transformer, MeanPooling(width), head, Normalize()]
        return cls(modules=modules, prompts=dict(PROMPTS), similarity_fn_name="cosine", device=device)

    @property
    def task_token_ids(self) -> dict[str, int]:
        """Task name -> id of its prefix; for ``peft``'s ``trainable_token_indices``, so that an adapter keeps them."""
        return dict(self[0].control.tasks)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn a batch of inputs into features: see :meth:`Qwen2VLTransformer.preprocess`.

        Raises:
            ValueError: If an input is not allowed; the message names its position, what came and what is allowed.
        """
        return self[0].preprocess(inputs, prompt=prompt, **kwargs) if len(inputs) else {}

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run all modules over the features of a batch; what is packed stays so up to the pooling.

        Args:
            input: The features.
            **kwargs: For the modules. With ``padded_output=True`` the result has ``token_embeddings`` (B, L, hidden).
        """
        takes_packed = len(self) > 1 and isinstance(self[1], (MeanPooling, AttentionPooling))
        return super().forward(input, **{"padded_output": not takes_packed, **kwargs})

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a ``peft`` adapter, e.g. a ``LoraConfig``; the five task tokens are trained and saved with it.

        An adapter's folder holds the adapter and names its base, so the base must be a saved model: that of a bare
        checkpoint has no task tokens.

        Args:
            adapter_config: A ``peft`` configuration. ``trainable_token_indices`` is set to the task tokens where it is
                not set.
            adapter_name: Name of the adapter.

        Raises:
            ValueError: If this model was not loaded from a saved one.
        """
        source = self[0].model.config._name_or_path
        if not is_finished_model(source):
            raise ValueError(
                f"An adapter would name {source!r} as its base, which has no task tokens: save this model with "
                "save_pretrained, load it with ViPyloQwen, then add the adapter."
            )
        adapter_config = copy(adapter_config)
        if self.task_token_ids and getattr(adapter_config, "trainable_token_indices", self) is None:
            adapter_config.trainable_token_indices = {"embed_tokens": list(self.task_token_ids.values())}
        super().add_adapter(adapter_config, adapter_name=adapter_name)

    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save a portable folder: ``modules.json`` names Sentence Transformers' own classes only.

        :class:`~sentence_vipyloqwen.modules.AttentionPooling` alone is saved under its own name; see there what
        that asks of who loads it.

        Raises:
            ValueError: If pickled weights are asked for.
        """
        if not safe_serialization:
            raise ValueError("Only safetensors are saved: safe_serialization=False is not allowed.")
        super().save(path, model_name, create_model_card, train_datasets, safe_serialization)
        if path is None:
            return
        _name_stock_classes(Path(path) / "modules.json")
        if create_model_card and isinstance(self.model_card_data, ViPyloQwenModelCardData):
            self.model_card_data.write_assets(Path(path))

    # Private seams, each held by a test that fails when Sentence Transformers moves it.
    #
    # Where batches are formed. For embeddings the loop is our own; what else `encode` may give back is per token, and
    # comes from Sentence Transformers' loop. Inputs are parsed before: a bad one is named by its place with the caller.
    def _inference(
        self,
        inputs: list[Any],
        *,
        batch_size: int,
        prompt: str | None = None,
        output_value: str | None = "sentence_embedding",
        device: str | torch.device | None = None,
        token_budget: int | None = None,
        patch_budget: int | None = None,
        **kwargs: Any,
    ) -> Any:
        parsed = self[0].parse(inputs, prompt)
        target = self._resolve_inference_device(device)
        budget = batch_budget(target.type, batch_size, token_budget, patch_budget)
        if output_value == "sentence_embedding":
            with inference(self):
                return self._embed(parsed, target, budget, **kwargs)
        options = {"prompt": None, "batch_size": batch_size, "output_value": output_value, "device": device, **kwargs}
        return super()._inference(parsed, **{**options, "padded_output": True})

    def _embed(
        self,
        inputs: list[ParsedInput],
        device: torch.device,
        budget: Load,
        *,
        show_progress_bar: bool,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        processing_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def forward(features: dict[str, Any]) -> Tensor:
            embeddings = self(batch_to_device(features, device), **kwargs)["sentence_embedding"]  # (B, D)
            if truncate_dim is not None:
                embeddings = truncate_embeddings(embeddings, truncate_dim)
            if normalize_embeddings:
                embeddings = nn.functional.normalize(embeddings, dim=1)
            return embeddings.cpu() if save_to_cpu else embeddings

        self.eval()
        limit = self[0].token_limit(processing_kwargs)
        with tqdm(total=len(inputs), desc="Inputs", disable=not show_progress_bar) as progress:
            vectors = embed(inputs, self[0], forward, budget, limit, progress.update, ahead=device.type != "cpu")
        return torch.stack(vectors) if vectors else torch.tensor([], device=device)

    @staticmethod
    def _input_length(sample: ParsedInput) -> int:
        return len(sample.text) + IMAGE_LENGTH * len(sample.images)

    # Which class a type of modules.json becomes. `_module_classes` would be the other way, but the trainer replaces it
    # when it reloads a checkpoint or the best model.
    def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> type[nn.Module]:
        if class_ref in _OWN:  # this package's, not code of the folder
            return _OWN[class_ref]
        package, _, name = class_ref.rpartition(".")
        if package.split(".")[0] == "sentence_transformers" and name in _OURS_BY_STOCK_NAME:
            return _OURS_BY_STOCK_NAME[name]
        return super()._load_module_class_from_ref(class_ref, *args, **kwargs)

    # A card that is saved again as it is has the model's id in two snippets; the stock way replaces its own class's.
    def _update_default_model_id(self, model_card: str) -> str:
        new = self.model_card_data.model_id or self._model_card_model_id_placeholder
        return model_card.replace(f'("{self._model_card_model_id_placeholder}"', f'("{new}"')

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{model_name_or_path!r} has no modules.json: it is not a finished model. "
            f"Make one with ViPyloQwen.create({model_name_or_path!r})."
        )


def _name_stock_classes(modules_json: Path) -> None:
    modules = json.loads(modules_json.read_text(encoding="utf-8"))
    for module in modules:
        if stock := _STOCK_BY_OURS.get(module["type"]):
            module["type"] = fullname(stock)
    modules_json.write_text(json.dumps(modules, indent=2), encoding="utf-8")


def is_finished_model(path: str, hub_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder or Hub id is a finished Sentence Transformers model rather than a bare checkpoint."""
    where = {("cache_folder" if key == "cache_dir" else key): value for key, value in (hub_kwargs or {}).items()}
    return load_file_path(path, "modules.json", **where) is not None
