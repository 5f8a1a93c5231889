"""A .gguf file is a model like any other: its weights become floats, its tokenizer comes with it."""

import sys

import numpy as np
import pytest
import tiny
import torch
from test_backbone import CLASSES, TEXT

from compress.artifacts.artifact import Description, load_artifact, write_artifact
from compress.errors import UserError
from compress.models.backbone import Backbone

gguf = pytest.importorskip("gguf")
PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}
VOCABULARY = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(30))]


def write_gguf(path, kind):
    """Write a Llama as llama.cpp does, its matrices in the format ``kind``, and return the model of these weights."""
    model = tiny.llama_lm()
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([-float(i) for i in range(len(VOCABULARY))])
    writer.add_token_types([2, 3, 3] + [1] * (len(VOCABULARY) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight, base = tensor.numpy(), name.removesuffix(".weight")
        if kind != gguf.GGMLQuantizationType.F32 and weight.ndim == 2:
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
            tensor.copy_(torch.from_numpy(weight))
        if count := heads.get(base.rpartition(".")[2]):  # llama.cpp rotates neighbours, transformers halves
            rows, width = weight.shape
            weight = weight.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)
        weight = np.ascontiguousarray(weight)
        quantized = kind != gguf.GGMLQuantizationType.F32 and weight.ndim == 2
        stored = gguf.quantize(weight, kind) if quantized else weight
        writer.add_tensor(f"{names.get_name(base)}.weight", stored, raw_dtype=kind if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_it_is_built_as_floats_saved_and_reloaded(kind, tmp_path):
    (tmp_path / "model").mkdir()
    expected = write_gguf(tmp_path / "model" / "m.gguf", gguf.GGMLQuantizationType[kind])
    for path in (tmp_path / "model" / "m.gguf", tmp_path / "model"):
        backbone = Backbone(name="m", path=str(path))
        backbone.skeleton(TEXT)
        model, tokenizer, trained = backbone.build(TEXT, [])
        assert trained and tokenizer.tokenize("a b") == ["\u2581", "a", "\u2581", "b"]
        into = tmp_path / f"artifact {path.name}"
        write_artifact(into, model, tokenizer, Description("lm", "m", "t"))
        with torch.no_grad():
            logits = expected(**PROBE).logits
            assert torch.allclose(model.eval()(**PROBE).logits, logits, atol=1e-4)
            assert torch.equal(load_artifact(into).model(**PROBE).logits, model(**PROBE).logits)


def test_a_classifier_gets_a_new_head_on_its_blocks(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    model, _, trained = Backbone(name="m", path=str(tmp_path)).build(CLASSES, [])
    assert not trained and torch.equal(model.model.norm.weight, expected.model.norm.weight)


def test_other_content_is_another_model(tmp_path):
    backbone = Backbone(name="m", path=str(tmp_path / "m.gguf"))
    write_gguf(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    before = backbone.fingerprint(TEXT)
    write_gguf(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    assert before and before != backbone.fingerprint(TEXT)


def test_without_its_library_it_is_refused_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"m.gguf is a GGUF file, and gguf, .* Type pip install .*gguf\]"):
        Backbone(name="m", path=str(tmp_path)).skeleton(TEXT)


def test_of_several_files_one_must_be_chosen(tmp_path):
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds several .gguf files. Set model.path to the file to load"):
        Backbone(name="m", path=str(tmp_path)).skeleton(TEXT)
