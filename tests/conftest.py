"""Real text for the tests: tiny Shakespeare where data/shakespeare_char/input.txt holds it, else Python's standard library."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SMALL = ("--device cpu --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --max_iters 20 --warmup_iters 4 "
         "--eval_interval 10 --eval_tokens 1024 --sample_tokens 8").split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus, outside the checkout."""
    data = tmp_path_factory.mktemp("corpus") / "data"
    data.mkdir()
    shutil.copy(ROOT / "data" / "prepare.py", data)
    text, name = ROOT / "data" / "shakespeare_char" / "input.txt", "stdlib"
    if text.exists():
        name = "shakespeare_char"
        (data / name).mkdir()
        shutil.copy(text, data / name)
    subprocess.run([sys.executable, data / "prepare.py", name], check=True)
    return data / name


@pytest.fixture
def small(corpus, tmp_path):
    """Flags of a run that takes a second or two."""
    return [*SMALL, "--dataset", str(corpus), "--out_dir", str(tmp_path / "out")]


def refused(main, capsys, argv, *words):
    """main(argv) ends with one line on stderr that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and "Traceback" not in error, error
    assert all(word in lines[0] for word in words), (words, lines[0])


def killed_and_resumed(nano, monkeypatch, folder, argv, again):
    """A run of 20 steps with checkpoints every 10, and the same one killed in step 15 and resumed with the flags again: their technique
    arms, whose losses must be the same. The resumed one trains from the checkpoint on, not from the beginning."""
    whole = nano.main([*argv, "--out_dir", str(folder / "whole")])["arms"]["technique"]
    batch, steps = nano.Data.batch, []

    def killed(data, step, turn):
        if step == 15:
            raise KeyboardInterrupt("killed")
        return batch(data, step, turn)

    monkeypatch.setattr(nano.Data, "batch", killed)
    with pytest.raises(SystemExit):
        nano.main([*argv, "--out_dir", str(folder / "killed")])
    monkeypatch.setattr(nano.Data, "batch", lambda data, step, turn: steps.append(step) or batch(data, step, turn))
    resumed = nano.main(["--resume", "--device", "cpu", "--sample_tokens", "8", *again, "--out_dir", str(folder / "killed")])["arms"]["technique"]
    assert steps == list(range(10, 20))
    for name in ("val_loss", "best_val_loss", "train_loss", "parameters"):
        assert whole[name] == resumed[name]
    return whole, resumed
