"""Rules for an answer that a program can check, such as "use no commas" or "write at least 40 words".

A rule is an object whose fields are its parameters. It has wordings, a check, and a way to change a plain
answer into one that keeps it; such answers are demonstrations for SFT. 24 of the 25 kinds of IFEval (Zhou et
al. 2023, arXiv 2311.07911) are among them, under names of our own. lab/ifeval.py uses their checks too, so
they count as that benchmark does. The wordings are ours: IFEval's prompts are for evaluation alone.
"""
import json
import re
from dataclasses import asdict, dataclass

AT_LEAST, LESS = "at least", "less than"
# Words that an answer hardly holds by chance, so that a demonstration has to bring them in.
WORDS = ("river", "garden", "music", "winter", "bridge", "market", "engine", "island", "letter", "morning",
         "paper", "forest", "window", "teacher", "silver", "travel", "doctor", "village", "energy", "history",
         "kitchen", "weather", "journey", "picture", "secret", "simple", "strong", "friend", "future")


# ------------------------------------------------------------------------------------------------ counting

def words_of(text):
    return re.findall(r"\w+", text)


# A full stop after an initial or an abbreviation ends no sentence; nor does one after the number of an item.
NO_END = re.compile(r"[(\"*]*([A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|([A-Z]\.)+[A-Z])\.")


def sentences_of(text):
    """The sentences of a text. One ends at . ! or ? before whitespace."""
    parts, start = [], 0
    for end in re.finditer(r"[.!?]+[\"')\]*]*\s+", text):
        *before, last = text[start:end.end()].split()
        if not NO_END.fullmatch(last) and (before or not re.fullmatch(r"\d+\.", last)):
            parts.append(text[start:end.end()].strip())
            start = end.end()
    return parts + [text[start:].strip()] * bool(text[start:].strip())


def holds(count, relation, number):
    return count >= number if relation == AT_LEAST else count < number


def near(rng, count, relation):
    """A number near a count, and at least 1, to which the count has this relation (if it is not 0)."""
    return max(1, round(count * rng.uniform(0.6, 1))) if relation == AT_LEAST else count + rng.randint(1, 5)


def content_words(text):
    """The distinct words of at least four letters, in lower case."""
    return list(dict.fromkeys(word.lower() for word in re.findall(r"[A-Za-z]{4,}", text)))


def pieces(text, n):
    """A text in n parts, each of nearly the same number of sentences; [] if it has fewer sentences."""
    parts = sentences_of(" ".join(text.split()))
    edges = [round(i * len(parts) / n) for i in range(n + 1)]
    return [" ".join(parts[a:b]) for a, b in zip(edges, edges[1:])] if len(parts) >= n else []


def without(text, pattern):
    """The sentences of a text in which a pattern does not occur."""
    return " ".join(s for s in sentences_of(text) if not re.search(pattern, s, re.IGNORECASE))


# --------------------------------------------------------------------------------------------------- rules

@dataclass
class Rule:
    """What all kinds have. In a wording, {name} stands for a field."""
    wordings = ()
    joint = " and "             # of a field with several values
    is_shape = False            # whether it says how the whole answer is laid out, which only one rule can do

    @classmethod
    def draw(cls, rng, request, answer):
        """A rule of this kind whose parameters suit a plain answer to a request, or None."""
        return cls()

    def text(self, rng):
        """The rule in words."""
        said = {name: self.joint.join(f'"{x}"' for x in value) if isinstance(value, list) else value
                for name, value in vars(self).items()}
        return rng.choice(self.wordings).format(**said, reply=rng.choice(["answer", "response", "reply"]))

    def check(self, answer):
        """Whether an answer keeps the rule."""
        raise NotImplementedError

    def repair(self, answer, other, rng):
        """A plain answer, changed to keep the rule where that can be done. other: a second answer."""
        return answer


