"""The stages once more, written as plainly as possible and in other words: one row at a time, without
padding, masks, micro-batches or anything of runtime/. Tests hold what a stage logs and learns against these.

They share with the project only what other tests prove on its own: the network's forward pass, the noise of a
row (model.uniform), the tokenizer, the order of batches, and the world's judge.
"""
import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data import world
from data.batches import batches
from model import uniform


def assert_same_lines(lines, expected):
    """What a stage has logged, which is rounded to six places, and what a plain loop gives: the same names
    and numbers, apart from the speed and the sampler's rounding."""
    for line in lines:
        line.pop("seconds", None)
        assert abs(line.pop("sampler_kl", 0.0)) < 1e-3          # in bfloat16: what the sampler rounds
    assert len(lines) == len(expected)
    for ours, theirs in zip(lines, expected):
        assert sorted(ours) == sorted(theirs)
        assert ours == pytest.approx(theirs, abs=2e-6, rel=1e-9), f"step {theirs['step']}"


def assert_same_weights(model, plain):
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, msg=lambda m: f"{name}: {m}")


class AdamW:
    """AdamW from its paper (Loshchilov & Hutter 2019), with clipping by the norm of all gradients."""

    def __init__(self, model, weight_decay=0.0, eps=1e-8, max_norm=1.0):
        self.parameters = list(model.parameters())
        self.decay = [weight_decay if p.dim() >= 2 else 0.0 for p in self.parameters]
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.eps, self.max_norm, self.steps = eps, max_norm, 0

    def step(self, loss, lr):
        """Returns the norm of the gradient."""
        loss = loss + 0 * sum(p.sum() for p in self.parameters)         # where all is clipped, it is a number
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients)]
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients))
        factor = 1.0
        if self.max_norm and norm > self.max_norm:
            factor = self.max_norm / (norm + 1e-6)                          # PyTorch's own small number
        self.steps += 1
        with torch.no_grad():
            for p, g, m, v, decay in zip(self.parameters, gradients, self.m, self.v, self.decay):
                g = g * factor
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.99 * v + 0.01 * g ** 2)
                p -= lr * decay * p
                p -= lr * (m / (1 - 0.9 ** self.steps)) / ((v / (1 - 0.99 ** self.steps)).sqrt() + self.eps)
        return norm


