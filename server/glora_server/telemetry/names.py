"""Every metric of the server: its name, kind, labels and meaning, and nothing else about metrics.

Names are `glora_<thing>_<unit>` in base units. Labels are always present and have few values: methods, codes, phases,
reasons, templates of routes; never a device, a round or an assignment. The name of a run is a label only of gauges that
show runs which go on now; the series go when their run ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """What a metric is for Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric; `name` is what a scrape shows (of a histogram without _bucket, _sum and _count)."""

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()
    meaning: str
    buckets: tuple[float, ...] = ()


_ALL: Final[list[Metric]] = []


def _metric(metric: Metric) -> Metric:
    _ALL.append(metric)
    return metric


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return _metric(Metric(name=name, kind=Kind.COUNTER, labels=labels, meaning=meaning))


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return _metric(Metric(name=name, kind=Kind.GAUGE, labels=labels, meaning=meaning))


def _histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return _metric(Metric(name=name, kind=Kind.HISTOGRAM, labels=labels, meaning=meaning, buckets=buckets))


_CALL_SECONDS: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_PAGE_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_ROUND_SECONDS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_PHASE_SECONDS: Final = (0.1, 0.5, 2.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_WORK_SECONDS: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 1800.0)
_COMMIT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0)
_LAG_SECONDS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)

# Calls and bytes
RPC_REQUESTS: Final = _counter("glora_rpc_requests_total", "gRPC calls that ended, by status code.", "method", "code")
RPC_SECONDS: Final = _histogram(
    "glora_rpc_seconds", "Duration of gRPC calls; WaitForWork waits on purpose.", _CALL_SECONDS, "method"
)
SENT_BYTES: Final = _counter("glora_sent_bytes_total", "Payload bytes that went to devices.", "kind")
RECEIVED_BYTES: Final = _counter("glora_received_bytes_total", "Payload bytes that came from devices.", "kind")
HTTP_REQUESTS: Final = _counter(
    "glora_http_requests_total",
    "HTTP requests that were answered, by template of the route; unmatched is what no route took.",
    "route",
    "method",
    "status",
)
HTTP_SECONDS: Final = _histogram(
    "glora_http_seconds",
    "From an HTTP request to the first byte of its answer; long polls wait on purpose.",
    _PAGE_SECONDS,
    "route",
    "method",
)
BROWSER_CLIENTS: Final = _gauge("glora_browser_clients", "Websockets of browsers that are open.")
SIGN_INS: Final = _counter(
    "glora_sign_ins_total", "Attempts to sign in: accepted, refused, or not tried because of too many.", "outcome"
)

# Rounds and what they are made of
ROUNDS: Final = _counter("glora_rounds_total", "Rounds that ended, by how.", "outcome")
ROUND_SECONDS: Final = _histogram(
    "glora_round_seconds", "From the opening of a committed round to its end.", _ROUND_SECONDS
)
ASSIGNMENTS: Final = _counter(
    "glora_assignments_total",
    "Training assignments that ended, by how and why; reason is empty for accepted_update.",
    "outcome",
    "reason",
)
UPLOADS: Final = _counter(
    "glora_uploads_total",
    "Whole updates by what became of them: accepted, rejected, discarded; reason is empty for accepted.",
    "outcome",
    "reason",
)
PHASE_SECONDS: Final = _histogram(
    "glora_phase_seconds",
    "Time in each step of a round: accept (an offer), download, train, upload, validate, aggregate, commit.",
    _PHASE_SECONDS,
    "phase",
)
AGGREGATION_SECONDS: Final = _histogram(
    "glora_aggregation_seconds",
    "Folding the updates of one round into a new version, its commit included.",
    _WORK_SECONDS,
)
VERSIONS: Final = _counter("glora_versions_total", "Versions that were published.")
ACTIVE_ROUNDS: Final = _gauge("glora_active_rounds", "Rounds that have not ended, by where they stand.", "phase")
OPEN_ASSIGNMENTS: Final = _gauge(
    "glora_open_assignments", "Training assignments of which something is still expected.", "phase"
)

# Runs that go on now
ACTIVE_RUNS: Final = _gauge("glora_active_runs", "Runs that are active or paused.", "phase")
RUN_VERSION: Final = _gauge("glora_run_version", "Number of the run's current version.", "run")
ROUND_WAIT_SECONDS: Final = _gauge(
    "glora_round_wait_seconds", "How long the run's next round has waited to open; 0 while a round is open.", "run"
)
ROUND_OVERDUE_SECONDS: Final = _gauge(
    "glora_round_overdue_seconds", "How long the open round's deadline has passed; 0 before it.", "run"
)
ROUND_UPDATES: Final = _gauge("glora_round_updates", "Accepted updates of the open round.", "run")
ROUND_QUORUM: Final = _gauge("glora_round_quorum", "Updates that the live round needs at least.", "run")
MODEL_LOSS: Final = _gauge(
    "glora_model_loss",
    "Loss of the newest version on rows held out by devices, mean by rows: before or after they trained it, or of the "
    "version itself.",
    "run",
    "phase",
)
MODEL_ACCURACY: Final = _gauge("glora_model_accuracy_ratio", "Accuracy, as glora_model_loss.", "run", "phase")
CAPTURED_ENERGY: Final = _gauge(
    "glora_captured_energy_ratio",
    "Energy of the current version relative to that of the mean update: what was kept, and for strategies that do not "
    "average updates also what they made up; over modules.",
    "run",
    "stat",
)
TRUNCATION_ERROR: Final = _gauge(
    "glora_truncation_error_ratio",
    "Distance of the current version from the mean update, relative to its norm; over modules.",
    "run",
    "stat",
)
AGGREGATION_BIAS: Final = _gauge(
    "glora_aggregation_bias_ratio",
    "The part of the truncation error that no larger rank mends: 0 where updates are averaged; over modules.",
    "run",
    "stat",
)
MEAN_NORM: Final = _gauge("glora_mean_update_norm", "Frobenius norm of the mean update; over modules.", "run", "stat")
EIGENGAP: Final = _gauge(
    "glora_eigengap_ratio",
    "Eigengap where the common space ends, relative to the largest eigenvalue; over modules.",
    "run",
    "stat",
)
PRINCIPAL_ANGLE: Final = _gauge(
    "glora_principal_angle_radians",
    "Largest principal angle between the current and the previous version; over modules.",
    "run",
    "stat",
)
COVERAGE: Final = _gauge(
    "glora_coverage_ratio",
    "Share of the weight of devices that could train the server's last direction; over modules.",
    "run",
    "stat",
)
CONSENSUS: Final = _gauge(
    "glora_consensus_ratio",
    "Cosine between a device's change and the mean change, by weight; over modules.",
    "run",
    "stat",
)
CAPTURE: Final = _gauge(
    "glora_capture_ratio",
    "Part of a device's update inside the common space, mean by weight; over modules.",
    "run",
    "stat",
)
INFLUENCE: Final = _gauge(
    "glora_influence_ratio",
    "How far the mean change would move without a device, relative to it, mean by weight; over modules.",
    "run",
    "stat",
)
EFFECTIVE_RANK: Final = _gauge(
    "glora_effective_rank",
    "exp of the entropy of the current version's singular values: how many directions it really uses; over modules.",
    "run",
    "stat",
)

# Devices, queues and admission
DEVICES: Final = _gauge("glora_devices", "Enrolled devices by state, revoked ones aside.", "state")
ONLINE_DEVICES: Final = _gauge("glora_online_devices", "Devices that were heard of within the last minute.")
WAITING_DEVICES: Final = _gauge("glora_waiting_devices", "Devices that would take work now.")
OPEN_POLLS: Final = _gauge("glora_open_polls", "Questions for work that are being held open.")
UPLOAD_PLACES: Final = _gauge("glora_upload_places", "Fast uploads that are admitted at a time.")
USED_UPLOAD_PLACES: Final = _gauge("glora_used_upload_places", "Places that uploads hold.")
WAITING_UPLOADS: Final = _gauge("glora_waiting_uploads", "Uploads that wait for a place.")
OWED_EFFECTS: Final = _gauge(
    "glora_owed_effects", "Validations, aggregations and clean-ups that were committed and are still to be done."
)

# The worker that aggregates
WORKER_UP: Final = _gauge("glora_worker_up", "1 while the aggregation worker runs, else 0.")
WORKER_RESTARTS: Final = _counter(
    "glora_worker_restarts_total", "Times that the aggregation worker had to be started anew."
)
WORKER_JOBS: Final = _counter("glora_worker_jobs_total", "Jobs that the aggregation worker has done.")
WORKER_BUSY_SECONDS: Final = _counter(
    "glora_worker_busy_seconds_total", "Time that the aggregation worker spent on jobs."
)
WORKER_QUEUE: Final = _gauge("glora_worker_queued_jobs", "Jobs that wait for the aggregation worker.")
WORKER_RESIDENT_BYTES: Final = _gauge(
    "glora_worker_resident_bytes", "Resident size of the aggregation worker now; 0 where the system does not tell."
)
WORKER_PEAK_BYTES: Final = _gauge("glora_worker_peak_bytes", "Largest resident size of the aggregation worker.")

MEMORY_SIZE_BYTES: Final = _gauge(
    "glora_memory_size_bytes", "Memory of the machine, or of the container where that is limited to less."
)

# Database and disk
COMMIT_SECONDS: Final = _histogram(
    "glora_database_commit_seconds", "Transactions that changed something, from begin to commit.", _COMMIT_SECONDS
)
DATABASE_QUEUE: Final = _gauge("glora_database_queued_jobs", "Changes that wait for the thread that writes.")
DATABASE_BYTES: Final = _gauge("glora_database_bytes", "Size of the database, without its write-ahead log.")
DATABASE_ERRORS: Final = _counter(
    "glora_database_errors_total",
    "Errors of the database itself: full, lost (no connection), busy (locks), other.",
    "operation",
    "kind",
)
DISK_FREE_BYTES: Final = _gauge("glora_disk_free_bytes", "Free space where the data folder lies.")
DISK_SIZE_BYTES: Final = _gauge("glora_disk_size_bytes", "Size of the file system where the data folder lies.")

# Certificates
CERTIFICATE_SECONDS: Final = _gauge(
    "glora_certificate_remaining_seconds", "Until the certificate of the server or its authority ends.", "certificate"
)
EXPIRING_DEVICES: Final = _gauge(
    "glora_expiring_devices", "Approved devices with less than a sixth of their certificate's lifetime left."
)

# The process
LOOP_LAG: Final = _histogram(
    "glora_event_loop_lag_seconds", "How late the event loop wakes what asked to be woken.", _LAG_SECONDS
)
BUILD: Final = _metric(
    Metric(name="glora_build_info", kind=Kind.INFO, labels=("version",), meaning="Version of the server.")
)

METRICS: Final = tuple(_ALL)
"""What a scrape shows, beside the usual process_* and python_info, in the order of the table in ARCHITECTURE.md."""


def metric_table() -> str:
    """All metrics as a table in Markdown, for ARCHITECTURE.md."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.meaning} |" for metric in METRICS
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])
