"""nano_jump.py: maps against least squares on stored states, exits against a slow decoder, the
evaluation against literal loops, and GPT-2's weights accounted for."""
import json
import math
import struct
import urllib.error

import numpy as np
import pytest
import torch
from conftest import future_is_invisible, goes_on_to_the_bit, loud, refused, tokens

import nano_jump as nano
import nano_reuse
import nano_ssa
import weights

CONFIG = nano.Config(n_layer=4, n_head=2, n_embd=16, block_size=16, vocab_size=50)


@pytest.mark.parametrize("rank", [6, 4, 1])
def test_least_squares_is_the_smallest_of_the_best(rank):
    torch.manual_seed(0)
    x = torch.randn(50, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
    y = torch.randn(50, 3, dtype=torch.float64)
    W = nano.least_squares(x.T @ x, x.T @ y)
    torch.testing.assert_close(W, torch.linalg.pinv(x, rtol=1e-9) @ y, atol=1e-9, rtol=1e-9)


def test_maps_and_r2_are_those_of_stored_states():
    model, texts, other = loud(nano, CONFIG), [tokens(40), tokens(9, seed=1)], [tokens(30, seed=2)]
    n, total, products = nano.moments(model, texts)
    maps, held_out = nano.fit(products), nano.moments(model, other)
    stored = [torch.cat(h).flatten(0, 1) for h in zip(*(torch.stack(model.states(t)) for t in texts))]
    test = [h.flatten(0, 1) for h in model.states(other[0])]
    assert n == 49 * 16 and list(maps) == [(i, j) for i in range(4) for j in range(i + 1, 5)]
    torch.testing.assert_close(total, torch.stack([h.sum(0) for h in stored]))
    for (i, j), A in maps.items():
        expected = torch.linalg.lstsq(stored[i], stored[j]).solution
        torch.testing.assert_close(A.double(), expected, atol=1e-4, rtol=1e-4)
        for W in (A, torch.eye(16)):
            SSE = (test[i] @ W.double() - test[j]).square().sum(0)
            SST = (test[j] - test[j].mean(0)).square().sum(0)
            r2 = (1 - SSE / SST).mean().item()
            assert nano.explained(held_out, i, j, W) == pytest.approx(r2, abs=1e-9)


def test_the_future_is_invisible():
    for seed in range(4):
        future_is_invisible(loud(nano, CONFIG), 50, 16, seed)


def test_parts_are_fitted_to_what_goes_in_and_comes_out():
    model, texts, seen = loud(nano, CONFIG), [tokens(30), tokens(20, seed=1)], {}
    linear = nano.fit_parts(model, texts)
    for l, block in enumerate(model.h):
        for part in ("ln_1", "attn", "ln_2", "mlp"):
            getattr(block, part).register_forward_hook(
                lambda m, x, y, at=(l, part): seen.setdefault(at, []).append((x[0], y)))
    for idx in texts:
        model(idx)
    for (l, part), pairs in seen.items():
        x, y = (torch.cat(z).flatten(0, 1) for z in zip(*pairs))
        expected = torch.linalg.pinv(x, rtol=1e-7) @ y
        torch.testing.assert_close(linear[l][part], expected, atol=1e-6, rtol=1e-5)


def test_a_layer_with_linear_parts():
    model = loud(nano, CONFIG)
    linear, block, x = nano.fit_parts(model, [tokens(30)])[1], model.h[1], torch.randn(2, 16, 16).double()
    for names in ([], ["attn"], ["ln_1", "ln_2"], ["mlp"]):
        f = {name: (lambda z, W=linear[name]: z @ W) if name in names else getattr(block, name)
             for name in ("ln_1", "attn", "ln_2", "mlp")}
        y = x + f["attn"](f["ln_1"](x))
        expected = y + f["mlp"](f["ln_2"](y))
        torch.testing.assert_close(nano.linear_block(block, x, linear, names), expected)


def test_threshold_and_confidence():
    assert nano.threshold(0.5, 0, 32) == pytest.approx(0.45 + 0.1)
    assert nano.threshold(0.5, 8, 32) == pytest.approx(0.45 + 0.1 / math.e)
    assert nano.threshold(1.0, 10**6, 32) == pytest.approx(0.9), "lambda = 1 is not never"
    assert nano.threshold(1.12, 10**6, 32) > 1 and nano.threshold(-1.12, 0, 32) < -0.9
    p = torch.tensor([0.1, 0.6, 0.25, 0.05])
    assert nano.confidence(p.log()[None] + 3).item() == pytest.approx(0.35)


@pytest.mark.parametrize("lam", [-1.2, 0.0, 0.4, 0.8, 1.2])
def test_leaving_is_that_of_a_literal_loop(lam):
    torch.manual_seed(0)
    agree, sure, T = torch.rand(5, 64) < 0.5, torch.rand(5, 64), 16
    depths, same = [], []
    for n in range(64):
        for l in range(1, 5):
            if l == 4 or sure[l, n] > 0.9 * lam + 0.1 * math.exp(-4 * (n % T) / 8.5):
                depths.append(l)
                same.append(agree[l, n].item())
                break
    depth, agreement = nano.leave(agree, sure, lam, torch.arange(64) % T, T)
    assert depth == pytest.approx(sum(depths) / 64) and agreement == pytest.approx(sum(same) / 64)


def slow(model, maps, layers, lam, idx):
    """A token's logits and layers, from the states of the whole window, all of them exact."""
    idx = idx[:, -16:]
    states, T = model.states(idx), idx.size(1)
    for l, h in enumerate(states[:-1]):
        logits = model.read_out((h if maps is None else h @ maps[l, 4])[:, -1] if l in layers else h[:, -1])
        p = logits[0].softmax(-1).sort(descending=True).values
        if l in layers and p[0] - p[1] > 0.9 * lam + 0.1 * math.exp(-4 * (T - 1) / 8.5):
            return logits, l
    return model.read_out(states[-1][:, -1]), 4


@pytest.mark.parametrize("how", ["mat", "id"])
@pytest.mark.parametrize("layers, lam", [((), 0.0), (range(1, 4), -1.2), (range(1, 4), 0.1), ([2], 0.1),
                                         (range(1, 4), 1.2)])
def test_the_decoder_equals_a_slow_one(how, layers, lam):
    """Also where the window moves, and where another text follows."""
    model = loud(nano, CONFIG)
    maps = {pair: A.double() for pair, A in nano.fit(nano.moments(model, [tokens(50)])[2]).items()}
    maps = maps if how == "mat" else None
    decoder, taken = nano.Decoder(model, maps, layers, lam), []
    for text in (tokens(1, 24, seed=3), tokens(1, 20, seed=4)):
        for t in range(5, text.size(1)):
            logits = decoder(text[:, :t][:, -16:])
            expected, depth = slow(model, maps, layers, lam, text[:, :t])
            taken.append(depth)
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert decoder.depths == taken
    if lam == 0.1:
        assert len(set(taken)) > 1, "some leave"
    if not layers or lam > 1:
        assert set(taken) == {4}
    if lam < -1:
        assert set(taken) == {1}


def test_no_token_goes_through_a_layer_twice_nor_through_those_it_left_out():
    model, rows = loud(nano, CONFIG), [0] * 4
    maps = {pair: A.double() for pair, A in nano.fit(nano.moments(model, [tokens(50)])[2]).items()}
    for l, block in enumerate(model.h):
        block.register_forward_hook(lambda m, x, y, l=l: rows.__setitem__(l, rows[l] + y.size(1)))
    for lam, most in ((-1.2, [16, 0, 0, 0]), (0.1, [16] * 4)):
        rows[:] = [0] * 4
        decoder = nano.Decoder(model, maps, range(1, 4), lam)
        for t in range(1, 17):
            decoder(tokens(1)[:, :t])
        assert all(a <= b for a, b in zip(rows, most)) and rows[0] == 16
        assert rows == sorted(rows, reverse=True)


def test_the_evaluation_is_that_of_literal_loops(small, tmp_path):
    argv = [*small, "--n_layer", "3", "--fit_tokens", "2048"]
    found = nano.main(argv)["arms"]["technique"]
    best = torch.load(tmp_path / "out" / "technique" / "best.pt", weights_only=True)
    config = nano.Config(**best["config"])
    run, model = nano.Run(config), nano.GPT(config).eval()
    model.load_state_dict(best["model"])
    maps = nano.fit(nano.moments(model, nano.texts(run, "train", 2048))[2])
    linear = nano.fit_parts(model, nano.texts(run, "train", 2048))
    idx = torch.cat(list(nano.texts(run, "val", 128)))
    states = model.states(idx)
    full = model.read_out(states[-1]).log_softmax(-1).flatten(0, 1)
    for l, row in enumerate(found["evaluation"].values()):
        last = {"id": states[l], "mat": states[l] @ maps[l, 3] if l < 3 else states[l]}
        for name, parts in nano.PARTS.items():
            last[name] = states[l]
            for k in range(l, 3):
                last[name] = nano.linear_block(model.h[k], last[name], linear[k], parts)
        for name, h in last.items():
            choice = model.read_out(h).flatten(0, 1).argmax(-1).tolist()
            first = [p.argmax().item() == c for p, c in zip(full, choice)]
            five = [c in p.topk(5).indices.tolist() for p, c in zip(full, choice)]
            assert float(row[f"P@1 {name}"][:-1]) == pytest.approx(100 * np.mean(first), abs=0.5)
            if name in ("id", "mat"):
                assert float(row[f"P@5 {name}"][:-1]) == pytest.approx(100 * np.mean(five), abs=0.5)
                surprisal = np.mean([-p[c].item() for p, c in zip(full, choice)])
                assert row[f"surp. {name}"] == pytest.approx(surprisal, abs=1e-3)
    held_out = nano.moments(model, nano.texts(run, "val", 128))
    for i, j in maps:
        ours = found["r2"]["mat"][f"{i} {j}"]
        assert ours == pytest.approx(nano.explained(held_out, i, j, maps[i, j]), abs=1e-6)
    for name in ("id", "mat"):
        row = found["exits"][name]
        assert 1 <= row["layers"] <= 3 and row["layers saved"] == f"{1 - row['layers'] / 3:.1%}"
    assert 1 <= found["exits"]["in the sample"]["layers"] <= 3


def test_a_killed_run_goes_on_to_the_bit(small, tmp_path, monkeypatch):
    argv = [*small[:-2], "--dropout", "0.1", "--fit_tokens", "512"]
    goes_on_to_the_bit(nano, monkeypatch, tmp_path, argv, 15)


def write_safetensors(path, tensors):
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
    for name, w in tensors.items():
        w = w.contiguous()
        data = w.view(torch.uint8).numpy().tobytes() if w.ndim else w.numpy().tobytes()
        header[name] = dict(dtype=names[w.dtype], shape=list(w.shape),
                            data_offsets=[len(numbers), len(numbers) + len(data)])
        numbers += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


@pytest.fixture
def gpt2(tmp_path, corpus):
    """(folder, change): a small GPT-2 in Hugging Face's format, and a function that writes it
    again with other tensors or another configuration; the model it should be."""
    torch.manual_seed(0)
    vocab = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))["vocab_size"]
    config = nano.Config(n_layer=3, n_head=2, n_embd=16, block_size=32, vocab_size=vocab, bias=True)
    model, folder, tensors = nano.GPT(config), tmp_path / "model", {}
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder.mkdir()
    for name, w in model.state_dict().items():
        if ".c_q." in name:
            three = [model.state_dict()[name.replace("c_q", f"c_{m}")] for m in "qkv"]
            name, w = name.replace("c_q", "c_attn"), torch.cat(three)
        if ".c_k." not in name and ".c_v." not in name:
            tensors[name] = w.T if w.ndim == 2 and name.startswith("h.") else w
    settings = dict(model_type="gpt2", activation_function="gelu_new", n_layer=3, n_head=2, n_embd=16,
                    n_positions=32, vocab_size=vocab, layer_norm_epsilon=1e-5)

    def change(tensors=tensors, **other):
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps({**settings, **other}))

    change()
    return folder, tensors, change, model


