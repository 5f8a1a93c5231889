"""llama.cpp answers as PyTorch does, by what the stage `gguf` writes."""

import architectures
import pytest
import tiny
import torch
from test_gguf_export import FAMILIES, SCHEMES, TEXTS, TOKENIZERS, packed  # noqa: F401
from test_onnx import check_decoding, every_shape, make_distinct, tied

from compress.errors import UserError
from compress.exporting.agreement import measure_agreement
from compress.exporting.gguf import describe_config, write_file
from compress.exporting.vocabulary import NONE, describe_tokenizer
from compress.formats.gguf import FILE
from compress.models.matrices import find_all_matrices, matrices
from compress.techniques.finetune import FineTune
from compress.techniques.gguf import GGUF

pytest.importorskip("llama_cpp", reason="llama-cpp-python, which is compiled when it is installed, is missing")
from compress.runtimes import llama_cpp


def write(model, folder, kind="F32", vocabulary=NONE):
    """Return the model that llama.cpp loads of a file with all matrices of a kind."""
    write_file(model, folder / FILE, dict.fromkeys(find_all_matrices(model, True, True), kind), {}, vocabulary)
    describe_config(model).save_pretrained(folder)
    return llama_cpp.load(folder, "lm")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_in_pytorch(name, tmp_path):
    model = architectures.build(name.partition(" ")[0], lm=True, **FAMILIES[name])
    batch = architectures.inputs(length=40)
    agreement = measure_agreement(model, write(model, tmp_path), [batch])
    assert agreement.max_logit_difference < 0.01 * agreement.largest_logit and agreement.label_agreement > 0.98


def test_batches_of_any_shape_are_computed_in_parts(tmp_path, monkeypatch):
    model = make_distinct(tiny.llama_lm())
    monkeypatch.setattr(llama_cpp, "PART", 16)
    monkeypatch.setattr(llama_cpp, "ROWS", 3)
    agreement = measure_agreement(model, write(model, tmp_path), [*every_shape(), *every_shape()])
    assert agreement.max_logit_difference < 0.01 * agreement.largest_logit and agreement.label_agreement > 0.98


@pytest.mark.parametrize(("kind", "share"), [("F16", 0.01), ("Q8_0", 0.05), ("Q4_0", 0.5), ("Q4_1", 0.5)])
def test_a_lower_precision_stays_near_and_counts_its_integers(kind, share, tmp_path):
    model = make_distinct(tiny.llama_lm())
    exported = write(model, tmp_path, kind)
    agreement = measure_agreement(model, exported, every_shape())
    assert 0 < agreement.max_logit_difference < share * agreement.largest_logit
    stored = list(exported.parameters())
    assert sum(p.numel() for p in stored) == sum(p.numel() for p in model.parameters())
    integers = sum(p.numel() for p in stored if not p.is_floating_point())
    every = sum(m.size for m in find_all_matrices(model, True, True).values())
    assert integers == (every if kind.startswith("Q") else 0)


@pytest.mark.parametrize("part", [4, 512])
def test_it_decodes_with_what_it_keeps_of_earlier_tokens_as_transformers_does(part, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "PART", part)  # 4: the state grows while tokens are added
    model = make_distinct(tied())
    exported = write(model, tmp_path)
    check_decoding(model, exported)


def test_a_state_that_a_later_call_replaced_is_refused(tmp_path):
    exported = write(tiny.llama_lm(), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    first = exported(input_ids=ids).past
    exported(input_ids=ids)
    with pytest.raises(ValueError, match="one state, and a later call has replaced"):
        exported(input_ids=ids[:, :1], attention_mask=torch.ones(1, 4), past=first)


@pytest.mark.parametrize("rule", TOKENIZERS)
def test_llama_cpp_makes_the_tokenizers_tokens(rule, tmp_path):
    tokenizer = TOKENIZERS[rule]()
    model = architectures.build("llama", lm=True, vocab_size=340)
    exported = write(model, tmp_path, vocabulary=describe_tokenizer(tokenizer, 340))
    for text in TEXTS:
        assert exported.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("precision", [None, "q8_0"])
def test_integers_of_an_earlier_stage_are_multiplied_as_they_are(packed, precision, tmp_path):  # noqa: F811
    folder, model = packed
    stage = GGUF(precision=precision, source=folder)
    data = tiny.loader(batches=2, lm=True)
    tiny.trainer(stage).fit(FineTune(model), data, data)  # raises if answers differ
    integers = [p for p in stage.exported.parameters() if not p.is_floating_point()]
    zeros = sum(int((matrix.weight == 0).sum()) for matrix in matrices(model).values())
    if precision is None:
        assert sum(int((p == 0).sum()) for p in integers) == zeros > 0
    assert len({scheme.bits for scheme in SCHEMES}) > 2 and "float16" in stage.limits


def test_a_broken_file_is_an_error(tmp_path):
    write(tiny.llama_lm(), tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model.gguf cannot be read \(llama.cpp does not load it\)\. Set"):
        llama_cpp.load(tmp_path, "lm")
