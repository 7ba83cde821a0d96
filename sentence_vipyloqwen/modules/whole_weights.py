"""Loading a model whole where transformers would shard it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """Have ``from_pretrained`` give this process whole weights under DeepSpeed's ZeRO-3, too.

    transformers shards a model that it loads as soon as there is a configuration of ZeRO-3, whatever its
    ``zero3_init_flag``. New tokens' rows are means over the embedding matrix, and a model that one process loads for
    itself finds no others to share with.
    """
    known = deepspeed._hf_deepspeed_config_weak_ref  # a private seam, held by a test: there is no other way to ask
    configuration = known() if known is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if configuration is not None:
            deepspeed.set_hf_deepspeed_config(configuration)
