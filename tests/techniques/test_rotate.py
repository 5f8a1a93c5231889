import architectures
import pytest
import tiny
import torch
from architectures import DECODERS, build
from hydra import compose, initialize_config_dir
from test_conf import CONF
from test_prune import fit
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.errors import PostconditionError, UserError
from compress.maths.hessian import second_moment
from compress.maths.rounding import Scheme, minmax_grid, round_to_grid
from compress.models import rotation
from compress.models.calibration import observe
from compress.models.layers import find_blocks
from compress.models.matrices import find_zeros, matrices, measure_sparsity
from compress.models.rotation import find_stream, is_tied
from compress.planning.plan import make_plan
from compress.running.promises import capture_state, check_model
from compress.techniques.prune import Prune
from compress.techniques.rotate import Rotate

GROUPED = {**tiny.SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "mixtral", "qwen3_moe")
POST_NORMS = ("gemma2", "gemma3_text", "olmo2")


def randomise(model):
    """Make all norms and biases random, so that nothing is symmetric by chance."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def gemma():
    """Return a model with norms of unit offset, scaled embeddings and a tied output layer."""
    return randomise(GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8)))


def llama_with_biases(**settings):
    config = {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **settings}
    return randomise(LlamaForCausalLM(LlamaConfig(**config)))


def plan_chain(chain):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_plan(compose("train", [f"technique={chain}", "model=tiny_llama", "task=toy_lm"]))


def rotate(model, **settings):
    stage = Rotate(**settings)
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(1))
    return stage


@torch.no_grad()
def answer(model):
    return model.eval()(**architectures.inputs()).logits


def change(after, before):
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("make", [gemma, llama_with_biases])
def test_the_function_stays_and_a_plain_model_is_saved(make, kind, tmp_path):
    model, before = make(), make()
    expected = answer(model)
    stage = rotate(model, rotation=kind)
    assert change(answer(model), expected) < 1e-5
    assert "no longer shares the weights of the embeddings" in stage.limits and not model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            assert not torch.allclose(weight, before.get_parameter(name), atol=1e-3), name
    stage.save(model, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model) and not is_tied(reloaded)
    assert torch.equal(answer(reloaded), answer(model))
    gain = model.model.norm.weight + (make is gemma)
    assert torch.equal(gain, torch.ones_like(gain))


@pytest.mark.parametrize("lm", [True, False])
@pytest.mark.parametrize("name", ROTATED)
def test_families_without_means_in_their_norms_are_rotated(name, lm):
    if not lm and name == "granite":
        pytest.skip("transformers has no classifier of this family")
    with torch.device("meta"):
        Rotate().check(build(name, lm), [])
    model = build(name, lm)
    expected = answer(model)
    rotate(model)
    assert change(answer(model), expected) < 1e-5


@pytest.mark.parametrize("name", sorted({*DECODERS, "bert", "modernbert", "bart", "t5", "albert"} - {*ROTATED}))
def test_others_are_refused_in_a_sentence_before_anything_is_loaded(name):
    with torch.device("meta"):
        skeleton = build(name, name in ("cohere",))
    reason = "subtracts their mean"
    if name in POST_NORMS:
        reason = r"adds the outputs of the norm `.*post_attention_layernorm` to the hidden states"
    elif name in ("t5", "bart"):
        reason = "two stacks of blocks"
    with pytest.raises(UserError, match=f"The hidden states of `{name}` cannot be rotated: .*{reason}"):
        Rotate().check(skeleton, [])


def test_hidden_states_as_the_answer_are_refused():
    with pytest.raises(UserError, match="no matrix reads the norm `norm`, so hidden states are its answer"):
        Rotate().check(tiny.llama_lm().model, [])
    with pytest.raises(UserError, match="it has no table of tokens"):
        Rotate().check(tiny.llama_lm().model.layers, [])


def test_a_run_shows_what_reads_and_writes_the_hidden_states():
    stream = find_stream(tiny.llama_lm())
    block = ["self_attn.o_proj", "mlp.down_proj"]
    assert sorted(stream.writers) == sorted(f"model.layers.{place}.{name}" for place in (0, 1) for name in block)
    assert list(stream.embeddings) == ["model.embed_tokens"] and len(stream.norms) == 5
    read = {name.rpartition(".")[2] for names in stream.readers.values() for name in names}
    assert read == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}


def test_large_channels_are_spread_and_rounding_loses_less_after_it():
    def salient():
        model = tiny.llama_lm()
        for block in find_blocks(model)[1]:
            block.input_layernorm.weight.data[[3, 20]] *= 30
            block.post_attention_layernorm.weight.data[[3, 20]] *= 30
        return model

    def peak(model):
        """Return the largest share of a layer's squared inputs that one channel has."""
        shared = observe(model, [architectures.inputs()], second_moment)
        return max((one.statistic.diagonal() / one.statistic.trace()).max().item() for one in shared[:1])

    expected, before = answer(salient()), peak(salient())
    errors = []
    for stages in ([Rotate()], []):
        model = salient()
        for stage in stages:
            fit(model, stage)
            assert peak(model) < 0.5 * before
        for matrix in matrices(model).values():
            rounded = round_to_grid(matrix.weight, minmax_grid(matrix.weight, Scheme(3), torch.float32), Scheme(3))
            matrix.weight.copy_(rounded)
        errors.append((answer(model) - expected).square().mean())
    assert errors[0] < errors[1]


