# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm"]
# ///
"""
Linear short cuts through a transformer, of "Jump to Conclusions: Short-Cutting Transformers with
Linear Transformations", Yom Din, Karidi, Choshen and Geva, LREC-COLING 2024,
https://arxiv.org/abs/2303.09435

What does a transformer know after l of its L layers? The logit lens reads the hidden state h_l as
if it were the last one, with the final LayerNorm and the output head. But layers do not speak one
language. The paper translates: for all layers i < j it takes the matrix that best foretells the
later state from the earlier one, by least squares over the tokens n of some text:

    A_ij = argmin_A sum_n |h_i A - h_j|^2       h_0: embeddings, h_l: after layer l, before ln_f
    id     p(next) = softmax(head(ln_f(h_l)))             the logit lens
    mat    p(next) = softmax(head(ln_f(h_l A_lL)))        a jump to the last layer

     h_0 --> h_1 --> h_2 --> ... --> h_L --> ln_f, head   a layer: 12 C^2 weights, and attention
              +-------- A_1L ---------^                   a jump: C^2

It asks (1) how well this works: r^2, and precision@k, how often the first choice from layer l is
among the full model's first k; (2) what early exit saves, if a token leaves after the first layer
with p_(1) - p_(2) > 0.9 lambda + 0.1 exp(-4 t / N), the margin of its first choice, t its position,
N = (T + 1) / 2; (3) which parts are nearly linear: in all layers above l the attentions, which then
mix no tokens, the feed-forward parts or the LayerNorms are replaced by their best linear maps.

    python nano_jump.py                                # train, fit, evaluate, sample
    python nano_jump.py --init_from gpt2 --dataset shakespeare    # OpenAI's; not measured by us

At --size tiny, 5 seeds, on validation text (tests/results/jump.md):
    from layer                           0      1      2      3      4      5
    r^2 to layer 6, id               -0.22  -0.01   0.06   0.17   0.34   0.59
    r^2 to layer 6, mat               0.45   0.60   0.65   0.71   0.81   0.90
    P@1, id                            3 %   13 %   21 %   35 %   55 %   73 %
    P@1, mat                          38 %   45 %   49 %   55 %   67 %   81 %
    P@1, attention linear above       36 %   66 %   71 %   79 %   87 %   93 %
    P@1, MLP linear above             39 %   47 %   52 %   60 %   71 %   83 %
    P@1, LayerNorms linear above      84 %   87 %   89 %   91 %   93 %   95 %
Where 95 % of the choices are the full model's, they take 16 % fewer layers with mat, 5 % with id.
The abstract names attention as most tolerant of a linear map; in this small model LayerNorms are.

The paper's body was not at hand: definitions are its abstract's and those of the authors' code
(github.com/sashayd/mat). Row vectors here, h A for their A h. Chosen here:
 1. Maps are fitted at all positions of windows of training text, theirs at one of each sentence.
 2. They have no generation. Ours keeps keys and values exact: a token that left waits, as in FREE
    (https://arxiv.org/abs/2310.05424), until a later one needs them.
 3. "Layers saved" counts as theirs does: without the price of asking (a map and the head) and the
    layers still owed. Moments take 8 ((L + 1) C)^2 bytes: 0.8 GB for GPT-2, twice 5 for its medium.
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
from tqdm import tqdm


# ---- The technique: the best linear map from any layer to any later one --------------------------
def least_squares(G, XY):
    """argmin_W sum_n |x_n W - y_n|^2, from G = sum_n x_n^T x_n (K, K) and XY = sum_n x_n^T y_n
    (K, J), in float64. Where several W are best, the smallest: in directions in which x does not
    vary, with an eigenvalue of G below 1e-12 of the largest, W is 0."""
    return torch.linalg.pinv(G, rtol=1e-12, hermitian=True) @ XY


def double(x):
    return x.cpu().double() if x.device.type == "mps" else x.double()  # mps has no float64


@torch.no_grad()
def moments(model, texts):
    """All that the maps and their r^2 take, from one pass over texts of token ids (B, T): how many
    tokens, sum_n h_i (L+1, C), and of all i, j sum_n h_i^T h_j (L+1, C, L+1, C), in float64."""
    shape = len(model.h) + 1, model.wte.embedding_dim
    n, total, products = 0, 0, 0
    for idx in texts:
        rows = double(torch.cat(model.states(idx), -1).flatten(0, 1))          # (B T, (L+1) C)
        n += len(rows)
        total += rows.sum(0)
        products += rows.T @ rows
    return n, total.view(shape), products.view(*shape, *shape)


def fit(products):
    """The maps of all layers i < j, {(i, j): A_ij (C, C)}."""
    L, maps = len(products) - 1, {}
    for i in range(L):
        G, XY = products[i, :, i], products[i, :, i + 1:]                      # (C, C), (C, L-i, C)
        A = least_squares(G, XY.flatten(1)).view(XY.shape).float()             # to all later layers
        maps.update({(i, j): A[:, j - i - 1] for j in range(i + 1, L + 1)})
    return maps


def explained(moments, i, j, A):
    """r^2 of h_i A as a prediction of h_j on the text of the moments: the mean over the channels of
    1 - SSE / SST, where SSE = sum_n (h_i A - h_j)^2 and SST = sum_n (h_j - mean h_j)^2."""
    n, total, products = moments
    G, XY, squares = products[i, :, i], products[i, :, j], products[j, :, j].diagonal()
    SSE = (A.to(G) * (G @ A.to(G) - 2 * XY)).sum(0) + squares                  # (C,)
    SST = squares - total[j] ** 2 / n
    return (1 - SSE / SST).mean().item()


def confidence(logits):
    """p_(1) - p_(2), the two largest probabilities: (.., V) -> (..)."""
    p = F.pad(logits.float().softmax(-1), (0, 1))  # for a vocabulary of one
    first, second = p.topk(2).values.unbind(-1)
    return first - second


def threshold(lam, t, N):
    """What the confidence of a token at position t must exceed; N: the mean of t + 1. For
    lambda > 10/9 (1 is not enough) none leaves early, for lambda < -1/9 each at once."""
    return 0.9 * lam + 0.1 * math.e ** (-4 * t / N)


def leave(agree, sure, lam, t, T):
    """Early exit on given text, by the authors' count. agree: is a layer's first choice the full
    model's; sure: its confidence; (L+1, n) each; t: positions (n,). A token leaves after the first
    layer, but 0, that is sure enough: the mean of the layers taken, and of choices that agree."""
    leaves = sure > threshold(lam, t, (T + 1) / 2)
    leaves[0], leaves[-1] = False, True
    depth = leaves.int().argmax(0)  # the first that is True
    return depth.double().mean().item(), agree.gather(0, depth[None]).double().mean().item()


PARTS = {"attention": ["attn"], "MLP": ["mlp"], "LayerNorms": ["ln_1", "ln_2"]}


@torch.no_grad()
def fit_parts(model, texts):
    """Of every part of every layer the linear map that best gives what comes out of the part from
    what goes in: [{part: W (C, C)} of each layer]."""
    sums = [dict.fromkeys(["ln_1", "attn", "ln_2", "mlp"], (0, 0)) for _ in model.h]
    for idx in texts:
        for x, block, parts in zip(model.states(idx), model.h, sums):
            a = block.ln_1(x)
            b = block.attn(a)
            c = block.ln_2(x + b)
            pairs = dict(ln_1=(x, a), attn=(a, b), ln_2=(x + b, c), mlp=(c, block.mlp(c)))
            for part, pair in pairs.items():
                x, y = (double(z.flatten(0, 1)) for z in pair)                 # (B T, C)
                parts[part] = parts[part][0] + x.T @ x, parts[part][1] + x.T @ y
    return [{part: least_squares(*two).to(model.wte.weight) for part, two in parts.items()}
            for parts in sums]


def linear_block(block, x, linear, names):
    """A layer in which the parts of these names are replaced by their maps."""
    def part(name, x):
        return x @ linear[name] if name in names else getattr(block, name)(x)
    x = x + part("attn", part("ln_1", x))
    return x + part("mlp", part("ln_2", x))


# ---- The model: GPT-2, and a decoder whose tokens leave early ------------------------------------
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        C, bias = config.n_embd, config.bias  # q, k, v apart: Muon's steps are of whole matrices
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C, bias=bias) for _ in range(4))

    def forward(self, x, cache=None):
        qkv = self.c_q(x), self.c_k(x), self.c_v(x)                                     # (B, T, C)
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in qkv)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        causal, visible = True, None
        if cache is not None:  # keys and values of the tokens before: the queries are the last n
            k, v = torch.cat([*cache[:1], k], 2), torch.cat([*cache[1:], v], 2)
            cache[:] = k, v
            n, T = q.size(2), k.size(2)
            causal, visible = False, torch.ones(n, T, dtype=torch.bool, device=x.device).tril(T - n)
        y = F.scaled_dot_product_attention(q, k, v, visible, dropout, causal)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), dropout)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.bias else "none"  # GPT-2's GELU, or the exact one

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # these write to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def states(self, idx):
        """Token ids (B, T) -> h_0, .., h_L, (B, T, C) each, before ln_f."""
        h = [self.drop(self.wte(idx) + self.wpe.weight[:idx.size(1)])]
        for block in self.h:
            h.append(block(h[-1]))
        return h

    def read_out(self, h):
        return F.linear(self.ln_f(h), self.wte.weight)  # the embedding is also the output head

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab) and, with targets, the mean loss in nats."""
        logits = self.read_out(self.states(idx)[-1])
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def generate(self, idx, n, temperature=1.0):
        return Decoder(self).generate(idx, n, temperature)


