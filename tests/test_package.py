from __future__ import annotations

import subprocess
import sys

import pytest

import sentence_vipyloqwen


def test_every_public_name_is_there() -> None:
    assert {name: getattr(sentence_vipyloqwen, name).__class__ for name in sentence_vipyloqwen.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sentence_vipyloqwen.nothing  # noqa: B018


def test_help_loads_no_heavy_library() -> None:
    script = (
        "import sys, sentence_vipyloqwen.cli; print([m for m in ('torch', 'faiss', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
