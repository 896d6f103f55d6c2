"""Options from file and environment; every fault at once."""

from pathlib import Path

import pytest

from holdfast_controller.config import Config, ConfigFaults, load_config


def faults_of(path: Path | None, environment: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigFaults) as caught:
        load_config(path, environment)
    for fault in caught.value.faults:
        assert fault in str(caught.value)
    return caught.value.faults


def test_without_anything_the_defaults_hold() -> None:
    assert load_config(None, {"HOME": "/root"}) == Config()
    assert Config().listen_address == "127.0.0.1"


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text('listen_port = 1\netcd_endpoints = ["a:1"]\nevents_kept = 500\n')
    environment = {
        "HOLDFAST_CONTROLLER_LISTEN_PORT": "2",
        "HOLDFAST_CONTROLLER_ETCD_ENDPOINTS": "b:1,c:2",
    }
    config = load_config(file, environment)
    assert (config.listen_port, config.events_kept) == (2, 500)
    assert config.etcd_endpoints == ("b:1", "c:2")


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text('listen_port = "many"\nheartbeat_ttl_seconds = 1\ncolour = "red"\n')
    faults = faults_of(file, {"HOLDFAST_CONTROLLER_MOOD": "good"})
    assert [fault.split(":")[0] for fault in faults] == [
        "HOLDFAST_CONTROLLER_MOOD",
        "listen_port",
        "heartbeat_ttl_seconds",
        "colour",
    ]


def test_options_that_do_not_fit_each_other_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text(
        f'etcd_user = "u"\netcd_certificate_file = "{tmp_path}/none.crt"\n'
        'planner_interval_seconds = 5.0\netcd_endpoints = ["nowhere", "https://x:1"]\n'
    )
    (fault,) = faults_of(file, {})
    for part in (
        "etcd_user and etcd_password_file",
        "etcd_certificate_file and etcd_key_file",
        "etcd_certificate_file needs etcd_authority_file",
        "planner_interval_seconds must be below",
        "there is no file",
        "'nowhere'",
        "'https://x:1'",
    ):
        assert part in fault


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    assert "can not be read" in faults_of(tmp_path / "none.toml", {})[0]
    bad = tmp_path / "bad.toml"
    bad.write_text("listen_port = \n")
    assert "is not TOML" in faults_of(bad, {})[0]


def test_a_leader_may_fail_to_renew_once(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text("leader_ttl_seconds = 2\netcd_request_timeout_seconds = 1.5\n")
    assert "leader_ttl_seconds must be 1.5 times" in faults_of(file, {})[0]
    file.write_text("leader_ttl_seconds = 3\netcd_request_timeout_seconds = 2.0\n")
    assert load_config(file, {}).leader_ttl_seconds == 3
