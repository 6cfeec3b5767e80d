"""nano_jump.py: least squares and r^2 from moments, the metrics, early exit, the decoder, linear parts, models taken from elsewhere.

python -m pytest tests/test_jump.py
"""
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, killed_and_resumed, refused
from torch.utils.flop_counter import FlopCounterMode

import nano_jump as nano
import nano_ssa

NEVER, ALWAYS = 1.112, -1.112
assert nano.NEVER == NEVER


def settings(**changes):
    small = dict(n_layer=4, n_head=2, n_embd=16, block_size=16, vocab_size=50, batch_size=4)
    return nano.Settings(**{**small, **changes})


def model_of(s, seed=0, std=0.3):
    """In float64, with weights that make layers differ and readings confident."""
    torch.manual_seed(seed)
    model = nano.GPT(s).double().eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1 and name.endswith("weight")), std=std)
    return model


def tokens(B=2, T=16, seed=0):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


def states_of(model, B=16, seed=0):
    """h_0, .., h_L of B texts, each (n, C)."""
    with torch.no_grad():
        return [h.flatten(0, 1) for h in model.states(tokens(B, seed=seed))]


def moments_of(states):
    width = 1 + sum(h.size(1) for h in states)
    S = torch.zeros(width, width, dtype=torch.float64)
    nano.add_moments(S, states)
    return S


def fit(S, C, ridge=0.0, affine=False):
    return nano.fit(S, C, ridge, affine, torch.float64)


def SSE(x, y, A, a=0.0):
    return (x @ A + a - y).square().sum().item()


@pytest.fixture
def run(corpus, tmp_path):
    s = nano.Settings(n_layer=3, n_head=2, n_embd=32, block_size=32, batch_size=4, dataset=str(corpus), fit_tokens=3000, eval_tokens=2048)
    data = nano.Data(s, torch.device("cpu"))
    s.vocab_size = data.vocab_size
    (tmp_path / "out").mkdir()
    return nano.Run(s, torch.device("cpu"), torch.float32, "", 0, 1, data, tmp_path / "out")


# states

def test_the_last_state_read_out_is_the_model_to_the_bit():
    model = model_of(settings())
    states = model.states(tokens())
    assert len(states) == 5 and torch.equal(model.read_out(states[-1])[0], model(tokens())[0])
    x = model.wte.weight[tokens()] + model.wpe.weight[:16]
    assert torch.equal(states[0], x)
    for block, h in zip(model.h, states[1:]):
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
        assert torch.equal(h, x)


def test_it_is_the_dense_twin_of_the_other_scripts():
    s, theirs = settings(), nano_ssa.Config(ssa="off", n_layer=4, n_head=2, n_embd=16, block_size=16, vocab_size=50)
    ours, twin = model_of(s), nano_ssa.GPT(theirs).double()
    twin.load_state_dict(ours.state_dict())
    for model in (ours, twin):
        model(tokens(), tokens())[1].backward()
    assert torch.equal(ours(tokens())[0], twin(tokens())[0])
    assert all(torch.equal(p.grad, twin.get_parameter(name).grad) for name, p in ours.named_parameters())
    assert sum(p.numel() for p in nano.dense_twin(s).parameters()) == sum(p.numel() for p in ours.parameters())


# least squares

def test_maps_equal_lstsq_and_the_normal_equations_hold():
    states = states_of(model_of(settings()))
    maps = fit(moments_of(states), 16)
    affine = fit(moments_of(states), 16, affine=True)
    assert set(maps) == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    for (i, j), (A, a) in maps.items():
        torch.testing.assert_close(A, torch.linalg.lstsq(states[i], states[j]).solution, atol=1e-8, rtol=1e-6)
        assert not a.any() and (states[i].T @ (states[j] - states[i] @ A)).abs().max() < 1e-8
        with_one = torch.cat([torch.ones(len(states[i]), 1, dtype=torch.float64), states[i]], 1)
        torch.testing.assert_close(torch.cat([affine[i, j][1][None], affine[i, j][0]]), torch.linalg.lstsq(with_one, states[j]).solution, atol=1e-7, rtol=1e-6)


def test_a_layer_maps_to_itself_by_the_identity_or_by_the_projection_onto_its_span():
    x = torch.randn(100, 16, dtype=torch.float64)
    torch.testing.assert_close(nano.least_squares(x.T @ x, x.T @ x), torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
    x = torch.randn(100, 5, dtype=torch.float64) @ torch.randn(5, 16, dtype=torch.float64)
    P = nano.least_squares(x.T @ x, x.T @ x)
    torch.testing.assert_close(P @ P, P, atol=1e-8, rtol=0)
    torch.testing.assert_close(P, P.T, atol=1e-8, rtol=0)
    torch.testing.assert_close(x @ P, x, atol=1e-8, rtol=0)
    assert P.trace().item() == pytest.approx(5)


def test_a_rank_deficient_layer_gets_the_smallest_of_the_best_maps():
    """Layer 0 of a character model with more channels than V + T - 1, and fewer states than channels: as a pseudo-inverse has it."""
    s = settings(vocab_size=5, block_size=4, n_embd=16)
    with torch.no_grad():
        states = [h.flatten(0, 1) for h in model_of(s).states(torch.randint(5, (200, 4), generator=torch.Generator().manual_seed(0)))]
    assert torch.linalg.matrix_rank(states[0]) == 5 + 4 - 1
    for some in (states, [h[:10] for h in states]):
        for (i, j), (A, _) in fit(moments_of(some), 16).items():
            torch.testing.assert_close(A, torch.linalg.pinv(some[i], rcond=1e-6) @ some[j], atol=1e-5, rtol=1e-5)


def test_a_linear_map_is_found_again():
    x, M = torch.randn(100, 16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64)
    (A, a), = fit(moments_of([x, x @ M]), 16).values()
    torch.testing.assert_close(A, M, atol=1e-9, rtol=1e-9)
    (A, a), = fit(moments_of([x, x @ M + 3]), 16, affine=True).values()
    torch.testing.assert_close(A, M, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(a, torch.full_like(a, 3), atol=1e-9, rtol=1e-9)


def test_layers_that_are_linear_are_explained_wholly_and_their_maps_compose():
    model = model_of(settings(n_layer=3))
    model.h = torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False).double() for _ in range(3))
    S = moments_of(states_of(model))
    maps = fit(S, 16)
    for (i, j), pair in maps.items():
        assert nano.explained(S, 16, i, j, *pair) == pytest.approx((1.0, 1.0), abs=1e-9)
    for i, j, k in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        torch.testing.assert_close(maps[i, j][0] @ maps[j, k][0], maps[i, k][0], atol=1e-7, rtol=1e-7)


def test_no_other_map_fits_the_text_better():
    states = states_of(model_of(settings()))
    S, g = moments_of(states), torch.Generator().manual_seed(0)
    maps, affine = fit(S, 16), fit(S, 16, affine=True)
    for (i, j), (A, a) in maps.items():
        best = SSE(states[i], states[j], A)
        assert SSE(states[i], states[j], *affine[i, j]) < best < SSE(states[i], states[j], torch.eye(16, dtype=torch.float64))
        for _ in range(5):
            assert best < SSE(states[i], states[j], A + 1e-3 * torch.randn(16, 16, generator=g, dtype=torch.float64))


