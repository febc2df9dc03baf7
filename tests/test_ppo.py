"""PPO's formulas against slow loops written from the papers, in float64 on random ragged batches,
and its loop."""
import json
import math

import pytest
import torch
from helpers import plainly
from helpers.arrays import B, T, dirt, near, ragged, seeds, spoilt, tiny

import ppo
from data import loading
from data.tokenizer import Tokenizer
from model import GPT
from ppo import AdaptiveKL, gae, kl_rewards, masked_mean, policy_loss, state_values, value_loss, whiten
from runtime import compute, sharding
from runtime.models import load
from runtime.rewards import from_file
from sft import sft_loss

# -------------------------------------------------------------------------------------------- means

@seeds
def test_masked_mean_is_the_mean_of_the_masked_entries(seed):
    x, mask = ragged(seed, 1)
    kept = [x[b, t].item() for b in range(B) for t in range(T) if mask[b, t]]
    near(masked_mean(x, mask), sum(kept) / len(kept))
    near(masked_mean(dirt(x, mask), mask), sum(kept) / len(kept))


@seeds
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_gives_deviation_one_and_moves_the_mean_only_when_asked(seed, shift_mean):
    x, mask = ragged(seed, 1)
    x = x * 7 + 20
    kept = [x[b, t].item() for b in range(B) for t in range(T) if mask[b, t]]
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((k - mean) ** 2 for k in kept) / len(kept) + 1e-8)
    found = whiten(dirt(x, mask), mask, shift_mean)
    for b in range(B):
        for t in range(T):
            want = (x[b, t].item() - mean) / deviation + (0 if shift_mean else mean)
            near(found[b, t], want if mask[b, t] else 0.0)


def test_whiten_of_equal_numbers_is_finite():
    near(whiten(torch.full((2, 3), 4.0).double(), torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3))


# --------------------------------------------------------------------------- rewards and advantages

@seeds
def test_kl_rewards_charge_every_action_and_pay_the_score_on_the_last(seed):
    logprobs, ref, mask = ragged(seed, 2)
    scores = torch.randn(B).double()
    found = kl_rewards(scores, dirt(logprobs, mask), dirt(ref, mask), mask, 0.3)
    for b in range(B):
        last = max(t for t in range(T) if mask[b, t])
        for t in range(T):
            want = 0.0
            if mask[b, t]:
                want = -0.3 * (logprobs[b, t].item() - ref[b, t].item())
                if t == last:
                    want += scores[b].item()
            near(found[b, t], want)
    near(found.sum(1), scores - 0.3 * ((logprobs - ref) * mask).sum(1))


def test_kl_rewards_of_a_row_without_actions_are_zero():
    mask = torch.tensor([[False, True], [False, False]])
    scores, logprobs, ref = torch.tensor([2.0, 5.0]), torch.ones(2, 2), torch.zeros(2, 2)
    near(kl_rewards(scores.double(), logprobs.double(), ref.double(), mask, 0.5), [[0, 1.5], [0, 0]])


@seeds
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.7), (0.99, 1.0), (0.8, 0.0), (0.0, 0.5)])
def test_gae_is_the_discounted_sum_of_td_errors(seed, gamma, lam):
    rewards, values, mask = ragged(seed, 2)
    advantages, returns = gae(dirt(rewards, mask), dirt(values, mask), mask, gamma, lam)
    for b in range(B):
        acts = [t for t in range(T) if mask[b, t]]              # a row's actions are its time steps
        r, v = [rewards[b, t].item() for t in acts], [values[b, t].item() for t in acts] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(acts))]
        for i, t in enumerate(acts):
            want = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(acts)))    # eq. 16, as a sum
            near(advantages[b, t], want)
            near(returns[b, t], want + v[i])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@seeds
def test_gae_with_lambda_one_returns_what_was_earned_whatever_the_critic_says(seed):
    rewards, values, mask = ragged(seed, 2)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    near(returns, ((rewards * mask).flip(1).cumsum(1).flip(1)) * mask)


