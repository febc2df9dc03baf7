"""The variants since PPO: their losses against slow loops and known gradients, and what their files say they
change."""
import functools
import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import plainly
from helpers.arrays import dirt, near, seeds

import dpo
import ppo
from data import loading, records
from data.batches import Comparison
from data.tokenizer import Tokenizer
from model import GPT
from variants import cispo, dapo, distill, downsample, grpo, gspo, lagged, preferences, reinforce_pp

ROOT = Path(__file__).resolve().parent.parent
B, T = 5, 7


def arrays(seed):
    """log π (with a gradient), log π_old, advantages, all (B, T) with other numbers outside the mask, and the
    mask."""
    torch.manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    logprobs = torch.randn(B, T).double()
    old = logprobs + 0.5 * torch.randn(B, T).double()
    advantages = torch.randn(B, 1).double().expand(B, T)                # one for all tokens of an answer
    return *(dirt(x, mask, 3.0).requires_grad_(x is logprobs) for x in (logprobs, old, advantages)), mask


def rows_of(mask):
    """The columns of each answer's tokens."""
    return [row.nonzero()[:, 0].tolist() for row in mask]


@seeds
def test_gspo_is_a_slow_loop_over_answers(seed):
    logprobs, old, advantages, mask = arrays(seed)
    loss, clipped = gspo.policy_loss(logprobs, old, advantages, mask, 0.1)
    total, beyond, n = 0.0, 0, int(mask.sum())
    for i, columns in enumerate(rows_of(mask)):
        s = math.exp(sum((logprobs[i, t] - old[i, t]).item() for t in columns) / len(columns))
        A = advantages[i, columns[0]].item()
        total += len(columns) * min(s * A, min(max(s, 0.9), 1.1) * A)
        beyond += len(columns) * (abs(s - 1) > 0.1)
    near(loss, -total / n)
    assert clipped.item() == pytest.approx(beyond / n)


def test_gspo_gives_all_tokens_of_an_answer_the_same_gradient():
    """s·A/N per token, where nothing is clipped: the mean of the answer's gradients, times its length."""
    logprobs, old, advantages, mask = arrays(0)
    gspo.policy_loss(logprobs, old, advantages, mask, 100.0)[0].backward()
    for i, columns in enumerate(rows_of(mask)):
        s = (logprobs - old)[i, columns].mean().exp()
        near(logprobs.grad[i, columns], (-s * advantages[i, 0] / mask.sum()).detach().expand(len(columns)))


@seeds
def test_cispo_weights_each_tokens_gradient_and_drops_none(seed):
    logprobs, old, advantages, mask = arrays(seed)
    loss, clipped = cispo.policy_loss(logprobs, old, advantages, mask, 0.3)
    loss.backward()
    ratio = (logprobs - old).exp().detach()
    near(logprobs.grad, torch.where(mask, -ratio.clamp(max=1.3) * advantages / mask.sum(), 0))
    assert clipped == ((ratio > 1.3) & mask).sum() / mask.sum()


@seeds
def test_dapo_lets_rising_tokens_go_further_than_ppo(seed):
    logprobs, old, advantages, mask = arrays(seed)
    loss, clipped = dapo.policy_loss(logprobs, old, advantages, mask, 0.2, 0.4)
    total, beyond, n = 0.0, 0, int(mask.sum())
    for i, columns in enumerate(rows_of(mask)):
        for t in columns:
            ratio, A = math.exp((logprobs[i, t] - old[i, t]).item()), advantages[i, t].item()
            total += min(ratio * A, min(max(ratio, 0.8), 1.4) * A)
            beyond += ratio < 0.8 or ratio > 1.4
    near(loss, -total / n)
    assert clipped.item() == pytest.approx(beyond / n)
    near(dapo.policy_loss(logprobs, old, advantages, mask, 0.2, 0.2)[0],
         ppo.policy_loss(logprobs, old, advantages, mask, 0.2)[0])