def test_the_penalty():
    """Without one ordinary least squares, with more of it smaller maps, at last 0; a bias is free of it. Literally, as one system of equations."""
    states = states_of(model_of(settings()))
    S = moments_of(states)
    x, y, unit = states[1], states[3], states[1].square().sum(0).mean()
    sizes = []
    for ridge in (0.0, 1e-2, 1.0):
        A = fit(S, 16, ridge)[1, 3][0]
        torch.testing.assert_close(A, torch.linalg.solve(x.T @ x + ridge * unit * torch.eye(16, dtype=torch.float64), x.T @ y), atol=1e-8, rtol=1e-6)
        sizes.append(A.norm().item())
    assert sizes == sorted(sizes, reverse=True)
    assert fit(S, 16, 1e12)[1, 3][0].norm() < 1e-6
    A, a = fit(S, 16, 1e8, affine=True)[1, 3]
    assert A.norm() < 1e-4
    torch.testing.assert_close(a, y.mean(0), atol=1e-3, rtol=1e-3)


def test_moments_do_not_depend_on_the_order_of_the_text_or_on_the_chunks():
    states = states_of(model_of(settings()))
    S, order = torch.zeros(81, 81, dtype=torch.float64), torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for part in order.split(50):
        nano.add_moments(S, [h[part] for h in states])
    torch.testing.assert_close(S, moments_of(states), atol=1e-9, rtol=1e-12)
    assert S[0, 0] == 256 and torch.allclose(S[0, 1:17], states[0].sum(0))


def test_r2_from_moments_is_r2():
    """Against residuals, on other text than that of the fit, for maps with and without a bias and for the identity; a channel that never varies."""
    model = model_of(settings())
    fitted, held = states_of(model), states_of(model, seed=1)
    S, V = moments_of(fitted), moments_of(held)
    same = torch.eye(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for maps in (fit(S, 16), fit(S, 16, affine=True), {pair: same for pair in ((0, 1), (0, 4), (2, 3))}):
        for (i, j), (A, a) in maps.items():
            wrong = (held[j] - held[i] @ A - a).square().sum(0)
            spread = (held[j] - held[j].mean(0)).square().sum(0)
            assert nano.explained(V, 16, i, j, A, a) == pytest.approx(((1 - wrong / spread).mean().item(), 1 - (wrong.sum() / spread.sum()).item()), abs=1e-9)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], dtype=torch.float64)  # means 3 and 5: SST 14, SSE of the identity 9 + 75
    assert nano.explained(moments_of([x, y]), 2, 0, 1, torch.eye(2), torch.zeros(2)) == pytest.approx((1 - 9 / 14, 1 - 84 / 14))


# what is fitted to

def test_the_text_of_the_fit(run):
    found = list(nano.fit_batches(run))
    assert sum(used.sum().item() for _, used in found) == 3000 and all(used.shape == x.shape for x, used in found)
    assert [used.flatten().int().diff().clamp(min=0).sum().item() for _, used in found] == [0] * len(found), "only the end of the last window is left out"
    again = list(nano.fit_batches(run))
    assert all(torch.equal(a, b) and torch.equal(u, w) for (a, u), (b, w) in zip(found, again))
    text = bytes(run.data.train.to(torch.uint8).tolist())
    assert all(bytes(row.to(torch.uint8).tolist()) in text for x, _ in found for row in x)
    run.settings.seed += 1
    assert not torch.equal(next(nano.fit_batches(run))[0], found[0][0])
    run.settings.fit_tokens = 10**9
    assert sum(used.sum().item() for _, used in nano.fit_batches(run)) == len(run.data.windows("train")) * 32


def test_one_position_of_a_window(run):
    run.settings.fit_positions, run.settings.fit_tokens = "one", 1000
    used = torch.cat([used for _, used in nano.fit_batches(run)])
    assert used.shape == (1000, 32) and (used.sum(1) == 1).all()
    counts = used.sum(0)
    assert counts.min() > 5 and counts.max() < 80, "31 are expected at each position"
    run.settings.n_embd = 10**6
    with pytest.raises(nano.UserError, match="--fit_positions one finds"):
        nano.load_data(run.settings, run.device)


@pytest.mark.parametrize("positions", ["all", "one"])
def test_moments_of_a_run_are_those_of_its_states(run, positions):
    run.settings.fit_positions, run.settings.fit_tokens = positions, 500
    model = nano.GPT(run.settings).eval()
    with torch.no_grad():
        rows = [[h[used] for h in model.states(x)] for x, used in nano.fit_batches(run)]
    S = nano.moments(run, model, nano.fit_batches(run))
    assert S.dtype == torch.float64 and S[0, 0] == 500
    torch.testing.assert_close(S, moments_of([torch.cat(h) for h in zip(*rows)]), atol=1e-8, rtol=1e-8)


# the metrics

def test_the_metrics_literally():
    """Token by token, from the definitions: the reading's first choice is looked for in the full model's list, not the reverse."""
    g = torch.Generator().manual_seed(0)
    z, full = torch.randn(40, 50, generator=g), torch.randn(40, 50, generator=g)
    targets = torch.randint(50, (40,), generator=g)
    found = nano.against(z[None], full.log_softmax(-1), targets[None])
    for n in range(40):
        p, P = z[n].softmax(-1), full[n].softmax(-1)
        choice = p.tolist().index(p.max().item())
        order = sorted(range(50), key=lambda v: -P[v].item())
        expected = [*(float(choice in order[:k]) for k in (1, 5, 10)), -math.log(P[choice]), sum(P[v].item() * math.log(P[v] / p[v]) for v in range(50)),
                    -math.log(p[targets[n]]), sorted(p.tolist())[-1] - sorted(p.tolist())[-2]]
        assert found[:, n].tolist() == pytest.approx(expected, abs=1e-5)


def lenses_of(model, maps):
    L = len(model.h)
    return dict(id=lambda x, h, l: model.read_out(h)[0], mat=lambda x, h, l: model.read_out(nano.jump(h, maps, l, L))[0])