@dataclass
class Count(Rule):
    """Rules for how often something occurs in the answer."""
    relation: str
    number: int

    @classmethod
    def draw(cls, rng, request, answer):
        relation = rng.choice([AT_LEAST, LESS])
        return cls(relation, near(rng, cls.count(answer), relation))

    def check(self, answer):
        return holds(self.count(answer), self.relation, self.number)


class Words(Count):
    wordings = ("Write {relation} {number} words.", "Your {reply} should have {relation} {number} words.",
                "Use {relation} {number} words in all.",
                "The length of the {reply} must be {relation} {number} words.",
                "Answer with {relation} {number} words.")

    @classmethod
    def draw(cls, rng, request, answer):
        relation, count = rng.choice([AT_LEAST, LESS]), cls.count(answer)
        most = 1 if relation == AT_LEAST else 1.3
        return cls(relation, max(5, int(count * rng.uniform(0.5, most) / 5) * 5))

    @staticmethod
    def count(answer):
        return len(words_of(answer))

    def repair(self, answer, other, rng):
        kept = sentences_of(answer)
        while len(kept) > 1 and not self.check(" ".join(kept)) and self.relation == LESS:
            kept.pop()
        return answer if self.check(answer) else " ".join(kept)


class Sentences(Count):
    wordings = ("Write {relation} {number} sentences.", "Give one {reply} of {relation} {number} sentences.",
                "The number of sentences should be {relation} {number}.",
                "Your entire {reply} must have {relation} {number} sentences.")

    @classmethod
    def draw(cls, rng, request, answer):
        relation, count = rng.choice([AT_LEAST, LESS]), cls.count(answer)
        return cls(relation, max(1, count - rng.randint(0, 2)) if relation == AT_LEAST else
                   max(2, count + rng.randint(-3, 2)))

    @staticmethod
    def count(answer):
        return len(sentences_of(answer))

    def repair(self, answer, other, rng):
        parts = sentences_of(answer)
        enough = self.relation == AT_LEAST or self.check(answer)
        return answer if enough else " ".join(parts[:self.number - 1])


class CapitalWords(Count):
    wordings = ("Write words in all capital letters {relation} {number} times.",
                "The number of words in capital letters should be {relation} {number}.",
                "Use {relation} {number} words that are written entirely in capitals.",
                "In your {reply}, words in ALL CAPS should appear {relation} {number} times.")

    @classmethod
    def draw(cls, rng, request, answer):
        relation = rng.choice([AT_LEAST, LESS])
        return cls(relation, rng.randint(1, 6) if relation == AT_LEAST else rng.randint(2, 10))

    @staticmethod
    def count(answer):
        return sum(word.isupper() for word in re.findall(r"\w[\w'-]*", answer))

    def repair(self, answer, other, rng):
        if self.relation == LESS:
            return answer if self.check(answer) else re.sub(r"\b[A-Z]{2,}\b", lambda m: m[0].title(), answer)
        for word in rng.sample(content_words(answer), len(content_words(answer))):
            if self.check(answer):
                break
            answer = re.sub(rf"\b{word}\b", word.upper(), answer, flags=re.IGNORECASE)
        return answer


@dataclass
class Keywords(Rule):
    words: list
    wordings = ("Include the words {words}.", "The keywords {words} must appear in your {reply}.",
                "Make sure that you use {words} somewhere.", "Mention {words} in the {reply}.",
                "Use the keywords {words}.", "Your {reply} has to contain {words}.")
    more = ("This also has to do with {}.", "One could speak of {} too.", "Some people would add {}.")

    @classmethod
    def draw(cls, rng, request, answer):
        known = list(dict.fromkeys(content_words(answer)[:3] + rng.sample(WORDS, 3)))
        return cls(rng.sample(known, rng.randint(1, 3)))

    def check(self, answer):
        return all(re.search(word, answer, re.IGNORECASE) for word in self.words)

    def repair(self, answer, other, rng):
        missing = [word for word in self.words if not re.search(word, answer, re.IGNORECASE)]
        return f"{answer} {rng.choice(self.more).format(' and '.join(missing))}" if missing else answer


