"""nano_reuse.py: both implementations against a literal oracle, routing of heads, the decoder's cache, similarity.

python -m pytest tests/test_reuse.py
"""
import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, killed_and_resumed, refused
from torch.utils.flop_counter import FlopCounterMode

import nano_reuse as nano
import nano_ssa

SIX = [*SMALL, "--n_layer", "6"]  # --compare needs six layers


def settings(**changes):
    small = dict(n_layer=6, n_head=4, n_embd=32, block_size=16, vocab_size=50, batch_size=4)
    return nano.Settings(**{**small, **changes})


def model_of(s, seed=0, std=0.3, model=nano.GPT):
    """In float64, with weights that make maps sharp."""
    torch.manual_seed(seed)
    model = model(s).double()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1 and name.endswith("weight")), std=std)
    return model


def tokens(B=2, T=16, seed=0):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


def oracle(model, s, idx):
    """The definition: layer after layer, head after head, query after query. Returns logits and the maps of all layers."""
    H, D, T = s.n_head, s.n_embd // s.n_head, idx.size(1)
    x = model.wte.weight[idx] + model.wpe.weight[:T]
    below, found = None, []
    for layer, block in enumerate(model.h):
        K = s.reuse_heads if s.first_reuse_layer <= layer < s.first_reuse_layer + s.reuse_layers else 0
        W = torch.cat([m.weight for m in (block.attn.c_q, block.attn.c_k, block.attn.c_v) if m is not None])
        h = F.layer_norm(x, (s.n_embd,), block.ln_1.weight, block.ln_1.bias, 1e-5)
        assert W.shape == (D * (2 * (H - K) + H), s.n_embd)
        part = lambda n: h @ W[n * D:(n + 1) * D].T  # (B, T, D)
        maps = []
        for head in range(H - K):
            q, k = part(head), part(H - K + head)
            rows = []
            for i in range(T):
                p = (k[:, :i + 1] @ q[:, i, :, None]).squeeze(-1).div(math.sqrt(D)).softmax(-1)
                rows.append(F.pad(p, (0, T - i - 1)))
            maps.append(torch.stack(rows, 1))
        maps += [below[j] for j in range(K)]
        out = torch.cat([maps[head] @ part(2 * (H - K) + head) for head in range(H)], -1)
        x = x + out @ block.attn.c_proj.weight.T
        h = F.layer_norm(x, (s.n_embd,), block.ln_2.weight, block.ln_2.bias, 1e-5)
        x = x + F.gelu(h @ block.mlp.c_fc.weight.T, approximate="tanh") @ block.mlp.c_proj.weight.T
        below = maps
        found.append(torch.stack(maps, 1))
    return F.layer_norm(x, (s.n_embd,), model.ln_f.weight, model.ln_f.bias, 1e-5) @ model.wte.weight.T, found


PLACES = [(P, K, f) for P, f in ((1, 1), (3, 1), (5, 1), (2, 3), (1, 5)) for K in (1, 2, 3, 4)]