def test_advantages_and_returns_carry_no_graph_to_policy_reference_or_critic():
    new, ref, values, mask = ragged(0, 3)
    leaves = [x.requires_grad_() for x in (new, ref, values, torch.randn(B).double())]
    advantages, returns = gae(kl_rewards(leaves[3], new, ref, mask, 0.1), values, mask, 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    assert all(x.requires_grad for x in leaves)


# ------------------------------------------------------------------------------------------- losses

@seeds
def test_policy_loss_is_the_clipped_surrogate(seed):
    new, old, advantages, mask = ragged(seed, 3)
    new = old + 0.4 * new
    loss, clip_fraction = policy_loss(dirt(new, mask), dirt(old, mask), dirt(advantages, mask), mask, 0.2)
    total = count = beyond = 0
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                ratio, a = math.exp(new[b, t].item() - old[b, t].item()), advantages[b, t].item()
                total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                beyond += abs(ratio - 1) > 0.2
                count += 1
    near(loss, -total / count)
    assert clip_fraction.item() == pytest.approx(beyond / count, abs=1e-6)


@seeds
def test_policy_gradient_is_ratio_times_advantage_where_it_is_not_clipped_and_nowhere_else(seed):
    new, old, advantages, mask = ragged(seed, 3)
    new = (old + 0.4 * new).requires_grad_()
    old.requires_grad_(), advantages.requires_grad_()
    policy_loss(new, old, advantages, mask, 0.2)[0].backward()
    for b in range(B):
        for t in range(T):
            ratio, a = math.exp(new[b, t].item() - old[b, t].item()), advantages[b, t].item()
            free = mask[b, t] and not (a > 0 and ratio > 1.2) and not (a < 0 and ratio < 0.8)
            near(new.grad[b, t], -ratio * a / mask.sum().item() if free else 0.0)
    assert old.grad is None and advantages.grad is None


@seeds
def test_value_loss_is_half_the_mean_of_the_larger_squared_error(seed):
    values, old, returns, mask = ragged(seed, 3)
    found = value_loss(dirt(values, mask), dirt(old, mask), dirt(returns, mask), mask, 0.2)
    total = count = 0
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                total += max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)
                count += 1
    near(found, 0.5 * total / count)


@seeds
def test_value_gradient_is_the_error_and_stops_where_the_clipped_term_is_larger(seed):
    values, old, returns, mask = ragged(seed, 3)
    values.requires_grad_()
    value_loss(values, old, returns, mask, 0.2).backward()
    for b in range(B):
        for t in range(T):
            v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            stopped = abs(v - o) > 0.2 and (min(max(v, o - 0.2), o + 0.2) - r) ** 2 > (v - r) ** 2
            near(values.grad[b, t], (v - r) / mask.sum().item() if mask[b, t] and not stopped else 0.0)


def test_value_loss_sends_no_gradient_to_old_values_or_returns():
    values, old, returns, mask = ragged(0, 3)
    for x in (values, old, returns):
        x.requires_grad_()
    value_loss(values, old, returns, mask, 0.2).backward()
    assert old.grad is None and returns.grad is None


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize("formula", [
    lambda x, y, z, m: masked_mean(x, m), lambda x, y, z, m: whiten(x, m),
    lambda x, y, z, m: gae(x, y, m, 0.9, 0.9)[0],
    lambda x, y, z, m: kl_rewards(torch.ones(B).double(), x, y, m, 0.1),
    lambda x, y, z, m: policy_loss(x, y, z, m, 0.2)[0],
    lambda x, y, z, m: value_loss(x, y, z, m, 0.2), lambda x, y, z, m: sft_loss(x, m)],
    ids=["masked_mean", "whiten", "gae", "kl_rewards", "policy_loss", "value_loss", "sft_loss"])
def test_nan_and_infinity_outside_the_mask_are_ignored(formula, junk):
    x, y, z, mask = ragged(1, 3)
    near(formula(*(spoilt(a, mask, junk) for a in (x, y, z)), mask), formula(x, y, z, mask))


def test_policy_loss_ignores_large_finite_log_ratios_outside_the_mask():
    new, old, advantages, mask = ragged(1, 3)
    near(policy_loss(spoilt(new, mask, 800.0), spoilt(old, mask, 0.0), advantages, mask, 0.2)[0],
         policy_loss(new, old, advantages, mask, 0.2)[0])


def test_a_beta_of_0_that_could_not_adapt_is_refused():
    ppo.Config(kl_coef=0, adaptive_kl=False)
    with pytest.raises(ValueError, match="--kl_coef 0 cannot adapt"):
        ppo.Config(kl_coef=0)


def test_a_horizon_that_could_turn_beta_negative_is_refused():
    ppo.Config(batch=128, kl_horizon=26)
    with pytest.raises(ValueError, match="--kl_horizon must exceed --batch/5"):
        ppo.Config(batch=128, kl_horizon=25)
    ppo.Config(batch=128, kl_horizon=25, adaptive_kl=False)                     # where nothing adapts


def test_more_minibatches_than_answers_are_refused_and_others_are_as_many_as_asked_for():
    with pytest.raises(ValueError, match="--minibatches 5 is more than --batch 4"):
        ppo.Config(batch=4, minibatches=5)
    parts = list(ppo.minibatches(ppo.Config(batch=10, minibatches=4, epochs=2)))
    assert [len(rows) for rows in parts] == [3, 3, 2, 2] * 2
    for epoch in (parts[:4], parts[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))


