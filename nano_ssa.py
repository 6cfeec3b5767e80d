# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm", "pytest"]
# ///
"""
Stochastically Subsampled self-Attention (SSA)

    "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles"
    Hussain, Zaki and Subramanian, KDD 2023, https://arxiv.org/abs/2306.01705

In training, attention costs T^2. The paper's hypothesis: a trained transformer is an ensemble of sparse sub-models, its
"information pathways"; each input uses its own few, but all of them can be trained on their own. So nobody has to find the
good ones: draw one at random in every layer and every step, train that, and finish with a short phase of dense attention
that brings all of them together. The trained model runs dense, or as a self-ensemble: several drawn sub-models of one set
of weights, whose predicted probabilities are averaged.

A draw says which sources (keys and values) a query may see. With reduction r these are w = T/r instead of T:

    o_i = softmax_j(q_i . k_j / sqrt(D)) v_j        over the drawn sources j that are not in the future

    unbiased: one uniform sample of w sources       locally biased: the sources are shuffled, mostly locally, and cut into
    for all queries, the rest is left out           blocks of w; block b of the queries sees block b of the sources

      source  0 1 2 3 4 5 6 7                         source  0 1 2 3 4 5 6 7
     query 0    .   .                                query 0    . .                  T = 8, r = 4, w = 2
           1    #   .                                      1    # .
           2    #   .                                      2  #     .                # seen
           3    #   #                                      3  #     #                . drawn, but in the future
           4    #   #                                      4          # .
           5    #   #                                      5          # #
           6    #   #                                      6              # .
           7    #   #                                      7              # #
                S = {1, 3}                                 p = 1 2 | 0 3 | 5 4 | 7 6

    p = argsort_m(m + sigma w eps_m), eps_m ~ N(0, 1): sigma = 0 leaves neighbours together, a large sigma mixes all

In the drawings query 0 sees nothing; with --keep_self, the default, every query sees itself, whatever was drawn.

    python nano_ssa.py                          # train, evaluate, sample; within 3 minutes on 2 CPU cores
    python nano_ssa.py --compare                # beside the dense twin, trained on the same data in the same order
    python nano_ssa.py --ssa unbiased --reduction 2

What we found. Tiny Shakespeare, 6 layers of 96, T = 64, r = 4; 3 seeds, mean ± standard deviation, nats per character; x86-64
CPU, 1 thread, float32, torch 2.13.0 (README has the whole tables):

    python tests/evidence.py nano_ssa -- --max_iters 600 --eval_interval 300
    python tests/evidence.py nano_ssa --share 0.03 -- --max_iters 600 --eval_interval 100

                                        the whole text                      its first 3%
                                     SSA             dense twin        SSA             dense twin
    validation loss, last        1.799 ± 0.003    1.682 ± 0.009    2.400 ± 0.014    3.278 ± 0.020
    validation loss, best        1.799 ± 0.003    1.682 ± 0.009    2.378 ± 0.008    2.340 ± 0.010
    training loss, last          1.656 ± 0.005    1.514 ± 0.004    1.053 ± 0.011    0.282 ± 0.005
    the same weights, just before the fine-tuning (on a part of the validation split):
      dense mode                 1.799 ± 0.008                     2.532 ± 0.029
      at its best temperature    1.798 ± 0.008                     2.307 ± 0.025
      one draw                   1.870 ± 0.015                     2.556 ± 0.013
      ensemble of 16             1.806 ± 0.013                     2.394 ± 0.019
      top-1, dense mode          46.0 ± 0.4 %                      38.2 ± 0.6 %
      top-1, ensemble of 16      46.1 ± 0.8 %                      39.6 ± 0.3 %

  - With enough text SSA costs 0.12 nats at equal steps. With little it overfits less: although the twin stopped early has the
    better raw loss, SSA's last weights beat it at each one's best temperature (2.280 ± 0.012 against 2.318 ± 0.017) and in
    top-1 (39.3 ± 0.4 % against 36.9 ± 0.3 %). Dropout was 0.
  - Over the last 90 steps, dense and at the end of the schedule, dense mode gains 0.066 (whole text) and 0.025 (3%), while
    single draws and ensembles get worse.
  - The ensemble gets better with every doubling (means over seeds) and far better than one draw. Before the fine-tuning it is
    ahead of dense mode on 3%, in loss and top-1, but not of dense mode at its best temperature; on the whole text it is level.
    After it dense mode is ahead, but for raw losses on 3%. An ensemble with a temperature of its own was not measured.

What it costs. python tests/bench.py ssa, forward and backward of 6 heads of 64, Intel Xeon at 2.5 GHz, 2 threads:

    T = 4096                    scores    time    against dense: materialised   fused causal (scaled_dot_product_attention)
    SSA r = 4                   1/4.00    264 ms          10.8 x faster          1.22 x faster
    SSA r = 8                   1/7.98    135 ms          21.0 x faster          2.39 x faster

  At T = 1024 these are 6.4 and 8.1, 1.37 and 1.71; at T = 256 it is slower than the fused kernel (0.79, 0.91), which keeps no
  map either and skips half of the square; at T = 64 the dense twin trains faster on a CPU (--compare). Tried, all
  exact: the score of a query with itself as one more key and channel (this file; the fastest at T = 4096); every block's
  own keys beside the drawn ones, all masked but the diagonal (2 w scores: 1.5 times slower at T = 4096, no slower at 256);
  blocks with materialised scores (the fastest at w <= 64, 3 times slower at T = 4096). None was measured on a GPU yet.

What is the paper's and what is ours. Its authors have published no code (github.com/shamim-hussain/ssa), and this file was
written from the abstract, the figures and the project page: what they do not say was chosen here.
 1. The paper's: the two ways to sample (Figure 3), a new draw in every iteration, the dense fine-tuning at the end, and
    the self-ensemble at inference.
 2. The formula of the local shuffle and its spread are ours: Gaussian noise on the positions, sorted; sigma in windows.
 3. Granularity is ours: a draw for each layer and micro-step, shared by all heads and sequences, which makes it one cheap
    index. (Later code of the first author, shamim-hussain/tgt, draws a set for each sequence, shared by the heads.)
 4. The figures show attention in both directions. Causality is ours: sources keep their index, and the mask compares that.
 5. keep_self is ours. In the paper's figure a query need not see itself, and under a causal mask some then see nothing.
    With --keep_self off these get the output 0: the residual stream carries them on.
 6. The length of the fine-tuning (0.15 of the steps, on the same learning-rate schedule) is ours.
 7. The ensemble averages probabilities, as the same later code does; dropout is off in it, so that nothing but pathways
    is sampled. What the paper averages, and over how many draws, is not known to us.
 8. No rescaling by 1/r anywhere: the softmax renormalises over what it sees.
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


@dataclasses.dataclass
class Settings:
    # the technique
    ssa: str = flag("local", "which pathways are sampled in training: mostly near ones, any, or none (dense)",
                    choices=("local", "unbiased", "off"))
    reduction: int = flag(4, "r: each query has T/r scores computed instead of T", least=1)
    sigma: float = flag(0.5, "spread of the local shuffle, in windows of T/r", least=0.0)
    keep_self: bool = flag(True, "every query sees itself, whatever was drawn")
    finetune: float = flag(0.15, "last share of the steps, trained with dense attention", least=0.0, most=1.0)
    draws: int = flag(16, "sub-models in the largest ensemble of the evaluation", least=1, free=True)
    ensemble_tokens: int = flag(16384, "validation tokens for the ensemble table (0: all there are)", least=0, free=True)

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
        if self.reduction > self.block_size:
            raise UserError(f"--reduction {self.reduction} leaves no source in a context of {self.block_size}: "
                            f"use at most --reduction {self.block_size}")


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
# The technique: stochastically subsampled attention
# ---------------------------------------------------------------------------------------------------------------------

def draw_paths(s, T, *where):
    """One sub-model: for every layer, which sources (keys, values) the queries of each block may see.

    where: what the draw is keyed by besides the seed, as (step, micro-step). Shared by all heads and sequences, fresh
    for every layer. Returns (n_layer, N, w) source indices: N blocks of queries, w = ceil(T/r) sources each.
    local: each source goes to exactly one block; an index >= T stands for no source. unbiased: N = 1, one set for all.
    """
    g = torch.Generator().manual_seed(key(s.seed, "paths", *where))
    w = -(-T // s.reduction)
    if s.ssa == "unbiased":  # S = the first w of a uniform shuffle
        return torch.rand(s.n_layer, T, generator=g).argsort(-1)[:, None, :w]
    # p = argsort_m(m + sigma w eps_m), eps ~ N(0, 1): most indices move by less than sigma windows. In float32, since
    # bfloat16 cannot tell neighbouring indices apart above 256.
    p = (torch.arange(T) + s.sigma * w * torch.randn(s.n_layer, T, generator=g)).argsort(-1)
    N = -(-T // w)
    return F.pad(p, (0, N * w - T), value=T).view(s.n_layer, N, w)


def subsampled_attention(q, k, v, path, keep_self=True, dropout=0.0):
    """Causal attention in which the queries of block b see only the sources path[b].

        o_i = softmax_j(q_i . k_j / sqrt(D)) v_j   over   j in path[block of i], j < i,   and j = i once (keep_self)

    q, k, v: (B, H, T, D); path: (N, w) from draw_paths. Returns (B, H, T, D). Queries stay in order, so nothing is
    un-permuted. Blocks ride in the batch dimension of scaled_dot_product_attention: T w scores instead of T^2.
    """
    B, H, T, D = q.shape
    N, w = path.shape
    n = -(-T // N)  # queries in a block
    i = torch.arange(N * n, device=q.device).view(N, n, 1)
    legal = path[:, None, :] < i if keep_self else path[:, None, :] <= i                         # (N, n, w), by original index

    # One more key, so that no row of the mask is empty (an empty row is NaN on some backends, and with a finite mask it
    # averages the future). keep_self off: its value is 0 and only rows without a legal source see it: their output is 0.
    # keep_self on: it stands for the query itself. Scores q'.k' with q' = [q, q_i.k_i], k' = [k, 0], and [0, 1] for the
    # additional key, give it the score of i with itself; values v' = [v, 0] and [0, 1] bring its weight out as channel D.
    if keep_self:
        spare = 8 - D % 8  # one channel, filled up with zeros to a multiple of 8 as fused kernels want it
        q = torch.cat([q, (q * k).sum(-1, keepdim=True), q.new_zeros(B, H, T, spare - 1)], -1)  # (B, H, T, D+spare)
        seen = legal.new_ones(N, n, 1)
    else:
        spare, seen = 0, ~legal.any(-1, keepdim=True)
    mask = torch.cat([legal, seen], -1)[:, None]                                                 # (N, 1, n, w+1)

    def blocks(x, length):  # (B, H, N*length, d) -> (N, B*H, length, d)
        return x.reshape(B * H, N, length, -1).transpose(0, 1)

    def sources(x):  # (B, H, T, D) -> (N, B*H, w+1, D+spare)
        x = F.pad(blocks(x.index_select(2, path.flatten().clamp(max=T - 1)), w), (0, spare, 0, 1))
        if keep_self:
            x[..., w, D] = 1
        return x

    q = blocks(F.pad(q, (0, 0, 0, N * n - T)), n)                                                # (N, B*H, n, D+spare)
    o = F.scaled_dot_product_attention(q, sources(k), sources(v), attn_mask=mask, dropout_p=dropout, scale=D ** -0.5)
    o = o.transpose(0, 1).reshape(B, H, N * n, D + spare)[:, :, :T]
    return o[..., :D] + o[..., D:D + 1] * v if keep_self else o


# ---------------------------------------------------------------------------------------------------------------------
# The model: GPT-2's blocks, and attention that takes a path
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


class SubsampledAttention(Attention):
    """Attention whose mode is its argument, never implied by train() or eval(): dense, or along a path."""

    def __init__(self, s):
        super().__init__(s)
        self.keep_self = s.keep_self

    def forward(self, x, path=None):  # (B, T, C), None or (N, w) -> (B, T, C)
        if path is None:
            return super().forward(x)
        q, k, v = self.heads(x)
        return self.merge(subsampled_attention(q, k, v, path, self.keep_self, self.dropout * self.training))


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.ln_1, self.attn = layer_norm(s), SubsampledAttention(s)
        self.ln_2, self.mlp = layer_norm(s), MLP(s)

    def forward(self, x, path=None):
        x = x + self.attn(self.ln_1(x), path)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with an additional input: paths (n_layer, N, w) from draw_paths selects one sub-model, None is dense."""

    def __init__(self, s):
        super().__init__()
        self.block_size, self.dropout = s.block_size, s.dropout
        self.wte = nn.Embedding(s.vocab_size, s.n_embd)  # also the output head
        self.wpe = nn.Embedding(s.block_size, s.n_embd)
        self.h = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.ln_f = layer_norm(s)
        init_weights(self, s)

    def states(self, idx, paths=None):
        """Token ids (B, T) -> the residual stream (B, T, C) after the embedding and after every layer, before ln_f."""
        x = [self.embed(idx)]
        for block, path in zip(self.h, [None] * len(self.h) if paths is None else paths):
            x.append(block(x[-1], path))
        return x

    def forward(self, idx, targets=None, paths=None):
        """Token ids (B, T) -> logits (B, T, vocab) and, with targets (B, T), the mean cross-entropy in nats."""
        return self.read_out(self.states(idx, paths)[-1], targets)

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
    """The same model, to be trained with dense attention throughout."""
    return GPT(dataclasses.replace(s, ssa="off"))


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

