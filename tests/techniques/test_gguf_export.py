"""The stage `gguf`: its file is read by transformers, whose reader of GGUF is not ours."""

import architectures
import numpy as np
import pytest
import tiny
import torch
from test_onnx import make_distinct, tied, uneven
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compress.errors import PostconditionError, UserError
from compress.exporting.gguf import describe_config, measure_change, write_file
from compress.exporting.vocabulary import NO_SPACE, NONE, RULES, describe_tokenizer
from compress.formats.gguf import FILE, HEAD, choose_type, pack_integers, unpack_integers
from compress.formats.packed import read_integers, save_model
from compress.maths.rounding import Scheme, minmax_grid, round_to_nearest
from compress.models.backbone import train_tokenizer
from compress.models.layers import detect_task_kind
from compress.models.matrices import find_all_matrices, matrices
from compress.runtimes.torch import load
from compress.techniques.finetune import FineTune
from compress.techniques.gguf import GGUF
from compress.techniques.gptq import GPTQ, quantize_layers
from compress.techniques.mixed import Mixed
from compress.techniques.prune import Prune

gguf = pytest.importorskip("gguf")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
FAMILIES = {
    "llama": {},
    "llama with biases and wide heads": {"attention_bias": True, "head_dim": 32, "rope_parameters": LLAMA3},
    "llama with shared embeddings": {"tie_word_embeddings": True, "rope_parameters": LINEAR},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}


def export(model, folder, **settings):
    """Return the stage and its saved model, loaded by transformers."""
    stage = GGUF(**{"runtime": "torch", **settings})
    tiny.trainer(stage).fit(FineTune(model), tiny.loader(batches=1, lm=True), tiny.loader(batches=1, lm=True))
    stage.save(model, folder)
    return stage, load(folder, "lm")


def read(folder):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_weights_and_the_rotary_positions_of_every_family(name, tmp_path):
    model = architectures.build(name.partition(" ")[0], lm=True, **FAMILIES[name])
    _, exported = export(model, tmp_path)
    batch = architectures.inputs()
    with torch.no_grad():
        assert torch.allclose(exported(**batch).logits, model(**batch).logits, atol=1e-5)
    assert ("output.weight" in read(tmp_path)) != model.config.tie_word_embeddings
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


