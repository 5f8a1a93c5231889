"""The mathematics of distillation, by hand, against PyTorch and against TextBrewer."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from compress.errors import UserError
from compress.maths import losses as maths
from compress.maths.losses import (
    build_projection,
    common_loss,
    expand_topk,
    logit_temperature,
    loss_weight,
    match_loss,
    relation_loss,
    soft_loss,
    top_k,
    universal_loss,
)

OURS = ("kl", "reverse_kl", "js")
ATTENTION = ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean")
HIDDEN = ("hidden_mse", "cos", "pkd")
MASKS = {
    "right": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}
PADDED = MASKS["right"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def brewer():
    return pytest.importorskip("textbrewer.presets", reason="pip install textbrewer")


def needs_brewer(name, ours):
    if name not in ours:
        pytest.importorskip("textbrewer", reason="pip install textbrewer")


def logits(*shape):
    return torch.randn(*shape) * 2, torch.randn(*shape) * 2


def features(name, mask=PADDED, student=8, teacher=8, heads=4):
    """What ``name`` compares, of a student and a teacher, as a model of that mask gives it out."""
    batch, tokens = mask.shape
    if name in ATTENTION:
        masked = [torch.randn(batch, heads, tokens, tokens).masked_fill(mask[:, None, None] == 0, -1e4) for _ in "st"]
        return [scores.softmax(-1) for scores in masked]
    count = 3 if name == "minilm" else 2 if name in maths.PAIRS else 1
    states = [[torch.randn(batch, tokens, width) for _ in range(count)] for width in (student, teacher)]
    return [state[0] for state in states] if count == 1 else states


def tensors(x):
    return [x] if isinstance(x, torch.Tensor) else x


def test_textbrewer_is_imported_only_when_it_is_needed():
    script = "import sys, compress.maths.losses; sys.exit('textbrewer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_names_are_textbrewers_and_ours(brewer):
    assert set(maths.SOFT) == {*brewer.KD_LOSS_MAP, *OURS}
    assert set(maths.MATCH) == {*brewer.MATCH_LOSS_MAP, "minilm"}
    assert set(maths.PROJECTIONS) == set(brewer.PROJ_MAP)
    assert set(maths.TEMPERATURES) == set(brewer.TEMPERATURE_SCHEDULER.store)
    assert set(maths.WEIGHTS) == set(brewer.WEIGHT_SCHEDULER)


class TestSoftLoss:
    # Of two classes the teacher gives (3/4, 1/4), the student (1/2, 1/2).
    STUDENT = torch.tensor([[0.0, 0.0]])
    TEACHER = torch.tensor([[math.log(3), 0.0]])
    FORWARD = 3 / 4 * math.log(3 / 4 / (1 / 2)) + 1 / 4 * math.log(1 / 4 / (1 / 2))
    REVERSE = 1 / 2 * math.log(1 / 2 / (3 / 4)) + 1 / 2 * math.log(1 / 2 / (1 / 4))
    # The mixture at beta = 1/2 is (5/8, 3/8).
    JS = (
        3 / 4 * math.log(3 / 4 / (5 / 8)) + 1 / 4 * math.log(1 / 4 / (3 / 8))
        + 1 / 2 * math.log(1 / 2 / (5 / 8)) + 1 / 2 * math.log(1 / 2 / (3 / 8))
    ) / 2  # fmt: skip

    @pytest.mark.parametrize(("name", "expected"), [("kl", FORWARD), ("reverse_kl", REVERSE), ("js", JS)])
    def test_worked_by_hand(self, name, expected):
        assert soft_loss(name, self.STUDENT, self.TEACHER, 1.0).item() == pytest.approx(expected, abs=1e-6)
        # Logits twice as large at T = 2 are the same probabilities, times T^2 = 4.
        doubled = soft_loss(name, 2 * self.STUDENT, 2 * self.TEACHER, 2.0)
        assert doubled.item() == pytest.approx(4 * expected, abs=1e-6)

    @pytest.mark.parametrize(("name", "expected"), [("kl", FORWARD), ("reverse_kl", REVERSE), ("js", JS)])
    def test_multilabel_worked_by_hand(self, name, expected):
        # The sigmoid of log 3 is 3/4 and that of 0 is 1/2. Of the two labels the second agrees: half of the mean.
        student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
        found = soft_loss(name, student, teacher, 1.0, probabilities="sigmoid")
        assert found.item() == pytest.approx(expected / 2, abs=1e-6)

    def test_js_weighs_its_two_parts_with_beta(self):
        # At beta = 1/4 the mixture is 1/4 (3/4, 1/4) + 3/4 (1/2, 1/2) = (9/16, 7/16).
        teacher = 3 / 4 * math.log(3 / 4 / (9 / 16)) + 1 / 4 * math.log(1 / 4 / (7 / 16))
        student = 1 / 2 * math.log(1 / 2 / (9 / 16)) + 1 / 2 * math.log(1 / 2 / (7 / 16))
        found = soft_loss("js", self.STUDENT, self.TEACHER, 1.0, beta=0.25)
        assert found.item() == pytest.approx(teacher / 4 + student * 3 / 4, abs=1e-6)

    def test_js_goes_from_kl_to_reverse_kl(self):
        student, teacher = logits(6, 5)
        student = student / 3
        forward, reverse = (soft_loss(name, student, teacher, 1.0) for name in ("kl", "reverse_kl"))
        assert not torch.isclose(forward, reverse, rtol=0.05)
        low, high = (soft_loss("js", student, teacher, 1.0, beta=beta) for beta in (1e-3, 1 - 1e-3))
        assert torch.isclose(low / 1e-3, forward, rtol=0.02)
        assert torch.isclose(high / 1e-3, reverse, rtol=0.02)
        # By convexity it is at most beta (1 - beta) of both KLs together.
        middle = soft_loss("js", student, teacher, 1.0)
        assert 0 < middle < (forward + reverse) / 4

    def test_js_is_symmetric_in_the_middle(self):
        student, teacher = logits(6, 5)
        there, back = soft_loss("js", student, teacher, 2.0), soft_loss("js", teacher, student, 2.0)
        assert torch.isclose(there, back)

    @pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
    def test_kl_and_reverse_kl_are_pytorchs(self, shape):
        student, teacher = logits(*shape)
        log_s, log_t = ((x / 3).log_softmax(-1).flatten(0, -2) for x in (student, teacher))
        forward = F.kl_div(log_s, log_t.exp(), reduction="batchmean") * 9
        reverse = F.kl_div(log_t, log_s.exp(), reduction="batchmean") * 9
        assert torch.isclose(soft_loss("kl", student, teacher, 3.0), forward)
        assert torch.isclose(soft_loss("reverse_kl", student, teacher, 3.0), reverse)

    @pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
    def test_ce_and_mse_are_textbrewers(self, brewer, shape):
        student, teacher = logits(*shape)
        for name, scale in (("ce", 9), ("mse", 1)):
            expected = brewer.KD_LOSS_MAP[name](student, teacher, 3.0) * scale
            assert torch.isclose(soft_loss(name, student, teacher, 3.0), expected)

    def test_kl_is_ce_less_the_entropy_of_the_teacher(self, brewer):
        student, teacher = logits(6, 5)
        entropy = torch.distributions.Categorical(logits=teacher / 3).entropy().mean() * 9
        ce = soft_loss("ce", student, teacher, 3.0)
        assert torch.isclose(soft_loss("kl", student, teacher, 3.0), ce - entropy, atol=1e-5)

    def test_multilabel_ce_is_binary_cross_entropy_with_soft_targets(self, brewer):
        student, teacher = logits(6, 5)
        expected = F.binary_cross_entropy_with_logits(student / 2, (teacher / 2).sigmoid()) * 4
        assert torch.isclose(soft_loss("ce", student, teacher, 2.0, probabilities="sigmoid"), expected)

    @pytest.mark.parametrize("probabilities", ["softmax", "sigmoid", None])
    def test_mse_is_of_the_logits_whatever_their_kind(self, brewer, probabilities):
        student, teacher = logits(6, 5)
        found = soft_loss("mse", student, teacher, 2.0, probabilities=probabilities)
        assert torch.isclose(found, F.mse_loss(student, teacher) / 4)

    @pytest.mark.parametrize("name", maths.SOFT)
    def test_a_temperature_for_each_example(self, name):
        needs_brewer(name, OURS)
        student, teacher = logits(3, 5)
        temperatures = torch.tensor([1.0, 2.0, 4.0])
        rows = [soft_loss(name, student[[i]], teacher[[i]], float(temperatures[i])) for i in range(3)]
        assert torch.isclose(soft_loss(name, student, teacher, temperatures), torch.stack(rows).mean())

    @pytest.mark.parametrize("shape", [(2,), (2, 5)])
    def test_temperatures_of_examples_or_tokens_keep_to_the_mask(self, shape):
        student, teacher = logits(2, 5, 7)
        temperatures = torch.rand(shape) + 1
        each = temperatures.reshape(2, -1).expand(2, 5)
        found = soft_loss("kl", student, teacher, temperatures, PADDED)
        keep = PADDED.bool()
        rows = [soft_loss("kl", s[None], t[None], float(c)) for s, t, c in zip(*(
            x[keep] for x in (student, teacher, each)
        ))]  # fmt: skip
        assert torch.isclose(found, torch.stack(rows).mean())

    def test_a_temperature_for_each_example_of_many_labels(self):
        student, teacher = logits(2, 5)
        found = soft_loss("kl", student, teacher, torch.tensor([1.0, 3.0]), probabilities="sigmoid")
        rows = [soft_loss("kl", student[[i]], teacher[[i]], t, probabilities="sigmoid") for i, t in enumerate((1, 3))]
        assert torch.isclose(found, torch.stack(rows).mean())

    @pytest.mark.parametrize("name", maths.SOFT)
    def test_padding_does_not_count(self, name):
        needs_brewer(name, OURS)
        student, teacher = logits(2, 5, 7)
        found = soft_loss(name, student, teacher, 2.0, PADDED)
        alone = soft_loss(name, *(x[PADDED.bool()] for x in (student, teacher)), 2.0)
        other = soft_loss(name, *(x.masked_fill(PADDED[..., None] == 0, torch.nan) for x in (student, teacher)),
                                2.0, PADDED)  # fmt: skip
        assert torch.isclose(found, alone) and torch.equal(found, other)
        assert not torch.isclose(found, soft_loss(name, student, teacher, 2.0))

    def test_a_batch_of_padding_alone_is_no_loss(self):
        student, teacher = logits(2, 5, 7)
        found = soft_loss("kl", student.requires_grad_(), teacher, 2.0, torch.zeros(2, 5))
        found.backward()
        assert found == 0 and (student.grad == 0).all()

    @pytest.mark.parametrize("name", maths.SOFT)
    @pytest.mark.parametrize("probabilities", ["softmax", "sigmoid"])
    def test_only_the_student_learns_and_towards_the_teacher(self, name, probabilities):
        needs_brewer(name, OURS)
        student, teacher = (x.requires_grad_() for x in logits(4, 5))
        before = soft_loss(name, student, teacher, 2.0, probabilities=probabilities)
        before.backward()
        assert teacher.grad is None
        after = soft_loss(name, student - 0.1 * student.grad, teacher, 2.0, probabilities=probabilities)
        assert after < before
        same = teacher.detach().clone().requires_grad_()
        soft_loss(name, same, teacher, 2.0, probabilities=probabilities).backward()
        assert same.grad.abs().max() < 1e-5

    @pytest.mark.parametrize("name", [name for name in maths.SOFT if name != "mse"])
    def test_gradients_are_as_large_at_every_temperature(self, name):
        needs_brewer(name, OURS)
        student, teacher = logits(4, 5)

        def gradient(temperature):
            leaf = student.clone().requires_grad_()
            soft_loss(name, leaf, teacher, temperature).backward()
            return leaf.grad.norm()

        assert 1 / 3 < gradient(16.0) / gradient(4.0) < 3  # and not 1/16
        assert torch.isclose(gradient(100.0), gradient(50.0), rtol=0.1)

    def test_a_teacher_in_half_precision(self):
        student, teacher = logits(4, 5)
        found = soft_loss("kl", student.bfloat16(), teacher.half(), 2.0)
        assert found.dtype == torch.float32
        assert torch.isclose(found, soft_loss("kl", student, teacher, 2.0), rtol=0.05)

    @pytest.mark.parametrize("name", [name for name in maths.SOFT if name != "mse"])
    def test_a_regression_has_no_probabilities(self, name):
        with pytest.raises(UserError, match=f"loss is {name}, which compares probabilities; .* Set loss=mse"):
            soft_loss(name, torch.zeros(2, 1), torch.zeros(2, 1), 1.0, probabilities=None)

    @pytest.mark.parametrize("beta", [0, 1, 1.5])
    def test_js_needs_a_beta_inside_its_limits(self, beta):
        with pytest.raises(UserError, match=f"beta is {beta:g}; `js` takes a number between 0 and 1"):
            soft_loss("js", self.STUDENT, self.TEACHER, 1.0, beta=beta)


class TestTopK:
    def test_worked_by_hand(self):
        # Of (1/2, 1/4, 1/8, 1/8) the two largest are kept, and the 1/4 left is 1/8 for each other: exact by chance.
        # Of (0.5, 0.3, 0.15, 0.05) 0.2 is left, which is 0.1 for each other.
        probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.3, 0.15, 0.05]])
        values, indices = top_k(probabilities.log() + 7, 2)
        assert torch.allclose(values.exp(), torch.tensor([[0.5, 0.25], [0.5, 0.3]]))
        assert indices.tolist() == [[0, 1], [0, 1]]
        found = expand_topk(values, indices, 4).exp()
        assert torch.allclose(found, torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.3, 0.1, 0.1]]))

    def test_exact_where_all_are_kept(self):
        teacher = torch.randn(2, 3, 11)
        found = expand_topk(*top_k(teacher, 11), 11)
        assert torch.allclose(found, teacher.log_softmax(-1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("sharpness", [1, 10, 100])
    def test_a_distribution_in_any_precision(self, dtype, sharpness):
        values, indices = top_k(torch.randn(4, 6, 50) * sharpness, 10)
        found = expand_topk(values.to(dtype), indices.int(), 50)
        assert found.isfinite().all()
        assert torch.allclose(found.exp().sum(-1), torch.ones(4, 6), atol=torch.finfo(dtype).eps)

    def test_every_loss_works_on_it_and_nears_that_of_the_whole_teacher(self, brewer):
        student, teacher = logits(2, 5, 30)
        for name in maths.SOFT[:2] + maths.SOFT[3:]:  # mse is of logits that are determined up to a constant alone
            exact = soft_loss(name, student, teacher, 2.0, PADDED)
            gaps = [
                (soft_loss(name, student, expand_topk(*top_k(teacher, k), 30), 2.0, PADDED) - exact)
                for k in (5, 20, 30)
            ]
            assert abs(gaps[0]) > abs(gaps[1]) > abs(gaps[2])
            assert abs(gaps[2]) < 1e-5


class TestMatchLoss:
    @pytest.mark.parametrize("name", [name for name in maths.MATCH if name != "minilm"])
    def test_textbrewers_where_nothing_is_padded(self, brewer, name):
        student, teacher = features(name, torch.ones(2, 5))
        # Its cross-entropies take scores; without a mask they would drop all that are negative.
        ones = torch.ones(2, 5) if name.startswith("attention_ce") else None
        given = [x.log() for x in (student, teacher)] if ones is not None else [student, teacher]
        expected = brewer.MATCH_LOSS_MAP[name](*given, ones)
        assert torch.isclose(match_loss(name, student, teacher, torch.ones(2, 5)), expected)

    @pytest.mark.parametrize("name", [name for name in maths.MATCH if name not in ("mmd", "nst", "minilm")])
    def test_textbrewers_where_texts_are_padded(self, brewer, name):
        student, teacher = features(name)
        given = [x.clamp(min=1e-38).log() for x in (student, teacher)] if "_ce" in name else [student, teacher]
        expected = brewer.MATCH_LOSS_MAP[name](*given, PADDED)
        assert torch.isclose(match_loss(name, student, teacher, PADDED), expected)

    @pytest.mark.parametrize("padding", MASKS)
    @pytest.mark.parametrize("name", maths.MATCH)
    def test_padding_does_not_count(self, name, padding):
        needs_brewer(name, ("minilm",))
        mask = MASKS[padding]
        student, teacher = features(name, mask)

        def changed(x):
            if name in ATTENTION:
                real = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
                return torch.where(real, x, torch.rand_like(x))
            return torch.where(mask[..., None].bool(), x, torch.randn_like(x) * 10)

        found = match_loss(name, student, teacher, mask, heads=2)
        other = [[changed(x) for x in tensors(states)] for states in (student, teacher)]
        other = [states[0] if len(states) == 1 else states for states in other]
        assert torch.isclose(found, match_loss(name, *other, mask, heads=2))
        if (name, padding) != ("pkd", "right"):  # which needs no mask
            assert not torch.isclose(found, match_loss(name, *other, torch.ones(2, 5), heads=2))

    @pytest.mark.parametrize("name", maths.MATCH)
    def test_it_does_not_matter_how_far_texts_are_padded(self, name):
        needs_brewer(name, ("minilm",))
        student, teacher = features(name)

        def padded(x):
            return F.pad(x, (0, 4, 0, 4) if name in ATTENTION else (0, 0, 0, 4))

        further = [[padded(x) for x in tensors(states)] for states in (student, teacher)]
        further = [states[0] if len(states) == 1 else states for states in further]
        expected = match_loss(name, student, teacher, PADDED, heads=2)
        assert torch.isclose(match_loss(name, *further, F.pad(PADDED, (0, 4)), heads=2), expected)

    @pytest.mark.parametrize("name", maths.MATCH)
    def test_only_the_student_learns(self, name):
        needs_brewer(name, ("minilm",))
        student, teacher = features(name)
        for x in [*tensors(student), *tensors(teacher)]:
            x.requires_grad_()
        match_loss(name, student, teacher, PADDED, heads=2).backward()
        assert all(x.grad is None for x in tensors(teacher))
        assert all(x.grad.isfinite().all() and x.grad.any() for x in tensors(student))

    def test_attention_ce_is_the_cross_entropy_of_the_probabilities(self, brewer):
        student, teacher = features("attention_ce")
        rows = [
            -(t[:, i, :n] * s[:, i, :n].log()).sum(-1)
            for s, t, n in zip(student, teacher, PADDED.sum(1))
            for i in range(n)
        ]
        assert torch.isclose(match_loss("attention_ce", student, teacher, PADDED), torch.stack(rows).mean())

    def test_attention_ce_of_a_decoder_that_sees_the_past_alone(self, brewer):
        student, teacher = ((x.tril() / x.tril().sum(-1, keepdim=True)) for x in features("attention_ce"))
        entropy = -torch.xlogy(teacher, teacher).sum(-1)[PADDED.bool()[:, None].expand(-1, 4, -1)].mean()
        assert torch.isclose(match_loss("attention_ce", teacher, teacher, PADDED), entropy)
        student.requires_grad_()
        loss = match_loss("attention_ce", student, teacher, PADDED)
        loss.backward()
        assert loss > entropy and student.grad.isfinite().all()

    def test_pkd_is_at_the_first_token_wherever_padding_is(self, brewer):
        student, teacher = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
        # Unit vectors at right angles are |(1, 0) - (0, 1)|^2 = 2 apart, the same ones 0: the mean is 1.
        student[0, 0], teacher[0, 0] = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        student[1, 1], teacher[1, 1] = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
        mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
        assert match_loss("pkd", student, teacher, mask).item() == pytest.approx(1)

    def test_nst_of_widths_that_differ_worked_by_hand(self, brewer):
        # One text of two tokens and one of padding. Student, width 1: (1, 2), relations / 1 = [[1, 2], [2, 4]].
        # Teacher, width 2: the unit vectors, relations / 2 = [[1/2, 0], [0, 1/2]].
        # Mean of (1/2, 2, 2, 7/2)^2 = (1/4 + 4 + 4 + 49/4) / 4 = 5.125.
        student = torch.tensor([[[1.0], [2.0], [9.0]]])
        teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
        found = match_loss("nst", [student, student], [teacher, teacher], torch.tensor([[1, 1, 0]]))
        assert found.item() == pytest.approx(5.125)

    def test_states_in_half_precision(self, brewer):
        student, teacher = features("hidden_mse")
        found = match_loss("hidden_mse", student.bfloat16(), teacher.half(), PADDED)
        assert torch.isclose(found, match_loss("hidden_mse", student, teacher, PADDED), rtol=0.05)


class TestRelations:
    def test_worked_by_hand(self):
        # Teacher, one head of width 1: (0, a) with a^2 = log 3. Relations A A^T = [[0, 0], [0, log 3]], so the rows
        # are (1/2, 1/2) and (1/4, 3/4). The student's states are 0, and all its rows (1/2, 1/2).
        teacher = torch.tensor([[[0.0], [math.sqrt(math.log(3))]]])
        expected = (0 + 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)) / 2
        found = relation_loss(torch.zeros(1, 2, 1), teacher, 1, torch.ones(1, 2))
        assert found.item() == pytest.approx(expected, abs=1e-6)

    def test_heads_and_scale_worked_by_hand(self):
        # Two heads of width 4: the first holds the states above four times over, so A A^T = 4 log 3 / sqrt(4); to get
        # the same rows they are divided by sqrt(2). The second head agrees: half of the mean.
        one = torch.tensor([[[0.0], [math.sqrt(math.log(3) / 2)]]])
        teacher = torch.cat([one.expand(1, 2, 4), torch.zeros(1, 2, 4)], dim=-1)
        expected = (1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)) / 4
        found = relation_loss(torch.zeros(1, 2, 6), teacher, 2, torch.ones(1, 2))
        assert found.item() == pytest.approx(expected, abs=1e-6)

    def test_pytorchs_kl_of_each_text_alone(self):
        student, teacher = torch.randn(2, 5, 12), torch.randn(2, 5, 24)
        rows = []
        for s, t, n in zip(student, teacher, PADDED.sum(1)):
            for head in range(3):
                a, b = s[:n, head * 4 : head * 4 + 4], t[:n, head * 8 : head * 8 + 8]
                q, p = (a @ a.T / 4**0.5).log_softmax(-1), (b @ b.T / 8**0.5).softmax(-1)
                rows.append(F.kl_div(q, p, reduction="none").sum(-1))
        assert torch.isclose(relation_loss(student, teacher, 3, PADDED), torch.cat(rows).mean())

    def test_minilm_is_the_sum_over_query_key_and_value(self):
        student, teacher = features("minilm", student=8, teacher=12)
        parts = [relation_loss(s, t, 4, PADDED) for s, t in zip(student, teacher)]
        assert torch.isclose(match_loss("minilm", student, teacher, PADDED, heads=4), sum(parts))

    @pytest.mark.parametrize("widths", [(8, 9), (9, 8)])
    def test_heads_must_divide_both_widths(self, widths):
        student, teacher = (torch.randn(2, 5, width) for width in widths)
        with pytest.raises(UserError, match="heads is 4, which does not divide the width 9"):
            relation_loss(student, teacher, 4, PADDED)


class TestSchedules:
    STUDENT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    TEACHER = torch.tensor([[2.0, 0.0], [0.0, 2.0]])

    def test_a_constant_temperature(self):
        assert logit_temperature("constant", 4.0, (), *logits(3, 5)) == 4.0

    @pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5)])
    @pytest.mark.parametrize(("name", "arguments"), [("flsw", (1, 2)), ("cwsm", (0.5,))])
    def test_textbrewers_temperatures(self, brewer, name, arguments, shape):
        student, teacher = logits(*shape)
        expected = brewer.TEMPERATURE_SCHEDULER[(name, *arguments)](student, teacher, 8.0)
        found = logit_temperature(name, 8.0, arguments, student, teacher)
        assert torch.allclose(found, expected) and found.std() > 0

    def test_flsw_worked_by_hand(self, brewer):
        # The cosines of student and teacher are 1 and 0, so w = (1 - cosine)^2 = (0, 1), its mean 1/2, and the
        # temperatures are 4 + (1/2 - w) * 2 = (5, 3): the example that they see alike is softened more.
        found = logit_temperature("flsw", 4.0, (2, 2), self.STUDENT, self.TEACHER)
        assert torch.allclose(found, torch.tensor([5.0, 3.0]), atol=1e-3)

    @pytest.mark.parametrize(("name", "arguments"), [("flsw", (1, 2)), ("cwsm", (0.5,))])
    def test_padding_does_not_count(self, brewer, name, arguments):
        student, teacher = logits(2, 5, 7)
        found = logit_temperature(name, 8.0, arguments, student, teacher, PADDED)
        student[PADDED == 0], teacher[PADDED == 0] = 9.0, -9.0
        assert torch.equal(found, logit_temperature(name, 8.0, arguments, student, teacher, PADDED))
        assert (found[PADDED == 0] == 8).all()

    def test_arguments_that_are_missing(self):
        with pytest.raises(UserError, match=r"`flsw` has the arguments \[1\]; it takes beta, gamma"):
            logit_temperature("flsw", 4.0, [1], *logits(3, 5))
        with pytest.raises(UserError, match=r"`constant` has the arguments \[1\]; it takes no argument"):
            logit_temperature("constant", 4.0, [1], *logits(3, 5))

    def test_a_temperature_below_zero(self, brewer):
        # As above: 4 + (1/2 - 1) * 10 = -1.
        with pytest.raises(UserError, match="beta=10 reached -1; .* Set a lower beta"):
            logit_temperature("flsw", 4.0, (10, 2), self.STUDENT, self.TEACHER)

    def test_weights(self, brewer):
        assert [loss_weight("linear_decay", x) for x in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
        assert [loss_weight("linear_growth", x) for x in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(("name", "lowest"), [("linear", -math.inf), ("relu", 0), ("tanh", -1)])
def test_a_projection_goes_from_the_students_width_to_the_teachers(brewer, name, lowest):
    layer = build_projection([name, 384, 768])
    found = layer(torch.randn(2, 3, 384) * 100)
    assert found.shape == (2, 3, 768) and found.min() >= lowest
    assert sum(p.numel() for p in layer.parameters()) == 384 * 768 + 768


def test_probabilities_of_other_vocabularies_are_compared_by_rank():
    student = torch.tensor([[0.5, 0.3, 0.2]]).log()
    teacher = torch.tensor([[0.1, 0.6, 0.0001, 0.2999]]).log()
    expected = abs(0.5 - 0.6) + abs(0.3 - 0.2999) + abs(0.2 - 0.1) + 0.0001
    assert universal_loss(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-6)
    assert universal_loss(student, student[:, [2, 0, 1]], 1.0).item() == pytest.approx(0, abs=1e-6)


def test_events_are_compared_by_the_sums_of_their_tokens():
    student = torch.tensor([[0.5, 0.2, 0.1, 0.2, 1.0]]).log().requires_grad_()  # the last is no token but padding
    target = torch.tensor([[0.6, 0.15, 0.25, 0.0]])
    loss = common_loss(student, target, torch.tensor([0, 1, 1, 2]), 1.0)
    expected = sum(p * math.log(p / q) for p, q in zip((0.6, 0.15, 0.25), (0.5, 0.3, 0.2)))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert torch.isfinite(student.grad).all() and student.grad[0, 4] == 0
    assert common_loss(student[:0], target[:0], torch.tensor([0, 1, 1, 2]), 1.0).item() == 0