@pytest.fixture
def argv(gpt2, small):
    flags = [*small[:2], *small[small.index("--eval_tokens"):]]  # without sizes
    return [*flags, "--init_from", str(gpt2[0]), "--fit_tokens", "1024"]


def same_logits(source, model):
    sizes, found = weights.load_model(str(source))
    ours = nano.GPT(nano.Config(**sizes))
    ours.load_state_dict(found)
    idx = torch.randint(sizes["vocab_size"], (2, sizes["block_size"]))
    ours, theirs = (each.double()(idx)[0] for each in (ours, model))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.", "module.", "model.",
                                    "module._orig_mod.transformer."])
def test_prefixes_of_wrappers_are_taken_off(gpt2, prefix):
    folder, tensors, change, model = gpt2
    mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
            "h.2.attn.masked_bias": torch.full((1,), -1e4)}
    head = {"lm_head.weight": tensors["wte.weight"]}
    change({prefix + name: w for name, w in {**tensors, **mask, **head}.items()})
    same_logits(folder, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_such(gpt2, dtype):
    folder, tensors, change, model = gpt2
    change({name: w.to(dtype) for name, w in tensors.items()})
    same_logits(folder, model.to(dtype).float())


def test_it_is_transformers_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=50)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():  # so large that GELU's two forms differ
        torch.nn.init.normal_(p, std=0.5)
    theirs.save_pretrained(tmp_path / "hf")
    same_logits(tmp_path / "hf", theirs)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.mark.parametrize("damage, words", [
    (lambda w, change: change({**w, "lm_head.weight": w["wte.weight"] + 1}), ["lm_head.weight"]),
    (lambda w, change: change({**w, "h.3.ln_1.weight": torch.ones(16)}), ["Unexpected", "h.3.ln_1.weight"]),
    (lambda w, change: w.pop("h.1.ln_2.weight") is None or change(w), ["Missing", "h.1.ln_2.weight"]),
    (lambda w, change: w.pop("wte.weight") is None or change(w), ["vocabulary of 0"]),
    (lambda w, change: change(n_positions=64), ["wpe.weight", "[64, 16]"]),
    (lambda w, change: change(model_type="llama"), ["model_type llama", "gpt2"]),
    (lambda w, change: change(tie_word_embeddings=False), ["tie_word_embeddings"]),
    (lambda w, change: change(n_inner=100), ["n_inner"]),
    (lambda w, change: change(scale_attn_weights=False), ["scale_attn_weights"]),
    (lambda w, change: ("config.json", lambda raw: b"{}"), ["n_positions"]),
    (lambda w, change: ("model.safetensors", lambda raw: raw[:-100]), ["download it again"]),
    (lambda w, change: ("model.safetensors", lambda raw: LFS), ["git lfs pull"]),
    (lambda w, change: ("model.safetensors", lambda raw: b""), ["no whole GPT-2"])])