@dataclass
class Frequency(Rule):
    word: str
    relation: str
    number: int
    wordings = ('Use the word "{word}" {relation} {number} times.',
                "The word {word} should appear {relation} {number} times.",
                'In your {reply}, "{word}" has to occur {relation} {number} times.',
                "Mention {word} {relation} {number} times.",
                'Write "{word}" {relation} {number} times in the {reply}.')
    more = ("In short, it is about {}.", "Think of {} first.", "That is why {} matters.",
            "Again, {} is the point.", "Nothing here goes without {}.", "Keep {} in mind.")

    @classmethod
    def draw(cls, rng, request, answer):
        word = rng.choice([*content_words(answer)[:6], *rng.sample(WORDS, 2)])
        relation = rng.choice([AT_LEAST, AT_LEAST, LESS])
        count = len(re.findall(word, answer, re.IGNORECASE))
        return cls(word, relation, max(1, count + rng.randint(0, 3)) if relation == AT_LEAST else
                   count + rng.randint(1, 3))

    def check(self, answer):
        return holds(len(re.findall(self.word, answer, re.IGNORECASE)), self.relation, self.number)

    def repair(self, answer, other, rng):
        for sentence in rng.sample(self.more, len(self.more)):
            if not self.check(answer):
                answer += " " + sentence.format(self.word)
        return answer


@dataclass
class Forbidden(Rule):
    words: list
    wordings = ("Do not use the words {words}.", "Avoid {words}.",
                "The words {words} are not allowed in the {reply}.",
                "Your {reply} must not include the keywords {words}.")

    @classmethod
    def draw(cls, rng, request, answer):
        # Words that the answer has, whose sentences go; or words that it would hardly have, so that it stays
        # as it is. From the first alone a model learns too little that quoted words are not always wanted.
        first, *rest = sentences_of(answer) or [""]
        known = rng.choice([content_words(" ".join(rest) or request), WORDS])
        known = [word for word in known if not re.search(rf"\b{word}\b", first, re.IGNORECASE)]
        return cls(rng.sample(known, min(len(known), rng.randint(1, 3)))) if known else None

    def check(self, answer):
        return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in self.words)

    def repair(self, answer, other, rng):
        return answer if self.check(answer) else without(answer, rf"\b({'|'.join(self.words)})\b")


@dataclass
class Letters(Rule):
    letter: str
    relation: str
    number: int
    wordings = ("The letter {letter} should appear {relation} {number} times.",
                'Use the character "{letter}" {relation} {number} times.',
                'There should be {relation} {number} of the letter "{letter}" in the {reply}.',
                "In your entire {reply}, write the letter {letter} {relation} {number} times.",
                "Let the letter {letter} occur {relation} {number} times.")

    @classmethod
    def draw(cls, rng, request, answer):
        letter, relation = rng.choice("aeinorstlcdhmu!?#"), rng.choice([AT_LEAST, LESS])
        count = answer.lower().count(letter) + 2 * (not letter.isalpha())
        return cls(letter, relation, near(rng, count, relation))

    def check(self, answer):
        return holds(answer.lower().count(self.letter.lower()), self.relation, self.number)

    def repair(self, answer, other, rng):
        missing = self.number - answer.lower().count(self.letter)
        is_sign = not self.letter.isalpha()         # signs can stand alone; a row of letters says nothing
        return f"{answer} {self.letter * missing}" if self.relation == AT_LEAST and is_sign else answer


class NoDigits(Rule):
    wordings = ("Do not use any digits.", "Write all numbers as words.", "Your {reply} must have no digit.")

    def check(self, answer):
        return not re.search(r"\d", answer)

    def repair(self, answer, other, rng):
        return without(answer, r"\d")


