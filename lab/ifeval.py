"""IFEval: how often a model keeps rules that a program can check (Zhou et al. 2023, arXiv 2311.07911).

    python -m lab.ifeval MODEL out/follow/sft out/follow/ppo --data ifeval.jsonl
    python -m lab.ifeval --responses answers.jsonl --data ifeval.jsonl      answers that others have sampled
    python -m lab.ifeval out/follow/seed*/*/ifeval.json --data ifeval.jsonl     answers of earlier evaluations

The benchmark is 541 prompts with one to three rules each, in Google's repository google-research, folder
instruction_following_eval; --data names its input_data.jsonl. "Strict" takes an answer as it is. "Loose" also
accepts it without its first line, its last line or both, each with or without its asterisks: additions that
a reader would forgive. Intervals are the bootstrap's over prompts, 95 %. Differences (from the first model,
and from the one before) are paired: both models are measured on the same resampled prompts. "Words" is the
mean length of the answers to prompts without a rule about length. No prompt of the benchmark is used in
training.
"""
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from data import report
from evaluate import Sampler, Sampling, named
from lab import rules
from runtime.files import reading, write_json
from runtime.flags import flag
from runtime.launch import main
from runtime.processes import is_first

LENGTH = ("length_constraints:", "Words", "Sentences")          # how names of rules about length begin
MEASURES = ("prompt strict", "instruction strict", "prompt loose", "instruction loose")


