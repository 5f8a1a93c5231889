import torch

from compress.maths.low_rank import add_update, scale_rows


def test_lora_adds_its_product():
    product = torch.tensor([[2.0], [0.0]]) @ torch.tensor([[0.0, 1.0]])
    assert add_update(torch.tensor([[1.0, 1.0], [5.0, 0.0]]), product).tolist() == [[1, 3], [5, 0]]


def test_dora_gives_rows_their_lengths():
    changed = add_update(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.ones(2))
    assert torch.allclose(changed, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_a_pruned_row_stays_zero_whatever_its_length():
    assert add_update(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([2.0])).tolist() == [[0, 0, 0]]


def test_no_gradient_passes_through_the_lengths_of_rows():
    weight, lengths = torch.tensor([[0.0, 4.0]], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    scale_rows(weight, lengths).sum().backward()
    assert weight.grad is None and lengths.grad.tolist() == [0.25]
