# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm"]
# ///
"""
TransEvolve: attention computed once in a block of layers, then evolved through depth, of
"Redesigning the Transformer Architecture with Insights from Multi-particle Dynamical Systems",
Dutta, Gautam, Chakrabarti and Chakraborty, NeurIPS 2021, https://arxiv.org/abs/2109.15142

Take tokens for particles. A layer is a step in time, in which they interact (attention) and drift
(feed-forward): dx_i/dt = F(x_i, [x_1 .. x_T], t) + G(x_i, t). TransEvolve computes F once for a
block of layers and lets it evolve with depth l: queries and keys are made of a token and the depth,
[x, T^l], where T^l is learned coefficients times sines and cosines of l. Multiplied out:

    S^l_ij  =  A0_ij  +  A1Q_i . T^l  +  A1K_j . T^l  +  A2 . (T^l * T^l)     P^l = softmax_j(S^l)
               tokens    query, depth    key, depth      depth, depth

The A are computed once in a block. But look at the indices: the second and the fourth term are the
same for all j, and cancel in the softmax. They do nothing, exactly; nor do their weights, which are
left out here. Evolution is one bias for each key and head, which raises or lowers how much the key
is looked at, by all queries alike, and cannot pair them anew:

    P^l = softmax_j(A0_ij + b^l_j)                  b^l_j = K_j . (W T^l)

    x --> Q, K --> A0 ---------+---------------------------+            a block of two layers, whose
    |        K --> b^0, b^1 ---+---------------------------+            values are the normed stream
    +-> x + softmax(A0 + b^0) LN(x) W_O --> + FF --> x + softmax(A0 + b^1) LN(x) W_O --> + FF --> LN

FF is an MLP (--ffn full), or fixed random matrices that depend on l, with learned scales (random).

    python nano_transevolve.py --compare        # a decoder, its dense twin, the same without biases
    python nano_transevolve.py --task encdec    # an encoder reads T tokens, a decoder the next T
    python nano_transevolve.py --task listops   # an encoder computes [MAX 2 9 [MIN 4 7 ] 0 ]

At --size tiny, nats per character, 5 and 3 seeds; compare in a row (tests/results/transevolve.md):
                         evolved    without b    dense twin    evolved, one decoder reads all
    decoder                1.593        1.599         1.595
    encoder-decoder        1.723        1.727         1.762                             1.687

As in the authors' code (github.com/LCS2-IIITD/TransEvolve; the paper's own equations were not at
hand): Q and K have 2 n_embd channels and no norm of their own. A0 takes those of a head, and is
divided by sqrt(2 n_embd / n_head); b takes all and is not. A decoder's block has a second A0 and b:
its input asks, the encoder's output makes keys and values. Ours: the decoder alone; T5's prefix
language modelling for encdec; ListOps, whose tokens' mean the tied head reads; GPT-2's MLP.
"""
import argparse
import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ---- The technique: scores once in a block of layers, in each layer a bias for every key ---------
def time_signal(l, C):
    """s^l = [sin(p l pi/64)]_p ++ [cos(p l pi/64)]_p, p = 0 .. C/2 - 1: a layer's depth, (C,)."""
    angle = l * math.pi / 64 * torch.arange(C // 2, dtype=torch.float64)
    return torch.cat([angle.sin(), angle.cos()]).float()


def initial_scores(q, k, causal, real=None):
    """A0 = q k^T / sqrt(D): queries (B, H, T, D), keys (B, H, S, D) -> (B, H, T, S).

    A query must not look at later tokens, if causal, nor at padding, where real (B, S) is False."""
    A0 = q @ k.mT / math.sqrt(q.size(-1))
    lowest = torch.finfo(A0.dtype).min  # finite: where all is padding, softmax is no 0/0
    if causal:
        future = torch.ones(A0.shape[-2:], dtype=torch.bool, device=A0.device).triu(1)
        A0 = A0.masked_fill(future, lowest)
    if real is not None:
        A0 = A0.masked_fill(~real[:, None, None], lowest)
    return A0


def key_bias(k, W, depth, n_head):
    """b^l_nj = K_j . (W_n T^l_n) in the L layers of a block: all that evolution comes to.

    k: keys, those of all heads side by side (B, S, 2C); W: W_Q^t (2C, C); depth: T^l (L, C). Head n
    has the n-th of H parts of the columns of W and T^l, sines or cosines. -> (L, B, H, 1, S)."""
    u = (W * depth[:, None]).unflatten(-1, (n_head, -1)).sum(-1)                   # (L, 2C, H)
    return torch.einsum("bja,lan->lbnj", k, u)[:, :, :, None]


def evolved_attention(A0, b, v):
    """A layer's P^l v, P^l = softmax_j(A0_ij + b^l_j). No query meets a key here.

    A0, of the block: (B, H, T, S); the layer's bias b (B, H, 1, S) and values v (B, H, S, D)."""
    return (A0 + b).softmax(-1) @ v                                                # (B, H, T, D)


def heads(x, n_head):  # (B, T, H D) -> (B, H, T, D)
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


class Interaction(nn.Module):
    """A block's attention. Once: the scores that its L layers share, and the biases by which they
    evolve, in float32, as both go into an exponent. Of each layer only a norm, whose output is the
    values, and W_O. The scores and each layer's maps, (B, H, T, S), stay in memory for training."""

    def __init__(self, config, causal):
        super().__init__()
        C, L = config.n_embd, config.n_layer // config.blocks
        self.n_head, self.causal, self.evolve = config.n_head, causal, config.evolve
        self.c_q = nn.Linear(C, 2 * C, bias=False)                                 # W_Q^x
        self.c_k = nn.Linear(C, 2 * C, bias=False)                                 # W_K^x
        if self.evolve:
            self.c_t = nn.Linear(C, 2 * C, bias=False)                             # W_Q^t
            c = (torch.empty(C).uniform_(-1, 1) * math.sqrt(6 / C) for _ in range(L))
            self.c = nn.ParameterList(c)                                           # c^l, (C,) each
        signal = torch.stack([time_signal(l, C) for l in range(L)])                # s^l
        self.register_buffer("signal", signal, persistent=False)
        self.ln = nn.ModuleList(nn.LayerNorm(C, bias=False) for _ in range(L))
        self.c_proj = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(L))  # W_O
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, source, real=None):
        """Queries x (B, T, C) and keys source (B, S, C) -> A0 (B, H, T, S), b (L, B, H, 1, S)."""
        with torch.autocast(x.device.type, enabled=False):
            q, k = self.drop(self.c_q(x)), self.drop(self.c_k(source))             # (B, T or S, 2C)
            A0 = initial_scores(heads(q, self.n_head), heads(k, self.n_head), self.causal, real)
            if not self.evolve:
                return A0, A0.new_zeros(len(self.ln), 1, 1, 1, 1)
            depth = torch.stack(list(self.c)) * self.signal                        # T^l = c^l s^l
            return A0, key_bias(k, self.c_t.weight, depth, self.n_head)

    def layer(self, l, x, A0, b):
        """What the block's layer l adds, (B, T, C); x: what its values are made of, (B, S, C)."""
        y = evolved_attention(A0, b[l], heads(self.ln[l](x), self.n_head))
        return self.drop(self.c_proj[l](y.transpose(1, 2).flatten(2)))


