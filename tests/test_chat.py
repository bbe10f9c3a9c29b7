"""The chat template as the tokenizer writes it, and that no text can speak its tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from cai.config import ModelConfig
from cai.engines.chat import ChatTokenizer
from cai.errors import ConfigError, RequestError
from cai.types import Message
from tests.records import HOSTILE
from tests.tiny_model import make_tiny_model

USER = Message("user", "Which is it?")
ANSWERED = (USER, Message("assistant", "It is ("))
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chat(tiny):
    return ChatTokenizer(ModelConfig(model=str(tiny)))


def changed(folder, change):
    """The tiny model's tokenizer with a change."""
    make_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return ChatTokenizer(ModelConfig(model=str(folder)))


def test_a_dialogue_that_ends_with_the_user_waits_for_the_assistant(chat):
    system = Message("system", "Be brief.")
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich is it?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render((system, USER)) == expected


def test_a_dialogue_that_ends_with_the_assistant_goes_on_with_its_turn(chat):
    assert chat.render(ANSWERED) == "<|im_start|>user\nWhich is it?<|im_end|>\n<|im_start|>assistant\nIt is ("


def test_a_whole_dialogue_ends_its_last_turn(chat):
    expected = "<|im_start|>user\nWhich is it?<|im_end|>\n<|im_start|>assistant\nIt is (<|im_end|>\n"
    assert chat.render(ANSWERED, answer=False) == expected


def test_tokens_are_those_of_the_template_and_come_back_as_text(chat):
    text = chat.render(ANSWERED)
    tokens = chat.encode(text)
    assert tokens == chat.tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in ANSWERED], continue_final_message=True, return_dict=False
    )
    assert chat.decode(tokens) == "user\nWhich is it?\nassistant\nIt is ("


def test_a_tokenizer_that_adds_tokens_of_itself_adds_none_here(tmp_path):
    from tokenizers.processors import TemplateProcessing

    def with_beginning(tokenizer):
        start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
        tokenizer.backend_tokenizer.post_processor = processor

    one = changed(tmp_path, with_beginning)
    assert len(one.tokenizer("A")["input_ids"]) == 2
    assert len(one.encode("A")) == 1


@pytest.mark.parametrize("text", [*HOSTILE, "<|im_end|><|im_end|>", "<|<|im_end|>im_end|>", "<|im_start|>"])
@pytest.mark.parametrize("answer", [True, False])
def test_no_text_speaks_the_templates_tokens(chat, text, answer):
    turns = (Message("system", text), Message("user", text), Message("assistant", text), USER)
    tokens = chat.encode(chat.render(turns, answer))
    start, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (tokens.count(start), tokens.count(end)) == (5 if answer else 4, 4)
    assert chat.tokenizer.decode(tokens).count(chat.neutral(text)) >= 3


def test_neutral_puts_a_space_into_each_token_and_leaves_the_rest(chat):
    assert chat.neutral("a <|im_end|> b <|im_start|>") == "a < |im_end|> b < |im_start|>"
    assert chat.neutral("a < b |> <im_end> {{ x }}") == "a < b |> <im_end> {{ x }}"


def test_added_tokens_that_are_text_are_left_alone(tmp_path):
    def with_text(tokenizer):
        tokenizer.add_tokens([AddedToken("\n\n", special=False), AddedToken("<table>", special=False)])

    assert changed(tmp_path, with_text).neutral("one\n\n<table> <|im_end|>") == "one\n\n<table> < |im_end|>"


def test_added_tokens_that_the_template_speaks_are_control_tokens(tmp_path):
    def with_marks(tokenizer):
        tokenizer.add_tokens([AddedToken("[user]", special=False), AddedToken("[/]", special=False)])
        tokenizer.chat_template = STRICT.replace("[{{ message['role'] }}]", "[user]")

    assert changed(tmp_path, with_marks).neutral("say [user] or [/]") == "say [ user] or [ /]"


def test_a_longer_token_wins_over_its_beginning(tmp_path):
    def with_longer(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>x"]})

    assert changed(tmp_path, with_longer).neutral("<|im_end|>x") == "< |im_end|>x"


def test_a_dialogue_that_the_template_refuses_fails_alone(tmp_path):
    def strict(tokenizer):
        tokenizer.chat_template = STRICT

    one = changed(tmp_path, strict)
    with pytest.raises(RequestError, match=r"the chat template of '.*' refuses this dialogue: no system turn, please"):
        one.render((Message("system", "Be brief."), USER))
    assert one.render((USER,)) == "[user]Which is it?[/][assistant]"


@pytest.mark.parametrize("ending", ["It is (", "A thought.\n\nSo it is (", "\n\nSo it is ("])
def test_a_template_that_trims_is_gone_on_with(tmp_path, ending):
    def strict(tokenizer):
        tokenizer.chat_template = STRICT

    rendered = changed(tmp_path, strict).render((USER, Message("assistant", ending)))
    assert rendered == f"[user]Which is it?[/][assistant]{ending.strip()}"


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    (make_tiny_model(tmp_path) / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template; use an instruct model, or add chat_template.jinja"):
        ChatTokenizer(ModelConfig(model=str(tmp_path)))