def test_what_is_no_whole_gpt2_is_refused_and_never_measured(gpt2, argv, capsys, tmp_path, damage, words):
    folder, tensors, change, _ = gpt2
    if broken := damage(tensors, change):
        path = folder / broken[0]
        path.write_bytes(broken[1](path.read_bytes()))
    refused(nano.main, capsys, argv, "--init_from", *words)
    assert not (tmp_path / "out").exists()


def test_a_padded_vocabulary_is_cut_to_the_tokenizers():
    config = nano.Config(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=50257)
    for rows in (50258, 50304):
        padded = nano.GPT(nano.replace(config, vocab_size=rows))
        found = padded.state_dict()
        weights.check(nano.GPT(config), found, "it")
        assert torch.equal(found["wte.weight"], padded.wte.weight[:50257])
    found = padded.state_dict()
    weights.check(padded, found, "it")
    assert len(found["wte.weight"]) == 50304, "data that say so have that vocabulary"
    with pytest.raises(SystemExit, match="--dataset"):
        weights.check(nano.GPT(nano.replace(config, vocab_size=65)), found, "it")


def test_a_loaded_model_is_measured_and_never_trained(gpt2, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "train", lambda *_: pytest.fail("trained"))
    found = nano.main(argv)["arms"]["technique"]
    assert list(found["evaluation"]) == ["layer 0", "layer 1", "layer 2", "layer 3"]
    again = ["--device", "cpu", "--out_dir", str(tmp_path / "out"), "--fit_tokens", "1024"]
    for flag in ("--eval_only", "--resume"):
        assert nano.main([*again, flag])["arms"]["technique"]["evaluation"] == found["evaluation"]


