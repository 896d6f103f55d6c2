"""`/metrics` of one agent: what its workers last reported. Serves HTTP from threads of its own.

The collector reads a snapshot when it is scraped, so a scrape never waits for the event loop and
the loop never for a scrape. One label set for each VM and role on this host: cardinality is bounded
by the VMs that the host holds.
"""

import logging
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from holdfast_agent.config import split_address
from holdfast_api.records import Percentiles, WorkerReport
from holdfast_api.words import HostId

LOGGER = logging.getLogger(__name__)
LABELS = ("host", "vm", "role")


class WorkerCollector(Collector):
    """Turns worker reports into metrics when asked."""

    def __init__(self, host: HostId, reports: Callable[[], tuple[WorkerReport, ...]]) -> None:
        """Ask `reports` at each scrape."""
        self._host = host
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        """Yield all families of the present reports."""
        reports = self._reports()
        yield from self._gauges(reports)
        names = sorted({name for report in reports for name in report.counters})
        for name in names:
            counter = CounterMetricFamily(
                f"holdfast_worker_{name}", f"Sum of {name} of a worker.", labels=LABELS
            )
            for report in reports:
                if name in report.counters:
                    counter.add_metric(self._labels(report), report.counters[name])
            yield counter

    def _gauges(self, reports: tuple[WorkerReport, ...]) -> Iterator[Metric]:
        simple: dict[str, tuple[str, Callable[[WorkerReport], float]]] = {
            "epoch": ("Newest captured epoch.", lambda r: r.epoch),
            "acknowledged_epoch": ("Newest acknowledged epoch.", lambda r: r.acknowledged_epoch),
            "held_bytes": ("Output that waits to be released.", lambda r: r.held_bytes),
            "generation": ("Generation the worker works in.", lambda r: r.generation),
        }
        for name, (text, value_of) in simple.items():
            gauge = GaugeMetricFamily(f"holdfast_worker_{name}", text, labels=LABELS)
            for report in reports:
                gauge.add_metric(self._labels(report), value_of(report))
            yield gauge
        distributions: dict[str, Callable[[WorkerReport], Percentiles]] = {
            "pause_milliseconds": lambda r: r.pause_ms,
            "acknowledgement_milliseconds": lambda r: r.acknowledgement_ms,
            "checkpoint_bytes_recent": lambda r: r.checkpoint_bytes,
        }
        for name, of in distributions.items():
            gauge = GaugeMetricFamily(
                f"holdfast_worker_{name}",
                "Of the last few hundred checkpoints.",
                labels=(*LABELS, "quantile"),
            )
            for report in reports:
                percentiles = of(report)
                for quantile, value in (
                    ("0.5", percentiles.p50),
                    ("0.99", percentiles.p99),
                    ("1", percentiles.max),
                ):
                    gauge.add_metric((*self._labels(report), quantile), value)
            yield gauge

    def _labels(self, report: WorkerReport) -> tuple[str, str, str]:
        return (self._host, report.vm, report.role.value)


def serve_metrics(
    listen: str,
    host: HostId,
    reports: Callable[[], tuple[WorkerReport, ...]],
    refused_peers: Callable[[], float],
    certificate_seconds_left: Callable[[], float] | None = None,
) -> Callable[[], None]:
    """Serve until the returned function is called; an empty `listen` serves nothing."""
    if not listen:
        return lambda: None
    address, port = split_address(listen)
    registry = CollectorRegistry()
    registry.register(WorkerCollector(host, reports))
    refused = Gauge(
        "holdfast_agent_refused_peers",
        "Connections to the peer port that were not let in.",
        registry=registry,
    )
    refused.set_function(refused_peers)
    if certificate_seconds_left is not None:
        left = Gauge(
            "holdfast_agent_certificate_seconds_left",
            "Until the certificate that proves this host to its peers expires.",
            registry=registry,
        )
        left.set_function(certificate_seconds_left)
    server, thread = start_http_server(port, address, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5.0)

    return stop
