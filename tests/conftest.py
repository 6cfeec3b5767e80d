"""What the tests share: a corpus, short runs, and how a script refuses."""
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
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


def loud(nano, config):
    """A model in float64, with weights so large that its layers do something."""
    torch.manual_seed(0)
    model = nano.GPT(config).double()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("ln" in name), std=0.3)
    return model


def tokens(B=2, T=16, seed=0, vocab=50):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def future_is_invisible(model, vocab, T, seed, first=0, **given):
    """Logits of a token do not change with later tokens, and have no gradient from them. first: of
    the tokens that are read, the one after which the first of T logits comes; it sees all before."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(vocab, (1, first + T), generator=generator)
    t = int(torch.randint(T - 1, (), generator=generator))
    end = first + t + 1
    other = torch.cat([idx[:, :end], (idx[:, end:] + 1) % vocab], 1)
    before, after = (model(x, **given)[0][:, :t + 1] for x in (idx, other))
    torch.testing.assert_close(before, after, atol=1e-12, rtol=1e-12)
    embedding = []
    hook = model.drop.register_forward_hook(lambda m, x, y: embedding.append(y))
    logits = model(idx, **given)[0]
    hook.remove()
    gradient, = torch.autograd.grad(logits[0, t].sum(), embedding)
    assert (gradient[0, end:] == 0).all() and (gradient[0, end - 1] != 0).any(), "by gradient"
    assert first == 0 or (gradient[0, :end] != 0).any(-1).all()


def weights(out, name="ckpt.pt", arm="technique"):
    return torch.load(out / arm / name, weights_only=True)["model"]


def killed(nano, monkeypatch, argv, step):
    """A run that is stopped before a step."""
    get_lr = nano.get_lr

    def stops(config, now, peak):
        if now == step:
            raise KeyboardInterrupt
        return get_lr(config, now, peak)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nano, "get_lr", stops)
        nano.main(argv)


def goes_on_to_the_bit(nano, monkeypatch, tmp_path, argv, step):
    """A run, stopped before a step and resumed, has the results and weights of one that was not."""
    monkeypatch.chdir(tmp_path)
    whole = nano.main([*argv, "--out_dir", "whole"])["arms"]["technique"]
    killed(nano, monkeypatch, [*argv, "--out_dir", "killed"], step)
    resumed = nano.main([*argv, "--out_dir", "killed", "--resume"])["arms"]["technique"]
    for name in whole.keys() - {"log", "tokens_per_second"}:
        assert resumed[name] == whole[name], name
    saved = [weights(tmp_path / out) for out in ("whole", "killed")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
