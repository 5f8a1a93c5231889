"""Compress an embedding model for search, and the index with it: `python examples/search_embeddings.py`.

The model is tiny and trained for a moment on generated pairs; `model="minilm", task="retrieval"` with a `path` is real.
"""

import torch

import compress

result = compress.compress(
    "tiny",
    "onnx",
    task={"task": "toy_embedding", "limit": {"train": 512, "validation": 64, "test": 128}},
    onnx={"precision": "int8_dynamic"},
    baseline={"epochs": 1},
    hardware={"accelerator": "cpu", "latency": {"seconds": 0.1, "memory": False}},
    output="search",
)
# What smaller vectors would cost is in the same table: numbers of 8 bits, signs alone.
print(result.table[["method", "size_mb", "spearman", "spearman_int8", "spearman_binary"]].to_string(index=False))

# The graph pools and scales inside: its logits are vectors of length 1.
model, tokenizer, _ = compress.load(result.artifact)


def embed(texts: list[str]) -> torch.Tensor:
    """Return a vector for each text."""
    return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


documents = ["the food was great", "the food was awful", "the room was rather good", "the staff was not bad"]
index = embed(documents) > 0  # a bit for each number
query = embed(["the meal was great"]) > 0
same = (index == query).float().mean(1)  # the share of signs that agree
ranking = [documents[i] for i in same.argsort(descending=True)]
print(ranking)