def test_llama_3_slows_its_frequencies_by_the_factors_in_the_file(tmp_path):
    model = architectures.build("llama", lm=True, head_dim=32, rope_parameters=LLAMA3)
    export(model, tmp_path)
    factors = torch.from_numpy(read(tmp_path)["rope_freqs.weight"].data.copy())
    plain = 500.0 ** -(torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors[0] == 1 and factors[-1] == pytest.approx(4)


@pytest.mark.parametrize(("precision", "kind"), [("f16", "F16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q4_1", "Q4_1")])
def test_a_lower_precision_stays_near_and_takes_fewer_bytes(precision, kind, tmp_path):
    model = make_distinct(tiny.llama_lm())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage, exported = export(model, tmp_path, precision=precision)
    tensors = read(tmp_path)
    inside = {
        tensor.tensor_type.name for name, tensor in tensors.items() if name.startswith("blk") and "norm" not in name
    }
    around = {tensors[name].tensor_type.name for name in ("token_embd.weight", "output.weight")}
    assert inside == {kind} and around == {"Q8_0" if kind.startswith("Q4") else kind}
    assert stage.shrinks and stage.exported is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    step = {"F16": 2**-11, "Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "Q4_1": 1 / 15}[kind]
    for name, matrix in matrices(exported).items():
        change = (matrix.weight - before[f"{name}.weight"]).abs().max()
        assert 0 < change < 1.01 * step * before[f"{name}.weight"].abs().max() + 1e-3


def test_what_is_skipped_stays_in_floats(tmp_path):
    export(make_distinct(tiny.llama_lm()), tmp_path, precision="q8_0", skip=("head", "*down_proj"))
    kinds = {name: tensor.tensor_type.name for name, tensor in read(tmp_path).items() if "norm" not in name}
    floats = {name for name, kind in kinds.items() if kind == "F32"}
    assert floats == {"output.weight", *(f"blk.{i}.ffn_down.weight" for i in range(2))}


SCHEMES = [Scheme(4, 32), Scheme(4, 32, False), Scheme(8, 32), Scheme(3, 32, False), Scheme(4), Scheme(6, 32, False)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_are_packed_as_they_are(scheme):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    stored = round_to_nearest(weight, minmax_grid(weight, scheme, torch.float32), scheme)
    blocks, kind = pack_integers(stored), choose_type(scheme)
    zeros = stored.grid.zero.repeat_interleave(64 // stored.grid.zero.shape[1], 1)
    assert torch.equal(unpack_integers(blocks, kind), stored.integers.short() - zeros)
    found = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    scale = stored.grid.scale.half().float()
    exact = stored._replace(grid=stored.grid._replace(scale=scale)).dequantize(torch.float32)
    if kind == "Q4_1":  # the lowest value is rounded too
        assert (found - exact).abs().max() <= 15 * scale.max() * 2**-10
    else:
        assert torch.equal(found, exact)


def test_types_are_the_smallest_that_hold_the_integers():
    kinds = {
        (bits, symmetric): choose_type(Scheme(bits, 32, symmetric)) for bits in range(2, 9) for symmetric in (1, 0)
    }
    assert [kinds[bits, True] for bits in range(2, 9)] == ["Q4_0"] * 3 + ["Q8_0"] * 4
    assert [kinds[bits, False] for bits in range(2, 9)] == ["Q4_0"] * 2 + ["Q4_1"] + ["Q8_0"] * 3 + [None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return a packed artifact with layers of every kind that the format holds, and its model loaded by PyTorch."""
    folder, model = tmp_path_factory.mktemp("packed"), make_distinct(tiny.llama_lm())
    schemes = dict(zip(matrices(model), SCHEMES * 3))
    batches = [{key: value for key, value in tiny.batch().items() if key != "labels"}]
    outcomes = quantize_layers(model, matrices(model), batches, schemes, damping=0.01, act_order=True)
    save_model(model, {name: outcome.quantized for name, outcome in outcomes.items()}, folder)
    return folder, load(folder, "lm")


@pytest.mark.parametrize("precision", [None, "q8_0"])
def test_what_an_earlier_stage_rounded_is_not_rounded_again(packed, precision, tmp_path):
    folder, model = packed
    stage, exported = export(model, tmp_path, source=folder, precision=precision)
    halves = {
        name: weight._replace(grid=weight.grid._replace(scale=weight.grid.scale.half().float()))
        for name, weight in read_integers(folder).items()
    }
    assert set(halves) == set(matrices(model))
    for name, weight in halves.items():
        found, exact = matrices(exported)[name].weight, weight.dequantize(torch.float32)
        if choose_type(weight.scheme) == "Q4_1":
            assert (found - exact).abs().max() <= 15 * weight.grid.scale.max() * 2**-10
        else:
            assert torch.equal(found, exact)
    assert "scales are stored in float16, which changes weights by up to 0.00" in stage.limits
    table = read(tmp_path)["token_embd.weight"].tensor_type.name
    assert table == ("F32" if precision is None else "Q8_0")


def test_f32_writes_floats_in_place_of_integers(packed, tmp_path):
    folder, model = packed
    _, exported = export(model, tmp_path, source=folder, precision="f32")
    assert all(torch.equal(m.weight, matrices(model)[name].weight) for name, m in matrices(exported).items())


def test_a_file_with_other_weights_is_an_error(packed, tmp_path):
    folder, model = packed
    kept = read_integers(folder)
    name, other = next(iter(matrices(model).items()))
    write_file(model, tmp_path / FILE, {}, kept, NONE)
    assert 0 < measure_change(model, tmp_path / FILE, kept, "technique.gguf") < 2**-10
    other.weight.mul_(1.01)
    try:
        with pytest.raises(
            PostconditionError, match=rf"should keep the integers of `{name}`, but .* differ by up to 1"
        ):
            measure_change(model, tmp_path / FILE, kept, "technique.gguf")
    finally:
        other.weight.div_(1.01)


TEXTS = ["Once upon a time, there were 1234 owls.", " She's here;\n\nwe'll see  spaces", "naïve 東京 🦉", "a"]


def byte_level(before=()):
    """Return byte-level BPE that cuts texts by ``before`` first."""
    made = train_tokenizer(TEXTS * 3, architectures.make_config("llama", lm=True, vocab_size=330))
    backend = made.backend_tokenizer
    last = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not any(isinstance(b, pre_tokenizers.Split) for b in before)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


def sentencepiece():
    """Return SentencePiece's BPE in the form in which transformers stores Llama 2's."""
    words = ["▁t", "he", "▁the", "in", "▁a", "er", "▁in", "ow", "▁ow", "▁owl"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("e", "r"), ("▁", "in"), ("o", "w")]
    merges += [("▁", "ow"), ("▁ow", "l")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def split(regex):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(regex), "isolated")


TOKENIZERS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)]),
    **{name: lambda regex=regex: byte_level([split(regex)]) for (regex, whole), name in RULES.items() if not whole},
    "default": sentencepiece,
}


@pytest.mark.parametrize("rule", TOKENIZERS)
def test_the_tokenizer_is_in_the_file(rule, tmp_path):
    tokenizer = TOKENIZERS[rule]()
    model = architectures.build("llama", lm=True, vocab_size=340)
    vocabulary = describe_tokenizer(tokenizer, 340)
    write_file(model, tmp_path / FILE, {}, {}, vocabulary)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / FILE).fields.items()}
    assert fields["tokenizer.ggml.pre"] == rule and fields.get("tokenizer.chat_template") == tokenizer.chat_template
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 340 and len(set(tokens)) == 340
    assert all(tokens[number] == text for text, number in tokenizer.get_vocab().items())
    assert types[tokenizer.bos_token_id] == 3 and types[tokenizer.unk_token_id] == 2 and types[-1] == 5
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    if rule in ("gpt-2", "default"):  # transformers knows one rule for each architecture
        describe_config(model).save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
        for text in TEXTS[:2]:
            assert again(text, add_special_tokens=False) == tokenizer(text, add_special_tokens=False)


def test_a_space_before_texts_is_noted_and_rules_that_llama_cpp_lacks_are_refused():
    trained = train_tokenizer(TEXTS, architectures.make_config("llama", lm=True, vocab_size=300))
    assert describe_tokenizer(trained, 340).note == NO_SPACE
    assert describe_tokenizer(trained, 9) == f"has {len(trained)} tokens, and the model 9"
    assert "a rule that llama.cpp does not have" in describe_tokenizer(byte_level([split(r"\s+")]), 340)
    stage = GGUF(runtime="torch", tokenizer=tiny.tokenizer())
    with pytest.raises(
        UserError, match=r"the tokenizer is of the type WordPiece\. Set technique.gguf.vocabulary=false"
    ):
        stage.check(tiny.llama_lm(), [])
    GGUF(runtime="torch", tokenizer=tiny.tokenizer(), vocabulary=False).check(tiny.llama_lm(), [])


def test_what_it_cannot_write_is_refused_on_the_shapes_alone():
    stage = GGUF(runtime="torch")
    with torch.device("meta"):
        skeletons = {name: architectures.build(name, lm=True) for name in ("gpt2", "mistral", "gemma3_text")}
        with pytest.raises(
            UserError, match="`gguf` writes language models, and `LlamaForSequenceClassification` is none"
        ):
            stage.check(tiny.llama(), [])
    for name, reason in (
        ("gpt2", "of the families llama, mistral, qwen2, qwen3; this is a GPT2LMHeadModel. Set technique=onnx"),
        ("gemma3_text", "this is a Gemma3ForCausalLM"),
        ("mistral", "attends to all tokens, and this model to the last 8"),
    ):
        with pytest.raises(UserError, match=reason):
            stage.check(skeletons[name], [])
    with pytest.raises(UserError, match="blocks of different shapes"):
        stage.check(uneven(tied()), [])
    with pytest.raises(UserError, match="written of the types default, linear, llama3, and this model has yarn"):
        yarn = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": 16}
        stage.check(architectures.build("llama", lm=True, rope_parameters=yarn), [])
    with pytest.raises(
        UserError, match=r"blocks of 32 do not divide the 40 inputs of `.*down_proj`\. Add '\*down_proj'"
    ):
        GGUF("q4_0", runtime="torch").check(architectures.build("llama", lm=True, intermediate_size=40), [])


def test_zeros_that_a_type_cannot_hold_are_refused():
    with pytest.raises(UserError, match=r"zeros of the earlier `prune` .* Set technique.gguf.precision=q4_0 or q8_0"):
        GGUF("q4_1", runtime="torch").check(tiny.llama_lm(), [Prune(sparsity=0.5)])
    GGUF("q4_0", runtime="torch", vocabulary=False).check(tiny.llama_lm(), [Prune(sparsity=0.5)])


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (GPTQ(bits=8, symmetric=False, group_size=32), r"gptq.bits is 8 with zero points, .* Set technique.gptq.symm"),
        (
            GPTQ(group_size=16),
            r"gptq.group_size is 16, and llama.cpp's blocks .* Set technique.gptq.group_size=32 ",
        ),
        (GPTQ(group_size=32, format="gptq"), r"gptq.format is gptq, which `gguf` does not read"),
        (Mixed(group_size=16, average_bits=5), r"mixed.group_size is 16"),
    ],
)
def test_integers_that_no_type_holds_are_refused(before, reason):
    with pytest.raises(UserError, match=reason):
        GGUF(runtime="torch").check(tiny.llama_lm(), [before])
    if getattr(before, "format", "") != "gptq":
        GGUF(runtime="torch", precision="f32").check(tiny.llama_lm(), [before])


def test_without_llama_cpp_it_says_what_to_install_and_how_to_do_without(monkeypatch):
    monkeypatch.setattr("compress.runtimes.runtime.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"runtime is llama_cpp, .* pip install .*llamacpp\]', or set .*\.runtime=torch"
    ):
        GGUF().check(tiny.llama_lm(), [])


def test_the_report_says_who_measured_it_and_the_head_counts_once(tmp_path):
    model = make_distinct(tied())
    stage, exported = export(model, tmp_path, precision="q8_0")
    assert "PyTorch reads the weights as floats" in stage.limits and "no tokenizer" in stage.limits
    assert stage.agreement.examples == 4 and stage.agreement.label_agreement > 0.5
    stored = np.prod(
        [
            tensor.shape
            for tensor in read(tmp_path).values()
            if tensor.tensor_type.name in HEAD and "token" in tensor.name
        ]
    )
    assert (
        stored == model.model.embed_tokens.weight.numel()
        and exported.lm_head.weight is exported.model.embed_tokens.weight
    )
    assert set(find_all_matrices(exported, embeddings=True, head=True)) == set(find_all_matrices(model, True, True))
    assert detect_task_kind(exported) == "lm" and isinstance(
        exported, type(AutoModelForCausalLM.from_config(model.config))
    )
