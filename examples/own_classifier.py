"""Compress a classifier that was trained elsewhere, on your own csv: `python examples/own_classifier.py`.

Here the csv is written and the classifier trained first, which takes half a minute; replace both by your own.
"""

import csv
import random

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compress

# Your data: a text and a label in each row. Validation and test are held out, because there is one file.
words = {"positive": ["fresh", "warm", "quick", "kind"], "negative": ["stale", "cold", "late", "rude"]}
draw = random.Random(0)
with open("reviews.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["review", "label"])
    for visit in range(1000):
        label, what = draw.choice(list(words)), draw.choice(["food", "room", "staff", "tea"])
        rows.writerow([f"On visit {visit} the {what} was {draw.choice(words[label])}.", label])
task = {"task": "files", "path": "reviews.csv", "columns": {"text": "review"}}
hardware = {"accelerator": "cpu", "latency": {"seconds": 0.1, "memory": False}}

# Your classifier: any folder that transformers opens.
theirs = compress.compress("tiny", task=task, hardware=hardware, output="trained").artifact

# It is the baseline as it is (`epochs: 0`), and each chain is compared with it.
for technique in ("gptq", "onnx"):
    result = compress.compress(
        theirs, technique, task=task, baseline={"epochs": 0}, hardware=hardware, output=f"compressed/{technique}"
    )
    print(result.table[["method", "accuracy", "size_mb", "latency_ms"]].to_string(index=False))

# The artifact of `gptq` opens without compress.
model = AutoModelForSequenceClassification.from_pretrained("compressed/gptq/artifact")
tokenizer = AutoTokenizer.from_pretrained("compressed/gptq/artifact")
logits = model(**tokenizer("On visit 7 the tea was warm.", return_tensors="pt")).logits
answer = model.config.id2label[int(logits.argmax())]
print(answer)
