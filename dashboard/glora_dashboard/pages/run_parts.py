"""The parts of a run's page, as pure functions from views to markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import quote

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.gantt import progress_words, share_of
from glora_dashboard.pages.lists import wide_table
from glora_dashboard.pages.parts import anchor, bar, facts, join, pill
from glora_dashboard.pages.quality import best_by_version, newest_words
from glora_dashboard.pages.signs import ROUND_TONES, work_sign
from glora_server.coordinator.views import AssignmentView, RoundView, RunView
from glora_server.coordinator.views_plots import Ancestor
from glora_server.rounds.assignment import OPEN, AssignmentPhase
from glora_server.rounds.ids import DeviceId
from glora_server.rounds.round import GATHERING, LIVE
from glora_server.rounds.run import RunPhase

_BUSY_SHOWN: Final = 6


def sentence(view: RunView) -> str:
    """What a run is doing or waits for, in words of the page."""
    run = view.run
    if run.phase is RunPhase.CREATED:
        return "Not started yet: starting it makes the first version and opens rounds."
    if run.phase is RunPhase.COMPLETED and not view.waiting:
        return f"All {fmt.count(run.rounds_done, 'round')} are done. Every version that is kept can be exported."
    return (view.waiting or "It is going on.").replace(" %", "\N{NO-BREAK SPACE}%")


def tiles(view: RunView) -> Markup:
    """The run in five numbers."""
    policy, spec = view.spec.policy, view.spec
    accuracy = best_by_version(view)
    version = fmt.NONE if view.version_number is None else f"{view.version_number:,}"
    cells = (
        ("Rounds done", f"{view.run.rounds_done:,}", f"of {policy.rounds:,}"),
        (
            "Accuracy",
            fmt.percent(accuracy[-1].accuracy if accuracy else None),
            newest_words(accuracy, view.version_number),
        ),
        ("Version", version, ""),
        ("Devices online", f"{view.online_devices:,}", f"of {view.eligible_devices:,} that may train"),
        ("Strategy", spec.strategy.name, f"rank up to {spec.lora.max_rank}"),
    )
    shown = ((name, Markup("{} <small>{}</small>").format(value, more)) for name, value, more in cells)
    return facts(shown, kind="tiles")


def export_link(view: RunView) -> Markup:
    """Where the run's versions are exported; nothing before there is one."""
    if view.version_number is None:
        return Markup("")
    return anchor("Export", f"/exports?run={quote(view.run.name, safe='')}", classes="button")


def this_round(view: RunView) -> Markup:
    """The newest round: how far it is, and what its busiest devices are doing."""
    current = view.round
    if current is None:
        return Markup('<p class="muted">No round was opened yet.</p>')
    round_ = current.round
    wanted = round_.target or current.devices or 1
    timeline = anchor("Timeline of every device", f"/runs/{view.run.name}/rounds/{round_.number}", classes="button")
    head = Markup('<div class="round-head"><b>Round {}</b>{}<span class="muted">{}</span>{}</div>').format(
        round_.number, pill(ROUND_TONES[round_.phase], round_.phase.value), _round_time(current), timeline
    )
    if round_.opened_at is None:
        return head
    done = bar(current.accepted / wanted, label=f"Updates of round {round_.number}", tone=_tone(current))
    words = Markup('<p class="small muted">{} of {} in{}</p>').format(
        current.accepted, fmt.count(wanted, "update"), f", at least {round_.policy.quorum} needed"
    )
    return Markup("{}{}{}{}").format(head, done, words, _busy(current))


def _tone(current: RoundView) -> str:
    return "good" if current.accepted >= current.round.policy.quorum else "active"


def _round_time(current: RoundView) -> Markup:
    round_ = current.round
    if round_.phase in GATHERING and round_.deadline_at is not None:
        return Markup("deadline in {}").format(fmt.moment(round_.deadline_at, mode="until"))
    if round_.phase in LIVE:
        return Markup("for {}").format(fmt.moment(round_.opened_at or round_.created_at, mode="since"))
    return Markup("ended {}, took {}").format(fmt.moment(round_.closed_at), fmt.span(current.seconds))


def _busy(current: RoundView) -> Markup:
    busy = [view for view in current.assignments if view.assignment.is_open]
    if not busy:
        return Markup("")
    rows = join(_busy_row(view) for view in busy[:_BUSY_SHOWN])
    more = sum(many for phase, many in current.counts.items() if phase in OPEN) - _BUSY_SHOWN
    rest = Markup('<li class="muted small">and {} more</li>').format(more) if more > 0 else ""
    return Markup('<ul class="busy">{}{}</ul>').format(rows, rest)


