"""Real signals to a real training process."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

WORKERS = str(Path(__file__).with_name("callback_workers.py"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(folder, total=1000, step_s=0.1, val_s=0.0, checkpoint=""):
    arguments = ["interruptible", str(folder), str(total), str(step_s), str(val_s), str(checkpoint)]
    return subprocess.Popen(
        [sys.executable, WORKERS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def read_until(process, line):
    """Wait for a line of its output that begins so."""
    for found in process.stdout:
        if found.startswith(line):
            return
    raise AssertionError(f"the process ended without saying {line}: {process.stderr.read()}")


def test_ctrl_c_saves_after_the_step_and_the_run_can_go_on(tmp_path):
    process = start(tmp_path / "a")
    read_until(process, "STEP 2")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    checkpoint = tmp_path / "a" / "checkpoints" / "interrupted.ckpt"
    assert process.returncode == 130, errors
    assert f"--ckpt_path {checkpoint}" in errors
    assert "Traceback" not in errors
    saved = torch.load(checkpoint, weights_only=False)
    assert saved["global_step"] == 3
    assert float(saved["state_dict"]["weight"]) == 3.0
    with (tmp_path / "a" / "metrics.csv").open(newline="") as file:
        assert [row["weight"] for row in csv.DictReader(file)] == ["0.0", "1.0", "2.0"]  # the last step's row too

    output, errors = start(tmp_path / "b", total=5, step_s=0, checkpoint=checkpoint).communicate(timeout=60)
    assert [line for line in output.splitlines() if line[:1] in "SD"] == ["STEP 3 3.0", "STEP 4 4.0", "DONE 5 5.0"]


def test_a_second_signal_leaves_at_once_and_saves_nothing(tmp_path):
    process = start(tmp_path, step_s=30)
    read_until(process, "STEP 0")
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "once more to leave at once" in line:
            break
    time.sleep(1.2)  # sooner, it would count as the same, passed on by a launcher
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not (tmp_path / "checkpoints").exists()


def test_sigterm_during_validation_does_not_wait_for_its_end(tmp_path):
    process = start(tmp_path / "a", step_s=0, val_s=0.5)
    read_until(process, "VALIDATION 0")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "VALIDATION 2" not in output
    checkpoint = tmp_path / "a" / "checkpoints" / "interrupted.ckpt"
    output, errors = start(tmp_path / "b", total=6, step_s=0, checkpoint=checkpoint).communicate(timeout=60)
    assert "STEP 4 4.0" in output, errors
    assert "DONE 6 6.0" in output
