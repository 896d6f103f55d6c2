"""The agent's configuration: file, environment, and all faults at once."""

from pathlib import Path

import pytest

from holdfast_agent.config import ConfigFaulty, load, split_address

GOOD = """
host = "h1"
controllers = ["http://127.0.0.1:1"]
peer_listen = "127.0.0.1:7701"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_three_settings_are_enough(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert config.host == "h1"
    assert config.heartbeat_ms == 1000


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = """
host = "NOT A NAME"
controllers = []
peer_listen = "nowhere"
heartbeat_ms = 5
colour = "red"
"""
    with pytest.raises(ConfigFaulty) as raised:
        load(written(tmp_path, text))
    for name in ("agent.toml", "host", "controllers", "peer_listen", "heartbeat_ms", "colour"):
        assert name in str(raised.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigFaulty, match="peer_listen: Field required"):
        load(written(tmp_path, 'host = "h1"\ncontrollers = ["http://127.0.0.1:1"]\n'))


def test_a_file_that_is_no_toml_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigFaulty, match=r"agent\.toml"):
        load(written(tmp_path, "host = "))
    with pytest.raises(ConfigFaulty, match="No such file"):
        load(tmp_path / "none.toml")


def test_the_environment_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_AGENT_HOST", "h2")
    monkeypatch.setenv("HOLDFAST_AGENT_CONTROLLERS", "http://127.0.0.1:1,http://127.0.0.1:2")
    monkeypatch.setenv("HOLDFAST_AGENT_HEARTBEAT_MS", "500")
    config = load(written(tmp_path, GOOD))
    assert config.host == "h2"
    assert config.controllers == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert config.heartbeat_ms == 500


def test_a_fault_in_the_environment_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_AGENT_EXAMINE_MS", "often")
    with pytest.raises(ConfigFaulty, match="examine_ms"):
        load(written(tmp_path, GOOD))


@pytest.mark.parametrize("value", ["", "host", "host:", "host:x", "host:-1", "host:65536"])
def test_what_is_no_address_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="not address:port"):
        split_address(value)


def test_an_address_is_split() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[fd00::1]:65535") == ("fd00::1", 65535)
