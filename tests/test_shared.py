"""What all scripts share: the text itself, command line, data, training, checkpoints."""
import ast
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, refused, script, weights

import nano_ssa

# the same source in every script
SAME = ["MLP", "flag", "table", "help_text", "pick_device", "pick_dtype", "key",
        "find_data", "Data", "Run", "evaluate", "get_lr", "configure_optimizers", "Muon",
        "orthogonal", "write", "sample"]
# but for these: an encoder's prompt is T tokens, and an expression no text; GPT-2 has biases
OWN = {"nano_transevolve": {"sample"}, "nano_jump": {"MLP"}}
# the same but for the technique's lines: how many may differ from nano_ssa.py's
ALMOST = {"parse_args": 12, "train": 16, "main": 20, "Config": 12}
BUDGETS = {"nano_ssa": (700, 36), "nano_reuse": (740, 38), "nano_mom": (790, 42),
           "nano_transevolve": (860, 45), "nano_jump": (860, 45)}


def definitions(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_text_is_the_same(name):
    ours, first = definitions(name), definitions("nano_ssa")
    order = [each for each in ours if each in SAME]
    assert order == [each for each in first if each in SAME]
    for each in set(SAME) - OWN.get(name, set()):
        assert ours[each] == first[each], each
    for each, most in ALMOST.items():
        lines, others = (text[each].splitlines() for text in (ours, first))
        assert len(set(lines) ^ set(others)) <= 2 * most, each


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_is_as_long_as_a_reading(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    lines, kilobytes = BUDGETS[name]
    tree = ast.parse(text)
    first = next(node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    assert len(text.splitlines()) <= lines and len(text) <= 1024 * kilobytes
    assert max(map(len, text.splitlines())) <= 100
    assert len(ast.get_docstring(tree).splitlines()) <= 60 and first.lineno <= 85
    names = [node.name for node in tree.body if hasattr(node, "name")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_metadata_for_uv_names_the_requirements(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    header = re.match(r"# /// script\n.*\n# dependencies = (\[.*\])\n# ///\n", text).group(1)
    assert {*json.loads(header), "pytest"} == set((ROOT / "requirements.txt").read_text().split())


def test_help_is_a_table_of_two_screens(nano, capsys):
    with pytest.raises(SystemExit) as end:
        nano.parse_args(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text.splitlines()) <= 48
    assert max(map(len, text.splitlines())) <= 80
    for f in dataclasses.fields(nano.Config):
        row = re.search(rf"^--{f.name} .*", text, re.M)
        assert bool(row) == bool(f.metadata), f.name
    assert re.search(r"^--n_embd +64 +384 +768 ", text, re.M)


@pytest.mark.parametrize("argv, words", [
    ("--n_layers 3", ["--n_layers"]), ("--bogus=1", ["--bogus"]), ("--n_layer", ["--n_layer"]),
    ("--n_layer three", ["--n_layer", "three"]), ("--size huge", ["--size", "huge", "tiny"]),
    ("--dtype int8", ["--dtype", "float32"]), ("--device tpu", ["--device tpu"]),
    ("--device cuda:99", ["--device cuda:99"]), ("--n_embd 30 --n_head 4", ["--n_embd 30", "4"]),
    ("--max_iters -1", ["--max_iters -1", "from 1"]), ("--batch_size 0", ["--batch_size"]),
    ("--learning_rate nan", ["--learning_rate"]), ("surplus", ["surplus"]), ("--eval_tokens 7", ["from 8"]),
    ("--block_size 999999999", ["--block_size"]), ("--dataset none_such", ["none_such"]),
    ("--prompt ☃", ["☃", "--prompt"]), ("--resume", ["no run"]), ("--eval_only", ["no run"])])
def test_what_a_user_gets_wrong_ends_in_one_sentence(nano, capsys, small, tmp_path, argv, words):
    base = [] if "--device" in argv or "--dataset" in argv else small
    refused(nano.main, capsys, [*base, "--out_dir", str(tmp_path / "out"), *argv.split()], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, argv, words", [
    ("ssa", "--reduction 0", ["--reduction", "from 1"]), ("ssa", "--sigma -1", ["--sigma"]),
    ("ssa", "--finetune 1.5", ["--finetune", "to 1"]), ("ssa", "--ssa global", ["unbiased"]),
    ("reuse", "--reuse_layers 2", ["--reuse_layers 2", "at most 1"]),
    ("reuse", "--reuse_layers -2", ["from -1"]), ("reuse", "--reuse_heads 3", ["and 2"]),
    ("reuse", "--reuse_heads -2", ["from -1"]), ("reuse", "--reuse_impl flash", ["flash", "probs"]),
    ("mom", "--route_k 9", ["--route_k 9", "at most 3"]), ("mom", "--phase1 1", ["--phase1", "0.99"]),
    ("mom", "--route_k 3 --no-skip", ["at most 2"]), ("mom", "--tau 0", ["--tau"]),
    ("mom", "--route_k 2 --candidates own", ["at most 1"]), ("mom", "--candidates all", ["own"]),
    ("transevolve", "--blocks 3", ["--n_layer 2", "--blocks 3"]), ("transevolve", "--blocks -1", []),
    ("transevolve", "--task mt", ["--task", "encdec"]), ("transevolve", "--ffn none", ["random"]),
    ("jump", "--fit_tokens 0", ["--fit_tokens"]), ("jump", "--agreement 2", ["--agreement", "to 1"]),
    ("jump", "--init_from gpt2", ["--init_from", "leave out", "--n_layer"])])
def test_bad_flags_of_the_technique(capsys, small, name, argv, words):
    nano = importlib.import_module(f"nano_{name}")
    refused(nano.main, capsys, [*small, *argv.split()], *words)


def test_flags_and_sizes(nano, monkeypatch, tmp_path):
    config, _ = nano.parse_args(["--device=cpu", "--n_layer=4", "--resume", "--no-resume"])
    assert (config.n_layer, config.resume, config.n_embd, config.size) == (4, False, 64, "tiny")
    config, _ = nano.parse_args(["--device", "cpu", "--size", "char", "--dropout", "0"])
    assert (config.n_embd, config.block_size, config.dropout) == (384, 256, 0.0)
    config, _ = nano.parse_args(["--device", "cpu", "--size", "gpt2"])
    assert (config.dataset, config.grad_accum) == ("auto", 32)
    asked = []
    monkeypatch.setattr(nano.subprocess, "call", lambda command: asked.append(command[-1]) or 1)
    monkeypatch.setattr(nano, "__file__", str(tmp_path / "nano.py"))
    for size in ("gpt2", "tiny"):
        with pytest.raises(SystemExit, match="could not be prepared"):
            nano.find_data(dataclasses.replace(config, size=size))
    assert asked == ["openwebtext", "shakespeare_char", "stdlib"]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def bins(folder, train, val=None, dtype="<u2", meta=None):
    folder.mkdir()
    for split, ids in (("train", train), ("val", train if val is None else val)):
        np.asarray(ids).astype(dtype).tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def chars(alphabet, **more):
    return dict(tokenizer="char", alphabet=alphabet, vocab_size=len(alphabet), **more)


IDS = np.arange(4000) * 7 % 43
HEADER = np.array([20240520, 1, 3000, *[0] * 253], "<i4").view("<u2")  # of llm.c's shards


@pytest.mark.parametrize("make, words", [
    (lambda d: bins(d, [*HEADER, *IDS]), ["train.bin", "4,512 uint16 ids below"]),
    (lambda d: bins(d, IDS, dtype="<u4"), ["train.bin", "4,000 uint16 ids"]),
    (lambda d: bins(d, IDS + 60000), ["train.bin", "50,257"]),
    (lambda d: bins(d, IDS, meta=chars("ab")), ["train.bin", "below 2"]),
    (lambda d: bins(d, IDS, meta=chars("x" * 43, train_tokens=5000)), ["train.bin", "5,000"]),
    (lambda d: bins(d, IDS, IDS[:32], meta=chars("x" * 43)), ["val.bin", "32 tokens", "--block_size"]),
    (lambda d: (bins(d, IDS) / "meta.pkl").touch(), ["meta.pkl", "prepare.py --text"]),
    (lambda d: bins(d, IDS, meta=dict(tokenizer="music", vocab_size=43)), ["music"])])
def test_bins_of_another_kind_are_refused(nano, capsys, tmp_path, small, make, words):
    make(tmp_path / "strange")
    refused(nano.main, capsys, [*small, "--dataset", str(tmp_path / "strange")], *words)


def test_bins_without_a_description_are_taken_for_gpt2s(nano, capsys, tmp_path, small, monkeypatch):
    """The prompt is one token, 39, and ids from 40 on have no text."""
    bpe = Mock(n_vocab=40, encode=lambda text, allowed_special: [39],
               decode=lambda ids: "".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"[i] for i in ids))
    monkeypatch.setattr(nano.tiktoken, "get_encoding", lambda name: bpe)
    folder = bins(tmp_path / "bare", IDS)
    argv = [*small, "--max_iters", "1", "--eval_tokens", "64", "--prompt", "<|endoftext|>"]
    results = nano.main([*argv, "--dataset", str(folder)])
    assert "no meta.json" in capsys.readouterr().out
    assert results["config"]["vocab_size"] == 50257
    assert results["arms"]["technique"]["sample"].startswith("N"), "the mark is one token"
    monkeypatch.setattr(nano.tiktoken, "get_encoding", lambda name: exec("raise OSError"))
    refused(nano.main, capsys, [*small[:-1], str(tmp_path / "b"), "--dataset", str(folder)], "TIKTOKEN")


@pytest.mark.parametrize("train, alphabet", [([0] * 400, "a"), ([0, 1] * 200, "ab"), ([1, 0] * 200, "ab")])
def test_a_corpus_of_one_or_two_symbols_and_one_window(nano, tmp_path, small, train, alphabet):
    folder = bins(tmp_path / "short", train, train[:33], meta=chars(alphabet, train_tokens=400, val_tokens=33))
    arm = nano.main([*small, "--dataset", str(folder)])["arms"]["technique"]
    assert arm["val_loss"] < math.log(len(alphabet)) + 0.1 and set(arm["sample"]) <= set(alphabet)


def settings(nano, corpus, **changes):
    small = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, device="cpu")
    return nano.Config(**{**small, "dataset": str(corpus), **changes})


def test_every_epoch_has_the_whole_text_in_an_order_that_the_seed_decides(nano, corpus):
    config = settings(nano, corpus, max_iters=50, grad_accum=3)
    data = nano.Data(config, torch.device("cpu"))
    data.ids["train"] = data.ids["train"][:32 * 101 + 5]  # 100 windows, and a rest that is a margin
    order = data.order(config)
    assert order.shape == (50, 3, 4) and np.array_equal(order, data.order(config))
    epochs = order.flatten().reshape(6, 100)
    for epoch in epochs:
        assert set(np.diff(np.sort(epoch))) == {32}, "disjoint windows without a gap"
        assert 0 <= epoch.min() < 32
    ranks = {tuple(np.argsort(epoch)) for epoch in epochs}
    assert len(ranks) == 6, "shuffled anew"
    assert len({epoch.min() for epoch in epochs}) > 1, "and cut anew"
    assert not np.array_equal(order, data.order(dataclasses.replace(config, seed=1)))
    longer = data.order(dataclasses.replace(config, max_iters=80))
    assert np.array_equal(longer[:50], order)
    x, y = data.rows("train", order[7, 2])
    assert x.shape == y.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])
    for tokens in (33, 34, 64, 65, 96, 97):
        data.ids["train"] = data.ids["train"][:tokens]
        order = data.order(config)
        assert order.min() >= 0 and order.max() + 33 <= tokens


def test_windows_cover_a_split_once_and_their_logits_stay_small(nano, corpus):
    data = nano.Data(settings(nano, corpus), torch.device("cpu"))
    val = torch.from_numpy(data.ids["val"].astype(np.int64))
    x = torch.cat([data.rows("val", starts)[0] for starts in data.windows("val", 10**9)]).flatten()
    assert len(val) - len(x) <= data.T and torch.equal(x, val[:len(x)])
    assert sum(map(len, data.windows("val", 1000))) == 32  # 1,024 tokens
    data.meta["vocab_size"] = 2**22
    assert max(map(len, data.windows("val", 1000))) * data.T * 2**22 <= 2**27


def test_without_network_the_standard_library_is_the_corpus(tmp_path):
    """A clean clone, a proxy that refuses. Who asks for Shakespeare gets an error instead."""
    (tmp_path / "data").mkdir()
    for name in ("nano_ssa.py", "data/prepare.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    prepare = tmp_path / "data" / "prepare.py"
    text = prepare.read_text(encoding="utf-8")
    prepare.write_text(text.replace("(0, 1, 2, 4)", "(0,)"), encoding="utf-8")  # it need not wait
    offline = dict(https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    argv = [*SMALL, "--max_iters", "2", "--draws", "1"]
    code, out, err = script(argv, tmp_path / "nano_ssa.py", **offline)
    assert code == 0 and "data/stdlib" in out, err
    asked = [*argv, "--dataset", "shakespeare_char", "--out_dir", "other"]
    code, _, err = script(asked, tmp_path / "nano_ssa.py", **offline)
    assert code == 1 and "error: --dataset shakespeare_char" in err and "Traceback" not in err
    assert not (tmp_path / "other").exists() and not (tmp_path / "data/shakespeare_char").exists()
    code, _, err = script(argv, tmp_path / "nano_ssa.py", RANK="0", WORLD_SIZE="1", **offline)
    assert code == 1 and "prepare.py shakespeare_char" in err, "under torchrun nobody waits"


@pytest.mark.parametrize("name, off", [
    ("reuse", dict(reuse_layers=0)), ("reuse", dict(reuse_heads=0)), ("mom", dict(rounds=0)),
    ("transevolve", dict(blocks=0)), ("jump", dict())])
def test_with_the_technique_off_all_are_the_dense_twin_to_the_bit(name, off):
    """Outputs and gradients. test_reuse.py compares that model with GPT-2, written out."""
    shape = dict(n_layer=6, n_head=4, n_embd=32, block_size=16, vocab_size=50)
    idx, results = torch.randint(50, (2, 17)), []
    for nano, flags in ((importlib.import_module(f"nano_{name}"), off), (nano_ssa, dict(ssa="off"))):
        torch.manual_seed(0)
        model = nano.GPT(nano.Config(**shape, **flags))
        logits, loss = model(idx[:, :-1], idx[:, 1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([logits, loss, *model.parameters(), *gradients])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_parameters_and_initial_weights_are_gpt2s():
    with torch.device("meta"):
        sizes = {f.name: f.metadata["sizes"]["gpt2"] for f in dataclasses.fields(nano_ssa.Config)
                 if "gpt2" in f.metadata.get("sizes", ())}
        model = nano_ssa.GPT(nano_ssa.Config(**sizes, vocab_size=50257))
    biases = 12 * (3 + 1 + 4 + 1) * 768 + 25 * 768  # of 124,439,808 in GPT-2
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 - biases
    torch.manual_seed(0)
    model = nano_ssa.GPT(nano_ssa.Config(n_layer=8, vocab_size=65))
    for name, p in model.named_parameters():
        expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02 if p.ndim == 2 else 0
        assert p.std().item() == pytest.approx(expected, rel=0.05), name


def test_generation_goes_beyond_the_context(nano, corpus):
    config = settings(nano, corpus, vocab_size=60)
    torch.manual_seed(0)
    model, idx = nano.GPT(config).eval(), torch.randint(60, (2, 30))
    out = model.generate(idx, 10, temperature=0)
    assert out.shape == (2, 40) and torch.equal(out[:, :30], idx)
    for t in range(30, 40):  # the likeliest after at most block_size tokens
        assert torch.equal(out[:, t], model(out[:, max(0, t - 32):t])[0][:, -1].argmax(-1))


def test_learning_rate(nano):
    config = nano.Config(max_iters=100, warmup_iters=10)
    rates = [nano.get_lr(config, step, 2.0) for step in range(101)]
    assert rates[:10] == pytest.approx([2 * (step + 1) / 11 for step in range(10)])
    assert max(rates) == rates[10] == 2 and rates[55] == pytest.approx(1) and rates[100] == 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert nano.get_lr(nano.Config(max_iters=20, warmup_iters=50), 2, 1.0) == 1, "not all is warm-up"
    assert nano.get_lr(nano.Config(max_iters=1, warmup_iters=50), 0, 1.0) == 1


def test_every_parameter_has_one_optimizer(nano, corpus):
    model = nano.GPT(settings(nano, corpus, vocab_size=60))
    adamw, muon = nano.configure_optimizers(model, settings(nano, corpus, momentum=0.7, muon_lr=0.2))
    groups = [*adamw.param_groups, *muon.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert all((group["momentum"], group["lr"]) == (0.7, 0.2) for group in muon.param_groups)
    assert all((group["weight_decay"] > 0) == (p.ndim == 2) for group in groups
               for p in group["params"])


def test_muon_is_pytorchs(nano):
    """The same momentum, and the same step but for bfloat16."""
    shapes = [(16, 48), (48, 16), (32, 32), (32, 32), (16, 48)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon = nano.Muon(ours, lr=0.1, weight_decay=0.5)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=0.03, rtol=0)
    for group in muon.param_groups:
        averages = muon.state[group["params"][0]]["average"]
        for p, average in zip(group["params"], averages, strict=True):
            q = next(q for mine, q in zip(ours, theirs) if mine is p)
            torch.testing.assert_close(average, reference.state[q]["momentum_buffer"])


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(out, arm="technique"):
    lines = [json.loads(line) for line in (out / arm / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_a_run_learns_prints_and_writes(nano, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    longer = "--max_iters 150 --eval_interval 50 --sample_tokens 20 --batch_size 8".split()
    arms = hasattr(nano.Config, "compare") + 1  # nano_jump.py has nothing to compare with
    longer += ["--compare"] * (arms - 1)
    results = nano.main([*SMALL, *longer, "--dataset", str(corpus), "--out_dir", str(out)])
    assert json.loads((out / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    assert str(out) in printed and "float32" in printed and "the default on cpu" in printed
    assert results["arms"]["technique"]["sample"] in printed and "val_loss" in printed
    assert results["torch"] == torch.__version__ and len(results["arms"]) >= arms
    for name, arm in results["arms"].items():
        steps = [line["step"] for line in log(out, name) if "routed_loss" not in line]
        assert steps == [50, 100, 150]
        assert arm["val_loss"] == log(out, name)[-1]["val_loss"] < 3.3
        assert arm["best_val_loss"] <= arm["val_loss"] and arm["tokens_per_second"] > 0
        assert {"train_loss", "parameters", "evaluation"} <= set(arm)
        assert all(line["grad_norm"] > 0 < line["learning_rate"] for line in log(out, name))
    ckpt = torch.load(out / "technique" / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 150 and ckpt["config"]["n_layer"] == 2


def test_no_run_writes_over_another(nano, capsys, small, tmp_path, monkeypatch):
    nano.main([*small, "--max_iters", "2"])
    before = weights(tmp_path / "out")
    refused(nano.main, capsys, [*small, "--seed", "7"], "writes over", "--out_dir")
    (tmp_path / "thesis").mkdir()
    refused(nano.main, capsys, [*small[:-1], str(tmp_path / "thesis")], "thesis")
    assert same_weights(weights(tmp_path / "out"), before) and not os.listdir(tmp_path / "thesis")
    (tmp_path / "file").touch()
    refused(nano.main, capsys, [*small[:-1], str(tmp_path / "file" / "out")], "out")


def test_a_run_goes_on_with_its_own_settings_and_data(nano, capsys, small, tmp_path, corpus):
    argv = [*small, "--max_iters", "6", "--seed", "5", "--dropout", "0.1"]
    first = nano.main(argv)
    with open(tmp_path / "out" / "results.json") as old:
        assert nano.main([*argv, "--resume"])["arms"] == first["arms"], "the same command, and --resume"
        assert os.fstat(old.fileno()).st_nlink == 0, "the new file took its place, all at once"
    out = ["--device", "cpu", "--out_dir", str(tmp_path / "out")]
    compare = ["--compare"] if hasattr(nano.Config, "compare") else []  # of arms that were not trained
    other = nano.main([*out, "--eval_only", *compare, "--n_layer", "3", "--learning_rate", "1"])
    assert other["config"] == first["config"] and other["arms"]["technique"] == first["arms"]["technique"]
    assert "(its own --n_layer) (its own --learning_rate)" in capsys.readouterr().out
    edit(tmp_path / "out" / "results.json", config={k: v for k, v in first["config"].items() if k != "sigma"})
    nano.main([*out, "--resume"])  # of before a flag was there
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    nano.main([*out, "--eval_only", "--dataset", str(moved)])
    meta = json.loads((moved / "meta.json").read_text())
    alphabet = meta["alphabet"][1:] + meta["alphabet"][0]  # the same name and size, another text
    edit(moved / "meta.json", alphabet=alphabet)
    for flag in ("--resume", "--eval_only"):
        refused(nano.main, capsys, [*out, flag, "--dataset", str(moved)], "moved", "--dataset")
    edit(moved / "meta.json", alphabet=meta["alphabet"], sha256="other")
    refused(nano.main, capsys, [*out, "--resume", "--dataset", str(moved)], "moved")
    edit(tmp_path / "out" / "results.json", script="nano_other")
    refused(nano.main, capsys, [*out, "--resume"], "no run of")


def test_a_renamed_copy_trains_twice_resumes_and_evaluates(corpus, tmp_path):
    fork = tmp_path / "my_idea.py"
    shutil.copy(ROOT / "nano_ssa.py", fork)
    argv = [*SMALL, "--dataset", str(corpus), "--max_iters", "4", "--draws", "1"]
    for more in ([], ["--seed", "2"], ["--resume"], ["--eval_only", "--prompt", "e"]):
        if more == ["--seed", "2"]:
            time.sleep(1)  # folders have the time as their name
        code, out, err = script([*argv, *more], fork)
        assert code == 0, err
    runs = sorted((tmp_path / "out" / "my_idea").iterdir())
    seeds = [json.loads((run / "results.json").read_text())["config"]["seed"] for run in runs]
    assert seeds == [1337, 2] and str(runs[1].relative_to(tmp_path)) in out, "the latest goes on"


def test_killed_then_resumed_equals_uninterrupted_to_the_bit(small, tmp_path):
    argv = [*small, "--max_iters", "60", "--eval_interval", "4", "--dropout", "0.1", "--draws", "1"]
    whole = [*argv, "--out_dir", str(tmp_path / "whole")]
    assert script(whole)[0] == 0
    ckpt, last, env = tmp_path / "out" / "technique" / "ckpt.pt", -1, {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill, more in enumerate([[], ["--resume"]]):
        process = subprocess.Popen([sys.executable, ROOT / "nano_ssa.py", *argv, *more], env=env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:  # wait for a new checkpoint, then kill in the next steps
            now = ckpt.stat().st_mtime_ns if ckpt.exists() else -1
            if now > last:
                time.sleep(0.03 * (kill + 1))
                process.kill()
                last = ckpt.stat().st_mtime_ns
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert torch.load(ckpt, weights_only=True)["step"] < 60, "too late to show anything"
    assert script([*argv, "--resume"])[0] == 0
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    for name in ("ckpt.pt", "best.pt"):
        assert same_weights(weights(tmp_path / "out", name), weights(tmp_path / "whole", name))


@pytest.mark.parametrize("name, flags", [
    ("nano_ssa", "--draws 1 --dropout 0.1 --finetune 0.5"), ("nano_mom", "--rounds 4 --phase1 0.6")])
def test_two_processes_equal_two_micro_steps(tmp_path, corpus, name, flags):
    """Also the folder's name, which only one of them may choose. In phase 1 of nano_mom.py routers
    get no gradient, in phase 2 a module may get none."""
    fork = tmp_path / "fork.py"
    shutil.copy(ROOT / f"{name}.py", fork)
    argv = [*SMALL, "--dataset", str(corpus), "--max_iters", "10", "--eval_interval", "5",
            "--grad_accum", "2", *flags.split()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, fork, *argv], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two, = (tmp_path / "out" / "fork").iterdir()
    status, _, error = script([*argv, "--out_dir", str(tmp_path / "one")], fork)
    assert status == 0, error
    pair = weights(two), weights(tmp_path / "one")
    assert name == "nano_mom" or same_weights(*pair), "halves are exact"
    for p, q in zip(*map(dict.values, pair), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    for a, b in zip(log(two), log(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(nano, capsys, small, tmp_path,
                                                                  monkeypatch):
    losses = iter([3.0, math.nan])
    monkeypatch.setattr(nano, "evaluate", lambda *_: next(losses))
    flags = ["--rounds", "0"] if nano.SCRIPT == "nano_mom" else []  # one phase
    refused(nano.main, capsys, [*small, *flags], "after step 20", "learning rates")
    assert torch.load(tmp_path / "out" / "technique" / "ckpt.pt", weights_only=True)["step"] == 10


def test_a_full_disk_loses_nothing(small, tmp_path):
    argv = [*small, "--draws", "1"]
    nano_ssa.main([*argv, "--max_iters", "10"])
    ckpt = tmp_path / "out" / "technique" / "ckpt.pt"
    before, size = ckpt.read_bytes(), ckpt.stat().st_size
    edit(tmp_path / "out" / "results.json", config={
        **json.loads((tmp_path / "out" / "results.json").read_text())["config"], "max_iters": 20})
    code = (f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import nano_ssa; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2); nano_ssa.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *argv, "--resume"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"error: .*\.pt cannot be written .*--resume", done.stderr)
    assert ckpt.read_bytes() == before


def final_loss(nano, argv):
    return nano.main(argv)["arms"]["technique"]["val_loss"]


def test_bfloat16_and_the_compiled_model(nano, small, tmp_path, monkeypatch):
    """What CUDA does by default, on a CPU."""
    plain, real, nets = final_loss(nano, small), torch.compile, []

    def compile(model):
        nets.append(real(model, backend="aot_eager"))
        return nets[-1]

    monkeypatch.setattr(torch, "compile", compile)
    fast = [*small[:-1], str(tmp_path / "fast"), "--dtype", "bfloat16", "--compile", "on"]
    assert final_loss(nano, fast) == pytest.approx(plain, abs=0.02) and nets


def test_the_compiler_itself(small, tmp_path):
    plain = final_loss(nano_ssa, [*small, "--finetune", "1", "--max_iters", "4"])
    fast = [*small[:-1], str(tmp_path / "fast"), "--max_iters", "4", "--compile", "on"]
    assert final_loss(nano_ssa, [*fast, "--finetune", "1"]) == pytest.approx(plain, abs=1e-4)


def test_an_overflow_of_float16_skips_both_optimizers(nano, small, tmp_path, monkeypatch):
    """What old CUDA cards do, on a CPU. An infinity in a gradient of AdamW's alone."""
    plain, hits, steps = final_loss(nano, small), [], []
    unscale, step, muon = torch.amp.GradScaler.unscale_, torch.optim.AdamW.step, nano.Muon.step

    def overflow(self, optimizer):
        if isinstance(optimizer, torch.optim.AdamW) and not hits:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = math.inf
            hits.append(1)
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: steps.append("adamw") or step(*a, **k))
    monkeypatch.setattr(nano.Muon, "step", lambda *a, **k: steps.append("muon") or muon(*a, **k))
    half = [*small[:-1], str(tmp_path / "half"), "--dtype", "float16"]
    assert final_loss(nano, half) == pytest.approx(plain, abs=0.1) and hits
    assert steps.count("adamw") == steps.count("muon") == 19
    ckpt = torch.load(tmp_path / "half" / "technique" / "ckpt.pt", weights_only=True)
    assert ckpt["scaler"]["scale"] == 2**15 and all(p.isfinite().all() for p in ckpt["model"].values())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_the_text(tmp_path, encoding):
    alphabet = "\nабвгдежз"
    folder = bins(tmp_path / "russian", np.arange(900) % 9, meta=chars(alphabet))
    argv = [*SMALL, "--dataset", str(folder), "--out_dir", str(tmp_path / "out"), "--draws", "1"]
    code, out, err = script(argv, PYTHONIOENCODING=encoding)
    assert code == 0 and "val_loss" in out and "\\u04" in out, err
    code, out, err = script([*argv, "--prompt", "☃"], PYTHONIOENCODING=encoding)
    assert code == 1 and "Traceback" not in err and "--prompt" in err


def test_main_in_another_thread(small):
    code = ("import sys, threading, nano_ssa; found = []; "
            "t = threading.Thread(target=lambda: found.append(nano_ssa.main(sys.argv[1:]))); "
            "t.start(); t.join(); assert found[0]['arms']['technique']['val_loss']")
    subprocess.run([sys.executable, "-c", code, *small, "--max_iters", "6"], check=True, cwd=ROOT)


def test_ctrl_c_and_a_broken_compiler_end_in_a_sentence(small, tmp_path):
    code, _, err = script([*small, "--compile", "on"], CXX="no_such_compiler",
                          TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert code == 1 and "--compile off" in err and "Traceback" not in err, err
    argv = [*small[:-1], str(tmp_path / "long"), "--max_iters", "100000"]
    process = subprocess.Popen([sys.executable, ROOT / "nano_ssa.py", *argv], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (tmp_path / "long" / "technique" / "ckpt.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 1 and "--resume" in err and "Traceback" not in err


def test_dropout_has_a_key_of_its_own_in_every_micro_step(nano, small, monkeypatch):
    seeds, real = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    nano.main([*small, "--max_iters", "3", "--grad_accum", "2"])
    assert len(set(seeds)) == len(seeds) == 3 * 2 + 2  # and of the weights, and of the sample