@dataclass
class Parts(Rule):
    """Rules for answers in several parts."""
    number: int
    is_shape = True

    @classmethod
    def draw(cls, rng, request, answer):
        most = min(5, len(sentences_of(" ".join(answer.split()))))
        return cls(rng.randint(2, most)) if most > 1 else None


class Paragraphs(Parts):
    wordings = ("Write {number} paragraphs, with *** between them.",
                "Separate the {number} paragraphs of your {reply} by three asterisks: ***",
                "There should be exactly {number} paragraphs; put the divider *** between two of them.",
                "Your {reply} must have {number} paragraphs. Write *** between two of them.",
                "Use {number} paragraphs. The markdown divider *** stands between paragraphs.",
                "Give {number} paragraphs, each separated from the next by ***")

    def check(self, answer):
        parts = re.split(r"\s?\*\*\*\s?", answer)
        return all(p.strip() for p in parts[1:-1]) and sum(bool(p.strip()) for p in parts) == self.number

    def repair(self, answer, other, rng):
        return "\n\n***\n\n".join(pieces(answer, self.number))


class Bullets(Parts):
    wordings = ("Answer in exactly {number} bullet points, each of which begins with * or -.",
                "Use {number} bullet points, such as:\n* one point\n* another\n",
                "Give a list of exactly {number} bullets in markdown.",
                "Your {reply} must contain exactly {number} bullet points.",
                "List exactly {number} points in markdown, each on a line that starts with *.",
                "Write exactly {number} bullet points, for example:\n* This is a point.\n")

    def check(self, answer):
        stars, dashes = r"^\s*\*[^\*].*$", r"^\s*-.*$"
        return sum(len(re.findall(kind, answer, re.MULTILINE)) for kind in (stars, dashes)) == self.number

    def repair(self, answer, other, rng):
        return "\n".join(f"* {part}" for part in pieces(answer, self.number))


class Numbered(Parts):
    wordings = ("Answer with a numbered list of exactly {number} items.",
                "Write {number} lines that begin with 1., 2. and so on.",
                "Number your points from 1 to {number}, one point a line.")

    def check(self, answer):
        return re.findall(r"^\s*(\d+)[.)] ", answer, re.MULTILINE) == [str(i + 1) for i in range(self.number)]

    def repair(self, answer, other, rng):
        return "\n".join(f"{i}. {part}" for i, part in enumerate(pieces(answer, self.number), 1))


@dataclass
class Sections(Rule):
    name: str
    number: int
    is_shape = True
    wordings = ("Write {number} sections, and begin each with {name} and its number, as in {name} 1.",
                "Divide your {reply} into {number} sections. Mark their beginnings with {name} X.",
                "The {reply} has {number} sections with the headings {name} 1, {name} 2 and so on.",
                "There should be {number} sections, each with the line {name} X on top, where X is 1, 2, ...")

    @classmethod
    def draw(cls, rng, request, answer):
        parts = Parts.draw(rng, request, answer)
        return parts and cls(rng.choice(["Section", "SECTION", "Part", "PARAGRAPH", "Chapter"]), parts.number)

    def check(self, answer):
        return len(re.split(rf"\s?{self.name}\s?\d+\s?", answer)) > self.number

    def repair(self, answer, other, rng):
        parts = enumerate(pieces(answer, self.number), 1)
        return "\n\n".join(f"{self.name} {i}\n{part}" for i, part in parts)


