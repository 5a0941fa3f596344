"""What is shown while a run goes on: CompletionTable, ShortProgressBar."""

from __future__ import annotations

import torch
from callback_module import Tiny, fit, lines

from rlvr_lightning.callbacks import CompletionTable, ShortProgressBar
from rlvr_lightning.callbacks.completions import printable, render

SAMPLE = {
    "step": 0,
    "prompt": "[red]2 + 2 =[/red]",
    "completion": "4\x1b[2J\n\u202e\x07[bold]",
    "reward": torch.tensor(0.5),
    "parts": {"answer": float("nan")},
    "advantage": -1.25,
    "truncated": True,
}


def test_hostile_text_cannot_steer_the_terminal():
    table = render([SAMPLE], "title [red]", width=120)
    assert "\x1b" not in table
    assert "\x07" not in table
    assert "\u202e" not in table
    assert "[red]2 + 2 =[/red]" in table
    assert r"4\x1b[2J\n\u202e\x07[bold] [cut at the limit]" in table
    assert "title [red]" in table
    assert "-1.25" in table
    assert printable("x" * 500).count("x") == 400
    assert printable("\ud800") == r"\ud800"


class Writes(Tiny):
    def training_step(self, batch, batch_idx):
        self.last_samples = [dict(SAMPLE, step=batch_idx, prompt=f"p{n}", extra={"level": n}) for n in range(5)]
        return super().training_step(batch, batch_idx)


def test_completions_go_to_file_and_console_every_n(tmp_path, capsys):
    fit(Writes(), [[1]] * 5, tmp_path, [CompletionTable(every_n_steps=3, num=2)])
    records = lines(tmp_path / "completions.jsonl")
    assert [r["step"] for r in records] == [0] * 5 + [3] * 5
    assert records[0]["completion"] == SAMPLE["completion"]
    assert records[1]["extra"] == {"level": 1}
    assert records[0]["reward"] == 0.5
    assert records[0]["parts"] == {"answer": None}
    out = capsys.readouterr().out
    assert out.count("2 of 5 completions") == 2
    assert "p0" in out
    assert "p2" in out  # spread over the batch
    assert "p1" not in out


def test_completions_do_nothing_for_a_module_without_samples(tmp_path, capsys):
    fit(Tiny(), [[1]], tmp_path, [CompletionTable()])
    assert not (tmp_path / "completions.jsonl").exists()
    assert "completions" not in capsys.readouterr().out


def test_progress_bar_shows_short_names(tmp_path, capsys):
    class Logs(Tiny):
        def training_step(self, batch, batch_idx):
            self.log_dict({"policy/kl": 0.25, "reward/mean": 0.5, "response/length_mean": 7.0}, prog_bar=True)
            return super().training_step(batch, batch_idx)

    fit(Logs(), [[1]], tmp_path, [ShortProgressBar()], enable_progress_bar=True)
    out = capsys.readouterr().out
    assert "reward=0.500, KL=0.250, length=7.000" in out
    assert "v_num" not in out