class RandomFF(nn.Module):
    """randomFF: maps m -> k, from C to 4C and back, of fixed matrices and r = C learned scales s.

        h -> h U diag(s) V + bias      U = [sin(l pi p G) | cos(l pi p G)] / sqrt(k), r columns of m
        p = 0, 1, .., G's columns      V = [sin(l pi p G) | cos(l pi p G)] / sqrt(k), r rows of k

    G ~ N(0, 1) is drawn with the weights. The second U is all sines: where l = 0 that map is 0."""

    def __init__(self, config, l):
        super().__init__()
        C = config.n_embd

        def rotation(n, k):  # (n, n); in float64, since angles reach thousands
            G = torch.randn(n, n // 2, dtype=torch.float64)
            angle = G * torch.arange(n // 2) * l * math.pi
            return (torch.cat([angle.sin(), angle.cos()], 1) / math.sqrt(k)).float()

        self.register_buffer("U_1", rotation(C, 4 * C))                            # (C, C)
        self.register_buffer("V_1", rotation(4 * C, 4 * C)[:C].clone())            # (C, 4C)
        self.register_buffer("U_2", rotation(4 * C, C)[:, :C].clone())             # (4C, C)
        self.register_buffer("V_2", rotation(C, C))                                # (C, C)
        s = (torch.empty(C).uniform_(-1, 1) * math.sqrt(6 / C) for _ in range(2))
        self.s_1, self.s_2 = map(nn.Parameter, s)                                  # (C,) each
        self.bias_1, self.bias_2 = (nn.Parameter(torch.zeros(n)) for n in (4 * C, C))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = (x @ self.U_1 * self.s_1 @ self.V_1 + self.bias_1).relu()              # (B, T, 4C)
        return self.drop(x @ self.U_2 * self.s_2 @ self.V_2 + self.bias_2)         # (B, T, C)


class EvolvedBlock(nn.Module):
    """L layers with one interaction; in a decoder with a second one, with the encoder's output."""

    def __init__(self, config, causal, cross, last):
        super().__init__()
        C, L = config.n_embd, config.n_layer // config.blocks
        self.attn = Interaction(config, causal)
        if cross:
            self.cross = Interaction(config, causal=False)
        self.ln_2 = nn.ModuleList(nn.LayerNorm(C, bias=False) for _ in range(L))
        random = config.ffn == "random"
        self.ffn = nn.ModuleList(RandomFF(config, l) if random else MLP(config) for l in range(L))
        self.ln = nn.Identity() if last else nn.LayerNorm(C, bias=False)  # last: ln_f follows

    def forward(self, x, real=None, memory=None):
        """x, and memory, the encoder's output: (B, T, C). real (B, T): False where x is padding."""
        A0, b = self.attn(x, x, real)
        if memory is not None:
            A0_cross, b_cross = self.cross(x, memory)
        for l, ffn in enumerate(self.ffn):
            x = x + self.attn.layer(l, x, A0, b)
            if memory is not None:
                x = x + self.cross.layer(l, memory, A0_cross, b_cross)
            x = x + ffn(self.ln_2[l](x))
        return self.ln(x)


# ---- The model: such blocks, or GPT-2's, in a decoder, an encoder, or both -----------------------
class Attention(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, causal
        C = config.n_embd  # q, k, v apart, one matrix in GPT-2: Muon's steps are of whole matrices
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x, source, real=None):
        qkv = self.c_q(x), self.c_k(source), self.c_v(source)                      # (B, T or S, C)
        q, k, v = (heads(y, self.n_head) for y in qkv)                             # (B, H, ., D)
        dropout = self.dropout if self.training else 0.0
        real = None if real is None else real[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, real, dropout, is_causal=self.causal)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), dropout)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x))))  # GPT-2: with tanh


