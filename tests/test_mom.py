"""nano_mom.py: dispatch against a masked oracle, routers and their gradients, special cases, phases."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import future_is_invisible, goes_on_to_the_bit, killed, loud, refused, tokens

import nano_mom as nano

SHAPE = dict(n_layer=4, n_head=4, n_embd=32, block_size=16, vocab_size=50, rounds=3, router_dim=8)


def config_of(**changes):
    return nano.Config(**{**SHAPE, **changes})


def model_of(config):
    """Its tokens choose different modules."""
    model, first = loud(nano, config), nano.vanillas_path(config)
    for router in (m for m in model.modules() if isinstance(m, nano.Router)):
        router.out.weight.data *= 3
        for b, start in zip(router.b, first):  # where it is -inf it stays so
            b.data = start.double().clamp(max=0.1)
    return model


# the definition, with every module on every token, and masks

def norm(x, ln):
    return F.layer_norm(x, x.shape[-1:], ln.weight, eps=1e-5)


def causal(q, k, v, H):
    """Multi-head attention written out, (B, T, C) each."""
    B, T, C = q.shape
    q, k, v = (x.view(B, T, H, C // H).transpose(1, 2) for x in (q, k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / math.sqrt(C // H)).masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)


def mlp(block, x):
    return block.mlp.c_proj(F.gelu(block.mlp.c_fc(norm(x, block.ln_2))))


def attention(block, x, H):
    h, a = norm(x, block.ln_1), block.attn
    return a.c_proj(causal(a.c_q(h), a.c_k(h), a.c_v(h), H))


def route(router, config, x, state, r):
    """The equations, picks by sorting: a mask, gates and p, all (B, T, E), and the next state."""
    cell = router.cell
    Wr, Wz, Wn = cell.weight_ih.chunk(3)
    Ur, Uz, Un = cell.weight_hh.chunk(3)
    (br, bz, bn), (cr, cz, cn) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    reset = (x @ Wr.T + br + state @ Ur.T + cr).sigmoid()
    z = (x @ Wz.T + bz + state @ Uz.T + cz).sigmoid()
    n = (x @ Wn.T + bn + reset * (state @ Un.T + cn)).tanh()
    state = (1 - z) * n + z * state
    logits = (state @ router.out.weight.T + router.b[r]) / config.tau
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    mask = (p >= p.sort(-1, descending=True).values[..., config.route_k - 1, None]).to(p)
    gates = p * mask
    if config.route_k > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    return mask, gates, p, state


def oracle(model, config, idx):
    """Logits, and the sum of both balance losses."""
    x = model.wte.weight[idx] + model.wpe.weight[:idx.size(1)]
    states = [x.new_zeros(*x.shape[:2], config.router_dim)] * 2
    seen = [], []
    for r in range(config.rounds):
        mask, gates, p, states[0] = route(model.attn_router, config, x, states[0], r)
        seen[0].append((mask, p))
        q, k, v = (sum(mask[..., i, None] * getattr(block.attn, c)(norm(x, block.ln_1))
                       for i, block in enumerate(model.h)) for c in ("c_q", "c_k", "c_v"))
        a = causal(q, k, v, config.n_head)
        x = x + sum(gates[..., i, None] * m.attn.c_proj(a) for i, m in enumerate(model.h))
        mask, gates, p, states[1] = route(model.mlp_router, config, x, states[1], r)
        seen[1].append((mask, p))
        x = x + sum(gates[..., i, None] * mlp(m, x) for i, m in enumerate(model.h))
    balance = 0
    for each in seen:
        mask, p = (torch.stack(y).flatten(0, 2) for y in zip(*each))
        f = mask.mean(0) / config.route_k
        balance = balance + p.size(1) * sum(f[e] * p[:, e].mean() for e in range(p.size(1)))
    return norm(x, model.ln_f) @ model.wte.weight.T, balance


def test_training_adds_the_gradient_of_the_balance_losses_to_the_loss():
    config, idx = config_of(balance=0.5), tokens()
    model = model_of(config)
    loss, (_, balance) = model(idx, idx)[1], ours(model, idx)
    parts = model.eval()(idx, idx)[1], 0.5 * balance
    assert torch.equal(loss, parts[0]), "but not to its value"
    parameters = list(model.attn_router.parameters())
    both, text, even = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, *parts))
    for a, b, c in zip(both, text, even):
        torch.testing.assert_close(a, b + c, atol=1e-12, rtol=1e-9)
    assert even[-1].abs().max() > 1e-6


def ours(model, idx):
    routes = []
    logits, _ = model(idx, routes=routes)
    return logits, nano.balance_loss(routes[0::2]) + nano.balance_loss(routes[1::2])


def equals_the_oracle(model, config, idx):
    weight = torch.randn(*idx.shape, 50, dtype=torch.float64)
    results = []
    for logits, balance in (ours(model, idx), oracle(model, config, idx)):
        loss = (logits * weight).sum() + 10 * balance
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        results.append([logits, balance, *found])
    for fast, slow in zip(*results, strict=True):
        assert fast.isfinite().all()
        assert (fast - slow).abs().max() <= 1e-11 * max(1.0, slow.abs().max())


@pytest.mark.parametrize("changes", [
    dict(), dict(skip=False), dict(tau=1.0), dict(rounds=6), dict(route_k=2), dict(route_k=5),
    dict(route_k=2, skip=False), dict(route_k=4, skip=False), dict(n_layer=1, rounds=4),  # a Universal Transformer
    dict(n_layer=1, rounds=3, skip=False), dict(rounds=1, skip=False)], ids=str)
def test_it_equals_the_masked_oracle_with_all_gradients(changes):
    config = config_of(**changes)
    model, routes = model_of(config), []
    model(tokens(), routes=routes)
    parted = [len(picks.unique()) > 1 for picks, p in routes]
    assert sum(parted) > len(parted) / 2 or config.n_layer + config.skip == 1
    equals_the_oracle(model, config, tokens())


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("favourite", [0, 2, 4])
def test_modules_that_no_token_picks(favourite, K):
    """All tokens on one module, or (4) on SKIP; with K = 2 a second one joins."""
    config = config_of(route_k=K)
    model, routes = model_of(config), []
    for router in (model.attn_router, model.mlp_router):
        for b in router.b:
            b.data[favourite] = 20.0
            b.data[1] = 10.0
    model(tokens(), routes=routes)
    assert all((picks[:, 0] == favourite).all() for picks, p in routes)
    equals_the_oracle(model, config, tokens())


def test_a_token_pays_for_the_modules_that_it_picked_only(monkeypatch):
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    picks = torch.tensor([[0], [2], [2], [3], [4], [4]])
    x, gates, blocks = torch.randn(2, 3, 32), torch.ones(6, 1), nano.GPT(config_of()).h
    nano.assembled_attention(x, picks, gates, blocks)
    assert rows == [1, 1, 1, 2, 2, 2, 1, 1, 1] + [1, 2, 1], "module 1 runs for nobody"
    rows.clear()
    nano.assembled_mlp(x, picks, gates, blocks)
    assert rows == [1, 1, 2, 2, 1, 1]
    x = x.clone()
    x[1, 1:] = math.nan  # those of SKIP are not even read
    assert nano.assembled_mlp(x, picks, gates, blocks).isfinite().all()


def by_hand(model, idx, rounds, choose):
    """choose(r, layers, x) -> what layer-wise rounds add; for models of one path."""
    x = model.wte.weight[idx] + model.wpe.weight[:idx.size(1)]
    for r in range(rounds):
        x = choose(r, x)
    return norm(x, model.ln_f) @ model.wte.weight.T


def test_phase_1_is_vanilla_to_the_bit_and_routers_add_no_other_weights():
    torch.manual_seed(0)
    model = nano.GPT(config_of())
    torch.manual_seed(0)
    vanilla, model.rounds = nano.GPT(config_of(rounds=0)), 0
    assert torch.equal(model(tokens())[0], vanilla(tokens())[0])
    R, C, E, H = 8, 32, 5, 3
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in vanilla.parameters())
    assert more == 2 * (3 * R * (C + R + 2) + E * R + E * H)


@pytest.mark.parametrize("n_layer, rounds, own", [(4, 4, "own"), (4, 8, "own"), (1, 5, "any")])
def test_vanilla_and_albert_are_paths_without_a_choice(n_layer, rounds, own):
    """Four layers, the same four twice, and one layer again and again."""
    config = config_of(n_layer=n_layer, rounds=rounds, candidates=own, skip=False)
    model, results = model_of(config), []
    path = [*model.h] * (rounds // n_layer)
    shared = [p for name, p in model.named_parameters() if "router" not in name]
    for logits in (model(tokens())[0],
                   by_hand(model, tokens(), 1, lambda r, x: torch.nn.Sequential(*path)(x))):
        results.append([logits, *torch.autograd.grad(logits.square().sum(), shared)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_layer_skip():
    """Round r has module r and SKIP; who skips neither attends nor goes through the feed-forward."""
    config = config_of(rounds=4, candidates="own")
    model, routes = model_of(config), []
    logits, _ = model(tokens(), routes=routes)
    skipped = [picks == 4 for picks, p in routes]
    assert all(0 < s.float().mean() < 1 for s in skipped)
    assert all(((picks == r // 2) | (picks == 4)).all() for r, (picks, p) in enumerate(routes))
    gates = [p.gather(1, picks).view(2, 16, 1) for picks, p in routes]
    keep = [(~s).view(2, 16, 1).double() for s in skipped]

    def layer(r, x):
        h, a = norm(x, model.h[r].ln_1), model.h[r].attn
        q, k, v = (keep[2 * r] * c(h) for c in (a.c_q, a.c_k, a.c_v))
        x = x + gates[2 * r] * keep[2 * r] * a.c_proj(causal(q, k, v, 4))
        return x + gates[2 * r + 1] * keep[2 * r + 1] * mlp(model.h[r], x)

    torch.testing.assert_close(by_hand(model, tokens(), 4, layer), logits, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("K", [1, 2])
def test_one_round_is_a_layer_of_a_mixture_of_experts(K):
    """Its feed-forward, token for token: the K most probable experts, weighted by p or its share."""
    model, x = model_of(config_of(rounds=1, skip=False, route_k=K)), torch.randn(2, 8, 32).double()
    picks, gates, p, _ = model.mlp_router(x, None, 0)
    y = nano.assembled_mlp(x, picks, gates, model.h)
    for t, token in enumerate(x.flatten(0, 1)):
        best = sorted(range(4), key=lambda e: -p[t, e])[:K]
        total = 1 if K == 1 else sum(p[t, e] for e in best)
        expected = sum(p[t, e] / total * mlp(model.h[e], token) for e in best)
        torch.testing.assert_close(y.flatten(0, 1)[t], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("changes", [dict(), dict(route_k=2), dict(rounds=6), dict(rounds=0)])
def test_the_future_is_invisible(changes):
    model = model_of(config_of(**changes))
    for seed in range(6):
        future_is_invisible(model, 50, 16, seed)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("K", [1, 2])
def test_routers_learn_from_the_loss(K, skip):
    model = model_of(config_of(route_k=K, skip=skip))
    loss = model(tokens(), tokens(seed=1))[1]
    for router in (model.attn_router, model.mlp_router):
        assert torch.autograd.grad(loss, router.out.weight, retain_graph=True)[0].norm() > 1e-3


def test_routers_stay_in_float32_under_autocast():
    model, x = nano.GPT(config_of()), torch.randn(2, 8, 32)
    exact = model.attn_router(x, None, 0)
    with torch.autocast("cpu", torch.bfloat16):
        again = model.attn_router(x, None, 0)
    assert all(torch.equal(a, b) for a, b in zip(exact, again))


@pytest.mark.parametrize("changes, path", [
    (dict(rounds=6), [[0], [1], [2], [3], [4], [4]]),
    (dict(rounds=6, skip=False), [[0], [1], [2], [3], [0], [1]]),
    (dict(rounds=2, route_k=2), [[0, 1], [2, 3]]),
    (dict(rounds=4, route_k=2), [[0, 4], [1, 4], [2, 4], [3, 4]]),
    (dict(rounds=1, route_k=4, skip=False), [[0, 1, 2, 3]]),
    (dict(rounds=5, candidates="own"), [[0], [1], [2], [3], [4]])])
def test_the_first_path(changes, path):
    torch.manual_seed(0)
    model, routes = nano.GPT(config_of(**changes)), []
    model(tokens(), routes=routes)
    for i, (picks, p) in enumerate(routes):
        assert picks.sort(-1).values.unique(dim=0).tolist() == [path[i // 2]]


def test_gates_are_a_little_below_1_and_then_the_function_is_nearly_vanillas():
    torch.manual_seed(0)
    model, idx, routes = nano.GPT(config_of(rounds=6)), tokens(8), []
    routed = model(idx, idx, routes)[1].item()
    model.rounds = 0
    assert routed == pytest.approx(model(idx, idx)[1].item(), abs=0.01)
    gates = torch.stack([p.max(-1).values for picks, p in routes])
    assert 0.9 < gates.min() and gates.max() < 1


PHASES = ["--n_layer", "3", "--rounds", "4", "--phase1", "0.6"]  # the switch is after step 12 of 20


def test_a_run_of_two_phases_beside_vanilla(small, monkeypatch, capsys):
    routed, real = [], nano.balance_loss
    monkeypatch.setattr(nano, "balance_loss", lambda routes: routed.append(1) or real(routes))
    technique, dense = nano.main([*small, *PHASES, "--compare"])["arms"].values()
    assert len(routed) == 2 * 8, "both routers, in the last 8 of 20 steps"
    log = technique["log"]
    assert [line["step"] for line in log] == [10, 12, 20]
    assert log[1]["routed_loss"] == pytest.approx(log[1]["val_loss"], abs=0.02)
    assert not any("routed_loss" in log[i] for i in (0, 2))
    assert technique["best_val_loss"] == log[2]["val_loss"], "of phase 2"
    assert dense["log"][0]["val_loss"] == log[0]["val_loss"], "phase 1 is the same"
    assert dense["evaluation"] == {} and len(technique["evaluation"]) == 8
    row = technique["evaluation"]["round 3 A"]
    assert list(row)[:4] == ["0", "1", "2", "SKIP"] and len(row) == 4 + 8
    assert "round 3 F" in capsys.readouterr().out


@pytest.mark.parametrize("killed_at", [9, 15, 18])
def test_a_killed_run_goes_on_to_the_bit_in_both_phases(small, tmp_path, monkeypatch, killed_at):
    argv = [*small[:-2], *PHASES, "--dropout", "0.1"]
    argv[argv.index("--eval_interval") + 1] = "4"
    goes_on_to_the_bit(nano, monkeypatch, tmp_path, argv, killed_at)


def test_a_run_killed_in_phase_1_says_that_nothing_is_there_to_evaluate(small, capsys, monkeypatch):
    killed(nano, monkeypatch, [*small, *PHASES], 11)
    refused(nano.main, capsys, [*small, "--eval_only"], "no checkpoint", "--resume")


def test_evaluation_counts_by_hand(small, tmp_path):
    argv = [*small, *PHASES, "--head_start", "0", "--route_k", "2", "--phase1", "0"]
    found = nano.main(argv)["arms"]["technique"]
    best = torch.load(tmp_path / "out" / "technique" / "best.pt", weights_only=True)
    config = nano.Config(**best["config"])
    run = nano.Run(config)
    model = nano.GPT(config).eval()
    model.load_state_dict(best["model"])
    idx, _ = run.data.rows("val", run.data.windows("val", 2**13)[0])
    routes = []
    model(idx, routes=routes)
    picks = torch.stack([picks for picks, p in routes])                            # (2 H, B T, 2)
    assert found["skipped"] == pytest.approx((picks == 3).double().mean().item())
    paths = {tuple(frozenset(pair) for pair in picks[:, t].tolist()) for t in range(picks.size(1))}
    assert found["distinct_paths"] == len(paths), "orders of the same picks are one"
    for r in range(4):
        for name, route in (("A", picks[2 * r]), ("F", picks[2 * r + 1])):
            row = found["evaluation"][f"round {r} {name}"]
            for e, column in enumerate(["0", "1", "2", "SKIP"]):
                assert row[column] == f"{(route == e).double().mean():.0%}"
            for cell, pair in zip(list(row.values())[4:], route[:8].tolist(), strict=True):
                assert cell == ("+".join(str(e) for e in sorted(pair) if e < 3) or ".")
    C, T, R, E = 32, 32, config.router_dim, 4
    real = (picks < 3).sum((1, 2)).tolist()
    matrices = 2 * 4 * C**2 * sum(real[0::2]) + 2 * 8 * C**2 * sum(real[1::2])
    router = 2 * 3 * R * (C + R) + 2 * R * E
    whole = idx.numel() * (8 * router + 4 * 4 * T * C + 2 * C * run.data.meta["vocab_size"])
    first = 2 * idx.numel() * 2 * 3 * R * R  # in round 0 there is no state, but it is multiplied
    assert abs(found["flops_per_token"] * idx.numel() - matrices - whole) <= first + idx.numel()
