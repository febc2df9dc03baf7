"""The formulas by examples that can be worked out on paper, one property per test.

`make grade` prints the name of a test as a sentence, which says what must hold (docs/exercises.md).
"""
import math

import pytest
import torch
from helpers.arrays import nll

from dpo import dpo_loss
from model import GPT, GPTConfig, Linear, sample
from ppo import AdaptiveKL, approximate_kl, gae, kl_rewards, policy_loss, value_loss, whiten
from reward_model import pairwise_loss, ranking_loss
from sft import sft_loss


def numbers(*x):
    return torch.tensor(x, dtype=torch.float64)


def row(*x):
    """(1, T)"""
    return numbers(x)


def acts(*x):
    """A mask (1, T)."""
    return torch.tensor([x]) > 0


def near(found, want, off=1e-12):
    """With a message that shows both: there are few numbers."""
    assert found is not None, "nothing is returned"
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=off, msg=lambda said: (
        f"expected {shown(want)}, got {shown(found)}" if "not close" in said else said))


def shown(x):
    return f"{x:.4g}" if x.dim() == 0 else f"[{', '.join(shown(y) for y in x)}]"


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# --------------------------------------------------------------------------------------------- SFT

def test_sft_loss_is_minus_the_mean_of_log_p():
    near(sft_loss(row(-2, -4), acts(1, 1)), 3.0)


def test_sft_loss_counts_every_token_alike_however_long_its_row_is():
    logprobs, mask = numbers([-1, -1, -1], [-5, 0, 0]), torch.tensor([[1, 1, 1], [1, 0, 0]]) > 0
    near(sft_loss(logprobs, mask), 8 / 4)


def test_sft_loss_does_not_look_outside_the_mask():
    near(sft_loss(row(-7, -1, -3, math.nan), acts(0, 1, 1, 0)), 2.0)


# ------------------------------------------------------------------------- log-probabilities, entropies

def read(logits, chosen, temperature=1.0, entropy=True, entropy_grad=False):
    """What GPT.read_logprobs reads from logits (n, 3), whose hidden states they are, because W is 1."""
    model = GPT(GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=3))
    W = torch.eye(3, dtype=torch.float64)
    return model.read_logprobs(logits, torch.tensor(chosen), W, temperature, entropy, entropy_grad)


def test_read_logprobs_are_those_of_the_chosen_tokens():
    near(read(numbers([1, 2, 4], [1, 2, 4]).log(), [1, 2])[0], numbers(2 / 7, 4 / 7).log())


def test_read_logprobs_at_temperature_2_take_half_of_each_logit():
    near(read(numbers([1, 4, 16]).log(), [2], 2.0)[0], numbers(4 / 7).log())


def test_read_logprobs_alone_if_no_entropy_is_asked_for():
    assert len(read(numbers([1, 2, 4]), [0], entropy=False)) == 1


def test_read_entropy_of_equal_logits_is_the_log_of_their_number():
    near(read(numbers([5, 5, 5]), [0])[1], [math.log(3)])


def test_read_entropy_is_of_the_distribution_at_that_temperature():
    p = (1 / 7, 2 / 7, 4 / 7)
    near(read(numbers([1, 4, 16]).log(), [0], 2.0)[1], [-sum(x * math.log(x) for x in p)])


def test_read_entropy_of_a_token_that_is_certain_is_0_and_its_log_p_finite():
    logprobs, entropies = read(numbers([1e4, -1e4, 0]).expand(2, 3), [0, 1])
    near(logprobs, [0, -2e4])
    near(entropies, [0, 0])


def test_read_entropy_has_a_gradient_only_if_it_is_asked_for():
    logits = numbers([0, 1, 2]).requires_grad_()
    assert not read(logits, [0])[1].requires_grad and read(logits, [0], entropy_grad=True)[1].requires_grad


# ----------------------------------------------------------------------------------- reward model

def test_pairwise_loss_falls_when_the_chosen_answer_scores_higher():
    low, high = numbers(0), numbers(2)
    assert pairwise_loss(high, low) < pairwise_loss(low, low) < pairwise_loss(low, high)


def test_pairwise_loss_of_equal_scores_is_that_of_tossing_a_coin_log_2():
    near(pairwise_loss(numbers(3, -1), numbers(3, -1)), math.log(2))


def test_pairwise_loss_is_a_mean_over_pairs():
    near(pairwise_loss(numbers(1, 0), numbers(0, 1)), (nll(1) + nll(-1)) / 2)


