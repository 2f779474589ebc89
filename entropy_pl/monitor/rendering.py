"""Prompts as a run begins with them: the text, and the very tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from entropy_pl.policy.sample import prompt_tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        text: by which it is known: to rewards, to its fingerprint, and among the prompts that the run trains on.
        ids: the tokens that a completion follows.
    """

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Rendering:
    """How texts and tokens are made of strings and chats.

    A string is encoded as the tokenizer encodes texts, its special tokens included. A chat goes through the template,
    which writes what special tokens it wants, and none are added to it. Where a template loses messages that are
    strings (vision-language models' read a list of parts), it is given the parts.

    Args:
        tokenizer: of the policy.
        template: a processor whose ``apply_chat_template`` renders chats; None takes the tokenizer's.
        options: for ``apply_chat_template``, such as ``tools``.
        continues: go on with a chat's last message where it is the assistant's; else its turn is closed and another
            begins.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = True

    def text(self, prompt: Any, index: int) -> str:
        """The text of a string or a chat.

        Args:
            prompt: one of them.
            index: its number, for messages.

        Raises:
            ValueError: for something else, a chat that the template does not take or loses, or one with images.
        """
        return prompt if isinstance(prompt, str) else self._chat_text(prompt, index)[0]

    def needs_parts(self, prompt: Any) -> bool:
        """Whether the template loses this chat's messages as long as they are strings."""
        return not isinstance(prompt, str) and self._chat_text(prompt, 0)[1]

    def prompts(self, given: Sequence[Any]) -> list[Prompt]:
        """Texts and tokens.

        Args:
            given: strings and chats.

        Raises:
            ValueError: as :meth:`text`, or for a prompt without any token.
        """
        texts = [self.text(prompt, index) for index, prompt in enumerate(given)]
        rendered = [text for text, prompt in zip(texts, given, strict=True) if not isinstance(prompt, str)]
        # the template has written the special tokens: the tokenizer's own BOS or EOS would be one too many
        encoded = iter(self.tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else ())
        mixed = [prompt if isinstance(prompt, str) else next(encoded) for prompt in given]
        tokens = prompt_tokens(self.tokenizer, mixed)
        return [Prompt(text, tuple(ids)) for text, ids in zip(texts, tokens, strict=True)]

    def encoded(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """The prompts, strings among them with their tokens.

        Raises:
            ValueError: for a string without any token.
        """
        mixed = [prompt if isinstance(prompt, str) else prompt.ids for prompt in prompts]
        tokens = prompt_tokens(self.tokenizer, mixed)
        return [
            Prompt(prompt, tuple(ids)) if isinstance(prompt, str) else prompt
            for prompt, ids in zip(prompts, tokens, strict=True)
        ]

    @property
    def template_name(self) -> str:
        """Of the template's owner, for messages."""
        owner = self._owner
        return getattr(owner, "name_or_path", None) or self.tokenizer.name_or_path or type(owner).__name__

    @property
    def _owner(self) -> Any:
        return self.tokenizer if self.template is None else self.template

    def _chat_text(self, prompt: Any, index: int) -> tuple[str, bool]:
        """The text of a chat, and whether it took parts to have it."""
        self._check_chat(prompt, index)
        problem = None
        for in_parts, chat in enumerate((prompt, _in_parts(prompt))):
            try:
                text = self._rendered(chat)
                if self._depends_on_content(prompt, chat, text):
                    return text, bool(in_parts)
            except (TemplateError, ValueError) as error:
                problem = problem or error
        if problem is not None:
            raise ValueError(
                f"expected a chat that the tokenizer's template takes, got prompt {index}: {problem}"
            ) from problem
        raise ValueError(
            f"expected a chat template that shows what a message says, got that of {self.template_name}, which loses "
            f"the last message of prompt {index}, as a string and as a list of parts alike: set another chat_template, "
            "or render the prompts and give them as strings"
        )

    def _check_chat(self, prompt: Any, index: int) -> None:
        if not is_chat(prompt):
            raise ValueError(
                f"expected prompt {index} as a string or a chat, [{{'role': ..., 'content': ...}}, ...], got "
                f"{type(prompt).__name__}"
            )
        if not (self._owner.chat_template or self.options.get("chat_template")):
            raise ValueError(
                f"expected a tokenizer with a chat template for the chat in prompt {index}, got "
                f"{type(self._owner).__name__} without one: set tokenizer.chat_template, or give prompts as strings"
            )
        kinds = {part.get("type") for message in prompt for part in _parts(message)} - {"text", None}
        if kinds:
            raise ValueError(
                f"expected prompts of text alone, got prompt {index} with {', '.join(sorted(map(str, kinds)))}, which "
                "the probe does not give to the policy: leave such prompts out"
            )

    def _rendered(self, chat: Sequence[Any]) -> str:
        continued = self.continues and chat[-1]["role"] == "assistant"
        turn = {"add_generation_prompt": not continued, "continue_final_message": continued}
        return str(self._owner.apply_chat_template(chat, tokenize=False, **turn, **self.options))

    def _depends_on_content(self, prompt: Sequence[Any], chat: Sequence[Any], text: str) -> bool:
        """Whether the last message, where it is a string, shows in the text; a template may have changed it."""
        said = prompt[-1].get("content")
        if not isinstance(said, str) or said.strip() in text:
            return True
        other = [*prompt[:-1], {**prompt[-1], "content": f"{said}."}]
        return self._rendered(other if chat is prompt else _in_parts(other)) != text


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages, each with a role, and a content or calls of tools."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(
            isinstance(message, Mapping) and "role" in message and ("content" in message or "tool_calls" in message)
            for message in prompt
        )
    )


def _in_parts(chat: Sequence[Any]) -> list[dict[str, Any]]:
    """The chat with every string as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in chat
    ]


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