class Decoder:
    """The model with a cache; if there is one sequence, its tokens may leave early.

    maps: from fit, or None for the logit lens; layers: after these a token may leave; lam: it does
    if it is surer than threshold(lam, t, N). It still owes the later layers its keys and values. So
    it waits, and the next token that goes on takes all that wait there along, in one batch: each
    sees what it would see in the full model. depths: the layers that each token's choice took."""

    def __init__(self, model, maps=None, layers=(), lam=0.0):
        self.model, self.maps, self.layers, self.lam = model, maps, layers, lam
        self.idx, self.depths = None, []

    @torch.no_grad()
    def __call__(self, idx):
        """The text so far (B, T) -> logits of the next token (B, V)."""
        model, L, T = self.model, len(self.model.h), idx.size(1)
        known = 0 if self.idx is None else self.idx.size(1)
        if known == 0 or known >= T or not torch.equal(self.idx, idx[:, :known]):
            known, self.cache, self.waiting = 0, [[] for _ in range(L)], {}  # a text that is new
        self.idx = idx
        bar = threshold(self.lam, T - 1, (model.wpe.num_embeddings + 1) / 2)
        x = model.wte(idx[:, known:]) + model.wpe.weight[known:T]              # (B, n, C)
        for l, block in enumerate(model.h):
            if l in self.waiting:
                x = torch.cat([self.waiting.pop(l), x], 1)
            if l in self.layers:
                last = x[:, -1] if self.maps is None else x[:, -1] @ self.maps[l, L]
                logits = model.read_out(last)                                  # (1, V)
                if confidence(logits).item() > bar:
                    self.waiting[l] = x
                    self.depths.append(l)
                    return logits
            x = block(x, self.cache[l])
        self.depths.append(L)
        return model.read_out(x[:, -1])

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0):
        """Go on from token ids (B, T) with n more, sampled one after the other."""
        for _ in range(n):
            logits = self(idx[:, -self.model.wpe.num_embeddings:])
            p = (logits.float() / max(temperature, 1e-5)).softmax(-1)
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
    init_from: str = flag("", "a GPT-2: name, folder or checkpoint")
    fit_tokens: int = flag(2**15, "tokens that maps are fitted to", least=1, free=True)
    agreement: float = flag(0.95, "of early exit with the model", most=1, free=True)
    # the run
    size: str = flag("auto", "auto: tiny on a CPU, else char", ("auto", *SIZES))
    dataset: str = flag("auto", "a folder, or one of those in data/", free=True)
    out_dir: str = flag("", "of the run; by default a new one", free=True)
    seed: int = flag(1337, "of weights, order of the data, draws")
    resume: bool = flag(False, "go on with the latest run, or --out_dir", free=True)
    eval_only: bool = flag(False, "only evaluate that run", free=True)
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
    bias: bool = flag(False, "of layers and norms, as GPT-2 has")
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
    sizes = {"n_layer", "n_head", "n_embd", "block_size", "bias"} & given.keys()
    if config.init_from and sizes:
        sys.exit(f"error: --init_from has sizes of its own: leave out --{' --'.join(sizes)}")
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


