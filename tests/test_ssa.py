"""nano_ssa.py: attention against a literal oracle, causality, the draws, the self-ensemble."""
import math

import pytest
import torch
from conftest import future_is_invisible, weights
from torch.utils.flop_counter import FlopCounterMode

import nano_ssa as nano

# the draws of the paper's figure 3b: 8 tokens, windows of 2; in the first, query 0 sees its future
FIGURE = [[1, 3, 0, 4, 2, 6, 7, 5], [0, 1, 2, 6, 3, 5, 4, 7]]


def settings(**changes):
    small = dict(n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=50)
    return nano.Config(**{**small, **changes})


def oracle(q, k, v, path):
    """The definition, one query after the other: a softmax over the sources that it sees."""
    T, D = q.shape[-2:]
    queries = math.ceil(T / len(path))  # in a block
    out = []
    for i in range(T):
        seen = sorted({j for j in path[i // queries].tolist() if j < i} | {i})
        scores = (k[..., seen, :] * q[..., i, None, :]).sum(-1) / math.sqrt(D)
        out.append((scores.softmax(-1)[..., None] * v[..., seen, :]).sum(-2))
    return torch.stack(out, -2)


def qkv(T, D=6):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, T, D, generator=g, dtype=torch.float64, requires_grad=True)
            for _ in range(3)]


def compare(T, path):
    tensors, weight = qkv(T), torch.randn(2, 3, T, 6, dtype=torch.float64)
    results = []
    for attention in (nano.subsampled_attention, oracle):
        y = attention(*tensors, path)
        results.append([y, *torch.autograd.grad((y * weight).sum(), tensors)])
    for fast, slow in zip(*results):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("ssa, r, sigma", [
    ("local", 4, 0.5), ("local", 3, 0.0), ("local", 5, 100.0), ("local", 1, 2.0),
    ("unbiased", 4, 0.0), ("unbiased", 3, 0.0), ("unbiased", 1, 0.0)])
@pytest.mark.parametrize("T", [1, 2, 5, 8, 13, 37])
def test_attention_equals_the_definition_with_all_gradients(T, ssa, r, sigma):
    config = settings(ssa=ssa, reduction=r, sigma=sigma)
    for seed in range(3):
        compare(T, nano.draw_paths(config, T, "test", seed)[0])


@pytest.mark.parametrize("p", [*FIGURE, list(range(7, -1, -1))])
def test_queries_whose_sources_are_all_in_the_future_see_themselves(p):
    path = torch.tensor(p).view(4, 2)
    compare(8, path)
    q, k, v = qkv(8)
    if p == FIGURE[0]:
        assert torch.equal(nano.subsampled_attention(q, k, v, path)[..., 0, :], v[..., 0, :])


@pytest.mark.parametrize("ssa", ["local", "unbiased", "off"])
def test_the_future_is_invisible(ssa):
    config = settings(ssa=ssa, sigma=1.0)
    torch.manual_seed(0)
    model = nano.GPT(config).double()
    for seed in range(20):
        paths = None if ssa == "off" else nano.draw_paths(config, 61, seed)
        future_is_invisible(model, 50, 61, seed, paths=paths)


def test_local_draws_are_permutations_that_stay_near():
    moved = []
    for sigma in (0.0, 0.25, 1.0, 4.0):
        config = settings(block_size=4096, reduction=8, sigma=sigma)
        p = nano.draw_paths(config, 4096, 0).flatten(1)
        assert torch.equal(p.sort(-1).values, torch.arange(4096).expand(3, -1)), "each source once"
        moved.append((p - torch.arange(4096)).abs().float().mean().item() / 512)
    assert moved[0] == 0 and moved == sorted(moved)
    # the mean of |sigma eps|, but for what sorting changes
    assert moved[1] == pytest.approx(0.25 * math.sqrt(2 / math.pi), rel=0.1)


def test_unbiased_draws_are_uniform():
    p = nano.draw_paths(settings(ssa="unbiased", block_size=32, n_layer=500), 32, 0)
    assert p.shape == (500, 1, 8) and all(len(set(row.tolist())) == 8 for row in p[:, 0])
    counts = p.flatten().bincount(minlength=32).float()  # 125 +- 9.7 each
    assert (counts - 125).abs().max() < 5 * 9.7


def test_one_draw_for_a_layer_and_micro_step_from_keys_alone():
    config = settings()
    p = nano.draw_paths(config, 64, 3, 1)
    assert p.shape == (3, 4, 16), "no dimension for sequences or heads"
    state = torch.get_rng_state()
    assert torch.equal(p, nano.draw_paths(config, 64, 3, 1))
    assert torch.equal(state, torch.get_rng_state()), "a draw must not shift dropout"
    others = [nano.draw_paths(config, 64, 4, 1), nano.draw_paths(config, 64, 3, 0),
              nano.draw_paths(nano.replace(config, seed=1), 64, 3, 1)]
    layers = [p, *others]
    assert len({tuple(layer.flatten().tolist()) for draw in layers for layer in draw}) == 12


@pytest.mark.parametrize("changes", [dict(), dict(reduction=8), dict(ssa="unbiased")])
def test_counted_products_are_those_of_w_sources(changes):
    """Q K^T and A V with w drawn sources, forward and backward: 3 x 2 products of T w D."""
    config = settings(**changes)
    q, k, v = (torch.randn(2, 3, 64, 8, requires_grad=True) for _ in range(3))
    path = nano.draw_paths(config, 64, 0)[0]
    with FlopCounterMode(display=False) as counter:
        nano.subsampled_attention(q, k, v, path).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 2 * 3 * 64 * (64 // config.reduction) * 8)


def test_the_last_steps_are_dense(small, tmp_path, monkeypatch):
    drawn, real = [], nano.draw_paths

    def draw_paths(config, T, *where):
        drawn.append(where)
        return real(config, T, *where)

    monkeypatch.setattr(nano, "draw_paths", draw_paths)
    nano.main([*small, "--finetune", "0.25", "--draws", "0"])
    assert drawn == [(step, 0) for step in range(15)]
    nano.main([*small[:-1], str(tmp_path / "dense"), "--finetune", "1", "--draws", "0"])
    nano.main([*small[:-1], str(tmp_path / "off"), "--ssa", "off"])
    assert len(drawn) == 15
    dense, off = (weights(tmp_path / name) for name in ("dense", "off"))
    assert all(torch.equal(dense[name], off[name]) for name in off), "dense from the first step on"


@pytest.fixture
def measured(corpus):
    """A model whose predictions differ from draw to draw, and what measure() takes."""
    config = nano.Config(n_layer=2, n_head=2, n_embd=32, block_size=32, eval_tokens=2048, draws=4,
                         dataset=str(corpus), device="cpu")
    run = nano.Run(config)
    config.vocab_size = run.data.meta["vocab_size"]
    torch.manual_seed(0)
    model = nano.GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return config, run, model


def test_the_ensemble_averages_probabilities(measured):
    config, run, model = measured
    x, y = run.data.rows("val", torch.arange(0, 512, 32).numpy())
    with torch.no_grad():
        logits = [model(x, paths=nano.draw_paths(config, 32, "draw", k))[0] for k in range(1, 5)]
        p = torch.stack(logits).double().softmax(-1)
        dense = model(x)[0].double().softmax(-1)
    expected = {"dense mode": dense, **{f"ensemble of {k}": p[:k].mean(0) for k in range(1, 5)}}
    for mode, found in nano.measure(config, run, model).items():
        loss = -expected.pop(mode).gather(-1, y[..., None]).log().mean().item()
        assert found == {"loss of 512 tokens": pytest.approx(loss, abs=1e-6)}, mode
    assert not expected