def test_the_last_tokens_before_the_limit_cost_more_and_more():
    assert dapo.overlong_penalty(torch.tensor([1, 12, 13, 14, 16]), 16, 4).tolist() == [0, 0, 0.25, 0.5, 1]
    assert dapo.overlong_penalty(torch.tensor([1, 16]), 16, 0).tolist() == [0, 0]

    def twos(run, prompts, answers, batch):
        return torch.full((2,), 2.0)
    twos.networks, twos.folder = [], None
    mask = torch.tensor([[True] * 8, [True] * 2 + [False] * 6])
    reward = dapo.Overlong(twos, dapo.Config(max_new_tokens=8, overlong=4))
    assert reward(None, None, None, {"mask": mask}).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("loss", [gspo.policy_loss, cispo.policy_loss,
                                  lambda *args: dapo.policy_loss(*args, clip_high=0.28)])
def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient(loss):
    """−A/N for each token: before the first optimiser step all these losses are one."""
    logprobs, _, advantages, mask = arrays(1)
    value, clipped = loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    value.backward()
    near(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0))
    assert clipped == 0


def test_reinforce_pp_compares_with_all_answers_of_the_batch():
    near(reinforce_pp.global_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]).double()),
         torch.tensor([-2.0, -1.0, 0.0, 3.0]).double() / (math.sqrt(14 / 3) + 1e-4))


# --------------------------------------------------------------------------------------- down-sampling

def test_the_answers_at_both_ends_of_the_prompts_that_differ_most_are_chosen():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.4, 0.3], [0.0, 0.2, 1.0, 0.5]])
    assert downsample.informative(scores, 2, 2).tolist() == [8, 10, 4, 5]
    assert downsample.informative(scores, 3, 1).tolist() == [8, 11, 10]     # one of the worst
    assert downsample.informative(scores, 4, 1).tolist() == [8, 9, 11, 10]


@seeds
def test_no_other_pair_and_no_other_half_of_right_and_wrong_answers_differs_more(seed):
    torch.manual_seed(seed)
    pairs = torch.rand(1, 6).double()
    chosen = pairs.flatten()[downsample.informative(pairs, 2, 1)]
    assert chosen.var() == max(torch.stack(some).var() for some in itertools.combinations(pairs[0], 2))
    right = torch.tensor([[0.0, 0.0, 1.0, 1.0, *torch.randint(2, (4,)).tolist()]])[:, torch.randperm(8)]
    chosen = right.flatten()[downsample.informative(right, 4, 1)]
    assert chosen.var() == max(torch.stack(some).var() for some in itertools.combinations(right[0], 4))


def test_without_more_draws_it_is_grpo(trained):
    """But for the order of the answers, in which float64 sums round differently."""
    (Path.cwd() / "select.py").write_text("def size(messages, answer):\n    return len(answer)\n")
    how = SMALL | dict(batch=12, minibatches=1, lr=1e-2)
    _, model, lines, _ = trained(downsample, **how, draw_prompts=1, draw_answers=1, select="select.py:size")
    _, plain, others, _ = trained(grpo, **how)
    plainly.assert_same_weights(model, plain)
    assert [line["score"] for line in lines] == pytest.approx([line["score"] for line in others], abs=1e-6)


