"""Cost tables, measured side by side in one run: arms take turns, medians are shown, and a time counts as a ratio.

    python tests/bench.py ssa              # subsampled attention against materialised and fused dense attention
    python tests/bench.py reuse            # reused attention maps: training steps of whole models, and decoding
    python tests/bench.py mom              # routed modules against their number, a masked computation and the dense twin
    python tests/bench.py transevolve      # evolved attention: both implementations, scores in every layer, and the dense twin
    python tests/bench.py jump             # linear maps of all pairs of layers: time and memory of the fit
    python tests/bench.py base             # a training step of the dense twin against the plain loop of nanoGPT's recipe
    python tests/bench.py base --train     # both trained in turns: seconds and loss on the whole validation split

Scores and saved bytes are counted, and the same on every machine; times and, on a CPU, peak bytes are measured.
"""
import argparse
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nano_jump  # noqa: E402
import nano_mom  # noqa: E402
import nano_reuse  # noqa: E402
import nano_ssa  # noqa: E402
import nano_transevolve  # noqa: E402
import nano_transevolve as nano  # noqa: E402


def machine():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def in_turns(arms, runs, device):
    """{name: median seconds} of the functions, called in turn, after one round that is not counted."""
    times = {name: [] for name in arms}
    for turn in range(runs + 1):
        for name, f in arms.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


# ssa

def materialised(q, k, v):
    T, D = q.shape[-2:]
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(D)
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf).softmax(-1) @ v


