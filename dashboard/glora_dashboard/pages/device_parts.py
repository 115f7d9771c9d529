"""What pages show of devices, as pure functions from views to markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.forms import row_button
from glora_dashboard.pages.gantt import progress_words
from glora_dashboard.pages.lists import wide_table
from glora_dashboard.pages.parts import anchor, facts, icon, join, pill
from glora_dashboard.pages.signs import work_sign
from glora_server.coordinator.model import DeviceState, Profile
from glora_server.coordinator.views import DeviceView
from glora_server.coordinator.views_history import Contribution, DeviceDetail, DeviceLine, Outcome, WorkView
from glora_server.rounds.ids import RunId

STATE_SIGNS: Final[Mapping[DeviceState, tuple[str, str]]] = {
    DeviceState.PENDING: ("wait", "waits for approval"),
    DeviceState.APPROVED: ("good", "approved"),
    DeviceState.SUSPENDED: ("warn", "suspended"),
    DeviceState.REVOKED: ("bad", "revoked"),
}
_OUTCOME_WORDS: Final[Mapping[Outcome, tuple[str, str]]] = {
    Outcome.ACCEPTED: ("good", "accepted"),
    Outcome.REJECTED: ("bad", "rejected"),
    Outcome.FAILED: ("bad", "failed"),
    Outcome.DECLINED: ("warn", "declined"),
    Outcome.EXPIRED: ("wait", "too late"),
    Outcome.NOT_NEEDED: ("idle", "not needed"),
}
_TAGS_SHOWN: Final = 3
_LOW_RELIABILITY: Final = 0.7
_HEAD: Final = ("Device", "State", "Rank", "Can", "Tags", "Version", "Last seen", "Reliability", "Agreement")


def presence(view: DeviceView) -> Markup:
    """Whether the device is there, and what it does."""
    if view.device.state is not DeviceState.APPROVED:
        return pill(*STATE_SIGNS[view.device.state])
    if view.current is not None:
        return pill(*work_sign(view.current.assignment))
    if view.measuring:
        return pill("active", "measuring")
    return pill("good", "online") if view.online else pill("idle", "away")


def rank(view: DeviceView) -> Markup:
    """The rank that it may use, and what it said that it can do."""
    device = view.device
    if device.declared_rank == device.granted_rank:
        return Markup("{}").format(device.granted_rank)
    return Markup("{}<small>says {}</small>").format(device.granted_rank, device.declared_rank)


def abilities(profile: Profile) -> str:
    """What it works on, in a few words."""
    cores = fmt.count(profile.cpu_count, "core") if profile.cpu_count else ""
    words = [", ".join(profile.accelerators) or cores]
    words.append(fmt.size(profile.memory_bytes) if profile.memory_bytes else "")
    words.append(duties(profile))
    return " · ".join(word for word in words if word)


def duties(profile: Profile) -> str:
    """What it does in a run."""
    if profile.trains and profile.evaluates:
        return "trains and evaluates"
    return "trains" if profile.trains else "evaluates" if profile.evaluates else "does nothing"


def tags(words: Sequence[str], most: int = _TAGS_SHOWN) -> Markup:
    """Tags; how many more there are."""
    shown = [Markup('<span class="tag">{}</span>').format(word) for word in words[:most]]
    if len(words) > most:
        shown.append(
            Markup('<span class="tag" title="{}">+{}</span>').format(", ".join(words[most:]), len(words) - most)
        )
    return Markup('<span class="tags">{}</span>').format(join(shown)) if shown else Markup("–")


def reliability(share: float | None) -> Markup:
    """The share of its rounds that the device did, marked where it is low."""
    if share is None:
        return Markup('<span class="muted">no round yet</span>')
    if share >= _LOW_RELIABILITY:
        return Markup("{}").format(fmt.percent(share, 0))
    return Markup('<span class="sign warn">{}{}</span>').format(icon("warn"), fmt.percent(share, 0))


def agreement(made: Contribution | None) -> Markup:
    """Cosine and capture of one contribution, an outlier with a sign and a word."""
    if made is None or (made.cosine is None and made.capture is None):
        return Markup('<span class="muted">not measured</span>')
    figures = Markup("cosine {}<small>capture {}</small>").format(_two(made.cosine), fmt.percent(made.capture, 0))
    if not made.outlier:
        return figures
    capture = Markup('<span class="nowrap">capture {}</span>').format(fmt.percent(made.capture, 0))
    return Markup('<span class="sign bad">{}outlier</span><small>cosine {}, {}; {}</small>').format(
        icon("warn"), _two(made.cosine), deviation(made), capture
    )


def deviation(made: Contribution) -> str:
    """How far it lies from the others of its round."""
    if made.deviation is None or not math.isfinite(made.deviation):
        return ""
    return f"{made.deviation:.1f} deviations below the others"


def _two(value: float | None) -> str:
    return fmt.NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def devices_table(lines: tuple[DeviceLine, ...], *, operator: bool) -> Markup:
    """A part of the list of devices; operators can approve those that wait."""
    return wide_table(_HEAD, (_row(line, operator=operator) for line in lines), label="Devices")


def _row(line: DeviceLine, *, operator: bool) -> Sequence[str | Markup]:
    view, device = line.device, line.device.device
    platform = Markup("<small>{}</small>").format(device.profile.platform) if device.profile.platform else ""
    approve = row_button("Approve", "approve", device.name, kind="primary", label=f"Approve {device.name}")
    waits = operator and device.state is DeviceState.PENDING
    return (
        Markup("<b>{}</b>{}").format(anchor(device.name, f"/devices/{device.name}"), platform),
        Markup('<span class="state">{}{}</span>').format(presence(view), approve) if waits else presence(view),
        rank(view),
        abilities(device.profile),
        tags(device.tags),
        device.profile.software_version or fmt.NONE,
        Markup('<span class="nowrap">{}</span>').format(fmt.moment(device.last_seen_at)),
        reliability(line.reliability),
        agreement(line.agreement),
    )


def device_facts(view: DeviceView) -> Markup:
    """Everything that is known of a device."""
    device, profile = view.device, view.device.profile
    rows = f"{profile.training_rows:,} to train, {profile.evaluation_rows:,} held out"
    return facts(
        (
            ("Last seen", fmt.moment(device.last_seen_at)),
            ("Rank granted", str(device.granted_rank)),
            ("Rank it says it can do", str(device.declared_rank)),
            ("Tags", tags(device.tags, 64)),
            ("Does", duties(profile)),
            ("Rows", rows if profile.training_rows or profile.evaluation_rows else fmt.NONE),
            ("Task", profile.task.replace("_", " ") or fmt.NONE),
            ("Works for", profile.run_name or "any run that fits"),
            ("Platform", profile.platform or fmt.NONE),
            ("Processor", fmt.count(profile.cpu_count, "core") if profile.cpu_count else fmt.NONE),
            ("Accelerators", ", ".join(profile.accelerators) or "none"),
            ("Memory", fmt.size(profile.memory_bytes) if profile.memory_bytes else fmt.NONE),
            ("Software", profile.software_version or fmt.NONE),
            ("Base model", Markup('<span class="mono">{}</span>').format(profile.fingerprint[:16] or fmt.NONE)),
            ("Enrolled", fmt.moment(device.created_at)),
            ("Certificate ends", fmt.moment(device.certificate_expires_at)),
            ("Id", Markup('<span class="mono">{}</span>').format(device.id)),
        )
    )


def now_doing(view: DeviceView) -> Markup:
    """What the device is doing, as a sentence."""
    if view.device.state is DeviceState.PENDING:
        return Markup("It has joined and waits until an operator approves it.")
    if view.device.state is DeviceState.SUSPENDED:
        return Markup("It is suspended: it gets no work until it is approved again.")
    if view.device.state is DeviceState.REVOKED:
        return Markup("It was revoked for good. To let it in again, let it join with a new token.")
    if view.current is None:
        if view.measuring:
            run = anchor(view.measuring, f"/runs/{view.measuring}")
            return Markup("For {}: measuring what it has sent.").format(run)
        words = "It is online and waits for work." if view.online else "It is not here now."
        return Markup("{}").format(words)
    progress = view.current.progress
    words = progress_words(progress) if progress else work_sign(view.current.assignment)[1]
    return Markup("For {}: {}.").format(anchor(view.current_run, f"/runs/{view.current_run}"), words)


def outcome_counts(detail: DeviceDetail) -> Markup:
    """How its rounds ended, and the share that succeeded."""
    known = [(outcome, detail.outcomes.get(outcome, 0)) for outcome in _OUTCOME_WORDS]
    pills = [
        pill(_OUTCOME_WORDS[outcome][0], f"{number:,} {_OUTCOME_WORDS[outcome][1]}")
        for outcome, number in known
        if number
    ]
    if not pills:
        return Markup('<p class="muted">It was in no round yet.</p>')
    share = f"{fmt.percent(detail.reliability, 0)} reliable" if detail.reliability is not None else ""
    return Markup('<div class="counts"><b>{}</b>{}</div>').format(share, join(pills))


def agreement_table(made: Iterable[Contribution], run_names: Mapping[RunId, str]) -> Markup:
    """Contributions as a table: the same numbers as the chart, for those who do not see it."""
    head = ("Run", "Version", "When", "Share", "Rows", "Norm", "Cosine", "Capture", "Remark")
    return wide_table(head, (_contribution(item, run_names) for item in made), label="Contributions")


def _contribution(item: Contribution, run_names: Mapping[RunId, str]) -> Sequence[str | Markup]:
    name = run_names.get(item.run_id, item.run_id)
    far = Markup('<span class="sign bad">{}outlier</span><small>{}</small>').format(icon("warn"), deviation(item))
    return (
        anchor(name, f"/runs/{name}"),
        str(item.number),
        fmt.moment(item.at),
        fmt.percent(item.share),
        f"{item.rows:,}",
        fmt.number(item.update_norm),
        _two(item.cosine),
        fmt.percent(item.capture),
        far if item.outlier else "",
    )


def history_table(items: tuple[WorkView, ...]) -> Markup:
    """Assignments of a device, newest first."""
    if not items:
        return Markup('<p class="muted">It was given no work yet.</p>')
    head = ("Run", "Round", "Rank", "How it went", "Began", "Took", "Moved", "Why")
    return wide_table(head, map(_work, items), label="History")


def _work(item: WorkView) -> Sequence[str | Markup]:
    assignment = item.view.assignment
    began = assignment.offered_at
    took = None if assignment.closed_at is None else assignment.closed_at - began
    address = f"/runs/{item.run_name}/rounds/{item.round_number}"
    again = f", attempt {item.attempt}" if (item.attempt or 1) > 1 else ""
    moved = f"{fmt.size(item.view.bytes_down)} down, {fmt.size(item.view.bytes_up)} up"
    return (
        anchor(item.run_name, f"/runs/{item.run_name}"),
        anchor(f"{item.round_number}{again}", address) if item.round_number is not None else "evaluation",
        str(assignment.rank or ", ".join(map(str, assignment.ranks)) or fmt.NONE),
        pill(*work_sign(assignment)),
        fmt.moment(began),
        fmt.span(took),
        moved if item.view.bytes_down or item.view.bytes_up else fmt.NONE,
        Markup('<span class="long">{}</span>').format(assignment.message) if assignment.message else "",
    )