@dataclass
class FirstWord(Rule):
    paragraphs: int
    number: int
    word: str
    is_shape = True
    wordings = ("Write {paragraphs} paragraphs with a blank line between them. Paragraph {number} has to "
                "begin with the word {word}.",
                "There should be {paragraphs} paragraphs, separated by two line breaks, and the first word "
                "of paragraph {number} is {word}.",
                "Use exactly {paragraphs} paragraphs (an empty line separates two). Start paragraph {number} "
                "of the {reply} with the word {word}.")

    @classmethod
    def draw(cls, rng, request, answer):
        parts, known = Parts.draw(rng, request, answer), content_words(answer)
        return cls(parts.number, rng.randint(1, parts.number), rng.choice(known)) if parts and known else None

    def check(self, answer):
        parts = answer.split("\n\n")
        nth = parts[self.number - 1].split() if self.number <= len(parts) else []
        first = re.match(r"['\"]*([^.,?!'\"]*)", nth[0])[1].lower() if nth else ""
        return sum(bool(p.strip()) for p in parts) == self.paragraphs and first == self.word.lower()

    def repair(self, answer, other, rng):
        parts = pieces(answer, self.paragraphs)
        if parts:
            parts[self.number - 1] = f"{self.word.capitalize()} comes first here. {parts[self.number - 1]}"
        return "\n\n".join(parts)


class TwoAnswers(Rule):
    is_shape = True
    wordings = ("Give two different answers, with ****** (six asterisks) between them.",
                "Write two answers and separate them by six asterisks: ******",
                "Two different {reply}s are needed. Put ****** between them, and nothing else.",
                "Respond twice, in different ways, with ****** in between.")

    def check(self, answer):
        parts = answer.split("******")
        answers = [p.strip() for p in parts if p.strip()]
        return all(p.strip() for p in parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]

    def repair(self, answer, other, rng):
        return f"{answer}\n\n******\n\n{other}" if other else answer


class Json(Rule):
    is_shape = True
    wordings = ("Answer in JSON.", "The entire {reply} has to be JSON.", "Wrap the {reply} in JSON format.",
                "Your {reply} must be valid JSON.")

    def check(self, answer):
        text = re.sub(r"^```(json|Json|JSON)?", "", answer.strip()).removesuffix("```")
        try:
            return json.loads(text.strip()) is not ...
        except ValueError:
            return False

    def repair(self, answer, other, rng):
        return json.dumps({"answer": answer}, ensure_ascii=False, indent=1)