def test_pairwise_loss_with_a_margin_asks_for_that_much_more_difference():
    near(pairwise_loss(numbers(3), numbers(1), 2.0), math.log(2))
    near(pairwise_loss(numbers(3, 0), numbers(1, 0), numbers(2, 1)), (math.log(2) + nll(-1)) / 2)


def test_ranking_loss_takes_rank_1_for_the_best():
    near(ranking_loss(row(3, 0), torch.tensor([[1, 2]])), nll(3))


def test_ranking_loss_makes_no_pair_of_a_tie():
    near(ranking_loss(row(9, -9, 0), torch.tensor([[1, 1, 2]])), (nll(9) + nll(-9)) / 2)


def test_ranking_loss_makes_no_pair_with_an_answer_that_is_not_there():
    near(ranking_loss(row(1, 0, 50), torch.tensor([[1, 2, 0]])), nll(1))


def test_ranking_loss_counts_every_prompt_alike_however_many_pairs_it_has():
    scores, ranks = numbers([0, 0, 0], [0, 2, 0]), torch.tensor([[1, 2, 3], [1, 2, 0]])
    near(ranking_loss(scores, ranks), (math.log(2) + nll(-2)) / 2)


def test_ranking_loss_with_a_soft_label_asks_both_sides_for_the_margin():
    near(ranking_loss(row(0, 0), torch.tensor([[1, 2]]), numbers(1), numbers(0.25)), nll(-1))


def test_ranking_loss_by_gradient_steps_puts_the_scores_in_their_order():
    scores, ranks = torch.zeros(1, 4).double().requires_grad_(), torch.tensor([[3, 1, 4, 2]])
    for _ in range(20):
        scores = (scores - gradient(ranking_loss(scores, ranks), scores)).detach().requires_grad_()
    assert scores.argsort(descending=True)[0].tolist() == [1, 3, 0, 2]


# --------------------------------------------------------------------------------------- sampling

def drawn(p, top_k=0, top_p=1.0):
    """The share of each token when u goes evenly from 0 to 1."""
    u = (torch.arange(1000).double() + 0.5) / 1000
    tokens = sample(numbers(p).expand(1000, len(p)), top_k, top_p, u)
    return torch.bincount(tokens, minlength=len(p)).double() / 1000


def test_sample_picks_the_token_where_the_sum_of_probabilities_passes_u():
    p, u = numbers(0.2, 0.5, 0.3).expand(5, 3), numbers(0.1, 0.21, 0.69, 0.71, 0.99)
    assert sample(p, 0, 1.0, u).tolist() == [0, 1, 1, 2, 2]


def test_sample_with_top_k_draws_from_the_k_likeliest_and_no_more():
    assert (drawn([0.2, 0.1, 0.3, 0.4], top_k=2) > 0).tolist() == [False, False, True, True]


def test_sample_with_top_p_still_draws_the_token_that_crosses_p():
    assert (drawn([0.3, 0.5, 0.2], top_p=0.6) > 0).tolist() == [True, True, False]


def test_sample_with_both_takes_top_p_of_what_top_k_has_left():
    """Of 0.4 and 0.3, the first alone holds more than half."""
    assert (drawn([0.1, 0.2, 0.3, 0.4], top_k=2, top_p=0.5) > 0).tolist() == [False, False, False, True]


def test_sample_scales_what_is_left_to_a_sum_of_one():
    near(drawn([0.2, 0.6, 0.15, 0.05], top_k=2), numbers(0.25, 0.75, 0, 0), 0.002)


def test_sample_leaves_the_callers_probabilities_as_they_are():
    p = numbers([0.2, 0.5, 0.3])
    sample(p, 2, 0.5, numbers(0.9))
    near(p, numbers([0.2, 0.5, 0.3]))


# ------------------------------------------------------------------------------------- KL rewards

def test_kl_rewards_charge_a_token_that_the_policy_likes_more_than_the_reference_does():
    rewards = kl_rewards(numbers(0), row(-1, -3), row(-2, -2), acts(1, 1), 0.5)
    near(rewards, row(-0.5, 0.5))


def test_kl_rewards_pay_the_score_on_the_last_action_and_not_on_the_padding():
    same = row(-1, -1, -1, -1)
    near(kl_rewards(numbers(3), same, same, acts(0, 1, 1, 0), 0.5), row(0, 0, 3, 0))


def test_kl_rewards_charge_each_token_for_its_own_part():
    near(kl_rewards(numbers(5), row(0, 0, 0), row(-1, 0, -2), acts(1, 1, 1), 0.1), row(-0.1, 0, 4.8))


# -------------------------------------------------------------------------------------- whitening

# whiten adds 1e-8 to the variance.
OFF = 1e-6


