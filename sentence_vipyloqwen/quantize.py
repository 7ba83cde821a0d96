"""Dynamic int8 of the linear layers, for inference on a CPU: ``ViPyloQwen(path, quantize="int8")``.

The work is torchao's (``Int8DynamicActivationInt8WeightConfig``): weights are int8 with a scale for each output
channel, activations become int8 as they come, with a scale for each token. A packed batch needs a scale of each token's
own: ``torch.ao.quantization.quantize_dynamic``, deprecated, has one for the whole batch, so that a row's vector would
depend on the rows beside it.

When it pays. Times faster than float32 (``encode``, CPU time, one thread of a Xeon with AMX, torch 2.15.0, torchao
0.18.0, without ``torch.compile``, random weights, medians) and the lowest cosine to float32; widths are of the language
model / vision tower. ``benchmarks/encode_vs_stock.py --int8`` measures the ratio and the cosine of its own model.

==============  =========  =========  =========  ======
widths          text       images     mixed      cosine
==============  =========  =========  =========  ======
1536 / 1280     1.7 - 2.0  2.0        2.4        0.9996
384 / 256       0.8 - 1.0  0.9        1.0        0.9994
==============  =========  =========  =========  ======

So it pays at the widths of Qwen2-VL-2B (here 2 layers of each tower) and NOT for narrow models, where scaling costs
what the product saves. A CPU with bfloat16 products (AMX, AVX512-BF16) is served better by
``model_kwargs={"dtype": "bfloat16"}``: on the same machine 3.3 to 3.9 times (wide) and 2.2 to 2.5 times (narrow) on
images and text, with a cosine above 0.9999. int8 is for CPUs without them, which were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.hashing import hash_tensors

QUANTIZE_MODES = ("int8",)
"""What ``quantize`` may be, besides None."""

Model = TypeVar("Model", bound="QuantizableMixin")


@dataclass(frozen=True)
class Quantization:
    """How a model was quantised.

    Attributes:
        mode: One of :data:`QUANTIZE_MODES`.
        float_weights: Hash of the weights that it was made of, for the fingerprint of an index.
    """

    mode: str
    float_weights: str


def check_request(quantize: str | None, device: str | torch.device | None) -> None:
    """Refuse what cannot be done before anything is loaded.

    Raises:
        ValueError: If the mode is unknown, or the device is not a CPU.
        ImportError: If torchao is missing; the message names the extra.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZE_MODES:
        raise ValueError(f"quantize is {quantize!r}; allowed are None and {', '.join(map(repr, QUANTIZE_MODES))}.")
    _check_device(device)
    require("torchao", "int8")


def quantize_int8(model: Model) -> Model:
    """Make the linear layers of the language model and of the vision tower int8, in place.

    The dense head stays float: it is too small to gain.

    Raises:
        ValueError: If the model has an adapter, is not on a CPU, or is quantised already.
        ImportError: If torchao is missing; the message names the extra.
    """
    _check_quantizable(model)
    torchao = require("torchao.quantization", "int8")
    origin = Quantization("int8", hash_tensors(model.state_dict().items()))
    backbone = model[0].model
    torchao.quantize_(backbone, torchao.Int8DynamicActivationInt8WeightConfig())
    for module in backbone.modules():
        vars(module).pop("extra_repr", None)  # torchao's, which cannot be pickled
    model.requires_grad_(False)
    model.eval()
    model.quantization = origin
    return model


def _check_quantizable(model: QuantizableMixin) -> None:
    model.refuse_if_quantized("quantised again")
    _check_device(model.device)
    if getattr(model[0].model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "A model with an adapter cannot be quantised: merge the adapter into its base, save that model, and load "
            'it with quantize="int8".'
        )


def _check_device(device: str | torch.device | None) -> None:
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f'A model of quantize="int8" runs on "cpu" only; the device given is {str(device)!r}.')


class QuantizableMixin(SentenceTransformer):
    """A ``SentenceTransformer`` that, once quantised, refuses what a quantised model cannot do.

    Attributes:
        quantization: How the model was quantised; None for a float model.
    """

    quantization: Quantization | None = None

    def refuse_if_quantized(self, what: str) -> None:
        """Raise ``ValueError`` if this model is quantised."""
        if self.quantization is not None:
            raise ValueError(
                f"A model of quantize={self.quantization.mode!r} cannot be {what}: it is for inference on a CPU. "
                "Load the model without quantize for that."
            )

    def train(self: Model, mode: bool = True) -> Model:
        """As ``nn.Module.train``; ``ValueError`` if a quantised model is to be trained."""
        if mode:
            self.refuse_if_quantized("trained")
        return super().train(mode)

    def to(self: Model, *args: Any, **kwargs: Any) -> Model:
        """As ``nn.Module.to``; ``ValueError`` if a quantised model is to leave the CPU or change its dtype."""
        if self.quantization is not None:
            for target in (*args, *kwargs.values()):
                if isinstance(target, (str, torch.device)):
                    _check_device(target)
                elif isinstance(target, torch.dtype):
                    self.refuse_if_quantized(f"cast to {target}")
        return super().to(*args, **kwargs)

    def cuda(self: Model, device: int | torch.device | None = None) -> Model:
        """As ``nn.Module.cuda``; ``ValueError`` if the model is quantised."""
        self.refuse_if_quantized("moved to a GPU")
        return super().cuda(device)

    def share_memory(self: Model) -> Model:
        """As ``nn.Module.share_memory``, with which ``encode`` in several processes begins.

        Raises:
            ValueError: If the model is quantised: torchao's tensors would end the process with a segmentation fault.
        """
        self.refuse_if_quantized("shared by several processes")
        return super().share_memory()

    def save(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """As ``SentenceTransformer.save``; ``ValueError``, with nothing written, if the model is quantised."""
        self.refuse_if_quantized("saved")
        super().save(path, *args, **kwargs)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As ``SentenceTransformer.add_adapter``; ``ValueError`` if the model is quantised."""
        self.refuse_if_quantized("given an adapter")
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As ``SentenceTransformer.load_adapter``; ``ValueError`` if the model is quantised."""
        self.refuse_if_quantized("given an adapter")
        super().load_adapter(*args, **kwargs)