def test_of_all_answers_those_are_learnt_from_that_the_program_chooses(trained, monkeypatch):
    """They are read by the reference and the reward after they are chosen, each with its own prompt."""
    (Path.cwd() / "select.py").write_text("def size(messages, answer):\n    return len(answer)\n")
    seen, rollout = [], downsample.rollout

    def watched(run, tokenizer, prompts, policy, reference, score):
        sample = run.sample
        monkeypatch.setattr(run, "sample", lambda *args, **how: seen.append(sample(*args, **how)) or seen[-1])
        asked, answers, batch = rollout(run, tokenizer, prompts, policy, reference, score)
        everything = seen.pop()
        texts = [tokenizer.decode(ids[mask].tolist())
                 for ids, mask in zip(everything["tokens"], everything["mask"])]
        lengths = torch.tensor([len(text) if ended else -3.0
                                for text, ended in zip(texts, everything["ended"])])
        rows = downsample.informative(lengths.view(-1, 6), 2, 4)
        assert len(lengths) == 2 * 3 * 8 and len(asked) == len(answers) == len(rows) == 8
        assert answers == [texts[i] for i in rows]
        for prompt, ids, mask in zip(asked, batch["tokens"], batch["mask"]):
            assert ids[:mask.int().argmax()].tolist() == tokenizer.prompt(prompt)
        near(batch["ref_logprobs"], run.logprobs(reference, batch, run.cfg.temperature))
        return asked, answers, batch
    monkeypatch.setattr(downsample, "rollout", watched)
    _, _, lines, _ = trained(downsample, **SMALL | dict(batch=8), group=2, draw_answers=3,
                             select="select.py:size")
    assert len(lines) == 4 and all("sampled_score" in line for line in lines)


def test_a_reward_model_cannot_select():
    for name in ("", "out/reward_model"):
        with pytest.raises(ValueError, match="--select needs a program"):
            downsample.Config(select=name)


# --------------------------------------------------------------------------------------------------- lag

def test_weights_of_old_tokens_are_ratios_that_are_cut():
    old, mu = torch.tensor([[-1.0, -2.0, -3.0]]).double(), torch.tensor([[-1.5, -1.0, -5.0]]).double()
    w, metrics = lagged.importance_weights(old, mu, torch.tensor([[True, True, True]]), 2.0)
    near(w, torch.tensor([[math.exp(0.5), math.exp(-1), 2.0]], dtype=torch.float64))
    near(metrics["weight"], w.mean())
    assert metrics["weights_cut"].item() == pytest.approx(1 / 3)
    near(metrics["effective"], w.sum() ** 2 / (3 * (w ** 2).sum()))
    w, metrics = lagged.importance_weights(old, mu, torch.tensor([[True, False, False]]), 2.0)
    near(w, torch.tensor([[math.exp(0.5), 0, 0]], dtype=torch.float64))
    near(metrics["effective"], 1.0)


SMALL = dict(steps=4, batch=10, max_new_tokens=9, micro_batch=4, kl_horizon=40)


def test_without_lag_it_is_ppo_bit_for_bit(trained):
    _, model, lines, _ = trained(ppo, **SMALL, whiten_rewards=True, entropy_coef=0.01)
    _, other, others, _ = trained(lagged, **SMALL, whiten_rewards=True, entropy_coef=0.01, lag=0)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(lines, others, strict=True):
        shared = ours.keys() & theirs.keys() - {"seconds"}
        assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
        assert theirs["weight"] == theirs["effective"] == 1 and theirs["weights_cut"] == 0


def test_the_answers_of_a_step_are_those_of_lag_steps_before(trained, monkeypatch):
    """In the order of events, step t takes rollout t, which was sampled before update t − 2."""
    events, rollout, kl_rewards = [], ppo.rollout, ppo.kl_rewards

    def sample(*args):
        answers, batch = rollout(*args)
        events.append(("sampled", int(batch["mask"].sum())))
        return answers, batch

    def learn(scores, old, ref, mask, coef):
        events.append(("learns", int(mask.sum())))
        return kl_rewards(scores, old, ref, mask, coef)
    monkeypatch.setattr(ppo, "rollout", sample)
    monkeypatch.setattr(ppo, "kl_rewards", learn)
    _, _, lines, _ = trained(lagged, **SMALL, lag=2)
    assert [what for what, _ in events] == ["sampled"] * 2 + ["sampled", "learns"] * 4
    sampled, learnt = ([n for what, n in events if what == kind] for kind in ("sampled", "learns"))
    assert learnt == sampled[:4]
    assert lines[0]["weight"] == pytest.approx(1) and all(line["weight"] != 1 for line in lines[1:])


def test_the_correction_is_in_the_update(trained):
    """Without it the same answers lead to other weights; a cut at 1 is a third way."""
    ways = {}, dict(correct=False), dict(max_weight=1.0)
    heads = [trained(lagged, **SMALL, lag=2, **how)[1].head.weight for how in ways]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(heads, 2))


