"""This package's models and tasks in `mteb`, the Massive Text Embedding Benchmark (extra ``mteb``).

`suites.find_tasks` knows every task by name, `offline` holds our own, and `run.run` measures a model on them.
"""

from __future__ import annotations

from sentence_vipyloqwen.extras import require

require("mteb", "mteb")