def test_whiten_gives_mean_0_and_standard_deviation_1():
    near(whiten(row(3, 5, 7, 9), acts(1, 1, 1, 1)), row(-3, -1, 1, 3) / math.sqrt(5), OFF)


def test_whiten_counts_the_tokens_of_all_rows_together():
    mask = torch.ones(2, 2, dtype=torch.bool)
    near(whiten(numbers([1, 1], [3, 3]), mask), numbers([-1, -1], [1, 1]), OFF)


def test_whiten_does_not_look_at_the_padding_and_leaves_0_there():
    for shift_mean, want in ((True, row(-1, 1, 0)), (False, row(1, 3, 0))):
        near(whiten(row(1, 3, 99), acts(1, 1, 0), shift_mean), want, OFF)


def test_whiten_without_shift_mean_leaves_the_mean_where_it_was():
    near(whiten(row(1, 5), acts(1, 1), shift_mean=False), row(2, 4), OFF)


# -------------------------------------------------------------------------------------------- GAE

def test_gae_of_the_last_token_does_not_look_at_the_padding():
    advantages, _ = gae(row(0, 5, 70), row(0, 2, 80), acts(0, 1, 0), 1.0, 0.9)
    near(advantages, row(0, 3, 0))


def test_gae_looks_ahead_so_that_a_reward_counts_for_what_came_before_it():
    near(gae(row(0, 1, 0), row(0, 0, 0), acts(1, 1, 1), 1.0, 0.5)[0], row(0.5, 1, 0))


def test_gae_counts_a_reward_less_by_gamma_and_lambda_for_each_token_before_it():
    near(gae(row(0, 0, 1), row(0, 0, 0), acts(1, 1, 1), 0.8, 0.5)[0], row(0.16, 0.4, 1))


def test_gae_with_lambda_0_asks_the_critic_what_the_next_state_is_worth():
    near(gae(row(0, 0, 0), row(1, 4, 2), acts(1, 1, 1), 0.5, 0.0)[0], row(1, -3, -2))


def test_gae_goes_over_a_gap_between_two_turns_as_if_it_were_not_there():
    whole, _ = gae(row(1, 2), row(3, 5), acts(1, 1), 0.9, 0.8)
    parted, _ = gae(row(1, 9, 2), row(3, 9, 5), acts(1, 0, 1), 0.9, 0.8)
    near(parted, row(whole[0, 0], 0, whole[0, 1]))


def test_gae_returns_advantage_plus_value_which_the_critic_should_have_said():
    advantages, returns = gae(row(1, 2), row(3, 5), acts(1, 1), 0.9, 0.8)
    near(returns, advantages + row(3, 5))


# ------------------------------------------------------------------------------------- policy loss

def pushed(ratio, advantage):
    """The gradient of log π of one token, whose π is ratio times the old one."""
    logprobs = row(math.log(ratio)).requires_grad_()
    loss, clip_fraction = policy_loss(logprobs, row(0), row(advantage), acts(1), 0.2)
    return gradient(loss, logprobs).item(), clip_fraction.item()


def test_policy_loss_starts_with_the_plain_policy_gradient():
    logprobs = row(-1, -2).requires_grad_()
    loss, _ = policy_loss(logprobs, row(-1, -2), row(1, -3), acts(1, 1), 0.2)
    near(loss, 1.0)
    near(gradient(loss, logprobs), row(-0.5, 1.5))


def test_policy_loss_pushes_no_further_what_has_gone_far_enough():
    assert pushed(1.5, 1.0)[0] == 0 and pushed(0.5, -1.0)[0] == 0


def test_policy_loss_still_corrects_what_has_moved_the_wrong_way():
    assert pushed(0.5, 1.0)[0] == pytest.approx(-0.5) and pushed(1.5, -1.0)[0] == pytest.approx(1.5)


def test_policy_loss_counts_every_ratio_further_than_epsilon_from_1_in_its_clip_fraction_and_no_other():
    far, near_1 = ((1.5, 1.0), (0.5, -1.0), (0.5, 1.0), (1.5, -1.0), (1.5, 0.0)), ((1.1, 1.0), (0.9, -1.0))
    assert [pushed(*x)[1] for x in (*far, *near_1)] == [1, 1, 1, 1, 1, 0, 0]


def test_policy_loss_counts_every_token_alike_however_long_its_answer_is():
    advantages, mask = numbers([1, 1, 1], [5, 0, 0]), torch.tensor([[1, 1, 1], [1, 0, 0]]) > 0
    near(policy_loss(0 * advantages, 0 * advantages, advantages, mask, 0.2)[0], -8 / 4)


