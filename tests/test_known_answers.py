"""Problems small enough to know the answer: every answer can be listed, so the optimum can be written down.

Four tokens, of which 3 ends an answer, and at most three tokens per answer: 40 answers to each of two
prompts of different length. With a reward r and a KL penalty β, the best policy is
π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β) (Rafailov et al. 2023, eq. 4), and what PPO and DPO end up with is held
against it.

The proofs take an algorithm's choices as parameters: a new kind of advantage or of loss is proved by one
more line.
"""
import itertools
from types import SimpleNamespace

import pytest
import torch

import ppo
from data import world
from dpo import dpo_loss
from model import GPT, GPTConfig
from reward_model import pairwise_loss
from runtime.compute import pad
from runtime.run import Run

V, END, LONGEST, BETA, NO_END = 4, 3, 3, 0.5, -0.5
PROMPTS = [[0], [1, 2]]
ANSWERS = [a for n in range(1, LONGEST + 1) for a in itertools.product(range(V), repeat=n)
           if END not in a[:-1] and (a[-1] == END or n == LONGEST)]
# Prompt 0's answers, then prompt 1's.
ROWS = [prompt + list(answer) for prompt in PROMPTS for answer in ANSWERS]
LENGTHS = torch.tensor([len(row) for row in ROWS])
STARTS = torch.tensor([len(prompt) for prompt in PROMPTS for _ in ANSWERS])
TOKENS = pad(ROWS)
COLUMN = torch.arange(TOKENS.shape[1])
MASK = (COLUMN >= STARTS[:, None]) & (COLUMN < LENGTHS[:, None])


def network(head, seed, n_layer=2):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=n_layer, n_head=2, n_embd=32), head)
    for p in model.parameters():                            # far from uniform: the reference must matter
        p.data += 0.15 * torch.randn_like(p) if p.dim() > 1 and head == "lm" else 0
    return model


def true_reward():
    """r(x, y) of every row: (80,); an answer without an end earns NO_END."""
    r = torch.randn(len(ROWS), generator=torch.Generator().manual_seed(5))
    ended = torch.tensor([row[-1] == END for row in ROWS])
    return torch.where(ended, r, NO_END)


def answer_logprobs(model):
    """log π(y|x) of every answer to every prompt: (2, 40)."""
    return model.logprobs(TOKENS, MASK).sum(1).view(len(PROMPTS), -1)


def optimum(reference, r):
    return (answer_logprobs(reference) + r.view(len(PROMPTS), -1) / BETA).log_softmax(1).exp()


def total_variation(p, q):
    """The larger one of the two prompts' ½·Σ|p − q|."""
    return (0.5 * (p - q).abs().sum(1)).max().item()


class Judge:
    """In the reward model's place: knows r(x, y) of every whole answer."""
    networks, folder = [], None

    def __init__(self, r):
        self.r = {tuple(row): x for row, x in zip(ROWS, r.tolist())}

    def __call__(self, run, prompts, answers, batch):
        rows = zip(batch["tokens"].tolist(), batch["lengths"].tolist())
        return torch.tensor([self.r[tuple(row[:n])] for row, n in rows])


SETTINGS = dict(max_new_tokens=LONGEST, no_end_score=NO_END, kl_coef=BETA, adaptive_kl=False,
                micro_batch=10 ** 6, update_kl=0.0, device="cpu")
TOKENIZER = SimpleNamespace(end=END, vocab_size=V, prompt=lambda messages: messages,
                            decode=lambda ids: " ".join(map(str, ids)))


def test_every_answer_is_listed_once():
    assert len(ANSWERS) == len(set(ANSWERS)) == 40
    torch.testing.assert_close(answer_logprobs(network("lm", 1)).exp().sum(1), torch.ones(2))
    start = answer_logprobs(network("lm", 1)).exp()
    distance = total_variation(start, optimum(network("lm", 1), true_reward()))
    assert distance > 0.4, "a problem that starts solved shows nothing"


# Choices that leave the optimum where it is: settings of the stage's Config.
CHOICES = [dict(critic_lr=1e-2),
           dict(critic_lr=1e-2, lam=0.8, whiten_advantages=False, minibatches=1, epochs=4)]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_ppo_reaches_the_best_policy_that_the_kl_penalty_allows(tmp_path, monkeypatch, choices):
    assert_reaches_the_optimum(ppo, choices, tmp_path, monkeypatch)


