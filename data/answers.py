"""What a model answers, what a reward model or a program thinks of it, and what there is to see in it."""
import time

from data import world


def look(run, model, reference, tokenizer, prompts, max_new_tokens):
    """What a policy does, on sampled answers to some prompts (lists of ids): {name: mean}. DPO's loss does
    not show it: held-out accuracy can be fine where the answers have fallen apart."""
    room = min(max_new_tokens, model.config.block_size - max(map(len, prompts)))
    batch = run.sample(model, prompts, run.seeds(len(prompts)), room, stop_token=tokenizer.end)

    def read(b):
        logprobs, entropy = model.logprobs(b["tokens"], b["mask"], entropy=True)
        ref_logprobs = reference.logprobs(b["tokens"], b["mask"])
        return {"kl": (logprobs - ref_logprobs).sum(1), "entropy": entropy.sum(1)}
    found, length = run.map(read, batch), batch["mask"].sum(1).float().mean()
    return {"kl": found["kl"].mean().item(), "entropy": (found["entropy"].mean() / length).item(),
            "length": length.item(), "ended": batch["ended"].float().mean().item()}


def warnings(seen):
    """Signs of a policy that falls apart, in what look() found: a list of texts."""
    found = []
    if seen["entropy"] < 0.01:
        found.append("answers leave nothing to chance (entropy near 0): lower --lr or raise --beta")
    if seen["kl"] > 10:
        found.append("KL is beyond 10 nats per answer: lower --lr, or raise --beta or --nll_coef")
    if seen["ended"] < 0.95:
        found.append("answers do not end: lower --lr, raise --beta, --nll_coef or --max_new_tokens")
    return found


def opened(tokenizer, prompts, batch, step, count=3):
    """The first answers of a rollout of ppo.py with all that is known of each token: a list of dicts."""
    found, names = [], ("old_logprobs", "ref_logprobs", "rewards", "old_values", "returns", "advantages")
    for i in range(min(count, len(prompts))):
        mask = batch["mask"][i]
        found.append({"step": step, "prompt": prompts[i], "score": batch["scores"][i].item(),
                      "tokens": [tokenizer.decode([token]) for token in batch["tokens"][i][mask].tolist()],
                      **{name: batch[name][i][mask].tolist() for name in names if name in batch}})
    return found


# --------------------------------------------------------------------- rollouts of ppo.py and grpo.py

def texts(tokenizer, batch):
    return [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in zip(batch["tokens"], batch["mask"])]


def metrics(batch, prompts, answers, began):
    """What a person watches of a rollout that began at this time: {name: number}."""
    log_ratio, tokens = batch["old_logprobs"] - batch["ref_logprobs"], batch["mask"].sum()
    found = {"score": batch["scores"].mean(), "kl": log_ratio.sum(1).mean().item(),        # nats per answer
             "length": tokens / len(prompts), "ended": batch["ended"].float().mean(),
             "tokens_per_second": tokens / (time.time() - began)}
    return found | world.truth(prompts, answers)    # to be seen beside the score: training never uses it


def explained_variance(values, returns, mask):
    """1 − Var[return − V] / Var[return] over the mask: 1 for a perfect critic; 0 for one that is no better
    than a constant, so that advantages are as noisy as without a critic; negative for one that adds noise."""
    residual = (returns - values)[mask].var()
    return 1 - residual / returns[mask].var().clamp(min=1e-8)


def policy_warnings(cfg, metrics):
    """Signs of a collapsing policy in a step's metrics, in words that say what to change: a list of texts."""
    found = []
    if metrics["entropy"] < 0.01:
        found.append("answers leave nothing to chance (entropy near 0): raise --entropy_coef or --kl_coef")
    if cfg.adaptive_kl and metrics["kl"] > 4 * cfg.kl_target:
        found.append("KL is far beyond its target: lower --lr, or start with a higher --kl_coef")
    if metrics["ended"] < 0.1:
        found.append("hardly an answer ends: raise --max_new_tokens, or lower --no_end_score")
    return found


def keep_rollout(run, tokenizer, prompts, batch):
    """Write a few answers of the first step and of the last one so far, for evaluate.py's report."""
    for which in ("first", "last") if run.step == 0 else ("last",):
        run.write(f"rollout_{which}.json", opened(tokenizer, prompts, batch, run.step + 1))