@pytest.mark.parametrize("kl,factor", [
    (6.0, 1), (7.2, 1 + 0.2 * 64 / 1000), (60.0, 1 + 0.2 * 64 / 1000), (6.6, 1 + 0.1 * 64 / 1000),
    (0.0, 1 - 0.2 * 64 / 1000), (5.7, 1 - 0.05 * 64 / 1000), (-3.0, 1 - 0.2 * 64 / 1000)])
def test_adaptive_kl_moves_in_proportion_and_at_most_a_fifth(kl, factor):
    controller = AdaptiveKL(0.3, 6.0, 1000)
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(0.3 * factor, rel=1e-12)
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(0.3 * factor ** 2, rel=1e-12)


def test_state_values_are_the_critics_word_before_the_action():
    critic, mask = tiny("scalar"), ragged(3, 1)[1]
    tokens = torch.randint(13, (B, T))
    found = state_values(critic, tokens, mask)
    for b in range(B):
        for t in range(T):                                      # the critic has not read tokens[t]
            want = critic(tokens[b:b + 1, :t])[0, -1].item() if mask[b, t] else 0.0
            assert found[b, t].item() == pytest.approx(want, abs=1e-6)


def test_state_values_keep_float64():
    critic, tokens, mask = tiny("scalar"), torch.randint(13, (B, T)), torch.ones(B, T, dtype=torch.bool)
    assert state_values(critic, tokens, mask).dtype == torch.float64


# --------------------------------------------------------------------------------------- the update

@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 2, 1], [1] * 5])
def test_micro_batches_by_their_share_of_tokens_leave_ppos_gradient_the_same(sizes):
    model, (old, advantages, mask) = tiny("lm"), ragged(4, 2)
    tokens = torch.randint(13, (B, T))
    mask[0] = torch.arange(T) == 4                  # a short answer: an even share would weigh it too high
    policy_loss(model.logprobs(tokens, mask), old - 2, advantages, mask, 0.2)[0].backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for r in torch.arange(B).split(sizes):
        part = policy_loss(model.logprobs(tokens[r], mask[r]), old[r] - 2, advantages[r], mask[r], 0.2)[0]
        (part * mask[r].sum() / mask.sum()).backward()
    for n, p in model.named_parameters():
        near(p.grad, want[n])
    assert max(g.abs().max() for g in want.values()) > 1e-3


def test_a_collapsing_policy_is_warned_about_with_the_flag_to_change(trained, capsys):
    """Once, however many steps it lasts."""
    for temperature, flag in ((0.01, "entropy is near 0: raise --entropy_coef"),
                              (50.0, "few answers end: raise --max_new_tokens")):
        trained(ppo, **SHARED | dict(temperature=temperature, kl_target=1e9))
        warnings = capsys.readouterr().err
        assert warnings.count("warning") == warnings.count(flag) == 1, warnings
    for settings, count in (({}, 1), ({"adaptive_kl": False}, 0)):
        trained(ppo, **SHARED | dict(kl_target=1e-3, lr=0.3, update_kl=0.0, **settings))
        assert capsys.readouterr().err.count("far above its target: lower --lr") == count


def test_with_a_program_alone_the_critic_starts_from_the_policy(trained, monkeypatch):
    loaded = []
    monkeypatch.setattr(ppo, "load", lambda *given: loaded.append(given) or load(*given))
    _, _, lines, about = trained(ppo, **SHARED | dict(reward="program.py:words"))
    assert ("out/sft", "scalar") in loaded and "program.py" in about["inputs"]
    assert len(lines) == 3 and "explained_variance" in lines[0]


def test_a_program_that_fails_is_named_with_the_prompt(trained):
    with open("program.py", "a") as f:
        f.write("def half(messages, answer):\n    return 1 / (len(answer.split()) % 2)\n")
    said = r"--reward program.py:half: ZeroDivisionError: division by zero, for the answer '.*' to '.*'"
    with pytest.raises(ValueError, match=said):
        trained(ppo, **SHARED | dict(reward="program.py:half"))


def test_the_first_and_the_last_rollout_are_written_token_by_token(trained, tmp_path):
    _, _, lines, _ = trained(ppo, **SHARED)
    for name, line in (("first", lines[0]), ("last", lines[-1])):
        kept = json.loads((tmp_path / f"out/rollout_{name}.json").read_text())
        assert len(kept) == 3 and all(len(a["tokens"]) == len(a[key]) for a in kept for key in (
            "old_logprobs", "ref_logprobs", "rewards", "old_values", "returns", "advantages"))
        for a in kept:
            logs = zip(a["rewards"], a["old_logprobs"], a["ref_logprobs"])
            earned = sum(r + line["kl_coef"] * (new - ref) for r, new, ref in logs)
            assert earned == pytest.approx(a["score"], abs=1e-5)


