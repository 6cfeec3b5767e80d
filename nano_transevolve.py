# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm", "pytest"]
# ///
"""
TransEvolve

    "Redesigning the Transformer Architecture with Insights from Multi-particle Dynamical Systems"
    Dutta, Gautam, Chakrabarti and Chakraborty, NeurIPS 2021, https://arxiv.org/abs/2109.15142

Take the tokens for particles. A transformer layer is then a step in time of a system in which they interact and drift:

    dx_i/dt = F(x_i, [x_1 .. x_T], t) + G(x_i, t)          interaction (attention) and convection (feed-forward)

    x_i <- x_i + F(x_i, [x_1 .. x_T], t)                   solved one after the other (Lie-Trotter splitting),
    x_i <- x_i + G(x_i, t)                                 by one Euler step each

An ordinary layer learns and computes its F from scratch, as if it knew nothing of the step before. TransEvolve computes the
interaction once for a block of layers, from the block's input, and lets it evolve with depth l. To this end queries and
keys read a token and the depth, [x; T^l], where T^l is sines and cosines of l times learned coefficients. Multiplied out, a
score of a head has four terms:

    S^l_ij  =  A0_ij  +  A1Q_i . T^l  +  A1K_j . T^l  +  A2 . (T^l * T^l)            P^l = softmax_j(S^l)
               tokens    query, depth    key, depth      depth, depth

The A are computed once in a block, and little is left for a layer. But look at the indices. The second and the fourth term do
not depend on j, and what is the same for all j cancels in a softmax. So two of the four terms do nothing, exactly; neither do
their weights, a quarter of those of queries and keys, which are left out here. Evolution is one bias for each key and head:

    P^l = softmax_j(A0_ij + b^l_j)                 b^l_j = K_j . (W T^l)

It raises and lowers how much a key is looked at, by all queries alike. It cannot pair queries with other keys. Hence two
implementations of one function:

    exp     E0 = exp(A0) once in a block, then a layer is a product:  P^l v = E0 (w v) / E0 w,   w = exp(b^l)
    sdpa    the bias as one more channel, [q, 1] . [k, b]: a fused kernel and no T x T matrix, but scores in every layer

      x --> Q, K --> E0 ---------------+----------------------+             a block of two layers; E0 w is one more column
      |        K --> w^0 --------------+--> w^1 --------------+             of the product; values are the normed stream,
      |                                |                      |             cut into heads, without a projection
      +--> x + [E0 (w^0 LN x) / E0 w^0] W_O --> + FF --> x + [E0 (w^1 LN x) / E0 w^1] W_O --> + FF --> LN --> next block

The feed-forward part is a ReLU MLP of each layer's own (--ffn full), or two maps of fixed random matrices that depend on the
depth, with learned scales in their middle (--ffn random): hardly any weights, though the fixed numbers, drawn from a seed, take
10 n_embd^2 in memory, more than an MLP's 8. Weights of six layers, in units of n_embd^2, less those that cancel:

                             one block of 6       two blocks of 3       dense twin
    --ffn full                62 - 2 = 60           70 - 4 = 66             72
    --ffn random              14 - 2 = 12           22 - 4 = 18

    python nano_transevolve.py                               # train, evaluate, sample; within 3 minutes on 2 CPU cores
    python nano_transevolve.py --compare                     # beside dense twins, no evolution, and the other feed-forward
    python nano_transevolve.py --ffn random --blocks 1
    python nano_transevolve.py --task listops                # an encoder that computes [MAX 2 9 [MIN 4 7 ] 0 ]

What we found. Tiny Shakespeare, 6 layers of 96, T = 64, 2 blocks of 3; ListOps with T = 32; 3 seeds, mean ± standard deviation,
nats; x86-64 CPU, 1 thread, float32, torch 2.13.0 (README has the whole tables and the sweep of the rates):

    python tests/evidence.py nano_transevolve --arms dense small off -- --muon_lr 0.06 --max_iters 1500 --eval_interval 375
    python tests/evidence.py nano_transevolve --arms small --name random -- --ffn random --max_iters 1500 --eval_interval 375
    python tests/evidence.py nano_transevolve --arms dense small off --dataset listops ...  (further flags in README)

                          TransEvolve       dense twin        narrow twin, as     no evolution
                                                              many weights
    --ffn full          1.565 ± 0.004     1.547 ± 0.005     1.552 ± 0.000       1.568 ± 0.011
    --ffn random        1.704 ± 0.004                       1.640 ± 0.002
    ListOps, loss       1.102 ± 0.026     1.172 ± 0.020     1.159 ± 0.010     1.116 ± 0.026
    ListOps, % right    58.7 ± 0.8        55.8 ± 1.0        56.6 ± 0.7        58.4 ± 0.6

  - A language model gains nothing from evolution: the same model without it is level (-0.002 ± 0.009), and both are a
    little behind the dense twin, with 2 products Q K^T instead of 6.
  - As an encoder, on ListOps, it is ahead of both twins in every seed, as the paper says of encoder-only tasks. So it is
    without evolution, whose own share is -0.014 ± 0.016: something else in the model helps there.
  - Random feed-forward parts are 0.065 ± 0.005 behind a narrow GPT-2 with as few weights, at 2.7 times its FLOPs.
  - The biases are used where they are trained: set to 0 they cost 0.097 ± 0.012 on text, and ListOps falls to 49.6 ± 2.7 %.

What it costs. python tests/bench.py transevolve --T 1024 --runs 3, forward and backward of 4,096 tokens, 2 heads of 64, Intel Xeon
at 2.5 GHz, 2 threads; a layer's attention in blocks of 3 and of 6, and a step of the whole model:

    T = 1024                       3          6        2 x 3      1 x 6      kept for backward, 2 x 3 and 1 x 6
    scores in every layer       185 ms     183 ms     1334 ms    1264 ms      387 MB    381 MB       written out
    scores once                 115 ms     110 ms                                                    as in the official code
    exp                          95 ms      69 ms      727 ms     521 ms      241 MB    192 MB
    sdpa                         66 ms      70 ms      558 ms     568 ms      224 MB    218 MB       no T x T matrix
    dense twin, fused kernel                                407 ms                 207 MB

  So a step is faster than with scores in every layer, and slower than the dense twin's with a fused kernel. exp is the faster one at
  T = 64 to 512 and the slower one at 4096 (README): on a CPU --evolve_impl auto takes it up to 512, elsewhere, unmeasured, sdpa.

What is the paper's and what is ours. Written from the abstract, the introduction, Figure 1 and the authors' TensorFlow code
(github.com/LCS2-IIITD/TransEvolve). Numbers 1 to 6 are that code's; the paper's other equations were not at hand:
 1. Queries and keys have 2 n_embd channels, of the token and of the depth as many, and come from a block's input without a
    LayerNorm; A0 is divided by sqrt(2 n_embd / n_head), the other terms are not; A1K takes all of K, not one head's channels.
 2. T^l = c^l * [sin(p l pi/64) .., cos(p l pi/64) ..], c^l learned in each layer. Heads take its numbers in order: low heads get
    sines, high heads cosines, and where l = 0 the sines are 0. l begins at 0 in every block (--time_depth_offset 1: at 1).
 3. The term of depth with depth is the diagonal only. It cancels, as the whole one would.
 4. No projection of values, no biases in Q, K and W_O; a LayerNorm on the stream itself at a block's end; token embeddings times
    sqrt(n_embd): the first scores see no norm.
 5. Dropout on queries, keys and what a layer writes, none on maps. ReLU, and biases in the feed-forward part.
 6. randomFF with its quirks: a block's first one (l = 0) is a bias, matrices are orthogonal only roughly, and it begins near 0.
    Left out are those of its scales, 3 n_embd a layer, that no matrix entry sees.
 7. Ours: learned positions, scaled like the tokens (theirs: sines, not scaled); dropout on embeddings; initial weights of GPT-2
    (theirs: Glorot's, and embeddings of standard deviation n_embd^-0.5); LayerNorms with eps 1e-5 (1e-3) and without shifts
    unless --bias on; an encoder's mean without padding (with it); Muon and AdamW for all arms (Adam).
 8. Ours: the decoder-only model. The paper's are encoder-only and encoder-decoder, which is not here; its ListOps are longer.
"""
import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass, one flag a field
# ---------------------------------------------------------------------------------------------------------------------

# ==== shared: flags
SCRIPT = Path(__file__).stem  # results and checkpoints name the script they belong to


class UserError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do, and is all that is printed."""


def flag(default, help, choices=None, least=None, most=None, free=False):
    """A field of Settings: its line of help, the values it may take, and whether it may change after training (free)."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most, free=free))


