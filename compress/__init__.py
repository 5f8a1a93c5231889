"""Fine-tune, prune, distil, quantize and export language models: one technique, or a chain of them."""

__version__ = "0.1.0"


def __getattr__(name):
    # Looked up at first use, so that `import compress` stays free of torch.
    if name == "load":
        from compress.artifacts.artifact import load_artifact

        return load_artifact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