def assert_reaches_the_optimum(stage, choices, tmp_path, monkeypatch):
    """Within a total variation distance of 0.05 (0.5 at the start), by the stage's own loop."""
    made = []

    def load(folder, head, vocab_size=V):
        made.append(network(head, 1 if head == "lm" else 2, n_layer=1))
        return made[-1]
    for name, stand_in in (("load", load), ("Tokenizer", SimpleNamespace(load=lambda *_: TOKENIZER)),
                           ("load_prompts", lambda *_: PROMPTS),
                           ("find_reward", lambda *_: Judge(true_reward()))):
        monkeypatch.setattr(stage, name, stand_in)
    monkeypatch.setattr(world, "truth", lambda *_: {})
    for name in ("finish", "show_answers"):
        monkeypatch.setattr(Run, name, lambda *_: None)
    stage.train(stage.Config(steps=120, batch=256, lr=4e-3, out=str(tmp_path), **SETTINGS | choices))
    policy, reference = made[:2]
    distance = total_variation(answer_logprobs(policy).exp(), optimum(reference, true_reward()))
    assert distance < 0.05, (
        f"{stage.__name__} ends {distance:.3f} from π* ∝ π_ref·exp(r/β): rewards, advantages, losses or "
        "rollout are wrong")


# The margin h over the reference at which the mean loss of a pair is least, if its first answer wins with
# probability p (log-odds r): E[loss] = p·loss(h) + (1 − p)·loss(−h), to be differentiated by h.
DPO_MARGINS = {
    "sigmoid": lambda p: (p / (1 - p)).log() / BETA,
    "ipo": lambda p: (2 * p - 1) / (2 * BETA),
    "hinge": lambda p: (p - 0.5).sign() / BETA,
}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", DPO_MARGINS)
def test_each_kind_of_dpo_ends_at_the_margin_that_its_loss_asks_for(kind, smoothing):
    """Within 0.05, for one pair of answers per prompt; smoothed labels are noisier pairs."""
    policy, reference, r = network("lm", 1), network("lm", 1), true_reward()
    first, second = [3, len(ANSWERS)], [15, len(ANSWERS) + 19]      # of each prompt: rows that end
    wins = torch.sigmoid(r[first] - r[second])
    rows = first + second

    def pair_logprobs(model):
        return model.logprobs(TOKENS[rows], MASK[rows]).sum(1).view(2, -1)
    ref_a, ref_b = pair_logprobs(reference).detach()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    steps = 400 if kind == "hinge" else 150         # its gradient does not fade as the margin comes near
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        a, b = pair_logprobs(policy)
        right = dpo_loss(a, b, ref_a, ref_b, BETA, kind, smoothing)[0]
        swapped = dpo_loss(b, a, ref_b, ref_a, BETA, kind, smoothing)[0]
        (wins * right + (1 - wins) * swapped).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wins = wins * (1 - smoothing) + (1 - wins) * smoothing
    torch.testing.assert_close((a - ref_a) - (b - ref_b), DPO_MARGINS[kind](wins), rtol=0, atol=0.05)


