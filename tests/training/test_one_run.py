"""One run at a time in a directory: two would mix their checkpoints."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lorasmith.errors import TrainingError
from lorasmith.training.outputs import only_run
from lorasmith.training.run import train
from tests.training.killing import config
from tests.training.tiny import save_tiny, write_rows


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    base, rows = save_tiny(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    made = config(base, rows, tmp_path / "out", steps=3, warmup=0.0)
    made.output.mkdir()
    (made.output / "checkpoint-1").mkdir()  # of the first run, not whole yet for the second
    with (
        only_run(made.output),
        pytest.raises(TrainingError, match="Another run is writing") as caught,
    ):
        train(made, progress=False)
    assert (caught.value.file, caught.value.key) == (str(made.output), "output")
    assert [p.name for p in made.output.iterdir()] == ["checkpoint-1"]
    (made.output / "checkpoint-1").rmdir()
    assert train(made, progress=False).status == "finished"
    assert {p.name for p in tmp_path.iterdir()} <= {"base", "rows.jsonl", "out", ".out.lock"}


@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_one_of_ten_goes_first_and_a_killed_one_makes_room(tmp_path: Path) -> None:
    """By another name of the directory, too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    start, stop = tmp_path / "start", tmp_path / "stop"
    children = []
    for index in range(10):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                while not start.exists():
                    time.sleep(0.001)
                with only_run(tmp_path / ("out" if index % 2 else "link")):
                    code = 0
                    (tmp_path / f"has-{index}").touch()
                    while not stop.exists():
                        time.sleep(0.001)
            except TrainingError:
                code = 3
            finally:
                os._exit(code)
        children.append(child)
    start.touch()
    codes: dict[int, int] = {}
    while len(codes) < 9:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
    assert set(codes.values()) == {3}
    assert len(list(tmp_path.glob("has-*"))) == 1
    (holder,) = set(children) - codes.keys()
    with pytest.raises(TrainingError), only_run(tmp_path / "out"):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with only_run(tmp_path / "link"):
        pass
    assert not list(tmp_path.glob(".*lock"))
