"""The suite's tiny models under short names."""

from compress.testing import SHAPE, Theirs  # noqa: F401
from compress.testing import make_batch as batch  # noqa: F401
from compress.testing import make_bert as bert
from compress.testing import make_llama as llama
from compress.testing import make_llama_lm as llama_lm
from compress.testing import make_loader as loader  # noqa: F401
from compress.testing import make_roberta as roberta
from compress.testing import make_trainer as trainer  # noqa: F401

ALL = (bert, roberta, llama, llama_lm)
