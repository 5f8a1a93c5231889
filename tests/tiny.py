"""The suite's tiny models under short names."""

from compress.tiny_models import QUIET, SHAPE, Theirs  # noqa: F401
from compress.tiny_models import make_batch as batch  # noqa: F401
from compress.tiny_models import make_bert as bert
from compress.tiny_models import make_llama as llama
from compress.tiny_models import make_llama_lm as llama_lm
from compress.tiny_models import make_loader as loader  # noqa: F401
from compress.tiny_models import make_roberta as roberta
from compress.tiny_models import make_tokenizer as tokenizer  # noqa: F401
from compress.tiny_models import make_trainer as trainer  # noqa: F401

ALL = (bert, roberta, llama, llama_lm)