@pytest.mark.parametrize("P, K, first", PLACES)
def test_both_implementations_equal_the_oracle(P, K, first):
    s = settings(reuse_layers=P, reuse_heads=K, first_reuse_layer=first)
    model, idx = model_of(s), tokens()
    weight = torch.randn(2, 16, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for impl in ("qk", "probs", "oracle"):
        for block in model.h:
            block.attn.impl = impl
        logits = oracle(model, s, idx)[0] if impl == "oracle" else model(idx)[0]
        results.append([logits, *torch.autograd.grad((logits * weight).sum(), list(model.parameters()))])
    for qk, probs, slow in zip(*results):
        scale = slow.abs().max().item()
        assert scale > 0 and (qk - slow).abs().max() <= 1e-12 * scale and (probs - slow).abs().max() <= 1e-12 * scale


@pytest.mark.parametrize("changes", [dict(reuse_layers=0), dict(reuse_heads=0)])
def test_without_reuse_it_is_the_dense_twin_to_the_bit(changes):
    s = settings(**changes)
    results, idx = [], tokens(T=17)
    for build in (lambda: nano.GPT(s), lambda: nano.dense_twin(s),
                  lambda: nano_ssa.GPT(nano_ssa.Config(ssa="off", n_layer=6, n_head=4, n_embd=32, block_size=16, vocab_size=50))):
        torch.manual_seed(0)
        model = build()
        logits, loss = model(idx[:, :-1], idx[:, 1:])
        results.append([logits, loss, *model.parameters(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize("P, first", [(3, 1), (2, 2)])
def test_full_reuse_hands_the_same_maps_up(P, first):
    s = settings(reuse_layers=P, first_reuse_layer=first)
    model = model_of(s)
    x, maps = nano.walk(model, tokens())
    torch.testing.assert_close(x, model.states(tokens())[-1], atol=1e-10, rtol=1e-10)
    for layer in range(1, 6):
        assert torch.equal(maps[layer], maps[layer - 1]) == (first <= layer < first + P), layer


@pytest.mark.parametrize("K", [1, 2, 3])
def test_partial_reuse_hands_new_heads_up_first(K):
    """Hand-built maps: head h of the source is filled with h, new heads of layer l with 10 l. What is old falls off the end."""
    H = 4
    handed = torch.arange(H).double()[None, :, None, None].expand(1, H, 2, 2)
    expected = list(range(H))
    for layer in (1, 2, 3):
        handed = nano.join(torch.full((1, H - K, 2, 2), 10.0 * layer, dtype=torch.float64), handed)
        expected = [10 * layer] * (H - K) + expected[:K]
        assert handed[0, :, 0, 0].tolist() == expected


def test_values_meet_the_maps_in_the_order_that_is_handed_up():
    """o of head h is map h times value h, new heads first: seen with values that pick one head."""
    s = settings(reuse_layers=2, reuse_heads=3)
    model = model_of(s)
    q, k, v = (torch.randn(2, n, 16, 8, dtype=torch.float64) for n in (1, 1, 4))
    below = nano.causal_maps(*(torch.randn(2, 4, 16, 8, dtype=torch.float64) for _ in range(2)))
    y, maps = nano.attend(q, k, v, below, "probs")
    torch.testing.assert_close(y[:, 0], nano.causal_maps(q, k)[:, 0] @ v[:, 0])
    for head in (1, 2, 3):
        torch.testing.assert_close(y[:, head], below[:, head - 1] @ v[:, head])
    assert [block.attn.n_reused for block in model.h] == [0, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("impl", ["qk", "probs"])
def test_reusing_layers_train_the_queries_and_keys_of_their_source(impl):
    """The source's own output is cut off: its queries and keys are left with the gradient from above, which is the real one."""
    s = settings(n_layer=3, reuse_layers=2, reuse_impl=impl)
    model, idx = model_of(s), tokens(T=17)
    model.h[0].attn.c_proj.weight.data.zero_()
    loss = lambda: F.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())  # in float64
    attn = model.h[0].attn
    assert torch.autograd.grad(loss(), attn.c_v.weight)[0].abs().max() == 0
    for W in (attn.c_q.weight, attn.c_k.weight):
        gradient, = torch.autograd.grad(loss(), W)
        assert gradient.abs().max() > 1e-4
        for at in ((3, 5), (17, 7), (31, 31)):
            with torch.no_grad():
                W[at] += 1e-5
                up = loss()
                W[at] -= 2e-5
                down = loss()
                W[at] += 1e-5
            assert gradient[at].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5, abs=1e-9)


def test_parameters_are_those_of_the_formula():
    for L in (3, 6):
        for P in range(L):
            for K in range(5):
                s = settings(n_layer=L, reuse_layers=P, reuse_heads=K)
                model = nano.GPT(s)
                matrices = sum(p.numel() for p in model.h.parameters() if p.ndim == 2)
                assert matrices == L * 12 * 32 ** 2 - P * 2 * 32 * K * 8
                names = {name for name, _ in model.named_parameters() if ".c_q." in name or ".c_k." in name}
                owners = [layer for layer in range(L) if K < 4 or not 1 <= layer <= P]
                assert names == {f"h.{layer}.attn.c_{x}.weight" for layer in owners for x in "qk"}
    s = settings()
    model = nano.GPT(s)
    model(tokens(), tokens())[1].backward()
    assert all(p.grad is not None for p in model.parameters()), "every parameter has a gradient, as DDP demands"


def test_the_arms_have_the_parameters_they_should():
    matrices = lambda model: sum(p.numel() for p in model.h.parameters() if p.ndim == 2)
    s = settings()  # 6 layers
    deeper = nano.build("deeper", s)
    assert len(deeper.h) == 7 and [b.attn.n_reused for b in deeper.h] == [0, *[4] * 6]
    assert matrices(deeper) == matrices(nano.dense_twin(s)) == matrices(nano.build("dense", s))
    assert nano.settings_of("deeper", settings(n_layer=24)).n_layer == 26 and nano.settings_of("deeper", settings(n_layer=12)).reuse_layers == 6
    for changes in (dict(reuse_heads=1), dict(first_reuse_layer=3), dict(reuse_impl="probs")):
        assert matrices(nano.build("deeper", settings(**changes))) == matrices(nano.dense_twin(s)), "it reuses all heads from layer 1 on"
        assert all(block.attn.impl == "qk" for block in nano.dense_twin(settings(**changes)).h), "dense attention is fused"
    for changes in (dict(), dict(reuse_heads=1), dict(reuse_layers=5, reuse_heads=3), dict(n_layer=7, reuse_layers=4, reuse_heads=1)):
        s = settings(**changes, compare=True)
        narrow = nano.build("narrow", s)
        assert matrices(narrow) == matrices(nano.GPT(s)) and all(b.attn.n_reused == 0 for b in narrow.h)
        std = narrow.h[0].mlp.c_proj.weight.std().item()
        assert std == pytest.approx(0.02 / math.sqrt(2 * s.n_layer), rel=0.1)


@pytest.mark.parametrize("impl", ["qk", "probs"])
@pytest.mark.parametrize("changes", [dict(), dict(reuse_heads=3), dict(reuse_layers=5), dict(first_reuse_layer=3)])
def test_the_future_is_invisible(impl, changes):
    model = model_of(settings(reuse_impl=impl, **changes)).float()
    for seed in range(10):
        idx, t = tokens(1, 16, seed), seed + 3
        other = torch.cat([idx[:, :t + 1], (idx[:, t + 1:] + 1) % 50], 1)
        with torch.no_grad():
            torch.testing.assert_close(model(idx)[0][:, :t + 1], model(other)[0][:, :t + 1], atol=0, rtol=0)
        x = model.embed(idx).detach().requires_grad_()
        h, handed = x, None
        for block in model.h:
            h, handed = block(h, handed)
        gradient, = torch.autograd.grad(model.read_out(h)[0][0, t].sum(), x)
        assert (gradient[0, t + 1:] == 0).all() and (gradient[0, t] != 0).any()
    for maps in nano.walk(model, idx)[1]:
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
        assert (maps.triu(1) == 0).all()


def test_maps_of_a_reusing_layer_do_not_depend_on_its_input():
    s = settings(reuse_layers=3)
    model, idx = model_of(s), tokens()
    before = nano.walk(model, idx)[1]
    model.h[0].mlp.c_proj.weight.data *= 2  # what layers 1, 2, ... read
    after = nano.walk(model, idx)[1]
    assert all(torch.equal(before[layer], after[layer]) for layer in range(4)) and not torch.allclose(before[4], after[4])


@pytest.mark.parametrize("impl", ["qk", "probs"])
def test_nothing_is_carried_from_one_forward_to_the_next(impl):
    model = model_of(settings(reuse_impl=impl))
    a, b = tokens(2, 16), tokens(3, 9, 1)
    expected = [oracle(model, settings(), x)[0] for x in (a, b)]
    for x, y in ((a, 0), (b, 1), (a, 0)):
        torch.testing.assert_close(model(x)[0], expected[y], atol=1e-10, rtol=1e-10)


def test_dropout_is_drawn_anew_in_every_layer_and_not_handed_up():
    q, k = (torch.randn(1, 2, 64, 8) for _ in range(2))
    v = torch.eye(64).expand(1, 2, 64, 64)
    torch.manual_seed(0)
    below, maps = nano.attend(q, k, v, None, "probs", dropout=0.5)
    assert torch.equal(maps, nano.causal_maps(q, k)), "what is handed up is from before dropout"
    none = q[:, :0]
    above, handed = nano.attend(none, none, v, maps, "probs", dropout=0.5)
    assert torch.equal(handed, maps)
    for y in (below, above):  # v is the identity: y is the map after dropout
        assert ((y == 0) | torch.isclose(y, 2 * maps)).all() and 0.4 < (y == 0)[maps > 0].float().mean() < 0.6
    assert not torch.equal(below, above)
    below, handed = nano.attend(q, k, v, None, "qk", dropout=0.5)
    above = nano.attend(none, none, v, handed, "qk", dropout=0.5)[0]
    for y in (below, above):
        assert ((y == 0) | torch.isclose(y, 2 * maps, atol=1e-6)).all() and 0.4 < (y == 0)[maps > 0].float().mean() < 0.6
    assert not torch.equal(below, above)
    for impl in ("qk", "probs"):
        model = nano.GPT(settings(dropout=0.5, reuse_impl=impl))
        assert not torch.equal(model(tokens())[0], model(tokens())[0])
        model.eval()
        assert torch.equal(model(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("impl", ["qk", "probs"])
def test_dropout_leaves_the_mean(impl):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 16, 8, generator=g) for _ in range(3))
    torch.manual_seed(0)
    none, below = q[:, :0], nano.attend(q, k, v, None, impl)[1]
    mean = sum(nano.attend(none, none, v, below, impl, dropout=0.25)[0] for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, nano.attend(none, none, v, below, impl)[0], atol=0.06, rtol=0)


# the decoder

@pytest.mark.parametrize("changes", [dict(), dict(reuse_layers=0), dict(reuse_layers=5), dict(reuse_heads=1), dict(reuse_heads=3),
                                     dict(first_reuse_layer=3), dict(bias=True), dict(reuse_impl="probs")])
def test_the_decoder_equals_full_forward(changes):
    s = settings(**changes)
    model, idx = model_of(s).eval(), tokens(3, 20)
    decoder = nano.Decoder(model, 3)
    for T in range(5, 21):  # a prompt of 5; 17 and more are beyond the context
        torch.testing.assert_close(decoder(idx[:, :T]), model(idx[:, max(0, T - 16):T])[0][:, -1], atol=1e-10, rtol=1e-10)
    out = model.generate(idx[:, :4], 20, temperature=0)
    assert torch.equal(out, model.generate(idx[:, :4], 20, temperature=0, next_logits=nano.Decoder(model, 3)))
    torch.manual_seed(1)
    drawn = model.generate(idx[:, :4], 20)
    torch.manual_seed(1)
    assert torch.equal(drawn, model.generate(idx[:, :4], 20, next_logits=nano.Decoder(model, 3)))
    with pytest.raises(AssertionError, match="new Decoder"):
        decoder = nano.Decoder(model, 3)
        decoder(idx[:, :5]), decoder(idx[:, :7])


def test_reused_heads_have_no_keys_in_the_cache():
    for changes in (dict(), dict(reuse_layers=5), dict(reuse_layers=4, reuse_heads=2), dict(reuse_layers=0)):
        s = settings(**changes)
        decoder = nano.Decoder(nano.GPT(s), 1)
        K = [nano.reused_heads(s, layer) for layer in range(6)]
        assert [keys.size(1) for keys in decoder.keys] == [4 - k for k in K]
        assert decoder.bytes_per_token() == (2 * 6 * 32 - sum(k * 8 for k in K)) * 4
        assert sum(x.numel() * 4 for x in (*decoder.keys, *decoder.values)) == 16 * decoder.bytes_per_token()
    dense, half, five = (nano.Decoder(nano.GPT(settings(reuse_layers=P)), 1).bytes_per_token() for P in (0, 3, 5))
    assert half == 0.75 * dense and five == dense * 7 / 12
    s = nano.Settings(**{**nano.SIZES["char"], "reuse_layers": 3})
    assert nano.Decoder(nano.GPT(s), 1, torch.bfloat16).bytes_per_token() == 6912


@pytest.mark.parametrize("P, K", [(5, 4), (3, 3), (0, 4)])
def test_reused_heads_compute_no_scores_in_decoding(P, K):
    model = nano.GPT(settings(reuse_layers=P, reuse_heads=K)).eval()
    decoder = nano.Decoder(model, 1)
    decoder(tokens(1, 15))
    with FlopCounterMode(display=False) as counter:
        decoder(tokens(1, 16))
    matrices = sum(p.numel() for p in model.h.parameters() if p.ndim == 2) + 50 * 32
    heads = 6 * 4 - P * K  # that have q.k, of 8 channels; all 24 have the map on v
    assert counter.get_total_flops() == 2 * matrices + 2 * 16 * 8 * (heads + 24)


# costs

@pytest.mark.parametrize("impl", ["qk", "probs"])
@pytest.mark.parametrize("changes", [dict(), dict(reuse_layers=5), dict(reuse_heads=1), dict(reuse_layers=0), dict(n_layer=7, reuse_layers=4, reuse_heads=3)])
def test_counted_flops_equal_the_formula(impl, changes):
    s = settings(reuse_impl=impl, **changes)
    for arm in nano.ARMS:
        model = nano.build(arm, s)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens(), tokens())[1].backward()
        assert counter.get_total_flops() == pytest.approx(nano.flops_per_token(s, arm) * 32, rel=1e-12), arm


@pytest.mark.parametrize("changes", [dict(), dict(reuse_layers=5), dict(reuse_heads=1)])
def test_counted_attention_flops_equal_the_formula(changes):
    s = settings(reuse_impl="probs", **changes)
    for arm in ("technique", "dense"):
        model = nano.build(arm, s)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens())
        rest = 2 * (6 * 8 * 32 ** 2 + 50 * 32)  # the MLPs and the head
        assert counter.get_total_flops() == (nano.attention_flops(s, arm) + rest) * 32


def test_qk_keeps_fewer_bytes_for_the_backward_pass_than_the_dense_twin():
    def kept(model):
        found = {}
        x = tokens(2, 16)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t):
            loss = model(x, x)[1]  # noqa: F841 (kept alive, so that no address is used twice)
        return sum(found.values()) - sum(p.numel() * 4 for p in model.parameters() if p.untyped_storage().data_ptr() in found)

    reuse, dense = (kept(nano.GPT(settings(reuse_layers=P))) for P in (3, 0))
    assert dense - reuse == 3 * 2 * 2 * 16 * 32 * 4  # three layers without Q and K of 2 x 16 tokens, 32 channels