def fused(q, k, v, path):
    """subsampled_attention by a fused kernel, with blocks in its batch dimension. The query itself is one more key, and its
    score one more channel: q' = [q_i, q_i.k_i], k' = [k_j, 0], and [0, 1] for that key; with v' = [v_j, 0] and [0, 1] its
    weight comes out as channel D."""
    (B, H, T, D), (N, w) = q.shape, path.shape
    n, spare = -(-T // N), 8 - D % 8  # queries in a block; fused kernels want a multiple of 8 channels

    def blocks(x):  # (B, H, N m, D) -> (N, B H, m, D)
        return x.flatten(0, 1).unflatten(1, (N, -1)).transpose(0, 1)

    q = F.pad(torch.cat([q, (q * k).sum(-1, keepdim=True)], -1), (0, spare - 1, 0, N * n - T))
    k_j, v_j = (F.pad(blocks(x.index_select(2, path.flatten().clamp(max=T - 1))), (0, spare, 0, 1)) for x in (k, v))
    k_j[..., w, D] = v_j[..., w, D] = 1
    i = torch.arange(N * n, device=q.device).view(N, 1, n, 1)
    mask = F.pad(path[:, None, None] < i, (0, 1), value=True)
    o = F.scaled_dot_product_attention(blocks(q), k_j, v_j, mask, scale=D ** -0.5)
    o = o.transpose(0, 1).reshape(B, H, N * n, -1)[:, :, :T]
    return o[..., :D] + o[..., D:D + 1] * v


def ssa_arms(T, device):
    """{name: (attention function, scores computed for a query)}."""
    arms = {"materialised": (materialised, T),
            "fused causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), T)}
    for r in (4, 8):
        path = nano_ssa.draw_paths(nano_ssa.Config(n_layer=1, block_size=T, reduction=r), T, "bench")[0].to(device)
        w = path.shape[1]
        arms[f"SSA r={r}"] = (lambda q, k, v, path=path: nano_ssa.subsampled_attention(q, k, v, path), w + 1)
        arms[f"SSA r={r}, fused"] = (lambda q, k, v, path=path: fused(q, k, v, path), w + 1)
    return arms


def qkv(T, tokens, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [torch.randn(max(1, tokens // T), 6, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def kept_bytes(f, inputs):
    """Bytes that autograd keeps for the backward pass of f(), the inputs left out, each storage counted once."""
    kept = {}
    given = {x.untyped_storage().data_ptr() for x in inputs}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = f()  # noqa: F841 (kept alive, so that no address is used twice)
    return sum(n for at, n in kept.items() if at not in given)


def peak_bytes(bench, name, T, tokens, device):
    """Peak memory of one forward and backward beyond what was there before; on a CPU in a process of its own."""
    if device == "cpu" and not Path("/proc/self/status").exists():
        return None
    if device == "cpu":
        command = [sys.executable, __file__, "peak", bench, name, str(T), str(tokens)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    step = STEPS[bench](name, T, tokens, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak(bench, name, T, tokens):
    """The high-water mark of this process's memory, as /proc has it (Linux)."""
    def high():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    STEPS[bench]("tiny, moments" if bench == "jump" else name, 64, 64, "cpu")()  # libraries in place
    step = STEPS[bench](name, T, tokens, "cpu")
    before = high()
    step()
    print(high() - before)


def ssa_step(name, T, tokens, device):
    tensors, f = qkv(T, tokens, device), ssa_arms(T, device)[name][0]
    return lambda: f(*tensors).sum().backward()


def ssa(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors, arms = [x.detach().double() for x in qkv(64, 128, "cpu")], ssa_arms(64, "cpu")
    for name, (f, _) in arms.items():  # what is compared computes the same
        if name.startswith("SSA"):
            torch.testing.assert_close(f(*tensors), arms[name.split(",")[0]][0](*tensors))
    print(f"attention, 6 heads of 64, {args.tokens:,} tokens, forward and backward; {machine()}\n")
    rows = [["T", "attention", "scores, 1/", "saved bytes", "peak bytes", "time", "vs materialised", "vs fused causal"]]
    for T in args.T:
        tensors = qkv(T, args.tokens, device)
        arms = ssa_arms(T, device)
        grad = torch.randn_like(tensors[0])

        def step(f):
            for x in tensors:
                x.grad = None
            f(*tensors).backward(grad)

        times = in_turns({name: (lambda f=f: step(f)) for name, (f, _) in arms.items()}, args.runs, device)
        for name, (f, scores) in arms.items():
            rows.append([f"{T}", name, f"{T / scores:.2f}", kept_bytes(lambda: f(*tensors), tensors),
                         peak_bytes("ssa", name, T, args.tokens, device), f"{1000 * times[name]:.1f} ms",
                         f"{times['materialised'] / times[name]:.2f}x", f"{times['fused causal'] / times[name]:.2f}x"])
    print(nano.table(rows))


# reuse

REUSE = {"dense, maps": dict(reuse_layers=0, reuse_impl="probs"), "reuse, maps": dict(reuse_layers=3, reuse_impl="probs"),
         "dense, fused": dict(reuse_layers=0), "reuse, fused": dict(reuse_layers=3)}


def reuse_step(name, T, tokens, device):
    """Forward and backward of a whole model: 6 layers, 2 heads of 64, vocabulary 65."""
    config = nano_reuse.Config(n_head=2, n_embd=128, block_size=T, vocab_size=65, **REUSE[name])
    model, idx = nano_reuse.GPT(config).to(device), torch.randint(65, (max(1, tokens // T), T), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(idx, idx)[1]
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss

    step.forward, step.inputs = lambda: model(idx, idx)[1], list(model.parameters())
    return step


def reuse_token(P, T, device):
    """The T-th token of 8 sequences, through a cache: (function, bytes in the cache of a sequence)."""
    config = nano_reuse.Config(n_head=6, n_embd=384, block_size=T, vocab_size=65, reuse_layers=P)
    model, new = nano_reuse.GPT(config).to(device).eval(), torch.zeros(8, 1, dtype=torch.long, device=device)
    full = model.empty_cache(8)
    for layer in full:
        layer.update({name: torch.randn(8, x.size(1), T - 1, x.size(3), device=device) for name, x in layer.items()})

    @torch.no_grad()
    def token():
        return model(new, cache=[dict(layer) for layer in full])

    return token, sum(x.nbytes for layer in full for x in layer.values()) // 8


def reuse(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"training step, 6 layers, 2 heads of 64, P = 3, {args.tokens:,} tokens, forward and backward; {machine()}\n")
    rows = [["T", "attention", "saved bytes", "peak bytes", "time", "vs dense, maps", "vs dense, fused"]]
    for T in args.T:
        steps = {name: reuse_step(name, T, args.tokens, device) for name in REUSE}
        times = in_turns(steps, args.runs, device)
        for name, step in steps.items():
            rows.append([f"{T}", name, kept_bytes(step.forward, step.inputs), peak_bytes("reuse", name, T, args.tokens, device),
                         f"{1000 * times[name]:.1f} ms", f"{times['dense, maps'] / times[name]:.2f}x", f"{times['dense, fused'] / times[name]:.2f}x"])
        del steps
    print(nano.table(rows))
    rows = [["T", "decoding, 8 sequences", "cache, bytes a sequence", "time a token", "vs dense"]]
    for T in (1024, 4096):
        tokens = {name: reuse_token(P, T, device) for name, P in (("dense", 0), ("reuse, P = 3", 3), ("reuse, P = 5", 5))}
        times = in_turns({name: f for name, (f, _) in tokens.items()}, 3 * args.runs, device)
        for name, (_, cached) in tokens.items():
            rows.append([f"{T}", name, cached, f"{1000 * times[name]:.1f} ms", f"{times['dense'] / times[name]:.2f}x"])
    print("\n6 layers, 6 heads of 64, keys and values in a cache\n")
    print(nano.table(rows))


# mom

def spread(picks, gates, N):
    """The gates of one round as (M, N), 0 where a module was not picked, and the mask of those that were."""
    return (torch.zeros(len(picks), N, device=picks.device).scatter(1, picks, x) for x in (gates, torch.ones_like(gates)))


def masked_mlp(x, picks, gates, fc, proj):
    """assembled_mlp with every module on every token."""
    gates, _ = spread(picks, gates, len(fc.layers))
    return sum(gates[:, i, None] * out(F.gelu(into(norm(x.flatten(0, 1))), approximate="tanh"))
               for i, ((into,), norm, (out,)) in enumerate(zip(fc.layers, fc.norms, proj.layers))).view(x.shape)


def masked_attention(x, picks, gates, qkv, out, n_head, dropout=0.0):
    """assembled_attention with every module on every token."""
    B, T, C = x.shape
    gates, mask = spread(picks, gates, len(qkv.layers))
    normed = [norm(x.flatten(0, 1)) for norm in qkv.norms]
    q, k, v = (sum(mask[:, i, None] * module[part](normed[i]) for i, module in enumerate(qkv.layers)).view(B, T, n_head, C // n_head).transpose(1, 2)
               for part in range(3))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B * T, C)
    return sum(gates[:, i, None] * layer(a) for i, (layer,) in enumerate(out.layers)).view(B, T, C)


def stepper(f, parameters, device):
    """Forward and backward of a loss, without an optimizer."""
    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = f()
        for p in parameters:
            p.grad = None
        loss.backward()
        return loss.detach()
    return step


def mom(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"forward and backward, {args.tokens:,} tokens, K = 1, no SKIP; {machine()}\n")
    masked = lambda f: lambda: with_masks(f)

    def with_masks(f):
        kept = nano_mom.assembled_mlp, nano_mom.assembled_attention
        nano_mom.assembled_mlp, nano_mom.assembled_attention = masked_mlp, masked_attention
        try:
            return f()
        finally:
            nano_mom.assembled_mlp, nano_mom.assembled_attention = kept

    def mlps(C):
        s = nano_mom.Settings(n_embd=C, n_head=C // 32)
        x, target = (torch.randn(1, args.tokens, C, device=device) for _ in range(2))
        x.requires_grad_()
        blocks = torch.nn.ModuleList(nano_mom.Block(s) for _ in range(8)).to(device)
        arms = {"dense": stepper(lambda: ((x + blocks[0].mlp(blocks[0].ln_2(x))) * target).mean(), [x, *blocks[0].parameters()], device)}
        for N in (2, 4, 8):
            picks, gates = torch.randint(N, (args.tokens, 1), device=device), torch.rand(args.tokens, 1, device=device, requires_grad=True)

            def routed(N=N, picks=picks, gates=gates):
                some, grouped = blocks[:N], nano_mom.use_grouped_mm(x)
                fc = nano_mom.Layers([(m.mlp.c_fc,) for m in some], [m.ln_2 for m in some], grouped)
                proj = nano_mom.Layers([(m.mlp.c_proj,) for m in some], None, grouped)
                return ((x + nano_mom.assembled_mlp(x, picks, gates, fc, proj)) * target).mean()

            arms[f"N = {N}"] = stepper(routed, [x, gates, *blocks.parameters()], device)
            arms[f"N = {N}, masked"] = masked(arms[f"N = {N}"])
        return arms

    def models(C, H=6, T=64):
        s = nano_mom.Settings(n_embd=C, n_head=C // 32, block_size=T)
        idx = torch.randint(65, (max(1, args.tokens // T), T), device=device)
        made = {"dense": nano_mom.dense_twin(s)}
        for N in (2, 4, 8):
            made[f"N = {N}"] = nano_mom.GPT(nano_mom.Settings(n_embd=C, n_head=C // 32, block_size=T, n_layer=N, bottom=0, top=0, rounds=H, skip=False))
        arms = {}
        for name, model in made.items():
            model.to(device)
            arms[name] = stepper(lambda model=model: model(idx, idx)[1], list(model.parameters()), device)
            if name != "dense":
                arms[f"{name}, masked"] = masked(arms[name])
        return arms

    rows = [["", "modules", "time", "vs N = 2", "vs masked", "vs dense"]]
    for part, make in ("feed-forward, width {}", mlps), ("model, 6 rounds of width {}, T = 64", models):
        for C in (96, 384):
            torch.manual_seed(0)
            arms = make(C)
            for name in [name for name in arms if "masked" in name]:  # what is compared computes the same
                torch.testing.assert_close(arms[name](), arms[name.split(",")[0]](), atol=1e-2 if device == "cuda" else 1e-5, rtol=1e-2)
            times = in_turns(arms, args.runs, device)
            for name, t in times.items():
                slow = times.get(f"{name}, masked")
                rows.append([part.format(C), name, f"{1000 * t:.1f} ms", f"{t / times['N = 2']:.2f}x", slow and f"{slow / t:.2f}x faster",
                             f"{t / times['dense']:.2f}x"])
    print(nano.table(rows))


# transevolve

def written_out(q, k, v, b, real=None):
    """evolved_sdpa with the scores computed again and written out."""
    return (nano_transevolve.initial_scores(q, k, real) + b[:, :, None]).softmax(-1).to(v.dtype) @ v


def attention_ways(q, k, values, biases):
    """{name: function} of the attention of a block's layers."""
    def exp():
        E0 = nano_transevolve.exponentials(q, k)
        return [nano_transevolve.evolved_exp(E0, v, b) for v, b in zip(values, biases)]

    def kept():  # as the official code does
        A0 = nano_transevolve.initial_scores(q, k)
        return [(A0 + b[:, :, None]).softmax(-1).to(v.dtype) @ v for v, b in zip(values, biases)]

    return {"scores in every layer": lambda: [written_out(q, k, v, b) for v, b in zip(values, biases)], "scores once": kept,
            "exp": exp, "sdpa": lambda: [nano_transevolve.evolved_sdpa(q, k, v, b) for v, b in zip(values, biases)]}


TRANSEVOLVE = {"dense twin": dict(evolve="dense"), **{f"{6 // L} x {L}, {name}": dict(blocks=6 // L, evolve_impl=impl) for L in (3, 6)
               for name, impl in (("scores in every layer", "sdpa"), ("exp", "exp"), ("sdpa", "sdpa"))}}


def transevolve_step(name, T, tokens, device):
    """Forward and backward of a whole model: 6 layers, 2 heads of 64 (of 128 in queries and keys), vocabulary 65."""
    torch.manual_seed(0)
    model = nano_transevolve.GPT(nano_transevolve.Settings(n_head=2, n_embd=128, block_size=T, **TRANSEVOLVE[name])).to(device)
    idx = torch.randint(65, (max(1, tokens // T), T), device=device)

    def forward():
        kept = nano_transevolve.evolved_sdpa
        nano_transevolve.evolved_sdpa = written_out if "scores" in name else kept
        try:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                return model(idx, idx)[1]
        finally:
            nano_transevolve.evolved_sdpa = kept

    step = stepper(forward, list(model.parameters()), device)
    step.forward, step.inputs = forward, [*model.parameters(), *model.buffers()]
    return step


def transevolve(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"attention, 2 heads of 64 (of 128 in queries and keys), {args.tokens:,} tokens, forward and backward; {machine()}\n")
    rows = [["T", "layers", "attention", "time a layer", "vs scores in every layer", "vs sdpa"]]
    for T in args.T:
        B = max(1, args.tokens // T)
        for L in (3, 6):
            q, k = (torch.randn(B, 2, T, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            values = [torch.randn(B, 2, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(L)]
            biases = [torch.randn(B, 2, T, device=device, requires_grad=True) for _ in range(L)]
            ways = attention_ways(q, k, values, biases)
            first = ways["scores in every layer"]()
            for name, f in ways.items():  # what is compared computes the same
                for a, b in zip(f(), first):
                    torch.testing.assert_close(a, b, atol=3e-2 if device == "cuda" else 1e-4, rtol=1e-2)

            def step(f):
                for x in (q, k, *values, *biases):
                    x.grad = None
                sum((y * y).sum() for y in f()).backward()

            times = in_turns({name: (lambda f=f: step(f)) for name, f in ways.items()}, args.runs, device)
            for name, t in times.items():
                rows.append([f"{T}", L, name, f"{1000 * t / L:.1f} ms", f"{times['scores in every layer'] / t:.2f}x", f"{times['sdpa'] / t:.2f}x"])
    print(nano.table(rows))
    print(f"\ntraining step of a model, 6 layers, {args.tokens:,} tokens, forward and backward\n")
    rows = [["T", "model", "saved bytes", "peak bytes", "time", "vs scores in every layer", "vs dense twin"]]
    for T in args.T:
        steps = {name: transevolve_step(name, T, args.tokens, device) for name in TRANSEVOLVE}
        times = in_turns(steps, args.runs, device)
        for name, t in times.items():
            slow = times.get(f"{name.split(',')[0]}, scores in every layer")
            rows.append([f"{T}", name, kept_bytes(steps[name].forward, steps[name].inputs), peak_bytes("transevolve", name, T, args.tokens, device),
                         f"{1000 * t:.1f} ms", slow and f"{slow / t:.2f}x", f"{times['dense twin'] / t:.2f}x"])
        del steps
    print(nano.table(rows))


# jump

class Drawn:
    """Random tokens in the place of a corpus."""

    def __init__(self, V, T, tokens, device):
        self.idx = torch.randint(V, (max(1, tokens // T), T), device=device)

    def rows(self, split, starts):
        return self.idx[starts], None


def jump_step(name, T, tokens, device):
    """A fit of all maps of an untrained model to random tokens: "moments", as nano_jump.py does it; "stored states", by lstsq on the states of
    all tokens; or "forward", which only computes the states. float32 without TF32, as in the script."""
    size, way = name.split(", ")
    s = nano_jump.Settings(**{**nano_jump.SIZES[size], "block_size": T, "vocab_size": 50257 if size == "gpt2" else 65, "dropout": 0.0})
    torch.manual_seed(0)
    model, device = nano_jump.GPT(s).to(device).eval(), torch.device(device)
    run = nano_jump.Run(s, device, torch.float32, "", 0, 1, Drawn(s.vocab_size, T, tokens, device))

    @torch.no_grad()
    def step():
        inputs = (x for x, _ in nano_jump.batches(run, "train", np.arange(len(run.data.idx))))
        if way == "moments":
            return nano_jump.fit(nano_jump.moments(run, model, ((x, torch.ones_like(x, dtype=torch.bool)) for x in inputs)), s.n_embd)
        if way == "forward":
            return [model.states(x)[-1].sum() for x in inputs]
        states = [torch.cat(h) for h in zip(*([h.flatten(0, 1).double() for h in model.states(x)] for x in inputs))]
        return {(i, j): (A, torch.zeros(s.n_embd)) for i in range(s.n_layer)
                for j, A in enumerate(torch.linalg.lstsq(states[i], torch.cat(states[i + 1:], 1)).solution.split(s.n_embd, 1), i + 1)}

    return step


def jump(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [("char", 256, 1_000_000)] if device == "cuda" else [("tiny", 64, 200_000)]
    print(f"maps of all pairs of layers, random tokens; {machine()}\n")
    rows = [["model", "tokens", "fit", "time", "vs forward alone", "peak bytes beyond the model"]]
    for size, T, tokens in sizes:
        steps = {way: jump_step(f"{size}, {way}", T, tokens, device) for way in ("forward", "moments", "stored states")}
        a, b = (jump_step(f"{size}, {way}", T, 16 * T, device)() for way in ("moments", "stored states"))
        for pair in a:  # what is compared computes the same; layer 0 may have too few dimensions for one solution
            if pair[0]:
                torch.testing.assert_close(a[pair][0], b[pair][0].float(), atol=1e-4, rtol=1e-3)
        times = in_turns(steps, args.runs, device)
        for way, t in times.items():
            rows.append([size, f"{tokens:,}", way, f"{t:.2f} s", f"{t / times['forward']:.2f}x", peak_bytes("jump", f"{size}, {way}", T, tokens, device)])
    for tokens in (1024, 4096):
        rows.append(["gpt2", f"{tokens:,}", "moments", None, None, peak_bytes("jump", "gpt2, moments", 1024, tokens, device)])
    print(nano.table(rows))


STEPS = {"ssa": ssa_step, "reuse": reuse_step, "transevolve": transevolve_step, "jump": jump_step}


# base: the loop that nanoGPT's README and config/train_shakespeare_char.py describe, written plainly

class PlainAttention(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.H, self.qkv, self.out = H, nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.H, C // self.H).transpose(1, 2) for y in self.qkv(x).split(C, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C))


class PlainBlock(nn.Module):
    def __init__(self, C, H, gelu):
        super().__init__()
        self.attention, self.norm1, self.norm2 = PlainAttention(C, H), nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C, bias=False), nn.GELU(gelu), nn.Linear(4 * C, C, bias=False))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    def __init__(self, V, T, L, H, C, gelu):
        super().__init__()
        self.token, self.position = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks, self.norm = nn.ModuleList(PlainBlock(C, H, gelu) for _ in range(L)), nn.LayerNorm(C, bias=False)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.token.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if name.endswith(("out.weight", "mlp.2.weight")) else 0.02)

    def forward(self, x, y):
        h = self.token(x) + self.position(torch.arange(x.size(1), device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))


def plain_loop(train_ids, s, gelu="none"):
    """One training step of the recipe, as a function: AdamW (betas 0.9, 0.99; decay 0.1 on matrices), cosine from 1e-3 to
    1e-4 after 100 steps, gradient norm 1, batches cut from an array by the host, the loss read at every step. gelu: nanoGPT's is exact, GPT-2's is "tanh"."""
    device = s.device
    model = PlainGPT(s.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd, gelu).to(device)
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=device == "cuda")
    fast = torch.compile(model) if device == "cuda" else model
    if device == "cuda":  # compile before anything is timed
        ids = torch.zeros(s.batch_size, s.block_size, dtype=torch.long, device=device)
        with torch.autocast(device, torch.bfloat16):
            fast(ids, ids)[1].backward()
        optimizer.zero_grad(set_to_none=True)

    def step(i):
        done = (i - 100) / max(1, s.max_iters - 100)
        lr = 1e-3 * (i + 1) / 101 if i < 100 else 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(train_ids) - s.block_size, (s.batch_size,))
        x = torch.stack([torch.from_numpy(train_ids[j:j + s.block_size].astype(np.int64)) for j in starts]).to(device)
        y = torch.stack([torch.from_numpy(train_ids[j + 1:j + 1 + s.block_size].astype(np.int64)) for j in starts]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = fast(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return model, step


def our_loop(run, model):
    """One training step of the scripts, from their own parts."""
    s = run.settings
    optimizers = nano.make_optimizers(model, s, run.device)
    fast = nano.compiled(run, model, lambda step, turn: {}, (0, s.max_iters))

    def step(i):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * nano.lr_factor(s, i)
        x, y = run.data.batch(i, 0)
        torch.manual_seed(nano.key(s.seed, "dropout", i, 0))
        with run.autocast():
            loss = fast(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    return step


def run_of(**settings):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = nano.Settings(**{**dict(device=device, evolve="dense", dataset="shakespeare_char"), **settings})
    torch_device = nano.pick_device(device)
    run = nano.Run(s, torch_device, *nano.pick_dtype("auto", torch_device), 0, 1, nano.Data(s, torch_device))
    s.vocab_size = run.data.vocab_size
    return run


RECIPE = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, max_iters=2000)  # nanoGPT's for a CPU


def base(args):
    ids = lambda run: run.data.train.cpu().numpy().astype("<u2")
    print(machine())
    if not args.train:
        sizes = {"CPU recipe, 4 x 128, T 64": RECIPE, "tiny, 6 x 96, T 64": dict()}
        if torch.cuda.is_available():
            sizes = {"char, 6 x 384, T 256": dict(n_head=6, n_embd=384, block_size=256, batch_size=64)}
        rows = [["training step, AdamW", "plain loop", "plain, tanh GELU", "this project", "vs plain", "vs plain, tanh"]]
        for name, settings in sizes.items():
            run = run_of(**settings, optimizer="adamw", learning_rate=1e-3)
            torch.manual_seed(0)
            steps = {"plain": plain_loop(ids(run), run.settings)[1], "tanh": plain_loop(ids(run), run.settings, "tanh")[1],
                     "ours": our_loop(run, nano.GPT(run.settings).to(run.device))}
            times = in_turns({arm: (lambda step=step: step(500)) for arm, step in steps.items()}, args.runs * 10, run.device.type)
            rows.append([name, *(f"{1000 * t:.1f} ms" for t in times.values()), f"{times['plain'] / times['ours']:.2f}x",
                         f"{times['tanh'] / times['ours']:.2f}x"])
        print(nano.table(rows))
        return
    recipe, tiny = run_of(**RECIPE), run_of()
    torch.manual_seed(args.seed)
    tiny.settings.seed = tiny.data.seed = args.seed
    plain, plain_step = plain_loop(ids(recipe), recipe.settings)
    ours = nano.GPT(tiny.settings).to(tiny.device)
    our_step = our_loop(tiny, ours)
    seconds = {"recipe": 0.0, "tiny": 0.0}
    share, turns = {"recipe": 0, "tiny": 0}, 100
    for turn in range(turns):  # each arm does a hundredth of its steps, then it is the other's turn
        for name, run, step in (("recipe", recipe, plain_step), ("tiny", tiny, our_step)):
            start = time.perf_counter()
            while share[name] < (turn + 1) * run.settings.max_iters // turns:
                step(share[name])
                share[name] += 1
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - start
    rows = [["on the whole validation split", "steps", "training seconds", "ratio", "loss"]]
    for name, run, model in (("recipe", recipe, plain), ("tiny", tiny, ours)):
        rows.append([name, f"{share[name]}", f"{seconds[name]:.1f}", f"{seconds[name] / seconds['recipe']:.2f}",
                     f"{nano.evaluate(run, model):.4f}"])
    print(nano.table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for bench in (ssa, reuse, transevolve):
        p = commands.add_parser(bench.__name__)
        p.add_argument("--T", type=int, nargs="+", default=[64, 256, 512, 1024, 4096] if bench is transevolve else [256, 1024, 4096])
        p.add_argument("--tokens", type=int, default=4096)
        p.add_argument("--runs", type=int, default=7)
        p.set_defaults(run=bench)
    p = commands.add_parser("mom")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--runs", type=int, default=7)
    p.set_defaults(run=mom)
    p = commands.add_parser("jump")
    p.add_argument("--runs", type=int, default=5)
    p.set_defaults(run=jump)
    p = commands.add_parser("base")
    p.add_argument("--train", action="store_true")
    p.add_argument("--runs", type=int, default=7)
    p.add_argument("--seed", type=int, default=1337)
    p.set_defaults(run=base)
    p = commands.add_parser("peak")
    p.add_argument("bench"), p.add_argument("name"), p.add_argument("T", type=int), p.add_argument("tokens", type=int)
    p.set_defaults(run=lambda a: peak(a.bench, a.name, a.T, a.tokens))
    args = parser.parse_args()
    args.run(args)