def key(*parts):
    """A 63-bit seed from numbers and names. Every random choice of a run is a function of such a key and nothing else:
    no generator carries state from step to step, so a resumed run repeats exactly what the uninterrupted one drew."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
# ==== end shared


EXPRESSION = 32  # tokens in a row of --task listops, the shorter ones filled up with token 0


@dataclasses.dataclass
class Settings:
    # the technique
    blocks: int = flag(2, "blocks of layers; each computes its scores once", least=1)
    ffn: str = flag("full", "feed-forward: learned matrices, or fixed random ones of depth with learned scales",
                    choices=("full", "random"))
    evolve: str = flag("on", "off: all layers of a block use its first scores; dense: GPT-2's layers, the twin, without blocks",
                       choices=("on", "off", "dense"))
    evolve_impl: str = flag("auto", "exp: one exponential a block; sdpa: a fused kernel, which computes the scores again in every "
                            "layer; auto: the faster", choices=("auto", "sdpa", "exp"), free=True)
    time_depth_offset: int = flag(0, "depth l of a block's first layer, 0 or 1", least=0, most=1)
    task: str = flag("lm", "lm: next token, decoder-only; listops: the value of an expression, encoder-only",
                     choices=("lm", "listops"))
    map_windows: int = flag(64, "validation windows on which attention maps are compared", least=1, free=True)

    # ==== shared: settings
    # the run
    device: str = flag("auto", "cuda, cuda:N, mps or cpu; auto takes the first there is", free=True)
    dtype: str = flag("auto", "of the matrix products", choices=("auto", "float32", "bfloat16", "float16"), free=True)
    compile: str = flag("auto", "torch.compile; auto: on CUDA, where it works", choices=("auto", "on", "off"), free=True)
    size: str = flag("auto", "a preset for all that follows; auto: tiny on a CPU, else char",
                     choices=("auto", "tiny", "char", "gpt2"))
    dataset: str = flag("auto", "shakespeare_char, shakespeare, openwebtext, stdlib, or a folder that data/prepare.py made")
    out_dir: str = flag("auto", "where results, checkpoints and logs go; auto: out/ and the script's name", free=True)
    compare: bool = flag(False, "also train or measure what the technique is compared with, on the same data and budget", free=True)
    seed: int = flag(1337, "decides initial weights, data order and every draw", least=0)
    resume: bool = flag(False, "go on from the checkpoints in out_dir", free=True)
    eval_only: bool = flag(False, "evaluate best.pt in out_dir, without training", free=True)
    # the sample at the end
    prompt: str = flag("\n", "text that the sample goes on from", free=True)
    sample_tokens: int = flag(256, "length of the sample", least=0, free=True)
    temperature: float = flag(0.8, "of the sample; 0 takes the likeliest token", least=0.0, free=True)
    top_k: int = flag(0, "sample from the k likeliest tokens (0: from all)", least=0, free=True)
    # the model
    n_layer: int = flag(6, "transformer blocks", least=1)
    n_head: int = flag(4, "attention heads", least=1)
    n_embd: int = flag(96, "width of the residual stream", least=1)
    block_size: int = flag(64, "context length T, in tokens", least=2)
    dropout: float = flag(0.0, "dropout rate", least=0.0, most=0.99)
    bias: bool = flag(False, "biases in linear layers and LayerNorms; on: exactly GPT-2's parameters")
    # training
    batch_size: int = flag(32, "sequences in a micro-batch of one process", least=1)
    grad_accum: int = flag(1, "micro-batches of one process in a step", least=1)
    max_iters: int = flag(480, "training steps", least=0)
    optimizer: str = flag("muon", "muon: Muon for hidden matrices and AdamW for the rest; adamw: AdamW for all",
                          choices=("muon", "adamw"))
    learning_rate: float = flag(3e-3, "peak learning rate of AdamW", least=0.0)
    muon_lr: float = flag(4e-2, "peak learning rate of Muon", least=0.0)
    min_lr: float = flag(0.0, "learning rate at the last step; Muon's falls in proportion", least=0.0)
    warmup_iters: int = flag(50, "steps of linear warm-up", least=0)
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices only", least=0.0)
    grad_clip: float = flag(1.0, "largest norm of the gradient (0: no limit)", least=0.0)
    eval_interval: int = flag(240, "steps between evaluations, each followed by a checkpoint", least=1)
    eval_tokens: int = flag(0, "tokens of the validation split to use (0: all of it)", least=0)
    vocab_size: int = flag(65, None)  # no flag: the data decide

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, rule = getattr(self, f.name), f.metadata
            if rule["choices"] and value not in rule["choices"]:
                raise UserError(f"--{f.name} {value} is not one of {', '.join(rule['choices'])}")
            if rule["least"] is not None and not value >= rule["least"]:
                raise UserError(f"--{f.name} must be at least {rule['least']}, not {value}")
            if rule["most"] is not None and not value <= rule["most"]:
                raise UserError(f"--{f.name} must be at most {rule['most']}, not {value}")
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}: heads need one width")
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}: the rate only falls")
        self.check()
    # ==== end shared

    def check(self):
        if self.evolve != "dense" and self.n_layer % self.blocks:
            raise UserError(f"--n_layer {self.n_layer} is not divisible by --blocks {self.blocks}: blocks are equally deep")
        if self.evolve != "dense" and self.n_embd % 2:
            raise UserError(f"--n_embd {self.n_embd} is odd: depth is a vector of sines and as many cosines, use an even width")
        if self.compare and self.evolve != "on":
            raise UserError(f"--compare trains --evolve off and dense beside --evolve on: leave out --evolve {self.evolve}")
        if self.task == "lm" and Path(self.dataset).name == "listops":
            raise UserError(f"--dataset {self.dataset} holds expressions, not text: use --task listops")
        if self.task == "listops":
            if self.dataset in ("shakespeare_char", "shakespeare", "openwebtext", "stdlib"):
                raise UserError(f"--dataset {self.dataset} is text: use --dataset listops with --task listops")
            if self.block_size < EXPRESSION:
                raise UserError(f"--block_size {self.block_size} is too short for --task listops: use {EXPRESSION}")
            self.block_size = EXPRESSION  # a longer context would hold nothing but padding


# ==== shared: command line
SIZES = {  # a preset replaces these defaults of Settings; flags on the command line replace both
    "tiny": dict(),
    "char": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64,
                 max_iters=5000, warmup_iters=100, eval_interval=250, muon_lr=2e-2),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, grad_accum=32, dataset="openwebtext",
                 max_iters=20000, warmup_iters=500, eval_interval=500, eval_tokens=2**20, learning_rate=1e-3, muon_lr=2e-2),
}


def parse(argv=None):
    """Settings from the command line: --name value or --name=value, switches take on|off."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; {SCRIPT}.py --help lists the flags")

    def switch(text):
        if text not in ("on", "off"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
        return text == "on"

    fields = [f for f in dataclasses.fields(Settings) if f.metadata["help"]]
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields:
        takes = dict(type=switch, metavar="on|off", nargs="?", const=True) if f.type is bool else dict(type=f.type)
        if f.metadata["choices"]:
            takes["metavar"] = "|".join(f.metadata["choices"])
        default = {True: "on", False: "off"}[f.default] if f.type is bool else repr(f.default)
        presets = [f"{size} {values[f.name]}" for size, values in SIZES.items() if f.name in values]
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default {', '.join([default, *presets])})", **takes)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{f.name}" for f in fields], n=1, cutoff=0.5)
        parser.error(f"there is no flag {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    given = vars(given)
    if given.get("resume") or given.get("eval_only"):  # the settings of the run that goes on are the defaults
        earlier = (earlier_run(out_folder(given.get("out_dir", "auto"))) or {}).get("settings", {})
        given = {**{f.name: earlier[f.name] for f in fields
                    if f.name in earlier and (not f.metadata["free"] or f.name == "compare")}, **given}
    if given.get("size", "auto") == "auto":
        given["size"] = "tiny" if pick_device(given.get("device", "auto")).type == "cpu" else "char"
    return Settings(**{**SIZES.get(given["size"], {}), **given})


def out_folder(name):
    return Path(f"out/{SCRIPT.removeprefix('nano_')}" if name == "auto" else name).resolve()


def earlier_run(out):
    """results.json of the run in a folder, or None where there is none of this project's."""
    try:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return found if found["script"].startswith("nano_") and isinstance(found["arms"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def pick_device(name):
    """torch.device for --device; auto takes CUDA, then Apple's GPU, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is not one of auto, cuda, cuda:N, mps, cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch finds no Apple GPU; use --device auto")
    return device
# ==== end shared


# ---------------------------------------------------------------------------------------------------------------------
# The technique: attention computed once per block, then evolved through depth
# ---------------------------------------------------------------------------------------------------------------------

def time_signal(l, C):
    """s^l = [sin(theta p)]_p ++ [cos(theta p)]_p,  theta = l pi / 64,  p = 0 .. C/2 - 1: (C,), float64."""
    angle = l * math.pi / 64 * torch.arange(C // 2, dtype=torch.float64)
    return torch.cat([angle.sin(), angle.cos()])


def widen(x):
    """To float32, unless it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def initial_scores(q, k, real=None):
    """A0 = q k^T / sqrt(D'), twice (B, H, T, D') -> (B, H, T, T), in float32 or wider, -inf where a query must not look: in the
    future or, in an encoder, at padding. real: (B, T), False where there is padding; None: a decoder, causal."""
    with torch.autocast(q.device.type, enabled=False):
        A0 = widen(q) * q.size(-1) ** -0.5 @ widen(k).transpose(-1, -2)
    hidden = torch.ones_like(A0[0, 0], dtype=torch.bool).triu(1) if real is None else ~real[:, None, None]
    return A0.masked_fill(hidden, -math.inf)


def key_bias(k, W, depth, n_head):
    """b^l_nj = K_j . (W_n T^l_n) for the L layers of a block: all that evolution comes to.

    k: keys, not yet cut into heads (B, T, 2C); W: W_Q^t (2C, C); depth: T^l (L, C). The C columns of W and T^l belong to the
    heads, C/H each. Returns b (L, B, H, T), in float32 or wider, since it goes into an exponent.
    """
    W, depth = W.unflatten(1, (n_head, -1)), depth.unflatten(1, (n_head, -1))             # (2C, H, C/H), (L, H, C/H)
    u = (W[:, None] * depth).sum(-1)                                                      # (2C, L, H)
    with torch.autocast(k.device.type, enabled=False):
        b = widen(k) @ widen(u).flatten(1)                                                # (B, T, L H)
    return b.unflatten(-1, u.shape[1:]).permute(2, 0, 3, 1)


def exponentials(q, k, real=None):
    """E0 = exp(A0 - max_j A0), computed once in a block; 0 where a query must not look. As initial_scores."""
    A0 = initial_scores(q, k, real)
    return (A0 - A0.detach().amax(-1, keepdim=True)).exp_()


def evolved_exp(E0, v, b):
    """softmax(A0 + b) v = (E0 @ (w v)) / (E0 @ w), w = exp(b): a layer without exponentials of its own, and without Q and K.

    E0: (B, H, T, T); v: (B, H, T, D); b: (B, H, T). Returns (B, H, T, D). b is clamped to +-40, so that nothing overflows in
    float32: a bias beyond that counts as 40. To subtract the maximum instead would show every query the largest of the future.
    """
    w = b.clamp(-40, 40).exp()[..., None]
    with torch.autocast(v.device.type, enabled=False):
        y, total = (E0 @ torch.cat([w * v, w], -1)).split([v.size(-1), 1], -1)            # (B, H, T, D), (B, H, T, 1)
    return (y / total).to(v.dtype)


def evolved_sdpa(q, k, v, b, real=None):
    """The same from a fused kernel, which writes no T x T matrix, but computes A0 again in every layer. The bias is a channel:

        [q_i, sqrt(D')] . [k_j, b_j] / sqrt(D') = A0_ij + b_j

    as a power of two times two numbers, since queries and keys may be bfloat16: what b is rounded to, and what is left.
    q, k: (B, H, T, D'); v: (B, H, T, D); b: (B, H, T). Returns (B, H, T, D).
    """
    D = q.size(-1)
    power = 2.0 ** round(math.log2(D) / 2)                                                # about sqrt(D')
    b = b[..., None] * (math.sqrt(D) / power)
    upper = b.to(k.dtype)
    spare = -(D + 2) % 8                                                                  # fused kernels want multiples of 8
    q = torch.cat([q, q.new_full((*q.shape[:-1], 2), power), q.new_zeros((*q.shape[:-1], spare))], -1)
    k = torch.cat([k, upper, (b - upper).to(k.dtype), k.new_zeros((*k.shape[:-1], spare))], -1)
    y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, q.size(-1) - v.size(-1))).to(q.dtype), scale=D ** -0.5,
                                       attn_mask=None if real is None else real[:, None, None], is_causal=real is None)
    return y[..., :v.size(-1)]