def test_policy_loss_sends_no_gradient_to_advantages_or_old_log_probabilities():
    new, old, advantages = (row(x).requires_grad_() for x in (-1, -1.1, 2))
    policy_loss(new, old, advantages, acts(1), 0.2)[0].backward()
    assert old.grad is None and advantages.grad is None


# -------------------------------------------------------------------------------------- value loss

def valued(value, old, wanted):
    """The loss of one value, and its gradient, with a clip of 0.2."""
    values = row(value).requires_grad_()
    loss = value_loss(values, row(old), row(wanted), acts(1), 0.2)
    return loss.item(), gradient(loss, values).item()


def test_value_loss_is_half_the_squared_error_of_a_value_that_has_not_moved():
    assert valued(3.0, 3.0, 1.0) == pytest.approx((2.0, 2.0))


def test_value_loss_lets_a_value_go_no_further_than_the_clip_towards_its_return():
    assert valued(0.5, 0.0, 1.0) == pytest.approx((0.5 * 0.8 ** 2, 0.0))


def test_value_loss_takes_the_larger_error_of_a_value_that_has_moved_away():
    assert valued(-0.5, 0.0, 1.0) == pytest.approx((0.5 * 1.5 ** 2, -1.5))


def test_value_loss_counts_every_token_alike_however_long_its_answer_is():
    values, mask = numbers([1, 1, 1], [3, 0, 0]), torch.tensor([[1, 1, 1], [1, 0, 0]]) > 0
    near(value_loss(values, values, 0 * values, mask, 0.2), 0.5 * 12 / 4)


def test_a_critic_that_goes_down_value_loss_ends_at_the_mean_return():
    v = numbers(0.0)
    for _ in range(200):
        values = v.clone().requires_grad_()
        loss = value_loss(values.expand(1, 2), v.expand(1, 2), row(1, 5), acts(1, 1), 0.2)
        v = v - 0.1 * gradient(loss, values)
    assert v.item() == pytest.approx(3.0, abs=1e-3)


# ---------------------------------------------------------------------------------- KL from samples

P, Q = numbers(0.1, 0.2, 0.7), numbers(0.3, 0.4, 0.3)          # π_old and π over three tokens


def each_token():
    """The estimate from each of the three tokens alone."""
    return torch.stack([approximate_kl(row(q), row(p), acts(1)) for p, q in zip(P.log(), Q.log())])


def test_approximate_kl_has_the_right_mean_over_what_the_old_policy_samples():
    near((P * each_token()).sum(), (P * (P / Q).log()).sum())


def test_approximate_kl_of_a_token_e_times_as_likely_as_before_is_e_minus_2():
    near(approximate_kl(row(-1), row(-2), acts(1)), math.e - 2)


def test_approximate_kl_of_a_token_is_never_negative():
    assert (each_token() > 0).all()


def test_approximate_kl_is_0_before_the_policy_has_moved():
    near(approximate_kl(row(-1, -2), row(-1, -2), acts(1, 1)), 0.0)


def test_approximate_kl_of_a_small_move_keeps_its_digits():
    moved = approximate_kl(torch.tensor([[1e-4]]), torch.tensor([[0.0]]), acts(1))
    assert moved.item() == pytest.approx(0.5e-8, rel=0.01)


def test_approximate_kl_is_a_mean_over_the_mask_alone():
    near(approximate_kl(row(0.5, 0, math.inf), row(0, 0, 0), acts(1, 1, 0)), (math.exp(0.5) - 1.5) / 2)


def test_approximate_kl_sends_no_gradient():
    assert not approximate_kl(row(-1, -2).requires_grad_(), row(-2, -1), acts(1, 1)).requires_grad


# ----------------------------------------------------------------------------------------------- β

def adapted(kl, episodes=100, coef=1.0):
    """β after an update with a target of 4 nats and a horizon of 1,000 answers."""
    controller = AdaptiveKL(coef, 4.0, 1000)
    controller.update(kl, episodes)
    return controller.coef


def test_adaptive_kl_raises_beta_above_the_target_and_lowers_it_below():
    assert adapted(4.4) > 1.0 > adapted(3.6) and adapted(4.0) == 1.0


def test_adaptive_kl_is_not_thrown_off_by_one_odd_batch():
    assert [abs(adapted(kl) - 1) for kl in (400.0, -50.0)] == pytest.approx([0.02, 0.02])


def test_adaptive_kl_goes_by_the_error_relative_to_the_target():
    assert abs(adapted(4.4) - 1) == pytest.approx(0.01)


