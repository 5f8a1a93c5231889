"""Compresses a language model and measures what it cost: `python train.py --help`."""

from compress.command import train

if __name__ == "__main__":
    train()
