"""Runs that SIGTERM and Ctrl-C stop: after the step, or in a batch that takes long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.training import checkpoints, parts, signals, trainer
from lorasmith.training.config import TrainConfig
from lorasmith.training.loss import LossOutput, model_loss_output
from lorasmith.training.records import TrainingInterrupted, TrainResult
from lorasmith.training.run import train
from lorasmith.training.signals import StepGivenUpError, StopSignals
from tests.training.killing import ACCUMULATION, STEPS, Watched, config, differences
from tests.training.processes import LAUNCH, environment, train_in_two
from tests.training.tiny import MULTI, ROWS, write_rows

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no such signals")

HANDLED = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def whole(
    base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    """The run that nothing happened to."""
    made = config(base, rows, tmp_path_factory.mktemp("whole") / "out")
    return made.output, Watched().train(made)


class Sent:
    """Stands for the computation of the loss, and sends a signal in one of its calls.

    Args:
        call: In which, from 1 on; of those of evaluations, if ``evaluating``.
        number: The signal.
        until: The batch is not done before that is there: it takes long.
    """

    def __init__(
        self,
        call: int,
        number: int = signal.SIGTERM,
        until: Path | None = None,
        evaluating: bool = False,
    ) -> None:
        self.call, self.number, self.until, self.evaluating = call, number, until, evaluating
        self.calls = 0
        self.sent = 0.0

    def __call__(self, *arguments: Any, **options: Any) -> LossOutput:
        self.calls += torch.is_grad_enabled() != self.evaluating
        if self.calls == self.call and not self.sent:
            self.sent = time.monotonic()
            os.kill(os.getpid(), self.number)
            _wait_for(lambda: self.until is None or self.until.exists())
        return model_loss_output(*arguments, **options)

    def train(self, made: TrainConfig, *, patience: float) -> TrainingInterrupted:
        """The run, with so much patience for a step."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "model_loss_output", self)
            patch.setattr(signals, "GIVE_UP_AFTER", patience)
            with pytest.raises(TrainingInterrupted) as caught:
                train(made, progress=False)
        return caught.value


def _wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- after the step ----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint(
    base: Path, rows: Path, whole: tuple[Path, TrainResult], tmp_path: Path, number: int, code: int
) -> None:
    handlers = [signal.getsignal(n) for n in HANDLED]
    made = config(base, rows, tmp_path / "out", save_steps=4)
    sending = Sent(2 * ACCUMULATION + 2, number)
    caught = sending.train(made, patience=60.0)
    assert time.monotonic() - sending.sent < 30.0
    assert caught.code == code
    path = tmp_path / "out" / "checkpoint-3"
    assert caught.result.checkpoint == str(path)
    assert checkpoints.defect(path) is None
    assert [signal.getsignal(n) for n in HANDLED] == handlers
    assert not [t for t in threading.enumerate() if t.name == "lorasmith-signals"]
    assert train(made, progress=False).tokens == whole[1].tokens
    # save_steps, which may change, is in the configuration alone.
    assert {d.partition(":")[0] for d in differences(whole[0], made.output)} <= {
        "run_state.json.config.save_steps",
        "trainer_state.json.save_steps",
    }


def test_the_command_says_how_to_go_on(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "model_loss_output", Sent(2 * ACCUMULATION + 2))
    output = tmp_path / "out"
    arguments = [
        *("train", str(base), str(rows), "-o", str(output), "--steps", "8", "--device", "cpu"),
        *("--gradient-accumulation", "2", "--batch-size", "4"),
    ]
    assert main(arguments) == 143
    _, err = capfd.readouterr()
    words = " ".join(err.split())
    assert "finishing the step and writing a checkpoint" in words
    assert f"Stopped after step 3; its checkpoint is {output / 'checkpoint-3'}" in words
    assert "--resume last" in words


