"""The exercises of docs/exercises.md: a copy fails in words, the right body passes, mistakes are named."""
import ast
import os
import re
import shutil
import sys

import pytest
from helpers.mistakes import MISTAKES
from helpers.start import ROOT, run_copies

sys.path.append(os.path.join(ROOT, "docs"))
from exercise import EXERCISES, PARTS, SPOILERS, STAGES, find  # noqa: E402


def planted(file, name):
    """A mistake of helpers/mistakes.py, as {right code: wrong code}."""
    return {right: wrong for called, right, wrong in MISTAKES[file] if called == name}


# {exercise: [({right code: wrong code}, the sentence that `make grade` must say does not hold), ...]}
WRONG = {
    "sft_loss": [
        (planted("sft.py", "SFT loss as a mean per row"),
         "SFT loss counts every token alike however long its row is"),
        ({"return -torch.where(mask, logprobs, 0).sum() / mask.sum()": "return -logprobs.mean()"},
         "SFT loss does not look outside the mask"),
        ({"return -torch.where(mask, logprobs, 0)": "return torch.where(mask, logprobs, 0)"},
         "SFT loss is minus the mean of log p"),
        ({"torch.where(mask, logprobs, 0).sum()": "(logprobs * mask).sum()"},
         "SFT loss does not look outside the mask")],
    "pairwise_loss": [
        (planted("reward_model.py", "reward model with chosen and rejected swapped"),
         "Pairwise loss falls when the chosen answer scores higher"),
        ({"-torch.nn.functional.logsigmoid(chosen - rejected - margin)":
          "-torch.sigmoid(chosen - rejected - margin).log()"},
         "Pairwise loss and its gradient are finite for hopeless pairs"),
        ({"(chosen - rejected - margin)": "(chosen - rejected + margin)"},
         "Pairwise loss with a margin asks for that much more difference"),
        ({"(chosen - rejected - margin).mean()": "(chosen - rejected - margin).sum()"},
         "Pairwise loss is a mean over pairs")],
    "ranking_loss": [
        (planted("reward_model.py", "ranking upside down"), "Ranking loss takes rank 1 for the best"),
        ({"better = present & (": "better = ("},
         "Ranking loss makes no pair with an answer that is not there"),
        ({"((losses * better).sum((1, 2)) / better.sum((1, 2))).mean()":
          "(losses * better).sum() / better.sum()"},
         "Ranking loss counts every prompt alike however many pairs it has"),
        ({"ranks[:, :, None] < ranks[:, None, :]": "ranks[:, :, None] <= ranks[:, None, :]"},
         "Ranking loss makes no pair of a tie"),
        (planted("reward_model.py", "a soft label's other side has no margin"),
         "Ranking loss with a soft label asks both sides for the margin")],
    "sample": [
        (planted("model.py", "top-k keeps one too many"),
         "Sample with top k draws from the k likeliest and no more"),
        (planted("model.py", "top-p leaves out the token that crosses p"),
         "Sample with top p still draws the token that crosses p"),
        (planted("model.py", "top-p of all, not of top-k's"),
         "Sample with both takes top p of what top k has left"),
        ({"torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:])[:, 0]": "p.argmax(-1)"},
         "Sample picks the token where the sum of probabilities passes u"),
        ({"u[:, None] * cumulative[:, -1:]": "u[:, None]"}, "Sample scales what is left to a sum of one")],
    "kl_rewards": [
        (planted("ppo.py", "KL reward with the wrong sign"),
         "KL rewards charge a token that the policy likes more than the reference does"),
        (planted("ppo.py", "score added on the padding"),
         "KL rewards pay the score on the last action and not on the padding"),
        ({"torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)": "torch.zeros_like(logprobs)",
          "+= scores * mask.any(dim=1)":
          "+= scores - kl_coef * torch.where(mask, logprobs - ref_logprobs, 0).sum(1)"},
         "KL rewards charge each token for its own part")],
    "whiten": [
        ({"mean = masked_mean(x, mask)\n    scaled": "mean = x.mean()\n    scaled"},
         "Whiten does not look at the padding and leaves 0 there"),
        ({"mean = masked_mean(x, mask)\n    scaled":
          "mean = torch.where(mask, x, 0).sum(1, True) / mask.sum(1, True)\n    scaled"},
         "Whiten counts the tokens of all rows together"),
        ({"scaled if shift_mean else scaled + mean, 0": "scaled, 0"},
         "Whiten without shift mean leaves the mean where it was"),
        ({"* torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)":
          "/ (masked_mean((x - mean) ** 2, mask) + 1e-8)"},
         "Whiten gives mean 0 and standard deviation 1")],
    "gae": [
        (planted("ppo.py", "advantage that looks back in place of ahead"),
         "GAE looks ahead so that a reward counts for what came before it"),
        ({"torch.where(mask, values.detach(), 0)\n    advantages": "values.detach()\n    advantages",
          "next_value = torch.where(mask[:, t], values[:, t], next_value)": "next_value = values[:, t]"},
         "GAE of the last token does not look at the padding"),
        (planted("ppo.py", "GAE without λ"),
         "GAE counts a reward less by gamma and lambda for each token before it"),
        ({"next_value = torch.where(mask[:, t], values[:, t], next_value)": "next_value = values[:, t]"},
         "GAE goes over a gap between two turns as if it were not there"),
        ({"return advantages, torch.where(mask, advantages + values, 0)": "return advantages, advantages"},
         "GAE returns advantage plus value which the critic should have said")],
    "policy_loss": [
        (planted("ppo.py", "clipping the wrong way"),
         "Policy loss pushes no further what has gone far enough"),
        (planted("ppo.py", "advantages not detached"),
         "Policy loss sends no gradient to advantages or old log probabilities"),
        ({"torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)":
          "ratio.clamp(1 - clip, 1 + clip) * advantages"},
         "Policy loss still corrects what has moved the wrong way"),
        ({"masked_mean((ratio - 1).abs() > clip, mask)":
          "masked_mean(surrogate < ratio * advantages, mask)"},
         "Policy loss counts every ratio further than epsilon from 1 in its clip fraction and no other"),
        ({"-masked_mean(surrogate, mask)": "-(surrogate * mask).sum(1).div(mask.sum(1)).mean()"},
         "Policy loss counts every token alike however long its answer is")],
    "value_loss": [
        (planted("ppo.py", "value loss takes the smaller error"),
         "Value loss takes the larger error of a value that has moved away"),
        ({"return 0.5 * masked_mean(torch.max(": "return masked_mean(torch.max("},
         "Value loss is half the squared error of a value that has not moved"),
        ({"clipped = old_values + (values - old_values).clamp(-clip, clip)":
          "clipped = returns + (values - returns).clamp(-clip, clip)"},
         "Value loss lets a value go no further than the clip towards its return")],
    "AdaptiveKL.update": [
        (planted("ppo.py", "β adapts the wrong way"),
         "Adaptive KL raises beta above the target and lowers it below"),
        ({"error = min(max(kl / self.target - 1, -0.2), 0.2)": "error = kl / self.target - 1"},
         "Adaptive KL is not thrown off by one odd batch"),
        ({"self.coef *= 1 + error": "self.coef += error"},
         "Adaptive KL multiplies so that a small beta moves as fast as a large one"),
        ({"error * episodes / self.horizon": "error / self.horizon"},
         "Adaptive KL moves in proportion to the answers that were measured")],
    "dpo_loss": [
        (planted("dpo.py", "DPO with chosen and rejected swapped"),
         "DPO loss falls as the policy comes to prefer the chosen answer"),
        (planted("dpo.py", "smoothed labels on the wrong side"),
         "DPO loss with epsilon is least where the chosen answer wins all but epsilon"),
        (planted("dpo.py", "IPO's margin twice too large"),
         "DPO loss IPO is least at a margin of 1 over 2 beta"),
        ({"policy_chosen - ref_chosen.detach()": "policy_chosen",
          "policy_rejected - ref_rejected.detach()": "policy_rejected"},
         "DPO loss asks what has changed since the reference"),
        (planted("dpo.py", "reference left trainable"), "DPO loss sends no gradient to the reference")],
    "Linear": [
        (planted("model.py", "adapters count alpha"),
         "Linear counts what its adapter adds alpha over r times"),
        (planted("model.py", "an adapter starts with noise"),
         "Linear with a new adapter computes what it did and can learn"),
        (planted("model.py", "an adapter is merged twice"),
         "Linear once merged computes the same and has no adapter left"),
        ({"torch.randn(rank, self.in_features) / math.sqrt(self.in_features)":
          "torch.zeros(rank, self.in_features)"},
         "Linear with a new adapter computes what it did and can learn")],
    "read_logprobs": [
        (planted("model.py", "entropy without its sign"),
         "Read entropy of equal logits is the log of their number"),
        ({"F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)":
          "torch.softmax(logits / temperature, dim=-1).log()"},
         "Read entropy of a token that is certain is 0 and its log p finite"),
        ({"F.log_softmax(logits / temperature if": "F.log_softmax(logits * temperature if"},
         "Read logprobs at temperature 2 take half of each logit"),
        ({"logp if entropy_grad else logp.detach()": "logp"},
         "Read entropy has a gradient only if it is asked for")],
    "approximate_kl": [
        ({"masked_mean(torch.expm1(log_ratio) - log_ratio, mask)": "masked_mean(-log_ratio, mask)"},
         "Approximate KL of a token is never negative"),
        ({"(logprobs - old_logprobs).detach()": "(old_logprobs - logprobs).detach()"},
         "Approximate KL of a token e times as likely as before is e minus 2"),
        ({"torch.expm1(log_ratio)": "log_ratio.exp() - 1"},
         "Approximate KL of a small move keeps its digits"),
        ({"masked_mean(torch.expm1(log_ratio) - log_ratio, mask)":
          "masked_mean(0.5 * log_ratio ** 2, mask)"},
         "Approximate KL has the right mean over what the old policy samples"),
        ({"(logprobs - old_logprobs).detach()": "(logprobs - old_logprobs)"},
         "Approximate KL sends no gradient")],
    "grpo": [
        (planted("variants/grpo.py", "GRPO multiplies by the length"),
         "GRPO gives answers of any length the same weight in a mean over tokens"),
        (planted("variants/grpo.py", "GRPO's deviation is left out"),
         "GRPO divides by the standard deviation of each group with k minus 1"),
        ({"advantages = R - R.mean(1, keepdim=True)": "advantages = R - R.mean()"},
         "GRPO compares with the mean of the answers to one prompt"),
        ({"(R.std(1, keepdim=True) + 1e-4)": "R.std(1, keepdim=True)"}, "GRPO of equal answers is 0"),
        ({"(lengths.mean() / lengths).view(-1, group)":
          "(lengths.view(-1, group).mean(1, keepdim=True) / lengths.view(-1, group))"},
         "GRPO takes the mean length of the whole batch and not of a group")],
    "rloo": [
        (planted("variants/grpo.py", "an answer is in its own baseline"),
         "RLOO leaves an answers own return out of its baseline"),
        ({"(R - (R.sum(1, keepdim=True) - R) / (group - 1)).flatten()":
          "((returns * group - returns.sum()) / (group - 1))"},
         "RLOO compares answers to one prompt and no others"),
        ({"(R - (R.sum(1, keepdim=True) - R) / (group - 1))": "R"},
         "RLOO does not change if all answers to a prompt earn more")],
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project."""
    left_out = shutil.ignore_patterns(".git", ".venv", "out", "homework", "bench", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("exercises") / "project", ignore=left_out)


@pytest.fixture
def project(copy):
    """That copy, in which exercises are made and graded: all that a test writes is in homework/."""
    yield copy
    shutil.rmtree(copy / "homework", ignore_errors=True)


def run(project, *words, script="docs/exercise.py"):
    return run_copies([str(project / script), *words], project, [dict(os.environ)])


def grade(project):
    return run(project, script="tests/helpers/grade.py")


def right(file):
    with open(os.path.join(ROOT, file), encoding="utf-8") as f:
        return f.read()


def lines_of(code, name):
    """The numbers of a function's lines, from 0."""
    return range(find(code, name).lineno - 1, find(code, name).end_lineno)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_copy_is_the_project_without_that_body(project, name):
    done, file, parts = run(project, name), EXERCISES[name], PARTS.get(name, [name])
    assert done.returncode == 0, done.stderr
    stages = STAGES[:STAGES.index(file) + 1] if file in STAGES else STAGES
    assert set(os.listdir(project / "homework")) == {"data", "runtime", "model.py",
                                                     "evaluate.py", "exercise.md", *stages,
                                                     *(["variants"] if "/" in file else [])}
    before, after = right(file), (project / "homework" / file).read_text()
    empty = parts + [part for other, part in SPOILERS.get(name, []) if other == file]
    emptied = {n for part in empty for n in lines_of(before, part)}
    kept = [line for n, line in enumerate(before.splitlines()) if n not in emptied]
    emptied = {n for part in empty for n in lines_of(after, part)}
    assert [line for n, line in enumerate(after.splitlines()) if n not in emptied] == kept
    for part in parts:
        was, now = find(before, part), find(after, part)
        assert ast.get_docstring(was) == ast.get_docstring(now) and ast.dump(was.args) == ast.dump(now.args)
        error = now.body[-1]
        assert isinstance(error, ast.Raise) and len(now.body) <= 2
        place = f"homework/{file}, line {error.lineno}"
        assert place in ast.unparse(error) and f"{part}: {place}" in done.stdout
    assert "make grade" in done.stdout and "?" in done.stdout, "what to think about"


@pytest.mark.parametrize("name", EXERCISES)
def test_what_a_mistake_replaces_is_there_once(name):
    code, parts = right(EXERCISES[name]), PARTS.get(name, [name])
    bodies = "\n".join("\n".join(code.splitlines()[n] for n in lines_of(code, part)) for part in parts)
    assert len(WRONG[name]) >= 2
    for changes, _ in WRONG[name]:
        assert changes and all(code.count(good) == 1 == bodies.count(good) for good in changes), changes


class Plain(ast.NodeTransformer):
    """Code whose variables are all called x, without minus signs."""

    def visit_Name(self, node):
        return ast.Name("x", node.ctx)

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        return node.operand if isinstance(node.op, ast.USub) else node


def shapes(code, least=16):
    """The larger expressions in some code, whatever their variables are called."""
    nodes = [node for node in ast.walk(Plain().visit(ast.parse(code))) if isinstance(node, ast.expr)]
    return {ast.dump(node) for node in nodes if sum(1 for _ in ast.walk(node)) >= least}


def values(code, name):
    """What is assigned and returned in a function, each as code."""
    nodes = ast.walk(find(code, name))
    return [ast.unparse(n.value) for n in nodes if isinstance(n, (ast.Assign, ast.AugAssign, ast.Return))]


PLUMBING = shapes("torch.arange(mask.shape[1], device=mask.device)", 1)


@pytest.mark.parametrize("name", EXERCISES)
def test_no_other_file_of_the_copy_holds_the_body(project, name):
    run(project, name)
    file = EXERCISES[name]
    body = [value for part in PARTS.get(name, [name]) for value in values(right(file), part)]
    wanted = set().union(*(shapes(value) for value in body)) - PLUMBING
    assert wanted
    for folder, _, files in os.walk(project / "homework"):
        assert not any(other.endswith(".pyc") for other in files), "nothing that is compiled"
        for other in set(files) - {os.path.basename(file), "exercise.md"}:
            if other.endswith(".py"):
                with open(os.path.join(folder, other), encoding="utf-8") as f:
                    assert not shapes(f.read()) & wanted, other


def test_a_later_stage_would_give_the_first_exercise_away():
    [value] = values(right("sft.py"), "sft_loss")
    assert shapes(right("ppo.py").replace("(dim)", "()")) & shapes(value)


def said(done):
    """{sentence: the rest of its line} of what does not hold, from what `make grade` prints."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("NOT YET  ")]
    return {re.split(r": | \[", line.removeprefix("NOT YET  "))[0]: line for line in lines}


FAST = ["sft_loss", "AdaptiveKL.update"]
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EXERCISES]


@pytest.mark.parametrize("name", EACH)
def test_an_exercise_fails_in_words_passes_once_it_is_solved_and_names_mistakes(project, name):
    run(project, name)
    file = EXERCISES[name]
    untouched = grade(project)
    assert untouched.returncode == 1 and untouched.stderr == ""
    assert all("is still to be written: homework/" in line for line in said(untouched).values())
    assert f"{name}: 0 of {len(said(untouched))} hold" in untouched.stdout

    (project / "homework" / file).write_text(right(file))
    solved = grade(project)
    assert solved.returncode == 0 and not said(solved), solved.stdout
    assert solved.stdout.count("holds  ") == len(said(untouched)) >= 6

    for changes, sentence in WRONG[name]:
        code = right(file)
        for good, bad in changes.items():
            code = code.replace(good, bad)
        (project / "homework" / file).write_text(code)
        wrong = grade(project)
        assert wrong.returncode == 1 and sentence in said(wrong), f"{changes}\n{wrong.stdout}{wrong.stderr}"
        assert len(said(wrong)) < len(said(untouched)), "what is right holds nevertheless"


def test_what_cannot_be_is_one_line(project):
    homework = project / "homework"
    done = grade(project)
    assert "exercise.md is missing" in done.stderr and done.stderr.count("\n") == 1 == done.returncode
    for words, line in (([], "is no exercise"),
                        (["gea"], f"NAME=gea is no exercise: take one of {', '.join(EXERCISES)}"),
                        (["gae"], ""), (["gae"], "homework/ exists already")):
        done = run(project, *words)
        assert line in done.stderr and done.stderr.count("\n") <= 1
        assert done.returncode == (1 if line else 0)
    code = (homework / "ppo.py").read_text()
    for wrong, line in ((code + "def broken(:\n", f"homework/ppo.py, line {code.count(chr(10)) + 1}: "),
                        (code.replace("def gae(", "def eag("), "homework/ppo.py has no gae")):
        (homework / "ppo.py").write_text(wrong)
        done = grade(project)
        assert done.returncode == 1 and line in done.stderr and done.stderr.count("\n") == 1
    (homework / "ppo.py").write_text("1 / 0\n" + code)
    done = grade(project)
    assert done.returncode == 1 and "NOT YET  The tests can import it: " in done.stdout
    assert "ZeroDivisionError" in done.stdout