# ------------------------------------------------------------------------------------------- the whole stage

SHARED = dict(batch=12, max_new_tokens=6, steps=3, warmup=1, lr=1e-2, critic_lr=2e-2)
CASES = [                                       # each flag of the stage is set in one of them, or in SHARED
    dict(),
    dict(temperature=0.7, gamma=0.9, lam=0.6, clip=0.05, value_clip=0.1, entropy_coef=0.05,
          no_end_score=-1.5),
    dict(whiten_rewards=True, whiten_advantages=False, adaptive_kl=False, kl_coef=0.4, decay="cosine",
          minibatches=3, seed=4),
    dict(micro_batch=2, sample_batch=5, max_norm=0.1, kl_horizon=40, epochs=1),
    dict(update_kl=0.0, decay="constant", warmup=0, max_norm=0.0, kl_target=0.5, kl_horizon=30,
          steps=4),
    dict(update_kl=0.002, epochs=3, kl_target=0.01, micro_batch=5, micro_tokens=150),
    dict(precision="bfloat16", temperature=0.7, update_kl=0.01),
    dict(reward="0.3*out/reward_model,program.py:words"),
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_stage_learns_and_logs_what_a_plain_loop_does(trained, settings, monkeypatch):
    assert_learns_as_plain_loop(trained, ppo, settings, monkeypatch)


def assert_learns_as_plain_loop(trained, stage, settings, monkeypatch, doubts=None):
    """In the case of bfloat16 without the precision itself: what is left is that old log-probabilities are
    computed anew."""
    monkeypatch.setattr(compute, "bfloat16_copies", lambda model: [])
    monkeypatch.setattr(sharding, "placed_dtype", lambda *_: torch.float64)
    shared = {k: x for k, x in SHARED.items() if hasattr(stage.Config, k)}
    cfg, model, lines, _ = trained(stage, **shared | settings)
    nets = {"policy": GPT.load("out/sft"), "reference": GPT.load("out/sft"),
            "critic": GPT.load("out/reward_model"), "reward": GPT.load("out/reward_model")}
    prompts, _ = loading.load("prompts", loading.WORLD)
    demonstrations, _ = loading.load("demonstrations", loading.WORLD)
    program = from_file("program.py:words", None).function if "words" in cfg.reward else None
    if "reward_model" not in cfg.reward:
        del nets["reward"]
    known = doubts(cfg, nets["reward"]) if doubts else None
    cfg.reward_model_coef = 0.3 if "0.3*" in cfg.reward else 1.0
    expected = plainly.ppo(cfg, nets, Tokenizer.load("out/sft"), prompts, demonstrations, program, known)
    plainly.assert_same_lines(lines, expected)
    plainly.assert_same_weights(model, nets["policy"])
    assert 0 < sum(line["ended"] for line in lines) < len(lines), "answers that end and answers that do not"
    if settings.get("update_kl") == 0.002:
        updates = [line["updates"] for line in lines]
        assert any(0 < n < cfg.epochs * cfg.minibatches for n in updates), "an update that stops half-way"
    if settings.get("clip") == 0.05:
        clipped = [line["clip_fraction"] > 0 and line["value_clip_fraction"] > 0 for line in lines]
        assert all(clipped), "some of all is clipped"


def test_the_worked_example_in_gaes_docstring_is_what_its_functions_compute():
    """At β = 0.1, γ = 1, λ = 0.95, with score 2: log-ratio, r, V, δ, A and return of three tokens."""
    rows = [line.split() for line in ppo.gae.__doc__.splitlines()]
    table = torch.tensor([[float(x) for x in row] for row in rows if len(row) == 6 and row[0][-1].isdigit()],
                         dtype=torch.float64)
    log_ratio, r, values, delta, advantages, returns = table.T
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = kl_rewards(torch.tensor([2.0]).double(), log_ratio[None], torch.zeros(1, 3), mask, 0.1)
    torch.testing.assert_close(rewards[0], r, rtol=0, atol=1e-9)
    found, targets = gae(rewards, values[None], mask, 1.0, 0.95)
    torch.testing.assert_close(found[0], advantages, rtol=0, atol=5e-4)
    torch.testing.assert_close(targets[0], returns, rtol=0, atol=5e-4)
    torch.testing.assert_close(gae(rewards, values[None], mask, 1.0, 0.0)[0][0], delta, rtol=0, atol=1e-9)
