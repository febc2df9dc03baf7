"""Metrics of a batch of sampled answers, and a few of them token by token for evaluate.py's report."""
from data import world
from data.report import TOKEN_NUMBERS


def answer_metrics(batch, prompts, answers):
    """{name: mean over the answers}: for prompts of the world what its judge says, which is there to be seen
    beside the score (no training uses it); length in tokens; ended, the share that end.

    batch: mask (B, T) and ended (B,); prompts: B message lists; answers: B texts."""
    return {**world.truth(prompts, answers),
            "length": batch["mask"].sum(1).float().mean(), "ended": batch["ended"].float().mean()}


def rollout_examples(tokenizer, prompts, batch):
    """The first three answers of a rollout with the numbers of each token: a list of dicts. batch: scores
    (B,), and of the arrays TOKEN_NUMBERS (B, T) those that the method has."""
    examples = []
    for i, prompt in enumerate(prompts[:3]):
        mask = batch["mask"][i]
        texts = [tokenizer.decode([token]) for token in batch["tokens"][i][mask].tolist()]
        numbers = {name: batch[name][i][mask].tolist() for name in TOKEN_NUMBERS if name in batch}
        examples.append({"prompt": prompt, "score": batch["scores"][i].item(), "tokens": texts, **numbers})
    return examples
