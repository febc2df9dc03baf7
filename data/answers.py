"""Metrics of a batch of sampled answers, and a few of them token by token for evaluate.py's report."""
from data import world


def answer_metrics(batch, prompts, answers):
    """{name: mean over the answers}: length in tokens, ended (the share that end), and, for prompts of the
    world, what its judge says. The judge is there to be seen beside the score; no training uses it.

    batch: mask (B, T) and ended (B,); prompts: B message lists; answers: B texts."""
    return {"length": batch["mask"].sum(1).float().mean(), "ended": batch["ended"].float().mean(),
            **world.truth(prompts, answers)}


def rollout_examples(tokenizer, prompts, batch, count=3):
    """The first answers of a rollout with the numbers of each token: a list of dicts. batch: scores (B,), and
    of the arrays (B, T) below those that the method has."""
    names = ("old_logprobs", "ref_logprobs", "rewards", "old_values", "returns", "advantages")
    examples = []
    for i in range(min(count, len(prompts))):
        mask = batch["mask"][i]
        examples.append({"prompt": prompts[i], "score": batch["scores"][i].item(),
                         "tokens": [tokenizer.decode([token]) for token in batch["tokens"][i][mask].tolist()],
                         **{name: batch[name][i][mask].tolist() for name in names if name in batch}})
    return examples
