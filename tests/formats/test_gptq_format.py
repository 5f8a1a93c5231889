"""GPTQ's own format, as GPTQModel, transformers and vLLM read it."""

import copy
import json

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from test_conf import CONF
from test_onnx import make_distinct
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.formats.gptq import pack_layer, pack_words, unpack_layer, unpack_words
from compress.formats.packed import list_packed_layers
from compress.maths.rounding import Scheme, minmax_grid, round_to_nearest
from compress.models.matrices import matrices, measure_matrices
from compress.planning.plan import make_plan
from compress.running.promises import check_bits
from compress.runtimes.torch import FORMATS, load
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ

PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}


def quantized(folder, **settings):
    """A language model of rows that fill words, and the stage that has quantized it and saved it."""
    torch.manual_seed(0)
    model = make_distinct(LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, num_key_value_heads=4, pad_token_id=0)))
    stage = GPTQ(**{"group_size": 32, "format": "gptq", "samples": 8, **settings})
    tiny.trainer(stage).fit(FineTune(model), tiny.loader(lm=True))
    stage.save(copy.deepcopy(model), folder)
    check_bits("gptq", stage.average_bits, measure_matrices(model), folder)
    return model.eval(), stage


def test_four_bits_of_eight_inputs_fill_a_word_from_the_lowest_on():
    words = pack_words(torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]]), 4)
    assert words.dtype == torch.int32 and words.tolist() == [[0x87654321 - 2**32]]


def test_three_bits_of_thirty_two_inputs_fill_three_words_across_their_ends():
    integers = torch.zeros(32, 1, dtype=torch.int32)
    integers[10], integers[21] = 0b101, 0b110  # the lowest two bits in one word, and the third in the next; one, two
    assert pack_words(integers, 3).flatten().tolist() == [(0b01 << 30), 0b1, 0b11]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_packed_is_unpacked(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(0, 2**bits, (64, 5), generator=generator, dtype=torch.int32)
    assert torch.equal(unpack_words(pack_words(integers, bits), bits), integers)
    weight, scheme = torch.randn(32, 64, generator=generator), Scheme(bits, 16, symmetric)
    rounded = round_to_nearest(weight, minmax_grid(weight, scheme, torch.float16), scheme)
    tensors = pack_layer(rounded)
    assert {name: list(one.shape) for name, one in tensors.items()} == {
        "qweight": [64 * bits // 32, 32],
        "qzeros": [4, 32 * bits // 32],
        "scales": [4, 32],
        "g_idx": [64],
    }
    assert torch.equal(unpack_layer(tensors, bits, first=symmetric), rounded.dequantize(torch.float32))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_a_checkpoint_reloads_to_the_same_logits_and_takes_the_bits_that_it_says(bits, symmetric, tmp_path):
    model, _ = quantized(tmp_path, bits=bits, symmetric=symmetric)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, "lm")(**PROBE).logits, model(**PROBE).logits)
    assert list_packed_layers(tmp_path) == set(matrices(model))
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["bits"], described["group_size"]) == ("gptq", bits, 32)
    assert described["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2") and not described["desc_act"]
    zeros = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"]
    assert (
        not symmetric or (unpack_words(zeros.T, bits) == 2 ** (bits - 1) - 1).all()
    )  # the first version's are one less


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_transformers_loads_it_by_gptqmodel(bits, symmetric, tmp_path):
    for package in FORMATS["gptq"]:
        pytest.importorskip(package)
    model, _ = quantized(tmp_path, bits=bits, symmetric=symmetric)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, device_map="cpu").eval()
    with torch.no_grad():
        expected, found = model(**PROBE).logits, theirs(**PROBE).logits.float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()  # in float16, of four bits in less


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=tiny", "task=toy"], "whose readers know language models only, .*Set .*compressed-"),
        (
            ["technique.gptq.skip=[embeddings]"],
            r"skip is \['embeddings'\]; .*stores all layers of the blocks and no others",
        ),
        (["technique.gptq.group_size=8"], "group_size is 8; readers of technique.gptq.format=gptq know"),
        (
            ["model.config.num_key_value_heads=1", "+model.config.head_dim=16", "technique.gptq.group_size=32"],
            "packs 32 numbers together, and .* is 16 ",
        ),
    ],
)
def test_what_the_format_cannot_store_is_refused_before_anything_is_loaded(overrides, sentence):
    chosen = ["technique=gptq", "technique.gptq.format=gptq", "model=tiny_llama", "task=toy_lm", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(UserError, match=sentence):
        make_plan(compose("train", chosen))


def test_a_folder_without_all_weights_is_refused(tmp_path):
    quantized(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="holds no weights for model.layers.2"):
        load(tmp_path, "lm")
