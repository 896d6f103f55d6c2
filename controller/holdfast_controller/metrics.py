"""What Prometheus may ask of a controller. Touches its own registry only.

Gauges are computed from the world at the scrape. `exposition` takes tens of milliseconds with many
series, so the route runs it in a thread; it works on a snapshot.
"""

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from holdfast_api.words import Phase
from holdfast_controller.core.view import View

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)


class Metrics:
    """Counters of one controller process."""

    def __init__(self) -> None:
        """Register everything at zero."""
        self._registry = CollectorRegistry()
        self.requests = Histogram(
            "holdfast_http_request_seconds",
            "Time from a request to the end of its answer, by route.",
            ["method", "route", "status"],
            registry=self._registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.claims = Counter(
            "holdfast_claims",
            "Claims decided: won or lost; refused are those that no side may make.",
            ["outcome"],
            registry=self._registry,
        )
        self.planner_passes = Counter(
            "holdfast_planner_passes", "Passes of the planner.", registry=self._registry
        )
        self.planner_steps = Counter(
            "holdfast_planner_steps",
            "Steps carried out, by kind of event; `overtaken` are those whose record had changed.",
            ["outcome"],
            registry=self._registry,
        )
        self.agent_events = Counter(
            "holdfast_agent_events", "Events that agents reported.", registry=self._registry
        )
        for outcome in ("won", "lost", "refused"):
            self.claims.labels(outcome)

    def exposition(self, view: View, *, live: bool, leads: bool, events: int) -> bytes:
        """Return everything in Prometheus' text format. Slow: not on the event loop."""
        gauges = CollectorRegistry()
        gauges.register(_WorldCollector(view, live=live, leads=leads, events=events))
        return generate_latest(self._registry) + generate_latest(gauges)


class _WorldCollector(Collector):
    """Gauges of one snapshot."""

    def __init__(self, view: View, *, live: bool, leads: bool, events: int) -> None:
        self._view = view
        self._live = live
        self._leads = leads
        self._events = events

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield the gauges."""
        yield GaugeMetricFamily(
            "holdfast_store_reachable", "1 while the store answers.", value=float(self._live)
        )
        yield GaugeMetricFamily(
            "holdfast_controller_is_leader",
            "1 for the controller that plans.",
            value=float(self._leads),
        )
        yield GaugeMetricFamily("holdfast_events_kept", "Events in the store.", value=self._events)
        hosts = self._view.hosts.values()
        yield GaugeMetricFamily("holdfast_hosts_known", "Hosts ever seen.", value=len(hosts))
        yield GaugeMetricFamily(
            "holdfast_hosts_alive",
            "Hosts with a living heartbeat.",
            value=sum(host.alive for host in hosts),
        )
        phases = Tally(known.record.phase for known in self._view.protections.values())
        protections = GaugeMetricFamily(
            "holdfast_protections", "Protections by phase.", labels=["phase"]
        )
        for phase in Phase:
            protections.add_metric([phase], phases[phase])
        yield protections
