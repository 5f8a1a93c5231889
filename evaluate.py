"""Measures an artifact, or any Hugging Face folder, again: `python evaluate.py --help`."""

from compress.command import evaluate

if __name__ == "__main__":
    evaluate()