class EvolvedLayer(nn.Module):
    """What a layer of a block has of its own: c^l of T^l = c^l s^l, the output projection W_O, a feed-forward part, two norms."""

    def __init__(self, s, block, l):
        super().__init__()
        C, self.depth = s.n_embd, l
        self.ln_1, self.ln_2, self.dropout = layer_norm(s), layer_norm(s), s.dropout
        self.c_proj = nn.Linear(C, C, bias=False)
        if s.evolve == "on":
            self.c = nn.Parameter(torch.empty(C).uniform_(-math.sqrt(6 / C), math.sqrt(6 / C)))
            self.register_buffer("signal", time_signal(l, C).float(), persistent=False)
        self.ffn = RandomFF(s, block, l) if s.ffn == "random" else FullFF(s)

    def forward(self, x, attend, b):  # (B, T, C) -> (B, T, C)
        x = x + F.dropout(self.c_proj(attend(self.ln_1(x), b)), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ln_2(x)), self.dropout, self.training)


class EvolvedBlock(nn.Module):
    """L layers with one interaction, computed from the block's input: (B, T, C) -> what leaves each of the L layers, (B, T, C).
    The last of these has been through the block's LayerNorm."""

    def __init__(self, s, index):
        super().__init__()
        L, C = s.n_layer // s.blocks, s.n_embd
        self.n_head, self.dropout, self.impl, self.evolve = s.n_head, s.dropout, s.evolve_impl, s.evolve == "on"
        self.c_q, self.c_k = (nn.Linear(C, 2 * C, bias=False) for _ in range(2))          # W_Q^x, W_K^x
        if self.evolve:
            self.c_t = nn.Linear(C, 2 * C, bias=False)                                    # W_Q^t
        self.layers = nn.ModuleList(EvolvedLayer(s, index, l + s.time_depth_offset) for l in range(L))
        self.ln = layer_norm(s) if index + 1 < s.blocks else nn.Identity()                # the last block's is the model's ln_f

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def interaction(self, x):
        """The block's input (B, T, C) -> queries, keys (B, H, T, D'), D' = 2C/H, and the biases b^l (L, B, H, T)."""
        q, k = (F.dropout(m(x), self.dropout, self.training) for m in (self.c_q, self.c_k))
        if self.evolve:
            depth = torch.stack([layer.c * layer.signal for layer in self.layers])        # T^l = c^l s^l
            b = key_bias(k, self.c_t.weight, depth, self.n_head)
        else:
            b = widen(k).new_zeros(len(self.layers), len(k), self.n_head, k.size(1))
        return self.heads(q), self.heads(k), b

    def implementation(self, x):
        return faster_impl(x.device.type, x.size(1)) if self.impl == "auto" else self.impl

    def forward(self, x, real=None):
        q, k, biases = self.interaction(x)
        E0 = exponentials(q, k, real) if self.implementation(x) == "exp" else None

        def attend(v, b):  # values are the normed stream itself (B, T, C), cut into heads; b (B, H, T)
            v = self.heads(v)
            y = evolved_sdpa(q, k, v, b, real) if E0 is None else evolved_exp(E0, v, b)
            return y.transpose(1, 2).flatten(2)

        states = []
        for layer, b in zip(self.layers, biases):
            x = layer(x, attend, b)
            states.append(x)
        return [*states[:-1], self.ln(x)]


def faster_impl(device, T):
    """What --evolve_impl auto takes: on a CPU the faster as measured (tests/bench.py transevolve); elsewhere, where neither was
    measured yet, the one that needs less memory."""
    return "exp" if device == "cpu" and T <= 512 else "sdpa"


# ---------------------------------------------------------------------------------------------------------------------
# The model: the blocks above, or GPT-2's; a decoder for text, an encoder for expressions
# ---------------------------------------------------------------------------------------------------------------------

# ==== shared: layers
class Attention(nn.Module):
    """Dense causal self-attention: (B, T, C) -> (B, T, C). Three matrices instead of GPT-2's one, since Muon works on each."""

    def __init__(self, s):
        super().__init__()
        self.n_head, self.dropout = s.n_head, s.dropout
        self.c_q, self.c_k, self.c_v = (nn.Linear(s.n_embd, s.n_embd, bias=s.bias) for _ in range(3))
        self.c_proj = nn.Linear(s.n_embd, s.n_embd, bias=s.bias)

    def heads(self, x):
        """(B, T, C) -> queries, keys, values, each (B, H, T, D)."""
        D = x.size(-1) // self.n_head
        return [m(x).unflatten(-1, (-1, D)).transpose(1, 2) for m in (self.c_q, self.c_k, self.c_v)]

    def merge(self, y):
        """(B, H, T, D) -> (B, T, C)."""
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training))


