"""The metrics of one server as objects that count, made from their definitions."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

from glora_server.telemetry.names import METRICS, Kind, Metric


class Instruments:
    """Every metric once, found by its definition; two of these count apart."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # One series of every two would only say when the server was started.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client does not annotate it
        self._registry: Final = registry
        self._counters: dict[Metric, Counter] = {}
        self._gauges: dict[Metric, Gauge] = {}
        self._histograms: dict[Metric, Histogram] = {}
        self._infos: dict[Metric, Info] = {}
        for metric in METRICS:
            self._define(metric)

    def counter(self, metric: Metric) -> Counter:
        """The counter of this definition."""
        return self._counters[metric]

    def gauge(self, metric: Metric) -> Gauge:
        """The gauge of this definition."""
        return self._gauges[metric]

    def histogram(self, metric: Metric) -> Histogram:
        """The histogram of this definition."""
        return self._histograms[metric]

    def info(self, metric: Metric) -> Info:
        """The info of this definition."""
        return self._infos[metric]

    def _define(self, metric: Metric) -> None:
        registry = self._registry
        match metric.kind:
            case Kind.COUNTER:
                # prometheus_client adds the suffix by itself.
                name = metric.name.removesuffix("_total")
                self._counters[metric] = Counter(name, metric.meaning, metric.labels, registry=registry)
            case Kind.GAUGE:
                self._gauges[metric] = Gauge(metric.name, metric.meaning, metric.labels, registry=registry)
            case Kind.HISTOGRAM:
                self._histograms[metric] = Histogram(
                    metric.name, metric.meaning, metric.labels, buckets=metric.buckets, registry=registry
                )
            case Kind.INFO:
                self._infos[metric] = Info(metric.name.removesuffix("_info"), metric.meaning, registry=registry)