DECAYS = {                                      # of the share x of the steps after the warm-up that are done
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def rate(cfg, step, total, lr):
    """The learning rate at a step from 0."""
    if step < cfg.warmup:
        return lr * (step + 1) / cfg.warmup
    return lr * DECAYS[cfg.decay]((step - cfg.warmup) / max(1, total - cfg.warmup))


def begin(cfg, step):
    """The randomness of a step: Python's, and torch's is seeded from it."""
    rng = random.Random(f"{cfg.seed}/{step}")
    torch.manual_seed(rng.getrandbits(63))
    return rng


def token_logprobs(model, ids, temperature=1.0):
    """log p of ids[1], ids[2], ...: a list of scalars with a graph, the first of which is that of ids[1]."""
    logp = (model(torch.tensor([ids]))[0] / temperature).log_softmax(-1)
    return [logp[t - 1, ids[t]] for t in range(1, len(ids))]


def answer_logprob(model, prompt, answer):
    return sum(token_logprobs(model, prompt + answer)[len(prompt) - 1:])


def mean(values):
    return sum(values) / len(values)


def that_fit(conversations, takes, room):
    """Message lists without as many of their oldest turns as it takes; those that are no use then are left
    out."""
    kept = []
    for messages in conversations:
        first = 1 if messages[0]["role"] == "system" else 0
        questions = [i for i, m in enumerate(messages) if m["role"] == "user"]
        for start in [first, *questions[1:]]:
            rest = messages[:first] + messages[start:]
            if takes(rest) <= room:
                kept.append(rest)
                break
    return kept


def conversations_that_fit(model, tokenizer, conversations):
    found = that_fit(conversations, lambda c: len(tokenizer.chat(c)[0]), model.config.block_size)
    return [tokenizer.chat(c) for c in found if any(m["role"] == "assistant" for m in c)]


def ordered_pairs(ranks):
    """(better, worse) of every two answers that the ranks tell apart."""
    n = range(len(ranks))
    return [(i, j) for i in n for j in n if ranks[i] < ranks[j]]


# ----------------------------------------------------------------------------------------------- sft

def learnt_logprobs(model, conversation):
    """log p of the tokens that the assistant says in (ids, learn)."""
    ids, learn = conversation
    return [x for x, wanted in zip(token_logprobs(model, ids), learn[1:]) if wanted]


def sft(cfg, model, tokenizer, conversations, held_out):
    """Trains the model. Returns a line {name: number} per step."""
    data, held_out = (conversations_that_fit(model, tokenizer, part) for part in (conversations, held_out))
    total = cfg.epochs * math.ceil(len(data) / cfg.batch)
    optimizer, lines = AdamW(model, cfg.weight_decay, max_norm=cfg.max_norm), []
    for step, batch in enumerate(batches([len(ids) for ids, _ in data], cfg.batch, cfg.epochs, cfg.seed)):
        logprobs = [x for i in batch for x in learnt_logprobs(model, data[i])]
        loss, lr = -mean(logprobs), rate(cfg, step, total, cfg.lr)
        lines.append({"step": step + 1, "loss": loss.item(), "grad_norm": optimizer.step(loss, lr), "lr": lr})
        every = max(1, total // cfg.evals)
        if (step + 1) % every == 0 and step + every < total:
            loss = -mean([x.item() for c in held_out for x in learnt_logprobs(model, c)])
            lines[-1] |= {"held_out_loss": loss, "perplexity": math.exp(loss)}
    return lines


def sft_held_out(model, tokenizer, held_out):
    held_out = conversations_that_fit(model, tokenizer, held_out)
    return -mean([x.item() for c in held_out for x in learnt_logprobs(model, c)])


# ----------------------------------------------------------------------------------------------- reward model

def score(model, ids):
    return model(torch.tensor([ids]))[0, -1]


def sequences(tokenizer, preference):
    """(prompt, [answer, ...]) as ids."""
    return tokenizer.prompt(preference.prompt), [r if isinstance(r, list) else tokenizer.response(r)
                                                 for r in preference.responses]


def longest_sequence(tokenizer, preference):
    prompt, answers = sequences(tokenizer, preference)
    return len(prompt) + max(len(a) for a in answers)


def comparisons_that_fit(model, tokenizer, preferences):
    """Those that say something, and fit."""
    some = [p for p in preferences if len(set(p.ranks)) > 1]
    kept = []
    for p in some:
        prompts = that_fit([p.prompt], lambda prompt: longest_sequence(tokenizer, replace(p, prompt=prompt)),
                           model.config.block_size)
        kept += [replace(p, prompt=prompt) for prompt in prompts]
    return kept


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def reward_model(cfg, model, tokenizer, preferences):
    """Trains the model, without its scale. Returns a line {name: number} per step."""
    preferences = comparisons_that_fit(model, tokenizer, preferences)
    data = [(*sequences(tokenizer, p), p.ranks, p.margin, p.probability) for p in preferences]
    longest = [longest_sequence(tokenizer, p) for p in preferences]
    total = cfg.epochs * math.ceil(len(data) / cfg.batch)
    optimizer, lines = AdamW(model, cfg.weight_decay, max_norm=cfg.max_norm), []
    for step, batch in enumerate(batches(longest, cfg.batch, cfg.epochs, cfg.seed)):
        losses, right = [], []
        for prompt, answers, ranks, margin, sure in (data[i] for i in batch):
            r = [score(model, prompt + answer) for answer in answers]
            losses.append(mean([-sure * log_sigmoid(r[i] - r[j] - margin)
                                - (1 - sure) * log_sigmoid(r[j] - r[i] - margin)
                                for i, j in ordered_pairs(ranks)]))
            best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
            right.append(1.0 if r[best] > r[worst] else 0.0)
        loss, lr = mean(losses), rate(cfg, step, total, cfg.lr)
        lines.append({"step": step + 1, "loss": loss.item(), "best_beats_worst": mean(right),
                      "grad_norm": optimizer.step(loss, lr), "lr": lr})
    return lines


@torch.no_grad()
def reward_model_held_out(model, tokenizer, preferences):
    """What reward_model.py says of held-out preferences, without what is the world's."""
    gaps, longer = [], []
    for p in comparisons_that_fit(model, tokenizer, preferences):
        prompt, answers = sequences(tokenizer, p)
        r = [score(model, prompt + a).item() for a in answers]
        for winner, loser in ordered_pairs(p.ranks):
            gaps.append(r[winner] - r[loser])
            longer.append(len(answers[winner]) - len(answers[loser]))
    points = [1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gaps]
    found = {"loss": mean([math.log1p(math.exp(-g)) for g in gaps]), "accuracy": mean(points),
             "pairs": len(gaps)}
    for name, wanted in (("winner_shorter", lambda n: n < -4), ("same_length", lambda n: -4 <= n <= 4),
                         ("winner_longer", lambda n: n > 4)):
        some = [x for x, n in zip(points, longer) if wanted(n)]
        if some:
            found[f"accuracy_{name}"] = mean(some)
    rows = []
    for tenth in range(5, 10):
        said = [(1 / (1 + math.exp(-abs(g))), g > 0) for g in gaps]
        some = [(s, won) for s, won in said if tenth / 10 <= s < (tenth + 1) / 10 or (tenth == 9 and s == 1)]
        if some:
            rows.append([mean([s for s, _ in some]), mean([float(won) for _, won in some]), len(some)])
    return found, rows


@torch.no_grad()
def scale(cfg, model, sft_model, tokenizer, preferences, steps):
    """Shift and scale the reward model by the scores of SFT samples. Returns their mean and standard
    deviation."""
    size = model.config.block_size
    room = min(64, size // 2)
    prompts = that_fit([p.prompt for p in preferences if len(set(p.ranks)) > 1],
                       lambda messages: len(tokenizer.prompt(messages)), size - room)
    prompts = [tokenizer.prompt(messages) for messages in prompts]
    rng = begin(cfg, steps)
    chosen = rng.choices(prompts, k=cfg.normalize)
    seeds, scores = [rng.getrandbits(62) for _ in chosen], []
    for ids, seed in zip(chosen, seeds):
        scores.append(score(model, ids + sample(sft_model, ids, seed, room, tokenizer.end)).item())
    average = mean(scores)
    deviation = math.sqrt(sum((s - average) ** 2 for s in scores) / (len(scores) - 1))
    model.head.weight /= deviation
    model.head.bias -= average
    model.head.bias /= deviation
    return average, deviation


def heads(states, preferences, count, noise):
    """An ensemble's heads, (count, C) in lists, from states[p][k] of the answers of each preference. noise: a
    torch.Generator."""
    N, C = len(states), len(states[0][0])
    found = [(x / math.sqrt(C + 1)).requires_grad_() for x in torch.randn(count, C, generator=noise)]
    drawn = torch.randint(N, (count, N), generator=noise).tolist()
    optimizers = [torch.optim.Adam([head], 0.03) for head in found]
    for _ in range(30):
        for start in range(0, N, 512):
            for head, optimizer, mine in zip(found, optimizers, drawn):
                losses = []
                for p in mine[start:start + 512]:
                    r = [head @ torch.tensor(h) for h in states[p]]
                    sure, margin = preferences[p].probability, preferences[p].margin
                    losses.append(mean([-sure * log_sigmoid(r[i] - r[j] - margin)
                                        - (1 - sure) * log_sigmoid(r[j] - r[i] - margin)
                                        for i, j in ordered_pairs(preferences[p].ranks)]))
                optimizer.zero_grad()
                mean(losses).backward()
                optimizer.step()
    return [head.tolist() for head in found]


@torch.no_grad()
def answer_states(model, tokenizer, preferences):
    """states[p][k]: what the head reads of answer k of preference p, a list."""
    return [[model.hidden(torch.tensor([prompt + a]))[0, -1].tolist() for a in answers]
            for prompt, answers in (sequences(tokenizer, p) for p in preferences)]


def uncertainty(cfg, model, tokenizer, preferences, held_out):
    """How far a reward model's scores can be trusted: {name: lists}."""
    preferences = comparisons_that_fit(model, tokenizer, preferences)
    preferences = random.Random(cfg.seed).sample(preferences, len(preferences))
    states = answer_states(model, tokenizer, preferences)
    with torch.enable_grad():
        found = heads(states, preferences, cfg.heads, torch.Generator().manual_seed(cfg.seed))
    every = [h for some in states for h in some]
    weight, bias = model.head.weight[0].tolist(), model.head.bias.item()
    own = [sum(x * w for x, w in zip(h, weight)) + bias for h in every]
    scaled, biases = [], []
    for head in found:
        theirs = [sum(x * w for x, w in zip(h, head)) for h in every]
        scale = statistics.stdev(own) / statistics.stdev(theirs)
        scaled.append([w * scale for w in head])
        biases.append(mean(own) - scale * mean(theirs))
    C, average = len(every[0]), [mean(column) for column in zip(*every)]
    covariance = [[sum((h[i] - average[i]) * (h[j] - average[j]) for h in every) / (len(every) - 1)
                   for j in range(C)] for i in range(C)]
    floor = 1e-3 * mean([covariance[i][i] for i in range(C)])
    for i in range(C):
        covariance[i][i] += floor
    distances = []
    for some in answer_states(model, tokenizer, comparisons_that_fit(model, tokenizer, held_out)):
        for h in some:
            away = torch.tensor([x - m for x, m in zip(h, average)])
            distances.append(math.sqrt(away @ torch.linalg.solve(torch.tensor(covariance), away)))
    return {"heads": scaled, "bias": biases, "mean": average,
            "threshold": torch.tensor(distances).quantile(0.99).item(),
            "precision": torch.linalg.inv(torch.tensor(covariance)).tolist()}


# ----------------------------------------------------------------------------------------------- dpo

DPO_LOSSES = {                                      # of h, the margin over the reference's
    "sigmoid": lambda h, beta: -log_sigmoid(beta * h),
    "ipo": lambda h, beta: (h - 1 / (2 * beta)) ** 2,
    "hinge": lambda h, beta: torch.clamp(1 - beta * h, min=0),
}


def dpo_numbers(cfg, model, reference, tokenizer, preferences):
    """{name: mean over all pairs} of some preferences; "loss" has a graph."""
    rows = []
    for p in preferences:
        prompt, answers = sequences(tokenizer, p)
        size = [len(a) if cfg.length_normalize else 1 for a in answers]
        logp = [answer_logprob(model, prompt, a) for a in answers]
        ref = [answer_logprob(reference, prompt, a).item() for a in answers]
        ratio = [(x - y) / n for x, y, n in zip(logp, ref, size)]
        for winner, loser in ordered_pairs(p.ranks):
            h = ratio[winner] - ratio[loser]
            won, lost = DPO_LOSSES[cfg.loss](h, cfg.beta), DPO_LOSSES[cfg.loss](-h, cfg.beta)
            right, swapped = 1 - cfg.label_smoothing, cfg.label_smoothing
            loss = (p.probability * (right * won + swapped * lost)
                    + (1 - p.probability) * (right * lost + swapped * won))
            if p.ranks[winner] == 1:
                loss = loss - cfg.nll_coef * logp[winner] / len(answers[winner])
            good, bad = cfg.beta * ratio[winner].item(), cfg.beta * ratio[loser].item()
            rows.append({"loss": loss, "accuracy": float(good > bad), "margin": good - bad,
                         "reward_chosen": good, "reward_rejected": bad,
                         "logp_chosen": logp[winner].item(), "logp_rejected": logp[loser].item()})
    return {name: mean([row[name] for row in rows]) for name in rows[0]}


def room(cfg, model, tokenizer, preferences):
    return min(cfg.max_new_tokens,
               model.config.block_size - max(len(tokenizer.prompt(p.prompt)) for p in preferences))


@torch.no_grad()
def dpo_fresh(cfg, rng, model, tokenizer, preferences, scorer):
    """The same prompts with the policy's answers, lists of ids, ranked by a reward model; and what is logged
    of the answers."""
    k, longest, found = len(preferences[0].responses), room(cfg, model, tokenizer, preferences), []
    lengths, ended = [], []
    seeds = iter([rng.getrandbits(62) for _ in range(k * len(preferences))])
    for p in preferences:
        prompt = tokenizer.prompt(p.prompt)
        answers = [sample(model, prompt, next(seeds), longest, tokenizer.end) for _ in range(k)]
        scores = [score(scorer, prompt + a).item() if a[-1] == tokenizer.end else -math.inf for a in answers]
        ranks = [1 + len([x for x in scores if x > mine]) for mine in scores]
        lengths += [float(len(a)) for a in answers]
        ended += [float(a[-1] == tokenizer.end) for a in answers]
        if len(set(ranks)) > 1:
            found.append(replace(p, responses=answers, ranks=ranks, probability=1.0))
    return found, {"length": mean(lengths), "ended": mean(ended)}


def dpo(cfg, model, reference, tokenizer, preferences, scorer=None):
    """Trains the model; with a scorer, on fresh answers that it ranks. Returns a line {name: number} per
    step."""
    preferences = [p for p in preferences if len(set(p.ranks)) > 1]
    preferences = comparisons_that_fit(model, tokenizer, preferences)
    longest = [longest_sequence(tokenizer, p) for p in preferences]
    total = cfg.epochs * math.ceil(len(preferences) / cfg.batch)
    optimizer, lines = AdamW(model, max_norm=cfg.max_norm), []
    for step, batch in enumerate(batches(longest, cfg.batch, cfg.epochs, cfg.seed)):
        rng, some, sampled = begin(cfg, step), [preferences[i] for i in batch], {}
        if scorer:
            fresh, sampled = dpo_fresh(cfg, rng, model, tokenizer, some, scorer)
            some = fresh or some
        numbers = dpo_numbers(cfg, model, reference, tokenizer, some)
        lr, loss = rate(cfg, step, total, cfg.lr), numbers["loss"]
        norm = optimizer.step(loss, lr)
        lines.append(numbers | sampled | {"step": step + 1, "loss": loss.item(), "grad_norm": norm, "lr": lr})
    return lines


# ----------------------------------------------------------------------------------------------- ppo

@torch.no_grad()
def sample(model, prompt, seed, longest, end, temperature=1.0):
    """An answer, token by token, by going along the distribution until it has covered u."""
    ids, answer = list(prompt), []
    while len(answer) < longest and (not answer or answer[-1] != end):
        p = (model(torch.tensor([ids]))[0, -1] / temperature).softmax(-1).tolist()
        u, token, covered = uniform(torch.tensor([seed]), len(answer)).item(), 0, p[0]
        while covered < u and token + 1 < len(p):
            token += 1
            covered += p[token]
        ids.append(token)
        answer.append(token)
    return answer


def flat(answers, name):
    return [x for a in answers for x in a[name]]


def whitened(answers, name, shift):
    """Numbers of all tokens scaled to variance 1, and shifted to mean 0 if so wished, in place."""
    values = flat(answers, name)
    average = mean(values)
    deviation = math.sqrt(mean([(x - average) ** 2 for x in values]) + 1e-8)
    for a in answers:
        a[name] = [(x - average) / deviation + (0 if shift else average) for x in a[name]]


def doubt(a, reward, known):
    """In place: what an ensemble says of an answer, and how far it is from what the reward model has seen."""
    with torch.no_grad():
        h = reward.hidden(torch.tensor([a["prompt"] + a["ids"]]))[0, -1].tolist()
    a["heads"] = [sum(x * w for x, w in zip(h, head)) + b for head, b in zip(known["heads"], known["bias"])]
    away = [x - m for x, m in zip(h, known["mean"])]
    square = sum(x * p * y for x, row in zip(away, known["precision"]) for p, y in zip(row, away))
    a["distance"] = math.sqrt(square) / known["threshold"]


PESSIMISM = {
    "none": lambda cfg, a: a["score"],
    "deviation": lambda cfg, a: mean(a["heads"]) - cfg.pessimism_coef * statistics.stdev(a["heads"]),
    "worst": lambda cfg, a: min(a["heads"]),
}


def ppo_rollout(cfg, rng, nets, tokenizer, prompts, beta, program, known):
    """A list of answers, each a dict of lists over its tokens."""
    seeds = [rng.getrandbits(62) for _ in prompts]
    answers = []
    for messages, seed in zip(prompts, seeds):
        prompt = tokenizer.prompt(messages)
        ids = sample(nets["policy"], prompt, seed, cfg.max_new_tokens, tokenizer.end, cfg.temperature)
        a = {"prompt": prompt, "ids": ids, "ended": ids[-1] == tokenizer.end}
        with torch.no_grad():
            for name, net in (("old", "policy"), ("ref", "reference")):
                whole = token_logprobs(nets[net], prompt + ids, cfg.temperature)
                a[name] = [x.item() for x in whole[len(prompt) - 1:]]
            if cfg.advantage == "gae":
                a["values"] = nets["critic"](torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1].tolist()
            a["score"] = score(nets["reward"], prompt + ids).item() if "reward" in nets else 0.0
        if known:
            doubt(a, nets["reward"], known)
            careful = PESSIMISM[cfg.pessimism](cfg, a) - cfg.ood_penalty * max(0, a["distance"] - 1)
            a["score"] = max(careful, min(a["score"], cfg.no_end_score))
        if program:
            a["terms"] = a["score"], program(messages, tokenizer.decode(ids))
            a["score"] = cfg.reward_model_coef * a["terms"][0] + a["terms"][1]
        if not a["ended"]:
            a["score"] = cfg.no_end_score
        a["rewards"] = [-beta * (x - y) for x, y in zip(a["old"], a["ref"])]
        a["rewards"][-1] += a["score"]
        answers.append(a)
    if cfg.whiten_rewards:
        whitened(answers, "rewards", shift=False)
    if cfg.advantage != "gae":
        group_advantages(cfg, answers)
        return answers
    for a in answers:
        r, v, n = a["rewards"], a["values"] + [0.0], len(a["ids"])
        delta = [r[t] + cfg.gamma * v[t + 1] - v[t] for t in range(n)]
        discount = cfg.gamma * cfg.lam
        a["advantages"] = [sum(discount ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        a["returns"] = [x + y for x, y in zip(a["advantages"], a["values"])]
    if cfg.whiten_advantages:
        whitened(answers, "advantages", shift=True)
    return answers


# A group's advantages, by name: from what answer i and all answers earned.
GROUPS = {
    "gae": None,
    "rloo": lambda cfg, i, R: R[i] - mean(R[:i] + R[i + 1:]),
    "grpo": lambda cfg, i, R: (R[i] - mean(R)) / (statistics.stdev(R) + 1e-4 if cfg.divide_by_std else 1),
}


def group_advantages(cfg, answers):
    """In place: the same for all tokens of an answer."""
    average = mean([float(len(a["ids"])) for a in answers])
    for start in range(0, len(answers), cfg.group):
        group = answers[start:start + cfg.group]
        R = [sum(a["rewards"]) for a in group]
        for i, a in enumerate(group):
            advantage = GROUPS[cfg.advantage](cfg, i, R)
            if cfg.advantage == "grpo" and cfg.divide_by_length:
                advantage *= average / len(a["ids"])
            a["advantages"] = [advantage] * len(a["ids"])


def ppo_minibatch(cfg, nets, answers):
    """(policy's loss, critic's loss, what is logged) of some answers, means over their tokens."""
    policy, value, entropies, policy_clipped, value_clipped, kls = [], [], [], [], [], []
    for a in answers:
        ids = torch.tensor([a["prompt"] + a["ids"]])
        start = len(a["prompt"])
        logp = (nets["policy"](ids)[0] / cfg.temperature).log_softmax(-1)
        out = nets["critic"](ids)[0] if cfg.advantage == "gae" else None
        for t, token in enumerate(a["ids"]):
            now = logp[start + t - 1]
            ratio, advantage = (now[token] - a["old"][t]).exp(), a["advantages"][t]
            limited = min(max(ratio.item(), 1 - cfg.clip), 1 + cfg.clip)
            is_clipped = limited * advantage < ratio.item() * advantage
            policy.append(-(limited * advantage if is_clipped else ratio * advantage))
            policy_clipped.append(float(abs(ratio.item() - 1) > cfg.clip))
            entropies.append(-(now.exp() * now).sum())
            log_ratio = (now[token] - a["old"][t]).item()
            kls.append(math.expm1(log_ratio) - log_ratio)
            if out is None:
                continue
            v, old, wanted = out[start + t - 1], a["values"][t], a["returns"][t]
            near = min(max(v.item(), old - cfg.value_clip), old + cfg.value_clip)
            clip_counts = (near - wanted) ** 2 > (v.item() - wanted) ** 2
            value.append(0.5 * ((near - wanted) ** 2 if clip_counts else (v - wanted) ** 2))
            value_clipped.append(float(abs(v.item() - old) > cfg.value_clip))
    stats = {"policy_loss": mean(policy), "entropy": mean(entropies), "clip_fraction": mean(policy_clipped),
             "approx_kl": mean(kls)}
    if value:
        stats |= {"value_loss": mean(value), "value_clip_fraction": mean(value_clipped)}
    stats = {name: float(torch.as_tensor(x).detach()) for name, x in stats.items()}
    return mean(policy) - cfg.entropy_coef * mean(entropies), mean(value) if value else None, stats


# Flags of PPO's variants, with values that leave it what it is.
PLAIN = {"advantage": "gae", "group": 1, "whiten_rewards": False, "ptx_coef": 0.0, "pessimism": "none",
         "ood_penalty": 0.0, "reward_model_coef": 1.0}


def ppo(cfg, nets, tokenizer, prompts, demonstrations, program=None, known=None):
    """Trains the policy and, with gae, the critic. Returns a line {name: number} per step."""
    cfg = SimpleNamespace(**PLAIN | vars(cfg))
    optimizer = AdamW(nets["policy"], eps=1e-5, max_norm=cfg.max_norm)
    if cfg.advantage == "gae":
        critic = AdamW(nets["critic"], eps=1e-5, max_norm=cfg.max_norm)
    beta, lines = cfg.kl_coef, []
    prompts = that_fit(prompts, lambda p: len(tokenizer.prompt(p)) + cfg.max_new_tokens,
                       nets["policy"].config.block_size)
    demonstrations = conversations_that_fit(nets["policy"], tokenizer, demonstrations)
    for step in range(cfg.steps):
        rng = begin(cfg, step)
        chosen = rng.choices(prompts, k=cfg.batch // cfg.group)
        chosen = [prompt for prompt in chosen for _ in range(cfg.group)]
        answers = ppo_rollout(cfg, rng, nets, tokenizer, chosen, beta, program, known)
        stats, updates = [], 0
        minibatches = []
        for _ in range(cfg.epochs):
            minibatches += torch.randperm(cfg.batch).tensor_split(cfg.minibatches)
        for rows in minibatches:
            policy, value, numbers = ppo_minibatch(cfg, nets, [answers[i] for i in rows.tolist()])
            stats.append(numbers)
            if cfg.update_kl and numbers["approx_kl"] > cfg.update_kl:
                break
            if cfg.ptx_coef:
                some = rng.sample(demonstrations, min(cfg.ptx_batch, len(demonstrations)))
                logprobs = [x for c in some for x in learnt_logprobs(nets["policy"], c)]
                policy = policy - cfg.ptx_coef * mean(logprobs)
            optimizer.step(policy, rate(cfg, step, cfg.steps, cfg.lr))
            if value is not None:
                critic.step(value, rate(cfg, step, cfg.steps, cfg.critic_lr))
            updates += 1
        kl = mean([sum(a["old"]) - sum(a["ref"]) for a in answers])
        texts = [tokenizer.decode(a["ids"]) for a in answers]
        fit = {}
        if cfg.advantage == "gae":
            returns = torch.tensor(flat(answers, "returns"))
            errors = returns - torch.tensor(flat(answers, "values"))
            fit = {"explained_variance": (1 - errors.var() / returns.var()).item()}
        if known:
            fit |= {"ood": mean([float(a["distance"] > 1) for a in answers]),
                    "disagreement": mean([statistics.stdev(a["heads"]) for a in answers])}
        if program and "reward" in nets:
            model_scores, program_scores = zip(*(a["terms"] for a in answers))
            fit |= {"score_1_reward_model": mean(model_scores), "score_2_words": mean(program_scores)}
        lines.append({
            "step": step + 1, "score": mean([a["score"] for a in answers]), "kl": kl, "kl_coef": beta,
            **{name: mean([s[name] for s in stats]) for name in stats[0]}, "updates": updates, **fit,
            "length": mean([len(a["ids"]) for a in answers]),
            "ended": mean([float(a["ended"]) for a in answers]),
            "judge": mean([world.judge(p, text) for p, text in zip(chosen, texts)]),
            "helpful": mean([world.parts(p, text)["helpful"] for p, text in zip(chosen, texts)])})
        if cfg.adaptive_kl:
            beta *= 1 + min(max(kl / cfg.kl_target - 1, -0.2), 0.2) * cfg.batch / cfg.kl_horizon
    return lines