class MLP(nn.Module):
    """GPT-2's feed-forward layer: (B, T, C) -> (B, T, C)."""

    def __init__(self, s, hidden=None):
        super().__init__()
        self.dropout = s.dropout
        self.c_fc = nn.Linear(s.n_embd, hidden or 4 * s.n_embd, bias=s.bias)
        self.c_proj = nn.Linear(hidden or 4 * s.n_embd, s.n_embd, bias=s.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


def layer_norm(s):
    return nn.LayerNorm(s.n_embd, eps=1e-5, bias=s.bias)


def init_weights(model, s):
    """GPT-2's: N(0, 0.02), and smaller by sqrt(2 n_layer) where a layer writes to the residual stream."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * s.n_layer) if name.endswith("c_proj.weight") else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
# ==== end shared


class FullFF(nn.Module):
    """fullFF: ReLU and learned matrices of each layer, (B, T, C) -> (B, T, C). Depth does not enter."""

    def __init__(self, s):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(s.n_embd, 4 * s.n_embd), nn.Linear(4 * s.n_embd, s.n_embd)

    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu())


class RandomFF(nn.Module):
    """randomFF: two maps m -> k whose matrices are fixed, random and a function of depth, but for r = min(m, k) learned scales:

        W^l = U^l diag(s) V^l        U^l = [sin(l pi p G) | cos(l pi p G)]_p / sqrt(k)     (m, r)     p = 0, 1, ... scales the
        y = h W^l + bias             V^l = [sin(l pi q P) | cos(l pi q P)]_q / sqrt(k)     (r, k)     columns; G, P ~ N(0, 1)

    The Gaussians are drawn again from their seed wherever a model is made. A checkpoint holds that seed and their checksum.
    At l = 0 the sines are 0: the first map has rank 1, the second is 0, and the layer is its bias.
    """

    def __init__(self, s, block, l):
        super().__init__()
        C, self.l = s.n_embd, l
        self.s_1, self.s_2 = (nn.Parameter(torch.empty(C).uniform_(-math.sqrt(6 / C), math.sqrt(6 / C))) for _ in range(2))
        self.bias_1, self.bias_2 = nn.Parameter(torch.zeros(4 * C)), nn.Parameter(torch.zeros(C))
        for name, rotation in self.draw(key(s.seed, "rotations", block, l)).items():
            self.register_buffer(name, rotation, persistent=False)

    def draw(self, seed, dtype=torch.float32):
        """U and V of both maps. Angles reach thousands and are computed in float64."""
        C = len(self.bias_2)
        rng, digest = np.random.default_rng(seed), hashlib.sha256()

        def rotation(rows, columns, k, sines_only=False):
            G = rng.standard_normal((rows, columns if sines_only else columns // 2), dtype=np.float32)
            digest.update(G.astype("<f4").tobytes())
            angle = self.l * math.pi * np.arange(G.shape[1]) * G
            both = np.sin(angle) if sines_only else np.concatenate([np.sin(angle), np.cos(angle)], 1)
            return torch.from_numpy(both / math.sqrt(k)).to(dtype)

        found = dict(U_1=rotation(C, C, 4 * C), V_1=rotation(C, 4 * C, 4 * C),            # C -> 4C
                     U_2=rotation(4 * C, C, C, sines_only=True), V_2=rotation(C, C, C))   # 4C -> C: r = C of U's 4C columns
        self.drawn = dict(seed=seed, sha256=digest.hexdigest())
        return found

    def get_extra_state(self):  # goes into state_dict
        return self.drawn

    def set_extra_state(self, saved):
        if saved != self.drawn:
            for name, rotation in self.draw(saved["seed"]).items():
                getattr(self, name).copy_(rotation)
        if saved != self.drawn:
            raise UserError("numpy draws other Gaussians here than where these weights were trained: use the same numpy version")

    def forward(self, x):
        x = (x @ self.U_1 * self.s_1 @ self.V_1 + self.bias_1).relu()                     # (B, T, 4C)
        return x @ self.U_2 * self.s_2 @ self.V_2 + self.bias_2


class DenseAttention(Attention):
    def forward(self, x, real):
        if real is None:
            return super().forward(x)
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, real[:, None, None], self.dropout * self.training))


class DenseBlock(nn.Module):
    """GPT-2's; in an encoder every token sees all that are no padding."""

    def __init__(self, s):
        super().__init__()
        self.ln_1, self.attn = layer_norm(s), DenseAttention(s)
        self.ln_2, self.mlp = layer_norm(s), MLP(s)

    def forward(self, x, real=None):
        x = x + self.attn(self.ln_1(x), real)
        return [x + self.mlp(self.ln_2(x))]


class GPT(nn.Module):
    """TransEvolve, or with evolve "dense" GPT-2: a language model, or with task "listops" an encoder that classifies."""

    def __init__(self, s):
        super().__init__()
        self.block_size, self.dropout, self.task = s.block_size, s.dropout, s.task
        self.scale = 1.0 if s.evolve == "dense" else math.sqrt(s.n_embd)  # of the first scores: they see no LayerNorm
        self.wte = nn.Embedding(s.vocab_size, s.n_embd)  # also the output head of a language model
        self.wpe = nn.Embedding(s.block_size, s.n_embd)
        self.h = nn.ModuleList(DenseBlock(s) for _ in range(s.n_layer)) if s.evolve == "dense" else \
            nn.ModuleList(EvolvedBlock(s, i) for i in range(s.blocks))
        self.ln_f = layer_norm(s)
        if s.task == "listops":
            self.ln_head, self.head = layer_norm(s), nn.Linear(s.n_embd, 10)
            self.head.adamw = True  # no hidden matrix: not for Muon
        init_weights(self, s)

    def real(self, idx):
        """(B, T): which tokens are no padding; None for a language model."""
        return idx != 0 if self.task == "listops" else None

    def states(self, idx):
        """Token ids (B, T) -> the residual stream (B, T, C) after the embedding and after every layer, before ln_f. After the
        last layer of a block this is what the next block starts from: it has been through the block's LayerNorm."""
        x, real = [self.embed(idx) * self.scale], self.real(idx)
        for block in self.h:
            x += block(x[-1], real)
        return x

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab) and, with targets (B, T), the mean cross-entropy in nats.
        As an encoder: logits (B, 10), targets (B,)."""
        x = self.states(idx)[-1]
        if self.task == "lm":
            return self.read_out(x, targets)
        real = self.real(idx)[..., None]
        x = (self.ln_f(x) * real).sum(1) / real.sum(1)                                    # (B, C): the mean, without padding
        logits = self.head(self.ln_head(x))
        return logits, None if targets is None else F.cross_entropy(logits.float(), targets)

    # ==== shared: gpt
    def embed(self, idx):
        T = idx.size(1)
        assert T <= self.block_size, f"{T} tokens do not fit into a context of {self.block_size}"
        return F.dropout(self.wte(idx) + self.wpe.weight[:T], self.dropout, self.training)

    def read_out(self, x, targets=None):
        logits = F.linear(self.ln_f(x), self.wte.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=0, next_logits=None):
        """Token ids (B, T) -> (B, T+n). Beyond block_size the model sees the last block_size tokens.
        next_logits: a faster way from idx to the logits (B, vocab) of what follows, where there is one."""
        for _ in range(n):
            logits = (next_logits(idx) if next_logits else self(idx[:, -self.block_size:])[0][:, -1]).float()
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, -1), 1)
            idx = torch.cat([idx, token], 1)
        return idx
    # ==== end shared


def dense_twin(s):
    """GPT-2 of the same width and depth."""
    return build("dense", s)


# ==== shared: data
# ---------------------------------------------------------------------------------------------------------------------
# Data: token ids in train.bin and val.bin
# ---------------------------------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"


def find_data(name):
    """The folder of a prepared corpus; the known corpora are prepared where they are absent."""
    wanted = "shakespeare_char" if name == "auto" else name
    for folder in (DATA / wanted, Path(wanted)):
        if (folder / "train.bin").exists():
            return folder
    if wanted not in ("shakespeare_char", "shakespeare", "openwebtext", "stdlib", "listops"):
        raise UserError(f"--dataset {name}: there is no train.bin in {DATA / wanted}; "
                        f"python data/prepare.py --text FILE --name {name} makes one of a text of yours")
    if not (DATA / "prepare.py").exists():
        raise UserError(f"{DATA / 'prepare.py'} is missing: copy it from where you got {SCRIPT}.py, it prepares the data")
    done = subprocess.run([sys.executable, DATA / "prepare.py", wanted], text=True,
                          stderr=subprocess.PIPE if name == "auto" else None)
    if done.returncode == 0:
        return DATA / wanted
    if name != "auto":
        raise UserError(f"--dataset {name} could not be prepared, see above")
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("error: ")
    print(f"Shakespeare is not to be had here ({reason}): training on the source of Python's standard library instead")
    return find_data("stdlib")


class Data:
    """Batches of token ids from one corpus. A small corpus lives on the device, a large one stays on disk."""

    def __init__(self, s, device):
        self.folder = find_data(s.dataset)
        self.name, self.device = self.folder.name, device
        self.seed, self.batch_size, self.T = s.seed, s.batch_size, s.block_size
        meta = dict(tokenizer="gpt2", vocab_size=50257)  # of bins that come without a description
        try:
            if (self.folder / "meta.json").exists() or (self.folder / "meta.pkl").exists():  # nanoGPT's pickle is not read
                meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size, self.alphabet = meta["vocab_size"], meta["alphabet"] if meta["tokenizer"] == "char" else None
            if self.alphabet is not None and len(self.alphabet) != self.vocab_size or meta["tokenizer"] not in ("char", "gpt2"):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            self.refuse("meta.json", "is absent or does not describe a corpus")
        self.train, self.val = (self.read(split, meta.get(f"{split}_tokens")) for split in ("train", "val"))
        if self.alphabet is not None:
            ids = {c: i for i, c in enumerate(self.alphabet)}
            self.encode = lambda text: [ids[c] for c in text]
            self.decode = lambda tokens: "".join(self.alphabet[t] for t in tokens)
        else:
            try:
                bpe = tiktoken.get_encoding("gpt2")
            except (OSError, ValueError) as e:  # no network, or not GPT-2's files
                raise UserError(f"tiktoken cannot load GPT-2's vocabulary ({type(e).__name__}): connect to the network once, "
                                "or set TIKTOKEN_CACHE_DIR to a folder that holds it")
            self.encode, self.decode = bpe.encode_ordinary, bpe.decode

    def refuse(self, file, what):
        raise UserError(f"{self.folder / file} {what}: prepare {self.name} again with data/prepare.py")

    def read(self, split, tokens):
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size if path.exists() else 0
        if size == 0 or size % 2 or tokens not in (None, size // 2):
            self.refuse(path.name, f"has {size} bytes" + (f" where meta.json says {2 * tokens}" if tokens else ""))
        if size // 2 <= self.T:
            raise UserError(f"{path} has {size // 2} tokens, too few for a context of {self.T}: use a smaller --block_size")
        ids = np.memmap(path, dtype="<u2", mode="r")
        return ids if size > 2**28 else torch.from_numpy(self.check(ids, split).astype(np.int32)).to(self.device)

    def check(self, ids, split):
        if ids.max() >= self.vocab_size:
            self.refuse(f"{split}.bin", f"holds token id {ids.max()}, beyond the vocabulary of {self.vocab_size} in meta.json")
        return ids

    def rows(self, split, starts):
        """Inputs and targets (rows, T) at these offsets of a split, on the device, without waiting for it."""
        ids = getattr(self, split)
        if isinstance(ids, np.memmap):
            rows = self.check(np.stack([ids[i:i + self.T + 1] for i in starts]), split)
            rows = to_device(torch.from_numpy(rows.astype(np.int64)), self.device)
        else:
            starts = to_device(torch.as_tensor(starts), self.device)
            rows = ids[starts[:, None] + torch.arange(self.T + 1, device=self.device)].long()
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step, turn):
        """A training batch, a function of (seed, step, turn) alone; turn = rank * grad_accum + micro-step."""
        order = np.random.default_rng(key(self.seed, "batch", step, turn))
        return self.rows("train", order.integers(len(self.train) - self.T, size=self.batch_size))

    def windows(self, split, tokens=0):
        """Offsets of the fixed, disjoint windows that cover a split, or its first tokens."""
        starts = np.arange(0, len(getattr(self, split)) - self.T, self.T)
        return starts[:max(1, tokens // self.T)] if tokens else starts


def to_device(x, device):
    """A CPU tensor on the device; to CUDA through pinned memory, so that the loop does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@torch.no_grad()