def test_dpo_reaches_the_best_policy_that_the_kl_penalty_allows():
    """Within 0.01, given Bradley-Terry's exact preferences between all answers to a prompt."""
    policy, reference, r = network("lm", 1), network("lm", 1), true_reward()
    with torch.no_grad():
        ref = answer_logprobs(reference)
    first, second = torch.tensor(list(itertools.permutations(range(len(ANSWERS)), 2))).T
    wins = torch.sigmoid(r.view(2, -1)[:, first] - r.view(2, -1)[:, second])  # P(first ≻ second), (2, pairs)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(450):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 450)
        logp = answer_logprobs(policy)
        losses = dpo_loss(logp[:, first], logp[:, second], ref[:, first], ref[:, second], BETA)[0]
        (wins * losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    distance = total_variation(answer_logprobs(policy).exp(), optimum(reference, r))
    assert distance < 0.01, (
        f"DPO ends {distance:.3f} from π* ∝ π_ref·exp(r/β): dpo_loss or the log-probabilities are wrong")


def test_the_reward_model_recovers_the_true_differences():
    """Within 0.15 of every difference between answers to one prompt,
    from Bradley-Terry choices between random pairs."""
    model, r = network("scalar", 4), true_reward()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    steps = 800
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        a, b = torch.randint(len(ANSWERS), (2, 4096)) + len(ANSWERS) * torch.randint(2, (4096,))
        first_wins = torch.rand(4096) < torch.sigmoid(r[a] - r[b])
        scores = model.score(TOKENS, LENGTHS)
        pairwise_loss(scores[torch.where(first_wins, a, b)], scores[torch.where(first_wins, b, a)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = (model.score(TOKENS, LENGTHS).detach() - r).view(2, -1)
    error = (found - found.mean(1, keepdim=True)).abs().max().item()
    assert error < 0.15, (
        f"a score is {error:.2f} off r: the Bradley-Terry loss or the place of the score is wrong")


@pytest.mark.parametrize("lam", [1.0, 0.5], ids=["gae, 1.0", "gae, 0.5"])
def test_the_policy_gradient_at_ratio_1_is_the_exact_gradient(tmp_path, lam):
    def advantages_of(rewards, mask, values):
        return ppo.gae(rewards, values, mask, 1.0, lam)[0]
    assert_policy_gradient_is_exact(tmp_path, advantages_of)


def assert_policy_gradient_is_exact(tmp_path, advantages_of, group=1):
    """Of J = E[r − β·KL], listed in full, against policy_loss on samples, within 4 standard errors. With
    exact values in the critic's place any λ is unbiased; λ < 1 with a wrong critic would not be."""
    run, judge = Run(ppo.Config(out=str(tmp_path), **SETTINGS), 1), Judge(true_reward())
    policy, reference = (network("lm", 1, n_layer=1).double() for _ in range(2))
    with torch.no_grad():                               # the policy has moved already, so that the KL counts
        for p in policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    r, ref = true_reward().double().view(2, -1), answer_logprobs(reference).detach()
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def flat(gradients):
        return torch.cat([g.flatten() for g in gradients])

    logp = answer_logprobs(policy)
    J = (logp.exp() * (r - BETA * (logp - ref))).sum(1).mean()
    exact = flat(torch.autograd.grad(J, parameters))

    # V of a state: what is still to come, r − β·Σ(log π − log π_ref) over the tokens ahead, averaged over
    # answers.
    tokenwise = (policy.logprobs(TOKENS, MASK) - reference.logprobs(TOKENS, MASK)).tolist()
    p, ahead_of = logp.exp().flatten().tolist(), {}
    for i, row in enumerate(ROWS):
        for t in range(int(STARTS[i]), len(row)):
            ahead = r.flatten()[i].item() - BETA * sum(tokenwise[i][t:])
            weight, total = ahead_of.get(tuple(row[:t]), (0.0, 0.0))
            ahead_of[tuple(row[:t])] = (weight + p[i], total + p[i] * ahead)
    values = {state: total / weight for state, (weight, total) in ahead_of.items()}

    def critic(tokens):
        found = [[values.get(tuple(row[:t + 1]), 0.0) for t in range(len(row))] for row in tokens.tolist()]
        return torch.tensor(found, dtype=torch.float64)

    prompts = [p for p in PROMPTS * (256 // group) for _ in range(group)]
    torch.manual_seed(11)
    samples, estimates = 20, []
    for _ in range(samples):
        _, batch = ppo.rollout(run, TOKENIZER, prompts, policy, reference)
        tokens, mask, old, ref = (batch[k] for k in ("tokens", "mask", "old_logprobs", "ref_logprobs"))
        earned = ppo.kl_rewards(judge(run, None, None, batch), old, ref, mask, BETA)
        advantages = advantages_of(earned, mask, ppo.state_values(critic, tokens, mask))
        loss, clip_fraction = ppo.policy_loss(policy.logprobs(tokens, mask), old, advantages, mask, 0.2)
        assert clip_fraction == 0
        tokens_an_answer = batch["mask"].sum() / len(batch["mask"])        # the loss is a mean over tokens
        estimates.append(flat(torch.autograd.grad(-loss * tokens_an_answer, parameters)))
    estimates = torch.stack(estimates)
    direction = exact / exact.norm()
    along = estimates @ direction
    off = abs(along.mean() - exact.norm()) / (along.std() / samples ** 0.5)
    assert off < 4, (
        f"the gradient is {off:.1f} standard errors from ∇E[r − β·KL]: "
        "kl_rewards, the advantages or policy_loss are wrong, or maximise something else "
        "(an estimate of the KL can have the right mean and another gradient)")
    assert along.std() / samples ** 0.5 < 0.05 * exact.norm(), "too noisy to show anything"
    cosine = torch.cosine_similarity(estimates.mean(0), exact, dim=0)
    assert cosine > 0.97, f"the gradient points elsewhere than ∇E[r − β·KL]: cosine {cosine:.3f}"
