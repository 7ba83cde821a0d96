from __future__ import annotations

import pytest
from transformers.integrations import deepspeed

from sentence_vipyloqwen.modules.whole_weights import whole_weights


class Zero3:
    """As much of DeepSpeed's configuration as transformers looks at."""

    def is_zero3(self) -> bool:
        return True


def test_zero3_is_out_of_sight_for_a_while() -> None:
    configuration = Zero3()
    deepspeed.set_hf_deepspeed_config(configuration)
    try:
        with pytest.raises(OSError, match="half"), whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            raise OSError("half")
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    with whole_weights():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert not deepspeed.is_deepspeed_zero3_enabled()