def evaluate(run, model, split="val", tokens=0, **inputs):
    """Mean cross-entropy in nats over fixed windows, shared out among the processes. Dropout is off."""
    starts = run.data.windows(split, tokens)
    total = torch.zeros(2, dtype=torch.float64, device="cpu" if run.device.type == "mps" else run.device)
    was_training = model.training
    model.eval()
    for at in range(run.rank * run.settings.batch_size, len(starts), run.world * run.settings.batch_size):
        x, y = run.data.rows(split, starts[at:at + run.settings.batch_size])
        with run.autocast():
            loss = model(x, y, **inputs)[1]
        total += torch.stack([loss * len(x), torch.full_like(loss, len(x))]).to(total.device).double()
    model.train(was_training)
    if run.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()
# ==== end shared


class Expressions(Data):
    """ListOps in the place of text: rows of a value, 0 to 9, and EXPRESSION token ids, from data/prepare.py listops."""

    def __init__(self, s, device):
        self.folder = find_data("listops" if s.dataset == "auto" else s.dataset)
        self.name, self.device = self.folder.name, device
        self.seed, self.batch_size, self.T = s.seed, s.batch_size, s.block_size
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.words, self.vocab_size, self.alphabet = meta["words"], meta["vocab_size"], None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder} holds no expressions: use --dataset listops with --task listops")
        for split in ("train", "val"):
            if (size := (self.folder / f"{split}.bin").stat().st_size) % (2 * self.T + 2) or not size:
                self.refuse(f"{split}.bin", f"has {size} bytes, which are not rows of {self.T + 1} numbers")
        self.train, self.val = (self.read(split, meta.get(f"{split}_tokens")) for split in ("train", "val"))

    def rows(self, split, starts):
        """Token ids (rows, T) and values (rows,), on the device."""
        starts = to_device(torch.as_tensor(starts), self.device)
        rows = getattr(self, split).view(-1, self.T + 1)[starts].long()
        return rows[:, 1:], rows[:, 0]

    def batch(self, step, turn):
        order = np.random.default_rng(key(self.seed, "batch", step, turn))
        return self.rows("train", order.integers(len(self.train) // (self.T + 1), size=self.batch_size))

    def windows(self, split, tokens=0):
        """Numbers of the rows of a split, or of the first that have so many tokens."""
        rows = np.arange(len(getattr(self, split)) // (self.T + 1))
        return rows[:max(1, tokens // self.T)] if tokens else rows


# ==== shared: training
# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Run:
    """Where and on what this process works."""
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    why: str  # the reason for dtype
    rank: int
    world: int
    data: Data = None
    out: Path = None
    lock: object = None

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def print(self, *lines):
        if self.rank == 0:
            print(*lines, sep="\n", flush=True)


def pick_dtype(name, device):
    """(torch.dtype, why): bfloat16 where the device has it natively, else float16 on CUDA, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "float16" and device.type != "cuda":
        raise UserError("--dtype float16 needs CUDA: use bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name), "asked for"
    if native:
        return torch.bfloat16, "native on this GPU"
    if device.type == "cuda":
        return torch.float16, "this GPU only emulates bfloat16; the loss is scaled"
    return torch.float32, f"the default on {device.type}"


def make_optimizers(model, s, device):
    """Muon for the hidden matrices; AdamW for embeddings (which are the head too), norms, biases and modules with an
    attribute adamw."""
    others = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or hasattr(m, "adamw") for p in m.parameters()}
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2]
    hidden = [p for p in matrices if p.ndim == 2 and id(p) not in others] if s.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    groups = [dict(params=[p for p in matrices if id(p) not in taken], weight_decay=s.weight_decay),
              dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=s.learning_rate, betas=(0.9, 0.99),
                                    fused=device.type != "mps")]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=s.muon_lr, weight_decay=s.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(s, step, span=None):
    """Share of the peak learning rate: linear warm-up, then a cosine down to min_lr at the last step of the span."""
    first, last = span or (0, s.max_iters)
    if step - first < s.warmup_iters:
        return (step - first + 1) / (s.warmup_iters + 1)
    low = s.min_lr / s.learning_rate if s.learning_rate else 0.0
    done = (step - first - s.warmup_iters) / max(1, last - first - s.warmup_iters)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def write(path, content):
    """Write text, or an object by torch.save, so that path holds either the old or the new content, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content.encode()) if isinstance(content, str) else torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # RuntimeError is torch.save's word for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} could not be written ({str(e).splitlines()[0]}): free some space or choose another --out_dir, "
                        "then go on with --resume") from e


def snapshot(run, arm, model, step, **more):
    """What a checkpoint holds: tensors, numbers and strings only, so that torch.load(weights_only=True) reads it."""
    return dict(script=SCRIPT, arm=arm, step=step, settings=dataclasses.asdict(run.settings), world=run.world,
                model=model.state_dict(), **more)


def read_checkpoint(run, path, arm):
    """The content of a checkpoint, after checking that it belongs to this script, arm and settings."""
    try:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        script, settings = (saved["script"], saved["arm"]), saved["settings"]
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # a file that is no checkpoint can make torch.load raise almost anything
        raise UserError(f"{path} is not a checkpoint of {SCRIPT}.py ({type(e).__name__}): move it away")
    if script != (SCRIPT, arm):
        raise UserError(f"{path} belongs to {' '.join(map(str, script))}, not to {SCRIPT} {arm}: use another --out_dir")
    other = [f"--{f.name} {dict([(True, 'on'), (False, 'off')]).get(value, value) if f.type is bool else value}"
             for f in dataclasses.fields(Settings) for value in [settings.get(f.name)]
             if not f.metadata["free"] and value != getattr(run.settings, f.name)]
    if other:
        raise UserError(f"{path} was trained with {' '.join(other)}: repeat these flags, or use another --out_dir")
    return saved


def compiled(run, model, extra, span):
    """The model as training calls it: compiled if asked for and possible. The model itself stays as it is, for evaluation."""
    s = run.settings
    if s.compile == "off" or s.compile == "auto" and run.device.type != "cuda":
        return model
    torch.compiler.reset()
    start, fast = time.perf_counter(), torch.compile(model)
    try:  # forward and backward through each graph of the run, so that no later step has to wait, or fails
        for step in (span[0], max(span[0], span[1] - 1)):
            x, y = run.data.batch(0, 0)
            with run.autocast():
                loss = fast(x, y, **extra(step, 0))[1]
            loss.backward()
        run.print(f"compiled in {time.perf_counter() - start:.0f} s")
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the chain of compilers may raise anything; training goes on without it, and says so
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:160]
        run.print(f"torch.compile failed ({reason}): training goes on uncompiled")
        fast = model
    model.zero_grad(set_to_none=True)
    return fast


def train(run, arm, model, extra=lambda step, turn: {}, keep={}, span=None):
    """Train model for max_iters steps, or go on from out/arm/ckpt.pt; returns what results.json says of the training.

    extra(step, turn): further inputs of the model's forward in that step, such as a draw of the technique.
    keep: {step: name of a file in out/arm for the weights before that step}.
    span: (first, last) step, for one phase of several: each has optimizers and a learning-rate schedule of its own.
    Writes into out/arm: ckpt.pt at the first step and after every evaluation (all that a resumed run needs), best.pt (the
    weights with the lowest validation loss), log.jsonl (a line for every evaluation).
    """
    s, folder = run.settings, run.out / arm
    first, last = span = span or (0, s.max_iters)
    optimizers = make_optimizers(model, s, run.device)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    now = dict(step=first, train_seconds=0.0, val_loss=math.nan, best_val_loss=math.inf, best_step=first,
               loss_sum=0.0, loss_steps=0, log=[])  # the training loss since the last evaluation, and the lines of log.jsonl
    resumed = (folder / "ckpt.pt").exists()
    if resumed:
        saved = read_checkpoint(run, folder / "ckpt.pt", arm)
        model.load_state_dict(saved["model"])
        for o, state in zip(optimizers, saved["optimizers"], strict=True):
            o.load_state_dict(state)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        now = saved["now"]
        if saved["world"] != run.world:
            raise UserError(f"{folder / 'ckpt.pt'} was trained by {saved['world']} processes: go on with as many")
        del saved
    groups = [group for o in optimizers for group in o.param_groups]
    fast = compiled(run, model, extra, span)
    if run.world > 1:
        fast = nn.parallel.DistributedDataParallel(fast, device_ids=[run.device.index] if run.device.type == "cuda" else None,
                                                   broadcast_buffers=False)
    model.train()
    loss_sum = torch.tensor(now["loss_sum"], device=run.device)
    nonfinite = torch.tensor(-1, device=run.device)  # the first step whose loss was not finite
    advice = f"{folder / 'ckpt.pt'} is from before it; train again with a lower --learning_rate and --muon_lr"

    def look():  # waits for the device, so only where a number is shown or saved
        if nonfinite.item() >= 0:
            raise UserError(f"the loss of step {nonfinite.item()} is not finite: {advice}")
        now["loss_sum"] = loss_sum.item()
        return time.perf_counter()

    def ask(*_):  # Ctrl-C: save, then end; a second one ends at once
        stop.append(True)
        signal.signal(signal.SIGINT, before)

    stop, before = [], signal.getsignal(signal.SIGINT)
    if run.world == 1:  # several processes would have to agree on the step; they go on from the last evaluation
        signal.signal(signal.SIGINT, ask)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens = run.world * s.grad_accum * s.batch_size * s.block_size  # in a step
    with contextlib.ExitStack() as ending:
        ending.callback(signal.signal, signal.SIGINT, before)
        bar = ending.enter_context(tqdm(total=last, initial=now["step"], desc=arm, unit="step", disable=run.rank > 0,
                                        dynamic_ncols=True, mininterval=1))
        clock = shown = look()
        while True:
            step = now["step"]
            if step in keep and run.rank == 0:
                write(folder / keep[step], snapshot(run, arm, model, step))
            due = (step % s.eval_interval == 0 or step in span) and not resumed
            if due or stop:
                now["train_seconds"] += look() - clock
                if due:
                    now["val_loss"] = evaluate(run, model, tokens=s.eval_tokens)
                    line = dict(step=step, train_seconds=round(now["train_seconds"], 3), val_loss=now["val_loss"],
                                train_loss=now["loss_sum"] / now["loss_steps"] if now["loss_steps"] else None)
                    if inputs := extra(step, 0):
                        line["val_loss_as_trained"] = evaluate(run, model, tokens=s.eval_tokens, **inputs)
                    if not math.isfinite(now["val_loss"]):
                        raise UserError(f"the validation loss after step {step} is not finite: {advice}")
                    now["log"].append(line)
                    now["loss_sum"], now["loss_steps"] = 0.0, 0
                    loss_sum.zero_()
                better = now["val_loss"] < now["best_val_loss"]
                if better:
                    now["best_val_loss"], now["best_step"] = now["val_loss"], step
                if run.rank == 0:
                    if better:
                        write(folder / "best.pt", snapshot(run, arm, model, step))
                    write(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in now["log"]))
                    write(folder / "ckpt.pt", snapshot(run, arm, model, step, now=now, scaler=scaler.state_dict(),
                                                       optimizers=[o.state_dict() for o in optimizers]))
                if stop:
                    where = "" if s.out_dir == "auto" else f" --out_dir {s.out_dir}"
                    raise KeyboardInterrupt(f"stopped after step {step}, saved in {folder}: go on with --resume{where}")
                clock = time.perf_counter()
            resumed = False
            if step == last:
                break

            for group in groups:
                group["lr"] = group["peak_lr"] * lr_factor(s, step, span)
            for micro in range(s.grad_accum):
                turn = run.rank * s.grad_accum + micro
                x, y = run.data.batch(step, turn)
                inputs = extra(step, turn)
                torch.manual_seed(key(s.seed, "dropout", step, turn))
                with contextlib.nullcontext() if run.world == 1 or micro == s.grad_accum - 1 else fast.no_sync():
                    with run.autocast():
                        loss = fast(x, y, **inputs)[1]
                    scaler.scale(loss / s.grad_accum).backward()
                loss_sum += loss.detach() / s.grad_accum
                nonfinite = torch.where((nonfinite < 0) & ~loss.detach().isfinite(), step, nonfinite)
            for o in optimizers:
                scaler.unscale_(o)
            norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
            if not scaler.is_enabled() or norm.isfinite():  # float16 may overflow: no optimizer takes such a step
                for o in optimizers:
                    scaler.step(o)
            scaler.update()
            model.zero_grad(set_to_none=True)
            now["step"] += 1
            now["loss_steps"] += 1
            bar.update()
            if run.rank == 0 and time.perf_counter() - shown > 1:
                shown = look()
                speed = tokens * (now["step"] - first) / (now["train_seconds"] + shown - clock)
                bar.set_postfix_str(f"loss {now['loss_sum'] / now['loss_steps']:.3f}, val {now['val_loss']:.3f}, "
                                    f"{speed / 1e3:.1f}k tokens/s", refresh=False)
    return summary(run, arm, model, now, now["step"] - first)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}  # bf16, dense