@pytest.mark.parametrize("twin", [nano_ssa, nano])
def test_checkpoints_of_these_scripts_are_taken(small, argv, tmp_path, twin):
    best = tmp_path / "first" / "technique" / "best.pt"
    trained = twin.main([*small, "--out_dir", str(tmp_path / "first"), "--fit_tokens", "512"][:None if twin is nano else -2])
    argv[argv.index("--init_from") + 1] = str(best)
    found = nano.main(argv)["arms"]["technique"]
    assert found["val_loss"] == pytest.approx(trained["arms"]["technique"]["best_val_loss"], abs=1e-5)


def test_a_checkpoint_of_another_architecture_is_refused(small, argv, capsys, tmp_path):
    nano_reuse.main([*small, "--out_dir", str(tmp_path / "first")])
    argv[argv.index("--init_from") + 1] = str(tmp_path / "first" / "technique" / "best.pt")
    refused(nano.main, capsys, argv, "h.1.attn.c_q.weight")


def test_a_name_that_is_nowhere(argv, capsys, monkeypatch, tmp_path):
    def offline(url, target):
        raise urllib.error.URLError(f"no network for {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(weights, "HERE", tmp_path)
    argv[argv.index("--init_from") + 1] = "openai-community/gpt3"
    refused(nano.main, capsys, argv, "openai-community/gpt3", "no network")
