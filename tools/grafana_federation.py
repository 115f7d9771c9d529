"""The dashboard "federation": rounds, quality and consensus, devices and transfer."""

from __future__ import annotations

from typing import Final

from grafana_panels import STEP, Chart, Number, Query, Section, by_run, of_model, one, quantiles, rate

FEDERATION: Final = (
    Section(
        title="Now",
        panels=(
            Number(
                title="Runs",
                about="Runs that are active.",
                expr='sum(glora_active_runs{phase="active"})',
            ),
            Number(
                title="Devices online",
                about="Heard of within the last minute.",
                expr="sum(glora_online_devices)",
            ),
            Number(
                title="Longest wait",
                about="The longest that a run has waited for its next round to open.",
                expr="max(glora_round_wait_seconds)",
                unit="s",
                bad=1800,
            ),
            Number(
                title="Overdue",
                about="How long the deadline of an open round has passed.",
                expr="max(glora_round_overdue_seconds)",
                unit="s",
                bad=900,
            ),
            Number(
                title="Rounds that failed (24 h)",
                about="Attempts at rounds that ended without a version.",
                expr='sum(increase(glora_rounds_total{outcome="failed"}[24h]))',
                bad=1,
            ),
            Number(
                title="Updates rejected (24 h)",
                about="Updates that failed validation.",
                expr='sum(increase(glora_uploads_total{outcome="rejected"}[24h]))',
                bad=3,
            ),
        ),
    ),
    Section(
        title="Rounds",
        panels=(
            Chart(title="Version", about="Number of each run's version.", queries=one("glora_run_version", "{{run}}")),
            Chart(
                title="Rounds by outcome",
                about="Rounds that ended, per hour.",
                queries=one("sum by (outcome) (increase(glora_rounds_total[1h]))", "{{outcome}}"),
                stacked=True,
            ),
            Chart(
                title="Live rounds",
                about="By where they stand; planned is a round that waits to open.",
                queries=one("sum by (phase) (glora_active_rounds)", "{{phase}}"),
                stacked=True,
            ),
            Chart(
                title="Duration of rounds",
                about="From opening to commit, rounds that made a version.",
                queries=quantiles("glora_round_seconds"),
                unit="s",
            ),
            Chart(
                title="Updates of the open round",
                about="Accepted so far, and how many the round needs.",
                queries=(
                    Query(expr='glora_round_updates{run=~"$run"}', legend="{{run}} accepted"),
                    Query(expr='glora_round_quorum{run=~"$run"}', legend="{{run}} needed"),
                ),
            ),
            Chart(
                title="Open assignments",
                about="Where devices at work stand.",
                queries=one("sum by (phase) (glora_open_assignments)", "{{phase}}"),
                stacked=True,
            ),
            Chart(
                title="Steps of a round",
                about="How long half of the devices take for each step; aggregate and commit are the server's.",
                queries=one(
                    f"histogram_quantile(0.5, sum by (le, phase) (rate(glora_phase_seconds_bucket[{STEP}])))",
                    "{{phase}}",
                ),
                unit="s",
            ),
            Chart(
                title="Assignments that ended badly",
                about="Per hour, by how and why.",
                queries=one(
                    'sum by (outcome, reason) (increase(glora_assignments_total{outcome!="accepted_update"}[1h])) > 0',
                    "{{outcome}} {{reason}}",
                ),
                stacked=True,
            ),
        ),
    ),
    Section(
        title="Quality and consensus",
        panels=(
            Chart(
                title="Loss on held-out rows",
                about="Of the newest version that was measured, before and after training, and by evaluators.",
                queries=of_model("glora_model_loss"),
            ),
            Chart(
                title="Accuracy on held-out rows",
                about="As the loss.",
                queries=of_model("glora_model_accuracy_ratio"),
                unit="percentunit",
                top=1.0,
            ),
            Chart(
                title="Consensus",
                about="Cosine between a device's change and the mean change. 1: all want the same.",
                queries=by_run("glora_consensus_ratio", "mean", "min"),
                bottom=-1,
                top=1.0,
            ),
            Chart(
                title="Captured energy",
                about="How much of the mean update the server's rank could keep. 1: all of it.",
                queries=by_run("glora_captured_energy_ratio", "mean", "min"),
                unit="percentunit",
                top=1.0,
            ),
            Chart(
                title="Truncation error and eigengap",
                about="What is lost of the mean update, how much of that no larger rank would mend, and how clearly "
                "the kept directions stand out.",
                queries=(
                    *by_run("glora_truncation_error_ratio", "max"),
                    *by_run("glora_aggregation_bias_ratio", "max"),
                    *by_run("glora_eigengap_ratio", "min"),
                ),
            ),
            Chart(
                title="Capture, coverage and influence",
                about="The part of a device's update that the common space holds, the weight of the devices that train "
                "the last direction, and how far the mean change would move without a device.",
                queries=(
                    *by_run("glora_capture_ratio", "min"),
                    *by_run("glora_coverage_ratio", "min"),
                    *by_run("glora_influence_ratio", "max"),
                ),
            ),
            Chart(
                title="Change from version to version",
                about="The largest principal angle between a version and the one before, in radians, and the norm of "
                "the mean update.",
                queries=(
                    *by_run("glora_principal_angle_radians", "max"),
                    *by_run("glora_mean_update_norm", "mean", "max"),
                ),
            ),
            Chart(
                title="Effective rank",
                about="How many directions the versions really use.",
                queries=by_run("glora_effective_rank", "mean", "min", "max"),
            ),
        ),
    ),
    Section(
        title="Devices and transfer",
        panels=(
            Chart(
                title="Devices",
                about="By state, online, and ready for work.",
                queries=(
                    Query(expr="sum by (state) (glora_devices)", legend="{{state}}"),
                    Query(expr="sum(glora_online_devices)", legend="online"),
                    Query(expr="sum(glora_waiting_devices)", legend="ready for work"),
                ),
            ),
            Chart(
                title="Payload",
                about="Adapters to devices, updates from devices.",
                queries=(
                    *rate("glora_sent_bytes_total", "kind", "{{kind}} down"),
                    *rate("glora_received_bytes_total", "kind", "{{kind}} up"),
                ),
                unit="Bps",
            ),
            Chart(
                title="Updates by verdict",
                about="Per hour.",
                queries=one(
                    "sum by (outcome, reason) (increase(glora_uploads_total[1h])) > 0", "{{outcome}} {{reason}}"
                ),
                stacked=True,
            ),
            Chart(
                title="Admission of uploads",
                about="Places that fast uploads hold, and uploads that wait for one.",
                queries=(
                    Query(expr="sum(glora_used_upload_places)", legend="in use"),
                    Query(expr="sum(glora_waiting_uploads)", legend="waiting"),
                    Query(expr="sum(glora_upload_places)", legend="there are"),
                ),
            ),
        ),
    ),
)