def summary(run, arm, model, now, steps):
    """What results.json says of an arm's training, of so many steps."""
    s, cuda, flops = run.settings, run.device.type == "cuda", flops_per_token(run.settings, arm)
    tokens = run.world * s.grad_accum * s.batch_size * s.block_size * steps
    speed = tokens / max(now["train_seconds"], 1e-9)
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    name = torch.cuda.get_device_name() if cuda and run.dtype != torch.float32 else ""
    peak = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
    return dict(val_loss=now["val_loss"], best_val_loss=now["best_val_loss"], best_step=now["best_step"],
                train_loss=evaluate(run, model, "train", s.eval_tokens or len(run.data.val)), parameters=parameters,
                parameters_non_embedding=parameters - embeddings, flops_per_token=flops, train_seconds=now["train_seconds"],
                tokens_per_second=speed, mfu=peak and flops * speed / run.world / peak,
                peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else None)

# ==== end shared


# ---------------------------------------------------------------------------------------------------------------------
# The arms, and the evaluation that shows the paper's claims
# ---------------------------------------------------------------------------------------------------------------------

# The first is trained always, the others with --compare. off: without evolution. other_ffn: with the other feed-forward part.
# small, small_other: the dense twin, its width chosen so that it has as many weights (embeddings aside) as technique, other_ffn.
ARMS = ("technique", "dense", "small", "off", "other_ffn", "small_other")