@dataclass
class Config(Sampling):
    models: tuple = flag((), "checkpoint folders, or ifeval.json of earlier evaluations on the same prompts; "
                         "differences are measured from the first one")
    data: str = flag("ifeval.jsonl", "the benchmark's prompts and rules")
    responses: str = flag("", 'file of {"response"} lines, one for each prompt, in place of models')
    every: int = flag(1, "take every n-th prompt", 1)
    out: str = flag("out/ifeval", "folder of the answers and results")
    temperature: float = flag(0.0, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(256, "longest answer, in tokens", 1)
    show: int = flag(5, "prompts whose answers are printed, evenly spaced over all of them", 0)

    def __post_init__(self):
        if bool(self.models) == bool(self.responses):
            raise ValueError("name either checkpoint folders or --responses")
        if len({model.endswith(".json") for model in self.models}) == 2:
            raise ValueError("name either checkpoint folders or files of answers (.json), not both")


# Which letters, and which frequent words, tell the benchmark's languages apart.
SCRIPTS = {"ru bg": "\u0400-\u04ff", "ar fa ur": "\u0600-\u06ff", "hi mr ne": "\u0900-\u097f",
           "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff",
           "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff", "th": "\u0e00-\u0e7f", "ko": "\uac00-\ud7af",
           "en de fr es pt it fi sw vi": "A-Za-z\u00c0-\u024f\u1e00-\u1eff"}
FREQUENT = {"ru": "и не что это на как по", "bg": "и не че това на как се", "ar": "في من على إلى هذا أن التي",
            "fa": "در از به که این را است", "ur": "میں کے کی سے ہے اور کو", "hi": "में के की से है और को",
            "mr": "आहे आणि च्या ळ मध्ये हे ते", "ne": "छ र को मा यो हो गर्न",
            "en": "the of and to is in that a i you it", "de": "der die und das ist nicht ein",
            "fr": "le la les et des est une", "es": "el la los y que es una", "pt": "o os e que um uma não",
            "it": "il la e che di un sul", "fi": "ja on ei se että oli hän", "sw": "na ya wa kwa ni za",
            "vi": "và là của có không một những"}


def language_of(text):
    """The code of a text's language, by its commonest script and then by the frequent words of the languages
    that are written in it; "" if the text has none of these words."""
    names = max(SCRIPTS, key=lambda names: len(re.findall(f"[{SCRIPTS[names]}]", text))).split()
    words = Counter(re.findall(r"[^\s.,!?;:\"*()।۔،؟]+", text.lower()))
    words["ळ"] = text.count("ळ")             # of these languages, only Marathi has this letter
    counts = {name: sum(words[word] for word in FREQUENT[name].split()) for name in names if name in FREQUENT}
    return names[0] if not counts else max(counts, key=counts.get) if any(counts.values()) else ""


@dataclass
class Language(rules.Rule):
    language: str

    def check(self, answer):
        return language_of(answer) == self.language


class EnglishUpper(rules.Upper):
    def check(self, answer):
        return super().check(answer) and language_of(answer) == "en"


class EnglishLower(rules.Lower):
    def check(self, answer):
        return super().check(answer) and language_of(answer) == "en"


KINDS = {                               # {name in the benchmark: the rule, from the benchmark's parameters}
    "keywords:existence": lambda p: rules.Keywords(p["keywords"]),
    "keywords:frequency": lambda p: rules.Frequency(p["keyword"], p["relation"], p["frequency"]),
    "keywords:forbidden_words": lambda p: rules.Forbidden(p["forbidden_words"]),
    "keywords:letter_frequency": lambda p: rules.Letters(p["letter"], p["let_relation"], p["let_frequency"]),
    "language:response_language": lambda p: Language(p["language"]),
    "length_constraints:number_sentences": lambda p: rules.Sentences(p["relation"], p["num_sentences"]),
    "length_constraints:number_paragraphs": lambda p: rules.Paragraphs(p["num_paragraphs"]),
    "length_constraints:number_words": lambda p: rules.Words(p["relation"], p["num_words"]),
    "length_constraints:nth_paragraph_first_word": lambda p: rules.FirstWord(
        p["num_paragraphs"], p["nth_paragraph"], p["first_word"]),
    "detectable_content:number_placeholders": lambda p: rules.Placeholders(p["num_placeholders"]),
    "detectable_content:postscript": lambda p: rules.Postscript(p["postscript_marker"]),
    "detectable_format:number_bullet_lists": lambda p: rules.Bullets(p["num_bullets"]),
    "detectable_format:constrained_response": lambda p: rules.Choice(
        ["My answer is yes.", "My answer is no.", "My answer is maybe."]),
    "detectable_format:number_highlighted_sections": lambda p: rules.Highlights(p["num_highlights"]),
    "detectable_format:multiple_sections": lambda p: rules.Sections(p["section_spliter"], p["num_sections"]),
    "detectable_format:json_format": lambda p: rules.Json(),
    "detectable_format:title": lambda p: rules.Title(),
    "combination:two_responses": lambda p: rules.TwoAnswers(),
    "combination:repeat_prompt": lambda p: rules.Repeat(p["prompt_to_repeat"]),
    "startend:end_checker": lambda p: rules.End(p["end_phrase"]),
    "startend:quotation": lambda p: rules.Quoted(),
    "change_case:capital_word_frequency": lambda p: rules.CapitalWords(
        p["capital_relation"], p["capital_frequency"]),
    "change_case:english_capital": lambda p: EnglishUpper(),
    "change_case:english_lowercase": lambda p: EnglishLower(),
    "punctuation:no_comma": lambda p: rules.NoComma(),
}


def variants_of(answer):
    """The answer as it is, and in the seven other forms that count in the loose measure."""
    lines = answer.split("\n")
    forms = [answer, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return forms + [form.replace("*", "") for form in forms]


def keeps(rule, answers):
    """Whether one of the answers keeps a rule. An empty answer keeps none."""
    return any(answer.strip() and rule.check(answer) for answer in answers)


def read_lines(path, parse):
    """parse(record) of each line of a .jsonl file, as a list. Raises ValueError naming a line that fails."""
    out = []
    for i, line in enumerate(Path(path).read_text("utf-8").split("\n"), 1):
        try:
            out += [parse(json.loads(line))] if line else []
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, line {i}: not as expected: {type(e).__name__}: {e}") from None
    return out


def ruled(row):
    """A record, the benchmark's or one of lab/follow.py, as (prompt, the names of its rules, the rules)."""
    if "rules" in row:
        return row["prompt"], [rule["kind"] for rule in row["rules"]], [*map(rules.from_dict, row["rules"])]
    names = row["instruction_id_list"]
    return row["prompt"], names, [KINDS[name](parameters) for name, parameters in zip(names, row["kwargs"])]


def verdicts(records, answers):
    """For each record a pair of lists, strict and loose: whether the answer keeps each of its rules."""
    return [tuple([keeps(rule, forms) for rule in some] for forms in ([answer], variants_of(answer)))
            for (_, _, some), answer in zip(records, answers)]


def shares(found):
    """Verdicts of N records as counts (N, 4, 2): for each of the MEASURES, how many of how many are kept."""
    return torch.tensor([[[float(all(strict)), 1], [sum(strict), len(strict)],
                          [float(all(loose)), 1], [sum(loose), len(loose)]] for strict, loose in found])


def intervals(counts, resamples=2000):
    """The shares (4,) of counts (N, 4, 2), and those of bootstrap samples of the records (resamples, 4)."""
    # The seed gives every model the same picks. So the difference of two models is paired.
    picks = torch.randint(len(counts), (resamples, len(counts)), generator=torch.Generator().manual_seed(0))
    totals, many = counts.sum(0), counts[picks].sum(1)
    return totals[:, 0] / totals[:, 1], many[..., 0] / many[..., 1]


def with_interval(value, many):
    low, high = many.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def mean_words(records, answers):
    """The mean number of words of the answers to records without a rule about length."""
    sizes = [len(answer.split()) for (_, names, _), answer in zip(records, answers)
             if not any(name.startswith(LENGTH) for name in names)]
    return sum(sizes) / max(1, len(sizes))


def tables(records, found, answers):
    """Tables, as (title, rows), of {model: verdicts of the records} and {model: its answers}: the measures,
    the kinds of rules, and where there are several models each one's differences from the first and from the
    one before it."""
    counted = {name: intervals(shares(some)) for name, some in found.items()}
    measures, differences, order = [["model", *MEASURES, "words"]], [["models", *MEASURES]], list(counted)
    for i, (name, (values, many)) in enumerate(counted.items()):
        measures.append([name, *(with_interval(v, m) for v, m in zip(values, many.T)),
                         f"{mean_words(records, answers[name]):.0f}"])
        earlier = [] if i == 0 else [order[0]] if i == 1 else [order[0], order[i - 1]]
        for other in earlier:
            theirs, resampled = counted[other]
            differences.append([f"{name} − {other}", *(with_interval(v - w, m - k) for v, m, w, k in zip(
                values, many.T, theirs, resampled.T))])
    kinds = [["kind", "prompts", *found]]
    names = [names for _, names, _ in records]
    for kind in sorted(set(itertools.chain(*names))):
        kept = [[x for some, (strict, _) in zip(names, pairs) for n, x in zip(some, strict) if n == kind]
                for pairs in found.values()]
        kinds.append([kind, str(len(kept[0])), *(f"{sum(some) / len(some):.0%}" for some in kept)])
    out = [("Share kept (95 % intervals)", measures), ("Instructions kept by kind, strict", kinds)]
    return out + [("Differences on the same prompts (95 % intervals)", differences)] * (len(found) > 1)


def side_by_side(records, found, answers, n):
    """Lines that show n of the prompts, evenly spaced so that nobody has picked them, the rules of each, and
    every model's answer with the rules that it keeps (strict)."""
    lines = []
    for i in range(0, len(records), max(1, len(records) // n))[:n] if n else ():
        prompt, names, _ = records[i]
        lines += [f"\nPROMPT {i + 1}: {prompt}", f"RULES: {', '.join(names)}"]
        for name, texts in answers.items():
            kept = [rule for rule, x in zip(names, found[name][i][0]) if x]
            lines += [f"--- {name} keeps {len(kept)} of {len(names)}:", texts[i]]
    return lines


def measure(cfg):
    records, answers = read_lines(cfg.data, ruled)[::cfg.every], {}
    if not records:
        raise ValueError(f"{cfg.data} has no prompts")
    os.makedirs(cfg.out, exist_ok=True)                                     # before hours of sampling
    prompts = [[{"role": "user", "content": prompt}] for prompt, _, _ in records]
    if cfg.responses:
        # Matched by line and not by prompt, because in the published file one prompt is worded differently.
        given = read_lines(cfg.responses, lambda row: row["response"])[::cfg.every]
        if len(given) != len(records):
            raise ValueError(f"{cfg.responses} has {len(given)} answers to {len(records)} prompts")
        answers[os.path.basename(cfg.responses)] = given
    files = [model for model in cfg.models if model.endswith(".json")]
    for path in files:
        with reading(path, "an evaluation of lab.ifeval") as earlier:
            for name, entry in earlier.items():
                answers[f"{os.path.dirname(path)}: {name}"] = entry["answers"]
                if len(entry["answers"]) != len(records):
                    raise ValueError(f"{len(entry['answers'])} answers to {len(records)} prompts")
    checkpoints = {} if files else named(cfg.models)
    sampler = Sampler(cfg, list(checkpoints.values())) if checkpoints else None
    for name, folder in checkpoints.items():
        print(f"{folder} answers {len(prompts)} prompts ...", flush=True)
        batch = sampler.sample(sampler.load(folder), prompts, 0)
        answers[name] = sampler.texts(batch)
    found = {name: verdicts(records, texts) for name, texts in answers.items()}
    if is_first():
        write_json(f"{cfg.out}/ifeval.json", {name: {
            "shares": dict(zip(MEASURES, intervals(shares(some))[0].tolist())),
            "words": mean_words(records, answers[name]),
            "answers": answers[name]} for name, some in found.items()})
    print("\n".join(report.markdown(tables(records, found, answers))))
    print("\n".join(side_by_side(records, found, answers, cfg.show)))
    return found


if __name__ == "__main__":
    main(Config, measure, __doc__)