def _busy_row(view: AssignmentView) -> Markup:
    progress = view.progress
    _, word = work_sign(view.assignment)
    waits = view.assignment.phase in {AssignmentPhase.OFFERED, AssignmentPhase.RECEIVED}
    share = 0.0 if waits else share_of(progress) if progress else None
    return Markup('<li data-key="{}"><span>{}</span>{}<span class="muted small">{}</span></li>').format(
        view.assignment.id,
        anchor(view.device_name, f"/devices/{view.device_name}"),
        bar(share, label=f"{view.device_name}: {word}"),
        progress_words(progress) if progress else word,
    )


def rounds_table(run_name: str) -> Callable[[tuple[RoundView, ...]], Markup]:
    """Draws rounds of that run, newest first."""

    def draw(views: tuple[RoundView, ...]) -> Markup:
        if not views:
            return Markup('<p class="muted">No round yet.</p>')
        head = ("Round", "State", "Updates", "Began", "Took", "What happened")
        return wide_table(head, (_round_row(run_name, view) for view in views), label="Rounds")

    return draw


def _round_row(run_name: str, view: RoundView) -> Sequence[str | Markup]:
    round_ = view.round
    attempt = f", attempt {round_.attempt}" if round_.attempt > 1 else ""
    address = f"/runs/{run_name}/rounds/{round_.number}"
    return (
        anchor(f"{round_.number}{attempt}", address if not attempt else f"{address}?attempt={round_.attempt}"),
        pill(ROUND_TONES[round_.phase], round_.phase.value),
        f"{view.accepted:,} of {round_.target or view.devices:,}",
        fmt.moment(round_.opened_at),
        fmt.span(view.seconds),
        Markup('<span class="long">{}</span>').format(round_.message) if round_.message else "",
    )


def ancestry(ancestors: tuple[Ancestor, ...], names: Mapping[DeviceId, str]) -> Markup:
    """Versions with the devices that made them, newest first."""
    if not ancestors:
        return Markup('<p class="muted">No version yet: starting the run makes the first one.</p>')
    return Markup('<ol class="lineage">{}</ol>').format(join(_ancestor(item, names) for item in ancestors))


def _ancestor(item: Ancestor, names: Mapping[DeviceId, str]) -> Markup:
    version = item.version
    born = f"from version {item.parent_number}" if item.parent_number is not None else "the start"
    who = [fmt.count(item.contributors, "device")] if item.contributors else []
    kept = ["tensors dropped"] if version.pruned else []
    return Markup(
        '<li data-key="{}"><span class="dot" aria-hidden="true"></span><b>Version {}</b>'
        '<span class="muted small">{}, {}</span><span class="shares">{}</span><span class="muted small">{}</span></li>'
    ).format(
        version.id, version.number, born, fmt.moment(version.created_at), _shares(item, names), ", ".join(who + kept)
    )


def _shares(item: Ancestor, names: Mapping[DeviceId, str]) -> Markup:
    shown = sum(part.share for part in item.largest)
    pieces = [
        Markup('<i style="flex:{:.4f}" title="{}: {} of the weight"></i>').format(
            part.share, names.get(part.device_id, part.device_id), fmt.percent(part.share)
        )
        for part in item.largest
    ]
    if shown < 0.999 and pieces:
        rest = item.contributors - len(item.largest)
        pieces.append(Markup('<i class="rest" style="flex:{:.4f}" title="{} more"></i>').format(1 - shown, rest))
    return join(pieces)


def settings(view: RunView) -> Markup:
    """What the run was told to do."""
    spec, policy, plan = view.spec, view.spec.policy, view.spec.training
    amount = fmt.count(plan.steps, "step") if plan.steps else f"{plan.epochs:g} epoch{'s' * (plan.epochs != 1)}"
    wanted = fmt.count(policy.target_devices, "device") if policy.target_devices else "every device that is there"
    return facts(
        (
            ("Base model", Markup('<span class="mono">{}</span>').format(spec.model.path)),
            ("Task", spec.model.task.replace("_", " ")),
            ("Adapted modules", ", ".join(spec.model.target_modules)),
            ("Rank", f"up to {spec.lora.max_rank}"),
            ("Strategy", spec.strategy.name),
            ("Training", f"{amount}, batches of {plan.batch_size}, learning rate {plan.learning_rate:g}"),
            ("Rounds", f"{policy.rounds:,}; {wanted}; quorum {policy.quorum}"),
            ("Deadline", f"{fmt.span(policy.deadline_seconds)}, then {fmt.span(policy.grace_seconds)} of grace"),
            ("Created", fmt.moment(view.run.created_at)),
        )
    )