def settings_of(arm, s):
    """The settings of an arm's model, and the hidden width of a dense one's MLPs."""
    if arm == "technique":
        return s, 4 * s.n_embd
    s = dataclasses.replace(s, compare=False)
    if arm in ("other_ffn", "small_other"):
        s = dataclasses.replace(s, ffn="random" if s.ffn == "full" else "full")
    if arm in ("off", "other_ffn"):
        return dataclasses.replace(s, evolve="off" if arm == "off" else s.evolve), 4 * s.n_embd
    dense = dataclasses.replace(s, evolve="dense")
    if arm == "dense":
        return dense, 4 * s.n_embd
    goal = weights(s)
    dense.n_embd = s.n_head * max(1, round(s.n_embd / s.n_head * math.sqrt(goal / weights(dense))))
    left = (goal - weights(dense)) / s.n_layer / (2 * dense.n_embd + s.bias)  # what the whole heads miss, in hidden units
    return dense, max(1, 4 * dense.n_embd + round(left))


def weights(s):
    """How many parameters a model has, embeddings aside."""
    with torch.device("meta"):
        model = GPT(s)
    return sum(p.numel() for p in model.parameters()) - model.wte.weight.numel() - model.wpe.weight.numel()


def build(arm, s):
    s, hidden = settings_of(arm, s)
    model = GPT(s)
    if hidden != 4 * s.n_embd:
        for block in model.h:
            block.mlp = MLP(s, hidden)
        init_weights(model, s)
    return model


def flops_per_token(s, arm):
    """Training FLOPs for a token, forward and backward. 6 for each weight in a matrix product (the tied head is one, the
    embedding is not), 4 for each fixed one, and 6 for each channel of each entry of a map, in the scores and on the values: the
    square in full, although a fused causal kernel leaves half of it out."""
    s, hidden = settings_of(arm, s)
    C, H, T, L = s.n_embd, s.n_head, s.block_size, s.n_layer
    head = C * s.vocab_size if s.task == "lm" else 10 * C / T
    if s.evolve == "dense":
        return 6 * (L * (4 * C * C + 2 * C * hidden) + head) + 12 * L * T * C
    learned = s.blocks * 4 * C * C + L * C * C + (s.evolve == "on") * L * 2 * C * H + (s.ffn == "full") * L * 8 * C * C + head
    fixed = (s.ffn == "random") * L * 10 * C * C
    wide = 2 * C // H + 2  # channels in evolved_sdpa
    wide += -wide % 8
    impl = faster_impl(pick_device(s.device).type, T) if s.evolve_impl == "auto" else s.evolve_impl
    channels = s.blocks * 2 * C + L * (C + H) if impl == "exp" else L * 2 * wide * H
    return 6 * learned + 4 * fixed + 6 * T * channels


def load_data(s, device):
    """What start() makes Run.data of."""
    return Expressions(s, device) if s.task == "listops" else Data(s, device)


def train_arm(run, arm, model):
    return train(run, arm, model)


def attention_maps(model, idx):
    """Token ids (B, T) -> for each layer its map (B, H, T, T) and its bias (B, H, T), zeros without evolution; and how many
    products Q K^T that took."""
    real, x, maps, biases, products = model.real(idx), model.states(idx), [], [], 0
    for block in model.h:
        if isinstance(block, DenseBlock):
            q, k, _ = block.attn.heads(block.ln_1(x[len(maps)]))
            b = widen(q).new_zeros(1, *q.shape[:3])
        else:
            q, k, b = block.interaction(x[len(maps)])
        A0 = initial_scores(q, k, real)
        products += 1
        maps += [(A0 + bias[:, :, None]).softmax(-1) for bias in b]
        biases += list(b)
    return maps, biases, products


@torch.no_grad()
def measure(run, model):
    """Cross-entropy in nats and accuracy on the validation split (--eval_tokens of it): of the next token, or of the value."""
    s, loss, hits, n = run.settings, 0.0, 0, 0
    starts = run.data.windows("val", s.eval_tokens)
    for at in range(0, len(starts), s.batch_size):
        x, y = run.data.rows("val", starts[at:at + s.batch_size])
        with run.autocast():
            z = model(x)[0].flatten(0, -2).float()
        y = y.flatten()
        loss, hits, n = loss + F.cross_entropy(z, y, reduction="sum"), hits + (z.argmax(-1) == y).sum(), n + len(y)
    return dict(val_loss=loss.item() / n, accuracy=hits.item() / n)


@torch.no_grad()
def evaluate_arm(run, arm, model):
    """measure(), and how attention changes with depth, averaged over heads, windows and queries:

    qk_products      how many Q K^T a forward pass needs; qk_computed: how many it computes, with sdpa one in every layer
    bias_by_depth    standard deviation of b^l over the keys; bias_largest: the largest |b|, which exp clamps at 40
    map_distance     total variation 1/2 sum_j |P_ij - P'_ij| between a head's map and the same head's in the layer below,
                     0: the same, 1: disjoint; of a decoder's queries the first eighth, which sees little, is left out
    frozen           measure() with b = 0 in all layers, without having been trained for it
    """
    s = run.settings
    model.eval()
    starts = run.data.windows("val")
    starts = starts[np.linspace(0, len(starts) - 1, min(s.map_windows, len(starts))).astype(int)]
    spread, distance, largest = 0, 0, 0.0
    rows = max(1, 2**24 // (s.n_head * s.block_size ** 2))
    for at in range(0, len(starts), rows):
        x = run.data.rows("val", starts[at:at + rows])[0]
        with run.autocast():
            maps, biases, products = attention_maps(model, x)
        real = model.real(x)
        keys = torch.ones_like(x) if real is None else real.long()                        # (B, T)
        seen = keys * (torch.arange(x.size(1), device=x.device) >= x.size(1) // 8) if real is None else keys
        share = len(x) / len(starts)
        b = torch.stack(biases) * keys[:, None]                                           # (L, B, H, T)
        mean = b.sum(-1, keepdim=True) / keys.sum(-1)[:, None, None]
        spread += (((b - mean) ** 2 * keys[:, None]).sum(-1) / keys.sum(-1)[:, None]).sqrt().mean((1, 2)) * share
        largest = max(largest, b.abs().max().item())
        tv = torch.stack([(above - below).abs().sum(-1) / 2 for below, above in zip(maps, maps[1:])] or [maps[0][..., 0] * 0])
        distance += ((tv * seen[:, None]).sum(-1) / seen.sum(-1)[:, None]).mean((1, 2)) * share
    again = any(isinstance(block, EvolvedBlock) and block.implementation(x) == "sdpa" for block in model.h)
    found = dict(**measure(run, model), qk_products=products, qk_computed=len(maps) if again else products,
                 map_distance=distance.tolist())
    if isinstance(model.h[0], EvolvedBlock) and model.h[0].evolve:
        found.update(bias_by_depth=spread.tolist(), bias_largest=largest)
        kept = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".c")}
        for p in (model.get_parameter(name) for name in kept):
            p.zero_()
        found["frozen"] = measure(run, model)
        for name, c in kept.items():
            model.get_parameter(name).copy_(c)
    return found