@dataclass
class Highlights(Rule):
    number: int
    wordings = ("Highlight at least {number} parts with asterisks, like *this*.",
                "Emphasise at least {number} phrases in markdown: *a phrase*.",
                "At least {number} parts of the {reply} must be highlighted, as in *highlighted part*.",
                "Mark {number} or more parts of your {reply} in markdown, as in *a part*.",
                "Put {number} or more phrases between asterisks, such as *this phrase*.",
                "Highlight {number} or more sections with markdown, *like this section*.")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(rng.randint(1, min(5, max(1, len(content_words(answer)) // 3))))

    def check(self, answer):
        single = [x for x in re.findall(r"\*[^\n\*]*\*", answer) if x.strip("*").strip()]
        double = [x for x in re.findall(r"\*\*[^\n\*]*\*\*", answer) if x[2:-2].strip()]
        return len(single) + len(double) >= self.number

    def repair(self, answer, other, rng):
        known = content_words(answer)
        for word in rng.sample(known, min(len(known), self.number)):
            answer = re.sub(rf"\b({word})\b", r"*\1*", answer, count=1, flags=re.IGNORECASE)
        return answer


@dataclass
class Placeholders(Rule):
    number: int
    wordings = ("Use at least {number} placeholders in square brackets: [name], for example.",
                "There should be {number} or more placeholders like [address] in your {reply}.",
                "Leave at least {number} gaps to fill in, in square brackets, as in [date].",
                "At least {number} placeholders in brackets, for example [place], are needed.",
                "Your {reply} must contain {number} or more placeholders, written as [price] is.")
    gaps = ("name", "date", "address", "time", "place", "phone number", "email", "price", "company", "city",
            "title", "reason")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(rng.randint(1, 6))

    def check(self, answer):
        return len(re.findall(r"\[.*?\]", answer)) >= self.number

    def repair(self, answer, other, rng):
        gaps = [f"[{gap}]" for gap in rng.sample(self.gaps, self.number)]
        return f"{answer}\n\nFrom [{rng.choice(self.gaps)}], with {' and '.join(gaps)}."


@dataclass
class Choice(Rule):
    options: list
    wordings = ("Your {reply} must contain one of these phrases: {options}.",
                "Answer with {options}.", "Choose between {options}, and say it in your {reply}.")
    joint = " or "
    starts = ("I say {}.", "I would guess {}.", "To me it is {}.", "So {}.", "In short: {}.", "I say: {}!")
    ends = ("yes", "no", "perhaps", "true", "false", "unknown")

    @classmethod
    def draw(cls, rng, request, answer):
        start = rng.choice(cls.starts)
        return cls([start.format(end) for end in rng.sample(cls.ends, rng.randint(2, 3))])

    def check(self, answer):
        return any(option in answer for option in self.options)

    def repair(self, answer, other, rng):
        return f"{rng.choice(self.options)} {answer}"


class Title(Rule):
    wordings = ("Give your {reply} a title in double angle brackets: <<a title>>.",
                "The {reply} needs a title, which looks like <<this>>.",
                "Put a title in << and >> above your {reply}.")

    def check(self, answer):
        return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", answer))

    def repair(self, answer, other, rng):
        return f"<<{' '.join(content_words(answer)[:4]).title() or 'Answer'}>>\n\n{answer}"


@dataclass
class Start(Rule):
    phrase: str
    wordings = ('Begin your {reply} with "{phrase}"', 'The first words of the {reply} must be "{phrase}"',
                'Start with "{phrase}"')
    phrases = ("Here is what I think:", "Let me see.", "Of course!", "In my view,", "To begin with,")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(rng.choice(cls.phrases))

    def check(self, answer):
        return answer.strip().lower().startswith(self.phrase.lower())

    def repair(self, answer, other, rng):
        return f"{self.phrase} {answer}"


@dataclass
class Postscript(Rule):
    mark: str
    wordings = ('Add a postscript that begins with "{mark}".', "With {mark} in front, add a postscript.",
                "At the end, after {mark}, write a postscript.",
                'Finish the {reply} with a postscript that starts with "{mark}".')
    more = ("I hope that this helps.", "Ask me if anything is unclear.", "Take your time with it.")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(rng.choice(["P.S.", "P.P.S"]))

    def check(self, answer):
        spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
        return bool(re.search(spaced.get(self.mark, re.escape(self.mark.lower())), answer.lower()))

    def repair(self, answer, other, rng):
        return f"{answer}\n\n{self.mark} {rng.choice(self.more)}"


@dataclass
class End(Rule):
    phrase: str
    wordings = ('End your {reply} with exactly "{phrase}" and nothing after it.',
                'Finish with "{phrase}" and add nothing to it.', 'The last words must be "{phrase}".',
                'The very end of your {reply} should read: "{phrase}"')
    # Phrases with a word that changes, so that they are copied and not learnt by heart.
    phrases = ("That is all about the {}.", "Would you like to hear of the {} next?", "Mind the {}!", "DONE",
               "Tell me if you want to know more of the {}.", "Thank you for the {}.", "What is a {} for?")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(rng.choice(cls.phrases).format(rng.choice(WORDS)))

    def check(self, answer):
        return answer.strip().strip('"').lower().endswith(self.phrase.strip().lower())

    def repair(self, answer, other, rng):
        return f"{answer} {self.phrase}"


class Question(Rule):
    wordings = ("End with a question.", "The last sentence of your {reply} must be a question.",
                "Finish your {reply} by asking something.")
    phrases = ("Does that help?", "What do you think?", "Would you like an example?")

    def check(self, answer):
        return answer.strip().endswith("?")

    def repair(self, answer, other, rng):
        return f"{answer} {rng.choice(self.phrases)}"


@dataclass
class Parentheses(Rule):
    number: int
    wordings = ("Use at least {number} remarks in parentheses (like this one).",
                "Put at least {number} parts of your {reply} in round brackets.",
                "There should be {number} or more parentheses ( ) with words in them.")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(rng.randint(1, 3))

    def check(self, answer):
        return len(re.findall(r"\([^()]+\)", answer)) >= self.number

    def repair(self, answer, other, rng):
        known = content_words(answer)
        for word in rng.sample(known, min(len(known), self.number)):
            answer = re.sub(rf"\b({word})\b", r"(\1)", answer, count=1, flags=re.IGNORECASE)
        return answer


class Upper(Rule):
    wordings = ("Write in capital letters only.", "Use no small letters: all letters must be capital.",
                "Your entire {reply} must be in capital letters.",
                "Answer in English and in ALL CAPS.",
                "All letters of the {reply} should be capitalized.",
                "Make all words capital.", "Lowercase letters are not allowed.",
                "The {reply} has to be in English, with all letters in uppercase.",
                "Do all of this in capitals.")

    def check(self, answer):
        return answer.isupper()

    def repair(self, answer, other, rng):
        return answer.upper()


class Lower(Rule):
    wordings = ("Write in small letters only.", "Do not use any capital letter.",
                "Your entire {reply} must be in lowercase letters.",
                "Answer in English, with lowercase letters only.",
                "All letters of the {reply} should be lowercase.",
                "Make all words lowercase.", "Capital letters are not allowed.",
                "The {reply} has to be in English, with no letter in uppercase.",
                "Do all of this in lower case.")

    def check(self, answer):
        return answer.islower()

    def repair(self, answer, other, rng):
        return answer.lower()


class NoComma(Rule):
    wordings = ("Use no commas.", "Your {reply} must not contain a comma.", "Do without commas altogether.",
                "You are not allowed to use commas in your {reply}.", "Commas are forbidden.",
                "Write without any commas.", "No comma may appear in the {reply}.")

    def check(self, answer):
        return "," not in answer

    def repair(self, answer, other, rng):
        return answer.replace(",", "")


class Quoted(Rule):
    wordings = ("Put the entire {reply} in double quotation marks.", "Wrap your {reply} in double quotes.",
                'The {reply} begins and ends with the character ".',
                "Surround your whole {reply} with double quotation marks.",
                "Put double quotes before and after all that you say.",
                "The whole {reply} must be in double quotation marks.")

    def check(self, answer):
        answer = answer.strip()
        return len(answer) > 1 and answer[0] == answer[-1] == '"'

    def repair(self, answer, other, rng):
        return '"' + answer.replace('"', "'") + '"'


@dataclass
class Repeat(Rule):
    request: str
    wordings = ("Copy the request above, word by word, and then answer it.",
                "Before you answer, copy my request as it stands, without this sentence.",
                "Say the request again, without any change and without these words, and then answer it.",
                "The {reply} starts with my request, copied exactly, and only then comes what I asked for.",
                "First repeat what I asked, word for word, and then give your {reply}.",
                "Repeat the request without changing it, and answer below it. Do not repeat this sentence.")

    @classmethod
    def draw(cls, rng, request, answer):
        return cls(request)

    def check(self, answer):
        return answer.strip().lower().startswith(self.request.strip().lower())

    def repair(self, answer, other, rng):
        return f"{self.request}\n\n{answer}"


# In the order in which they are repaired: what shortens, what divides, what adds, and what changes all.
KINDS = {kind.__name__: kind for kind in (
    Forbidden, NoDigits, Words, Sentences, Letters, Paragraphs, Bullets, Numbered, Sections, FirstWord,
    TwoAnswers, Keywords, Frequency, Highlights, Parentheses, Placeholders, Choice, Title, Start, Postscript,
    End, Question, Json, Upper, Lower, CapitalWords, NoComma, Quoted, Repeat)}


def as_dict(rule):
    """A rule as it is written in a file: {"kind", and its fields}."""
    return {"kind": type(rule).__name__, **asdict(rule)}


def from_dict(fields):
    fields = dict(fields)
    return KINDS[fields.pop("kind")](**fields)
