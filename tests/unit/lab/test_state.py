"""What is remembered of a lab between two commands."""

import threading
from pathlib import Path

import pytest

from holdfast_lab import state as module
from holdfast_lab.errors import LabRefused
from holdfast_lab.state import Folder, LabState, lock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(module, "RUN_FOLDER", tmp_path / "labs")
    made = Folder("x")
    with lock():
        made.create(LabState(name="x", components=(), accelerator="tcg"))
    return made


def test_a_change_is_there_for_the_next_reader(folder: Folder) -> None:
    with folder.change() as state:
        state.ports = (7,)
    assert folder.read().ports == (7,)


def stop_halfway(folder: Folder) -> None:
    with folder.change() as state:
        state.ports = (7,)
        raise KeyError("halfway")


def test_a_change_that_fails_halfway_leaves_the_file_as_it_was(folder: Folder) -> None:
    with pytest.raises(KeyError):
        stop_halfway(folder)
    assert folder.read().ports == ()


def test_changes_of_two_users_do_not_swallow_each_other(folder: Folder) -> None:
    def count() -> None:
        for _ in range(50):
            with folder.change() as state:
                state.guests_started += 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.read().guests_started == 200


def test_the_last_lab_takes_the_common_folder_with_it_and_the_lock_still_works(
    folder: Folder,
) -> None:
    with lock():
        folder.remove()
    assert not folder.path.parent.exists()
    with lock():
        assert folder.path.parent.exists()


def test_a_lab_that_is_not_there_and_a_damaged_one_say_what_to_do(folder: Folder) -> None:
    with pytest.raises(LabRefused, match="lab up --name nowhere"):
        Folder("nowhere").read()
    (folder.path / "lab.json").write_text("{")
    with pytest.raises(LabRefused, match="lab down --name x"):
        folder.read()
