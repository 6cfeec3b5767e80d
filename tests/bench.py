"""Cost tables, measured side by side in one run: arms take turns, medians are shown, and a time counts
as a ratio.

    python tests/bench.py ssa              # subsampled attention against materialised and fused dense
    python tests/bench.py reuse            # reused maps: training steps of whole models, and decoding
    python tests/bench.py mom              # routed modules against their number, a masked computation
    python tests/bench.py transevolve      # evolved scores against scores in every layer, and the twin
    python tests/bench.py jump --run out/nano_jump/...     # ways to leave early, of a finished run

Scores and the bytes that are saved for the backward pass are counted, and the same on every machine.
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import controls  # noqa: E402
import evidence  # noqa: E402
import nano_jump  # noqa: E402
import nano_mom  # noqa: E402
import nano_reuse  # noqa: E402
import nano_ssa  # noqa: E402
import nano_transevolve  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine():
    return f"{evidence.machine()}, torch {torch.__version__}"


def in_turns(arms, runs):
    """{name: median seconds} of the functions, called in turn, after one round that is not counted."""
    times = {name: [] for name in arms}
    for turn in range(runs + 1):
        for name, f in arms.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def ms(seconds):
    return f"{1000 * seconds:.1f} ms"


def stepper(model, idx):
    """Forward and backward of a whole model, without an optimizer."""
    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model(idx, idx)[1]
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    step.forward, step.inputs = lambda: model(idx, idx)[1], [*model.parameters(), *model.buffers()]
    return step


def kept_bytes(f, inputs):
    """Bytes that autograd keeps for the backward pass of f(), the inputs left out, each storage
    counted once."""
    kept, given = {}, {x.untyped_storage().data_ptr() for x in inputs}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = f()  # noqa: F841 (kept alive, so that no address is used twice)
    return sum(n for at, n in kept.items() if at not in given)


# ssa

def materialised(q, k, v):
    T, D = q.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / math.sqrt(D)).masked_fill(future, -math.inf).softmax(-1) @ v


def fused(q, k, v, path):
    """subsampled_attention by a fused kernel, with blocks in its batch dimension. The query itself is
    one more key, and its score one more channel: q' = [q_i, q_i.k_i], k' = [k_j, 0], and [0, 1] for
    that key; with v' = [v_j, 0] and [0, 1] its weight comes out as channel D."""
    (B, H, T, D), (N, w) = q.shape, path.shape
    n, spare = -(-T // N), 8 - D % 8  # queries in a block; fused kernels want a multiple of 8 channels

    def blocks(x):  # (B, H, N m, D) -> (N, B H, m, D)
        return x.flatten(0, 1).unflatten(1, (N, -1)).transpose(0, 1)

    q = F.pad(torch.cat([q, (q * k).sum(-1, keepdim=True)], -1), (0, spare - 1, 0, N * n - T))
    sources = path.flatten().clamp(max=T - 1)
    k_j, v_j = (F.pad(blocks(x.index_select(2, sources)), (0, spare, 0, 1)) for x in (k, v))
    k_j[..., w, D] = v_j[..., w, D] = 1
    i = torch.arange(N * n, device=q.device).view(N, 1, n, 1)
    mask = F.pad(path[:, None, None] < i, (0, 1), value=True)
    o = F.scaled_dot_product_attention(blocks(q), k_j, v_j, mask, scale=D ** -0.5)
    o = o.transpose(0, 1).reshape(B, H, N * n, -1)[:, :, :T]
    return o[..., :D] + o[..., D:D + 1] * v


def fused_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ssa_arms(T, device=DEVICE):
    """{name: (attention function, scores computed for a query)}."""
    arms = {"materialised": (materialised, T), "fused causal": (fused_causal, T)}
    for r in (4, 8):
        config = nano_ssa.Config(n_layer=1, block_size=T, reduction=r)
        path = nano_ssa.draw_paths(config, T, "bench")[0].to(device)
        for name, f in (("", nano_ssa.subsampled_attention), (", fused", fused)):
            attend = lambda q, k, v, f=f, path=path: f(q, k, v, path)  # noqa: E731
            arms[f"SSA r={r}{name}"] = attend, path.shape[1] + 1
    return arms


def qkv(T, tokens):
    dtype, shape = torch.bfloat16 if DEVICE == "cuda" else torch.float32, (max(1, tokens // T), 6, T, 64)
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]


def ssa(args):
    tensors, arms = [x.detach().cpu().double() for x in qkv(64, 128)], ssa_arms(64, "cpu")
    for name, (f, _) in arms.items():  # what is compared computes the same
        if name.startswith("SSA"):
            torch.testing.assert_close(f(*tensors), arms[name.split(",")[0]][0](*tensors))
    print(f"attention, 6 heads of 64, {args.tokens:,} tokens, forward and backward; {machine()}\n")
    rows = {}
    for T in args.T:
        tensors, arms = qkv(T, args.tokens), ssa_arms(T)
        steps = {name: lambda f=f: f(*tensors).sum().backward() for name, (f, _) in arms.items()}
        times = in_turns(steps, args.runs)
        for name, (f, scores) in arms.items():
            rows[f"T {T}, {name}"] = {
                "scores, 1/": f"{T / scores:.2f}",
                "saved bytes": f"{kept_bytes(lambda: f(*tensors), tensors):,}",
                "time": ms(times[name]), "vs materialised": f"{times['materialised'] / times[name]:.2f}x",
                "vs fused causal": f"{times['fused causal'] / times[name]:.2f}x"}
    print(nano_ssa.table(rows))


# reuse

REUSE = {"dense, maps": dict(reuse_layers=0, reuse_impl="probs"), "dense, fused": dict(reuse_layers=0),
         "reuse, maps": dict(reuse_impl="probs"), "reuse, fused": dict()}


def reuse_step(name, T, tokens):
    """Of a whole model: 6 layers, 2 heads of 64, vocabulary 65."""
    config = nano_reuse.Config(n_head=2, n_embd=128, block_size=T, vocab_size=65, **REUSE[name])
    idx = torch.randint(65, (max(1, tokens // T), T), device=DEVICE)
    return stepper(nano_reuse.GPT(config).to(DEVICE), idx)


def reuse_token(P, T):
    """The T-th token of 8 sequences, through a cache: (function, bytes in the cache of a sequence)."""
    config = nano_reuse.Config(n_head=6, n_embd=384, block_size=T, vocab_size=65, reuse_layers=P)
    model, new = nano_reuse.GPT(config).to(DEVICE).eval(), torch.zeros(8, 1, dtype=torch.long, device=DEVICE)
    full = model.empty_cache(8)
    for layer in full:
        layer.update({name: torch.randn(8, x.size(1), T - 1, x.size(3), device=DEVICE)
                      for name, x in layer.items()})

    @torch.no_grad()
    def token():
        return model(new, cache=[dict(layer) for layer in full])

    return token, sum(x.nbytes for layer in full for x in layer.values()) // 8


def reuse(args):
    print(f"training step, 6 layers, 2 heads of 64, P = 3, {args.tokens:,} tokens, forward and backward; "
          f"{machine()}\n")
    rows = {}
    for T in args.T:
        steps = {name: reuse_step(name, T, args.tokens) for name in REUSE}
        times = in_turns(steps, args.runs)
        for name, step in steps.items():
            rows[f"T {T}, {name}"] = {
                "saved bytes": f"{kept_bytes(step.forward, step.inputs):,}",
                "time": ms(times[name]),
                "vs dense, maps": f"{times['dense, maps'] / times[name]:.2f}x",
                "vs dense, fused": f"{times['dense, fused'] / times[name]:.2f}x"}
        del steps
    print(nano_ssa.table(rows))
    print("\ndecoding, 6 layers, 6 heads of 64, 8 sequences, keys and values in a cache\n")
    rows = {}
    for T in (1024, 4096):
        tokens = {f"T {T}, P = {P}": reuse_token(P, T) for P in (0, 3, 5)}
        times = in_turns({name: f for name, (f, _) in tokens.items()}, 3 * args.runs)
        for name, (_, cached) in tokens.items():
            rows[name] = {"cache, bytes a sequence": f"{cached:,}", "time a token": ms(times[name]),
                          "vs dense": f"{times[f'T {T}, P = 0'] / times[name]:.2f}x"}
    print(nano_ssa.table(rows))


# mom

def masked_attention(x, picks, gates, blocks):
    """assembled_attention with every module on every token, and the gates of those not picked 0."""
    (B, T, C), attns = x.shape, [block.attn for block in blocks]
    chosen = F.one_hot(picks, len(blocks) + 1).to(x)                               # (B T, K, N + 1)
    mask, weight = chosen.sum(1), (chosen * gates[..., None]).sum(1)
    h = [block.ln_1(x.flatten(0, 1)) for block in blocks]
    q, k, v = (sum(mask[:, i, None] * getattr(attn, c)(h[i]) for i, attn in enumerate(attns))
               .view(B, T, attns[0].n_head, -1).transpose(1, 2) for c in ("c_q", "c_k", "c_v"))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B * T, C)
    return sum(weight[:, i, None] * attn.c_proj(a) for i, attn in enumerate(attns)).view(x.shape)


def masked_mlp(x, picks, gates, blocks):
    """assembled_mlp with every module on every token."""
    chosen = F.one_hot(picks, len(blocks) + 1).to(x)
    weight, rows = (chosen * gates[..., None]).sum(1), x.flatten(0, 1)
    return sum(weight[:, i, None] * block.mlp(block.ln_2(rows))
               for i, block in enumerate(blocks)).view(x.shape)


def mom(args):
    """A model of 6 rounds, K = 1, whose tokens choose at random among N modules, against the same
    with every module on every token, and against its dense twin."""
    print(f"model of 6 rounds, T = 64, K = 1, no SKIP, {args.tokens:,} tokens, forward and backward; "
          f"{machine()}\n")
    dispatched = nano_mom.assembled_attention, nano_mom.assembled_mlp
    rows = {}
    for C in (96, 384):
        torch.manual_seed(0)
        idx, arms = torch.randint(65, (args.tokens // 64, 64), device=DEVICE), {}
        shape = dict(n_embd=C, n_head=C // 32, block_size=64, vocab_size=65, skip=False)
        for N in (0, 2, 4, 8):
            config = nano_mom.Config(**shape, n_layer=N or 6, rounds=6 if N else 0, head_start=0)
            model = nano_mom.GPT(config).to(DEVICE)

            step = stepper(model, idx)

            def routed(ways=dispatched, step=step):
                nano_mom.assembled_attention, nano_mom.assembled_mlp = ways
                return step()

            name = f"width {C}, N = {N}" if N else f"width {C}, dense twin"
            arms[name] = routed
            if N:
                arms[f"{name}, masked"] = lambda f=routed: f((masked_attention, masked_mlp))
                torch.testing.assert_close(routed(), arms[f"{name}, masked"](), atol=1e-2, rtol=1e-2)
        times = in_turns(arms, args.runs)
        twin = times[f"width {C}, dense twin"]
        for name, t in times.items():
            rows[name] = {"time": ms(t), "vs dense twin": f"{t / twin:.2f}x"}
            if f"{name}, masked" in times:
                rows[name]["faster than masked"] = f"{times[f'{name}, masked'] / t:.2f}x"
    print(nano_ssa.table(rows))


# transevolve

def scores_of(q, k, causal, real=None):
    """In the place of initial_scores: nothing is computed once in a block."""
    return q, k, causal


def recomputed(qk, b, v):
    """evolved_attention with scores of its own in every layer."""
    return (SCORES(*qk) + b).softmax(-1) @ v


def by_sdpa(qk, b, v):
    """The same by a fused kernel, to which causality and b are one mask."""
    q, k, causal = qk
    future = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)
    mask = b.masked_fill(future, -math.inf) if causal else b
    return F.scaled_dot_product_attention(q, k, v, mask)


SCORES, EVOLVED = nano_transevolve.initial_scores, nano_transevolve.evolved_attention
WAYS = {"scores once": (SCORES, EVOLVED), "scores in every layer": (scores_of, recomputed),
        "SDPA in every layer": (scores_of, by_sdpa)}
BLOCKS = {"dense twin": 0, "2 blocks of 3": 2, "1 block of 6": 1}


def transevolve_step(name, T, tokens):
    """Of a whole model: 6 layers, 2 heads of 64 (of 128 in queries and keys), vocabulary 65."""
    blocks, _, way = name.partition("; ")
    config = nano_transevolve.Config(n_head=2, n_embd=128, block_size=T, vocab_size=65, blocks=BLOCKS[blocks])
    torch.manual_seed(0)
    idx = torch.randint(65, (max(1, tokens // T), T), device=DEVICE)
    plain = stepper(nano_transevolve.GPT(config).to(DEVICE), idx)

    def in_this_way(f):
        names = WAYS.get(way, WAYS["scores once"])
        nano_transevolve.initial_scores, nano_transevolve.evolved_attention = names
        return f()

    def step():
        return in_this_way(plain)

    step.forward, step.inputs = lambda: in_this_way(plain.forward), plain.inputs
    return step


def transevolve(args):
    print(f"training step, 6 layers, 2 heads of 64, {args.tokens:,} tokens, forward and backward; "
          f"{machine()}\n")
    names = ["dense twin", *(f"{blocks}; {way}" for blocks in list(BLOCKS)[1:] for way in WAYS)]
    rows = {}
    for T in args.T:
        steps = {name: transevolve_step(name, T, args.tokens) for name in names}
        for blocks in list(BLOCKS)[1:]:  # what is compared computes the same
            for way in WAYS:
                torch.testing.assert_close(steps[f"{blocks}; {way}"](), steps[f"{blocks}; scores once"](),
                                           atol=1e-2 if DEVICE == "cuda" else 1e-4, rtol=1e-3)
        times = in_turns(steps, args.runs)
        for name, step in steps.items():
            again = times.get(name.split(";")[0] + "; scores in every layer")
            rows[f"T {T}, {name}"] = {
                "saved bytes": f"{kept_bytes(step.forward, step.inputs):,}", "time": ms(times[name]),
                "vs scores in every layer": f"{again / times[name]:.2f}x" if again else "",
                "vs dense twin": f"{times['dense twin'] / times[name]:.2f}x"}
        del steps
    print(nano_ssa.table(rows))


# jump

@torch.no_grad()
def jump(args):
    """Decoding of one sequence with the weights of a run: where a token may leave, and when."""
    folder = Path(args.run)
    config, run, model = controls.load(nano_jump, folder, "technique")
    L, T = config.n_layer, config.block_size
    texts = nano_jump.texts(run, "train", config.fit_tokens)
    maps = {pair: A.to(run.device) for pair, A in nano_jump.fit(nano_jump.moments(model, texts)[2]).items()}
    agree, sure = [], []
    for idx in nano_jump.texts(run, "train", 2**14):  # lambdas are chosen on training text
        states = model.states(idx)
        last = [states[l] @ maps[l, L] for l in range(L)] + [states[L]]
        logits = [model.read_out(h).flatten(0, 1) for h in last]
        agree.append(torch.stack([x.argmax(-1) == logits[-1].argmax(-1) for x in logits]))
        sure.append(torch.stack([nano_jump.confidence(x) for x in logits]))
    agree, sure = torch.cat(agree, 1).cpu(), torch.cat(sure, 1).cpu()
    t, grid, middle = torch.arange(sure.size(1)) % T, [n / 100 for n in range(-12, 120)], L // 2

    def only(layers):  # as if no other layer were ever sure
        mask = torch.tensor([l in layers or l == L for l in range(L + 1)])
        return sure.masked_fill(~mask[:, None], -1.0)

    def lam(layers, good):
        return min(x for x in grid if good(*nano_jump.leave(agree, only(layers), x, t, T)))

    every, one = range(1, L), [middle]
    agreeing = lambda depth, same: same >= 0.95  # noqa: E731
    third = lambda depth, same: depth >= 2 * L / 3  # noqa: E731
    ways = {"never": ([], 0.0), f"always after layer {middle}": (one, -1.2),
            "asks in every layer, never leaves": (every, 1.2),
            f"after layer {middle} if sure, 95% agree": (one, lam(one, agreeing)),
            "after any if sure, 95% agree": (every, lam(every, agreeing)),
            f"after layer {middle} if sure, a third saved": (one, lam(one, third)),
            "after any if sure, a third saved": (every, lam(every, third))}
    seconds, depths = {name: [] for name in ways}, {name: [] for name in ways}
    prompts = run.data.rows("val", run.data.windows("val", 20 * T)[0])[0][:, :T // 4]
    for prompt in prompts.split(1):
        for name, (layers, x) in ways.items():
            torch.manual_seed(0)
            decoder = nano_jump.Decoder(model, maps, layers, x)
            start = time.perf_counter()
            decoder.generate(prompt, T - T // 4)
            seconds[name].append(time.perf_counter() - start)
            depths[name] += decoder.depths
    never, rows = statistics.median(seconds["never"]), {}
    for name, found in seconds.items():
        rows[name] = {"layers a token": f"{statistics.mean(depths[name]):.2f} of {L}",
                      "time a token": ms(statistics.median(found) / (T - T // 4)),
                      "speed vs never": f"{never / statistics.median(found):.2f}x"}
    print(f"decoding of one sequence with mat, {folder}; {machine()}\n\n{nano_ssa.table(rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for bench in (ssa, reuse, mom, transevolve, jump):
        p = commands.add_parser(bench.__name__)
        p.add_argument("--T", type=int, nargs="+",
                       default=[64, 256, 1024] if bench is transevolve else [256, 1024, 4096])
        p.add_argument("--tokens", type=int, default=2048 if bench is mom else 4096)
        p.add_argument("--runs", type=int, default=7)
        p.add_argument("--run", help="folder of a finished run of nano_jump.py")
        p.set_defaults(bench=bench)
    args = parser.parse_args()
    args.bench(args)
