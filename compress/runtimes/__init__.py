"""What runs an artifact, one module each, with ``load(folder, kind)`` and the patterns ``WEIGHTS`` of its files.

What it gives is called as ``model(**batch)`` with tokens, answers with ``.logits``, has a ``config`` with its labels,
and ``to(device)`` and ``parameters()`` as a torch module has them.
"""
