"""Retrieval-augmented generation over pages and texts: find what a question needs, and hand it to any language model.

    python examples/multimodal_rag.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives drawn pages, an index of them and of some texts, and messages.json: the question with what was found, in the
form of chat messages that OpenAI's interface and the servers after it (vLLM, Ollama, llama.cpp) take, images included.

1. Index pages as they look, beside texts. Nothing is read off the pages: the model embeds the picture.
2. Find the nearest to the question, of either kind.
3. Put them before the question, each under a number to cite, and ask for an answer by these alone.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import Hit

MOST_LETTERS = 4000
"""Of all texts together: a language model reads only so much."""


def draw_page(path: Path, text: str) -> str:
    """Draw lines of print; the path of the page."""
    image = Image.new("RGB", (224, 112), "white")
    ImageDraw.Draw(image).multiline_text((12, 12), text, fill="black", spacing=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def content_of(number: int, hit: Hit, letters: int) -> list[dict[str, Any]]:
    """A source as parts of a message: its number and name, its text, its images."""
    parts = [{"type": "text", "text": f"[{number}] {hit.id}\n{hit.item['text'][:letters]}".strip()}]
    for path in hit.item["image"]:
        address = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return parts


def messages_for(question: str, hits: Iterable[Hit]) -> list[dict[str, Any]]:
    """The conversation that asks a language model to answer by these sources alone."""
    content, letters = [], MOST_LETTERS
    for number, hit in enumerate(hits, 1):
        content += content_of(number, hit, letters)
        letters = max(letters - len(hit.item["text"]), 0)
    rule = (
        "Trả lời chỉ bằng các nguồn đã cho, dẫn số của nguồn, ví dụ [1]. Nếu nguồn không có câu trả lời, hãy nói vậy."
    )
    return [
        {"role": "system", "content": rule},
        {"role": "user", "content": [*content, {"type": "text", "text": question}]},
    ]


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")

    # 1. Pages and texts in one index.
    items = [
        {"id": "bill, page 1", "image": draw_page(output / "bill-1.png", "HOA DON 0123\nTONG CONG: 320.000 d")},
        {"id": "bill, page 2", "image": draw_page(output / "bill-2.png", "GHI CHU\nGIAO HANG NGAY 12/05")},
        {"id": "contract, 4", "text": "Điều 4. Bên A thanh toán trong 30 ngày kể từ ngày nhận hóa đơn."},
        {"id": "contract, 7", "text": "Điều 7. Bên B chịu trách nhiệm bảo mật thông tin khách hàng."},
    ]
    index = VectorIndex.build(ViPyloQwen(model_path), items, output / "index", overwrite=True)

    # 2. What does the question need?
    question = "Phải thanh toán hóa đơn trong bao lâu?"
    hits = index.search(question, k=3)
    print(question)
    for hit in hits:
        print(f"  {hit.rank}. {hit.score:.4f}  {hit.id}")

    # 3. Any language model that reads images goes on from here:
    #    OpenAI(base_url=...).chat.completions.create(model=..., messages=messages)
    messages = messages_for(question, hits)
    (output / "messages.json").write_text(json.dumps(messages, ensure_ascii=False, indent=2), encoding="utf-8")
    print(f"Wrote {output / 'messages.json'}")