def report(run, arms, model):
    """The tables, and a sample: of text, or of expressions with the values that the model gives them."""
    s = run.settings
    names = dict(technique=dict(on="TransEvolve", off="no evolution", dense="dense twin")[s.evolve], dense="dense twin",
                 small="dense, as many weights", off="no evolution", other_ffn="other feed-forward", small_other="dense, as many as that")
    rows = [["best weights", "loss", "accuracy", "b = 0: loss", "accuracy", "weights", "Q K^T", "computed", "largest b"]]
    depth = [["how much maps change, layer", *(f"{l} to {l + 1}" for l in range(s.n_layer - 1))]]
    bias = [["standard deviation of b, layer", *map(str, range(s.n_layer))]]
    for arm, found in arms.items():
        e = found["evaluation"]
        frozen = e.get("frozen", {})
        rows.append([names[arm], e["val_loss"], e["accuracy"], frozen.get("val_loss"), frozen.get("accuracy"),
                     found.get("parameters_non_embedding"), e["qk_products"], e["qk_computed"], e.get("bias_largest")])
        depth.append([names[arm], *(f"{d:.3f}" for d in e["map_distance"])])
        if "bias_by_depth" in e:
            bias.append([names[arm], *(f"{d:.3f}" for d in e["bias_by_depth"])])
    print("\n" + "\n\n".join(table(rows) for rows in (rows, depth, bias) if len(rows) > 1 and len(rows[0]) > 1))
    if s.task == "lm":
        sample(run, model)
        return
    x, y = run.data.rows("val", run.data.windows("val")[:5])
    with run.autocast(), torch.no_grad():
        values = model(x)[0].argmax(-1).tolist()
    print("\nvalue, the model's, expression:", *(f"{value}  {found}  {' '.join(run.data.words[i] for i in ids if i)}"
                                                for ids, value, found in zip(x.tolist(), y.tolist(), values)), sep="\n")


# ==== shared: main
# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------

def table(rows):
    """Rows in aligned columns, the first row a heading: text as it is, small fractions to four places, None as a dash."""
    def show(c):
        return "-" if c is None else c if isinstance(c, str) else f"{c:.4f}" if abs(c) < 10 and c % 1 else f"{c:,.0f}"

    rows = [list(map(show, row)) for row in rows]
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(c.rjust(n) if i else c.ljust(n) for i, (c, n) in enumerate(zip(row, width))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def open_out(s):
    """The folder for what the run writes, and its lock. An older run is moved aside, what is no run is left alone."""
    out = out_folder(s.out_dir)
    earlier = earlier_run(out)
    if s.resume or s.eval_only:
        if not earlier:
            raise UserError(f"there is no run in {out} (no results.json of these scripts): name its folder with --out_dir, "
                            "or train one, without --resume and --eval_only")
    elif earlier:
        lock(out).close()
        aside = next(p for n in range(1, 10**6) if not (p := out.with_name(f"{out.name}.{n}")).exists())
        out.rename(aside)
        print(f"moved the earlier run aside, to {aside}")
    elif out.is_dir() and set(os.listdir(out)) - {"lock"}:
        raise UserError(f"{out} holds files that are no run of these scripts: use another --out_dir")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return out, lock(out)
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e.strerror}): use another --out_dir")


def lock(out):
    """An open file that no live process but this one can lock, so that two runs never write to one folder."""
    held = open(out / "lock", "w")
    try:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ModuleNotFoundError:  # Windows
        pass
    except BlockingIOError:
        raise UserError(f"another run is writing to {out}: wait for it, or use another --out_dir")
    return held


def start(s):
    """Settings -> Run: processes (under torchrun), device, precision, data, folder. Prints the header."""
    rank, local, world = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    world = max(1, world)
    device = pick_device(s.device)
    if device.type == "cuda":
        device = pick_device(f"cuda:{local if world > 1 else device.index or 0}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    run = Run(s, device, *pick_dtype(s.dtype, device), rank, world)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if local > 0:
            dist.barrier()  # one process of each machine prepares the data, the others then find them ready
    run.data = load_data(s, device)
    if world > 1 and local == 0:
        dist.barrier()
    s.dataset = run.data.name if run.data.folder.parent == DATA else str(run.data.folder.resolve())  # what auto came to
    s.vocab_size = run.data.vocab_size
    if s.prompt == Settings.prompt and run.data.alphabet and s.prompt not in run.data.alphabet:
        s.prompt = run.data.alphabet[0]  # a corpus without line breaks
    if unknown := sorted(set(s.prompt) - set(run.data.alphabet or s.prompt)):
        raise UserError(f"--prompt has {unknown}, which {run.data.name} lacks: its characters are {run.data.alphabet!r}")
    if not s.prompt:
        raise UserError("--prompt is empty: give the sample at least one character to go on from")
    run.out, run.lock = open_out(s) if rank == 0 else (None, None)
    if world > 1:
        dist.broadcast_object_list(out := [run.out])
        run.out = out[0]
    gpu = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else ""
    run.print(f"{SCRIPT} on {run.data.name}: {len(run.data.train):,} + {len(run.data.val):,} tokens, vocabulary {s.vocab_size}",
              f"{device}{gpu}, {world} process{'es' * (world > 1)} of {torch.get_num_threads()} threads, "
              f"{str(run.dtype).removeprefix('torch.')} ({run.why}), torch {torch.__version__}",
              f"{s.n_layer} layers, {s.n_head} heads, width {s.n_embd}, context {s.block_size}; {s.max_iters:,} steps of "
              f"{world * s.grad_accum * s.batch_size * s.block_size:,} tokens with {s.optimizer}; results in {run.out}")
    return run


def work(s):
    """Train and evaluate the arms, print the tables and a sample; returns the content of results.json."""
    run = start(s)
    path = run.out / "results.json"
    git = shutil.which("git") and subprocess.run(["git", "-C", DATA.parent, "describe", "--always", "--dirty"],
                                                 capture_output=True, text=True).stdout.strip()
    results = (s.resume or s.eval_only) and earlier_run(run.out) or dict(
        script=SCRIPT, dataset=run.data.name, device=str(run.device), dtype=str(run.dtype).removeprefix("torch."),
        torch=torch.__version__, git=git or None, seed=s.seed, settings=dataclasses.asdict(s), arms={})
    if run.rank == 0:
        write(path, json.dumps(results, indent=1))
    first = None
    arms = [arm for arm in ARMS if s.compare or arm == ARMS[0] or s.eval_only and arm in results["arms"]]
    for arm in arms:
        torch.manual_seed(key(s.seed, "weights"))
        model = build(arm, s).to(run.device)
        best = run.out / arm / "best.pt"
        if s.eval_only and not best.exists():
            raise UserError(f"{best} does not exist: train first, without --eval_only")
        trained = "val_loss" in results["arms"].get(arm, {})
        if not trained and not s.eval_only:
            results["arms"][arm] = train_arm(run, arm, model)
        if run.rank == 0:  # the best weights, and their evaluation
            model.load_state_dict(read_checkpoint(run, best, arm)["model"])
            if not trained or s.eval_only:
                results["arms"][arm] = {**results["arms"].get(arm, {}), "evaluation": evaluate_arm(run, arm, model)}
                write(path, json.dumps(results, indent=1))
        first = first or model.cpu()
    if run.rank == 0:
        columns = dict(val_loss="val loss", best_val_loss="best", train_loss="train", parameters="parameters",
                       flops_per_token="FLOPs/token", train_seconds="seconds", tokens_per_second="tokens/s", mfu="MFU",
                       peak_memory_bytes="peak bytes")
        shown = [[arm, *(found.get(name) for name in columns)] for arm, found in results["arms"].items()]
        print("\n" + table([["arm", *columns.values()], *shown]))
        report(run, results["arms"], first.to(run.device).eval())  # may add to the evaluations what takes several arms
        write(path, json.dumps(results, indent=1))
    if run.world > 1:
        dist.destroy_process_group()
    return results


def sample(run, model, **how):
    """Print text that goes on from --prompt, and return its token ids (1, T). how: further arguments of model.generate."""
    s = run.settings
    torch.manual_seed(key(s.seed, "sample"))
    idx = torch.tensor([run.data.encode(s.prompt)], device=run.device)
    with run.autocast():
        idx = model.generate(idx, s.sample_tokens, s.temperature, s.top_k, **how)
    print("\nA sample:", run.data.decode(idx[0].tolist()), sep="\n")
    return idx


def main(argv=None):
    """Run the script; returns the content of results.json. What the user can put right ends it in one line."""
    try:
        return work(parse(argv))
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = str(e)
    except torch.OutOfMemoryError:
        message = "the device has too little memory: use a smaller --batch_size and a larger --grad_accum"
    except KeyboardInterrupt as e:
        message = str(e) or "stopped"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
# ==== end shared
