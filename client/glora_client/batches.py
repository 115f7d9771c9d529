"""Batches of a round: tokenised, in an order that the seed decides, and ending when the time is over.

`Batches` is the clock of a round. It yields at most the planned number of batches, ends early when the round was
cancelled or the deadline comes near, and tells the agent how far training is. A training function that just loops
over it therefore keeps the deadline without knowing about it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from threading import Event
from typing import Final, Protocol

import torch
from torch import Tensor

from glora_client.data import ClassificationRow, InstructionRow

IGNORED: Final = -100
"""Label of a token that does not count in the loss, as transformers has it."""

Batch = dict[str, Tensor]


class Encoder(Protocol):
    """Turns rows into one batch, padded to its longest row."""

    def __call__(self, indices: Sequence[int]) -> Batch:
        """The rows with these indices as a batch on the training device."""
        ...

    def __len__(self) -> int:
        """How many rows there are."""
        ...


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    pad_token_id: int
    eos_token_id: int | None

    def __call__(self, text: list[str], text_pair: list[str] | None = None, **options: object) -> dict[str, object]:
        """Token ids and masks."""
        ...


class StopReason(Enum):
    """Why the batches ended before the plan's last step."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class RoundControl:
    """What the agent can tell a running job: stop, and by when to be done. Safe to call from another thread."""

    def __init__(self, seconds_left: float | None = None) -> None:
        self._cancelled = Event()
        self._deadline = math.inf
        self.set_seconds_left(seconds_left)

    def cancel(self) -> None:
        """The work is not wanted any more."""
        self._cancelled.set()

    def set_seconds_left(self, seconds: float | None) -> None:
        """Training must end within `seconds` from now; None: no deadline."""
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def cancelled(self) -> bool:
        """Whether the work is not wanted any more."""
        return self._cancelled.is_set()

    def should_stop(self, next_step_seconds: float = 0.0) -> StopReason | None:
        """Why to stop now, given how long (seconds) the next step will take; None to go on."""
        if self._cancelled.is_set():
            return StopReason.CANCELLED
        if time.monotonic() + next_step_seconds > self._deadline:
            return StopReason.DEADLINE
        return None


class ClassificationEncoder:
    """Texts and pairs with one label each."""

    def __init__(
        self, rows: Sequence[ClassificationRow], tokenizer: Tokenizer, max_length: int, device: torch.device
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._device = device
        self._pairs = any(row.text_b is not None for row in rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, indices: Sequence[int]) -> Batch:
        """input_ids, attention_mask and the like (batch, longest), int64; labels (batch,), int64."""
        rows = [self._rows[index] for index in indices]
        encoded = self._tokenizer(
            [row.text for row in rows],
            [row.text_b or "" for row in rows] if self._pairs else None,
            truncation=True,
            max_length=self._max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = {name: value.to(self._device) for name, value in encoded.items() if isinstance(value, Tensor)}
        batch["labels"] = torch.tensor([row.label for row in rows], device=self._device)
        return batch


class InstructionEncoder:
    """Prompts and responses; only the tokens of the response and the end mark count in the loss."""

    def __init__(
        self, rows: Sequence[InstructionRow], tokenizer: Tokenizer, max_length: int, device: torch.device
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._device = device

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, indices: Sequence[int]) -> Batch:
        """input_ids, attention_mask, labels (batch, longest), int64; prompts and padding have the label -100."""
        pairs = [self._tokens(self._rows[index]) for index in indices]
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        ids = torch.full((len(pairs), longest), self._tokenizer.pad_token_id)
        labels = torch.full((len(pairs), longest), IGNORED)
        mask = torch.zeros((len(pairs), longest), dtype=torch.long)
        for line, (prompt, response) in enumerate(pairs):
            end = len(prompt) + len(response)
            ids[line, :end] = torch.tensor(prompt + response)
            labels[line, len(prompt) : end] = torch.tensor(response)
            mask[line, :end] = 1
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def _tokens(self, row: InstructionRow) -> tuple[list[int], list[int]]:
        prompt = self._ids(row.prompt, special=True)
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        response = (self._ids(row.response, special=False) + end)[: max(1, self._max_length - 1)]
        # What stands nearest to the answer matters most, so a long prompt loses its beginning.
        room = self._max_length - len(response)
        return (prompt[-room:] if room > 0 else []), response

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids = self._tokenizer([text], add_special_tokens=special)["input_ids"]
        if not isinstance(ids, list):
            raise TypeError("the tokenizer gave no list of ids")
        return [int(number) for number in ids[0]]


Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps planned, last loss)."""


class Batches:
    """The batches of one round; iterate once. `len` is the planned number of steps."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch_size: int,
        steps: int,
        epochs: float,
        seed: int,
        control: RoundControl,
        progress: Progress = lambda _done, _total, _loss: None,
    ) -> None:
        self._encoder = encoder
        self._batch_size = min(batch_size, len(encoder))
        self._total = steps or max(1, math.ceil(epochs * len(encoder) / self._batch_size))
        self._generator = torch.Generator().manual_seed(seed)
        self._control = control
        self._progress = progress
        self._done = 0
        self._loss = math.nan
        self.stopped: StopReason | None = None
        """Why the batches ended early; None when they did not."""

    def __len__(self) -> int:
        return self._total

    @property
    def done(self) -> int:
        """Steps that were finished: batches that the loop came back from."""
        return self._done

    def report(self, loss: float) -> None:
        """Remember the loss of the step in hand, for the people who watch."""
        self._loss = loss

    def __iter__(self) -> Iterator[Batch]:
        order = self._order()
        seconds = 0.0
        while self._done < self._total:
            self.stopped = self._control.should_stop(seconds)
            if self.stopped is not None:
                return
            started = time.monotonic()
            yield self._encoder([next(order) for _ in range(self._batch_size)])
            seconds = time.monotonic() - started
            self._done += 1
            self._progress(self._done, self._total, self._loss)

    def _order(self) -> Iterator[int]:
        """Row numbers without end: every row once before any comes again, shuffled anew in each pass."""
        while True:
            yield from torch.randperm(len(self._encoder), generator=self._generator).tolist()
