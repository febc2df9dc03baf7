"""Chat formats: a conversation as one text, with control tokens around the messages.

cut(messages, prompt) splits a conversation of n messages into (frames, contents): the n contents, which are
data, and the n + 1 frames around them. Only frames may hold control tokens. With `prompt` the last frame ends
where the assistant starts to speak.
"""
import json
import re
from dataclasses import dataclass

try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError:                         # then only the formats below are known
    ImmutableSandboxedEnvironment = None

MARK = "\ue000{}\ue000"                     # stands for a content: a private-use character


def quoted(text):
    """A text as Jinja writes it, which knows no pairs of \\u for characters such as emoji."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class Format:
    """A format that needs no template: the texts before the first message (begin), before a message's role
    (before), between its role and its content (after), after its content (end, a control token), and between
    two messages (gap)."""
    begin: str
    before: str
    after: str
    end: str
    gap: str

    def head(self, role):
        return self.before + role + self.after

    def cut(self, messages, prompt=False):
        first, *others = (self.head(m["role"]) for m in messages)
        last = self.end + (self.gap + self.head("assistant") if prompt else "")
        return [self.begin + first, *(self.end + self.gap + head for head in others), last], \
            [m["content"] for m in messages]

    def source(self, system):
        """The format as a Jinja template, which is what transformers and vLLM read. system: the message put
        before conversations that have none."""
        first = self.head("system") + system + self.end + self.gap if system else ""
        texts = [quoted(x) for x in (self.begin, first, self.before, self.after, self.end + self.gap,
                                         self.head("assistant"))]
        return ("{{ %s }}{%% if messages[0]['role'] != 'system' %%}{{ %s }}{%% endif %%}"
                "{%% for m in messages %%}{{ %s + m['role'] + %s + m['content'] + %s }}{%% endfor %%}"
                "{%% if add_generation_prompt %%}{{ %s }}{%% endif %%}" % tuple(texts))


CHATML = Format("", "<|im_start|>", "\n", "<|im_end|>", "\n")
LLAMA3 = Format("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "")


class Template:
    """The format of a model's own Jinja template, rendered as transformers does it. special: the entries of
    tokenizer_config.json that templates name, such as bos_token. Raises ValueError for a template that cannot
    be used."""

    def __init__(self, source, special):
        self.text, self.special = source, special
        if ImmutableSandboxedEnvironment is None:
            raise ValueError("its chat template needs jinja2: pip install jinja2")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = self.refuse    # and no date: it would change from day to day
        try:
            self.template = environment.from_string(source)
        except TemplateError as e:
            raise ValueError(f"its chat template cannot be read: {e}") from None

    @staticmethod
    def refuse(text):
        raise ValueError(text)

    def render(self, messages, prompt):
        """The conversation as one text, as transformers' apply_chat_template writes it."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=prompt, **self.special)
        except Exception as e:                                  # the template's own code
            raise ValueError(f"the chat template refuses a conversation: {e}") from None

    def cut(self, messages, prompt=False):
        marked = [{**m, "content": MARK.format(i)} for i, m in enumerate(messages)]
        parts = re.split(MARK.format(r"(\d+)"), self.render(marked, prompt))
        frames, whole = parts[::2], self.render(messages, prompt)
        for change in (str, str.strip):                         # some templates strip what messages say
            contents = [change(m["content"]) for m in messages]
            said = [contents[int(i)] for i in parts[1::2]]
            if whole == frames[0] + "".join(a + b for a, b in zip(said, frames[1:])):
                break
        else:
            raise ValueError("the chat template changes what messages say")
        if parts[1::2] != [str(i) for i in range(len(messages))]:
            raise ValueError("the chat template leaves out messages, or changes their order")
        return frames, said

    def source(self, system):
        """The template as it came. system: a message that it puts before conversations that have none."""
        first = ("{%% if messages[0]['role'] != 'system' %%}{%% set messages = [{'role': 'system', "
                 "'content': %s}] + messages %%}{%% endif %%}" % quoted(system)) if system else ""
        return self.text if self.text.startswith(first) else first + self.text
