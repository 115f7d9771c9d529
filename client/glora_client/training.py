"""One local round: `fit` trains, `evaluate` measures. `fit` is the one function that people replace with their own.

A replacement is any function `fit(model, batches, plan) -> FitReport`, named on the command line as
`--fit my_module:my_fit`. It gets a peft model whose trainable parameters are marked by `requires_grad`, the batches of
the round (iterate once; the loop ends in time by itself) and the plan:

    def my_fit(model, batches, plan):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=plan.learning_rate)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            batches.report(loss.item())
        return FitReport(steps=batches.done, loss=loss.item())
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glora_client.batches import IGNORED, Batch, Batches, Encoder, RoundControl, StopReason
from glora_client.plan import LocalPlan
from glora_client.pruning import pruning
from glora_wire.errors import GloraError, Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Finished optimizer steps and the mean training loss over the last tenth of them.

    `rank`: send this many leading directions of the adapter only, in runs that let devices shrink; None: all.
    """

    steps: int
    loss: float
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Mean loss (nats per row, or per token for causal models) and share of right predictions over `rows` rows."""

    loss: float
    accuracy: float
    rows: int
    seconds: float


Fit = Callable[[nn.Module, Batches, LocalPlan], FitReport]


def fit(model: nn.Module, batches: Batches, plan: LocalPlan) -> FitReport:
    """Trains in place the parameters that require a gradient and returns what happened.

    A fresh optimizer every round: factor coordinates change with every readout, so old moments would be wrong.
    Raises GloraError TRAINING_DIVERGED when the loss or a gradient is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(plan, len(batches)))
    device = parameters[0].device
    spare = pruning(model, plan.rank, plan.extra)
    model.train()
    losses: list[float] = []
    for batch in batches:
        with _autocast(device, enabled=plan.mixed_precision):
            loss = model(**batch).loss
        value = float(loss.detach())
        (loss if spare is None else loss + spare.penalty()).backward()
        limit = plan.max_grad_norm if plan.max_grad_norm > 0 else math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise diverged(f"the loss was {value} and the gradient's norm {norm} in step {batches.done + 1}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(value)
        batches.report(value)
    recent = losses[-max(1, len(losses) // 10) :]
    return FitReport(
        steps=batches.done,
        loss=sum(recent) / len(recent) if recent else math.nan,
        rank=None if spare is None else spare.rank(),
    )


def run_fit(function: Fit, model: nn.Module, batches: Batches, plan: LocalPlan) -> FitReport:
    """Report of the training function after its promises were checked.

    Raises GloraError DEADLINE_TOO_SHORT when time was over and the plan wants all steps, or no step was finished.
    """
    report = function(model, batches, plan)
    if not isinstance(report, FitReport):
        raise GloraError(
            Reason.TRAINING_FAILED,
            f"The training function returned a {type(report).__name__}, not a glora_client.training.FitReport.",
        )
    if report.rank is not None and not 1 <= report.rank <= plan.rank:
        raise GloraError(
            Reason.TRAINING_FAILED,
            f"The training function wants to send rank {report.rank}; {plan.rank} was granted.",
        )
    if batches.stopped is StopReason.DEADLINE and (not plan.allow_early_stop or report.steps == 0):
        raise GloraError(
            Reason.DEADLINE_TOO_SHORT,
            f"Only {report.steps} of {len(batches)} steps could be done before the deadline"
            + (
                ", and the run does not take updates that stopped early."
                if report.steps
                else "; none is worth sending."
            )
            + " Ask the operator for a longer deadline or fewer steps.",
            steps=report.steps,
            planned=len(batches),
        )
    if report.steps > 0 and not math.isfinite(report.loss):
        raise diverged(f"the training loss was {report.loss}")
    return report


def diverged(what: str) -> GloraError:
    """The error for numbers that are not finite."""
    return GloraError(
        Reason.TRAINING_DIVERGED, f"Training diverged: {what}. A smaller learning rate or fewer local steps will help."
    )


def load_fit(name: str | None) -> Fit:
    """The training function called `module:function`, or the default; raises GloraError CONFIG_INVALID."""
    if name is None:
        return fit
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise GloraError(
            Reason.CONFIG_INVALID,
            f"The training function {name!r} cannot be loaded ({error}); give it as module:function, "
            "importable where the client runs.",
        ) from error
    if not callable(function):
        raise GloraError(Reason.CONFIG_INVALID, f"{name!r} is not a function.")
    return function  # type: ignore[no-any-return]  # checked by run_fit on what it returns


@torch.inference_mode()
def evaluate(
    model: nn.Module, encoder: Encoder, *, batch_size: int, control: RoundControl, mixed_precision: bool = False
) -> EvaluationReport | None:
    """Loss and accuracy over all rows; None when the control said stop before the end. Leaves eval mode on."""
    started = time.monotonic()
    model.eval()
    loss_sum = right = counted = 0.0
    device = next(model.parameters()).device
    for indices in _chunks(len(encoder), batch_size):
        if control.should_stop() is not None:
            return None
        batch = encoder(indices)
        with _autocast(device, enabled=mixed_precision):
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        batch_loss, batch_right, batch_counted = _score(logits.float(), batch)
        loss_sum += batch_loss
        right += batch_right
        counted += batch_counted
    return EvaluationReport(
        loss=loss_sum / max(counted, 1.0),
        accuracy=right / max(counted, 1.0),
        rows=len(encoder),
        seconds=time.monotonic() - started,
    )


def _score(logits: Tensor, batch: Batch) -> tuple[float, float, float]:
    """Summed loss, right predictions and how many counted: rows (batch, classes) or tokens (batch, length, words)."""
    labels = batch["labels"]
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    counts = labels != IGNORED
    logits, labels = logits[counts], labels[counts]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(-1) == labels).sum()
    return float(loss), float(right), float(labels.numel())


def _optimizer(parameters: list[nn.Parameter], plan: LocalPlan) -> torch.optim.Optimizer:
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)


def _learning_rate(plan: LocalPlan, total: int) -> Callable[[int], float]:
    """Factor on the learning rate by step: a linear warm-up, then constant or falling linearly towards zero."""
    warmup = math.ceil(plan.warmup_ratio * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if plan.schedule == "constant":
            return 1.0
        return max(0.0, (total - step) / max(1, total - warmup))

    return factor


def _autocast(device: torch.device, *, enabled: bool) -> contextlib.AbstractContextManager[object]:
    if not enabled:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _chunks(count: int, size: int) -> Iterable[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
