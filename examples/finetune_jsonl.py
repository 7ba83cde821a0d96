"""Fine-tune a model on your own JSONL records with Sentence Transformers' own trainer; load it without this package.

    python examples/finetune_jsonl.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. (Of a bare Qwen2-VL checkpoint make
one with ViPyloQwen.create.) OUTPUT (example-output by default) receives the records, the checkpoints and the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen, load_tasks

model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
output.mkdir(parents=True, exist_ok=True)

# 1. Records, one JSON object a line. Image paths are relative to the file; the task selects prefix and losses.
records = [
    {"task": "text_pair", "anchor": "một con mèo đen", "positive": "a black cat", "score": 0.95},
    {"task": "text_pair", "anchor": "trời đang mưa", "positive": "it is a sunny day", "score": 0.4},
    {"task": "instr", "anchor": "Dịch sang tiếng Anh: cảm ơn", "positive": "thank you"},
    {"task": "instr", "anchor": {"text": ["Thủ đô của Việt Nam?", "Hà Nội.", "Của Pháp?"]}, "positive": "Paris"},
]
for color, other in (("red", "blue"), ("blue", "green"), ("green", "red")):
    Image.new("RGB", (56, 56), color).save(output / f"{color}.png")
    question = {"image": f"{color}.png", "text": "What color is it?"}
    records.append({"task": "vqa_single", "anchor": question, "positive": color, "negative": other})
    records.append({"anchor": {"image": f"{color}.png"}, "positive": f"a {color} square"})  # no task: a caption
lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
(output / "train.jsonl").write_text("".join(lines), encoding="utf-8")

# 2. The stock trainer. The loss finds the task of each row by its prefix.
model = ViPyloQwen(model_path)
arguments = SentenceTransformerTrainingArguments(
    output_dir=str(output / "checkpoints"),
    max_steps=4,  # for your own data: num_train_epochs
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
train_dataset = load_tasks(output / "train.jsonl")
SentenceTransformerTrainer(model, arguments, train_dataset=train_dataset, loss=PrefixRoutedLoss(model)).train()
model.save_pretrained(str(output / "model"))

# 3. What was saved is a plain Sentence Transformers model.
query = {"image": str(output / "red.png"), "text": "What color is it?"}
vectors = [
    load(str(output / "model")).encode(query, prompt_name="vqa_single") for load in (SentenceTransformer, ViPyloQwen)
]
print(f"Saved {output / 'model'}; cosine of stock and ours: {vectors[0] @ vectors[1]:.6f}")
