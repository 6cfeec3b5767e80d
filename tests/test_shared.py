"""What all five scripts share, tested through nano_ssa.py: the text itself, command line, data, training, checkpoints.

python -m pytest tests/test_shared.py
"""
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, refused
from torch.utils.flop_counter import FlopCounterMode

import nano_ssa as nano

SCRIPTS = sorted(ROOT.glob("nano_*.py"))


def blocks(path):
    """{name: text} of a script's shared blocks, in their order."""
    found = re.findall(r"^ *# ==== shared: ([^\n]+)\n(.*?)^ *# ==== end shared\n", path.read_text(encoding="utf-8"), re.M | re.S)
    assert len(found) == len(dict(found)), f"{path.name} has two blocks of one name"
    return dict(found)


def script(argv, **kwargs):
    kwargs = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs}
    return subprocess.Popen([sys.executable, ROOT / "nano_ssa.py", *argv], **kwargs)


def log(out, arm="technique"):
    lines = [json.loads(line) for line in (out / arm / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train_seconds"} for line in lines]


def weights(out, name="ckpt.pt", arm="technique"):
    return torch.load(out / arm / name, weights_only=True)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# the text

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shared_text_is_the_same(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("# ==== shared: ") == text.count("# ==== end shared") == len(blocks(path))
    ours, first = blocks(path), blocks(SCRIPTS[0])
    assert list(ours) == list(first), "other blocks, or another order"
    for name in first:
        assert ours[name] == first[name], f"block {name!r} of {path.name} differs from {SCRIPTS[0].name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_header_names_the_requirements(path):
    header = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", path.read_text(encoding="utf-8")).group(1)
    found = json.loads(re.search(r"# dependencies = (\[.*\])", header).group(1))
    assert found == (ROOT / "requirements.txt").read_text().split()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_python_has_nothing_to_warn_of(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(path.read_text(encoding="utf-8"), path.name, "exec")


# the command line

@pytest.mark.parametrize("argv, words", [
    ("--n_layers 3", ["--n_layers", "--n_layer?"]), ("--bogus=1", ["--bogus"]), ("--n_layer", ["--n_layer"]),
    ("--n_layer three", ["--n_layer", "three"]),
    ("--bias maybe", ["maybe", "on nor off"]), ("--size huge", ["--size huge", "tiny"]),
    ("--optimizer sgd", ["muon"]), ("--dtype int8", ["--dtype", "float32"]), ("--device tpu", ["--device tpu"]),
    ("--device cuda:99", ["--device cuda:99", "CUDA devices"]), ("--device cpu --dtype float16", ["float16", "float32"]),
    ("--n_embd 30 --n_head 4", ["--n_embd 30", "--n_head 4"]), ("--max_iters -1", ["--max_iters", "-1"]),
    ("--batch_size 0", ["--batch_size"]), ("--dropout 1.5", ["--dropout"]), ("--learning_rate nan", ["--learning_rate"]),
    ("--reduction 0", ["--reduction"]), ("--reduction 65", ["--reduction 65", "64"]), ("--finetune 1.5", ["--finetune"]),
    ("--sigma -1", ["--sigma"]), ("--ssa global", ["--ssa global", "unbiased"]), ("--draws 0", ["--draws"]),
    ("--min_lr 1", ["--min_lr 1.0", "--learning_rate"]), ("surplus", ["surplus"]), ("--dataset no_such_corpus", ["no_such_corpus", "prepare.py"]),
])
def test_bad_flags_get_one_line(capsys, tmp_path, argv, words):
    default = [] if "--device" in argv else ["--device", "cpu"]
    refused(nano.main, capsys, [*default, "--out_dir", str(tmp_path / "out"), *argv.split()], *words)
    assert not (tmp_path / "out").exists()


def test_flags_and_presets():
    s = nano.parse(["--device=cpu", "--n_layer=3", "--bias", "on", "--keep_self=off"])
    assert (s.n_layer, s.bias, s.keep_self, s.n_embd) == (3, True, False, nano.Settings().n_embd)
    s = nano.parse(["--device", "cpu", "--size", "char", "--dropout", "0"])
    assert (s.n_embd, s.block_size, s.dropout) == (384, 256, 0.0)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        nano.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{f.name} " in text for f in dataclasses.fields(nano.Settings) if f.name != "vocab_size")


def test_prompt_outside_the_alphabet(capsys, small, tmp_path):
    (tmp_path / "digits").mkdir()  # a corpus without the default prompt, a line break
    (np.arange(2000) % 10).astype("<u2").tofile(tmp_path / "digits" / "train.bin")
    shutil.copy(tmp_path / "digits" / "train.bin", tmp_path / "digits" / "val.bin")
    (tmp_path / "digits" / "meta.json").write_text('{"tokenizer": "char", "alphabet": "0123456789", "vocab_size": 10}')
    nano.main([*small, "--dataset", str(tmp_path / "digits"), "--max_iters", "1", "--draws", "1"])
    refused(nano.main, capsys, [*small, "--prompt", ""], "--prompt is empty")
    refused(nano.main, capsys, [*small, "--prompt", "naïve ☃"], "☃", "--prompt")


# data

def broken(corpus, tmp_path, change):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        shutil.copy(corpus / name, folder)
    change(folder)
    return folder


@pytest.mark.parametrize("change, words", [
    (lambda d: os.truncate(d / "train.bin", 0), ["train.bin", "0 bytes"]),
    (lambda d: os.truncate(d / "train.bin", 10001), ["train.bin", "10001"]),
    (lambda d: os.truncate(d / "val.bin", 10000), ["val.bin", "10000"]),
    (lambda d: (d / "val.bin").unlink(), ["val.bin", "0 bytes"]),
    (lambda d: (d / "meta.json").write_text("{"), ["meta.json"]),
    (lambda d: (d / "meta.json").write_text("[]"), ["meta.json"]),
    (lambda d: (d / "meta.json").write_text('{"tokenizer": "char", "alphabet": "ab", "vocab_size": 3}'), ["meta.json"]),
    (lambda d: (d / "meta.json").write_text('{"tokenizer": "char", "alphabet": "ab", "vocab_size": 2}'), ["train.bin", "token id"]),
    (lambda d: ((d / "meta.json").unlink(), (d / "meta.pkl").touch()), ["meta.json", "absent"]),
    (lambda d: ((d / "val.bin").write_bytes(bytes(40)), edit(d / "meta.json", val_tokens=20)), ["val.bin", "--block_size"]),
])
def test_bad_data_get_one_line(capsys, corpus, tmp_path, small, change, words):
    refused(nano.main, capsys, [*small, "--dataset", str(broken(corpus, tmp_path, change))], *words)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def settings(corpus, **changes):
    small = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, dataset=str(corpus))
    s = nano.Settings(**{**small, **changes})
    s.vocab_size = nano.Data(s, torch.device("cpu")).vocab_size
    return s


def test_batches_are_a_function_of_seed_step_and_turn(corpus):
    s = settings(corpus)
    data = nano.Data(s, torch.device("cpu"))
    x, y = data.batch(3, 1)
    assert x.shape == y.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])
    again = nano.Data(dataclasses.replace(s, ssa="off"), torch.device("cpu"))
    again.batch(0, 0)
    assert torch.equal(x, again.batch(3, 1)[0])
    for other in (data.batch(4, 1), data.batch(3, 0), nano.Data(dataclasses.replace(s, seed=1), torch.device("cpu")).batch(3, 1)):
        assert not torch.equal(x, other[0])


def test_windows_cover_the_validation_split(corpus):
    data = nano.Data(settings(corpus), torch.device("cpu"))
    x = torch.cat([data.rows("val", data.windows("val")[i:i + 99])[0] for i in range(0, len(data.windows("val")), 99)]).flatten()
    assert len(data.val) - len(x) <= data.T and torch.equal(x, data.val[:len(x)].long())


def test_a_large_corpus_stays_on_disk_and_gives_the_same_batches(corpus, tmp_path):
    s = settings(corpus)
    data, disk = nano.Data(s, torch.device("cpu")), nano.Data(s, torch.device("cpu"))
    disk.train = np.memmap(corpus / "train.bin", dtype="<u2", mode="r")
    for a, b in zip(data.batch(5, 0), disk.batch(5, 0)):
        assert torch.equal(a, b)
    disk.vocab_size = 3
    with pytest.raises(nano.UserError, match="token id"):
        disk.batch(5, 0)


def test_without_network_the_standard_library_is_the_corpus(tmp_path):
    """A clean clone, no prepared data, a proxy that refuses. Somebody who asks for Shakespeare gets an error instead."""
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "nano_ssa.py", tmp_path)
    shutil.copy(ROOT / "data" / "prepare.py", tmp_path / "data")
    env = {**os.environ, "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    run = lambda *argv: subprocess.run([sys.executable, "nano_ssa.py", *SMALL, "--max_iters", "2", *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
    with_default, asked = run(), run("--dataset", "shakespeare_char", "--out_dir", "other")
    assert with_default.returncode == 0, with_default.stderr
    assert "Shakespeare is not to be had here" in with_default.stdout and "nano_ssa on stdlib" in with_default.stdout
    assert json.loads((tmp_path / "out" / "ssa" / "results.json").read_text())["dataset"] == "stdlib"
    assert asked.returncode == 1 and "error: " in asked.stderr and "Traceback" not in asked.stderr
    assert not (tmp_path / "other").exists() and not (tmp_path / "data" / "shakespeare_char").exists()


# the model

def test_parameters_are_those_of_gpt2():
    with torch.device("meta"):
        model = nano.GPT(nano.Settings(**{**nano.SIZES["gpt2"], "bias": True, "vocab_size": 50257}))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    block = {name.removeprefix("h.0.") for name in model.state_dict() if name.startswith("h.0.")}
    assert block == {f"{m}.{p}" for m in ("ln_1", "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj") for p in ("weight", "bias")}


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = nano.GPT(nano.Settings(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True, vocab_size=65))
    state = {k: v.T if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else v for k, v in theirs.transformer.state_dict().items()}
    for name in [name for name in state if ".c_attn." in name]:
        state.update(zip((name.replace("c_attn", f"c_{x}") for x in "qkv"), state.pop(name).chunk(3)))
    ours.load_state_dict(state)
    idx = torch.randint(65, (3, 32))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_initial_weights_are_those_of_gpt2():
    torch.manual_seed(0)
    model = nano.GPT(nano.Settings(n_layer=8, bias=True))
    for name, p in model.named_parameters():
        expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02 if p.ndim == 2 else 0
        assert p.std().item() == pytest.approx(expected, rel=0.05), name
    assert nano.layer_norm(nano.Settings()).eps == 1e-5 and (model.ln_f.weight == 1).all()


def test_states_end_in_the_logits_and_generation_goes_beyond_the_context(corpus):
    torch.manual_seed(0)
    model = nano.GPT(settings(corpus)).eval()
    idx = torch.randint(60, (2, 30))
    states = model.states(idx)
    assert len(states) == 3 and torch.equal(model.read_out(states[-1])[0], model(idx)[0])
    widths, hook = [], model.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    out = model.generate(idx, 10, temperature=0)
    hook.remove()
    assert out.shape == (2, 40) and torch.equal(out[:, :30], idx) and widths == [30, 31] + [32] * 8
    for t in range(30, 40):  # each token is the argmax after at most block_size tokens
        assert torch.equal(out[:, t], model(out[:, max(0, t - 32):t])[0][:, -1].argmax(-1))
    torch.manual_seed(0)
    top = model(idx)[0][:, -1].topk(2).indices
    for _ in range(20):
        assert (model.generate(idx, 1, top_k=2)[:, -1:] == top).any(-1).all()


@pytest.mark.parametrize("bias", [False, True])
def test_counted_flops_equal_the_formula(bias):
    s = nano.Settings(ssa="off", bias=bias)
    model = nano.GPT(s)
    idx = torch.randint(65, (2, s.block_size))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == nano.flops_per_token(s, "technique") * idx.numel()


# training

def test_learning_rate():
    s = nano.Settings(max_iters=100, warmup_iters=10, learning_rate=1.0, min_lr=0.1)
    rates = [nano.lr_factor(s, i) for i in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)]) and max(rates) == rates[10] == 1.0
    assert [nano.lr_factor(s, i, (40, 140)) for i in range(40, 141)] == rates, "a phase begins anew"
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)


