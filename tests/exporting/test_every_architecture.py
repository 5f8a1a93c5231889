"""Every architecture is exported so that it answers as in PyTorch, or refused from its shapes alone."""

import importlib

import architectures
import pytest
import tiny
import torch
from onnx import load as load_onnx
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.exporting.agreement import measure_agreement
from compress.techniques.finetune import FineTune
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO

RUNTIMES = {Onnx: "onnxruntime", OpenVINO: "openvino"}
CASES = [
    *((name, False) for name in architectures.ENCODERS if name != "t5-short"),  # which is T5 with two blocks
    *((name, True) for name in architectures.DECODERS),
    ("llama", False),
]
"""An architecture, and whether it is a language model."""
KINDS = ("bert", "gpt2", "mixtral")
"""Architectures that differ in kind: the quick tests export these by both stages, and every other by one of them."""
BLOCKS = {
    "bart": {"encoder_layers": 1, "decoder_layers": 2},
    "distilbert": {"n_layers": 2},
    "gpt2": {"n_layer": 2},
    "gemma3_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"n_layer": 2},
    "bloom": {"n_layer": 2},
    "xlnet": {"n_layer": 2},
    "t5": {"num_layers": 2},
}
"""The settings of two blocks in a row, which is all that a graph repeats; ``num_hidden_layers`` of the others is 2."""


def choose_stages(cases):
    """Return every case with every stage. Those are slow that show an architecture by the second stage."""
    return [
        pytest.param(*case, stage, marks=pytest.mark.slow if case[0] not in KINDS and (place + turn) % 2 else ())
        for place, case in enumerate(cases)
        for turn, stage in enumerate(RUNTIMES)
    ]


def build(name, lm, **changes):
    model = architectures.build(name, lm, **BLOCKS.get(name, {"num_hidden_layers": 2}), **changes)
    if name == "gemma2":  # other attention of transformers leaves out the bound of its scores
        model.set_attn_implementation("eager")
    if model.config.model_type == "t5":
        # T5 does not scale its scores. With weights of this size one token takes all attention, and which one it is
        # depends on the last digit: in PyTorch too, float32 is 3e-5 from float64 and 8 bits are half a logit away.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(3 if parameter.ndim > 1 else 1)
    return model


def export(stage, model, lm, folder, *before):
    """Return the saved model of the ``stage``, loaded again."""
    with torch.device("meta"):
        stage.check(type(model)(model.config), [])
    for one in (*before, stage):
        loaders = (architectures.loader(2, lm) for _ in range(2))
        tiny.trainer(one).fit(FineTune(model), *loaders)
    stage.save(model.eval(), folder)
    return importlib.import_module(f"compress.runtimes.{RUNTIMES[type(stage)]}").load(folder, "")


def every_shape(lm=False):
    """Return texts of other lengths than the traced ones, with and without padding, which may be longer than a window
    of attention, and a single short text."""
    return [
        architectures.batch(7, rows=4, length=20, lm=lm),
        architectures.batch(8, rows=3, length=11, padded=False, lm=lm),
        architectures.batch(9, rows=1, length=3, lm=lm),
    ]


@pytest.mark.parametrize(("name", "lm", "stage"), choose_stages(CASES))
def test_the_graph_answers_as_the_model(name, lm, stage, tmp_path, capfd):
    model = build(name, lm)
    if name == "cohere" and stage is Onnx:  # its rotary positions, in PyTorch's exporter
        with pytest.raises(UserError, match=r"exporter cannot write a `cohere` as an ONNX graph \(.*openvino"):
            export(stage(), model, lm, tmp_path)
        return
    exported = export(stage(), model, lm, tmp_path)
    agreement = measure_agreement(model, exported, every_shape(lm))
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit
    assert capfd.readouterr().out == ""
    if not lm:
        return
    # Token by token, from keys and values of earlier tokens
    texts = architectures.inputs(3, rows=2, length=8, padded=False)
    with torch.no_grad():
        whole = model(**texts).logits
    past, answers = (), []
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        ids, mask = texts["input_ids"][:, start:stop], texts["attention_mask"][:, :stop]
        answer = exported(past, input_ids=ids, attention_mask=mask)
        answers.append(answer.logits.clone())
        past = answer.past
    assert (torch.cat(answers, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    # Texts of a batch end together
    texts["attention_mask"][1, :3] = texts["input_ids"][1, :3] = 0
    expected = model.generate(**texts, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    exported.config.eos_token_id = None
    assert torch.equal(exported.generate(**texts, max_new_tokens=4), expected)


def test_attention_that_the_optimizer_takes_for_another_kind_stays_unfused(tmp_path):
    export(Onnx(), build("bart", False), False, tmp_path)
    kinds = {node.op_type for node in load_onnx(tmp_path / "model.onnx").graph.node}
    assert "Attention" not in kinds and "SkipLayerNormalization" in kinds  # which would look ahead in the decoder


@pytest.mark.parametrize(
    ("name", "stage", "precision"),
    [("distilbert", Onnx, None), ("distilbert", OpenVINO, "int8"), ("llama", Onnx, "int8_static")],
)
def test_inputs_that_a_tokenizer_gives_and_the_model_has_no_use_for_are_left_out(name, stage, precision, tmp_path):
    def add_types(batch):
        return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}

    model, one = build(name, False), stage(precision=precision, samples=2)
    batches = [add_types(architectures.batch(seed)) for seed in range(2)]
    loader = DataLoader(batches, batch_size=None)
    tiny.trainer(one).fit(FineTune(model), loader, loader)
    one.save(model.eval(), tmp_path)
    exported = importlib.import_module(f"compress.runtimes.{RUNTIMES[stage]}").load(tmp_path, "")
    batch = {name: value for name, value in batches[0].items() if name != "labels"}
    plain = {name: value for name, value in batch.items() if name != "token_type_ids"}
    near = 1e-5 if precision is None else 0.3
    logits = exported(**batch).logits
    assert (logits - model(**plain).logits).abs().max() < near * logits.abs().max()


@pytest.mark.parametrize("stage", RUNTIMES)
def test_scores_of_attention_are_bounded_as_the_config_says(stage, tmp_path):
    model = build("gemma2", True, attn_logit_softcapping=0.5)
    exported = export(stage(), model, True, tmp_path)
    agreement = measure_agreement(model, exported, every_shape(True))
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit
    free = measure_agreement(build("gemma2", True, attn_logit_softcapping=None), exported, every_shape(True))
    assert free.max_logit_difference > 1e-3 * free.largest_logit


class Looping(torch.nn.Module):
    def forward(self, states, chosen):
        for expert in chosen.nonzero():
            states = states + expert
        return states


def make_mamba():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=60, hidden_size=8, num_hidden_layers=1)
    )


def make_looping():
    model = build("llama", False)
    model.model.layers[0].mlp = Looping()
    return model


@pytest.mark.parametrize("stage", RUNTIMES)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_mamba, "`MambaForCausalLM` keeps a state of its own between tokens"),
        (make_looping, "`LlamaForSequenceClassification` loops over the experts"),
    ],
)
def test_what_no_graph_can_hold_is_refused_from_the_shapes_alone(make, reason, stage):
    with torch.device("meta"):
        skeleton = make()
    with pytest.raises(UserError, match=f"{reason}.* Remove `{stage.key[10:]}` from"):
        stage().check(skeleton, [])