def test_without_heads_values_stay_as_they_are():
    model, before = tiny.llama_lm(), tiny.llama_lm()
    rotate(model, heads=False)
    down = [each.model.layers[0].self_attn.o_proj.weight for each in (model, before)]
    assert torch.allclose(down[0].norm(dim=0), down[1].norm(dim=0), atol=1e-5)  # only its outputs are rotated
    rotate(before)
    assert not torch.allclose(down[0].norm(dim=0), down[1].norm(dim=0), atol=1e-3)


def test_weights_of_sixteen_bits_are_proven_in_thirty_two():
    model = tiny.llama_lm().bfloat16()
    model.model.rotary_emb = tiny.llama_lm().model.rotary_emb
    expected = answer(model)
    rotate(model)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert 0 < change(answer(model), expected) < 0.1
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_zeros_are_filled_in_and_the_report_says_so():
    model = tiny.llama_lm()
    fit(model, Prune(sparsity=0.5))
    before = capture_state(model)
    stage = Rotate()
    fit(model, stage)
    check_model("rotate", stage, before, model)
    assert not find_zeros(model) and "the zeros of 14 pruned layers were filled in" in stage.limits


def test_prune_before_it_is_refused_by_the_plan_and_after_it_allowed():
    with pytest.raises(UserError, match=r"`rotate` fills in the zeros of `prune` before it: .* Set technique=rotate"):
        plan_chain("prune+finetune+rotate")
    assert [step.name for step in plan_chain("rotate+prune+gptq").steps] == ["rotate", "prune", "gptq"]
    model = tiny.llama_lm()
    for stage in (Rotate(), Prune(sparsity=0.5)):
        fit(model, stage)
    assert measure_sparsity(matrix.weight for matrix in matrices(model).values()) == pytest.approx(0.5, abs=0.01)


def test_a_width_without_a_hadamard_matrix_is_refused_and_a_random_rotation_is_not():
    config = LlamaConfig(**{**GROUPED, "hidden_size": 36 * 3, "num_attention_heads": 6, "head_dim": 18})
    model = LlamaForCausalLM(config)
    Rotate().check(model, [])  # 108 has one
    with pytest.raises(
        UserError, match=r"technique.rotate.heads is true, and no .* or technique.rotate.rotation=random"
    ):
        rotate(model)  # 18 has none
    rotate(LlamaForCausalLM(config), rotation="random")
    narrow = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "hidden_size": 52}))
    with pytest.raises(UserError, match=r"rotation is hadamard, and no Hadamard .* of `llama`, 52, is known. Set"):
        Rotate().check(narrow, [])
    Rotate(rotation="random").check(narrow, [])


def test_a_model_that_computes_something_else_afterwards_fails(monkeypatch):
    monkeypatch.setattr(rotation, "find_offset", lambda norm: 1.0)
    with pytest.raises(PostconditionError, match="should leave the logits of `llama` as they are and changed them by"):
        rotate(randomise(tiny.llama_lm()))