# similarity

def test_total_variation():
    maps = nano.causal_maps(*(torch.randn(5, 6, 16, 8) for _ in range(2)))
    same = nano.head_similarity(maps, maps)
    torch.testing.assert_close(same.diagonal(), torch.ones(6))
    torch.testing.assert_close(same, same.T)
    torch.testing.assert_close(same[1, 2], 1 - 0.5 * (maps[:, 1] - maps[:, 2]).abs().sum(-1).mean())
    first, last = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    first[..., 0] = last[..., 1] = 1
    assert nano.head_similarity(first, last).item() == 0, "disjoint"


def test_layers_are_compared_by_the_best_match_of_heads():
    a = nano.causal_maps(*(3 * torch.randn(5, 4, 16, 8) for _ in range(2)))
    layers = lambda maps: nano.layer_similarity(nano.head_similarity(maps, maps).view(2, 4, 2, 4))
    torch.testing.assert_close(layers(torch.cat([a, a[:, [2, 0, 3, 1]]], 1)), torch.ones(2, 2))
    m = layers(torch.cat([a, a[:, :1].expand(-1, 4, -1, -1)], 1))  # every head of layer 1 is head 0 of layer 0, not the reverse
    assert m[1, 0] == pytest.approx(1) and m[0, 1] < 0.9


