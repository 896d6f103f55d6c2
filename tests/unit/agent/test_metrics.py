"""`/metrics` over real HTTP, read back by the reference parser."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast_agent.host.metrics import serve_metrics
from holdfast_api.records import Percentiles, WorkerReport
from holdfast_api.words import Role, WorkerPhase

NAMES = ("host", "vm", "role", "quantile")


def report(vm: str, **fields: object) -> WorkerReport:
    return WorkerReport.model_validate(
        {
            "vm": vm,
            "generation": 3,
            "role": Role.PRIMARY,
            "phase": WorkerPhase.PROTECTING,
            "epoch": 12,
            "acknowledged_epoch": 11,
            "held_bytes": 99,
            "pause_ms": Percentiles(p50=1.5, p99=2.5, max=9.0),
            **fields,
        }
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(reports: tuple[WorkerReport, ...]) -> dict[tuple[str, tuple[str, ...]], float]:
    port = free_port()
    stop = serve_metrics(f"127.0.0.1:{port}", "h1", lambda: reports, lambda: 6.0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        stop()
    return {
        (sample.name, tuple(sample.labels[n] for n in NAMES if n in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_worker_has_its_figures_under_its_own_labels() -> None:
    samples = scrape((report("a"), report("b", role=Role.BACKUP, epoch=4)))
    assert samples["holdfast_worker_epoch", ("h1", "a", "primary")] == 12
    assert samples["holdfast_worker_epoch", ("h1", "b", "backup")] == 4
    assert samples["holdfast_worker_acknowledged_epoch", ("h1", "a", "primary")] == 11
    assert samples["holdfast_worker_held_bytes", ("h1", "a", "primary")] == 99
    assert samples["holdfast_worker_generation", ("h1", "a", "primary")] == 3


def test_a_distribution_has_its_quantiles() -> None:
    samples = scrape((report("a"),))
    found = [
        samples["holdfast_worker_pause_milliseconds", ("h1", "a", "primary", q)]
        for q in ("0.5", "0.99", "1")
    ]
    assert found == [1.5, 2.5, 9.0]


def test_counters_of_workers_that_count_different_things_do_not_mix() -> None:
    samples = scrape(
        (report("a", counters={"pages": 7.0}), report("b", counters={"apply_seconds": 0.5}))
    )
    assert samples["holdfast_worker_pages_total", ("h1", "a", "primary")] == 7
    assert samples["holdfast_worker_apply_seconds_total", ("h1", "b", "primary")] == 0.5
    assert ("holdfast_worker_pages_total", ("h1", "b", "primary")) not in samples


def test_a_host_without_workers_answers_all_the_same() -> None:
    samples = scrape(())
    assert not [name for name, _ in samples if name.startswith("holdfast_worker_")]
    assert samples["holdfast_agent_refused_peers", ()] == 6


def test_nothing_listens_without_an_address() -> None:
    serve_metrics("", "h1", tuple, float)()


def test_nothing_listens_any_more_after_the_end() -> None:
    port = free_port()
    serve_metrics(f"127.0.0.1:{port}", "h1", tuple, float)()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        pass
