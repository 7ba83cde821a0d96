"""Compare two lists of images, and two lists of texts: a matrix of cosines for each pair of lists.

    python examples/compare_lists.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives the drawn pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from sentence_vipyloqwen import ViPyloQwen

model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
output.mkdir(parents=True, exist_ok=True)


def draw(color: str, shape: str) -> Path:
    """Draw a shape on white; the path of the picture."""
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((16, 16, 48, 48), fill=color)
    image.save(output / f"{color}-{shape}.png")
    return output / f"{color}-{shape}.png"


model = ViPyloQwen(model_path)

# A path is an image, as a PIL image or an array is; a str is always a text.
rows, columns = [draw("red", "circle"), draw("blue", "rectangle")], [draw("brown", "circle"), draw("teal", "rectangle")]
matrix = model.similarity(model.encode(rows), model.encode(columns))  # (2, 2)
print("Images:", *(path.stem for path in rows), "against", *(path.stem for path in columns))
print(matrix)

# The prefix of text_pair asks how alike two texts are. Without a prompt they are compared as any two inputs.
texts, others = ["Quả táo màu đỏ.", "Bầu trời trong xanh."], ["Trái cây có màu đỏ.", "Màu xanh của bầu trời."]
matrix = model.similarity(
    model.encode(texts, prompt_name="text_pair"), model.encode(others, prompt_name="text_pair")
)  # (2, 2)
print("Texts:", *texts, "against", *others)
print(matrix)
