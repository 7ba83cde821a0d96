"""Document intelligence: ask about invoices; find the page, then the field on it.

    python examples/document_intelligence.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives drawn invoices, their index, and results.html: each question beside the pages that were found.

1. Index pages as pictures. Pieces of print that are known, from a PDF's text layer or an OCR engine, are metadata: kept
   with the page, never embedded. (`VectorIndex.build(model, "a-folder-of-pdfs", ...)` keeps the text of a page so.)
2. A question, or a page that looks like it, finds the page; a condition narrows it down where something is known.
3. Page and question together, under the prefix `ocr`, are what the model was trained to match with the answer. So the
   field is that piece of the page which lies nearest to the two. Nothing is made up: what comes out stands on the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import Hit, SearchResult, write_report

INVOICES = {
    "invoice-0123": {"Khach hang": "Nguyen Van An", "Ngay": "12/05/2024", "TONG CONG": "320.000 d"},
    "invoice-0124": {"Khach hang": "Tran Thi Bich", "Ngay": "03/06/2024", "TONG CONG": "1.250.000 d"},
    "invoice-0125": {"Khach hang": "Le Van Cuong", "Ngay": "21/06/2024", "TONG CONG": "75.000 d"},
}


def draw_invoice(path: Path, fields: dict[str, str]) -> str:
    """Draw names on the left and what was filled in on the right; the path of the page."""
    image = Image.new("RGB", (224, 112), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    pen.text((8, 6), "HOA DON", fill="black", font=font)
    for row, (name, value) in enumerate(fields.items(), 1):
        pen.text((8, 6 + 26 * row), name, fill="black", font=font)
        pen.text((216, 6 + 26 * row), value, fill="black", font=font, anchor="ra")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def find_field(model: ViPyloQwen, page: Hit, question: str) -> tuple[str, float]:
    """The piece of a page that answers a question, and its cosine."""
    asked = model.encode([{"image": page.item["image"], "text": question}], prompt_name="ocr")  # (1, dim)
    pieces = page.item["metadata"]["pieces"]
    scores = model.similarity(asked, model.encode(pieces))[0]  # (pieces,)
    best = int(scores.argmax())
    return pieces[best], float(scores[best])


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
    model = ViPyloQwen(model_path)

    # 1. Pages.
    items = [
        {
            "id": name,
            "image": draw_invoice(output / f"{name}.png", fields),
            "metadata": {"pieces": list(fields.values()), "month": int(fields["Ngay"][3:5])},
        }
        for name, fields in INVOICES.items()
    ]
    index = VectorIndex.build(model, items, output / "index", overwrite=True)

    results = []
    for question, where in (
        ("Tổng cộng bao nhiêu tiền?", "month = 5"),
        ("Tên khách hàng là gì?", "month = 6"),
    ):
        hits = index.search(question, k=2, where=where)  # 2
        field, score = find_field(model, hits[0], question)  # 3
        print(f"{question} ({where})\n  page  {hits[0].score:.4f}  {hits[0].id}\n  field {score:.4f}  {field}")
        results.append(SearchResult(question, hits, where=where))
    print(f"Wrote {write_report(output / 'results.html', results, title='Hỏi hóa đơn', lang='vi')}")
