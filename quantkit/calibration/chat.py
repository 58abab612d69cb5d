# SPDX-License-Identifier: Apache-2.0
"""A conversation as text, by the model's own chat template.

Templates of reasoning models drop the `<think>` part of an assistant's turn, because it is not sent back in a
conversation. For calibration it is the part that matters. So such a turn is appended to the generation prompt, which is
how the model writes it.
"""

from collections import Counter

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from quantkit.calibration.sources import Conversation, Document, first_line


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a conversation by the tokenizer's chat template, the last assistant turn kept with its reasoning.

    The template's own rendering is taken unless words of the last turn are missing from it. Raises what the template
    raises: jinja2.TemplateError, TypeError or ValueError.
    """
    text = _apply(conversation, tokenizer, generation=False)
    *history, last = conversation
    if last["role"] != "assistant" or not history or _squeeze(last["content"]) in _squeeze(text):
        return text
    prompt, reply = _apply(history, tokenizer, generation=True), str(last["content"])
    if prompt.rstrip().endswith("<think>"):
        if "</think>" not in reply:
            return text
        reply = reply.lstrip().removeprefix("<think>")
        reply = reply.lstrip("\n") if prompt.endswith("\n") else reply
    return prompt + reply + str(tokenizer.eos_token or "")


def _apply(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, generation: bool) -> str:
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation)
    return str(text)


def _squeeze(text: str) -> str:
    """Drop white space, which templates add and strip freely."""
    return "".join(text.split())


def as_text(document: Document, tok: PreTrainedTokenizerBase, fallbacks: Counter[str]) -> tuple[str, bool]:
    """Text of a document, and whether the tokenizer is to add its special tokens (a template writes its own)."""
    if isinstance(document, str):
        return document, True
    reason = "the tokenizer has no chat template"
    if tok.chat_template:
        try:
            return render(document, tok), False
        except (TemplateError, TypeError, ValueError) as error:
            reason = f"the chat template refused them ({first_line(error)})"
    fallbacks[reason] += 1
    return "\n".join(f"{message['role']}: {message['content']}" for message in document), True


def notes_of_fallbacks(fallbacks: Counter[str]) -> tuple[str, ...]:
    """One note for each reason why conversations were joined without the template."""
    return tuple(
        f"{n} of the conversations joined as plain 'role: content' lines: {reason}"
        for reason, n in sorted(fallbacks.items())
    )