# -- in the middle of a batch ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "step"),
    [(1, 0), (2 * ACCUMULATION + 1, 2), (2 * ACCUMULATION + 2, 2), (STEPS * ACCUMULATION, 7)],
)
def test_a_long_batch_is_given_up(
    base: Path, rows: Path, whole: tuple[Path, TrainResult], tmp_path: Path, call: int, step: int
) -> None:
    """What it has drawn and counted is taken back: bit for bit the same, rules and all."""
    made = config(base, rows, tmp_path / "out", save_steps=4)
    path = made.output / f"checkpoint-{step}"
    sending = Sent(call, until=path)
    caught = sending.train(made, patience=0.0)
    assert sending.calls == call  # no other batch
    assert (caught.code, caught.result.steps) == (143, step)
    assert caught.result.checkpoint == str(path)
    assert checkpoints.defect(path) is None
    ended = train(made, progress=False)
    assert ended.tokens == whole[1].tokens
    assert [p.loss for p in ended.losses] == [p.loss for p in whole[1].losses]
    assert {d.partition(":")[0] for d in differences(whole[0], made.output)} <= {
        "run_state.json.config.save_steps",
        "trainer_state.json.save_steps",
    }


def test_the_first_batch_after_a_resume_is_given_up(
    base: Path, rows: Path, whole: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    """Its checkpoint is that which it came from, written anew."""
    made = config(base, rows, tmp_path / "out")
    path = made.output / "checkpoint-3"
    Sent(3 * ACCUMULATION + 1, until=path).train(made, patience=0.0)
    first = json.loads((path / checkpoints.MANIFEST).read_text())["files"]
    # It is there already: what is awaited is another one in its place.
    inode = path.stat().st_ino
    sending = Sent(1, until=None)
    again = _Replaced(path, inode)
    sending.until = again  # type: ignore[assignment]
    caught = sending.train(made, patience=0.0)
    assert caught.result.checkpoint == str(path)
    second = json.loads((path / checkpoints.MANIFEST).read_text())["files"]
    same = {name for name in first if first[name] == second[name]}
    assert same >= {n for n in first if n.endswith(".safetensors")} | {"trainer_state.json"}
    train(made, progress=False)
    assert differences(whole[0], made.output) == []


class _Replaced:
    def __init__(self, path: Path, inode: int) -> None:
        self.path, self.inode = path, inode

    def exists(self) -> bool:
        """Whether another directory is there now, whole."""
        return self.path.stat().st_ino != self.inode


@pytest.mark.parametrize("which", ["first", "second", "last"])
def test_a_long_evaluation_is_given_up(base: Path, rows: Path, tmp_path: Path, which: str) -> None:
    """That after the last step, too: the resumed run evaluates, and saves the adapter."""
    options: dict[str, Any] = {
        "eval_split": 0.4,
        "eval_batch_size": 4,
        "eval_steps": 3,
        "save_steps": 100,
    }
    unbroken = config(base, rows, tmp_path / "whole", **options)
    watched = Watched()
    watched.train(unbroken)
    # Three evaluations, after steps 3, 6 and 8.
    batches = (len(watched.batches) - STEPS * ACCUMULATION) // 3
    assert batches > 1
    call, step = {"first": (1, 3), "second": (2, 3), "last": (2 * batches + 1, 8)}[which]
    made = config(base, rows, tmp_path / "out", **options)
    path = made.output / f"checkpoint-{step}"
    caught = Sent(call, until=path, evaluating=True).train(made, patience=0.0)
    assert caught.result.checkpoint == str(path)
    assert caught.result.adapter_path is None
    ended = train(made, progress=False)
    assert [e.step for e in ended.evaluations] == [3, 6, 8]
    first, second = (ls.read_adapter(p) for p in (unbroken.output, made.output))
    for module in first.modules:
        for name, value in first.state(module).values.items():
            assert torch.equal(value, second.state(module).values[name])


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_the_evaluation_that_a_resume_begins_with(
    base: Path, rows: Path, tmp_path: Path, patience: float
) -> None:
    """Stopped there again, given up or not: its checkpoint is that which it came from."""
    options: dict[str, Any] = {"eval_split": 0.4, "eval_batch_size": 4, "eval_steps": 3}
    unbroken = config(base, rows, tmp_path / "whole", **options)
    Watched().train(unbroken)
    made = config(base, rows, tmp_path / "out", **options)
    path = made.output / "checkpoint-3"
    Sent(1, until=path, evaluating=True).train(made, patience=0.0)
    sending = Sent(1, evaluating=True)
    if patience == 0.0:
        sending.until = _Replaced(path, path.stat().st_ino)  # type: ignore[assignment]
    caught = sending.train(made, patience=patience)
    assert (sending.calls, caught.result.checkpoint) == (1, str(path))
    ended = train(made, progress=False)
    assert [e.step for e in ended.evaluations] == [3, 6, 8]
    assert differences(unbroken.output, made.output) == []


@pytest.mark.parametrize("call", [1, 6, 11])
def test_tasks_that_are_met_in_the_batch(base: Path, tmp_path: Path, call: int) -> None:
    """Stress keeps which tasks there are, in whatever mode it is."""
    rows = [{**row, "task": "long" if i % 3 == 0 else "short"} for i, row in enumerate(ROWS)]
    data = write_rows(tmp_path / "tasks.jsonl", rows)
    options: dict[str, Any] = {
        "dynamics": ("gauge", "stress"),
        "dynamics_options": {"stress": MULTI},
        "save_steps": 100,
    }
    unbroken = config(base, data, tmp_path / "whole", **options)
    Watched().train(unbroken)
    made = config(base, data, tmp_path / "out", **options)
    step = (call - 1) // ACCUMULATION
    Sent(call, until=made.output / f"checkpoint-{step}").train(made, patience=0.0)
    train(made, progress=False)
    records = [json.loads((p / "stress.json").read_text()) for p in (unbroken.output, made.output)]
    assert records[0] == records[1]
    assert len({r["mode"] for r in records[0]}) > 1
    for name in ("", "task-long", "task-short"):
        paths = [p / name / "adapter_model.safetensors" for p in (unbroken.output, made.output)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_cannot_be_written_then_is_written_after_the_step(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(base, rows, tmp_path / "out", save_steps=100)
    tried = tmp_path / "tried"
    publish = checkpoints.publish

    def failing(partial: Path, target: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            tried.touch()
            raise OSError(28, "No space left on device")
        publish(partial, target)

    monkeypatch.setattr(checkpoints, "publish", failing)
    caught = Sent(2 * ACCUMULATION + 1, until=tried).train(made, patience=0.0)
    assert caught.result.checkpoint == str(made.output / "checkpoint-3")
    assert sorted(p.name for p in made.output.iterdir()) == ["checkpoint-3", "training.json"]


def test_signals_of_a_forked_process_are_not_the_run_s(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is ended by SIGTERM has the run's handlers and its socket at first."""
    ended: list[int] = []

    def forking(*arguments: Any, **options: Any) -> LossOutput:
        if not ended:
            alive, tell = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(tell, b"x")
                time.sleep(60)
                os._exit(0)
            os.read(alive, 1)
            os.kill(child, signal.SIGTERM)
            ended.append(os.waitpid(child, 0)[1])
        return model_loss_output(*arguments, **options)

    monkeypatch.setattr(trainer, "model_loss_output", forking)
    result = train(config(base, rows, tmp_path / "out"), progress=False)
    assert result.status == "finished"
    assert os.WTERMSIG(ended[0]) == signal.SIGTERM


# A batch inside one call of C that never returns, as a backward pass may for minutes.
STUCK = """
import ctypes, os, sys
from pathlib import Path
from lorasmith.cli import main
from lorasmith.training import signals, trainer
from lorasmith.training.loss import model_loss_output

signals.GIVE_UP_AFTER, signals.LEAVE_AFTER = {patience}, {leave}
calls = 0

def stuck(*arguments, **options):
    global calls
    calls += 1
    if calls == {call}:
        lock = ctypes.create_string_buffer(64)
        acquire = ctypes.CDLL(None).pthread_mutex_lock
        acquire(lock)
        Path({there!r} + os.environ.get("RANK", "0")).touch()
        acquire(lock)
    return model_loss_output(*arguments, **options)

trainer.model_loss_output = stuck
sys.exit(main(sys.argv[1:]))
"""


def _stuck(folder: Path, call: int, patience: float, leave: float) -> Path:
    """The command, with one batch that never ends."""
    script = folder / "stuck.py"
    values = {"there": str(folder / "there-"), "call": call, "patience": patience, "leave": leave}
    script.write_text(STUCK.format(**values))
    return script


def _stop(
    command: list[str], there: list[Path], again: float | None = None
) -> tuple[int, str, str]:
    """Runs a command, and sends SIGTERM when all of these are there; once more if asked to."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        _wait_for(lambda: all(p.exists() for p in there) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        if again is not None:
            process.send_signal(signal.SIGTERM)  # the same one, of another sender
            time.sleep(again)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its C library")
@pytest.mark.parametrize("twice", [False, True])
def test_a_batch_that_never_ends(base: Path, rows: Path, tmp_path: Path, twice: bool) -> None:
    """The command ends with 143 and a checkpoint; at once after a second signal."""
    output = tmp_path / "out"
    script = _stuck(
        tmp_path, 3, **({"patience": 60, "leave": 70} if twice else {"patience": 0.2, "leave": 1})
    )
    options = ("train", str(base), str(rows), "-o", str(output), "--steps", "8", "--device", "cpu")
    code, out, err = _stop(
        [str(script), *options, "--json"], [tmp_path / "there-0"], 1.5 if twice else None
    )
    assert code == 143, err
    assert "finishing the step and writing a checkpoint" in err
    if twice:
        assert not checkpoints.list_checkpoints(output)
        return
    result = json.loads(out)
    path = output / "checkpoint-2"
    assert (result["status"], result["checkpoint"]) == ("interrupted", str(path))
    assert checkpoints.defect(path) is None
    assert json.loads((output / "training.json").read_text()) == result
    assert f"its checkpoint is {path}" in " ".join(err.split())


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its C library")
def test_two_processes_give_a_step_up_together(base: Path, rows: Path, tmp_path: Path) -> None:
    """In the second of three batches; bit for bit the same after a resume."""
    script = _stuck(tmp_path, 2 * 3 + 2, patience=0.2, leave=1)
    options = [
        *(str(base), str(rows), "--steps", "4", "--lr", "1e-2", "--device", "cpu"),
        *("--batch-size", "2", "--gradient-accumulation", "3", "--adapter.dropout", "0.2"),
        *("--dynamics", "gauge,entropy", "--log-steps", "1", "--save-steps", "100"),
    ]
    code, out, err = _stop(
        [*LAUNCH, str(script), "train", *options, "-o", str(tmp_path / "out"), "--json"],
        [tmp_path / "there-0", tmp_path / "there-1"],
    )
    assert code != 0
    path = tmp_path / "out" / "checkpoint-2"
    assert checkpoints.defect(path, processes=2) is None, err
    result = json.loads(out)
    assert (result["status"], result["checkpoint"]) == ("interrupted", str(path))
    assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint-2", "training.json"]
    results = [
        train_in_two(*options, "-o", tmp_path / name, *more)
        for name, more in (("whole", ()), ("out", ("--resume", "last")))
    ]
    assert result["tokens"] < results[0]["tokens"] == results[1]["tokens"]
    losses = [[p["loss"] for p in r["losses"]] for r in results]
    assert losses[0] == losses[1]
    first, second = (ls.read_adapter(tmp_path / name) for name in ("whole", "out"))
    for module in first.modules:
        for name, value in first.state(module).values.items():
            assert torch.equal(value, second.state(module).values[name])


# -- the signals by themselves -----------------------------------------------------------------


def test_ctrl_c_again_while_the_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts at once where the main thread waits for the one that writes, which ends well."""
    monkeypatch.setattr(signals, "GIVE_UP_AFTER", 0.0)
    monkeypatch.setattr(signals, "_SAME", 0.05)
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    writing, enough = threading.Event(), threading.Event()
    done: list[bool] = []

    def save() -> None:
        writing.set()
        enough.wait(10)
        time.sleep(0.2)
        done.append(True)

    def again() -> None:
        writing.wait(10)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    stop = StopSignals(save)
    sender = threading.Thread(target=again)
    with pytest.raises(KeyboardInterrupt), stop:  # noqa: PT012 - from within, and out of it
        sender.start()
        try:
            with stop.unchanging():
                os.kill(os.getpid(), signal.SIGINT)
                writing.wait(10)
        except KeyboardInterrupt:
            assert not enough.is_set()
            enough.set()
            raise
    sender.join()
    assert done == [True]
    assert failed == []
    assert not [t for t in threading.enumerate() if t.name.startswith("lorasmith-signals")]


def test_nobody_reads_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal may be gone: standard error cannot be written then."""
    monkeypatch.setattr(signals, "GIVE_UP_AFTER", 0.0)
    saved = threading.Event()
    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.dup(2)
    os.dup2(writing, 2)
    stop = StopSignals(saved.set)
    try:
        with stop, pytest.raises(StepGivenUpError), stop.unchanging():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            saved.wait(5)
    finally:
        os.dup2(stderr, 2)
        for one in (stderr, writing):
            os.close(one)
    assert stop.saved


def test_again_after_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is given up any more, and still the second signal ends at once."""
    monkeypatch.setattr(signals, "_SAME", 0.05)
    stop = StopSignals(None)
    with stop:
        stop.keep_step()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one
        assert stop.received == signal.SIGINT
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_was_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell starts ``COMMAND &`` so, for Ctrl-C is not meant for it; and a handler of C stays."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else real(n))
    terminating = real(signal.SIGTERM)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert stop.received is None
            assert real(signal.SIGTERM) is terminating
        assert real(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_signals_reach_an_event_loop() -> None:
    """They come to it through the descriptor that we take."""

    async def training() -> list[int]:
        found: list[int] = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, found.append, 1)
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(0.05)
        loop.remove_signal_handler(signal.SIGUSR1)
        return found

    assert asyncio.run(training()) == [1]


# -- parts of a checkpoint ---------------------------------------------------------------------


def test_parts_are_taken_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each process knows is handed over; those at another step, or too late, go on."""
    monkeypatch.setattr(parts, "COLLECT_WITHIN", 1.0)
    monkeypatch.setattr(parts, "TAKEN_WITHIN", 2.0)
    sealed = {"adapter_model.safetensors": b"x"}

    def publish() -> None:
        partial = checkpoints.partial_path(tmp_path, 7)
        partial.mkdir()
        for name, content in sealed.items():
            (partial / name).write_bytes(content)
        checkpoints.publish(partial, tmp_path / "checkpoint-7")

    def hand_in(found: list[bool], step: int, index: int) -> threading.Thread:
        def work() -> None:
            found.append(parts.hand_in(tmp_path, step, index, {"tokens": index}))

        made = threading.Thread(target=work)
        made.start()
        return made

    for round_ in range(2):  # the second replaces a checkpoint of the same step
        taken: list[bool] = []
        threads = [hand_in(taken, 7, index) for index in (2, 1)]
        assert [p["tokens"] for p in parts.collect(tmp_path, 7, 3)] == [1, 2]
        publish()
        parts.dismiss(tmp_path, 7, 3)
        for thread in threads:
            thread.join()
        assert taken == [True, True], round_
    refused: list[bool] = []
    threads = [hand_in(refused, 7, 1), hand_in(refused, 8, 2)]
    with pytest.raises(TimeoutError, match=r"step 7 from processes \[2\]"):
        parts.collect(tmp_path, 7, 3)
    parts.dismiss(tmp_path, 7, 3)
    threads[0].join()
    assert refused == [False]
    monkeypatch.setattr(parts, "TAKEN_WITHIN", 0.0)
    threads[1].join()
    assert refused == [False, False]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]