class Block(nn.Module):
    def __init__(self, config, causal, cross):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config, causal)
        if cross:
            self.ln_cross = nn.LayerNorm(config.n_embd, bias=False)
            self.cross = Attention(config, causal=False)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x, real=None, memory=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, real)
        if memory is not None:
            x = x + self.cross(self.ln_cross(x), memory)
        return x + self.mlp(self.ln_2(x))


def stack(config, causal, cross=False):
    """The layers of an encoder or a decoder."""
    if config.blocks == 0:  # the dense twin
        return nn.ModuleList(Block(config, causal, cross) for _ in range(config.n_layer))
    last = config.blocks - 1
    return nn.ModuleList(EvolvedBlock(config, causal, cross, n == last) for n in range(last + 1))


def context(config):
    """Ids in a row of inputs. An encoder reads T, a decoder the last of them and T - 1 more."""
    return 2 * config.block_size - 1 if config.task in ("encdec", "prefix") else config.block_size


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.task, self.T = config.task, config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(context(config), config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        if config.task == "encdec":
            self.encoder = stack(config, causal=False)
            self.ln_encoder = nn.LayerNorm(config.n_embd, bias=False)
        self.h = stack(config, causal=config.task != "listops", cross=config.task == "encdec")
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.scale = math.sqrt(config.n_embd) if config.blocks else 1.0  # A0 sees no norm
        for name, p in self.named_parameters():
            if "c_proj." in name:  # these write to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None):
        """Token ids (B, S) -> logits (B, T, vocab) and, with targets, the mean loss in nats.

        lm: S = T. encdec: S = 2T - 1, the encoder reads T, and the logits are the decoder's, of the
        next T. prefix: a decoder reads all, for the same logits. listops: one, of the value."""
        x = self.drop(self.wte(idx) + self.wpe.weight[:idx.size(1)]) * self.scale
        real = idx != 0 if self.task == "listops" else None
        memory = None
        if self.task == "encdec":  # the decoder goes on from the last token that the encoder reads
            memory, x = x[:, :self.T], x[:, self.T - 1:]
            for block in self.encoder:
                memory = block(memory)
            memory = self.ln_encoder(memory)
        for block in self.h:
            x = block(x, real, memory)
        x = self.ln_f(x)
        if self.task == "prefix":
            x = x[:, self.T - 1:]
        if self.task == "listops":  # the mean of all tokens, padding left out
            x = (x * real[..., None]).sum(1, True) / real.sum(1).clamp(min=1)[:, None, None]
        logits = F.linear(x, self.wte.weight)  # the embedding is also the output head
        if targets is None:
            return logits, None
        targets = targets[:, -logits.size(1):].flatten()
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0):
        """Go on from token ids (B, T) with n more, sampled one after the other."""
        for _ in range(n):
            logits, _ = self(idx[:, -self.wpe.num_embeddings:])
            p = (logits[:, -1].float() / max(temperature, 1e-5)).softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        return idx


# ---- Configuration: one flag a field -------------------------------------------------------------
SCRIPT = Path(__file__).stem  # a copy under another name is a script of its own
SIZES = ("tiny", "char", "gpt2")


