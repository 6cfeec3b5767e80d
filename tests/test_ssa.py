"""nano_ssa.py: subsampled attention against a literal oracle, causality, the statistics of the draws, the self-ensemble.

python -m pytest tests/test_ssa.py
"""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nano_ssa as nano

FIGURE = [[1, 3, 0, 4, 2, 6, 7, 5], [0, 1, 2, 6, 3, 5, 4, 7]]  # the draws of the paper's Figure 3b: 8 tokens, windows of 2


def oracle(q, k, v, path, keep_self):
    """The definition, one query after the other: a T x T mask, a softmax over what is left, 0 where nothing is."""
    T, D = q.shape[-2:]
    per_block = math.ceil(T / len(path))
    mask = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in path[i // per_block].tolist():
            if j < T and j <= i:
                mask[i, j] = True
        if keep_self:
            mask[i, i] = True
    out = []
    for i in range(T):
        if mask[i].any():
            p = ((k[..., mask[i], :] @ q[..., i, :, None]).squeeze(-1) / math.sqrt(D)).softmax(-1)
            out.append((p[..., None] * v[..., mask[i], :]).sum(-2))
        else:
            out.append(torch.zeros_like(v[..., 0, :]))
    return torch.stack(out, -2)


def qkv(T, D=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, T, D, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def settings(**changes):
    return nano.Settings(**{**dict(n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=50), **changes})


def path_of(T, seed=0, **changes):
    return nano.draw_paths(settings(block_size=max(T, 8), **changes), T, "test", seed)[0]


def compare(T, path, keep_self):
    tensors = qkv(T)
    weight = torch.randn(2, 3, T, 6, dtype=torch.float64)
    results = []
    for f in (nano.subsampled_attention, oracle):
        y = f(*tensors, path, keep_self)
        results.append([y, *torch.autograd.grad((y * weight).sum(), tensors)])
    for fast, slow in zip(*results):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("ssa, r, sigma", [("local", 4, 0.5), ("local", 3, 0.0), ("local", 5, 100.0), ("local", 1, 2.0),
                                           ("unbiased", 4, 0.0), ("unbiased", 3, 0.0)])
@pytest.mark.parametrize("T", [8, 32, 37])
def test_equals_the_oracle(T, ssa, r, sigma, keep_self):
    for seed in range(3):
        compare(T, path_of(T, seed, ssa=ssa, reduction=r, sigma=sigma), keep_self)


@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("T", [1, 2, 4, 5, 6, 13])  # r = 4: T = 13 has windows of 4; 1, 2 and 5 leave blocks unfilled
def test_any_length(T, keep_self):
    for ssa in ("local", "unbiased"):
        compare(T, path_of(T, ssa=ssa, reduction=4), keep_self)


@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("p", [*FIGURE, list(range(7, -1, -1))])
def test_rows_without_a_legal_source(p, keep_self):
    path = torch.tensor(p).view(4, 2)
    compare(8, path, keep_self)
    q, k, v = qkv(8)
    y = nano.subsampled_attention(q, k, v, path, keep_self)
    if p == FIGURE[0]:  # query 0 sees {1, 3}, all in its future
        assert torch.equal(y[..., 0, :], v[..., 0, :] if keep_self else torch.zeros_like(v[..., 0, :]))


def test_identity_permutation_is_block_local_attention():
    q, k, v = qkv(32)
    y = nano.subsampled_attention(q, k, v, path_of(32, reduction=4, sigma=0.0))
    for b in range(4):
        part = [x[..., 8 * b:8 * b + 8, :] for x in (q, k, v)]
        torch.testing.assert_close(y[..., 8 * b:8 * b + 8, :], F.scaled_dot_product_attention(*part, is_causal=True), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("ssa", ["local", "unbiased"])
def test_reduction_1_is_the_dense_twin(ssa, keep_self):
    s = settings(ssa=ssa, reduction=1, keep_self=keep_self)
    torch.manual_seed(0)
    model = nano.GPT(s).double()
    twin = nano.dense_twin(s).double()
    twin.load_state_dict(model.state_dict())
    idx = torch.randint(50, (2, 65))
    losses = model(idx[:, :-1], idx[:, 1:], paths=nano.draw_paths(s, 64, 0))[1], twin(idx[:, :-1], idx[:, 1:])[1]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(losses[0], list(model.parameters())), torch.autograd.grad(losses[1], list(twin.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("ssa", ["local", "unbiased", "off"])
def test_the_future_is_invisible(ssa, keep_self):
    s = settings(ssa=ssa, keep_self=keep_self, sigma=1.0)
    torch.manual_seed(0)
    model = nano.GPT(s)
    for seed in range(20):
        paths = None if ssa == "off" else nano.draw_paths(s, 61, seed)
        idx = torch.randint(50, (1, 61))
        t = int(torch.randint(60, ()))
        other = torch.cat([idx[:, :t + 1], (idx[:, t + 1:] + 1) % 50], 1)
        with torch.no_grad():
            assert torch.equal(model(idx, paths=paths)[0][:, :t + 1], model(other, paths=paths)[0][:, :t + 1])
        x = model.embed(idx).detach().requires_grad_()
        h = x
        for block, path in zip(model.h, [None] * 3 if paths is None else paths):
            h = block(h, path)
        grad, = torch.autograd.grad(model.read_out(h)[0][0, t].sum(), x)
        assert (grad[0, t + 1:] == 0).all() and (grad[0, t] != 0).any()


def test_local_draws_are_permutations_that_stay_near():
    spread = []
    for sigma in (0.0, 0.25, 1.0, 4.0):
        s = settings(block_size=4096, reduction=8, sigma=sigma, n_layer=4)
        p = nano.draw_paths(s, 4096, 0).flatten(1)
        assert p.shape == (4, 4096) and torch.equal(p.sort(-1).values, torch.arange(4096).expand(4, -1)), "each source is used once"
        spread.append((p - torch.arange(4096)).abs().float().mean().item() / 512)
    assert spread[0] == 0 and spread == sorted(spread)
    # m + sigma w eps is sorted again: before the ranks' own shift, the mean displacement is E|eps| = sqrt(2/pi) of sigma
    assert spread[1] == pytest.approx(0.25 * math.sqrt(2 / math.pi), rel=0.1)


def test_unbiased_draws_are_uniform():
    s = settings(ssa="unbiased", block_size=32, n_layer=500)
    p = nano.draw_paths(s, 32, 0)
    assert p.shape == (500, 1, 8) and all(len(set(row.tolist())) == 8 for row in p[:, 0])
    counts = p.flatten().bincount(minlength=32).float()  # 125 +- 9.7 each if uniform
    assert (counts - 125).abs().max() < 5 * 9.7


def test_draws_are_keyed_by_seed_step_micro_step_and_layer():
    s = settings()
    p = nano.draw_paths(s, 64, 3, 1)
    assert torch.equal(p, nano.draw_paths(s, 64, 3, 1))
    others = [nano.draw_paths(s, 64, 4, 1), nano.draw_paths(s, 64, 3, 0), nano.draw_paths(dataclasses.replace(s, seed=1), 64, 3, 1)]
    assert all(not torch.equal(p[a], o[b]) for o in others for a in range(3) for b in range(3))
    assert not torch.equal(p[0], p[1]) and not torch.equal(p[1], p[2])
    state = torch.get_rng_state()
    nano.draw_paths(s, 64, 9)
    assert torch.equal(state, torch.get_rng_state()), "a draw must not shift dropout"


def test_the_mode_is_the_argument_never_train_or_eval():
    s = settings()
    torch.manual_seed(0)
    model, idx = nano.GPT(s), torch.randint(50, (2, 64))
    a, b = nano.draw_paths(s, 64, 0), nano.draw_paths(s, 64, 1)
    dense, one, two = model(idx)[0], model(idx, paths=a)[0], model(idx, paths=b)[0]
    assert not torch.allclose(dense, one) and not torch.allclose(one, two)
    model.eval()
    assert torch.equal(dense, model(idx)[0]) and torch.equal(one, model(idx, paths=a)[0])


@pytest.mark.parametrize("ssa", ["local", "unbiased"])
def test_nothing_of_size_T_by_T_exists(ssa):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    T, r = 1024, 8
    q, k, v = (torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(3))
    path = nano.draw_paths(settings(ssa=ssa, block_size=T, reduction=r), T, 0)[0]
    with Watch():
        nano.subsampled_attention(q, k, v, path).sum().backward()
    assert max(sizes) <= T * (T // r + 16)  # the mask, with its columns rounded up


@pytest.mark.parametrize("changes", [dict(), dict(ssa="unbiased"), dict(keep_self=False), dict(reduction=7), dict(ssa="off")])
def test_counted_flops_equal_the_formula(changes):
    s = settings(**changes, finetune=0.0, max_iters=10)
    model = nano.GPT(s)
    idx = torch.randint(50, (2, 64))
    paths = None if s.ssa == "off" else nano.draw_paths(s, 64, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx, paths=paths)[1].backward()
    assert counter.get_total_flops() == pytest.approx(nano.flops_per_token(s, "technique") * idx.numel(), rel=1e-12)
    mixed = nano.flops_per_token(dataclasses.replace(s, finetune=0.5), "technique")
    assert mixed == pytest.approx((nano.flops_per_token(s, "technique") + nano.flops_per_token(s, "dense")) / 2)


def test_fresh_draws_do_not_recompile():
    counter = CompileCounter()
    s = settings()
    model, idx = nano.GPT(s), torch.randint(50, (2, 64))
    torch.compiler.reset()
    fast = torch.compile(model, backend=counter)
    for step in range(5):
        fast(idx, idx, paths=nano.draw_paths(s, 64, step))
    assert counter.frame_count == 1, "one graph, without breaks, whatever was drawn"
    for _ in range(3):
        fast(idx, idx)
    assert counter.frame_count == 2, "and one for dense attention"


def test_compiled_equals_eager():
    s = settings()
    torch.manual_seed(0)
    model, idx, paths = nano.GPT(s), torch.randint(50, (2, 64)), nano.draw_paths(s, 64, 0)
    torch.compiler.reset()
    results = []
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = f(idx, idx, paths=paths)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def trained(small, capsys=None, **flags):
    return nano.main([*small, *(x for name, value in flags.items() for x in (f"--{name}", str(value)))])


def test_finetuning_everything_is_dense_training(small, tmp_path):
    load = lambda name: torch.load(tmp_path / name / "technique" / "ckpt.pt", weights_only=True)["model"]
    trained(small, finetune=1.0, draws=1, out_dir=tmp_path / "a")
    trained(small, ssa="off", out_dir=tmp_path / "b")
    a, b = load("a"), load("b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_finetuning_begins_where_it_should(small, tmp_path):
    """20 steps, the last half dense: the weights kept from before are those of step 10, which an evaluation saved too."""
    seen = []
    real = nano.write

    def write(path, content):
        if path.name in ("ckpt.pt", "before_finetune.pt"):
            seen.append((path.name, None if isinstance(content, str) else {k: v.clone() for k, v in content["model"].items()}))
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "write", write)
        trained(small, finetune=0.5, draws=1)
    before = [w for name, w in seen if name == "before_finetune.pt"][-1]
    ckpts = [w for name, w in seen if name == "ckpt.pt"]
    assert len(ckpts) == 3 and all(torch.equal(before[k], ckpts[1][k]) for k in before)
    assert nano.finetune_from(nano.Settings(max_iters=1000, finetune=0.15)) == 850


@pytest.fixture
def measured(corpus):
    """A lightly trained model and its Run, so that measure() sees probabilities that differ."""
    s = nano.Settings(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, dataset=str(corpus), draws=4, ensemble_tokens=512)
    s.vocab_size = nano.Data(s, torch.device("cpu")).vocab_size
    run = nano.Run(s, torch.device("cpu"), torch.float32, "", 0, 1, nano.Data(s, torch.device("cpu")))
    torch.manual_seed(0)
    model = nano.GPT(s)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return run, model


def test_the_ensemble_averages_probabilities(measured):
    run, model = measured
    s, found = run.settings, nano.measure(*measured)
    starts = run.data.windows("val")
    starts = starts[len(starts) // 2:][:512 // 32]
    x, y = run.data.rows("val", starts)
    with torch.no_grad():
        p = torch.stack([model(x, paths=nano.draw_paths(s, 32, "draw", k))[0].double().softmax(-1) for k in range(4)])
    nll = lambda p: -p.gather(-1, y[..., None]).log().mean().item()
    assert found["tokens"] == 512
    assert found["ensemble"] == {k: pytest.approx(nll(p[:int(k)].mean(0)), abs=1e-6) for k in ("1", "2", "4")}
    assert found["val_loss_single_draw"] == pytest.approx(sum(map(nll, p)) / 4, abs=1e-6)
    assert found["ensemble"]["4"] < found["val_loss_single_draw"], "Jensen's inequality"
    assert found["ensemble_top1"]["4"] == pytest.approx((p.mean(0).argmax(-1) == y).double().mean().item())
    assert found["val_loss_dense_mode"] == pytest.approx(nll(model(x)[0].double().softmax(-1)), abs=1e-6)


def test_an_ensemble_of_one_sub_model_is_that_sub_model(measured, monkeypatch):
    real = nano.draw_paths
    monkeypatch.setattr(nano, "draw_paths", lambda s, T, *where: real(s, T, "always the same"))
    found = nano.measure(*measured)
    assert all(v == pytest.approx(found["val_loss_single_draw"], abs=1e-6) for v in found["ensemble"].values())


def test_the_temperature_is_fitted_on_the_first_half(measured):
    run, model = measured
    model.ln_f.weight.data *= 8  # overconfident: the best temperature is far from 1
    visited, rows = [], run.data.rows
    run.data.rows = lambda split, starts: visited.extend(starts.tolist()) or rows(split, starts)
    found = nano.measure(run, model)
    starts = run.data.windows("val")
    fit, reported = starts[:len(starts) // 2][:512 // 32], starts[len(starts) // 2:][:512 // 32]
    assert visited == [*fit, *reported]
    x, y = rows("val", fit)
    with torch.no_grad():
        z = model(x)[0].flatten(0, 1)
    loss = lambda heat: F.cross_entropy(z / heat, y.flatten()).item()
    best = found["temperature"]
    assert best > 1.5 and all(loss(best) <= loss(heat) + 1e-6 for heat in (0.5, 1, best * 0.96, min(4, best * 1.04)))
    x, y = rows("val", reported)
    with torch.no_grad():
        expected = F.cross_entropy(model(x)[0].flatten(0, 1) / best, y.flatten()).item()
    assert found["val_loss_temperature"] == pytest.approx(expected, abs=1e-5), "reported on the second half"
