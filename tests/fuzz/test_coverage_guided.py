"""The coverage-guided fuzzer, for a moment: its targets hold, and it would see if they did not."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("coverage_guided.py")
RUNS = 20_000
PROGRAM_SECONDS_MAX = 120


def fuzz(folder: Path, program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *words, f"-artifact_prefix={folder}/"],
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS_MAX,
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize("target", ["header", "payload", "monitor", "command_line"])
def test_nothing_but_what_is_documented_comes_out(target: str, tmp_path: Path) -> None:
    done = fuzz(tmp_path, PROGRAM, target, f"-runs={RUNS}", "-seed=1", "-max_len=4096")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {RUNS} runs" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_documented_is_seen(tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.py"
    guarded = PROGRAM.read_text("utf-8")
    spoilt.write_text(
        guarded.replace("    except ValueError:\n        return", "    finally:\n        pass")
    )
    assert spoilt.read_text("utf-8") != guarded
    done = fuzz(tmp_path, spoilt, "monitor", f"-runs={RUNS}", "-seed=1")
    assert done.returncode != 0
    assert "JSONDecodeError" in done.stdout + done.stderr
