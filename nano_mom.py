# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm"]
# ///
"""
Mixture-of-Modules (MoM), of "Mixture-of-Modules: Reinventing Transformers as Dynamic Assemblies of
Modules", Gong, Lv, Guan, Yan, Wu and others, EMNLP 2024, https://arxiv.org/abs/2407.06677

A transformer sends every token through the same layers in the same order. Why? Take the layers
apart: their attentions A and feed-forwards F, each with its LayerNorm, become a set of modules, and
SKIP, which does nothing, joins them. Then let each token choose. In each of H rounds a router picks
K attention modules for it, a second router K feed-forward modules, and what they return is added to
the residual stream. A module serves in many rounds or in none: depth is not the number of layers.

    vanilla: every token       MoM: 4 rounds of the same modules, K = 1; three tokens go upwards

    layer 2     A2   F2        round 3    A2   F2       A2   SKIP     SKIP SKIP
    layer 1     A1   F1        round 2    SKIP F1       A1   F0       SKIP SKIP
    layer 0     A0   F0        round 1    A1   F1       SKIP F1       A2   F2
                               round 0    A0   F0       A0   F2       A0   F0

    router          s' = GRU(x, s)        p = softmax((W s' + b_r) / tau)           in round r
                    S = the K most probable        g_i = p_i, for K > 1 divided by their sum over S
    attention       [q, k, v]_t = sum_{i in S_t} W_i^QKV LN_i(x_t)
                    a = softmax(q k^T / sqrt(D) + causal) v       y_t = sum_{i in S_t} g_i W_i^O a_t
    feed-forward    y_t = sum_{i in S_t} g_i FFN_i(LN_i(x_t))              SKIP adds nothing to sums

Training has two phases. The first trains a vanilla model, so that modules become different; the
second takes it apart and trains modules and routers. A balance loss E sum_e f_e P_e keeps a router
from using one of its E candidates for everything: f_e is e's share of all picks, P_e its mean p.

    python nano_mom.py --compare                      # both phases; and vanilla, as many steps
    python nano_mom.py --rounds 3 --route_k 2         # half vanilla's depth, two modules a round
    python nano_mom.py --rounds 6 --candidates own    # layer skip; with --no-skip vanilla
    python nano_mom.py --phase1 0 --rounds 1 --no-skip                   # a layer of experts (MoE)
    python nano_mom.py --phase1 0 --n_layer 1 --rounds 6 --no-skip       # ALBERT
    python nano_mom.py --phase1 0 --n_layer 1 --rounds 6 --head_start 0  # Universal Transformer

At --size tiny (900 steps), nats per character, 5 and (the last 3) 3 seeds (tests/results/mom.md):
                  MoM  vanilla  --head_start 0  --rounds 3 --route_k 2  --candidates own --no-skip
    validation  1.631    1.630           2.128                   1.761                       1.643
In the first six rounds MoM's tokens keep to vanilla's path, and it is as good without the others.

Modules, SKIP, two routers, H rounds, top-K, two phases are the paper's, whose equations were not at
hand. From its code (github.com/gzhch/Mixture-of-Modules): GRU routers that read x itself; q, k, v
summed without gates, and 0 where a token skips; tau = 0.2; 0.01 for the balance loss. Ours:
 1. For K = 1 the code's gates are 1, and give routers no gradient. Here they are p, as in Switch.
 2. The code starts phase 2 with random routers, which scramble what phase 1 learned. Here b_r, a
    learned bias, starts it on vanilla's path: the same modules, with gates a little below 1.
 3. The balance loss counts all K picks; the code's takes softmax(p), and the first pick only.
 4. One schedule for both phases; routers wait in the first. The code keeps some layers plain.
"""
import argparse
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# ---- The technique: in every round each token picks the modules that it goes through -------------
class Router(nn.Module):
    """Picks K of N modules and SKIP (candidate N) for each token, in each of H rounds.

    Its state s goes from round to round of one token, never to another token. Picking has no
    gradient: a router learns from its gates (SKIP has none) and from the balance loss."""

    def __init__(self, config):
        super().__init__()
        self.route_k, self.tau = config.route_k, config.tau
        self.cell = nn.GRUCell(config.n_embd, config.router_dim)
        self.out = nn.Linear(config.router_dim, config.n_layer + config.skip, bias=False)
        nn.init.normal_(self.out.weight, std=0.02)  # so little that at first b_r decides
        self.b = nn.ParameterList(vanillas_path(config).unbind())  # vectors, so AdamW's, no decay

    def forward(self, x, state, r):
        """Tokens (B, T, C), their states (B T, R), None in round 0, and the round ->
        picks (B T, K), gates (B T, K), probabilities (B T, N + 1), new states (B T, R)."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 cannot tell close ones apart
            state = self.cell(x.flatten(0, 1), state)                        # s' = GRU(x, s)
            p = ((self.out(state) + self.b[r]) / self.tau).softmax(-1)       # (W s' + b_r) / tau
        gates, picks = p.topk(self.route_k)                                  # S, and g_i = p_i
        if self.route_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)                      # p_i / sum_S p_j
        return picks, gates, p, state


def vanillas_path(config):
    """b_r at the start of phase 2, (H, N + 1): the head start of each round's own modules, so that
    tokens begin on vanilla's path. For N = 4 modules:

        H = 6:  round 0 has module 0, ... 3 has 3, then 4 and 5 have SKIP, or, without SKIP, 0 and 1
        H = 2:  round 0 has modules 0 and 1, round 1 has 2 and 3"""
    N, H = config.n_layer, config.rounds
    once = min(N, H)  # rounds to go through all modules once
    turn = torch.arange(H) if config.skip else torch.arange(H) % once
    own = turn[:, None] == torch.arange(N) * once // N                                      # (H, N)
    b = torch.where(own, config.head_start, -math.inf if config.candidates == "own" else 0.0)
    if config.skip:  # the second choice, for K > 1, or the first where no module has its turn
        skip = torch.where(own.any(1), 0.1, 1.0) * config.head_start
        b = torch.cat([b, skip[:, None]], 1)
    return b


def dispatch(picks, gates, blocks):
    """Each block that a token picked, those tokens (m,), and its gates for them (m, 1).

    picks, gates: (B T, K). Tokens are sorted by module, and those of SKIP, the last, left out."""
    module, place = picks.flatten().sort(stable=True)
    ends = torch.searchsorted(module, torch.arange(len(blocks), device=module.device), right=True)
    places = place.tensor_split(ends.tolist())  # tolist waits for the device
    return [(block, place // picks.size(1), gates.flatten().index_select(0, place)[:, None])
            for block, place in zip(blocks, places) if len(place)]


@torch.compiler.disable  # how many tokens a module gets is another number in every step
def assembled_attention(x, picks, gates, blocks):
    """One attention over all tokens, projected for each token by the modules that it picked.

    x: (B, T, C); picks, gates: (B T, K) -> y (B, T, C). Queries of one module meet keys of all. A
    token that skips has y = 0, and a key and a value of 0, which others see."""
    (B, T, C), first = x.shape, blocks[0].attn  # heads and dropout are the same in all
    dropout = first.dropout if first.training else 0.0
    rows = dispatch(picks, gates, blocks)
    x = x.flatten(0, 1)
    qkv = x.new_zeros(B * T, 3 * C)
    for block, token, _ in rows:                    # [q, k, v]_t = sum_{i in S_t} W_i^QKV LN_i(x_t)
        h, attn = block.ln_1(x.index_select(0, token)), block.attn                      # (m, C)
        h = torch.cat([attn.c_q(h), attn.c_k(h), attn.c_v(h)], -1)                      # (m, 3 C)
        qkv.index_add_(0, token, h.to(qkv.dtype))  # sums are float32, also under autocast
    q, k, v = qkv.view(B, T, 3, first.n_head, -1).permute(2, 0, 3, 1, 4)        # (B, heads, T, D)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    a = a.transpose(1, 2).reshape(B * T, C)
    y = torch.zeros_like(x)
    for block, token, gate in rows:                             # y_t = sum_{i in S_t} g_i W_i^O a_t
        o = F.dropout(block.attn.c_proj(a.index_select(0, token)), dropout)             # (m, C)
        y.index_add_(0, token, gate * o)
    return y.view(B, T, C)


@torch.compiler.disable
def assembled_mlp(x, picks, gates, blocks):
    """y_t = sum_{i in S_t} g_i FFN_i(LN_i(x_t)).     x, y: (B, T, C); picks, gates: (B T, K)."""
    x, shape = x.flatten(0, 1), x.shape
    y = torch.zeros_like(x)
    for block, token, gate in dispatch(picks, gates, blocks):
        y.index_add_(0, token, gate * block.mlp(block.ln_2(x.index_select(0, token))))
    return y.view(shape)


def balance_loss(routes):
    """E sum_e f_e P_e of one router: f_e is candidate e's share of its picks, P_e its mean p. 1 if
    all E are used alike, E if one takes all. routes: the router's (picks, p) of every round."""
    picks, p = (torch.cat(each) for each in zip(*routes))              # (H B T, K) and (H B T, E)
    f = F.one_hot(picks, p.size(-1)).to(p.dtype).mean((0, 1))                          # (E,)
    return p.size(-1) * (f * p.mean(0)).sum()


