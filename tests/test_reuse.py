"""nano_reuse.py: both ways against a literal oracle, what is handed up, the cache, the savings."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import future_is_invisible, goes_on_to_the_bit, loud, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nano_reuse as nano

IMPLS = ["qk", "probs"]
SHAPE = dict(n_layer=6, n_head=4, n_embd=32, block_size=16, vocab_size=50)


def oracle(model, config, idx):
    """The definition, layer after layer, head after head, query after query: logits, and the maps
    of all layers, (B, H, T, T) each."""
    w, H, T = dict(model.named_parameters()), config.n_head, idx.size(1)
    C, D = config.n_embd, config.n_embd // config.n_head
    x, below, found = w["wte.weight"][idx] + w["wpe.weight"][:T], None, []
    for i in range(config.n_layer):
        K = config.reuse_heads if i in range(1, config.reuse_layers + 1) else 0
        h = F.layer_norm(x, (C,), w[f"h.{i}.ln_1.weight"], eps=1e-5)
        maps = []
        for head in range(H - K):
            q, k = (h @ w[f"h.{i}.attn.c_{m}.weight"][head * D:(head + 1) * D].T for m in "qk")
            rows = []
            for t in range(T):
                scores = (k[:, :t + 1] * q[:, t, None]).sum(-1) / math.sqrt(D)
                rows.append(F.pad(scores.softmax(-1), (0, T - t - 1)))
            maps.append(torch.stack(rows, 1))
        maps += [below[head] for head in range(K)]
        v = h @ w[f"h.{i}.attn.c_v.weight"].T
        out = [maps[head] @ v[..., head * D:(head + 1) * D] for head in range(H)]
        x = x + torch.cat(out, -1) @ w[f"h.{i}.attn.c_proj.weight"].T
        h = F.layer_norm(x, (C,), w[f"h.{i}.ln_2.weight"], eps=1e-5)
        h = F.gelu(h @ w[f"h.{i}.mlp.c_fc.weight"].T)
        x = x + h @ w[f"h.{i}.mlp.c_proj.weight"].T
        below = maps
        found.append(torch.stack(maps, 1))
    return F.layer_norm(x, (C,), w["ln_f.weight"], eps=1e-5) @ w["wte.weight"].T, found


@pytest.mark.parametrize("changes", [
    dict(), dict(reuse_layers=1), dict(reuse_layers=5), dict(reuse_layers=0), dict(reuse_heads=0),
    dict(reuse_layers=4, reuse_heads=2), dict(reuse_layers=5, reuse_heads=3), dict(reuse_heads=1),
    dict(n_layer=3, n_head=3, n_embd=15, block_size=7, reuse_layers=2, reuse_heads=2),
    dict(n_layer=2, n_head=1, n_embd=8, block_size=5), dict(n_layer=1, n_head=2, block_size=3)])
def test_both_ways_equal_the_oracle_with_all_gradients(changes):
    config = nano.Config(**{**SHAPE, **changes})
    model, idx = loud(nano, config), tokens(T=config.block_size)
    weight = torch.randn(*idx.shape, 50, dtype=torch.float64)
    results = []
    for way in (nano.attend, nano.attend_fused, None):
        model.attend = way
        logits = model(idx)[0] if way else oracle(model, config, idx)[0]
        loss = (logits * weight).sum()
        results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    for maps, fused, slow in zip(*results):
        scale = slow.abs().max()
        assert (maps - slow).abs().max() <= 1e-11 * scale and scale > 0
        assert (fused - slow).abs().max() <= 1e-11 * scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("changes", [dict(), dict(reuse_layers=5, reuse_heads=3)])
def test_the_future_is_invisible(impl, changes):
    model = loud(nano, nano.Config(**SHAPE, **changes, reuse_impl=impl))
    for seed in range(8):
        future_is_invisible(model, 50, 16, seed)


@pytest.mark.parametrize("attend", [nano.attend, nano.attend_fused])
def test_dropout_is_drawn_anew_in_every_layer_and_not_handed_up(attend):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 8) for _ in range(2))
    v, none = torch.eye(64).expand(1, 2, 64, 64), q[:, :0]  # o is the map after dropout
    exact, exact_up = attend(q, k, v, None)
    below, handed_up = attend(q, k, v, None, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(exact_up, handed_up)), "from before dropout"
    above, _ = attend(none, none, v, handed_up, 0.5)
    for o in (below, above):
        assert ((o == 0) | torch.isclose(o, 2 * exact, atol=1e-6)).all()
        assert 0.4 < (o == 0)[exact > 0].float().mean() < 0.6
    assert not torch.equal(below, above)


def test_maps_keep_the_dtype_of_values(monkeypatch):
    """CUDA's autocast computes softmax in float32, a CPU's does not: as if it did."""
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: softmax(x.float(), dim))
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.bfloat16) for _ in range(3))
    assert {x.dtype for x in nano.attend(q, k, v, None)} == {torch.bfloat16}


PLACES = [(3, 4), (5, 4), (4, 3), (4, 2), (3, 1), (0, 4), (3, 0)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("P, K", PLACES)
def test_cached_generation_equals_full_forward(impl, P, K):
    config = nano.Config(**SHAPE, reuse_layers=P, reuse_heads=K, reuse_impl=impl)
    model, idx = loud(nano, config).eval(), tokens(3)
    full, cache = model(idx)[0], model.empty_cache(3)
    for first, last in ((0, 5), *((t, t + 1) for t in range(5, 16))):  # a prompt of 5
        logits, _ = model(idx[:, first:last], cache=cache)
        torch.testing.assert_close(logits, full[:, first:last], atol=1e-10, rtol=1e-10)
    read, forward = [], model.forward
    model.forward = lambda idx, cache: read.append(idx.size(1)) or forward(idx, cache=cache)
    out = model.generate(idx[:, :5], 20, temperature=0)
    assert read == [5, *[1] * 11, *[16] * 8], "beyond the context the whole window"
    for t in range(5, 25):
        logits, _ = forward(out[:, max(0, t - 16):t])
        assert torch.equal(out[:, t], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("P, K", PLACES)
def test_parameters_flops_and_cache_are_those_of_the_formulas(impl, P, K):
    config = nano.Config(**SHAPE, reuse_layers=P, reuse_heads=K, reuse_impl=impl)
    L, H, T, C, D, model = 6, 4, 16, 32, 8, nano.GPT(config)
    matrices = L * 12 * C**2 - P * 2 * C * K * D
    assert sum(p.numel() for p in model.h.parameters() if p.ndim == 2) == matrices
    names = {name for name, _ in model.named_parameters() if "c_q" in name or "c_k" in name}
    own = range(L) if K < H else [0, *range(P + 1, L)]
    assert names == {f"h.{layer}.attn.c_{m}.weight" for layer in own for m in "qk"}

    spared = P * K * 2 * T * D  # scores
    generated = 2 * (matrices + 50 * C) + L * 4 * T * C - spared
    flops = generated + (spared if impl == "qk" else 0)
    cost = nano.cost(config)
    assert cost["flops_per_token"] == flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens(3))
    assert counter.get_total_flops() == 3 * T * flops, "also where there are numbers"

    cache = model.empty_cache(2)
    model(tokens()[:, :-1], cache=cache)
    with FlopCounterMode(display=False) as counter:
        model(tokens()[:, -1:], cache=cache)
    assert counter.get_total_flops() == 2 * generated
    assert [layer["k"].size(1) for layer in cache] == [H, *[H - K] * P, *[H] * (L - 1 - P)]
    assert cost["cache_bytes_per_token"] == 4 * (2 * L * C - P * K * D)
    cached = sum(x.nbytes for layer in cache for x in layer.values())
    assert cached == 2 * T * cost["cache_bytes_per_token"]


@pytest.mark.parametrize("reuse_layers", [0, 2])
def test_similarity_is_that_of_a_literal_loop(corpus, reuse_layers):
    """64 windows of all those that are evaluated on."""
    config = nano.Config(n_layer=3, n_head=2, n_embd=16, block_size=8, reuse_layers=reuse_layers,
                         eval_tokens=8 * 190, dataset=str(corpus), device="cpu")
    run = nano.Run(config)
    config.vocab_size = run.data.meta["vocab_size"]
    model = loud(nano, config).float().eval()
    x, _ = run.data.rows("val", np.arange(0, 8 * 190, 8 * 3))
    maps = oracle(model, config, x)[1]

    def alike(a, head, b, other):
        found = []
        for window in range(64):
            for i in range(4, 8):
                p, q = maps[a][window, head, i].tolist(), maps[b][window, other, i].tolist()
                found.append(1 - sum(abs(p[j] - q[j]) for j in range(8)) / 2)
        return sum(found) / len(found)

    rows = nano.similarity(config, run, model)
    for a in range(3):
        for b in range(3):
            heads = [max(alike(a, head, b, other) for other in range(2)) for head in range(2)]
            assert rows[f"layer {a}"][f"layer {b}"] == pytest.approx(sum(heads) / 2, abs=1e-5)


@pytest.mark.parametrize("L, more", [(6, 1), (12, 1), (24, 2)])
def test_compare_trains_models_of_the_claimed_sizes_on_the_same_data(small, capsys, monkeypatch,
                                                                     L, more):
    read, forward = [], nano.GPT.forward

    def recorded(model, idx, targets=None, cache=None):
        if model.training and targets is not None:
            read.append(idx.tolist())
        return forward(model, idx, targets, cache)

    monkeypatch.setattr(nano.GPT, "forward", recorded)
    argv = [*small, "--n_layer", str(L), "--max_iters", "2", "--eval_tokens", "64", "--compare"]
    arms = nano.main(argv)["arms"]
    assert list(arms) == ["technique", "dense", "deeper"] and read[:2] == read[2:4] == read[4:]
    technique, dense, deeper = arms.values()
    assert dense["parameters"] - technique["parameters"] == L // 2 * 2 * 32**2
    assert deeper["parameters"] - dense["parameters"] == more * 2 * 32, "only LayerNorms"
    assert len(deeper["evaluation"]) == L + more
    cached = [arm["cache_bytes_per_token"] for arm in arms.values()]
    assert cached == [4 * 32 * n for n in (2 * L - L // 2, 2 * L, 2 * (L + more) - 6 * more)]
    shown = capsys.readouterr().out
    assert nano.table(dense["evaluation"]) in shown and str(dense["flops_per_token"]) in shown
    assert nano.table(technique["evaluation"]) not in shown


def test_a_killed_run_goes_on_to_the_bit(small, tmp_path, monkeypatch):
    argv = [*small[:-2], "--reuse_heads", "1", "--dropout", "0.1"]
    goes_on_to_the_bit(nano, monkeypatch, tmp_path, argv, 15)
