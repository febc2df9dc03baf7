"""The same numbers as other people's code: transformers' GPT-2, and the lines of TRL 1.12's PPO and DPO
trainers.

Skipped where these are not installed: pip install transformers; pip install --no-deps trl==1.12.0. TRL
computes its losses in the middle of long methods, so those lines are read from its files and run on our
arrays. All in float64, to 1e-10 (transformers computes its loss in float32: 1e-7 there).

Known differences, not compared: TRL puts the score on the first padding token rather than on the end token,
and whitens with Bessel's correction; its IPO always divides by the lengths (--length_normalize here).
"""
import importlib.metadata
import importlib.util
import os
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import loading
from data.tokenizer import Tokenizer
from dpo import dpo_loss
from model import GPT
from ppo import gae, policy_loss, value_loss
from runtime.compute import pad

B, T = 6, 11


def near(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ragged(seed, n):
    """n arrays (B, T) in float64, 0 outside a mask of answers of different lengths, and the mask."""
    torch.manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    return *(torch.randn(n, B, T).double() * mask), mask


# ------------------------------------------------------------------------------------------ TRL

@pytest.fixture(scope="module")
def trl_lines():
    """A function that runs the lines of a file of TRL from the one that starts with `first` to the one that
    starts with `last`, that one left out, with these names, and returns all names afterwards."""
    found = importlib.util.find_spec("trl")
    if not found or not importlib.metadata.version("trl").startswith("1.12."):
        pytest.skip("TRL 1.12 is not installed")

    def run(path, first, last, **names):
        with open(os.path.join(os.path.dirname(found.origin), path), encoding="utf-8") as f:
            lines = f.read().split("\n")
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
        end = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(last))
        names |= {"torch": torch, "F": F}
        exec(textwrap.dedent("\n".join(lines[start:end])), names)
        return names
    return run


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae_as_trl_computes_it(trl_lines, gamma, lam):
    rewards, values, mask = ragged(1, 2)
    theirs = trl_lines("experimental/ppo/ppo_trainer.py", "lastgaelam = 0", "advantages = masked_whiten",
                       responses=rewards, values=values, rewards=rewards,
                       args=SimpleNamespace(gamma=gamma, lam=lam))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    near(advantages, theirs["advantages"] * mask)
    near(returns, theirs["returns"] * mask)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_the_clipped_losses_as_trl_computes_them(trl_lines, clip):
    new, old, advantages, values, old_values, returns, mask = ragged(2, 6)
    theirs = trl_lines(
        "experimental/ppo/ppo_trainer.py", "vpredclipped = torch.clamp(", "loss = pg_loss",
        vpred=values, mb_values=old_values, mb_return=returns, new_logprobs=new, mb_logprobs=old,
        mb_advantage=advantages, padding_mask=~mask, padding_mask_p1=~mask,
        micro_batch_inds=slice(None), args=SimpleNamespace(cliprange=clip, cliprange_value=clip),
        masked_mean=lambda x, mask: (x * mask).sum() / mask.sum())
    found, clipped = policy_loss(new, old, advantages, mask, clip)
    near(found, theirs["pg_loss"])
    near(value_loss(values, old_values, returns, mask, clip), theirs["vf_loss"])
    assert 0.1 < clipped < 0.9, "nothing is shown where nothing is clipped"