def test_adaptive_kl_moves_in_proportion_to_the_answers_that_were_measured():
    assert adapted(4.4, 200) - 1 == pytest.approx(2 * (adapted(4.4, 100) - 1)) != 0


def test_adaptive_kl_multiplies_so_that_a_small_beta_moves_as_fast_as_a_large_one():
    assert adapted(4.4, coef=0.01) / 0.01 == pytest.approx(adapted(4.4, coef=1.0)) != 1


@pytest.mark.parametrize("start", [0.01, 10.0])
def test_adaptive_kl_brings_a_kl_of_1_over_beta_to_its_target_wherever_it_starts(start):
    controller = AdaptiveKL(start, 4.0, 1000)
    for _ in range(1000):
        controller.update(1 / controller.coef, 100)
    assert controller.coef == pytest.approx(1 / 4, rel=1e-3)


# --------------------------------------------------------------------------------------------- DPO

def dpo(h, beta=0.5, **how):
    """The loss of one pair whose log-ratio is h larger for the chosen answer, and its slope in h."""
    policy, rest = numbers(h).requires_grad_(), numbers(0)
    losses, _, _ = dpo_loss(policy, rest, rest, rest, beta, **how)
    return losses.item(), gradient(losses.sum(), policy).item()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_dpo_loss_falls_as_the_policy_comes_to_prefer_the_chosen_answer(loss):
    assert dpo(1.0, 0.1, loss=loss)[0] < dpo(0.0, 0.1, loss=loss)[0] < dpo(-1.0, 0.1, loss=loss)[0]


def test_dpo_loss_asks_what_has_changed_since_the_reference():
    """Which preferred the chosen answer by 3 nats already."""
    losses, chosen, rejected = dpo_loss(numbers(-1), numbers(-6), numbers(-2), numbers(-5), 0.5)
    near(losses, [nll(0.5 * 2)])
    near(chosen, [0.5])
    near(rejected, [-0.5])


def test_dpo_loss_with_beta_turns_log_ratios_into_rewards():
    assert dpo(3.0, 0.2)[0] == pytest.approx(nll(0.6))


def test_dpo_loss_with_epsilon_is_least_where_the_chosen_answer_wins_all_but_epsilon():
    best = math.log(0.9 / 0.1) / 0.5
    assert dpo(best, label_smoothing=0.1)[1] == pytest.approx(0, abs=1e-12)


def test_dpo_loss_ipo_is_least_at_a_margin_of_1_over_2_beta():
    assert dpo(1 / (2 * 0.5), loss="ipo") == pytest.approx((0, 0))


def test_dpo_loss_hinge_asks_for_nothing_beyond_a_reward_of_1():
    assert dpo(2.5, loss="hinge") == (0, 0) and dpo(1.0, loss="hinge") == pytest.approx((0.5, -0.5))


def test_dpo_loss_is_finite_for_hopeless_pairs():
    assert dpo(-1e4) == pytest.approx((5e3, -0.5))


# -------------------------------------------------------------------------------------------- LoRA

def adapter(A=1.0, B=1.0):
    """A layer of zeros, 2 to 1, with an adapter of rank 4 and α 8 all of whose numbers are the same."""
    layer = Linear(2, 1)
    layer.add_adapter(4, 8.0)
    with torch.no_grad():
        for p, x in ((layer.weight, 0.0), (layer.bias, 0.0), (layer.A, A), (layer.B, B)):
            p.fill_(x)
    return layer.double()


def test_linear_with_a_new_adapter_computes_what_it_did_and_can_learn():
    torch.manual_seed(0)
    layer, x = Linear(3, 2), torch.randn(5, 3)
    before = layer(x)
    layer.add_adapter(4, 8.0)
    assert torch.equal(layer(x), before), "a new adapter must add nothing"
    layer(x).sum().backward()
    assert layer.B.grad.abs().max() > 0, "B must have a gradient, or it stays what it is"


def test_linear_counts_what_its_adapter_adds_alpha_over_r_times():
    near(adapter()(row(1, 1)), row(8 / 4 * 4 * 2))


def test_linear_has_a_of_shape_r_by_what_goes_in_and_b_of_what_comes_out_by_r():
    layer = adapter()
    assert (layer.A.shape, layer.B.shape) == ((4, 2), (1, 4))


def test_linear_as_a_matrix_is_w_plus_what_its_adapter_adds():
    near(adapter().matrix(), row(8, 8))


def test_linear_once_merged_computes_the_same_and_has_no_adapter_left():
    layer = adapter()
    layer.merge()
    near(layer(row(1, 1)), row(16))
    near(layer.weight, row(8, 8))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