def test_a_lagged_run_that_is_killed_ends_in_the_weights_of_one_that_is_not(trained, monkeypatch):
    _, whole, lines, _ = trained(lagged, **SMALL, lag=2)
    steps, log = [], lagged.Run.log

    def stop_after_two(run, metrics):
        log(run, metrics)
        steps.append(run.step)
        if len(steps) == 2:
            run.checkpoints.save(run.parts, run.step)
            raise KeyboardInterrupt
    monkeypatch.setattr(lagged.Run, "log", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        trained(lagged, **SMALL, lag=2, seed=0)
    _, again, _, _ = trained(lagged, **SMALL, lag=2)
    assert steps == [1, 2, 3, 4]
    for ours, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------- estimates

@seeds
def test_gradients_of_kl_estimates_by_enumeration(seed):
    """Over five tokens: docs/details.md's table."""
    torch.manual_seed(seed)
    theta, ref = torch.randn(5).double().requires_grad_(), torch.randn(5).double().log_softmax(0)
    logp = theta.log_softmax(0)
    p, log_ratio = logp.exp().detach(), ref - logp

    def gradient(x):
        return torch.autograd.grad(x, theta, retain_graph=True)[0]
    forward = gradient((logp.exp() * (logp - ref)).sum())                   # of KL(π ‖ π_ref)
    reverse = gradient((ref.exp() * (ref - logp)).sum())                    # of KL(π_ref ‖ π)
    k = {"k1": -log_ratio, "k2": log_ratio ** 2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}
    in_reward = {name: gradient((p * x.detach() * logp).sum()) for name, x in k.items()}
    in_loss = {name: gradient((p * x).sum()) for name, x in k.items()}
    near(in_reward["k1"], forward)
    near(in_loss["k1"], torch.zeros(5))
    near(in_loss["k2"], forward)
    near(in_reward["k3"], forward - reverse)
    near(in_loss["k3"], reverse)
    near((p * k["k3"]).sum(), (p * k["k1"]).sum())
    for kl in (forward, reverse, forward - reverse):
        assert (in_reward["k2"] - kl).norm() > 0.05 * kl.norm()


# ------------------------------------------------------------------------------------------ distillation

def test_a_student_comes_close_to_its_teacher(trained, tmp_path):
    """And stays what it is where it is its own teacher."""
    teacher = GPT.load("out/sft")
    with torch.no_grad():
        teacher.norm.bias += torch.randn(16, generator=torch.Generator().manual_seed(0))
    teacher.save(str(tmp_path / "teacher"))
    Tokenizer.load("out/sft").save(str(tmp_path / "teacher"))
    settings = dict(batch=60, max_new_tokens=9, micro_batch=20, warmup=0)
    _, _, lines, _ = trained(distill, **settings, teacher=str(tmp_path / "teacher"), steps=20, lr=2e-2)
    assert lines[0]["kl_to_teacher"] > 0.5 and lines[-1]["kl_to_teacher"] < lines[0]["kl_to_teacher"] / 2
    _, same, lines, _ = trained(distill, **settings, teacher="out/sft", steps=2)
    assert [line["kl_to_teacher"] for line in lines] == [0, 0]
    plainly.assert_same_weights(same, GPT.load("out/sft"))


# ------------------------------------------------------------------------------------------- preferences

def log_sigma(x):
    return -math.log(1 + math.exp(-x))


@seeds
def test_losses_of_pairs_are_their_formulas(seed):
    torch.manual_seed(seed)
    chosen, rejected = -3 * torch.rand(2, 4).double() - 0.1
    found = {"simpo": preferences.simpo_loss(chosen, rejected, 2.0, 0.7),
             "orpo": preferences.odds_loss(chosen, rejected, 0.4),
             "kto": preferences.kto_loss(chosen, rejected, 0.5, 0.3),
             "nca": preferences.nca_loss(chosen, rejected, 0.5),
             "robust": preferences.robust_loss(chosen, rejected, 0.5, 0.1)}
    for i, (a, b) in enumerate(zip(chosen.tolist(), rejected.tolist())):
        def log_odds(x):
            return math.log(math.exp(x) / (1 - math.exp(x)))
        want = {"simpo": -log_sigma(2 * (a - b) - 0.7),
                "orpo": -0.4 * log_sigma(log_odds(a) - log_odds(b)),
                "kto": (1 - 1 / (1 + math.exp(-0.5 * (a - 0.3)))) + 1 - 1 / (1 + math.exp(-0.5 * (0.3 - b))),
                "nca": -log_sigma(0.5 * a) - 0.5 * log_sigma(-0.5 * a) - 0.5 * log_sigma(-0.5 * b),
                "robust": (-0.9 * log_sigma(0.5 * (a - b)) + 0.1 * log_sigma(-0.5 * (a - b))) / 0.8}
        for name, losses in found.items():
            assert losses[i].item() == pytest.approx(want[name], rel=1e-12), name


@pytest.mark.parametrize("data", ["pairs.jsonl", "three.jsonl"])            # soft labels; rankings of three
@pytest.mark.parametrize("loss", preferences.BETAS)
def test_the_first_loss_is_that_of_a_slow_loop_over_pairs(trained, loss, data):
    """With the imitation of best answers alone. All pairs are in one step; ORPO imitates in any case."""
    records.write("three.jsonl", [
        {"prompt": f"What is {i} plus {i}?", "responses": [f"It is {i}", "Nobody knows", f"{2 * i}"],
         "ranks": [2, 1, 3]} for i in range(8)])
    cfg, _, lines, _ = trained(preferences, loss=loss, data=data, held_out=data, batch=100, nll_coef=0.3,
                               lr=0.0)
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/sft")
    losses = []
    for p in loading.load("preferences", data, data, 1.0)[0]:
        ids, answers = tokenizer.prompt(p.prompt), [tokenizer.response(x) for x in p.responses]
        logp = [plainly.answer_logprob(model, ids, x).item() for x in answers]
        mean = [x / len(y) for x, y in zip(logp, answers)]
        for i, j in itertools.permutations(range(len(answers)), 2):
            if p.ranks[i] >= p.ranks[j]:
                continue

            def f(a, b):
                odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (mean[a], mean[b])]
                return {"simpo": -log_sigma(2 * (mean[a] - mean[b]) - 1), "kto": 1.0, "nca": 2 * math.log(2),
                        "robust": math.log(2), "orpo": -0.5 * log_sigma(odds[0] - odds[1])}[loss]
            q = p.probability
            best = p.ranks[i] == min(p.ranks)
            losses.append(q * f(i, j) + (1 - q) * f(j, i) - best * (0.3 + (loss == "orpo")) * mean[i])
    assert lines[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_kto_compares_with_what_other_prompts_answers_gain(trained):
    """Each with another prompt's answer, and both in the block."""
    rng = random.Random(0)
    some = [Comparison([[i, i, 50 + i], [i, i, 60 + i, 70]], 2, [1, 2]) for i in range(8)]
    pairs = preferences.mismatched(some, 4, rng)
    assert 4 < len(pairs) <= 8 and all(c.sequences[0][2] % 10 != c.sequences[0][0] for c in pairs)
    assert all(len(c.sequences[0]) <= 3 for c in preferences.mismatched(some, 3, rng))


def test_with_swapped_labels_the_robust_loss_is_on_average_dpos():
    a, b = torch.tensor([0.7]).double(), torch.tensor([-0.4]).double()
    right, swapped = (preferences.robust_loss(x, y, 0.5, 0.2) for x, y in ((a, b), (b, a)))
    near(0.8 * right + 0.2 * swapped, preferences.robust_loss(a, b, 0.5, 0.0))
    near(preferences.robust_loss(a, b, 0.5, 0.0), dpo.dpo_loss(a, b, 0 * a, 0 * b, 0.5)[0])


def test_nca_has_its_minimum_at_two_thirds():
    r = torch.tensor([math.log(2) / 0.5], dtype=torch.float64, requires_grad=True)       # σ(0.5·r) = 2/3
    preferences.nca_loss(r, torch.zeros(1).double(), 0.5).sum().backward()
    near(r.grad, torch.zeros(1))


@pytest.mark.parametrize("loss", preferences.BETAS)
def test_each_loss_of_pairs_trains(trained, loss):
    """It falls where the same preferences are seen again and again."""
    _, _, lines, _ = trained(preferences, loss=loss, data="rankings.jsonl", batch=60, epochs=6, lr=3e-3,
                             max_norm=1.0, warmup=0)
    rises = "logp_chosen" if loss == "orpo" else "accuracy"            # it is SFT above all
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1][rises] > lines[0][rises]
    assert (lines[-1].get("z", 0) > 0) == (loss == "kto")
    at_the_reference = {"kto": 1, "nca": 2 * math.log(2), "robust": math.log(2)}
    if loss in at_the_reference:
        assert lines[0]["loss"] == pytest.approx(at_the_reference[loss], abs=1e-5)