def test_every_parameter_has_one_optimizer(corpus):
    s = settings(corpus, bias=True)
    model = nano.GPT(s)
    adamw, muon = nano.make_optimizers(model, s, torch.device("cpu"))
    ids = lambda groups: [id(p) for g in groups for p in g["params"]]
    assert sorted(ids(adamw.param_groups) + ids(muon.param_groups)) == sorted(map(id, model.parameters()))
    assert {id(p) for n, p in model.named_parameters() if n.startswith("h.") and p.ndim == 2} == set(ids(muon.param_groups))
    assert all((g["weight_decay"] > 0) == (p.ndim == 2) for g in adamw.param_groups for p in g["params"])
    (only,) = nano.make_optimizers(model, dataclasses.replace(s, optimizer="adamw"), torch.device("cpu"))
    assert sorted(ids(only.param_groups)) == sorted(map(id, model.parameters()))


def test_a_short_run_learns_and_writes_its_results(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    results = nano.main([*SMALL, "--max_iters", "150", "--eval_interval", "50", "--learning_rate", "1e-2", "--dataset", str(corpus),
                         "--out_dir", str(out), "--compare", "--draws", "2"])
    assert json.loads((out / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    for name, arm in results["arms"].items():
        lines = log(out, name)
        assert [line["step"] for line in lines] == [0, 50, 100, 150] and lines[0]["val_loss"] > 3.5
        assert arm["val_loss"] == lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.8
        assert arm["best_val_loss"] == min(line["val_loss"] for line in lines)
        assert lines[0]["train_loss"] is None and 4.5 > lines[1]["train_loss"] > lines[3]["train_loss"] > 1
        assert name in printed and f"{arm['val_loss']:.4f}" in printed
        assert arm["tokens_per_second"] == pytest.approx(150 * 4 * 32 / arm["train_seconds"])
    assert "A sample:" in printed
    # evaluation alone gives the same evaluation
    again = nano.main([*SMALL, "--max_iters", "150", "--eval_interval", "50", "--learning_rate", "1e-2", "--dataset", str(corpus),
                       "--out_dir", str(out), "--compare", "--draws", "2", "--eval_only"])
    assert {a: v["evaluation"] for a, v in again["arms"].items()} == {a: v["evaluation"] for a, v in results["arms"].items()}


def test_a_new_run_moves_the_old_one_aside_and_leaves_strangers_alone(small, tmp_path, capsys):
    out = tmp_path / "out"
    nano.main([*small, "--max_iters", "2"])
    before = weights(out)
    nano.main([*small, "--max_iters", "2", "--seed", "7"])
    assert same_weights(weights(tmp_path / "out.1"), before) and not same_weights(weights(out), before)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("precious")
    refused(nano.main, capsys, [*small, "--out_dir", str(tmp_path / "thesis")], "thesis", "--out_dir")
    (tmp_path / "thesis" / "results.json").write_text('{"rows": 3}')
    refused(nano.main, capsys, [*small, "--out_dir", str(tmp_path / "thesis")], "thesis", "--out_dir")
    assert sorted(os.listdir(tmp_path / "thesis")) == ["chapter1.txt", "results.json"]


def test_two_runs_never_write_to_one_folder(capsys, small, tmp_path):
    nano.main([*small, "--max_iters", "2"])
    process = script([*small, "--max_iters", "100000"])
    while not (tmp_path / "out.1").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    for more in ([], ["--resume"]):
        refused(nano.main, capsys, [*small, "--max_iters", "2", *more], "another run is writing", "--out_dir")
    assert not (tmp_path / "out.2").exists()
    process.kill()
    process.wait()
    nano.main([*small, "--max_iters", "2"])


def test_resuming_and_evaluating_need_no_flags_again(small, tmp_path):
    first = nano.main([*small, "--max_iters", "6", "--seed", "5", "--draws", "2", "--compare"])
    out = ["--out_dir", str(tmp_path / "out"), "--sample_tokens", "2"]
    assert nano.main([*out, "--resume"]) == first
    assert nano.main([*out, "--eval_only", "--draws", "2"])["arms"] == first["arms"]
    more = nano.main([*out, "--eval_only", "--draws", "4"])["arms"]
    assert all(list(arm["evaluation"]["ensemble"]) == ["1", "2", "4"] for arm in more.values()), "no arm keeps an older table"
    edit(tmp_path / "out" / "results.json", arms={"technique": first["arms"]["technique"]})  # as if stopped in the second arm
    assert nano.main([*out, "--resume", "--draws", "2"])["arms"]["dense"]["val_loss"] == first["arms"]["dense"]["val_loss"]


def test_evaluating_an_interrupted_run_does_not_end_it(small, tmp_path, monkeypatch):
    whole = nano.main([*small, "--draws", "1", "--out_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(nano, "evaluate_arm", lambda *_: exec("raise KeyboardInterrupt"))
        patch.setattr(nano.Data, "batch", lambda *_, batch=nano.Data.batch: exec("raise KeyboardInterrupt") if _[1] == 15 else batch(*_))
        with pytest.raises(SystemExit):
            nano.main([*small, "--draws", "1"])
    nano.main([*small, "--draws", "1", "--eval_only"])
    assert nano.main([*small, "--draws", "1", "--resume"])["arms"]["technique"]["val_loss"] == whole["arms"]["technique"]["val_loss"]


def test_bad_checkpoints_get_one_line(capsys, small, tmp_path):
    out = tmp_path / "out"
    refused(nano.main, capsys, [*small, "--resume"], "no run in", "--resume")
    refused(nano.main, capsys, [*small, "--eval_only"], "no run in")
    nano.main([*small, "--max_iters", "2"])
    good = (out / "technique" / "ckpt.pt").read_bytes()
    for name in ("results.json", "technique/best.pt"):
        (out / name).replace(out / f"{name}.kept")
    refused(nano.main, capsys, [*small, "--eval_only", "--max_iters", "2"], "no run in")
    (out / "results.json").write_text("junk")
    refused(nano.main, capsys, [*small, "--resume", "--max_iters", "2"], "results.json")
    edit(out / "results.json.kept", arms={})  # as if the evaluation had not been reached
    (out / "results.json.kept").replace(out / "results.json")
    refused(nano.main, capsys, [*small, "--eval_only", "--max_iters", "2"], "best.pt")
    (out / "technique" / "best.pt.kept").replace(out / "technique" / "best.pt")
    for junk in (b"", b"junk", good[:len(good) // 2]):
        (out / "technique" / "ckpt.pt").write_bytes(junk)
        refused(nano.main, capsys, [*small, "--resume", "--max_iters", "2"], "ckpt.pt", "not a checkpoint")
        assert (out / "technique" / "ckpt.pt").read_bytes() == junk, "nothing is lost"
    (out / "technique" / "ckpt.pt").write_bytes(good)
    refused(nano.main, capsys, [*small, "--resume", "--max_iters", "2", "--n_layer", "3"], "--n_layer 2")
    saved = torch.load(out / "technique" / "ckpt.pt", weights_only=True)
    torch.save({**saved, "world": 2}, out / "technique" / "ckpt.pt")
    refused(nano.main, capsys, [*small, "--resume", "--max_iters", "2"], "2 processes")
    torch.save({**saved, "script": "nano_other"}, out / "technique" / "ckpt.pt")
    refused(nano.main, capsys, [*small, "--resume", "--max_iters", "2"], "nano_other")


def test_killed_at_any_moment_then_resumed_equals_uninterrupted(small, tmp_path):
    argv = [*small, "--max_iters", "60", "--eval_interval", "4", "--dropout", "0.1", "--draws", "1"]
    assert script([*argv, "--out_dir", str(tmp_path / "whole")]).wait() == 0
    ckpt = tmp_path / "out" / "technique" / "ckpt.pt"
    last = -1
    for kill, more in enumerate([[], ["--resume"], ["--resume"]]):
        process = script([*argv, *more])
        while process.poll() is None:  # wait for a later checkpoint than the last kill's, then kill within the next steps
            now = ckpt.stat().st_mtime_ns if ckpt.exists() else -1
            if now > last:
                time.sleep(0.03 * (kill + 1))
                process.kill()
                last = ckpt.stat().st_mtime_ns
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, process.stdout.read()
        assert torch.load(ckpt, weights_only=True)["now"]["step"] < 60, "it was killed too late to show anything"
    process = script([*argv, "--resume"])
    printed = process.communicate()[0]
    assert process.returncode == 0 and " 0/60" not in printed, printed  # it goes on, it does not begin again
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    for name in ("ckpt.pt", "best.pt", "before_finetune.pt"):
        assert same_weights(weights(tmp_path / "out", name), weights(tmp_path / "whole", name))


def test_ctrl_c_saves_then_ends(small, tmp_path):
    argv = [*small, "--max_iters", "300", "--eval_interval", "100", "--finetune", "0", "--draws", "1"]
    process = script(argv)
    while not (tmp_path / "out" / "technique" / "ckpt.pt").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1 and "--resume" in process.stdout.read()
    step = torch.load(tmp_path / "out" / "technique" / "ckpt.pt", weights_only=True)["now"]["step"]
    assert 0 < step < 300
    assert script([*argv, "--resume"]).wait() == 0
    assert script([*argv, "--out_dir", str(tmp_path / "whole")]).wait() == 0
    assert log(tmp_path / "out") == log(tmp_path / "whole")


def test_two_processes_equal_two_accumulation_steps(small, tmp_path):
    argv = [*small, "--max_iters", "10", "--eval_interval", "5", "--draws", "1", "--dropout", "0.1", "--finetune", "0.5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "nano_ssa.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert script([*argv, "--grad_accum", "2", "--out_dir", str(tmp_path / "one")]).wait() == 0
    for name in ("before_finetune.pt", "ckpt.pt"):
        assert same_weights(weights(tmp_path / "out", name), weights(tmp_path / "one", name)), "halves are exact: equal to the bit"
    assert [line["val_loss"] for line in log(tmp_path / "out")] == pytest.approx([line["val_loss"] for line in log(tmp_path / "one")], abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(capsys, small, tmp_path, monkeypatch):
    real, calls = nano.GPT.read_out, []

    def read_out(self, x, targets=None):
        logits, loss = real(self, x, targets)
        if self.training:
            calls.append(1)
            loss = loss * (float("nan") if len(calls) == 13 else 1.0)
        return logits, loss

    monkeypatch.setattr(nano.GPT, "read_out", read_out)
    refused(nano.main, capsys, small, "step 12", "not finite", "ckpt.pt")
    check_last_good(tmp_path)
    # the update just before an evaluation may be the one that breaks the weights
    monkeypatch.setattr(nano, "evaluate", lambda *_, losses=[3.0, 3.0, 2.0, 2.0, math.nan], **__: losses.pop(0))
    monkeypatch.setattr(nano.GPT, "read_out", real)
    refused(nano.main, capsys, small, "after step 20", "not finite", "ckpt.pt")
    check_last_good(tmp_path)


def check_last_good(tmp_path):
    saved = torch.load(tmp_path / "out" / "technique" / "ckpt.pt", weights_only=True)
    assert saved["now"]["step"] == 10 and all(v.isfinite().all() for v in saved["model"].values())


def test_a_full_disk_loses_nothing(small, tmp_path):
    argv = [*small, "--max_iters", "20"]
    nano.main([*argv, "--max_iters", "20"])
    size = (tmp_path / "out" / "technique" / "ckpt.pt").stat().st_size
    code = (f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); "
            "import nano_ssa; nano_ssa.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "ckpt.pt" in errors[0] and "--out_dir" in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out.1" / "technique" / "ckpt.pt").stat().st_size == size
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_gets_one_line(capsys, small, tmp_path):
    (tmp_path / "file").touch()
    refused(nano.main, capsys, [*small, "--out_dir", str(tmp_path / "file" / "out")], "--out_dir")
    refused(nano.main, capsys, [*small, "--out_dir", "/proc/nano/out"], "--out_dir")


def final_loss(argv):
    return nano.main([*argv, "--draws", "1", "--n_layer", "1"])["arms"]["technique"]["val_loss"]


@pytest.mark.parametrize("finetune", ["0", "1"])
def test_bfloat16_autocast_and_the_compiled_model(small, capsys, finetune):
    """What CUDA does by default, on a CPU: sampled paths with finetune 0, dense attention with finetune 1."""
    plain = final_loss([*small, "--finetune", finetune])
    assert final_loss([*small, "--finetune", finetune, "--dtype", "bfloat16"]) == pytest.approx(plain, abs=0.02)
    capsys.readouterr()
    assert final_loss([*small, "--finetune", finetune, "--dtype", "bfloat16", "--compile", "on"]) == pytest.approx(plain, abs=0.02)
    assert "compiled in" in capsys.readouterr().out


def test_float16_scales_the_loss(small, tmp_path, monkeypatch):
    """What older CUDA cards do, on a CPU; the scale is part of the checkpoint."""
    plain = final_loss(small)
    monkeypatch.setattr(nano, "pick_dtype", lambda name, device: (torch.float16, "for this test"))
    assert final_loss(small) == pytest.approx(plain, abs=0.02)
    assert torch.load(tmp_path / "out" / "technique" / "ckpt.pt", weights_only=True)["scaler"]["scale"] > 1
    # an overflow that only AdamW's gradients show reaches no weight through the common norm
    real = torch.amp.GradScaler.unscale_

    def overflow(self, optimizer):
        if isinstance(optimizer, torch.optim.AdamW) and not hits:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
            hits.append(1)
        real(self, optimizer)

    hits = []
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow)
    assert final_loss(small) == pytest.approx(plain, abs=0.1) and hits


def test_a_compiler_that_fails_is_seen_and_does_not_stop_the_run(small, capsys, monkeypatch):
    def compile(model):
        def fast(*args, **kwargs):
            raise RuntimeError("no C compiler found")
        return fast

    expected = final_loss(small)
    monkeypatch.setattr(torch, "compile", compile)
    capsys.readouterr()
    assert final_loss([*small, "--compile", "on"]) == expected
    assert "no C compiler found" in capsys.readouterr().out
