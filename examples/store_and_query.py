"""Store vectors of texts, images, images with a description, OCR and VQA items; then query by each of these.

    python examples/store_and_query.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives a few drawn pictures, the index, and results.html: the queries with what they found.

A prefix says what is asked of an image. Documents, descriptions and general queries have none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import SearchResult, write_report

model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")


def draw(name: str, *, text: str = "", circle: str = "") -> str:
    """Draw a text or a filled circle; the path of the picture."""
    image = Image.new("RGB", (168, 84), "white")
    pen = ImageDraw.Draw(image)
    if circle:
        pen.ellipse((54, 12, 114, 72), fill=circle)
    pen.multiline_text((12, 24), text, fill="black")
    output.mkdir(parents=True, exist_ok=True)
    image.save(output / name)
    return str(output / name)


red, green = draw("red.png", circle="red"), draw("green.png", circle="green")
bill, plate = draw("bill.png", text="HOA DON 0123\nTONG CONG 320.000"), draw("plate.png", text="51F-123.45")

# 1. Store. The question of an OCR or VQA item stands behind its prefix.
items = [
    {"id": "text 1", "text": "Hợp đồng này quy định việc cung cấp dịch vụ điện toán đám mây."},
    {"id": "text 2", "text": "Bên B chịu trách nhiệm bảo mật thông tin khách hàng."},
    {"id": "image", "image": red, "metadata": {"kind": "picture"}},
    {"id": "image + description", "image": bill, "text": "Hóa đơn của một cửa hàng nhỏ."},
    {"id": "ocr", "image": bill, "text": "<ocr> Số tiền tổng cộng phải thanh toán là bao nhiêu?"},
    {"id": "vqa", "image": green, "text": "<vqa_single> What color is the shape?"},
]
model = ViPyloQwen(model_path)
index = VectorIndex.build(model, items, output / "index", overwrite=True)

# 2. Query: by a text, an image, an image with a description, an image with a question and its prefix.
results = []
for query, prompt_name in (
    ("Tìm điều khoản bảo mật", None),
    ({"image": green}, None),
    ({"image": bill, "text": "Tìm các hóa đơn có bố cục tương tự"}, None),
    ({"image": plate, "text": "Biển số xe này là gì?"}, "ocr"),
):
    results.append(SearchResult(query, index.search(query, k=3, prompt_name=prompt_name), prompt_name))
    print(f"\n{query}" + (f", asked as {prompt_name}" if prompt_name else ""))
    for hit in results[-1].hits:
        print(f"  {hit.rank}. {hit.score:.4f}  {hit.id}")
print(f"\nWrote {write_report(output / 'results.html', results, lang='vi')}")
