"""What the tests share: a corpus, short runs, and how a script refuses."""
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = [path.stem for path in sorted(ROOT.glob("nano_*.py"))]

SMALL = ("--device cpu --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 "
         "--max_iters 20 --warmup_iters 4 --eval_interval 10 --eval_tokens 1024 "
         "--sample_tokens 8").split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus, outside the checkout: tiny Shakespeare where
    data/shakespeare_char/input.txt holds it, else the source of Python's standard library."""
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
    """Flags of a run that takes a second."""
    return [*SMALL, "--dataset", str(corpus), "--out_dir", str(tmp_path / "out")]


@pytest.fixture(params=SCRIPTS)
def nano(request):
    """Every script, as a module."""
    return importlib.import_module(request.param)


def script(argv, path=ROOT / "nano_ssa.py", **env):
    """A script as a process of its own: (exit status, stdout, stderr)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, path, *argv], env=env, cwd=path.parent,
                          capture_output=True, text=True, encoding="utf-8", errors="replace")
    return done.returncode, done.stdout, done.stderr


def refused(main, capsys, argv, *words):
    """main(argv) ends with one line that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    error = capsys.readouterr().err
    line = end.value.code
    assert line.startswith("error: ") and "\n" not in line and "Traceback" not in error, (line, error)
    assert all(word in line for word in words), (words, line)
