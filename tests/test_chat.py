# SPDX-License-Identifier: Apache-2.0
"""Conversations as text: the model's own template is followed, on every day alike, and cannot do harm."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers.utils.chat_template_utils as transformers_templates

from quantkit.calibration import chat
from quantkit.calibration.chat import ChatTemplate
from quantkit.calibration.load import load, load_eval
from quantkit.calibration.shapes import Conversation
from quantkit.calibration.tokens import TokenSet
from tests.texts import (
    ASSISTANT,
    BOS,
    CHAT,
    EOS,
    KEEPS,
    STRIPS,
    STRIPS_AND_BEGINS,
    USER,
    make_tokenizer,
    write_jsonl,
)

ANSWERED = [CHAT[0], {"role": "assistant", "content": "Four."}]
CALLS: Conversation = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "warmth", "arguments": {"at": "noon"}}}]},
    {"role": "tool", "content": "<20°>"},
    {"role": "assistant", "content": "Twenty.", "reasoning_content": "It says 20."},
]
CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\n"
    "{%- if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}"
    "{% endfor %}{% endif %}"
    "{%- if message.reasoning_content is string %}<think>{{ message.reasoning_content }}</think>{% endif -%}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTED = (
    "{% set ns = namespace(count=0) %}{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}"
    "{% endif %}{% set ns.count = ns.count + 1 %}{% generation %}{{ ns.count }}:{{ m.content | trim }}"
    "{% endgeneration %}{{ dict(a=1) | tojson(indent=1) }}{% endfor %}{% if tools %}tools{% endif %}{{ eos_token }}"
)
DATED = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
LLAMA = (  # as in Llama 3.2
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}Today: {{ date_string }}\n{% for m in messages %}{{ m.content }}{% endfor %}"
)


def text_of(conversation: Conversation, source: str) -> str:
    with ChatTemplate(make_tokenizer(template=source)) as template:
        text, special = template.as_text(conversation)
        assert not special, template.notes()
        return text


def notes_of(conversation: Conversation, source: Any) -> tuple[str, ...]:
    """The notes, where the template fails and the turns are joined as plain lines."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = source
    with ChatTemplate(tokenizer) as template:
        text, special = template.as_text(conversation)
    assert special
    assert text == "\n".join(f"{message['role']}: {message['content']}" for message in conversation)
    return template.notes()


def tokens_of(path: Path, template: str, **options: Any) -> TokenSet:
    sizes = {"samples": 2, "seqlen": 32, "seed": 0, "vocab_size": 400, **options}
    return load(str(path), lambda: make_tokenizer(template=template), **sizes)


# The model's own form


@pytest.mark.parametrize("source", [KEEPS, STRIPS, STRIPS_AND_BEGINS, CHATML, COUNTED])
@pytest.mark.parametrize("conversation", [ANSWERED, ANSWERED[:1], CALLS])
def test_text_is_that_of_transformers(source: str, conversation: Conversation) -> None:
    if conversation is CALLS and source not in (CHATML, COUNTED):
        pytest.skip("a template without tools")
    expected = make_tokenizer(template=source).apply_chat_template(conversation, tokenize=False)
    assert text_of(conversation, source) == expected


@pytest.mark.parametrize("source", [KEEPS, STRIPS, STRIPS_AND_BEGINS])
def test_reasoning_survives_the_template(source: str) -> None:
    expected = f"{BOS}{USER}What is two and two?{ASSISTANT}{CHAT[1]['content']}{EOS}"
    assert text_of(CHAT, source).rstrip("\n") == expected


def test_reasoning_without_its_opening_is_continued_from_the_prompt() -> None:
    conversation = [CHAT[0], {"role": "assistant", "content": "Four.\n</think>\n\n4"}]
    text = text_of(conversation, STRIPS_AND_BEGINS)
    assert text.endswith(f"{ASSISTANT}<think>\nFour.\n</think>\n\n4{EOS}")


def test_answer_without_reasoning_is_the_templates_own() -> None:
    assert text_of(ANSWERED, STRIPS_AND_BEGINS).endswith(f"{ASSISTANT}Four.{EOS}\n")
    assert text_of(CHAT[:1], STRIPS_AND_BEGINS) == f"{BOS}{USER}What is two and two?"