# ---- Evaluation: what each layer knows, and what leaving early saves -----------------------------
def texts(run, split, tokens):
    """The first so many tokens of a split, some windows (B, T) at a time."""
    for starts in run.data.windows(split, tokens):
        yield run.data.rows(split, starts)[0]


def reading(logits, full):
    """What the paper measures of logits (B, T, V) against the full model's log-probabilities, not
    the true token: is the first choice among the full model's first 1, and 5; its surprisal
    -ln p_full(choice), nats; and the confidence. (4, B T)"""
    choice = full.gather(-1, logits.argmax(-1, keepdim=True))                  # (B, T, 1)
    rank = (full > choice).sum(-1)
    return torch.stack([rank < 1, rank < 5, -choice[..., 0], confidence(logits)]).flatten(1).cpu()


@torch.no_grad()
def measure(config, run, model):
    """What the header names, of the first eval_tokens / 8 of validation; a Decoder with maps."""
    torch.set_float32_matmul_precision("highest")  # TF32 is too coarse to fit to
    L, T = config.n_layer, config.block_size
    maps = fit(moments(model, texts(run, "train", config.fit_tokens))[2])
    linear = fit_parts(model, texts(run, "train", config.fit_tokens))
    held_out, r2 = moments(model, texts(run, "val", config.eval_tokens // 8)), {}
    for name, A in ("id", dict.fromkeys(maps, torch.eye(config.n_embd))), ("mat", maps):
        r2[name] = {f"{i} {j}": explained(held_out, i, j, A[i, j]) for i, j in maps}

    maps = {pair: A.to(run.device) for pair, A in maps.items()}
    found = {name: [] for name in ("id", "mat", *PARTS)}
    for idx in texts(run, "val", config.eval_tokens // 8):
        states = model.states(idx)
        full = model.read_out(states[-1]).float().log_softmax(-1)              # (B, T, V)
        jumps = [h @ maps[l, L] for l, h in enumerate(states[:-1])]
        last = {"id": states, "mat": [*jumps, states[-1]]}
        for name, parts in PARTS.items():  # real up to layer l; above, these parts are linear
            last[name] = list(states)
            for l in range(L):
                for block, maps_of_parts in zip(model.h[l:], linear[l:]):
                    last[name][l] = linear_block(block, last[name][l], maps_of_parts, parts)
        for name, guesses in last.items():  # at h_L, from each layer
            rows = [reading(model.read_out(h), full) for h in guesses]
            found[name].append(torch.stack(rows, 1))                           # (4, L+1, B T)
    found = {name: torch.cat(rows, -1) for name, rows in found.items()}
    rows = {}
    for l in range(L + 1):
        row = rows[f"layer {l}"] = {}
        for name in ("id", "mat"):
            row[f"r2 {name}"] = round(r2[name].get(f"{l} {L}", 1.0), 3)
            for k, right in zip((1, 5), found[name][:2, l]):
                row[f"P@{k} {name}"] = f"{right.mean():.1%}"
            row[f"surp. {name}"] = round(found[name][2, l].mean().item(), 3)
        row.update((f"P@1 {name}", f"{found[name][0, l].mean():.1%}") for name in PARTS)

    exits, t = {}, torch.arange(found["id"].size(-1)) % T
    for name in r2:
        fitted = found[name][0, :, ::2], found[name][3, :, ::2]  # lambda is chosen on every other
        lam = min(n / 100 for n in range(-12, 120)
                  if leave(*fitted, n / 100, t[::2], T)[1] >= config.agreement)
        depth, same = leave(found[name][0, :, 1::2], found[name][3, :, 1::2], lam, t[1::2], T)
        exits[name] = {"lambda": lam, "layers": depth, "layers saved": f"{1 - depth / L:.1%}",
                       "agreement": f"{same:.1%}"}
    decoder = Decoder(model, maps, range(1, L), exits["mat"]["lambda"])
    return dict(evaluation=rows, exits=exits, r2=r2), decoder


def sample(config, run, model):
    torch.manual_seed(key(config.seed, "sample"))
    prompt = run.data.encode(config.prompt) or run.data.ids["train"][:1].tolist()
    prompt = torch.tensor([prompt], device=run.device)
    idx = model.generate(prompt, config.sample_tokens, config.temperature)
    return run.data.decode(idx[0].tolist())


# ---- Main ----------------------------------------------------------------------------------------
def main(argv=None):
    config, earlier = parse_args(argv)
    weights = None
    if config.init_from and not earlier:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
        from weights import check, load_model  # other people's formats are no part of the idea
        found, weights = load_model(config.init_from)
        config = replace(config, **found)
    run = Run(config)
    data = run.data.meta
    config.vocab_size = data["vocab_size"]
    if weights:
        check(GPT(config), weights, config.init_from)
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
    for arm, arm_config in configs.items():
        torch.manual_seed(key(config.seed, "weights"))
        model = GPT(arm_config).to(run.device)
        result = results["arms"].setdefault(arm, {})
        if weights:
            model.load_state_dict(weights)
            result["val_loss"] = evaluate(config, run, model)
            write(out / arm / "best.pt", dict(config=asdict(config), model=weights))
        elif not config.eval_only and not config.init_from:
            result.update(train(arm_config, run, out / arm, model))
        if run.rank == 0 and (out / arm / "best.pt").exists():
            best = torch.load(out / arm / "best.pt", map_location="cpu", weights_only=True)
            model.load_state_dict(best["model"])
            model.eval()
            found, decoder = measure(arm_config, run, model)
            result.update(found)
            result["sample"] = sample(arm_config, run, decoder)
            result["exits"]["in the sample"] = {"layers": float(np.mean(decoder.depths or [0]))}
            write(out / "results.json", json.dumps(results, indent=1))
    if run.rank == 0:
        technique = results["arms"]["technique"]
        if "sample" not in technique:
            sys.exit(f"error: there is no checkpoint in {out} yet: add --resume")
        rows = {name: {arm: result.get(name, "") for arm, result in results["arms"].items()}
                for name, x in technique.items() if isinstance(x, (int, float))}
        print(f"\n{table(rows)}\n\n{table(technique['evaluation'])}\n\nA token leaves when it is "
              f"sure enough\n{table(technique['exits'])}\n\n{technique['sample']}")
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
