"""Blocks are removed only where the changed config still describes the model."""

import architectures
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.models.depth import check_depth, drop_blocks, explain_fixed, is_removable, make_skeleton, select_removable
from compress.models.skeletons import can_run
from compress.models.students import narrow_config

KEY = "technique.distill.student"


def skeleton(name, **changes):
    with torch.device("meta"):
        return architectures.build(name, **changes)


def test_only_lists_with_an_entry_for_every_block_are_cut():
    model = skeleton("deberta-v2", num_hidden_layers=2)  # as many blocks as kinds of attention
    drop_blocks(model, [0])
    assert model.config.pos_att_type == ["p2c", "c2p"] and model.config.num_hidden_layers == 1
    mixed = skeleton("gemma3_text")
    drop_blocks(mixed, [1])
    assert mixed.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_block_stays_if_the_class_would_build_another_model_without_it():
    first = skeleton("modernbert")
    assert [is_removable(first, [index]) for index in range(3)] == [False, True, True]
    assert select_removable(first, [0, 2, 1], 2) == [2, 1] and select_removable(first, [0, 1, 2], 3) == [1, 2]
    # A block with experts follows one without; the config counts the latter by their place.
    experts = skeleton("qwen3_moe", mlp_only_layers=[0])
    assert [is_removable(experts, [index]) for index in range(3)] == [False, True, True]
    assert is_removable(skeleton("qwen3_moe"), [0])
    assert "without block 0 the others are not the blocks that the config of `qwen3_moe`" in explain_fixed(experts, [0])


def test_a_list_whose_default_is_not_known_is_cut_if_the_model_is_then_the_same():
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=60, hidden_size=64, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert all(is_removable(model, [index]) for index in range(4))
    drop_blocks(model, [1])
    assert model.config.attention_layers == ["global", "global", "local"]


def test_a_model_of_two_stacks_or_of_shared_blocks_is_refused():
    for name, reason in (("bart", "`bart` has two, an encoder and a decoder"), ("albert", "`albert` share 1")):
        with pytest.raises(UserError, match=rf"`mine` needs one stack .*{reason}.* Do without."):
            check_depth(skeleton(name), "`mine`", "Do without.")
    check_depth(skeleton("bert"), "`mine`", "Do without.")


@pytest.mark.parametrize("name", ["deberta-v2", "opt", "gpt2", "falcon", "mixtral", "gemma3_text"])
def test_shapes_that_do_not_fit_are_found_without_a_weight(name):
    model = skeleton(name)
    assert can_run(make_skeleton(model, narrow_config(model.config, 32, KEY)))
    broken = skeleton(name)
    inside = next(m for m in broken.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__)
    inside.weight = torch.nn.Parameter(torch.empty(48, device="meta"))
    assert not can_run(broken)