# ---- The model: GPT-2, whose layers can be taken apart -------------------------------------------
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        C = config.n_embd  # q, k, v apart, one matrix in GPT-2: Muon's steps are of whole matrices
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x):
        qkv = self.c_q(x), self.c_k(x), self.c_v(x)                                     # (B, T, C)
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in qkv)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
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
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # these write to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.rounds, self.balance = config.rounds, config.balance
        if self.rounds:  # made last, so that the other weights are the dense twin's
            self.attn_router, self.mlp_router = Router(config), Router(config)

    def forward(self, idx, targets=None, routes=None):
        """Token ids (B, T) -> logits (B, T, vocab) and, with targets, the mean loss in nats. In
        training its gradient has that of the balance losses, too. With self.rounds = 0 this is
        vanilla. routes: a list that gets the (picks, p) of every round, A's and then F's."""
        x = self.drop(self.wte(idx) + self.wpe.weight[:idx.size(1)])
        if self.rounds == 0:
            for block in self.h:
                x = block(x)
        routes = [] if routes is None else routes
        attn_state = mlp_state = None
        for r in range(self.rounds):
            picks, gates, p, attn_state = self.attn_router(x, attn_state, r)
            x = x + assembled_attention(x, picks, gates, self.h)
            routes.append((picks, p))
            picks, gates, p, mlp_state = self.mlp_router(x, mlp_state, r)
            x = x + assembled_mlp(x, picks, gates, self.h)
            routes.append((picks, p))
        logits = F.linear(self.ln_f(x), self.wte.weight)  # the embedding is also the output head
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        if self.rounds and self.training:
            balance = self.balance * (balance_loss(routes[0::2]) + balance_loss(routes[1::2]))
            loss = loss + (balance - balance.detach())  # it counts in the gradient only
        return logits, loss

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
    rounds: int = flag((8, 8, 16), "H: rounds of assembly; 0: vanilla")
    route_k: int = flag(1, "K: candidates picked in a round", least=1)
    skip: bool = flag(True, "SKIP is a candidate")
    candidates: str = flag("any", "or own: a round's own modules, SKIP", ("any", "own"))
    head_start: float = flag(1.0, "of a round's own modules, in logits")
    router_dim: int = flag((16, 32, 32), "R: width of a router's state", least=1)
    tau: float = flag(0.2, "temperature of the routers", least=1e-3)
    balance: float = flag(0.01, "weight of the balance loss")
    phase1: float = flag(0.85, "share of the steps that are vanilla's", most=0.99)
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
    max_iters: int = flag((900, 5000, 20000), "training steps", least=1)
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
    most = 1 if config.candidates == "own" else config.n_layer + config.skip
    if config.rounds and config.route_k > most:
        sys.exit(f"error: --route_k {config.route_k} must be at most {most}, all the candidates")
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
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False,
                                                  find_unused_parameters=config.rounds > 0)
    switch = int(config.phase1 * config.max_iters) if config.rounds else 0  # phase 2 begins
    bar = tqdm(total=config.max_iters, initial=first, mininterval=1, disable=run.rank > 0)
    order = run.data.order(config)
    since, clock = first, time.perf_counter()   # the last evaluation
    total = torch.zeros((), device=run.device)  # of the losses since then

    for step in range(first, config.max_iters):
        for optimizer, peak in ((adamw, config.learning_rate), (muon, config.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = get_lr(config, step, peak)
        model.rounds = config.rounds if step >= switch else 0  # in phase 1 vanilla
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
        if done % config.eval_interval and done not in (switch, config.max_iters):
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
        if done == switch:
            model.rounds = config.rounds
            log[-1]["routed_loss"] = evaluate(config, run, model)  # with the same weights
        if run.rank == 0:
            bar.write(f"{folder.name} {done}: loss {train_loss:.4f}, validation {val_loss:.4f}")
            write(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
            state = {name: part.state_dict() for name, part in parts.items()}
            phase2 = [line["val_loss"] for line in log if line["step"] > switch]
            if phase2 and val_loss == min(phase2):
                write(folder / "best.pt", dict(config=asdict(config), model=state["model"]))
            write(folder / "ckpt.pt", dict(step=done, log=log, config=asdict(config), **state))
        since, clock = done, time.perf_counter()
        total.zero_()
    bar.close()
    val_losses = [line["val_loss"] for line in log if line["step"] > switch]
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
    """Where 8,192 tokens of the validation split go (fewer of a large vocabulary), and what that
    costs. flops_per_token: a forward pass's, as PyTorch counts matrix products; skipped: share of
    the picks; evaluation: for each A and F the shares of its picks, and those of eight tokens."""
    N, routes, counter = config.n_layer, [], FlopCounterMode(display=False)
    idx, _ = run.data.rows("val", run.data.windows("val", 2**13)[0])
    with run.autocast(), sdpa_kernel(SDPBackend.MATH), counter:  # it cannot count every kernel
        model(idx, routes=routes)
    found = dict(flops_per_token=counter.get_total_flops() // idx.numel(), evaluation={})
    if config.rounds == 0:  # vanilla
        return found
    picked = torch.stack([picks for picks, p in routes]).sort(-1).values.cpu()  # (2 H, tokens, K)
    found["skipped"] = (picked == N).float().mean().item()
    found["distinct_paths"] = picked.unique(dim=1).size(1)
    text = [repr(run.data.decode([i])) for i in idx[0, :8].tolist()]
    names = [*map(str, range(N)), "SKIP"]
    for i, picks in enumerate(picked):
        row = {name: f"{(picks == e).float().mean():.0%}" for e, name in enumerate(names)}
        for t, token in enumerate(text):
            row[f"{t} {token}"] = "+".join(names[e] for e in picks[t] if e < N) or "."
        found["evaluation"][f"round {i // 2} {'AF'[i % 2]}"] = row
    return found


def sample(config, run, model):
    torch.manual_seed(key(config.seed, "sample"))
    prompt = run.data.encode(config.prompt) or run.data.ids["train"][:1].tolist()
    prompt = torch.tensor([prompt], device=run.device)
    idx = model.generate(prompt, config.sample_tokens, config.temperature)
    return run.data.decode(idx[0].tolist())


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    config, earlier = parse_args(argv)
    run = Run(config)
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
    if config.compare and config.rounds:
        configs["dense"] = replace(config, rounds=0)
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
            result.update(measure(arm_config, run, model))
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