@pytest.mark.parametrize("flags, said", [
    (dict(loss="orpo", gamma=0.5), "--gamma does nothing with --loss orpo"),
    (dict(loss="kto", label_smoothing=0.2), "--label_smoothing does nothing"),
    (dict(length_normalize=True), "simpo and orpo always do")])
def test_flags_of_another_loss_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        preferences.Config(**flags)


# ------------------------------------------------------------------------------------- what the files say

@pytest.mark.parametrize("variant", [gspo, cispo, dapo, reinforce_pp, downsample],
                         ids=lambda module: module.__name__)
def test_the_changed_lines_that_a_file_shows_are_true(variant):
    """Each line with a minus is in a parent, and each with a plus in the file itself."""
    parents = [line.strip() for name in ("ppo.py", "variants/grpo.py")
               for line in (ROOT / name).read_text("utf-8").splitlines()]
    code = Path(variant.__file__).read_text("utf-8").split('"""', 2)[2]
    own = [line.partition("  # ")[0].strip() for line in code.splitlines()]
    shown = [line.strip() for line in variant.__doc__.splitlines() if line.startswith(("    - ", "    + "))]
    assert any(line.startswith("+") for line in shown)
    for line in shown:
        assert line[1:].strip() in (parents if line[0] == "-" else own), line


