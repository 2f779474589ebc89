"""E prompts as a trainer of TRL's renders and encodes its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from entropy_pl.monitor.discovery import find_tokenizer
from entropy_pl.monitor.prompts import DEFAULT_COLUMN, prompts_in, row_of
from entropy_pl.monitor.rendering import Prompt, Rendering
from entropy_pl.policy.rng import isolated_rng

ENCODING = "_tokenize_prompts"
AT_ONCE = 256  # prompts: a version of TRL pads them to the longest
OF_THE_BATCH = "_batch_environments"


class TrainerPrompts:
    """Makes of prompts what the trainer makes of its own: by its own method, where it has one.

    The template's options, tools and environments are the trainer's. Nothing of the trainer is changed by it, and
    environments are asked for their observations in instances of the probe's own.

    Args:
        trainer: a Trainer; None where it is not known.
        args: its arguments.
        processing_class: its tokenizer or processor.
        tokenizer: of the policy; a trainer that has a way of its own uses its own.
    """

    def __init__(self, trainer: Any, args: Any, processing_class: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._trainer = trainer
        self.warnings: list[str] = []
        """What keeps the prompts from being those that the trainer would make, as sentences."""
        self._encodes = hasattr(trainer, ENCODING)
        self._generates = self._encodes or hasattr(args, "num_generations")  # as TRL's trainers that sample
        options: dict[str, Any] = dict(
            getattr(trainer, "chat_template_kwargs", None) or getattr(args, "chat_template_kwargs", None) or {}
        )
        for name in ("tools", "chat_template"):
            if getattr(trainer, name, None):
                options[name] = getattr(trainer, name)
        own = trainer.processing_class if self._encodes else processing_class
        template = own if isinstance(own, ProcessorMixin) and getattr(own, "chat_template", None) else None
        self.rendering = Rendering(
            find_tokenizer(own, []) if self._encodes else tokenizer,
            template,
            options,
            continues=not self._generates,  # TRL closes an assistant's turn and begins another
        )

    def prompts(self, given: Any, column: str = DEFAULT_COLUMN) -> list[Prompt]:
        """Texts and tokens. A text is without what an environment adds to it.

        Args:
            given: as for :func:`entropy_pl.monitor.prompts.prompts_in`, a file read.
            column: of a dataset, or of rows.

        Raises:
            ValueError: as :meth:`entropy_pl.monitor.rendering.Rendering.prompts`, or for prompts with images, or if
                the trainer's way to render them loses what they say.
        """
        # a dataset may transform its rows at random, an environment may draw: in every process, and if resumed, alike
        with isolated_rng(0):
            raw = prompts_in(given, column)
            ours = self.rendering.prompts(raw)
            if not self._encodes:
                self._say_what_is_unknown(any(not isinstance(prompt, str) for prompt in raw))
                return ours
            rows = [row_of(given, place, column) for place in range(len(raw))]
            _refuse_images(rows)
            try:
                ids = self._by_the_trainer(raw, rows)
            except Exception as error:
                self.warnings.append(
                    f"E prompts are encoded by the tokenizer and its chat template, not by {self._name}, whose "
                    f"{ENCODING} did not take them ({type(error).__name__}: {error}): they may differ from the run's"
                )
                return ours
        made = [Prompt(prompt.text, ids[place]) for place, prompt in enumerate(ours)]
        self._refuse_lost(made, raw)
        return made

    @property
    def _name(self) -> str:
        return type(self._trainer).__name__

    def _say_what_is_unknown(self, chats: bool) -> None:
        if self._trainer is not None and self._generates:
            self.warnings.append(
                f"E prompts are encoded by the tokenizer and its chat template, not by {self._name}, which has no "
                f"{ENCODING}: they may differ from the run's"
            )
        elif chats and self._generates:
            self.warnings.append(
                "E prompts are rendered by the tokenizer's chat template, without tools or environments, of which the "
                "probe does not know as long as it is not told its trainer: "
                "EntropyProbeTrainerCallback(..., trainer=trainer)"
            )

    def _by_the_trainer(self, raw: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, ...]]:
        """Tokens by place."""
        trainer = self._trainer
        prompts = copy.deepcopy(list(raw))
        names: list[str | None] = [None] * len(raw)
        factories = getattr(trainer, "environment_factories", None)
        if factories is not None:
            if getattr(trainer, "_multi_environment", False):
                names = [row.get("environment") for row in rows]
            self._observe(prompts, rows, names, factories)
        elif getattr(trainer, "environments", None):
            self._warn_of_environments("this version of TRL makes none for the probe")
        if getattr(trainer, "rollout_func", None) is not None:
            self.warnings.append(
                f"E prompts are encoded as {self._name} encodes prompts without its rollout_func, which makes tokens "
                "of them in a way of its own: they may differ from the run's"
            )
        found: dict[int, tuple[int, ...]] = {}
        strings = [place for place, prompt in enumerate(raw) if isinstance(prompt, str)]
        chats = [place for place, prompt in enumerate(raw) if not isinstance(prompt, str)]
        for places in (strings, chats):  # the method looks at the first one alone to tell which they are
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                with self._environments_of([names[place] for place in some], factories is not None):
                    encoded = getattr(trainer, ENCODING)([prompts[place] for place in some])[0]
                found |= {place: tuple(map(int, ids)) for place, ids in zip(some, encoded, strict=True)}
        return found

    def _observe(
        self,
        prompts: list[Any],
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str | None],
        factories: Mapping[str | None, Any],
    ) -> None:
        """Add to each prompt what an environment says of its row when it is reset, as TRL does."""
        environments: dict[str | None, Any] = {}
        try:
            for place, name in enumerate(names):
                if name not in environments:
                    environments[name] = factories[name]()
                given = {key: value for key, value in rows[place].items() if name is None or key != "environment"}
                observation = environments[name].reset(**copy.deepcopy(given))
                if observation is not None:
                    prompts[place] = _with_observation(prompts[place], observation)
        except Exception as error:
            self._warn_of_environments(f"{type(error).__name__}: {error}")

    def _warn_of_environments(self, why: str) -> None:
        self.warnings.append(
            f"E prompts are without what the run's environments add to them when they are reset ({why}): where they "
            "add anything, the prompts differ from the run's"
        )

    @contextmanager
    def _environments_of(self, names: list[str | None], known: bool) -> Iterator[None]:
        """Tell the trainer's method whose tools each prompt has; the batch under way keeps its own."""
        kept = vars(self._trainer)
        before = {OF_THE_BATCH: kept[OF_THE_BATCH]} if OF_THE_BATCH in kept else {}
        try:
            if known:
                kept[OF_THE_BATCH] = names
            yield
        finally:
            if known:
                kept.pop(OF_THE_BATCH)
                kept.update(before)

    def _refuse_lost(self, made: Sequence[Prompt], raw: Sequence[Any]) -> None:
        """Refuse prompts that were different before the trainer rendered them, and are the same behind it."""
        known: dict[tuple[int, ...], str] = {}
        for prompt, given in zip(made, raw, strict=True):
            if known.setdefault(prompt.ids, prompt.text) != prompt.text and self.rendering.needs_parts(given):
                raise ValueError(
                    f"expected {self._name} to render different prompts differently, got the same tokens for several: "
                    f"the chat template of {self.rendering.template_name} reads a message's content as a list of parts "
                    "and loses it where it is a string, in the run's own prompts too. Give content as "
                    "[{'type': 'text', 'text': ...}] in both"
                )


def _refuse_images(rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        if any(row.get(name) not in (None, []) for name in ("image", "images")):
            raise ValueError(
                f"expected E prompts of text alone, got prompt {place} with images, which the probe does not give to "
                "the policy: leave such prompts out"
            )


def _with_observation(prompt: Any, observation: Any) -> Any:
    """The prompt, its last message followed by what was observed; strings and lists of parts become lists."""
    content = prompt[-1]["content"]
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    return [*prompt[:-1], {**prompt[-1], "content": content + observation}]
