"""Which of several answers a model finds likeliest: `score` over answers that share conditions, times and noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompts import whole, whole_number
from .scoring_mdm import stratified_error


@dataclass
class ChoiceScores:
    """The answers to one question, scored.

    Args:
        choices: The answers, n of them.
        log_likelihood, standard_error: (n,), of each answer, in nats.
        num_targets: (n,), tokens and patches of each, to normalise by.
        draws: (n, num_samples); the answers share the noise of each column.
    """

    choices: list
    log_likelihood: Tensor
    standard_error: Tensor
    num_targets: Tensor
    draws: Tensor

    @property
    def best(self) -> int:
        """The likeliest answer."""
        return int(self.log_likelihood.argmax())

    def margin(self, first: int, second: int) -> tuple[float, float]:
        """By how many nats answer `first` is likelier than `second`, and the standard error of that: smaller than
        those of the two scores, as most of their noise is the same.

        Raises:
            ValueError: no such answer.
        """
        for index in (first, second):
            if (place := whole(index, 0)) is None or place >= len(self.choices):
                raise ValueError(
                    f"Got answer {index!r} of {len(self.choices)}; need a whole number from 0 to "
                    f"{len(self.choices) - 1}, its place among the choices."
                )
        difference = self.draws[first] - self.draws[second]
        return float(difference.mean()), float(stratified_error(difference))


def score_choices(
    model,
    processor,
    conversations: Sequence[list[dict]],
    choices: Sequence[Sequence[Any]],
    num_samples: int = 32,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
) -> list[ChoiceScores]:
    """Scores every answer to every question.

    Args:
        conversations: Messages that end before the answer, one list a question; no messages are no condition.
        choices: The answers to each: a string is a text, anything else a picture.
        seed: Question i is scored with seed + i, in whatever batch it is.
        batch_size: Rows of one network call, and answers encoded at once.
        max_new_tokens: Length of the text canvas; an answer fills it with </s>.

    Raises:
        ValueError: not as many lists of answers as questions, an empty one, texts and pictures in one list, and what
            processor and `score` refuse.
    """
    seed, batch_size = whole_number("seed", seed, least=0), whole_number("batch_size", batch_size)
    if len(conversations) != len(choices):
        raise ValueError(
            f"Got {len(choices)} lists of choices for {len(conversations)} prompts; need one list a prompt."
        )
    if empty := [i for i, some in enumerate(choices) if not isinstance(some, list | tuple) or not some]:
        raise ValueError(f"Got choices {choices[empty[0]]!r} for prompt {empty[0]}; need a list of one or more.")
    for i, some in enumerate(choices):
        if any(one is None for one in some):
            raise ValueError(f"Got None among the choices for prompt {i}; need texts or pictures; leave it out.")
        if len({isinstance(one, str) for one in some}) > 1:
            raise ValueError(
                f"Got texts and pictures among the choices for prompt {i}; need all of one kind, as the probability "
                "of tokens and the density of pixels cannot be compared; score each kind in a call of its own."
            )
    asked = enumerate(zip(conversations, choices, strict=True))
    rows = [(seed + i, _answered(messages, one)) for i, (messages, some) in asked for one in some]
    seeds, answered = zip(*rows, strict=True)
    draws, errors, counts = score_conversations(
        model, processor, answered, seeds, num_samples, batch_size, max_new_tokens
    )
    sizes = [len(some) for some in choices]
    split = zip(choices, draws.split(sizes), errors.split(sizes), counts.split(sizes), strict=True)
    return [ChoiceScores(list(some), d.mean(1), e, n, d) for some, d, e, n in split]


def score_conversations(
    model,
    processor,
    conversations: Sequence[list[dict]],
    seeds: Sequence[int],
    num_samples: int = 32,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`score` of the last, the assistant's, message of each of n conversations, a batch at a time.

    Args:
        model, processor: Of one checkpoint.
        conversations: Each ends with the assistant's message.
        seeds: One a conversation; equal ones share times and noise.
        num_samples: Draws a conversation.
        batch_size: Rows of one network call.
        max_new_tokens: Length of the text canvas.

    Returns:
        Draws (n, num_samples), whose mean is the score, standard errors (n,), and numbers of targets (n,).
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(conversations), batch_size):
        batch = slice(start, start + batch_size)
        inputs = processor.apply_chat_template(list(conversations[batch]), max_new_tokens=max_new_tokens)
        scored = model.score(
            **inputs.to(model.device),
            seeds=torch.tensor(seeds[batch]),
            num_samples=num_samples,
            batch_size=batch_size,
        )
        counts = scored.num_text_targets + scored.num_image_targets
        parts.append((scored.draws.cpu(), scored.standard_error.cpu(), counts.cpu()))
    draws, errors, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return draws, errors, counts


def _answered(messages: list[dict], choice: Any) -> list[dict]:
    part = {"type": "text", "text": choice} if isinstance(choice, str) else {"type": "image", "image": choice}
    return [*messages, {"role": "assistant", "content": [part]}]