def flag(default, help, choices=None, least=0, most=math.inf, free=False):
    """A field of Config; a tuple has a default for each size. free: a resumed run may change it."""
    sizes = dict(zip(SIZES, default if isinstance(default, tuple) else [default]))
    return field(default=sizes["tiny"], metadata=dict(help=help, choices=choices, least=least,
                                                      most=most, free=free, sizes=sizes))


@dataclass
class Config:
    # the technique
    task: str = flag("lm", "or encdec, prefix, listops",
                     ("lm", "encdec", "prefix", "listops"))
    blocks: int = flag(2, "that share scores; 0: dense twin")
    evolve: bool = flag(True, "maps evolve from layer to layer")
    ffn: str = flag("full", "learned matrices; random: fixed ones", ("full", "random"))
    # the run
    size: str = flag("auto", "auto: tiny on a CPU, else char", ("auto", *SIZES))
    dataset: str = flag("auto", "a folder, or one of those in data/", free=True)
    out_dir: str = flag("", "of the run; by default a new one", free=True)
    seed: int = flag(1337, "of weights, order of the data, draws")
    resume: bool = flag(False, "go on with the latest run, or --out_dir", free=True)
    eval_only: bool = flag(False, "only evaluate that run", free=True)
    compare: bool = flag(False, "train the dense twin as well", free=True)
    device: str = flag("auto", "cuda, cuda:1, mps, cpu", free=True)
    dtype: str = flag("auto", "float32, bfloat16, float16",
                      ("auto", "float32", "bfloat16", "float16"), free=True)
    compile: str = flag("auto", "on, off; auto: on CUDA", ("auto", "on", "off"), free=True)
    # the model
    n_layer: int = flag((6, 6, 12), "transformer blocks", least=1)
    n_head: int = flag((2, 6, 12), "attention heads", least=1)
    n_embd: int = flag((64, 384, 768), "width of the residual stream", least=1)
    block_size: int = flag((64, 256, 1024), "context length T, in tokens", least=1)
    dropout: float = flag((0.0, 0.2, 0.0), "dropout rate", most=1)
    # training: tuned at tiny, unmeasured at char
    batch_size: int = flag((32, 64, 16), "sequences in a micro-step", least=1)
    grad_accum: int = flag((1, 1, 32), "micro-steps in a step, of all processes", least=1)
    max_iters: int = flag((1150, 5000, 20000), "training steps", least=1)
    learning_rate: float = flag((1.5e-2, 3e-3, 1e-3), "AdamW's peak: embeddings, vectors")
    muon_lr: float = flag((0.03, 0.02, 0.02), "Muon's peak: all other matrices")
    momentum: float = flag((0.9, 0.95, 0.95), "Muon's", most=1)
    warmup_iters: int = flag((10, 100, 500), "steps up to the peak, then down to 0")
    weight_decay: float = flag(0.1, "decoupled, of matrices only")
    grad_clip: float = flag(1.0, "largest gradient norm (0: no limit)")
    eval_interval: int = flag((600, 250, 500), "steps between evaluations", least=1)
    eval_tokens: int = flag(2**17, "tokens to evaluate on, at most", least=8)
    # the sample at the end
    prompt: str = flag("", "text that it goes on from", free=True)
    sample_tokens: int = flag(256, "its length", free=True)
    temperature: float = flag(0.8, "0 takes the likeliest token", free=True)
    vocab_size: int = 0  # no flag: the data decide