def test_measure_literally_and_the_last_layer_is_the_model(run):
    model = nano.GPT(run.settings).eval()
    maps = {pair: (A.float(), a.float()) for pair, (A, a) in fit(nano.moments(run, model, nano.fit_batches(run)), 32).items()}
    starts = run.data.windows("val", 2048)
    means, kept = nano.measure(run, model, starts, lenses_of(model, maps))
    x, y = run.data.rows("val", starts)
    with torch.no_grad():
        states = model.states(x)
        full = model.read_out(states[-1])[0].flatten(0, 1).log_softmax(-1)
        for l, h in enumerate(states):
            for name, state in ("id", h), ("mat", h @ maps[l, 3][0] if l < 3 else h):
                logits = F.linear(model.ln_f(state), model.wte.weight)
                expected = nano.against(logits, full, y)
                torch.testing.assert_close(means[name][l], expected.double().mean(-1), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(kept[name][:, l], expected[[0, 6]], atol=1e-5, rtol=1e-5)
    for name in ("id", "mat"):
        last = means[name][-1].tolist()
        assert last[:3] == [1, 1, 1] and last[3] == pytest.approx(-full.max(-1).values.mean().item(), abs=1e-5) and abs(last[4]) < 1e-6
        assert last[5] == pytest.approx(model(x, y)[1].item(), abs=1e-5)
        assert (means[name][:, 0] <= means[name][:, 1]).all() and (means[name][:, 1] <= means[name][:, 2]).all()
        assert (means[name][:, 3] >= last[3] - 1e-6).all(), "no choice surprises the full model less than its own"


# early exit

def test_the_threshold():
    t = torch.arange(5)
    for lam in (-0.2, 0.0, 0.5, 1.0):
        for i in range(5):
            assert nano.threshold(lam, t, 3.5)[i].item() == pytest.approx(0.9 * lam + 0.1 * math.exp(-4 * i / 3.5), abs=1e-6)
    late = torch.tensor([10**6])
    assert nano.threshold(1.0, late, 3.5) < 1 - 1e-6, "lambda = 1 is not never"
    assert nano.threshold(nano.NEVER, late, 3.5) > 1 and nano.threshold(-nano.NEVER, t, 3.5).max() < 0


def test_exits_with_exact_context_literally():
    L, n, N = 5, 200, 8.5
    g = torch.Generator().manual_seed(0)
    sure, same, t = torch.rand(L + 1, n, generator=g), (torch.rand(L + 1, n, generator=g) > 0.5).float(), torch.arange(n) % 16
    same[L] = 1
    lams = [ALWAYS, 0.0, 0.3, 0.8, NEVER]
    means = []
    for lam, (left, hit) in zip(lams, nano.frontier(same, sure, t, lams, N)):
        for i in range(n):
            expected = next((l for l in range(1, L) if sure[l, i] > 0.9 * lam + 0.1 * math.exp(-4 * (i % 16) / N)), L)
            assert left[i] == expected and hit[i] == same[expected, i]
        means.append(left.float().mean().item())
    assert means == sorted(means) and means[0] == 1 and means[-1] == L
    for layers in ((), (3,), (2, 4)):
        left, hit = next(nano.frontier(same, sure, t, [0.3], N, layers))
        for i in range(n):
            expected = next((l for l in layers if sure[l, i] > 0.9 * 0.3 + 0.1 * math.exp(-4 * (i % 16) / N)), L)
            assert left[i] == expected and hit[i] == same[expected, i]


def test_the_threshold_is_picked_on_one_half_and_reported_on_the_other():
    """On the first half layer 1 is always right where it is sure, on the second it is right in half of the cases."""
    s = settings(n_layer=3, block_size=10)
    same, sure = torch.zeros(4, 2000), 0.3 * torch.rand(4, 2000, generator=torch.Generator().manual_seed(0))
    same[3] = 1
    sure[1, ::2], same[1, :1000:2], same[1, 1000::4] = 0.9, 1, 1
    found = nano.exits(s, dict(id=torch.stack([same, sure]), mat=torch.stack([torch.ones_like(same), sure])))
    at = found["at"]["0.99"]
    assert at["id"]["layers_saved"] == pytest.approx(1 / 3, abs=0.02) and at["id"]["agreement"] == pytest.approx(0.75, abs=0.02)
    assert at["mat"]["layers_saved"] == pytest.approx(2 / 3, abs=0.01) and at["mat"]["agreement"] == 1
    curve = found["curve"]["id"]
    assert [point["threshold"] for point in curve] == [-nano.NEVER, *(i / 10 for i in range(11)), nano.NEVER]
    assert (curve[0]["layers"], curve[-1]["layers"], curve[-1]["agreement"]) == (1, 3, 1)
    assert curve[0]["agreement"] == pytest.approx(0.25)


@pytest.mark.parametrize("method", ["id", "mat"])
def test_saved_flops_are_those_that_a_decoder_saves(method):
    """Counted, attention aside, which the counter does not see on a CPU: the formula has 4 C T for each layer that is gone through."""
    s = settings()
    model = model_of(s)
    maps, prompt = maps_of(model, method), tokens(1, 5)
    attention, full = 4 * 16 * 16, 4 * (24 * 16 * 16 + 4 * 16 * 16) + 2 * 50 * 16
    for last, lam in ((1, ALWAYS), (2, ALWAYS), (3, ALWAYS), (4, NEVER)):  # every check up to the last is made
        decoder = nano.Decoder(model, maps, range(1, 4), NEVER)
        decoder(prompt)
        bars = iter([nano.NEVER] * (last - 1) + [lam] * 4)
        with pytest.MonkeyPatch.context() as patch, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            patch.setattr(nano, "confidence", lambda z: torch.full(z.shape[:-1], -9.0 if next(bars) > 1 else 9.0))
            with FlopCounterMode(display=False) as counter:
                _, through = decoder.run(tokens(1, 1), 5)
        assert through.item() == last
        scores = last * 4 * 16 * 6  # the math kernel's, over 6 keys
        spent = counter.get_total_flops() - scores + last * attention
        assert nano.saved_flops(s, torch.tensor([last]), method == "mat") == pytest.approx(1 - spent / full)
    pair = [nano.saved_flops(s, torch.tensor([layers]), True) for layers in (1, 4)]
    assert nano.saved_flops(s, torch.tensor([1, 4]), True) == pytest.approx(sum(pair) / 2)


# the decoder

def oracle(model, idx, maps, layers, lam, kv):
    """One token after the other, each layer after layer, with lists for a cache. idx (1, T) -> logits (T, vocab), layers gone through."""
    L, T, H = len(model.h), idx.size(1), model.h[0].attn.n_head
    K, V = [[] for _ in range(L)], [[] for _ in range(L)]
    out, left = [], []
    to = lambda x, i, j: x if maps is None or i == j else x @ maps[i, j][0] + maps[i, j][1]
    for t in range(T):
        x, gone, logits = model.wte.weight[idx[0, t]] + model.wpe.weight[t], None, None
        for l, block in enumerate(model.h):
            if gone is None and l in layers:
                reading = model.ln_f(to(x, l, L)) @ model.wte.weight.T
                p = sorted(reading.softmax(-1).tolist())
                if p[-1] - p[-2] > 0.9 * lam + 0.1 * math.exp(-4 * t / ((model.block_size + 1) / 2)):
                    gone, logits = l, reading
            seen = block.ln_1(x if gone is None or kv == "copy" else to(x, gone, l))
            K[l].append(block.attn.c_k(seen).view(H, -1))
            V[l].append(block.attn.c_v(seen).view(H, -1))
            if gone is None:
                q = block.attn.c_q(seen).view(H, -1)
                heads = [torch.stack([q[h] @ k[h] for k in K[l]]).div(math.sqrt(q.size(-1))).softmax(0) @ torch.stack([v[h] for v in V[l]]) for h in range(H)]
                x = x + block.attn.c_proj(torch.cat(heads))
                x = x + block.mlp(block.ln_2(x))
        out.append(model.ln_f(x) @ model.wte.weight.T if gone is None else logits)
        left.append(L if gone is None else gone)
    return torch.stack(out), left


WAYS = [(method, layers, lam, kv) for method in ("id", "mat", "affine") for layers, lam in (((2,), -math.inf), ((1, 2, 3), 0.05), ((1, 3), 0.05))
        for kv in (("copy",) if method == "id" else ("copy", "mat"))]


def maps_of(model, method):
    return None if method == "id" else fit(moments_of(states_of(model, 32)), 16, affine=method == "affine")


@pytest.mark.parametrize("method, layers, lam, kv", WAYS)
def test_whole_text_at_once_token_by_token_and_literally_are_the_same(method, layers, lam, kv):
    model = model_of(settings())
    maps, idx = maps_of(model, method), tokens(8)
    logits, left = nano.Decoder(model, maps, layers, lam, kv, rows=8).run(idx)
    steps = nano.Decoder(model, maps, layers, lam, kv, rows=8)
    for t in range(16):
        one, through = steps.run(idx[:, t:t + 1], t)
        torch.testing.assert_close(one[:, 0], logits[:, t], atol=1e-9, rtol=1e-9)
        assert torch.equal(through[:, 0], left[:, t])
    for row in range(3):
        with torch.no_grad():
            expected, through = oracle(model, idx[row:row + 1], maps, layers, lam, kv)
        torch.testing.assert_close(logits[row], expected, atol=1e-9, rtol=1e-9)
        assert left[row].tolist() == through
    if lam > 0:
        assert len(left.unique()) == len(layers) + 1, "this text tests every way out"


@pytest.mark.parametrize("kv", ["copy", "mat"])
@pytest.mark.parametrize("method", ["id", "mat"])
def test_never_leaving_is_full_generation(method, kv):
    """Tokens and logits, with every check made and none passed; also beyond the context, and with a bound at the last layer."""
    model, idx = model_of(settings()), tokens(2, 5)
    full = model.generate(idx, 20, temperature=0)
    for layers, lam in (((1, 2, 3), NEVER), ((4,), -math.inf), ((), -math.inf)):
        decoder = nano.Decoder(model, maps_of(model, method), layers, lam, kv, rows=2)
        assert torch.equal(model.generate(idx, 20, temperature=0, next_logits=decoder), full)
        assert len(decoder.through) == 20 and all((left == 4).all() for left in decoder.through)
        logits, left = nano.Decoder(model, maps_of(model, method), layers, lam, kv, rows=2).run(full[:, :16])
        torch.testing.assert_close(logits, model(full[:, :16])[0], atol=1e-12, rtol=1e-12)
        assert (left == 4).all()


def test_always_leaving_takes_the_first_layer_that_may():
    model = model_of(settings())
    for layers, lam, expected in (((1, 2, 3), ALWAYS, 1), ((2, 3), ALWAYS, 2), ((3,), -math.inf, 3)):
        logits, left = nano.Decoder(model, None, layers, lam, rows=2).run(tokens())
        assert (left == expected).all()
    alone = nano.Decoder(model, None, (3,), rows=2)
    torch.testing.assert_close(alone.run(tokens())[0], model.read_out(model.states(tokens())[3])[0], atol=1e-12, rtol=1e-12)


def test_a_prompt_goes_through_all_layers_and_what_follows_leaves():
    model = model_of(settings())
    decoder = nano.Decoder(model, None, (2,))
    idx = tokens(1, 6)
    torch.testing.assert_close(decoder(idx), model(idx)[0][:, -1], atol=1e-12, rtol=1e-12)
    more = tokens(1, 7, seed=1)
    more[:, :6] = idx
    full_prompt = decoder.cache.clone()
    found = decoder(more)
    assert [left.item() for left in decoder.through] == [4, 2]
    by_hand = nano.Decoder(model, None, (2,))
    by_hand.cache.copy_(full_prompt)
    torch.testing.assert_close(found, by_hand.run(more[:, 6:], 6)[0][:, 0], atol=1e-12, rtol=1e-12)
    with pytest.raises(AssertionError, match="new Decoder"):
        decoder(tokens(1, 9))


@pytest.mark.parametrize("method, layers, lam, kv", WAYS)
def test_the_future_is_invisible(method, layers, lam, kv):
    model = model_of(settings())
    maps, idx = maps_of(model, method), tokens()
    logits, left = nano.Decoder(model, maps, layers, lam, kv, rows=2).run(idx)
    for t in (1, 7, 15):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 50
        changed, through = nano.Decoder(model, maps, layers, lam, kv, rows=2).run(other)
        assert torch.equal(logits[:, :t], changed[:, :t]) and torch.equal(left[:, :t], through[:, :t])
        assert not torch.equal(logits[:, t], changed[:, t])
    model.zero_grad()
    x = model.embed(idx)
    x.retain_grad()
    model.embed = lambda _: x
    model.states(idx)[-1][:, 6].sum().backward()
    assert x.grad[:, 6].any() and not x.grad[:, 7:].any()


def test_left_layers_are_not_computed():
    """After layer 2 of 4, a token costs two layers, two layers' keys and values, a head and, with maps, those it uses."""
    s = settings()
    model, C, V = model_of(s), 16, 50
    maps = maps_of(model, "mat")
    for kv, extra in (("copy", 0), ("mat", 2 * C * C)):  # of layer 3; that of layer 2 is the identity
        for m, jumps in ((None, 0), (maps, 2 * C * C)):
            decoder = nano.Decoder(model, m, (2,), kv=kv)
            decoder(tokens(1, 5))
            with FlopCounterMode(display=False) as counter:
                decoder.run(tokens(1, 1), 5)
            scores = counter.get_flop_counts()["Global"].get(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 0)
            assert counter.get_total_flops() - scores == 2 * 24 * C * C + 2 * 4 * C * C + 2 * V * C + jumps + (extra if m else 0)


# parts

def test_parts_equal_lstsq_on_what_goes_in_and_comes_out(run):
    model = nano.GPT(run.settings).eval()
    parts = nano.fit_parts(run, model, nano.fit_batches(run))
    x = torch.cat([x for x, used in nano.fit_batches(run)])
    used = torch.cat([used for _, used in nano.fit_batches(run)])
    with torch.no_grad():
        h = model.states(x)
        for l, block in enumerate(model.h):
            a = block.ln_1(h[l])
            y = block.attn(a)
            m = block.ln_2(h[l] + y)
            for name, before, after in (("ln_1", h[l], a), ("attn", a, y), ("ln_2", h[l] + y, m), ("mlp", m, block.mlp(m))):
                G, XY = (before[used].double().T @ z[used].double() for z in (before, after))
                torch.testing.assert_close(parts[l][name].double(), torch.linalg.pinv(G, rcond=1e-12, hermitian=True) @ XY, atol=1e-4, rtol=1e-3)


def test_linear_parts_literally(run):
    """Layers up to l are real; above, attention is a map of the same token's normalised state, at every position."""
    model = nano.GPT(run.settings).eval()
    parts = nano.fit_parts(run, model, nano.fit_batches(run))
    starts = run.data.windows("val", 512)
    means, _ = nano.measure(run, model, starts, {}, parts)
    x, y = run.data.rows("val", starts)
    with torch.no_grad():
        full = model(x)[0].flatten(0, 1).log_softmax(-1)
        for name, linear in (("attention", {"attn"}), ("feed-forward", {"mlp"}), ("both LayerNorms", {"ln_1", "ln_2"})):
            for l in range(3):
                h = model.states(x)[l]
                for depth in range(l, 3):
                    f = lambda part, z: z @ parts[depth][part] if part in linear else getattr(model.h[depth], part)(z)
                    h = h + f("attn", f("ln_1", h))
                    h = h + f("mlp", f("ln_2", h))
                expected = nano.against(F.linear(model.ln_f(h), model.wte.weight), full, y).double().mean(-1)
                torch.testing.assert_close(means[name][l], expected, atol=1e-5, rtol=1e-5)


def test_no_linear_part_is_the_model_and_a_linear_part_is_replaced_exactly():
    model = model_of(settings())
    x = model.embed(tokens())
    block = model.h[1]
    assert torch.equal(block(x), block(x, {}))
    block.mlp = torch.nn.Linear(16, 16, bias=False).double()
    torch.testing.assert_close(block(x, {"mlp": block.mlp.weight.T}), block(x), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(block(x, {"attn": torch.eye(16, dtype=torch.float64)}), block(x))


def test_linear_attention_sees_its_own_token_only():
    model, A = model_of(settings()), torch.randn(16, 16, dtype=torch.float64)
    idx, other = tokens(), tokens(seed=1)
    other[:, 9] = idx[:, 9]
    a, b = (model.embed(i) for i in (idx, other))
    for block in model.h:
        a, b = block(a, {"attn": A}), block(b, {"attn": A})
    assert torch.equal(a[:, 9], b[:, 9]) and not torch.equal(a[:, 8], b[:, 8])


# what --compare adds

def test_the_tuned_lens_learns(run):
    run.settings.fit_tokens, run.settings.max_iters = 50_000, 60
    torch.manual_seed(0)
    model = nano.GPT(run.settings)
    nano.train(run, "technique", model)
    model.eval()
    before = [p.clone() for p in model.parameters()]
    lens = nano.tuned_lens(run, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and all(p.grad is None for p in model.parameters())
    lenses = dict(lenses_of(model, None), tuned=lambda x, h, l: model.read_out(h + lens[l](h) if l < 3 else h)[0])
    means, _ = nano.measure(run, model, run.data.windows("val", 2048), lenses)
    assert (means["tuned"][:3, 4] < 0.9 * means["id"][:3, 4]).all(), "its KL is smaller than the logit lens's"


def test_bigrams_are_counted(run, corpus):
    found, ids = nano.bigrams(run), run.data.train.tolist()
    V = run.data.vocab_size
    follow = [b for a, b in zip(ids, ids[1:]) if a == 5]
    expected = torch.tensor([math.log((follow.count(v) + 0.1) / (len(follow) + 0.1 * V)) for v in range(V)])
    torch.testing.assert_close(found[5], expected, atol=1e-5, rtol=1e-5)
    run.data.train = np.memmap(corpus / "train.bin", dtype="<u2", mode="r")  # a large corpus
    assert torch.equal(nano.bigrams(run), found)
    run.data.vocab_size = 50257
    assert nano.bigrams(run) is None


# the script

@pytest.mark.parametrize("argv, words", [
    ("--exit_layer 7", ["--exit_layer 7", "1 to 6"]), ("--exit_layer 0", ["--exit_layer 0", "1 to 6"]), ("--exit_layer -2", ["--exit_layer", "-1"]),
    ("--fit_tokens 95", ["--fit_tokens 95", "96 or more"]), ("--fit_tokens 96 --affine", ["--fit_tokens 96", "97 or more"]), ("--fit_tokens 96 --compare", ["97 or more"]),
    ("--fit_tokens 0", ["--fit_tokens"]), ("--ridge -1", ["--ridge"]), ("--ridge inf", ["--ridge", "at most"]), ("--exit_threshold nan", ["--exit_threshold"]),
    ("--kv none", ["--kv none", "copy"]), ("--fit_positions some", ["--fit_positions some", "one"]),
    ("--init_from nowhere.pt", ["--init_from nowhere.pt", "no such file", "gpt2-medium"]), ("--init_from gpt3", ["--init_from gpt3", "no such file"]),
])
def test_bad_flags_get_one_line(capsys, tmp_path, argv, words):
    refused(nano.main, capsys, ["--device", "cpu", "--out_dir", str(tmp_path / "out"), *argv.split()], *words)
    assert not (tmp_path / "out").exists()


def test_other_models_get_one_line(capsys, corpus, tmp_path, small):
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save(dict(script="nano_ssa", settings={}), tmp_path / "ssa.pt")
    torch.save({}, tmp_path / "empty.pt")
    nano.main([*small[:-1], str(tmp_path / "trained"), "--max_iters", "1"])
    (tmp_path / "other").mkdir()
    for file in ("train.bin", "val.bin"):
        (tmp_path / "other" / file).write_bytes(bytes(4000))
    (tmp_path / "other" / "meta.json").write_text('{"tokenizer": "char", "alphabet": "ab", "vocab_size": 2}')
    for source, words in (("noise.pt", ["is not a checkpoint of nano_jump.py"]), ("ssa.pt", ["checkpoint of nano_ssa.py"]), ("empty.pt", ["is not a checkpoint"]),
                          ("trained/technique/best.pt", ["has a vocabulary of", "other one of 2"])):
        refused(nano.main, capsys, [*small, "--dataset", str(tmp_path / "other"), "--init_from", str(tmp_path / source)], source, *words)


def test_without_transformers_or_a_network_there_is_one_line(tmp_path):
    code = "import sys; {}; sys.path.insert(0, {!r}); import nano_jump; nano_jump.main(['--device', 'cpu', '--init_from', 'gpt2'])"
    run = lambda first: subprocess.run([sys.executable, "-c", code.format(first, str(ROOT))], capture_output=True, text=True, cwd=tmp_path,
                                       env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    done = run("sys.modules['transformers'] = None")
    assert done.returncode == 1 and done.stderr.strip() == "error: --init_from gpt2 needs the package transformers: pip install transformers"
    pytest.importorskip("transformers")
    done = run("pass")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "connect to the network once" in lines[0] and "Traceback" not in done.stderr, done.stderr


def saved_gpt2(folder, vocab_size, **changes):
    transformers = pytest.importorskip("transformers")
    config = dict(vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=3, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return model


def test_gpt2_has_the_logits_and_states_of_transformers(tmp_path, corpus, capsys):
    vocab_size = json.loads((corpus / "meta.json").read_text())["vocab_size"]
    theirs = saved_gpt2(tmp_path / "gpt2", vocab_size)
    argv = ["--device", "cpu", "--dataset", str(corpus), "--init_from", str(tmp_path / "gpt2"), "--eval_tokens", "1024", "--fit_tokens", "4000",
            "--sample_tokens", "8", "--out_dir", str(tmp_path / "out")]
    results = nano.main(argv)
    s = results["settings"]
    assert (s["n_layer"], s["n_embd"], s["block_size"], s["bias"], s["max_iters"]) == (3, 32, 32, True, 0)
    model = nano.GPT(nano.Settings(**s)).eval()
    model.load_state_dict(torch.load(tmp_path / "out" / "technique" / "best.pt", weights_only=True)["model"])
    idx = torch.randint(vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(idx, output_hidden_states=True)
        ours = model.states(idx)
        torch.testing.assert_close(model(idx)[0], found.logits, atol=1e-4, rtol=1e-4)
        for a, b in zip([*ours[:-1], model.ln_f(ours[-1])], found.hidden_states, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    again = nano.main(["--device", "cpu", "--eval_only", "--fit_tokens", "4000", "--sample_tokens", "8", "--out_dir", str(tmp_path / "out")])
    assert again["arms"]["technique"]["evaluation"]["precision"] == results["arms"]["technique"]["evaluation"]["precision"]


def test_folders_of_other_models_get_one_line(tmp_path, corpus, capsys):
    transformers = pytest.importorskip("transformers")
    vocab = json.loads((corpus / "meta.json").read_text())["vocab_size"]
    saved_gpt2(tmp_path / "relu", vocab, activation_function="relu")
    transformers.LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "nothing").mkdir()
    saved_gpt2(tmp_path / "wide", vocab, n_inner=64)
    saved_gpt2(tmp_path / "cut", vocab)
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    saved_gpt2(tmp_path / "lied", vocab)
    config = json.loads((tmp_path / "lied" / "config.json").read_text())
    (tmp_path / "lied" / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    for source, words in (("relu", "activation_function relu"), ("llama", "model_type llama"), ("nothing", "save_pretrained wrote"), ("wide", "n_inner 64, not 128"),
                          ("cut", "save_pretrained wrote"), ("lied", "save_pretrained wrote")):
        refused(nano.main, capsys, ["--device", "cpu", "--dataset", str(corpus), "--out_dir", str(tmp_path / "out"), "--init_from", str(tmp_path / source)], "--init_from", words)
        assert not (tmp_path / "out").exists()


def test_a_run_of_the_script(corpus, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, ROOT / "nano_jump.py", *SMALL, "--n_layer", "3", "--max_iters", "60", "--dataset", str(corpus), "--out_dir", str(out),
                           "--fit_tokens", "4000", "--compare", "--sample_tokens", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert list(arms) == ["technique"]
    lines = [json.loads(line) for line in (out / "technique" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    e = arms["technique"]["evaluation"]
    assert set(e["r2"]) == {"id", "mat", "affine"} and e["r2"]["mat"][1][0] is None and e["r2"]["mat"][1][1] is None
    assert all(e["r2"]["mat"][i][j] > e["r2"]["id"][i][j] for i in range(4) for j in range(i + 1, 4)), "the maps explain more than the identity"
    for name in ("id", "mat", "affine", "tuned"):
        assert e["precision"][name]["1"][-1] == 1 and len(e["surprisal"][name]) == len(e["kl"][name]) == len(e["gold_loss"][name]) == 4
    assert len(e["precision"]["bigrams"]["10"]) == 1 and e["precision"]["mat"]["1"][1] > e["precision"]["id"]["1"][1]
    assert list(e["layers_saved"]) == ["0.95", "0.98", "0.99"] and set(e["layers_saved"]["0.95"]) == {"id", "mat"}
    assert set(e["submodules"]) == {"attention", "feed-forward", "both LayerNorms"} and len(e["submodules"]["attention"]["precision"]["5"]) == 3
    assert [g["method"] for g in e["generation"]] == ["full", *["id", "mat", "mat"] * 2, "mat", "mat"]
    full, never = e["generation"][0], e["generation"][-1]
    assert full["agreement"] == never["agreement"] == full["agreement_exact_context"] == 1 and full["layers"] == never["layers"] == 3
    assert all(g["tokens_per_second"] > 0 and 1 <= g["layers"] <= 3 for g in e["generation"])
    assert len(e["first_choices"]["mat"]) == 4 and e["first_choices"]["id"][3] == e["first_choices"]["mat"][3]
    maps = torch.load(out / "technique" / "maps.pt", weights_only=True)
    assert set(maps) == {f"{i} {j}" for i in range(3) for j in range(i + 1, 4)} and maps["0 3"][0].shape == (32, 32)
    for words in ("r^2 of the maps", "Early exit with exact context", "both LayerNorms", "never", "bigrams of the training text",
                  "The next token, as each layer would have it", "A sample:", "of 3 layers."):
        assert words in done.stdout, words


@pytest.mark.parametrize("flags", [[], ["--ridge", "0.1", "--affine"]])
def test_every_number_of_the_evaluation_is_what_its_name_says(corpus, tmp_path, monkeypatch, flags):
    """Recomputed from maps.pt and best.pt with nothing of the script but the model, its parts' maps and the text of the fit."""
    out = tmp_path / "out"
    hows, made, decoder = [], [], nano.Decoder
    monkeypatch.setattr(nano, "Decoder", lambda *args, **kwargs: made.append((args, kwargs)) or decoder(*args, **kwargs))
    speed = lambda decoders, idx, n: [hows.append([d().layers, d().lam, d().kv, d().maps is None]) or (100.0 + i, i) for i, d in enumerate(decoders)]
    monkeypatch.setattr(nano, "timed", speed)
    results = nano.main([*SMALL, "--n_layer", "3", "--block_size", "16", "--max_iters", "40", "--dataset", str(corpus), "--out_dir", str(out), "--fit_tokens", "3000",
                         "--compare", "--eval_tokens", "640", "--exit_threshold", "0.3", *flags])
    e, s = results["arms"]["technique"]["evaluation"], nano.Settings(**results["settings"])
    assert e["fit"]["states"] == 3000 and e["fit"]["affine"] == bool(flags) and e["fit"]["ridge"] == (0.1 if flags else 0)
    data = nano.Data(s, torch.device("cpu"))
    run = nano.Run(s, torch.device("cpu"), torch.float32, "", 0, 1, data)
    model = nano.GPT(s).eval()
    model.load_state_dict(torch.load(out / "technique" / "best.pt", weights_only=True)["model"])
    maps = {tuple(map(int, pair.split())): m for pair, m in torch.load(out / "technique" / "maps.pt", weights_only=True).items()}
    x, y = data.rows("val", data.windows("val", 640))
    L, T, N = 3, 16, 640
    with torch.no_grad():
        h = [z.flatten(0, 1) for z in model.states(x)]
        fitted = [torch.cat(z).double() for z in zip(*([z[used] for z in model.states(i)] for i, used in nano.fit_batches(run)))]
        read = lambda z: (model.ln_f(z) @ model.wte.weight.T).log_softmax(-1)
        full = read(h[L])
        order = full.argsort(-1, descending=True)

        def lstsq(X, Y, ridge, one):
            X = torch.cat([torch.ones(len(X), one, dtype=X.dtype), X], 1)
            penalty = torch.eye(X.size(1), dtype=X.dtype) * ridge * X[:, one:].square().sum(0).mean()
            penalty[:one] = 0
            W = torch.linalg.pinv(X.T @ X + penalty, rcond=1e-12, hermitian=True) @ (X.T @ Y)
            return W[one:].float(), W[0].float() if one else torch.zeros(Y.size(1))

        again = {(i, j): lstsq(fitted[i], fitted[j], e["fit"]["ridge"], e["fit"]["affine"]) for i in range(L) for j in range(i + 1, L + 1)}
        affine = {(i, j): lstsq(fitted[i], fitted[j], e["fit"]["ridge"], True) for i in range(L) for j in range(i + 1, L + 1)}
        for pair in maps:
            torch.testing.assert_close(again[pair][0], maps[pair][0], atol=1e-3, rtol=1e-2)
            torch.testing.assert_close(again[pair][1], maps[pair][1], atol=1e-3, rtol=1e-2)
        to = lambda z, m, i, j: z @ m[i, j][0] + m[i, j][1] if m and i < j else z
        for name, m in ("id", None), ("mat", maps), ("affine", affine):
            for i in range(L):
                for j in range(i + 1, L + 1):
                    wrong, spread = (h[j] - to(h[i], m, i, j)).square().sum(0), (h[j] - h[j].mean(0)).square().sum(0)
                    assert e["r2"][name][i][j] == pytest.approx((1 - wrong / spread).mean().item(), abs=2e-3)
                    assert e["r2_global"][name][i][j] == pytest.approx((1 - wrong.sum() / spread.sum()).item(), abs=2e-3)
            same, sure = torch.ones(L + 1, N), torch.ones(L + 1, N)
            for l in range(L + 1):
                z = read(to(h[l], m, l, L))
                choice = z.argmax(-1)
                hits = [(order[:, :k] == choice[:, None]).any(-1).float() for k in (1, 5, 10)]
                p = z.exp().sort(-1).values
                same[l], sure[l] = hits[0], p[:, -1] - p[:, -2]
                for k, hit in zip(("1", "5", "10"), hits):
                    assert e["precision"][name][k][l] == pytest.approx(hit.mean().item(), abs=4e-3)
                assert e["surprisal"][name][l] == pytest.approx(-full.gather(1, choice[:, None]).mean().item(), abs=5e-3)
                assert e["kl"][name][l] == pytest.approx((full.exp() * (full - z)).sum(-1).mean().item(), abs=2e-3)
                assert e["gold_loss"][name][l] == pytest.approx(F.nll_loss(z, y.flatten()).item(), abs=2e-3)
            if name == "affine":
                continue
            t = torch.arange(T).repeat(N // T)
            leave = lambda lam, n, layers: next((l for l in layers if sure[l, n] > 0.9 * lam + 0.1 * math.exp(-4 * t[n] / 8.5)), L)
            for point in [p for p in e["exit"]["curve"][name] if p["threshold"] in (-nano.NEVER, 0.3, nano.NEVER)]:
                at = [leave(point["threshold"], n, range(1, L)) for n in range(N // 2, N)]
                assert point["layers"] == pytest.approx(sum(at) / len(at), abs=0.02)
                assert point["agreement"] == pytest.approx(sum(same[l, n].item() for n, l in enumerate(at, N // 2)) / len(at), abs=0.01)
            for target, found in e["exit"]["at"].items():
                at = [leave(found[name]["threshold"], n, range(1, L)) for n in range(N // 2, N)]
                assert found[name]["layers_saved"] == e["layers_saved"][target][name] == pytest.approx(1 - sum(at) / len(at) / L, abs=0.01)
                assert found[name]["agreement"] == pytest.approx(sum(same[l, n].item() for n, l in enumerate(at, N // 2)) / len(at), abs=0.01)
                assert found[name]["flops_saved"] == pytest.approx(nano.saved_flops(s, torch.tensor(at), name == "mat"), abs=0.01)
                first = [leave(found[name]["threshold"], n, range(1, L)) for n in range(N // 2)]
                assert sum(same[l, n].item() for n, l in enumerate(first)) / len(first) >= float(target) - 0.005
            for g in e["generation"]:
                if g["method"] == name:
                    layers = [2] if "layer 2" in g["exit"] else range(1, L)
                    lam = 0.3 if "lambda 0.3" in g["exit"] else nano.NEVER if "never" in g["exit"] else -nano.NEVER
                    at = [leave(lam, n, layers) for n in range(N // 2, N)]
                    assert g["agreement_exact_context"] == pytest.approx(sum(same[l, n].item() for n, l in enumerate(at, N // 2)) / len(at), abs=0.01)
                    assert hows[g["layers"]] == [tuple(layers) if len(layers) == 1 else range(1, L), -math.inf if g["exit"].startswith("after") else lam, g["kv"], name == "id"]
                    gone, agree = [], []
                    for row in x[N // T // 2:]:  # literally, with the cache
                        logits, left = oracle(model, row[None], None if name == "id" else maps, layers, lam, g["kv"])
                        gone += left
                        agree += (logits.argmax(-1) == model(row[None])[0][0].argmax(-1)).tolist()
                    assert g["agreement"] == pytest.approx(sum(agree) / len(agree), abs=0.01) and g["layers_true_text"] == pytest.approx(sum(gone) / len(gone), abs=0.02)
                    assert g["speedup"] == pytest.approx(g["tokens_per_second"] / 100)
        assert len(e["generation"]) == 9 and e["generation"][0]["agreement"] == 1
        assert [args[4] for args, kwargs in made if "rows" in kwargs] == [g["kv"] for g in e["generation"] for _ in range(5)], "5 batches of true text for each"
        parts = nano.fit_parts(run, model, nano.fit_batches(run))
        for name, names in nano.PARTS.items():
            for l in range(L):
                z = model.states(x)[l]
                for block, m in zip(model.h[l:], parts[l:]):
                    z = block(z, {part: m[part] for part in names})
                choice = read(z.flatten(0, 1)).argmax(-1)
                for k in (1, 5, 10):
                    assert e["submodules"][name]["precision"][str(k)][l] == pytest.approx((order[:, :k] == choice[:, None]).any(-1).float().mean().item(), abs=4e-3)
                assert e["submodules"][name]["surprisal"][l] == pytest.approx(-full.gather(1, choice[:, None]).mean().item(), abs=5e-3)
        for name, m in ("id", None), ("mat", maps):
            start = data.windows("val", 640)[20]
            z = model.states(data.rows("val", [start])[0])
            show = lambda ids: [repr(data.decode([i]))[1:-1].replace(" ", "_") for i in ids.tolist()]
            assert e["first_choices"]["text"] == show(data.val[start:start + 16])
            assert e["first_choices"][name] == [show(read(to(z[l][0], m, l, L)).argmax(-1)) for l in range(L + 1)]
        pairs = nano.bigrams(run)[x.flatten()]
        assert e["gold_loss"]["bigrams"] == [pytest.approx(F.nll_loss(pairs, y.flatten()).item(), abs=1e-3)]


def test_the_penalty_holds_for_parts_too(run):
    model = nano.GPT(run.settings).eval()
    run.settings.ridge = 1e9
    assert all(A.norm() < 1e-3 for layer in nano.fit_parts(run, model, nano.fit_batches(run)) for A in layer.values())


def test_generation_is_timed_greedily_and_without_the_prompt(monkeypatch):
    model, seen = model_of(settings()), []
    clock = iter(range(1000))
    monkeypatch.setattr(nano.time, "perf_counter", lambda: next(clock))
    real = nano.GPT.generate
    monkeypatch.setattr(nano.GPT, "generate", lambda model, idx, n, temperature=1.0, **how: seen.append((tuple(idx.shape), n, temperature)) or real(model, idx, n, temperature, **how))
    (full, layers), (rate, two) = nano.timed([lambda: nano.Decoder(model), lambda: nano.Decoder(model, None, (2,))], tokens(1, 4), 10)
    assert (layers, two) == (4, 2) and full == rate == 10 and set(seen) == {((1, 4), 10, 0)}


def test_a_picture_is_drawn(small, tmp_path):
    pytest.importorskip("matplotlib")
    nano.main([*small, "--max_iters", "2", "--fit_tokens", "1000"])
    assert (tmp_path / "out" / "jump.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv, layers", [(["--exit_layer", "1"], 1), (["--exit_threshold", "-1.112"], 1), (["--exit_threshold", "1.112"], 2), (["--exit_layer", "2"], 2)])
def test_the_sample_leaves_where_it_should(small, capsys, argv, layers):
    nano.main([*small, "--max_iters", "2", "--fit_tokens", "1000", *argv])
    assert f"its tokens went through {layers}.00 of 2 layers." in capsys.readouterr().out


@pytest.mark.parametrize("argv, expected", [(["--exit_layer", "1"], [(1,), -math.inf, "mat"]), (["--exit_layer", "1", "--kv", "copy"], [(1,), -math.inf, "copy"]),
                                            (["--exit_threshold", "0.4"], [range(1, 2), 0.4, "mat"]), (["--kv", "copy"], [range(1, 2), 0.8, "copy"])])
def test_the_flags_of_the_sample_reach_its_decoder(small, monkeypatch, argv, expected):
    seen, real = [], nano.Decoder
    monkeypatch.setattr(nano, "Decoder", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1])
    nano.main([*small, "--max_iters", "2", "--fit_tokens", "1000", *argv])
    assert [seen[-1].layers, seen[-1].lam, seen[-1].kv] == expected and set(seen[-1].maps) == {(0, 1), (0, 2), (1, 2)}


def test_a_longer_prompt_and_a_sample_beyond_the_context(small, corpus, capsys):
    prompt = (corpus / "meta.json").exists() and json.loads((corpus / "meta.json").read_text())["alphabet"][1] * 20
    nano.main([*small[:-4], *small[-2:], "--dataset", str(corpus), "--max_iters", "2", "--fit_tokens", "1000", "--exit_layer", "1", "--sample_tokens", "40", "--prompt", prompt])
    assert "its tokens went through 1.00 of 2 layers." in capsys.readouterr().out


def test_a_model_of_one_layer(small, capsys):
    e = nano.main([*small, "--n_layer", "1", "--max_iters", "2", "--fit_tokens", "1000"])["arms"]["technique"]["evaluation"]
    assert e["generation"] == [] and e["layers_saved"]["0.95"] == {"id": 0, "mat": 0}


def test_a_checkpoint_is_taken_and_evaluated_as_it_was(small, tmp_path):
    argv = [*small, "--fit_tokens", "1000"]
    first = nano.main(argv)
    again = nano.main([*argv[:-4], "--fit_tokens", "1000", "--device", "cpu", "--out_dir", str(tmp_path / "again"), "--n_layer", "5",
                       "--init_from", str(tmp_path / "out" / "technique" / "best.pt")])
    for name in ("precision", "surprisal", "r2", "layers_saved"):
        assert first["arms"]["technique"]["evaluation"][name] == again["arms"]["technique"]["evaluation"][name]
    assert again["settings"]["n_layer"] == 2 and again["settings"]["dataset"] == first["settings"]["dataset"] and again["settings"]["max_iters"] == 0
    only = nano.main(["--device", "cpu", "--eval_only", "--fit_tokens", "1000", "--sample_tokens", "4", "--out_dir", str(tmp_path / "out")])
    assert only["arms"]["technique"]["evaluation"]["precision"] == first["arms"]["technique"]["evaluation"]["precision"]


def test_a_model_taken_from_the_folder_that_is_moved_aside_and_gone_afterwards(small, tmp_path, monkeypatch):
    """Its own earlier run in --out_dir; --resume and --eval_only need it no more."""
    argv, best = [*small, "--fit_tokens", "1000"], str(tmp_path / "out" / "technique" / "best.pt")
    first = nano.main(argv)
    again = nano.main([*argv, "--init_from", best])
    assert (tmp_path / "out.1" / "technique" / "best.pt").exists()
    assert first["arms"]["technique"]["evaluation"]["precision"] == again["arms"]["technique"]["evaluation"]["precision"]
    moved = nano.main([*small[:-2], "--fit_tokens", "1000", "--out_dir", str(tmp_path / "third"), "--init_from", str(tmp_path / "out.1" / "technique" / "best.pt")])
    shutil.rmtree(tmp_path / "out.1")
    for flag in ("--eval_only", "--resume"):
        only = nano.main(["--device", "cpu", flag, "--fit_tokens", "1000", "--sample_tokens", "4", "--out_dir", str(tmp_path / "third")])
        assert only["arms"]["technique"]["evaluation"]["precision"] == moved["arms"]["technique"]["evaluation"]["precision"]


def test_a_short_validation_split_gets_one_line(capsys, small):
    refused(nano.main, capsys, [*small, "--eval_tokens", "32"], "too short to pick lambda", "--eval_tokens")


def test_the_evaluation_is_without_dropout(run):
    run.settings.dropout, run.settings.fit_tokens, run.settings.eval_tokens = 0.5, 500, 256
    torch.manual_seed(0)
    model = nano.GPT(run.settings)
    a = nano.evaluate_arm(run, "technique", model.train())
    b = nano.evaluate_arm(run, "technique", model.eval())
    assert a["precision"] == b["precision"] and a["r2"] == b["r2"] and a["submodules"] == b["submodules"]


def test_resume_goes_on_with_the_same_losses(small, tmp_path, monkeypatch):
    fit = ["--fit_tokens", "1000"]
    whole, resumed = killed_and_resumed(nano, monkeypatch, tmp_path, [*small, *fit], fit)
    assert whole["evaluation"]["r2"] == resumed["evaluation"]["r2"]


def test_counted_flops_equal_the_formula():
    s = settings()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        nano.GPT(s)(tokens(), tokens())[1].backward()
    assert counter.get_total_flops() == nano.flops_per_token(s, "technique") * 32


def test_compiled_equals_eager():
    torch.manual_seed(0)
    model, idx = nano.GPT(settings()), tokens()
    torch.compiler.reset()
    results = []
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = f(idx, idx)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_autocast():
    """The sample is generated under it: with a cache of the weights' type, near what float32 gives."""
    torch.manual_seed(0)
    model = nano.GPT(settings()).eval()
    maps = {pair: (torch.eye(16), torch.zeros(16)) for pair in ((i, j) for i in range(4) for j in range(i + 1, 5))}
    exact = nano.Decoder(model, maps, (2,), kv="mat", rows=2).run(tokens())[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits, left = nano.Decoder(model, maps, (2,), kv="mat", rows=2).run(tokens())
    assert (left == 2).all()
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)