ARMS = ("technique", "dense")  # the first is trained always, the others with --compare


def build(arm, s):
    return GPT(s) if arm == "technique" else dense_twin(s)


def flops_per_token(s, arm):
    """Training FLOPs for a token, forward and backward. 6 for each weight in a matrix product (the tied head is one, the
    embedding is not) and 12 for each channel of each score, in every layer: masked ones and padding included, and the square
    in full where attention is dense, although a fused causal kernel leaves half of it out."""
    T, C, D = s.block_size, s.n_embd, s.n_embd // s.n_head
    w = -(-T // s.reduction)
    rows = T if s.ssa == "unbiased" else -(-T // w) * w
    scores = rows / T * (w + 1) * ((D + 8 - D % 8) / D if s.keep_self else 1)  # a query, in units of D channels
    share = (finetune_from(s) / s.max_iters if s.max_iters else 1.0) if arm == "technique" and s.ssa != "off" else 0.0
    return 6 * (12 * s.n_layer * C * C + s.vocab_size * C) + 12 * s.n_layer * C * (share * scores + (1 - share) * T)


def finetune_from(s):
    """The first step with dense attention."""
    return s.max_iters - round(s.finetune * s.max_iters)


def load_data(s, device):
    """What start() makes Run.data of."""
    return Data(s, device)


def train_arm(run, arm, model):
    s = run.settings
    if arm == "dense" or s.ssa == "off":
        return train(run, arm, model)

    def extra(step, turn):
        if step >= finetune_from(s):
            return {}
        return dict(paths=to_device(draw_paths(s, s.block_size, step, turn), run.device))

    keep = {finetune_from(s): "before_finetune.pt"} if 0 < finetune_from(s) < s.max_iters else {}
    return train(run, arm, model, extra, keep)


@torch.no_grad()
def measure(run, model):
    """One set of weights in its three attention modes, on the second half of the validation split:
    dense; one draw (mean over the draws); and self-ensembles, whose prediction is the mean of the draws' probabilities,

        log p(x) = logsumexp_k log p_k(x) - log K.

    Averaging also calibrates. So that this is not taken for knowledge, dense mode is shown again with the temperature
    that is best on the first half. A draw is one sub-model: the same paths for all windows.
    """
    s = run.settings
    starts = run.data.windows("val", s.eval_tokens)
    most = max(1, s.ensemble_tokens // s.block_size) if s.ensemble_tokens else len(starts)
    fit, reported = starts[:max(1, len(starts) // 2)][:most], starts[len(starts) // 2:][:most]
    model.eval()

    def batches(starts):
        rows = max(1, min(s.batch_size, 2**26 // (s.block_size * s.vocab_size)))  # logits of 256 MB: several live at once
        for at in range(0, len(starts), rows):
            yield run.data.rows("val", starts[at:at + rows])

    def logits(x, paths=None):
        with run.autocast():
            return model(x, paths=paths)[0].flatten(0, 1).float()                                # (B T, vocab)

    heats = 2 ** torch.linspace(-2, 2, 81)
    losses = torch.zeros(len(heats), device=run.device)
    for x, y in batches(fit):
        z = logits(x)
        losses += torch.stack([F.cross_entropy(z / heat, y.flatten(), reduction="sum") for heat in heats.tolist()])
    heat = heats[losses.argmin().item()].item()

    sizes = sorted({2 ** i for i in range(s.draws.bit_length())} | {s.draws}) if s.ssa != "off" else []
    paths = [to_device(draw_paths(s, s.block_size, "draw", k), run.device) for k in range(s.draws)] if sizes else []
    loss, hits = {}, {}  # sums over tokens, by row of the table

    def add(row, log_p, y):
        loss[row] = loss.get(row, 0.0) + F.nll_loss(log_p, y, reduction="sum").item()
        hits[row] = hits.get(row, 0) + (log_p.argmax(-1) == y).sum().item()

    for x, y in batches(reported):
        y = y.flatten()
        dense = logits(x)
        add("dense", dense.log_softmax(-1), y)
        add("heat", (dense / heat).log_softmax(-1), y)
        mixture = torch.full_like(dense, -math.inf)
        for k, path in enumerate(paths, 1):
            log_p = logits(x, path).log_softmax(-1)
            add("draw", log_p, y)
            mixture = torch.logaddexp(mixture, log_p)
            if k in sizes:
                add(k, mixture - math.log(k), y)
    n = len(reported) * s.block_size
    result = dict(tokens=n, temperature=heat, val_loss_dense_mode=loss["dense"] / n, top1_dense_mode=hits["dense"] / n,
                  val_loss_temperature=loss["heat"] / n)
    if sizes:
        result.update(val_loss_single_draw=loss["draw"] / n / s.draws, top1_single_draw=hits["draw"] / n / s.draws,
                      ensemble={str(k): loss[k] / n for k in sizes}, ensemble_top1={str(k): hits[k] / n for k in sizes})
    return result


def evaluate_arm(run, arm, model):
    """The evaluation of an arm's best weights and, beside it, of the last ones where these are others, and of the
    technique's just before its fine-tuning. Leaves the best weights in the model."""
    saved = {file: read_checkpoint(run, run.out / arm / file, arm) for file in ("before_finetune.pt", "ckpt.pt", "best.pt")
             if (run.out / arm / file).exists()}
    found = {}
    for file, checkpoint in saved.items():
        if file != "ckpt.pt" or checkpoint["step"] != saved["best.pt"]["step"]:
            model.load_state_dict(checkpoint["model"])
            found[file] = dict(step=checkpoint["step"], **measure(run, model))
    names = {"before_finetune.pt": "before_finetune", "ckpt.pt": "last"}
    return {**found["best.pt"], **{names[file]: e for file, e in found.items() if file in names}}


def report(run, arms, model):
    """The technique's table and a sample. arms: as in results.json; model: the technique, with its best weights."""
    found = {}
    for arm, name in ("technique", "SSA"), ("dense", "dense twin"):
        if arm in arms:
            e = arms[arm]["evaluation"]
            columns = ("before fine-tuning", e.get("before_finetune")), ("last", e.get("last")), ("best", e)
            found.update({f"{name}, {when} (step {column['step']})": column for when, column in columns if column})

    def get(e, path):
        for part in path.split("."):
            e = (e or {}).get(part)
        return e

    sizes = sorted({int(k) for e in found.values() for k in e.get("ensemble", {}) if k != "1"})
    rows = [["loss (top-1)", *found]]
    for name, loss, top1 in [("dense mode", "val_loss_dense_mode", "top1_dense_mode"),
                             ("dense mode, best temperature", "val_loss_temperature", "top1_dense_mode"),
                             ("one draw", "val_loss_single_draw", "top1_single_draw"),
                             *((f"ensemble of {k}", f"ensemble.{k}", f"ensemble_top1.{k}") for k in sizes)]:
        if any(get(e, loss) for e in found.values()):
            rows.append([name, *(get(e, loss) and f"{get(e, loss):.4f} ({100 * get(e, top1):.1f}%)" for e in found.values())])
    tokens = arms["technique"]["evaluation"]["tokens"]
    print(f"\nAttention modes, on {tokens:,} tokens of the validation split's second half:", table(rows), sep="\n")
    sample(run, model)


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
