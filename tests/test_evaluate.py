"""The report's numbers, and whose they are."""
import json
import math
import os
import random
import shutil

import pytest
import torch
from helpers import plainly

import evaluate
from data import loading, records, world
from data.report import literal
from data.tokenizer import Tokenizer, learn
from model import GPT
from runtime import files


def test_win_rate_counts_ties_as_half():
    assert evaluate.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0], 1)[0] == 0.5
    assert evaluate.win_rate([1.0, 2.0, 3.0, 1.0], [0.0, 2.0, 4.0, 0.0], 2)[0] == 0.625
    assert evaluate.win_rate([1.0] * 6, [1.0] * 6, 3) == (0.5, 0.5, 0.5)
    assert evaluate.win_rate([2.0] * 6, [1.0] * 6, 3) == (1.0, 1.0, 1.0)
    assert evaluate.win_rate([1.0, 1.0], [1.0 + 1e-12, 1.0 - 1e-12], 1)[0] == 0.5      # but for rounding


def test_win_rates_interval_contains_the_rate_and_has_the_width_of_its_standard_error():
    torch.manual_seed(0)
    mine, theirs = torch.randn(400).tolist(), (torch.randn(400) - 0.3).tolist()
    rate, low, high = evaluate.win_rate(mine, theirs, 1)
    assert low < rate < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 400), rel=0.1)


def test_win_rates_interval_resamples_prompts_not_answers():
    wins = [1.0] * 8 + [-1.0] * 8 + [1.0] * 8 + [-1.0] * 8      # 4 prompts of 8 answers that always agree
    low, high = evaluate.win_rate(wins, [0.0] * 32, 8)[1:]
    assert (low, high) == (0.0, 1.0)                # 32 independent answers would give about 0.33 to 0.67


def test_distinct2_is_the_share_of_different_word_pairs_within_texts():
    assert evaluate.distinct2(["a b a b", "b a"]) == 2 / 4      # ab ba ab · ba; never across texts
    assert evaluate.distinct2(["a b c d"]) == 1 and evaluate.distinct2(["one", ""]) == 0


def test_best_of_picks_the_highest_reward_in_each_group_of_n():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.4], [3.0, -1.0, -2.0, -1.5]])
    assert evaluate.best_of(scores, 1, 2) == [0, 1, 4, 5]
    assert evaluate.best_of(scores, 2, 2) == [1, 2, 4, 7]
    assert evaluate.best_of(scores, 4, 1) == [1, 4]