def test_random_maps_have_the_spread_of_the_trained_scores():
    s = settings(reuse_layers=0)
    model, idx = model_of(s), tokens(8)
    maps = nano.random_maps(s, model, idx)
    assert len(maps) == 6
    for ours, theirs in zip(maps, nano.walk(model, idx)[1]):
        causal = torch.ones(16, 16, dtype=torch.bool).tril()
        scores = [torch.where(causal, m.log(), 0.0) for m in (ours, theirs)]  # up to a constant of the row
        spread = [torch.where(causal, x - x.sum(-1, keepdim=True) / causal.sum(-1, keepdim=True), 0).square().mean((2, 3)) for x in scores]
        torch.testing.assert_close(*spread, atol=1e-8, rtol=1e-6)
        assert not torch.allclose(ours, theirs, atol=0.1)
    reuse = nano.random_maps(settings(), model_of(settings()), idx)
    assert torch.equal(reuse[0], reuse[3]) and not torch.allclose(reuse[3], reuse[4])


@pytest.fixture
def run(corpus):
    s = nano.Settings(n_layer=5, n_head=2, n_embd=32, block_size=64, dataset=str(corpus), similarity_windows=8)
    data = nano.Data(s, torch.device("cpu"))
    s.vocab_size = data.vocab_size
    return nano.Run(s, torch.device("cpu"), torch.float32, "", 0, 1, data)