@pytest.mark.parametrize("source", [KEEPS, STRIPS_AND_BEGINS])
def test_conversations_get_bos_and_eos_once(tmp_path: Path, source: str) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 12)
    text = make_tokenizer().decode(tokens_of(path, source, samples=1, seqlen=400).input_ids[0])
    assert isinstance(text, str)
    assert text.count(BOS) >= 4
    assert text.count("<think>") == text.count(BOS)
    assert BOS + BOS not in text
    assert EOS + EOS not in text.replace("\n", "")


def test_missing_template_is_recorded() -> None:
    (note,) = notes_of(CHAT, None)
    assert note.endswith("plain 'role: content' lines: the tokenizer has no chat template")


def test_refusing_template_is_recorded(tmp_path: Path) -> None:
    refused = [{"role": "system", "content": "Be brief."}, *CHAT]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": refused}])
    (note,) = tokens_of(path, KEEPS, seqlen=40).notes
    assert note.startswith("1 of the conversations")
    assert "no such role: system" in note


# The date


class Later:
    """A clock that is some years ahead."""

    @staticmethod
    def now() -> Any:
        import datetime

        return datetime.datetime(2031, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("source", [DATED, LLAMA])
def test_ids_are_the_same_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": ANSWERED}] * 9)

    def sets() -> list[TokenSet]:
        tokenizer = make_tokenizer(template=source)
        return [tokens_of(path, source), load_eval(str(path), lambda: tokenizer, seqlen=32, vocab_size=400)]

    today = sets()
    monkeypatch.setattr(transformers_templates, "datetime", Later)
    for now, then in zip(sets(), today, strict=True):
        assert now.sha256 == then.sha256
        assert "26 Jul 2024" in now.protocol
        assert "26 Jul 2024" in make_tokenizer().decode(now.input_ids.flatten())


def test_the_date_is_recorded_only_where_it_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": ANSWERED}] * 9)
    assert "2024" not in tokens_of(path, KEEPS).protocol


def test_random_choices_are_the_same_every_time() -> None:
    source = "{{ range(1000) | random }} {{ lipsum(1, false, 5, 9) }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert text_of(ANSWERED, source) == text_of(ANSWERED, source)


# Harm


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 10.0 ** 400 }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ 'a' * 10 ** 17 }}", "MemoryError"),
        ("{{ messages[5].content.text }}", "no element 5"),
        ("{{ {}['a']['b'] }}", "no attribute 'a'"),
        ("{% for %}", "xpected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% include 'file' %}", "loader"),
        ("{{ 'a' * 10 ** 7 }}", "it makes 10000000 characters"),
        (5, "expected text, got int"),
        ({"a": "x", "b": "y"}, "no default"),
    ],
)
def test_what_a_template_raises_is_a_note(source: Any, reason: str) -> None:
    (note,) = notes_of(ANSWERED, source)
    assert note.startswith("1 of the conversations joined as plain 'role: content' lines: the chat template refused")
    assert reason in note
    assert note.isprintable()


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (ENDLESS, "runs for more than"),
        ("{{ 'a' * 10 ** 10 }}", "MiB of memory"),
        ("{% for i in range(9) %}{{ 'a'.ljust(10 ** 9 + i) }}{% endfor %}", "MiB of memory"),
    ],
)
def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    monkeypatch.setattr(chat, "MEMORY", 100 << 20)
    tokenizer = make_tokenizer(template=source)
    with ChatTemplate(tokenizer) as template:
        for _ in range(3):
            assert template.as_text(ANSWERED)[1]
    (note,) = template.notes()
    assert note.startswith("3 of the conversations")
    assert reason in note


def test_no_process_is_left_behind() -> None:
    before = {process.pid for process in psutil.Process().children()}
    with ChatTemplate(make_tokenizer(template=KEEPS)) as template:
        template.as_text(ANSWERED)
        assert len({process.pid for process in psutil.Process().children()} - before) == 1
    assert {process.pid for process in psutil.Process().children()} == before