def test_seconds_count_overlapping_stages_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "STARTED", 10000.0)
    monkeypatch.setattr(evaluate.time, "time", lambda: 10007.0)
    times = {"sft": (100, 160), "reward_model": (150, 200), "ppo": (300, 400), "dpo": (320, 350)}
    for name, (started, ended) in times.items():
        os.makedirs(tmp_path / name)
        about = {"started": started, "ended": ended, "seconds": ended - started}
        files.write_json(str(tmp_path / name / "run.json"), about)
    os.makedirs(tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("{")
    checkpoints = {name: str(tmp_path / name) for name in ("ppo", "dpo", "broken", "absent")}
    assert evaluate.seconds(str(tmp_path), checkpoints) == {
        "sft": 60, "reward_model": 50, "ppo": 100, "dpo": 30, "evaluate": 7.0, "total": 207.0}


def test_a_checkpoint_is_called_by_its_folder_or_its_path_where_two_share_that():
    assert evaluate.named(["out/sft", "out/ppo/"]) == {"sft": "out/sft", "ppo": "out/ppo"}
    assert evaluate.named(["a/ppo", "b/ppo", "sft"]) == {"a/ppo": "a/ppo", "b/ppo": "b/ppo", "sft": "sft"}
    assert evaluate.named(["out/best_of_n"]) == {"out/best_of_n": "out/best_of_n"}  # that is another's name
    with pytest.raises(ValueError, match="^out/ppo is named twice"):
        evaluate.named(["out/sft", "out/ppo", "out/ppo/"])


@pytest.fixture
def figure(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(10, 4))
    monkeypatch.setattr(evaluate, "Figure", lambda figsize: figure)
    return figure


def drawn(axis):
    """{label: [xs, ys]} of what has a label; the lines without one; and the colours of all."""
    lines = [(line.get_label(), list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
             for line in axis.lines]
    points = {label: (xs, ys) for label, xs, ys in lines if not label.startswith("_")}
    colours = [line.get_color() for line in axis.lines]
    return points, [(xs, ys) for label, xs, ys in lines if label.startswith("_")], colours


def test_the_figure_draws_each_run_in_a_colour_of_its_own_against_the_root_of_kl(tmp_path, figure):
    steps = [{"kl": kl, "score": kl / 2, "judge": 1 - kl / 100} for kl in (-0.01, 4.0, 9.0)]
    curve = [{"n": 2, "kl": 0.25, "reward": 0.5, "judge": 0.6}]
    report = {"judge": "world", "models": {"best_of_n": {"curve": curve},
                                           "mine": {"kl": 16.0, "reward": 3.0, "judge": 0.7},
                                           "a/grpo": {"kl": -0.1, "reward": None, "judge": 0.2}}}
    runs = {"mine": steps, "a/grpo": [{"kl": 1.0, "score": None}, {"kl": 1.0, "score": 2.0}]}
    evaluate.plot(str(tmp_path / "figure.png"), report, runs)
    (points, lines, colours), (judged, judged_lines, _) = map(drawn, figure.axes)
    assert points == {"mine": ([4.0], [3.0]), "best of n, n up to 2": ([0.5], [0.5])}
    assert lines == [([0.0, 2.0, 3.0], [-0.005, 2.0, 4.5]), ([1.0], [2.0])]
    best = {"best of n, n up to 2": ([0.5], [0.6])}
    assert judged == best | {"mine": ([4.0], [0.7]), "a/grpo": ([0.0], [0.2])}
    assert judged_lines == [([0.0, 2.0, 3.0], pytest.approx([1.0001, 0.96, 0.91])), ([], [])]
    assert colours[0] == colours[1] != colours[2]
    assert (tmp_path / "figure.png").stat().st_size > 10000


def test_the_figure_shows_no_judge_of_rollouts_beside_another_judge(tmp_path, figure):
    steps = [{"kl": 1.0, "score": 2.0, "judge": 0.5}]
    report = {"judge": "out/reward_model", "models": {"ppo": {"kl": 1.0, "reward": 2.0, "judge": 3.0}}}
    evaluate.plot(str(tmp_path / "figure.png"), report, {"ppo": steps})
    assert [drawn(axis)[1] for axis in figure.axes] == [[([1.0], [2.0])], [([], [])]]


# ------------------------------------------------------------------------------------------- the whole report

@pytest.fixture
def other(tiny_inputs):
    """A second language model beside tiny_inputs' first."""
    folder = tiny_inputs / "out/other"
    if not folder.exists():
        shutil.copytree(tiny_inputs / "out/sft", folder)
        model = GPT.load(str(folder))
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.1
        model.save(str(folder))
    return "out/other"


def evaluated(tmp_path, models, **settings):
    """What evaluate.py writes: its settings, report.json and report.md."""
    cfg = evaluate.Config(models=tuple(models), out=str(tmp_path), device="cpu", **settings)
    evaluate.evaluate(cfg)
    return cfg, json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("settings", [
    dict(temperature=0.6, seed=7, held_out="out/world/prompts_development.jsonl"),
    dict(judge="out/reward_model", micro_batch=7, sample_batch=11, best_of=6),
    dict(temperature=0, best_of=0, samples=1)], ids=str)
def test_the_report_holds_what_plain_loops_find(trained, other, tmp_path, monkeypatch, settings):
    def content(item, text):
        """In the judge's place, to whom all that these models say is alike: what differs between answers."""
        n = len(str(item.messages)) + len(text)
        return n % 2, n % 3 / 2, n % 5 / 4

    monkeypatch.setattr(world, "_content", content)
    models = ["out/sft", other]
    cfg, report, text = evaluated(tmp_path, models, **dict(max_new_tokens=5, samples=2, best_of=4) | settings)
    tokenizer = Tokenizer.load("out/sft")
    _, prompts = loading.load("prompts", loading.WORLD, cfg.held_out)
    _, conversations = loading.load("demonstrations", loading.WORLD)
    reference, reward = GPT.load("out/sft"), GPT.load("out/reward_model")

    def judged(name, answers, kl, sft_loss):
        texts = [tokenizer.decode(ids) for _, ids in answers]
        rewards = [plainly.score(reward, tokenizer.prompt(p) + ids).item() for p, ids in answers]
        judge = rewards
        parts = {}
        if cfg.judge == "world":
            judge = [world.judge(p, text) for (p, _), text in zip(answers, texts)]
            seen = [world.parts(p, text) for (p, _), text in zip(answers, texts)]
            parts = {part: plainly.mean([x[part] for x in seen])
                     for part in ("helpful", "honest", "harmless", "manner")}
            sums = [score for (p, _), score in zip(answers, judge) if world.find(p).family == "sum"]
            assert report["models"][name]["families"]["sum"] == pytest.approx(plainly.mean(sums), abs=1e-4)
        numbers = {"judge": plainly.mean(judge), "reward": plainly.mean(rewards), "kl": kl,
                   **parts, "sft_loss": sft_loss, "distinct2": evaluate.distinct2(texts),
                   "length": plainly.mean([len(ids) for _, ids in answers]),
                   "ended": plainly.mean([float(ids[-1] == tokenizer.end) for _, ids in answers])}
        found = report["models"][name]
        rate, low, high = evaluate.win_rate(judge, first_judge or judge, cfg.samples)
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, abs=6e-4), name
        assert [found["win_rate"], *found["win_rate_interval"]] == pytest.approx([rate, low, high], abs=1e-4)
        assert f"(judge {judge[0]:.2f}, reward {rewards[0]:.2f}): {literal(texts[0])}\n" in text
        return judge

    def sampled(model, prompts, n, noise):
        rng = random.Random(f"{cfg.seed}/{noise}")
        asked = [(p, rng.getrandbits(62)) for p in prompts for _ in range(n)]
        if cfg.temperature == 0:
            return [(p, greedy(model, tokenizer.prompt(p))) for p, _ in asked]
        how = (cfg.max_new_tokens, tokenizer.end, cfg.temperature)
        return [(p, plainly.sample(model, tokenizer.prompt(p), seed, *how)) for p, seed in asked]

    def greedy(model, ids):
        answer = []
        while len(answer) < cfg.max_new_tokens and answer[-1:] != [tokenizer.end]:
            answer.append(model(torch.tensor([ids + answer]))[0, -1].argmax().item())
        return answer

    first_judge = None
    for number, folder in enumerate(models):
        model = GPT.load(folder)
        answers = sampled(model, prompts, cfg.samples, number)
        ratios = [plainly.answer_logprob(model, tokenizer.prompt(p), ids)
                  - plainly.answer_logprob(reference, tokenizer.prompt(p), ids) for p, ids in answers]
        loss = plainly.sft_held_out(model, tokenizer, conversations)
        judge = judged(folder.split("/")[1], answers, plainly.mean(ratios).item(), loss)
        first_judge = first_judge or judge
        if number == 0 and cfg.best_of:
            many, best, tax = cfg.samples * cfg.best_of, [], loss
            pool = sampled(model, prompts, many, "best_of_n")
            for i in range(0, len(pool), cfg.best_of):
                best.append(max(pool[i:i + cfg.best_of],
                                key=lambda a: plainly.score(reward, tokenizer.prompt(a[0]) + a[1]).item()))
            n = cfg.best_of
            judged("best_of_n", best, math.log(n) - (n - 1) / n, tax)
            assert report["models"]["best_of_n"]["n"] == n
            curve = report["models"]["best_of_n"]["curve"]
            assert [point["n"] for point in curve] == [1, 2, 4, 6][:3 if n == 4 else 4]
    expected = ["sft", "best_of_n", "other"] if cfg.best_of else ["sft", "other"]
    assert list(report["models"]) == expected


def test_two_checkpoints_are_compared_on_the_prompts_of_a_file(trained, other, tmp_path):
    """By a reward model, and with the same name: the win rate is that of answer i against answer i."""
    file = tmp_path / "prompts.jsonl"
    records.write(file, [{"prompt": f"Say {i}."} for i in range(40)])
    shutil.copytree("out/other", tmp_path / "b/sft")
    models = ["out/sft", str(tmp_path / "b/sft")]
    cfg, report, text = evaluated(tmp_path / "out", models, data=str(file), judge="out/reward_model",
                                  max_new_tokens=5, samples=2, best_of=0)
    a, b = report["models"]
    assert (a, b) == tuple(models) and report["prompts"] == 4
    low, high = report["models"][b]["win_rate_interval"]
    assert low <= report["models"][b]["win_rate"] <= high and low < high
    assert f"| {b} |" in text and "helpful" not in report["models"][b]
    contestants = evaluate.evaluate(cfg)
    wins = [float(x > y) for x, y in zip(contestants[1].judge, contestants[0].judge)]
    assert report["models"][b]["win_rate"] == plainly.mean(wins)


def test_a_function_scores_judges_and_picks_the_best_of_n(trained, tmp_path):
    (tmp_path / "mine.py").write_text("def letters(messages, answer):\n    return len(answer)\n"
                                      "def minus(messages, answer):\n    return -len(answer)\n")
    cfg, report, _ = evaluated(tmp_path, ["out/sft"], reward=f"{tmp_path}/mine.py:letters", max_new_tokens=5,
                               judge=f"0.5*{tmp_path}/mine.py:minus", samples=2, best_of=4)
    some, best = report["models"]["sft"], report["models"]["best_of_n"]
    assert best["reward"] > some["reward"] > 0
    assert all(m["judge"] == pytest.approx(-0.5 * m["reward"], abs=1e-3) for m in (some, best))


def test_top_k_and_top_p_reach_the_sampler(trained, tmp_path):
    def texts(**settings):
        cfg = evaluate.Config(models=("out/sft",), out=str(tmp_path), device="cpu", samples=2, best_of=0,
                              max_new_tokens=5, **settings)
        [contestant] = evaluate.evaluate(cfg)
        return contestant.texts

    greedy = texts(temperature=0)
    assert texts(top_k=1) == texts(top_p=1e-6) == greedy != texts()


def test_a_scorer_that_is_none_or_reads_other_tokens_is_refused(trained, tmp_path):
    settings = dict(models=("out/sft",), out=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="no model in nowhere: name another folder"):
        evaluate.evaluate(evaluate.Config(reward="nowhere", **settings))
    with pytest.raises(ValueError, match="out/sft is not a reward model: it gives no score"):
        evaluate.evaluate(evaluate.Config(reward="out/sft", **settings))
    shutil.copytree("out/reward_model", tmp_path / "foreign")
    learn(["aa bb cc"], 300).save(str(tmp_path / "foreign"))
    for role in ("reward", "judge"):
        with pytest.raises(ValueError, match="foreign was trained with another tokenizer"):
            evaluate.evaluate(evaluate.Config(**settings, **{role: str(tmp_path / "foreign")}))


def test_checkpoints_of_another_kind_or_with_another_tokenizer_are_not_compared(trained, tmp_path):
    shutil.copytree("out/sft", tmp_path / "foreign")
    learn(["aa bb cc"], 300).save(str(tmp_path / "foreign"))
    foreign = ("out/sft", str(tmp_path / "foreign"))
    for models, said in ((foreign, "foreign was trained with another tokenizer"),
                         (("out/reward_model",), "out/reward_model is a reward model: it gives scores, not")):
        with pytest.raises(ValueError, match=said):
            evaluate.evaluate(evaluate.Config(models=models, out=str(tmp_path), device="cpu"))