def test_similarity_literally(run):
    """One pair of layers, and one of two sequences, computed by hand: 8 windows from all of the split, queries 32 and up."""
    run.settings = s = dataclasses.replace(run.settings, reuse_layers=0)
    model = model_of(s).float().eval()
    found = nano.redundancy(run, "technique", model)
    starts = run.data.windows("val")
    starts = [starts[i * (len(starts) - 1) // 7] for i in range(8)]
    maps = [nano.walk(model, run.data.rows("val", [start])[0])[1] for start in starts]

    def by_hand(pairs, upper, lower):
        tv = lambda a, b: 0.5 * sum((maps[i][upper][0, a] - maps[j][lower][0, b])[32:].abs().sum(-1).mean().item() for i, j in pairs) / 8
        return sum(max(1 - tv(a, b) for b in range(2)) for a in range(2)) / 2

    same, other = [(i, i) for i in range(8)], [(i, (i - 1) % 8) for i in range(8)]
    assert found["similarity"][3][1] == pytest.approx(by_hand(same, 3, 1), abs=1e-5)
    assert found["similarity_control"]["other_sequence"][2][2] == pytest.approx(by_hand(other, 2, 2), abs=1e-5)
    m = found["similarity"]
    assert found["similarity_below"]["trained"] == pytest.approx((m[3][2] + m[4][3]) / 2)
    assert found["similarity_further"]["trained"] == pytest.approx((m[3][1] + (m[4][1] + m[4][2]) / 2) / 2)
    assert found["similarity_of"] == "technique" and "copied_maps" not in found
    torch.manual_seed(nano.key(s.seed, "weights"))
    fresh = nano.redundancy(run, "technique", nano.build("technique", s).eval())
    assert fresh["similarity"] == found["similarity_control"]["untrained"] == fresh["similarity_control"]["untrained"]


def test_the_result_does_not_depend_on_the_size_of_the_chunks(run):
    model = model_of(run.settings).float().eval()
    whole, parts = (nano.redundancy(run, "dense", model, budget) for budget in (2**26, 3 * 5 * 2 * 64 * 64))
    for name in ("similarity", *whole["similarity_control"]):
        a, b = (torch.tensor(x[name] if name == "similarity" else x["similarity_control"][name]) for x in (whole, parts))
        torch.testing.assert_close(a, b)
    for name, value in whole["copied_maps"].items():
        assert value == pytest.approx(parts["copied_maps"][name], abs=1e-5)


def test_the_evaluation_is_without_dropout(run):
    run.settings = s = dataclasses.replace(run.settings, dropout=0.5)
    model = model_of(s).float()
    expected = nano.redundancy(run, "technique", model.eval())
    assert nano.evaluate_arm(run, "technique", model.train())["similarity"] == expected["similarity"]


def test_copied_maps(run):
    """Where a layer has the maps of the layer below anyway, copying them costs nothing; and the plain loss is the model's."""
    run.settings = s = dataclasses.replace(run.settings, reuse_layers=1)
    model = model_of(s).float().eval()
    c = nano.redundancy(run, "dense", model)["copied_maps"]
    starts = run.data.windows("val")
    x, y = run.data.rows("val", [starts[i * (len(starts) - 1) // 7] for i in range(8)])
    assert c["none"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    assert c["identity"][0] == c["best_match"][0] == c["all_identity"] == pytest.approx(c["none"], abs=1e-6)
    assert abs(c["identity"][1] - c["none"]) > 1e-5
    similar = torch.rand(5, 2, 5, 2)
    _, used = nano.walk(model, x, nano.copied(similar, [2, 3], False))
    assert torch.equal(used[2], used[1]) and torch.equal(used[3], used[1]) and not torch.allclose(used[4], used[1])


def test_best_match_repairs_permuted_heads(run):
    """Layers with the same heads in other orders: copying them as they come changes the model, by best match it does not."""
    run.settings = s = dataclasses.replace(run.settings, n_layer=3, n_head=4, reuse_layers=0)
    model = model_of(s).float().eval()
    for block in model.h:
        for m in (block.attn, block.mlp):
            m.c_proj.weight.data.zero_()  # all layers read the embedding
    for layer, order in (1, [1, 2, 3, 0]), (2, [2, 0, 1, 3]):
        for name in ("c_q", "c_k"):
            a, b = (getattr(model.h[i].attn, name).weight.data for i in (0, layer))
            b.copy_(a.view(4, 8, 32)[order].reshape(32, 32))
        model.h[layer].ln_1.weight.data.copy_(model.h[0].ln_1.weight.data)
    torch.nn.init.normal_(model.h[2].attn.c_proj.weight, std=0.3)
    run.settings.reuse_layers = 2
    c = nano.redundancy(run, "dense", model)["copied_maps"]
    assert c["best_match"] == pytest.approx([c["none"]] * 2, abs=1e-6) and c["all_best_match"] == pytest.approx(c["none"], abs=1e-6)
    assert abs(c["identity"][1] - c["none"]) > 1e-5 and abs(c["all_identity"] - c["none"]) > 1e-5


# runs

@pytest.mark.parametrize("argv, words", [
    ("--reuse_layers 6", ["--reuse_layers 6", "5 are left"]), ("--reuse_layers -2", ["--reuse_layers", "-1"]),
    ("--reuse_heads 5", ["--reuse_heads 5", "--n_head 4"]), ("--first_reuse_layer 0", ["--first_reuse_layer", "1"]),
    ("--first_reuse_layer 6", ["--first_reuse_layer 6", "1 to 5"]), ("--first_reuse_layer 4 --reuse_layers 3", ["--reuse_layers 3", "2 are left"]),
    ("--reuse_impl flash", ["--reuse_impl flash", "probs"]), ("--compare --n_layer 4", ["--compare", "--n_layer 6"]),
    ("--compare --reuse_heads 0", ["--compare", "--reuse_heads"]), ("--n_layer 1 --reuse_layers 1", ["--reuse_layers 1", "0 are left"]),
    ("--similarity_windows 1", ["--similarity_windows"]),
])
def test_bad_flags_get_one_line(capsys, tmp_path, argv, words):
    refused(nano.main, capsys, ["--device", "cpu", "--out_dir", str(tmp_path / "out"), *argv.split()], *words)
    assert not (tmp_path / "out").exists()


def test_half_of_the_layers_and_all_heads_reuse_by_default():
    for argv, P in ((["--size", "tiny"], 3), (["--size", "gpt2"], 6), (["--n_layer", "1"], 0), (["--reuse_layers", "2"], 2), (["--first_reuse_layer", "5"], 1)):
        s = nano.parse(["--device", "cpu", *argv])
        assert (s.reuse_layers, s.reuse_heads) == (P, s.n_head)


def test_a_run_of_the_script_compares_its_arms(corpus, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, ROOT / "nano_reuse.py", *SIX, "--max_iters", "60", "--dataset", str(corpus), "--out_dir", str(out),
                           "--compare", "--similarity_windows", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert list(arms) == ["technique", "dense", "deeper", "narrow"]
    for arm in arms:
        lines = [json.loads(line) for line in (out / arm / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    e = arms["technique"]["evaluation"]
    assert e["similarity_of"] == "dense" and e["similarity"] == arms["dense"]["evaluation"]["similarity"] and len(e["similarity"]) == 6
    assert set(e["similarity_control"]) == {"untrained", "random", "other_sequence"} and len(e["copied_maps"]["identity"]) == 5
    assert e["kv_cache_bytes_per_token"] == {"dense": 2 * 6 * 32 * 4, "reuse": 9 * 32 * 4}
    assert set(e["decode_tokens_per_second"]) == {"dense", "reuse"} and e["attention_flops_ratio"] == 0.75
    assert arms["technique"]["parameters"] == arms["narrow"]["parameters"]
    for words in ("in the dense twin", "layer 5", "random queries and keys", "heads as they come", "decoding at context 4,096", "A sample:"):
        assert words in done.stdout, words


def test_the_similarity_is_drawn(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run.out = tmp_path
    model = nano.GPT(run.settings).eval()
    nano.report(run, {"technique": {"evaluation": nano.evaluate_arm(run, "technique", model)}}, model)
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG") and "in this model" in capsys.readouterr().out


def test_resume_goes_on_with_the_same_losses(small, tmp_path, monkeypatch):
    windows = ["--similarity_windows", "2"]
    whole, resumed = killed_and_resumed(nano, monkeypatch, tmp_path, [*small, "--reuse_heads", "1", *windows], windows)
    assert whole["evaluation"]["similarity"] == resumed["evaluation"]["similarity"] and whole["evaluation"]["similarity_of"] == "technique"


def test_a_validation_split_of_one_window_gets_one_line(corpus, tmp_path, capsys):
    for file in ("train.bin", "val.bin", "meta.json"):
        (tmp_path / file).write_bytes((corpus / file).read_bytes()[:100 if file == "val.bin" else None])
    (tmp_path / "meta.json").write_text(json.dumps({**json.loads((tmp_path / "meta.json").read_text()), "val_tokens": 50}))
    with pytest.raises(SystemExit):
        nano.main([*SMALL, "--dataset", str(tmp_path), "--out_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "val.bin is too short to compare two sequences" in error and error.count("\n") == 1


def test_evaluation_alone_and_a_dropped_comparison(corpus, tmp_path, capsys):
    """--eval_only keeps the dense twin's map; --compare taken back after the technique was evaluated leaves it without one."""
    argv = [*SIX, "--max_iters", "2", "--dataset", str(corpus), "--similarity_windows", "2"]
    out = ["--device", "cpu", "--sample_tokens", "2", "--out_dir", str(tmp_path / "out")]
    first = nano.main([*argv, *out, "--compare"])["arms"]
    again = nano.main(["--eval_only", "--similarity_windows", "2", *out])["arms"]
    assert again["technique"]["evaluation"]["similarity"] == first["technique"]["evaluation"]["similarity"] and list(again) == list(first)
    path = tmp_path / "out" / "results.json"
    results = json.loads(path.read_text())
    results["arms"] = {"technique": results["arms"]["technique"]}
    for name in [n for n in results["arms"]["technique"]["evaluation"] if n.startswith(("similarity", "copied"))]:
        del results["arms"]["technique"]["evaluation"][name]
    path.write_text(json.dumps(results))
    capsys.readouterr()
    nano.main(["--resume", "--compare", "off", *out])
    assert "How alike" not in capsys.readouterr().out


@pytest.mark.parametrize("impl", ["qk", "probs"])
@pytest.mark.parametrize("K", [2, 4])
def test_compiled_equals_eager(impl, K):
    s = settings(reuse_impl=impl, reuse_heads=K)
    torch.manual_seed(0)
    model, idx = nano.GPT(s), tokens()
    torch.compiler.reset()
    results = []
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = f(idx, idx)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_maps_keep_the_dtype_of_queries(monkeypatch):
    """CUDA's autocast computes softmax in float32, a CPU's does not: as if it did."""
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: softmax(x.float(), dim))
    q, k = (torch.randn(1, 2, 8, 4, dtype=torch.bfloat16) for _ in range(2))
    assert nano.causal_maps(q, k).dtype == torch.bfloat16
    decoder = nano.Decoder(nano.GPT(settings()).bfloat16().eval(), 1)
    decoder(tokens(1, 5)), decoder(tokens(1, 6))  # refuses to multiply two dtypes


@pytest.mark.parametrize("impl", ["qk", "probs"])
def test_autocast(impl):
    """In bfloat16 maps are handed up in bfloat16, the loss stays near that of float32 and the gradients are finite."""
    s = settings(reuse_impl=impl, reuse_heads=2)
    torch.manual_seed(0)
    model = nano.GPT(s)
    exact = model(tokens(), tokens())[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        handed = model.h[0](model.embed(tokens()), None)[1]
        loss = model(tokens(), tokens())[1]
        decoded = nano.Decoder(model.eval(), 2, torch.bfloat16)(tokens())
    loss.backward()
    assert (handed if impl == "probs" else handed[0]).dtype == torch.bfloat16 and loss.item() == pytest.approx(exact, abs=0.05)
    torch.testing.assert_close(decoded.float(), model(tokens())[0][:, -1], atol=0.05, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("impl", ["qk", "probs"])
def test_it_can_learn_a_batch_by_heart(impl):
    torch.manual_seed(0)
    model, idx = nano.GPT(settings(reuse_impl=impl)), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