PARTS = {gspo: dict(policy_loss=gspo.policy_loss), cispo: dict(policy_loss=cispo.policy_loss),
         reinforce_pp: dict(advantages_of=reinforce_pp.global_advantages),
         dapo: dict(policy_loss=functools.partial(dapo.policy_loss, clip_high=0.28))}


@pytest.mark.parametrize("variant", PARTS, ids=lambda module: module.__name__)
def test_the_variant_is_grpo_with_its_part(trained, variant):
    """And its part makes a difference. (dapo without its penalty here.)"""
    how = SMALL | dict(batch=12, lr=1e-2, clip=0.05) | (dict(overlong=0) if variant is dapo else {})
    Config = variant.Config
    _, model, _, _ = trained(variant, **how)
    itself = SimpleNamespace(Config=Config, train=lambda cfg: grpo.train(cfg, **PARTS[variant]))
    _, same, _, _ = trained(itself, **how)
    plainly.assert_same_weights(model, same)
    group = Config() if variant is not reinforce_pp else grpo.Config()
    plain = SimpleNamespace(Config=Config, train=lambda cfg: grpo.train(
        cfg, advantages_of=lambda *args: grpo.advantages_in_groups(*args[:2], group)))
    _, other, _, _ = trained(plain, **how)
    assert not torch.equal(model.head.weight, other.head.weight)


@pytest.mark.parametrize("flags, said", [
    (dict(advantage="rloo"), "advantage"), (dict(overlong=60), "--overlong 60 exceeds")])
def test_flags_of_dapo_that_cannot_be_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        dapo.Config(**flags)
