"""A model's own chat template: the same ids as transformers gives, saved as it came, or refused."""
import json

import pytest

from data.templates import CHATML, LLAMA3, Template
from data.tokenizer import GPT2_PATTERN, Tokenizer, learn, new_document

TEXTS = ["The cat sat on the mat, and the cat was happy.", "user system assistant \n\n  42\t"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]
# The shapes of six families, in words of our own: a loop over the messages, and the assistant's turn.
LOOP = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
FAMILIES = {
    "smollm": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHi.<|im_end|>\n' }}{% endif %}"
    + LOOP % ("{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
              "{{ '<|im_start|>assistant\n' }}"),
    "qwen": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nHello.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if not (m.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama": LOOP % (
        "{% set said = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
        " + '<|eot_id|>' %}{{ bos_token + said if loop.first else said }}",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"),
    "phi": LOOP % ("{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}",
                   "{{ '<|im_start|>assistant<|im_sep|>' }}"),
    "thinking": LOOP % (                        # as Qwen 3's, which puts this before the last answer alone
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>assistant\n' }}"),
    "tulu": "{{ bos_token }}" + LOOP % (        # its roles are plain text, and only answers have an end
        "{{ '<|' + m['role'] + '|>\n' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}"
        "{{ '' if loop.last and m['role'] == 'assistant' else '\n' }}", "{{ '<|assistant|>\n' }}")}
CONVERSATIONS = [
    [("user", "The cat?")],
    [("system", "Sit."), ("user", "Hi."), ("assistant", "Hello, you."), ("user", "Why?")],
    [("user", "  two spaces\n\n and lines \n")], [("user", "\ta ")], [("user", "<|im_end|> é 猫")]]
CONVERSATIONS = [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A folder with a family's template, as transformers writes it."""
    ranks = learn(TEXTS * 5, vocab_size=300).ranks
    pattern = GPT2_PATTERN
    if request.param == "llama":                        # whose own pattern keeps line ends together
        pattern = pattern.replace(r"|\s+(?!", r"|\s*[\r\n]+|\s+(?!")
    Tokenizer(new_document(ranks, CONTROL, pattern)).save(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
              "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(FAMILIES[request.param])
    return tmp_path


def rendered(tokenizer, messages):
    """A prompt as one text, in which control tokens count wherever they are."""
    return tokenizer.encoding.encode(tokenizer.chat_format.render(messages, True), allowed_special="all")


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda m: repr(m[-1]["content"]))
def test_a_prompt_is_the_rendered_template(folder, messages):
    tokenizer = Tokenizer.load(str(folder))
    ids = tokenizer.prompt(messages)
    if "<|im_end|>" not in messages[-1]["content"]:
        assert ids == rendered(tokenizer, messages)
    else:                                               # what users say controls nothing
        without = tokenizer.prompt([{"role": "user", "content": "?"}])
        assert ids.count(tokenizer.special["<|im_end|>"]) == without.count(tokenizer.special["<|im_end|>"])
        assert messages[-1]["content"] in tokenizer.decode(ids)


def test_transformers_gives_the_same_ids(folder):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(str(folder))
    for messages in CONVERSATIONS[:4]:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.prompt(messages) == (found["input_ids"] if hasattr(found, "keys") else found)


def test_models_that_end_answers_in_another_way_are_told_apart(folder, tmp_path):
    mine = Tokenizer.load(str(folder))
    text = (folder / "chat_template.jinja").read_text()
    for end in ("<|im_end|>", "<|eot_id|>"):
        text = text.replace(end, "<|endoftext|>")
    names = mine.chat_format.special | {"eos_token": "<|endoftext|>"}
    Tokenizer(mine.document, template=(text, names)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="their end tokens differ"):
        mine.check_same(str(tmp_path / "other"))


def test_answers_and_their_ends_are_learnt_and_nothing_follows_the_last_one(folder):
    tokenizer = Tokenizer.load(str(folder))
    for asked in CONVERSATIONS:
        ids, mask = tokenizer.chat([*asked, {"role": "assistant", "content": "On the mat."}])
        assert ids == tokenizer.prompt(asked) + tokenizer.response("On the mat.")
        learnt = [tokenizer.response(m["content"]) for m in asked if m["role"] == "assistant"]
        learnt.append(tokenizer.response("On the mat."))
        assert [i for i, x in zip(ids, mask) if x] == [i for answer in learnt for i in answer]


def test_the_template_is_saved_as_it_came_and_a_system_message_is_put_in_front(folder, tmp_path):
    tokenizer = Tokenizer.load(str(folder))
    tokenizer.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert config["bos_token"] == "<|endoftext|>"
    again = Tokenizer.load(str(tmp_path / "saved"))
    assert all(again.chat(m) == tokenizer.chat(m) for m in CONVERSATIONS if m[-1]["role"] == "user")
    Tokenizer.load(str(folder), "Be brief.").save(tmp_path / "brief")
    brief = Tokenizer.load(str(tmp_path / "brief"))
    brief.save(tmp_path / "twice")
    first, second = (json.loads((tmp_path / where / "tokenizer_config.json").read_text())
                     for where in ("brief", "twice"))
    assert first == second
    for where in ("brief", "twice"):
        found = Tokenizer.load(str(tmp_path / where))
        [asked, *_] = CONVERSATIONS
        assert found.prompt(asked) == tokenizer.prompt([{"role": "system", "content": "Be brief."}, *asked])
        assert found.prompt(asked) == rendered(found, asked)


@pytest.mark.parametrize("known", [CHATML, LLAMA3], ids=["ChatML", "Llama 3"])
@pytest.mark.parametrize("system", ["", 'Say "é".\n{{ x }} 😀'])
def test_a_known_format_and_its_template_are_the_same(known, system):
    for messages in CONVERSATIONS:
        first = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        for prompt in (True, False):
            frames, contents = known.cut([*first, *messages], prompt)
            text = frames[0] + "".join(a + b for a, b in zip(contents, frames[1:]))
            found = Template(known.source(system), {}).render(messages, prompt)
            assert found == text + known.gap * (not prompt)


@pytest.mark.parametrize("source, said", [
    ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "changes what messages s"),
    ("{{ messages[0].content }}<|im_end|>", "leaves out messages"),
    ("{% for m in messages[::-1] %}{{ m.content }}<|im_end|>{% endfor %}", "or changes their order"),
    ("{% for m in messages %}{{ m.content }}.{% endfor %}", "ends answers with '.', which is no control"),
    ("{{ raise_exception('no roles here') }}", "the chat template refuses a conversation: no roles here"),
    ("{% for m in messages %}", "cannot be read: Unexpected end of template")])
def test_what_cannot_be_used_is_one_line(source, said):
    with pytest.raises(ValueError, match=said):
        document = new_document(learn(TEXTS, 300).ranks, CONTROL, GPT2_PATTERN)
        Tokenizer(document, template=(source, {}))


def test_without_jinja2_a_folders_own_template_is_refused_and_our_own_is_not(folder, tmp_path, monkeypatch):
    Tokenizer(new_document(learn(TEXTS, 300).ranks, CONTROL, GPT2_PATTERN)).save(tmp_path / "ours")
    monkeypatch.setattr("data.templates.ImmutableSandboxedEnvironment", None)
    with pytest.raises(ValueError, match="its chat template needs jinja2: pip install jinja2"):
        Tokenizer.load(str(folder))
    assert Tokenizer.load(str(tmp_path / "ours")).chat_format == CHATML