@pytest.mark.parametrize("theirs, ours, smoothing", [
    ("sigmoid", "sigmoid", 0.0), ("hinge", "hinge", 0.0), ("ipo", "ipo", 0.0),
    ("aot", "sigmoid", 0.1), ("aot", "sigmoid", 0.3)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpos_losses_as_trl_computes_them(trl_lines, theirs, ours, smoothing, beta):
    """TRL has smoothed labels in "aot" alone, which sorts over the batch before: for one pair at a time it
    is cDPO."""
    torch.manual_seed(3)
    logps, lengths = 5 * torch.randn(B, 4).double(), torch.randint(1, 9, (B, 2))
    for (chosen, rejected, ref_chosen, ref_rejected), (a, b) in zip(logps[:, :, None], lengths):
        names = {"chosen_scores": chosen - ref_chosen, "rejected_scores": rejected - ref_rejected,
                 "chosen_logps": chosen, "rejected_logps": rejected,
                 "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
                 "delta_score": chosen - ref_chosen - rejected + ref_rejected,
                 "completion_mask": torch.arange(9) < torch.stack([a, b])[:, None]}
        if theirs == "aot":
            first, last = "logratios = chosen_logps - rejected_logps", 'elif loss_type == "aot_unpaired"'
        elif theirs == "ipo":
            first, last = "chosen_mask, rejected_mask = completion_mask.chunk", 'elif loss_type == "exo_pair"'
        else:
            first = {"sigmoid": "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)",
                     "hinge": "per_sequence_loss = torch.relu(1 - self.beta * delta_score)"}[theirs]
            last = "elif loss_type =="
        want = trl_lines("trainer/dpo_trainer.py", first, last, **names,
                         self=SimpleNamespace(beta=beta, label_smoothing=smoothing))["per_sequence_loss"]
        n, m = (a, b) if theirs == "ipo" else (1, 1)
        found = dpo_loss(chosen / n, rejected / m, ref_chosen / n, ref_rejected / m, beta, ours, smoothing)[0]
        near(found, want)


# ------------------------------------------------------------------------------------------ transformers

@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' GPT-2 with random weights, and ours with the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0)).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():                               # biases and norms count too
            p += 0.1 * torch.randn_like(p)
    folder = str(tmp_path_factory.mktemp("gpt2"))
    theirs.save_pretrained(folder)
    torch.set_default_dtype(torch.float64)
    ours = GPT.load(folder)
    torch.set_default_dtype(torch.float32)
    return theirs, ours


def test_gpt2s_logits_and_loss_as_transformers_computes_them(both):
    theirs, ours = both
    torch.manual_seed(1)
    tokens = torch.randint(97, (4, 32))
    want = theirs(tokens, labels=tokens)
    near(ours(tokens), want.logits)
    logprobs = ours.logprobs(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, 1:]
    near(-logprobs.mean(), want.loss.double(), 1e-7)


def test_gpt2s_greedy_continuations_are_those_of_transformers(both):
    theirs, ours = both
    prompts, lengths = torch.randint(1, 97, (5, 9)), torch.tensor([1, 4, 9, 6, 9])
    tokens, mask, _ = ours.generate(prompts, lengths, 20, temperature=0)
    for prompt, length, row, m in zip(prompts, lengths, tokens, mask):
        want = theirs.generate(prompt[None, :length], attention_mask=torch.ones(1, length), max_new_tokens=20,
                               min_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert row[m].tolist() == want[0, length:].tolist()


@pytest.mark.skipif(not os.environ.get("MODEL"), reason="MODEL names no folder with a model of yours")
def test_your_models_greedy_answers_are_those_of_transformers():
    """MODEL=folder DATA=file python -m pytest -s tests/test_against_others.py: ten held-out prompts of a
    file, through the tokenizer, the chat template and the network of either side, 64 tokens."""
    transformers = pytest.importorskip("transformers")
    folder = os.environ["MODEL"]
    _, prompts = loading.load("prompts", os.environ["DATA"], max_dropped=1.0)
    model, tokenizer = GPT.load(folder), Tokenizer.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.prompt(messages) for messages in prompts[:10]]
    tokens, mask, _ = model.generate(pad(ids), torch.tensor([len(x) for x in ids]), 64, temperature=0,
                                     stop_token=tokenizer.end)
    for messages, prompt, row, m in zip(prompts, ids, tokens, mask):
        asked = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                                    return_tensors="pt")
        found = theirs.generate(**asked, max_new_tokens=64, do_sample=False)[0]
        assert found[:len(prompt)].tolist() == prompt
        want = their_tokenizer.decode(found[len(prompt):], skip_special_tokens=True)
        assert tokenizer.decode(row[m].tolist()) == want
        print(f"{messages[-1]['content']!r} -> {want!r}")
