import pytest
import torch

from compress.errors import UserError
from compress.maths.hessian import inverse_factor


def test_damping_grows_until_the_hessian_can_be_inverted():
    rank_one = torch.ones(8, 8) * 1e6
    assert inverse_factor(rank_one, 1e-12).isfinite().all()
    with pytest.raises(UserError, match="NaN or infinity"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)
