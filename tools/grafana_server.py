"""The dashboard "server": calls, pages, database, worker and process."""

from __future__ import annotations

from typing import Final

from grafana_panels import STEP, Chart, Number, Query, Section, one, quantiles, rate

SERVER: Final = (
    Section(
        title="Now",
        panels=(
            Number(
                title="Up",
                about="Prometheus reaches the server.",
                expr='min(up{job="glora"})',
                bad=1,
                low=True,
            ),
            Number(
                title="Worker",
                about="The aggregation worker runs.",
                expr="min(glora_worker_up)",
                bad=1,
                low=True,
            ),
            Number(
                title="Uptime",
                about="Since the server was started.",
                expr='time() - max(process_start_time_seconds{job="glora"})',
                unit="s",
            ),
            Number(
                title="Disk free",
                about="Where the data folder lies.",
                expr="min(glora_disk_free_bytes / glora_disk_size_bytes)",
                unit="percentunit",
                bad=0.1,
                low=True,
            ),
            Number(
                title="Database",
                about="Its size.",
                expr="max(glora_database_bytes)",
                unit="bytes",
            ),
            Number(
                title="Next certificate to end",
                about="Of the server or its authority.",
                expr="min(glora_certificate_remaining_seconds)",
                unit="s",
                bad=30 * 86400,
                low=True,
            ),
        ),
    ),
    Section(
        title="Devices (gRPC)",
        panels=(
            Chart(
                title="Calls",
                about="Per second, by method.",
                queries=rate("glora_rpc_requests_total", "method", "{{method}}"),
                unit="reqps",
            ),
            Chart(
                title="Calls that did not end well",
                about="Per second, by status code.",
                queries=one(
                    f'sum by (method, code) (rate(glora_rpc_requests_total{{code!="OK"}}[{STEP}])) > 0',
                    "{{method}} {{code}}",
                ),
                unit="reqps",
            ),
            Chart(
                title="Duration of calls",
                about="95 % are quicker; WaitForWork waits on purpose and is left out.",
                queries=one(
                    "histogram_quantile(0.95, sum by (le, method) "
                    f'(rate(glora_rpc_seconds_bucket{{method!="WaitForWork"}}[{STEP}])))',
                    "{{method}}",
                ),
                unit="s",
            ),
            Chart(
                title="Open questions for work",
                about="Devices whose long poll is being held.",
                queries=one("sum(glora_open_polls)", "open"),
            ),
        ),
    ),
    Section(
        title="People (HTTP)",
        panels=(
            Chart(
                title="Requests",
                about="Per second, by route.",
                queries=rate("glora_http_requests_total", "route", "{{route}}"),
                unit="reqps",
            ),
            Chart(
                title="Refused and failed",
                about="Per second, by route and status from 400 on.",
                queries=one(
                    f'sum by (route, status) (rate(glora_http_requests_total{{status=~"[45].."}}[{STEP}])) > 0',
                    "{{route}} {{status}}",
                ),
                unit="reqps",
            ),
            Chart(
                title="Time to the first byte",
                about="Over all routes; long polls wait on purpose.",
                queries=quantiles("glora_http_seconds"),
                unit="s",
            ),
            Chart(
                title="Browsers and sign-ins",
                about="Open websockets; attempts to sign in per hour.",
                queries=(
                    Query(expr="sum(glora_browser_clients)", legend="browsers"),
                    Query(expr="sum by (outcome) (increase(glora_sign_ins_total[1h]))", legend="sign-ins {{outcome}}"),
                ),
            ),
        ),
    ),
    Section(
        title="Database and disk",
        panels=(
            Chart(
                title="Commits",
                about="Per second.",
                queries=one(f"sum(rate(glora_database_commit_seconds_count[{STEP}]))", "commits"),
                unit="ops",
            ),
            Chart(
                title="Duration of commits",
                about="From begin to commit.",
                queries=quantiles("glora_database_commit_seconds"),
                unit="s",
            ),
            Chart(
                title="Queue and errors",
                about="Changes that wait for the writer, effects that are owed, errors per hour.",
                queries=(
                    Query(expr="sum(glora_database_queued_jobs)", legend="waiting changes"),
                    Query(expr="sum(glora_owed_effects)", legend="owed effects"),
                    Query(
                        expr="sum by (operation, kind) (increase(glora_database_errors_total[1h])) > 0",
                        legend="errors {{operation}} {{kind}}",
                    ),
                ),
            ),
            Chart(
                title="Space",
                about="Free disk, and what the database takes.",
                queries=(
                    Query(expr="min(glora_disk_free_bytes)", legend="free"),
                    Query(expr="max(glora_database_bytes)", legend="database"),
                ),
                unit="bytes",
            ),
        ),
    ),
    Section(
        title="Worker and process",
        panels=(
            Chart(
                title="Worker",
                about="Share of the time that it is busy, jobs that wait for it and that it does, and restarts.",
                queries=(
                    Query(expr=f"sum(rate(glora_worker_busy_seconds_total[{STEP}]))", legend="busy"),
                    Query(expr="sum(glora_worker_queued_jobs)", legend="waiting jobs"),
                    Query(expr=f"sum(rate(glora_worker_jobs_total[{STEP}]))", legend="jobs per second"),
                    Query(expr="sum(increase(glora_worker_restarts_total[1h]))", legend="restarts in the last hour"),
                ),
            ),
            Chart(
                title="Aggregation",
                about="Making a version of a round's updates.",
                queries=quantiles("glora_aggregation_seconds"),
                unit="s",
            ),
            Chart(
                title="Memory",
                about="Resident sizes; the worker is a process of its own.",
                queries=(
                    Query(expr='max(process_resident_memory_bytes{job="glora"})', legend="server"),
                    Query(expr="max(glora_worker_resident_bytes)", legend="worker"),
                    Query(expr="max(glora_worker_peak_bytes)", legend="worker, largest"),
                    Query(expr="max(glora_memory_size_bytes)", legend="there is"),
                ),
                unit="bytes",
            ),
            Chart(
                title="Processor and event loop",
                about="Processors that the server uses; how late its event loop wakes.",
                queries=(
                    Query(expr=f'sum(rate(process_cpu_seconds_total{{job="glora"}}[{STEP}]))', legend="processors"),
                    *quantiles("glora_event_loop_lag_seconds", legend="lag in s,"),
                ),
            ),
        ),
    ),
)