def parse_args(argv=None):
    """The configuration, and results.json of the run that goes on: it keeps what is not free."""
    flags = {f.name: f for f in fields(Config) if f.metadata}
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")
    parser.format_help = lambda: help_text(flags)
    for name, f in flags.items():
        if f.type is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(f"--{name}", type=f.type, choices=f.metadata["choices"])
    given, earlier = vars(parser.parse_args(argv)), {}
    size = given.get("size", "auto")
    if size == "auto":
        size = "tiny" if pick_device(given.get("device", "auto")).type == "cpu" else "char"
    settings = {name: f.metadata["sizes"].get(size, f.default) for name, f in flags.items()}
    settings["size"] = size
    if given.get("task") in ("encdec", "prefix"):  # longer windows, two stacks: fewer of them
        settings["batch_size"] //= 2
        settings["max_iters"] = settings["max_iters"] * 2 // 3
    if given.get("resume") or given.get("eval_only"):
        runs = Path("out", SCRIPT).glob("*/results.json")
        path = max(runs, key=os.path.getmtime, default=Path("out", SCRIPT, "results.json"))
        if "out_dir" in given:
            path = Path(given["out_dir"], "results.json")
        earlier = json.loads(path.read_text()) if path.exists() else {}
        if earlier.get("script") != SCRIPT:
            sys.exit(f"error: there is no run of {SCRIPT}.py in {path.parent}")
        settings.update((name, value) for name, value in earlier["config"].items() if name in flags)
        settings.update(out_dir=str(path.parent), resume=False, eval_only=False)
        fixed = [name for name in given if not flags[name].metadata["free"]]
        print(f"going on with {path.parent}", *(f"(its own --{name})" for name in fixed))
        given = {name: value for name, value in given.items() if name not in fixed}
    config = Config(**{**settings, **given, "size": settings["size"]})

    for name, f in flags.items():
        value, least, most = getattr(config, name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not least <= value <= most:
            sys.exit(f"error: --{name} {value} must be a number from {least} to {most}")
    if config.n_embd % config.n_head:
        sys.exit(f"error: --n_embd {config.n_embd} is not divisible by --n_head {config.n_head}")
    if config.blocks and config.n_layer % config.blocks:
        sys.exit(f"error: --n_layer {config.n_layer} is not divisible by --blocks {config.blocks}")
    if config.task == "listops":
        config.block_size, config.dataset = 32, "listops"
    return config, earlier


def help_text(flags):
    rows = {}
    for name, f in flags.items():
        sizes = {size: str(f.metadata["sizes"].get(size, f.default)) for size in SIZES}
        rows[f"--{name}"] = {**sizes, "": f.metadata["help"]}
    return f"{SCRIPT}.py [--flag value | --flag=value | --flag | --no-flag] ...\n{table(rows)}\n"


def table(rows):
    """Aligned lines of {row: {column: text or number}}; a row may lack columns."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    lines = [["", *columns]]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    lines = [[f"{x:.4f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def pick_device(name):
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if name == "cuda":  # under torchrun every process has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"error: --device {name}: {str(e).splitlines()[0]}")


def pick_dtype(name, device):
    """The dtype of matrix products, and the reason for it."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda":
        return torch.float32, f"the default on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "native on this GPU"
    return torch.float16, "this GPU only emulates bfloat16"


# ---- Data ----------------------------------------------------------------------------------------
def key(*parts):
    """A seed of the run's seed, what it is for, and when. So no generator has a state to resume."""
    return random.Random(repr(parts)).getrandbits(63)


def find_data(config):
    """The folder of a corpus; data/prepare.py makes it where it is absent."""
    data, names = Path(__file__).resolve().parent / "data", [config.dataset]
    if config.dataset == "auto":  # without a network, the source of Python's standard library
        names = ["openwebtext"] if config.size == "gpt2" else ["shakespeare_char", "stdlib"]
    for name in names:
        for folder in (data / name, Path(name)):
            if (folder / "train.bin").exists():
                return folder
        if "RANK" in os.environ:  # under torchrun the other processes would wait, perhaps for hours
            sys.exit(f"error: first python data/prepare.py {name}, then torchrun")
        if subprocess.call([sys.executable, data / "prepare.py", name]) == 0:
            return data / name
    sys.exit(f"error: --dataset {config.dataset} could not be prepared, see above")


class Data:
    """Token ids of a corpus, which stay on disk."""

    def __init__(self, config, device):
        self.folder, self.device, self.T = find_data(config), device, config.block_size
        self.meta = dict(tokenizer="gpt2", vocab_size=50257, source="no meta.json: GPT-2's tokens?")
        if (self.folder / "meta.json").exists():
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        elif (self.folder / "meta.pkl").exists():
            sys.exit(f"error: {self.folder}/meta.pkl is not read: data/prepare.py --text FILE")
        self.ids = {split: self.load(split) for split in ("train", "val")}
        if self.meta["tokenizer"] == "char":
            alphabet = self.meta["alphabet"]
            if unknown := set(config.prompt) - set(alphabet):
                sys.exit(f"error: --prompt has {unknown}, but the alphabet is {alphabet!r}")
            self.encode = lambda text: [alphabet.index(c) for c in text]
            self.decode = lambda ids: "".join(alphabet[i] for i in ids)
        else:
            try:
                bpe = tiktoken.get_encoding(self.meta["tokenizer"])
            except (OSError, ValueError):
                sys.exit(f"error: no {self.meta['tokenizer']} for tiktoken: go online once, or let "
                         "TIKTOKEN_CACHE_DIR name a folder that holds it")
            self.encode = lambda text: bpe.encode(text, allowed_special="all")
            # a vocabulary may be padded: ids beyond the tokenizer's have no text
            self.decode = lambda ids: bpe.decode([i for i in ids if i < bpe.n_vocab])

    def load(self, split):
        path, vocab = self.folder / f"{split}.bin", self.meta["vocab_size"]
        size = path.stat().st_size if path.exists() else 0
        if size <= 2 * self.T:
            sys.exit(f"error: {path} has {size // 2} tokens, too few for --block_size {self.T}")
        ids = np.memmap(path, dtype="<u2", mode="r", shape=size // 2)
        seen = ids[:2**27]
        halves = 2 if seen[::2].any() and not seen[1::2].any() else 1  # of 32-bit ids
        count = self.meta.setdefault(f"{split}_tokens", len(ids) // halves)
        if size != 2 * count or seen.max() >= vocab:
            sys.exit(f"error: {path}: no {count:,} uint16 ids below {vocab:,}; see data/prepare.py")
        return ids

    def put(self, x):
        x = torch.as_tensor(x)
        if self.device.type == "cuda":  # through pinned memory, so that nothing waits for the copy
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def rows(self, split, starts):
        """Inputs and targets, (len(starts), T) each, at these offsets of a split."""
        at = starts[:, None] + np.arange(self.T + 1)
        rows = self.put(self.ids[split][at].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def order(self, config):
        """Offsets of all sequences of the training, (max_iters, grad_accum, batch_size). An epoch
        goes through the text once, but for its end, in windows that are shuffled, and cut anew."""
        T, tokens = self.T, len(self.ids["train"])
        shape = config.max_iters, config.grad_accum, config.batch_size
        n = max(1, tokens // T - 1)  # windows in an epoch
        epochs = []
        for epoch in range(math.ceil(math.prod(shape) / n)):
            rng = np.random.default_rng(key(config.seed, "epoch", epoch))
            epochs.append(rng.permutation(n) * T + rng.integers(min(T, tokens - n * T)))
        return np.concatenate(epochs)[:math.prod(shape)].reshape(shape)

    def windows(self, split, tokens):
        """Offsets of disjoint windows, of a split or its first tokens, at most 2^27 logits."""
        starts = np.arange(0, len(self.ids[split]) - self.T, self.T)[:math.ceil(tokens / self.T)]
        at_a_time = max(1, min(2**13, 2**27 // self.meta["vocab_size"]) // self.T)
        return np.split(starts, range(at_a_time, len(starts), at_a_time))


class Expressions(Data):
    """Of data/prepare.py listops, in place of text: rows of 33 numbers, a value and 32 tokens."""

    def rows(self, split, starts):
        """Expressions (len(starts), 32) and values (len(starts), 1) of the rows at the offsets."""
        row, _ = super().rows(split, starts - starts % self.T)
        return row[:, 1:], row[:, :1] + 1  # the digit v is token v + 1, and 0 is padding


# ---- Training ------------------------------------------------------------------------------------
class Run:
    """This process with its device and data; under torchrun it joins the others."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.grad_accum % self.world:
            sys.exit(f"error: {self.world} processes cannot share --grad_accum {config.grad_accum}")
        self.device = pick_device(config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
        self.dtype, self.why = pick_dtype(config.dtype, self.device)
        self.data = Data(config, self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@torch.no_grad()
def evaluate(config, run, model, split="val"):
    """Mean loss in nats over fixed windows, without dropout."""
    chunks = run.data.windows(split, config.eval_tokens)
    total = 0.0
    model.eval()
    for starts in chunks:
        x, y = run.data.rows(split, starts)
        with run.autocast():
            total += model(x, y)[1].item() * len(x)
    model.train()
    return total / sum(map(len, chunks))


def get_lr(config, step, peak):
    """Linear warm-up, over a tenth of the steps at most, then linear down to 0."""
    warmup = min(config.warmup_iters, config.max_iters // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (config.max_iters - step) / (config.max_iters - warmup)


def train(config, run, folder, model):
    """Train, or go on from folder/ckpt.pt, which holds all that this takes."""
    adamw, muon = configure_optimizers(model, config)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    parts = dict(model=model, adamw=adamw, muon=muon, scaler=scaler)
    first, log = 0, []
    if (folder / "ckpt.pt").exists():
        saved = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
        first, log = saved["step"], saved["log"]
        for name, part in parts.items():
            if saved[name]:  # a float32 run has an empty scaler
                part.load_state_dict(saved.pop(name))
    compiled = config.compile == "on" or (config.compile == "auto" and run.device.type == "cuda")
    net = torch.compile(model) if compiled else model
    if run.world > 1:
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    bar = tqdm(total=config.max_iters, initial=first, mininterval=1, disable=run.rank > 0)
    order = run.data.order(config)
    since, clock = first, time.perf_counter()   # the last evaluation
    total = torch.zeros((), device=run.device)  # of the losses since then

    for step in range(first, config.max_iters):
        for optimizer, peak in ((adamw, config.learning_rate), (muon, config.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = get_lr(config, step, peak)
        for micro_step in range(run.rank, config.grad_accum, run.world):
            x, y = run.data.rows("train", order[step, micro_step])
            torch.manual_seed(key(config.seed, "dropout", step, micro_step))
            if run.world > 1:  # processes average their gradients after their last micro-step
                net.require_backward_grad_sync = micro_step + run.world >= config.grad_accum
            with run.autocast():
                loss = net(x, y)[1] / config.grad_accum
            scaler.scale(loss * run.world).backward()
            total += loss.detach()

        scaler.unscale_(adamw)
        scaler.unscale_(muon)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        # float16 may overflow; then neither may step. To see that, the loop waits for the device
        if run.dtype != torch.float16 or norm.isfinite():
            scaler.step(adamw)
            scaler.step(muon)
        scaler.update()
        model.zero_grad(set_to_none=True)

        done = step + 1
        if bar.update():  # drawn, at most once a second: here the loop waits for the device as well
            bar.set_postfix_str(f"loss {run.world * total.item() / (done - since):.3f}", False)
        if done % config.eval_interval and done < config.max_iters:
            continue
        if run.world > 1:
            dist.all_reduce(total)
        train_loss = total.item() / (done - since)
        speed = (done - since) * order[0].size * run.data.T / (time.perf_counter() - clock)
        val_loss = evaluate(config, run, model)
        if not math.isfinite(val_loss):
            sys.exit(f"error: loss {val_loss} after step {done}: lower the learning rates")
        log.append(dict(step=done, train_loss=train_loss, val_loss=val_loss, grad_norm=norm.item(),
                        learning_rate=adamw.param_groups[0]["lr"], tokens_per_second=round(speed)))
        if run.rank == 0:
            bar.write(f"{folder.name} {done}: loss {train_loss:.4f}, validation {val_loss:.4f}")
            write(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
            state = {name: part.state_dict() for name, part in parts.items()}
            if val_loss == min(line["val_loss"] for line in log):
                write(folder / "best.pt", dict(config=asdict(config), model=state["model"]))
            write(folder / "ckpt.pt", dict(step=done, log=log, config=asdict(config), **state))
        since, clock = done, time.perf_counter()
        total.zero_()
    bar.close()
    val_losses = [line["val_loss"] for line in log]
    quarter = replace(config, eval_tokens=config.eval_tokens // 4)
    return dict(val_loss=val_losses[-1], best_val_loss=min(val_losses), log=log,
                train_loss=evaluate(quarter, run, model, "train"),
                tokens_per_second=int(np.median([line["tokens_per_second"] for line in log])),
                parameters=sum(p.numel() for p in model.parameters()))


def configure_optimizers(model, config):
    """AdamW for embeddings and vectors, Muon for every other matrix."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p not in {*embeddings, *vectors}]
    groups = [dict(params=embeddings, weight_decay=config.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    return adamw, Muon(matrices, config.muon_lr, config.weight_decay, config.momentum)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: a matrix learns in the directions of small gradients,
    too (https://kellerjordan.github.io/posts/muon). torch.optim.Muon goes matrix by matrix, in
    bfloat16, which many CPUs emulate; this takes all of a shape at once."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        groups = [dict(params=matrices) for matrices in shapes.values()]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, state = group["params"], self.state[group["params"][0]]
            G = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in matrices])
            if not state:
                state["average"] = torch.zeros_like(G)
            state["average"].lerp_(G, 1 - group["momentum"])
            update = orthogonal(G.lerp(state["average"], group["momentum"]))
            update *= math.sqrt(max(1, G.size(1) / G.size(2)))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-group["lr"])


def orthogonal(G):
    """(n, rows, columns): about U V^T of each matrix's U S V^T, by five Newton-Schulz steps."""
    X = G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    X = X.to(pick_dtype("auto", G.device)[0])
    if G.size(-2) > G.size(-1):
        X = X.mT
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)  # -4.775 A + 2.0315 A A
        X = torch.baddbmm(X, B, X, beta=3.4445)                # 3.4445 X + B X
    return (X.mT if G.size(-2) > G.size(-1) else X).to(G.dtype)


def write(path, content):
    """Whenever this is killed, path holds a whole file, the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as e:  # the latter is torch.save's word for a full disk
        sys.exit(f"error: {path} cannot be written ({e}): make room, then add --resume")
    os.replace(temporary, path)


# ---- Evaluation ----------------------------------------------------------------------------------
@torch.no_grad()
def measure(config, run, model):
    """The loss without b, and without the encoder's output; and how much a layer's maps differ from
    those of the layer below, 1/2 sum_j |P_ij - P'_ij|, from 0 to 1."""
    rows, seen = {}, {}
    for part, title in ((".c.", "b set to 0"), ("ln_encoder", "encoder's output set to 0")):
        other = copy.deepcopy(model)
        weights = [p for name, p in other.named_parameters() if part in name]
        if weights:
            torch._foreach_zero_(weights)
            rows[title] = {"loss": evaluate(config, run, other)}
    other = copy.deepcopy(model)
    for name, module in other.named_modules():
        if isinstance(module, Interaction):
            module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    starts = np.concatenate(run.data.windows("val", config.eval_tokens))
    if config.task != "listops":
        starts = starts[:max(1, 2**18 // config.block_size**2)]
    x, y = run.data.rows("val", starts)
    logits, _ = other(x)
    if config.task == "listops":
        rows["all expressions"] = {"accuracy": (logits.argmax(-1) == y).float().mean().item()}
    for name, (A0, b) in seen.items():
        change = (A0 + b).softmax(-1).diff(dim=0).abs().sum(-1).mean((1, 2, 3)) / 2  # (L - 1,)
        rows[f"maps of {name}"] = {f"layer {l}": x for l, x in enumerate(change.tolist(), 1)}
    return rows


def sample(config, run, model):
    """Text, after ==> where an encoder reads some; of ListOps expressions, values and answers."""
    torch.manual_seed(key(config.seed, "sample"))
    if config.task == "listops":
        x, y = run.data.rows("val", np.arange(5) * run.data.T)
        rows = torch.cat([x, y, model(x)[0].argmax(-1)], 1).tolist()
        return "\n".join(run.data.decode(row) for row in rows)
    prompt, mark = run.data.encode(config.prompt) or run.data.ids["train"][:1].tolist(), ""
    if config.task != "lm":  # before the prompt text of the split, so that T tokens are read
        before = run.data.ids["val"][:config.block_size].tolist()
        prompt, mark = (before + prompt)[-config.block_size:], " ==> "
    idx = torch.tensor([prompt], device=run.device)
    idx = model.generate(idx, config.sample_tokens, config.temperature)[0].tolist()
    return run.data.decode(prompt) + mark + run.data.decode(idx[len(prompt):])


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    config, earlier = parse_args(argv)
    run = Run(replace(config, block_size=context(config)))
    if config.task == "listops":
        run.data = Expressions(replace(config, block_size=33), run.device)
    data = run.data.meta
    config.vocab_size = data["vocab_size"]
    if earlier and {**earlier["data"], "source": ""} != {**data, "source": ""}:
        sys.exit(f"error: {run.data.folder} has other data than the run began with: see --dataset")
    out = [config.out_dir or time.strftime(f"out/{SCRIPT}/%m%d-%H%M%S")]
    if run.world > 1:  # clocks differ: all take the name of rank 0
        dist.broadcast_object_list(out)
    config.out_dir, out = out[0], Path(out[0])
    results = dict(script=SCRIPT, torch=torch.__version__, device=str(run.device), data=data,
                   config=asdict(replace(config, resume=False)), arms=earlier.get("arms", {}))
    if config.eval_only:  # on another device, perhaps
        results["config"] = earlier["config"]
    if run.rank == 0:
        if out.exists() and not earlier:
            sys.exit(f"error: {out} exists, and no run writes over another: name a new --out_dir")
        write(out / "results.json", json.dumps(results, indent=1))
        print(f"{out}: {data['train_tokens']:,} tokens, {run.data.folder} ({data.get('source')})\n"
              f"on {run.world} x {run.device}, {run.dtype} ({run.why})")

    configs = dict(technique=config)
    if config.compare and config.blocks:
        configs["dense"] = replace(config, blocks=0)
        configs["without b"] = replace(config, evolve=False)
    if config.compare and config.task == "encdec":  # one decoder, which reads all 2T - 1
        configs["prefix"] = replace(config, task="prefix")
    for arm, arm_config in configs.items():
        torch.manual_seed(key(config.seed, "weights"))
        model = GPT(arm_config).to(run.device)
        result = results["arms"].setdefault(arm, {})
        if not config.eval_only:
            result.update(train(arm_config, run, out / arm, model))
        if run.rank == 0 and (out / arm / "best.pt").exists():
            best = torch.load(out / arm / "best.pt", map_location="cpu", weights_only=True)
            model.load_state_dict(best["model"])
            model.eval()
            result["evaluation"] = measure(arm_config, run, model)
            result["sample"] = sample(arm_config, run, model)
            write(out / "results.json", json.dumps(results, indent=1))
    if run.rank == 0:
        technique = results["arms"]["technique"]
        if "sample" not in technique:
            sys.exit(f"error: there is no checkpoint in {out} yet: add --resume")
        rows = {name: {arm: result.get(name, "") for arm, result in results["arms"].items()}
                for name, x in technique.items() if isinstance(x, (int, float))}
        print(f"\n{table(rows)}\n\n{table(technique['evaluation'])}\n\n{technique['sample']}")
    if run.world > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a console that cannot show the text
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; --resume, with the same --out_dir, goes on from the last evaluation")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: use a smaller --batch_size, with more --grad_accum")
    except torch._dynamo.exc.TorchDynamoException as e:
        sys.exit(f"error: torch.compile failed ({str(e).splitlines()[0]}): use --compile off")
