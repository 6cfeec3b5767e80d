"""nano_transevolve.py: against the four terms written out, in all three tasks; what a token sees, what
is counted, random rotations, ListOps."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import future_is_invisible, goes_on_to_the_bit, loud
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nano_transevolve as nano

TASKS = ["lm", "encdec", "prefix", "listops"]


def config_of(**changes):
    small = dict(n_layer=6, n_head=4, n_embd=32, block_size=16, vocab_size=50)
    if changes.get("task") == "listops":
        small.update(block_size=32, vocab_size=16)
    return nano.Config(**{**small, **changes})


def model_of(config):
    model = loud(nano, config)
    for interaction in [m for m in model.modules() if isinstance(m, nano.Interaction)]:
        C = config.n_embd
        interaction.signal = torch.stack([time_signal(l, C) for l in range(len(interaction.ln))])
    return model


def inputs(config, B=2, seed=0):
    """(idx, targets) of text, or of expressions of several lengths."""
    g = torch.Generator().manual_seed(seed)
    if config.task != "listops":
        idx = torch.randint(50, (B, nano.context(config) + 1), generator=g)
        return idx[:, :-1], idx[:, 1:]
    idx = torch.randint(1, 16, (B, 32), generator=g)
    for row, length in enumerate(torch.randint(5, 33, (B,), generator=g).tolist()):
        idx[row, length:] = 0
    return idx, torch.randint(1, 11, (B, 1), generator=g)


# the definition, as the official code has it: all four terms of the scores, in every layer

def norm(x, m):
    return F.layer_norm(x, x.shape[-1:], m.weight, None, 1e-5) if hasattr(m, "weight") else x


def time_signal(l, C):
    angles = [l * math.pi / 64 * p for p in range(C // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)


def four_terms(part, config, x, source, l, visible, dead):
    """The maps of layer l of a block with the input x, (B, H, T, S); dead: W_K^t, which cancels."""
    C, H, d, tau = config.n_embd, config.n_head, *(n * config.n_embd // config.n_head for n in (2, 1))
    Q, K, WQ = x @ part.c_q.weight.T, source @ part.c_k.weight.T, part.c_t.weight
    T_l, maps = part.c[l] * time_signal(l, C), []
    for n in range(H):
        q, k = Q[..., n * d:(n + 1) * d], K[..., n * d:(n + 1) * d]
        t, WQn, WKn = (y[..., n * tau:(n + 1) * tau] for y in (T_l, WQ, dead))
        A0 = q @ k.mT / math.sqrt(d)
        A1Q, A1K = Q @ WKn, K @ WQn                                                # all of Q and K
        A2 = (WQn * WKn).sum(0)
        scores = A0 + (A1Q @ t)[:, :, None] + (A1K @ t)[:, None] + A2 @ (t * t)
        maps.append(scores.masked_fill(~visible, -math.inf).softmax(-1))
    return torch.stack(maps, 1)


def feed_forward(ffn, h):
    if isinstance(ffn, nano.MLP):
        return ffn.c_proj(F.gelu(ffn.c_fc(h)))
    h = (h @ ffn.U_1 @ torch.diag(ffn.s_1) @ ffn.V_1 + ffn.bias_1).relu()
    return h @ ffn.U_2 @ torch.diag(ffn.s_2) @ ffn.V_2 + ffn.bias_2


def stack(blocks, config, x, visible, memory, dead):
    C, H = config.n_embd, config.n_head
    for block in blocks:
        start = x
        for l, ffn in enumerate(block.ffn):
            parts = [(block.attn, start, x, visible)]
            if memory is not None:
                parts.append((block.cross, memory, memory, torch.ones(1, dtype=torch.bool)))
            for part, source, values, seen in parts:
                P = four_terms(part, config, start, source, l, seen, dead)
                v = norm(values, part.ln[l])
                o = [P[:, n] @ v[..., n * C // H:(n + 1) * C // H] for n in range(H)]
                x = x + torch.cat(o, -1) @ part.c_proj[l].weight.T
            x = x + feed_forward(ffn, norm(x, block.ln_2[l]))
        x = norm(x, block.ln)
    return x


def oracle(model, config, idx, dead):
    T, S = config.block_size, idx.size(1)
    x = math.sqrt(config.n_embd) * (model.wte.weight[idx] + model.wpe.weight[:S])
    memory = None
    if config.task == "encdec":
        both = torch.ones(T, T, dtype=torch.bool)
        memory = norm(stack(model.encoder, config, x[:, :T], both, None, dead), model.ln_encoder)
        x = x[:, T - 1:]
    visible = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
    if config.task == "listops":
        visible = (idx != 0)[:, None].expand(-1, S, -1)
    x = norm(stack(model.h, config, x, visible, memory, dead), model.ln_f)
    if config.task == "listops":
        x = torch.stack([row[:(i != 0).sum()].mean(0) for row, i in zip(x, idx)])[:, None]
    return x[:, -T:] @ model.wte.weight.T if config.task == "prefix" else x @ model.wte.weight.T


CASES = [dict(), dict(blocks=1), dict(blocks=6), dict(blocks=3, ffn="random"), dict(n_head=2),
         dict(n_head=16), dict(task="listops"), dict(task="listops", ffn="random", blocks=1),
         dict(task="encdec"), dict(task="encdec", blocks=1, ffn="random"), dict(task="prefix")]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_it_equals_the_four_terms_with_all_gradients(changes):
    config = config_of(**changes)
    model, (idx, targets) = model_of(config), inputs(config)
    dead = torch.randn(2 * config.n_embd, config.n_embd, dtype=torch.float64, requires_grad=True)
    results = []
    for logits in (model(idx)[0], oracle(model, config, idx, dead)):
        targets = targets[:, -logits.size(1):]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        found = torch.autograd.grad(loss, [*model.parameters(), dead], materialize_grads=True)
        results.append([logits, loss, *found])
    assert results[0][0].shape == (2, 1 if config.task == "listops" else 16, config.vocab_size)
    largest = max(g.abs().max() for g in results[1][2:])
    for ours, slow in zip(*results):
        assert (ours - slow).abs().max() <= 1e-10 * max(largest, slow.abs().max())
    assert results[1][-1].abs().max() < 1e-12 * largest, "W_K^t cancels in the softmax"
    loss = model(idx, targets)[1].double()  # in float32
    torch.testing.assert_close(loss, results[0][1], rtol=1e-5, atol=1e-5)


def test_at_depth_0_heads_of_sines_have_no_bias():
    for l in (0, 1, 5):
        ours = nano.time_signal(l, 32)
        torch.testing.assert_close(ours.double(), time_signal(l, 32), rtol=0, atol=1e-7)
    x = torch.randn(2, 5, 32).double()
    _, b = model_of(config_of()).h[0].attn(x, x)
    assert b.shape == (3, 2, 4, 1, 5)
    assert (b[0, :, :2] == 0).all() and (b[0, :, 2:] != 0).all() and (b[1] != 0).all()


def attention(a, x, source, visible, H=4):
    """Of the dense twin, written out."""
    def heads(y):
        return y.unflatten(-1, (H, -1)).transpose(1, 2)
    q, k, v = heads(a.c_q(x)), heads(a.c_k(source)), heads(a.c_v(source))
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~visible, -math.inf)
    return a.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_the_dense_encoder_and_decoder():
    config = config_of(task="encdec", blocks=0)
    model, (idx, _) = model_of(config), inputs(config)
    x = model.wte.weight[idx] + model.wpe.weight
    memory, x, both = x[:, :16], x[:, 15:], torch.ones(16, 16, dtype=torch.bool)
    for block in model.encoder:
        h = norm(memory, block.ln_1)
        memory = memory + attention(block.attn, h, h, both)
        memory = memory + feed_forward(block.mlp, norm(memory, block.ln_2))
    memory = norm(memory, model.ln_encoder)
    for block in model.h:
        h = norm(x, block.ln_1)
        x = x + attention(block.attn, h, h, both.tril())
        x = x + attention(block.cross, norm(x, block.ln_cross), memory, both)
        x = x + feed_forward(block.mlp, norm(x, block.ln_2))
    torch.testing.assert_close(model(idx)[0], norm(x, model.ln_f) @ model.wte.weight.T)


@pytest.mark.parametrize("task", TASKS)
def test_without_coefficients_it_does_not_evolve(task):
    config = config_of(task=task)
    model, (idx, _) = model_of(config), inputs(config)
    static = nano.GPT(nano.replace(config, evolve=False)).double()
    kept = static.load_state_dict(model.state_dict(), strict=False)
    assert not kept.missing_keys
    assert all(".c." in name or "c_t" in name for name in kept.unexpected_keys), "no idle weights"
    assert (model(idx)[0] - static(idx)[0]).abs().max() > 1e-3
    for name, p in model.named_parameters():
        if ".c." in name:
            p.data.zero_()
    assert torch.equal(model(idx)[0], static(idx)[0])


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("task", ["lm", "encdec", "prefix"])
def test_the_future_is_invisible(task, blocks):
    """Of the decoder's positions; the encoder's T tokens are seen by all of them."""
    model, first = model_of(config_of(task=task, blocks=blocks)), 0 if task == "lm" else 15
    for seed in range(4):
        future_is_invisible(model, 50, 16, seed, first)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_encoder_sees_both_sides_and_no_padding(blocks):
    config = config_of(task="listops", blocks=blocks)
    model, (idx, _) = model_of(config), inputs(config)
    idx[:, :20], idx[:, 20:] = idx[:, :20].clamp(min=1), 0
    torch.testing.assert_close(model(idx)[0], model(idx[:, :20])[0], rtol=1e-9, atol=1e-9)
    states = []
    hooks = [m.register_forward_hook(lambda m, x, y: states.append(y))
             for m in (model.drop, model.ln_f)]
    model(idx)
    gradient, = torch.autograd.grad(states[1][:, 3].sum(), states[:1])
    assert ((gradient.abs().sum(-1) > 0) == (idx != 0)).all()
    for hook in hooks:
        hook.remove()
    assert model(torch.zeros_like(idx))[0].isfinite().all(), "a row that sees nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [60.0, 1e4])
def test_a_late_key_with_a_large_bias(bias, dtype):
    """A maximum over all keys would leave 0 / 0 for the queries before it, or let it through."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 16, dtype=dtype) for _ in range(3))
    b = torch.zeros(1, 2, 1, 8)
    b[..., 5], b[..., 2] = bias, -bias
    b.requires_grad_()
    A0 = nano.initial_scores(q.float(), k.float(), causal=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = nano.evolved_attention(A0, b, v)
    y.float().sum().backward()
    assert y.isfinite().all() and b.grad.isfinite().all()
    for t in range(8):
        P = (A0[..., t, :t + 1] + b[..., 0, :t + 1]).softmax(-1)
        expected = (P[:, :, None] @ v[:, :, :t + 1].float())[:, :, 0]
        torch.testing.assert_close(y[:, :, t].float(), expected, atol=0.03, rtol=0.02)


def test_scores_and_biases_are_float32_under_autocast():
    part, x = nano.GPT(config_of()).h[0].attn, torch.randn(2, 5, 32)
    exact = part(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(exact, part(x, x)))


@pytest.mark.parametrize("task", ["lm", "encdec", "prefix"])
def test_generation_is_that_of_full_forwards(task):
    config = config_of(task=task)
    model, (idx, _) = model_of(config), inputs(config)
    out = model.generate(idx[:, :16], 25, temperature=0)
    for t in range(16, 41):
        logits, _ = model(out[:, max(0, t - nano.context(config)):t])
        assert torch.equal(out[:, t], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("ffn", ["full", "random"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_parameters_products_and_flops_are_those_of_the_formulas(task, blocks, ffn, monkeypatch):
    config = config_of(task=task, blocks=blocks, ffn=ffn)
    C, L, H, V, T = 32, 6, 4, config.vocab_size, config.block_size
    model = nano.GPT(config)
    matrices = {"attention": 4 * L * C * C if blocks == 0 else 6 * blocks * C * C + L * C * C,
                "ffn": 8 * L * C * C if ffn == "full" or blocks == 0 else 0}
    vectors = {"attention": L * C if blocks == 0 else 2 * L * C,  # a norm, and c^l
               "ffn": L * C + (7 * L * C if ffn == "random" and blocks else 0)}
    between = max(0, blocks - 1) * C + C
    weights = {name: matrices[name] + vectors[name] for name in matrices}
    expected = sum(weights.values()) + between
    if task == "encdec":
        expected = 3 * weights["attention"] + 2 * weights["ffn"] + 2 * between
    assert sum(p.numel() for p in model.parameters()) - (V + nano.context(config)) * C == expected

    products, real = [], nano.initial_scores
    monkeypatch.setattr(nano, "initial_scores", lambda *args: products.append(1) or real(*args))
    idx, _ = inputs(config, B=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = model(idx)
    sides = 3 if task == "encdec" else 1
    assert len(products) == blocks * sides, "a query meets a key once in a block"
    S = 2 * T - 1 if task == "prefix" else T  # tokens in a stack
    ffn_flops = 2 * 8 * C * C if ffn == "full" or blocks == 0 else 2 * (1 + 4 + 4 + 1) * C * C
    if blocks == 0:
        attention_flops = L * (8 * C * C + 4 * S * C)
    else:  # A0 from 2C channels, P v from C in each layer; b: W T^l for all keys
        attention_flops = blocks * (8 * C * C + 4 * S * C) + L * (2 * S * C + 2 * C * C + 4 * C * H)
    flops = sides * attention_flops + (2 if sides == 3 else 1) * L * ffn_flops
    assert counter.get_total_flops() == S * flops + 2 * logits.size(1) * C * V


def test_random_maps_are_sines_and_cosines_and_leave_a_bias_at_depth_0():
    config, C = config_of(ffn="random", n_embd=64), 64
    torch.manual_seed(0)
    ffn = nano.RandomFF(config, 3)
    torch.manual_seed(0)
    for name, n, k, part in (("U_1", C, 4 * C, np.s_[:, :C]), ("V_1", 4 * C, 4 * C, np.s_[:C]),
                             ("U_2", 4 * C, C, np.s_[:, :C]), ("V_2", C, C, np.s_[:])):
        G = torch.randn(n, n // 2, dtype=torch.float64)  # the code: theta p (n G), theta = l pi / n
        angle = 3 * math.pi / n * torch.arange(n // 2).double() * (n * G)
        full = torch.cat([angle.sin(), angle.cos()], 1) / math.sqrt(k)
        torch.testing.assert_close(getattr(ffn, name).double(), full[part], rtol=0, atol=1e-6)
    diagonal = (ffn.V_2.double() @ ffn.V_2.double().T).diagonal()
    torch.testing.assert_close(diagonal, torch.full((C,), 0.5).double(), rtol=1e-5, atol=0)
    model = model_of(config_of(ffn="random"))
    model(*inputs(config_of()))[1].backward()
    for block in model.h:
        for l, ffn in enumerate(block.ffn):
            out = ffn(torch.randn(5, 32).double())
            assert torch.allclose(out, ffn.bias_2.expand_as(out)) == (l == 0)
            assert (ffn.s_2.grad.abs().max() > 0) == (l > 0)


@pytest.fixture(scope="session")
def listops(corpus):
    """The folder that data/prepare.py writes."""
    subprocess.run([sys.executable, corpus.parent / "prepare.py", "listops"], check=True)
    return corpus.parent / "listops"


def test_rows_of_expressions(listops, monkeypatch):
    monkeypatch.setattr(nano, "find_data", lambda config: listops)
    data = nano.Expressions(config_of(task="listops", block_size=33), torch.device("cpu"))
    raw = torch.from_numpy(np.fromfile(listops / "val.bin", "<u2").reshape(-1, 33).astype(int))
    starts = np.concatenate(data.windows("val", 10**9))
    x, y = data.rows("val", starts)
    assert torch.equal(x, raw[:-1, 1:]) and torch.equal(y, raw[:-1, :1] + 1)
    train = {tuple(r) for r in np.fromfile(listops / "train.bin", "<u2").reshape(-1, 33).tolist()}
    order = data.order(config_of(max_iters=5, batch_size=30))
    for step in range(5):
        x, y = data.rows("train", order[step, 0])
        assert all((v - 1, *row) in train for row, (v,) in zip(x.tolist(), y.tolist()))
    assert data.decode([12, 3, 15, 0, 0]) == "[MAX 2 ] "


@pytest.fixture
def argv(small, listops, monkeypatch):
    find_data = nano.find_data
    monkeypatch.setattr(nano, "find_data",
                        lambda config: listops if config.dataset == "listops" else find_data(config))
    return [*small, "--n_layer", "4"]


@pytest.mark.parametrize("task", TASKS)
def test_a_run_compares_and_examines(argv, task):
    arms = nano.main([*argv, "--task", task, "--compare"])["arms"]
    assert list(arms) == ["technique", "dense", "without b", *["prefix"] * (task == "encdec")]
    rows = arms["technique"]["evaluation"]
    assert rows["b set to 0"]["loss"] != arms["technique"]["best_val_loss"]
    assert ("encoder's output set to 0" in rows) == (task == "encdec")
    assert "b set to 0" not in arms["without b"]["evaluation"]
    maps = [row for name, row in rows.items() if name.startswith("maps of")]
    assert len(maps) == (6 if task == "encdec" else 2) and all(0 < row["layer 1"] < 1 for row in maps)
    assert arms["without b"]["evaluation"]["maps of h.0.attn"]["layer 1"] == 0
    sample = arms["technique"]["sample"]
    if task == "listops":
        assert 0 <= rows["all expressions"]["accuracy"] <= 1 and len(sample.splitlines()) == 5
    assert (" ==> " in sample) == (task in ("encdec", "prefix"))


def test_how_much_maps_change_is_that_of_a_literal_loop(corpus):
    config = config_of(n_layer=2, blocks=1, dataset=str(corpus), device="cpu", eval_tokens=16 * 6)
    run = nano.Run(config)
    config.vocab_size = run.data.meta["vocab_size"]
    model = model_of(config).float()
    x, _ = run.data.rows("val", np.arange(6) * 16)
    h = model.drop(model.wte(x) + model.wpe.weight) * model.scale
    A0, b = model.h[0].attn(h, h)
    below, above = ((A0 + b[l]).softmax(-1) for l in range(2))
    found = [(above[i, n, t] - below[i, n, t]).abs().sum().item() / 2
             for i in range(6) for n in range(4) for t in range(16)]
    rows = nano.measure(config, run, model)
    assert rows["maps of h.0.attn"]["layer 1"] == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize("task", ["encdec", "listops"])
def test_a_killed_run_goes_on_to_the_bit(argv, tmp_path, monkeypatch, task):
    argv = [*argv, "--task", task, "--dropout", "0.1", "--ffn", "random"]
    goes_on_to_the_bit(nano, monkeypatch, tmp_path, argv, 15)
