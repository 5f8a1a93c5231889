import copy

import architectures
import pytest
import tiny
import torch

from compress.models.blocks import read_blocks
from compress.models.compensation import compensate_removal, fit_kept
from compress.models.importance import score_by_fisher
from compress.models.matrices import Matrix
from compress.models.shapes import remove_units


def test_the_kept_inputs_take_over_what_depends_on_them():
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    x[:, 3] = 2 * x[:, 0] - x[:, 1] + 5  # a removed input that the others and the bias can replace
    layer = torch.nn.Linear(4, 3)
    expected = layer(x)
    joined = torch.cat([x, torch.ones(200, 1)], 1)
    kept = torch.tensor([True, True, True, False])
    with torch.no_grad():
        fit_kept(Matrix("layer", layer), kept, joined.T @ joined)
        layer.weight[:, 3] = 0
        torch.testing.assert_close(layer(x), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_compensated_block_is_closer_to_what_it_was(name):
    model = architectures.build(name)
    batches = [architectures.inputs(rows=4, length=12) for _ in range(4)]
    masks = {
        "groups": [torch.arange(block.groups) > 0 for block in read_blocks(model)],
        "ffn": [torch.arange(block.ffn) % 3 > 0 for block in read_blocks(model)],
    }

    def errors(candidate):
        """Of the first block's readers, on the inputs of the whole model."""
        block, whole = read_blocks(candidate)[0], read_blocks(model)[0]
        each = []
        for part, layer, before in (
            ("groups", block.attention_out, whole.attention_out),
            ("ffn", block.ffn_out, whole.ffn_out),
        ):
            kept = masks[part][0]
            seen = []
            hook = before.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
            for batch in batches:
                model(**batch)
            hook.remove()
            used = kept.repeat_interleave(seen[0][0].shape[-1] // len(kept))
            each.append(sum(float((layer(x * used) - y).square().sum()) for x, y in seen))
        return each

    plain, compensated = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        compensate_removal(compensated, batches, masks)
        assert all(after < 0.99 * before for after, before in zip(errors(compensated), errors(plain)))
    remove_units(compensated, **masks)
    assert torch.isfinite(compensated(**batches[0]).logits).all()


def test_fisher_scores_are_the_squared_slopes_of_each_text():
    model = tiny.bert()
    batch = next(iter(tiny.loader()))
    scores = score_by_fisher(model, [batch])
    block = read_blocks(model)[1]
    step, expected = 1e-3, []
    for row in range(len(batch["input_ids"])):
        text = {key: value[row : row + 1] for key, value in batch.items()}
        losses = []
        for factor in (1 - step, 1 + step):
            changed = copy.deepcopy(model).double()
            read_blocks(changed)[1].ffn_out.weight.data[:, 7] *= factor
            losses.append(changed(**text).loss.item())
        expected.append(((losses[1] - losses[0]) / (2 * step)) ** 2 / 2)
    assert block.ffn == len(scores["ffn"][1])
    assert scores["ffn"][1][7].item() == pytest.approx(sum(expected) / len(expected), rel=1e-2)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
