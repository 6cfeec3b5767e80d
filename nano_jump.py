# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm", "pytest"]
# ///
r"""
Jump to Conclusions: linear maps from any layer of a transformer to any later one

    "Jump to Conclusions: Short-Cutting Transformers with Linear Transformations"
    Yom Din, Karidi, Choshen and Geva, LREC-COLING 2024, https://arxiv.org/abs/2303.09435

What does a transformer know after l of its L layers? The logit lens reads the hidden state h_l as if it were the last one: by the
final LayerNorm and the output head, as if all layers spoke one language. They do not. The paper's remedy costs one least-squares
fit: for each pair of layers i < j the matrix that best predicts the later state from the earlier one, on some text:

    A_ij = argmin_A  sum_n | h_i^(n) A - h_j^(n) |^2          h_0 = embeddings, h_l after layer l, before the final LayerNorm

     id    p(next | h_l) = softmax(head(ln_f(h_l)))           the logit lens; the identity in the place of the map
     mat   p(next | h_l) = softmax(head(ln_f(h_l A_lL)))      the jump to the last layer: one matrix instead of L - l layers

      h_0 ---> h_1 ---> h_2 ---> ... ---> h_L ---> ln_f, head          layers, each of 12 C^2 weights and attention
                 \______________ A_1L ______^                          a jump of C^2 weights

With it the paper (1) shows that layers are closer to linear than they look: r^2 of all pairs, and how often the jump's first choice
is among the full model's first k (Precision@k); (2) lets a token leave as soon as its reading is confident, p_(1) - p_(2) above a
bar that falls along the text; (3) replaces single parts (attention, feed-forward, LayerNorms) by their best linear maps.

The fit needs no stored state. Write a token's states as one row r = [1, h_0, .., h_L]: the matrix S = sum r^T r holds G = sum h_i^T h_i
and sum h_i^T h_j of every pair, so A_ij = G^-1 sum h_i^T h_j; r^2 comes from the S of held-out text. One pass over each text, any
number of tokens, one eigendecomposition a layer.

    python nano_jump.py                              # train, fit, evaluate, sample; within 3 minutes on 2 CPU cores
    python nano_jump.py --compare                    # also with a bias, beside a tuned lens and bigrams
    python nano_jump.py --exit_layer 4 --kv copy     # the sample leaves after layer 4, within the context
    python nano_jump.py --init_from gpt2 --eval_tokens 20480    # GPT-2, on Shakespeare in its own tokens; pip install transformers

What we found. Tiny Shakespeare, 6 layers of 96, T = 64, 1,500 steps; maps of 200,000 training tokens; validation text (what is saved:
its second half), 3 seeds, mean ± standard deviation; x86-64 CPU, 1 thread, float32, torch 2.13.0 (README has the whole tables):

    python tests/evidence.py nano_jump --other stdlib -- --max_iters 1500 --eval_interval 500 --fit_tokens 200000

    read from layer                         0             1             2             3             4             5
    r^2 to layer 6, id               -0.19 ± 0.01  -0.01 ± 0.02   0.04 ± 0.00   0.15 ± 0.01   0.34 ± 0.02   0.62 ± 0.03
    r^2 to layer 6, mat               0.46 ± 0.01   0.63 ± 0.01   0.70 ± 0.01   0.78 ± 0.01   0.86 ± 0.01   0.93 ± 0.01
    P@1, id                            3.0 ± 0.1    16.4 ± 0.9    27.9 ± 0.7    45.4 ± 1.1    65.3 ± 0.7    80.0 ± 1.2 %
    P@1, mat                          37.1 ± 0.2    47.6 ± 0.8    54.0 ± 0.9    64.3 ± 0.4    76.3 ± 0.6    86.8 ± 1.1 %
    P@1, tuned lens                   39.4 ± 0.1    56.1 ± 0.6    62.6 ± 0.8    71.2 ± 0.7    80.7 ± 0.6    89.3 ± 0.7 %
    P@1, attention linear above       35.8 ± 1.4    68.7 ± 1.2    77.2 ± 1.3    84.3 ± 0.3    89.5 ± 0.8    93.9 ± 0.9 %
    P@1, feed-forward linear above    38.7 ± 0.2    50.7 ± 1.3    58.8 ± 0.4    69.2 ± 0.4    79.3 ± 0.2    89.0 ± 0.7 %
    P@1, LayerNorms linear above      88.7 ± 0.7    89.2 ± 0.7    91.3 ± 0.5    93.1 ± 0.4    94.8 ± 0.3    96.4 ± 0.2 %

    saved at an agreement of             95 %                        98 %                        99 %
    layers, id / mat            10.3 ± 0.4   20.4 ± 0.2     5.6 ± 0.3   12.9 ± 0.4     3.7 ± 0.5    9.5 ± 0.6 %
    FLOPs, id / mat              5.0 ± 0.4    8.9 ± 0.2     0.8 ± 0.3    1.8 ± 0.4    -0.9 ± 0.5   -1.4 ± 0.6 %

  - The paper's main claim holds, in every seed: mat is ahead of id in r^2 of every pair and in every metric of every layer. At 95 %
    agreement it saves 10.1 ± 0.4 points more layers; the abstract says 7.9 for GPT-2. In FLOPs, with maps, heads, keys and values
    counted, it is 3.9 ± 0.4 points; at 99 % both cost more than the full model.
  - With 12 layers of 64 mat saves 14.8 ± 0.7 %, id 9.4 ± 4.3 %: 6.1, 9.4 and 0.6 points more in three seeds, and no FLOPs (-0.7 ± 4.1).
  - The abstract names attention as most tolerant of a linear map; here the LayerNorms are, in every layer. Attention is ahead of the
    feed-forward part from layer 1 on; from layer 0 it is the worst of the three.
  - A bias brings next to nothing (0.2 points of P@1 at most). A tuned lens, trained once over the same text, reads better than mat in
    P@1, KL and loss of every layer. From layer 0 both are behind bigrams of the training text (40.3 ± 0.1 % of P@1).
  - Exact context flatters early exit. With lambda 0.8 (4.7 layers a token) 94.9 ± 0.2 % of the choices are the full model's; with
    the cache that generation has, 91.6 ± 0.4 % (mat) or 90.0 ± 0.3 % (copy).
  - For our model, maps fitted to Python source lose 4.6 points of P@1 on Shakespeare (61.0 to 56.4, mean of layers), and maps fitted
    to Shakespeare 11.6 on Python (63.5 to 51.9).

What it costs. python tests/bench.py jump --runs 3, Intel Xeon at 2.5 GHz, 2 threads: the maps of all pairs from 200,000 tokens take
5.3 s, 1.7 times the forward pass alone, and 60 MB; lstsq on stored states 53 s and 4.6 GB. For a model of GPT-2's size (random
weights) the fit takes 1.2 GB beyond it, for 1,024 tokens as for 4,096. On a CPU (3 seeds), generation that leaves after layer
4 of 6 is 1.13 times as fast (mat; copy: 1.18), and asking after every layer costs more than it saves: 0.80 times full speed at lambda 0.8.

What is the paper's and what is ours. The definitions are those of the abstract and of the authors' code (github.com/sashayd/mat); the
paper's body was not at hand, and of its figures only the abstract's are quoted.
 1. The paper's: maps without bias or penalty, one for all tokens and positions; states before ln_f; the metrics against the full
    model's choice; the confidence, the bar 0.9 lambda + 0.1 exp(-4 t / N), strict, from layer 1 on; the linear parts, in all later layers.
 2. Row vectors: a state is a row, x A, where the paper has columns, A x: our A is the transpose.
 3. Their fit takes one random position t from each of 9,000 sentences, cut there; ours all positions of drawn windows of T tokens, or
    (--fit_positions one) one of each. N, their mean of t + 1, is here that over a window, (T + 1) / 2.
 4. Rank-deficient layers get the smallest of the best maps, as theirs do. Eigenvalues below 1e-12 of the largest count as 0.
 5. Their early exit is evaluated with exact context: earlier tokens go through all layers whatever they did themselves. Our table has
    that, with lambda picked on one half of the text (the fewest layers that agree often enough) and reported on the other; they read the
    saving off a curve over the whole text.
 6. Generation with a cache is ours. A token that leaves at l owes the later layers its keys and values: from h_l itself (copy, as CALM
    has it, arXiv 2207.07061), or from h_l A_lj, what the next layer would have read if the maps were right (mat).
 7. "Layers saved" counts as theirs does. "FLOPs saved" also charges the checks (a map and a head each) and the skipped layers' keys and
    values.
 8. The model is ours: a small GPT on characters. --init_from takes GPT-2; its published weights were not at hand, and loading was
    tested on random ones. Their masked language models are not here.
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
import statistics
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
    init_from: str = flag("scratch", "scratch: train a model; else take one: gpt2, gpt2-medium, a folder that transformers saved, or a "
                          "checkpoint of this script. Its sizes replace the flags, and no step is trained")
    fit_tokens: int = flag(100_000, "training tokens whose states the maps are fitted to (at most all there are)", least=1, free=True)
    fit_positions: str = flag("all", "positions of a window to fit to: all, or one that is drawn, as in the paper",
                              choices=("all", "one"), free=True)
    ridge: float = flag(0.0, "penalty on the squares of the maps' entries, in units of a channel's mean square", least=0.0, most=1e6, free=True)
    affine: bool = flag(False, "maps from layer to layer have a bias", free=True)
    exit_layer: int = flag(-1, "in the sample, within the context, tokens leave after this layer (-1: where the model is confident)", least=-1, free=True)
    exit_threshold: float = flag(0.8, "lambda of that confidence; above 10/9 no token leaves early", least=-10.0, most=10.0, free=True)
    kv: str = flag("mat", "a layer that a token skips gets its key and value from the state where it left (copy) or from the maps (mat)",
                   choices=("copy", "mat"), free=True)

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
        if self.init_from != "scratch" and not (self.resume or self.eval_only):  # there the run that goes on has all settings
            found = model_settings(self.init_from)
            dataset = found.pop("dataset")
            rows = max(1, min(self.batch_size, 2**24 // (found["block_size"] * found["vocab_size"])))
            vars(self).update(found, max_iters=0, compile="off", batch_size=rows, dataset=dataset if self.dataset == "auto" else self.dataset)
        if self.exit_layer == 0 or self.exit_layer > self.n_layer:
            raise UserError(f"--exit_layer {self.exit_layer} is no layer to leave after: use 1 to {self.n_layer}, or -1")
        if self.fit_tokens < unknowns(self):
            raise UserError(f"--fit_tokens {self.fit_tokens} are fewer equations than a map has unknowns in a column: "
                            f"use {unknowns(self)} or more")


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
# The technique: least squares from any layer to any later one
# ---------------------------------------------------------------------------------------------------------------------

def place(i, C):
    """Where h_i lies in a row r = [1, h_0, .., h_L]: its columns."""
    return list(range(1 + i * C, 1 + (i + 1) * C))


def add_moments(S, states):
    """S += sum of r^T r over the rows r = [1, h_0, .., h_L] of the states, L+1 of (n, C). S: (1+(L+1)C, 1+(L+1)C), float64.

    S holds all that least squares and r^2 need, for all pairs of layers, whatever the number of tokens.
    """
    rows = torch.cat([torch.ones_like(states[0][:, :1]), *states], 1).to(S.device).to(S.dtype)  # two steps: mps has no float64
    S.addmm_(rows.T, rows)


def least_squares(G, XY, ridge=0.0, affine=False):
    """argmin_W sum |x W - y|^2 from G = sum x^T x (K, K) and XY = sum x^T y (K, J), float64; returns W (K, J).

    Of all the best W it is the smallest: eigenvalues of G below 1e-12 of the largest count as 0. A layer may have fewer
    dimensions than channels: layer 0 of a character model has no more than V + T - 1. affine: x_0 = 1 is free of the penalty.
    """
    penalty = ridge * G.diagonal()[affine:].mean() * torch.ones_like(G.diagonal())
    penalty[:affine] = 0
    values, vectors = torch.linalg.eigh(G + penalty.diag())
    real = values > 1e-12 * values[-1]
    return vectors[:, real] / values[real] @ (vectors[:, real].T @ XY)


def fit(S, C, ridge=0.0, affine=False, dtype=torch.float32):
    """The maps h_j ~ h_i A + a of all layers i < j, {(i, j): (A (C, C), a (C,))}, computed in float64. Without affine a = 0, as in the
    paper. One eigendecomposition serves a layer's maps to all layers above."""
    L, maps = (len(S) - 1) // C - 1, {}
    for i in range(L):
        x = [0] * affine + place(i, C)
        rows = S[x]                                                                              # (C or 1+C, 1+(L+1)C)
        W = least_squares(rows[:, x], rows[:, 1 + (i + 1) * C:], ridge, affine).to(dtype)        # to all later layers
        for j, W_ij in enumerate(W.split(C, 1), i + 1):
            maps[i, j] = W_ij[affine:].clone(), W_ij[0].clone() if affine else W_ij.new_zeros(C)
    return maps


def explained(S, C, i, j, A, a):
    """r^2 of h_i A + a for h_j on the text with the moments S: the mean over channels of 1 - SSE / SST, and 1 - sum SSE / sum SST.

    Without any state, with x = [1, h_i] and W = [a; A]:
    SSE_c = sum_n (x_n W_c - y_nc)^2 = W_c^T (x^T x) W_c - 2 W_c^T (x^T y_c) + y_c^T y_c. Channels that do not vary are left out of the mean.
    """
    x, y = [0, *place(i, C)], slice(1 + j * C, 1 + (j + 1) * C)
    W = torch.cat([a[None], A]).to(S.device).to(S.dtype)                                         # (1+C, C)
    squares = S[y, y].diagonal()
    SSE = (W * (S[x][:, x] @ W - 2 * S[x, y])).sum(0) + squares
    SST = squares - S[0, y] ** 2 / S[0, 0]
    varies = SST > 1e-12 * squares
    return (1 - SSE / SST)[varies].mean().item(), (1 - SSE.sum() / SST.sum()).item()


def jump(x, maps, i, j):
    """The state of layer j as the map from layer i's state x (.., C) has it; maps None: the identity, x as it is."""
    if maps is None or i == j:
        return x
    A, a = maps[i, j]
    return x @ A + a


def confidence(logits):
    """p_(1) - p_(2), the two largest probabilities: (.., V) -> (..)."""
    top = logits.float().softmax(-1).topk(2).values
    return top[..., 0] - top[..., 1]


def threshold(lam, t, N):
    """The paper's bar, which falls along the text: 0.9 lambda + 0.1 exp(-4 t / N), t the position, N the mean of t + 1. A token leaves
    at the first layer whose confidence is above it. lambda = 1 is not "never", which takes more than 10/9; below -1/9 it is "at once"."""
    return 0.9 * lam + 0.1 * torch.exp(-4 * t / N)


NEVER = 1.112  # a lambda whose bar no confidence passes


# ---------------------------------------------------------------------------------------------------------------------
# The model: GPT-2, parts of which can be replaced by linear maps, and a decoder whose tokens leave early
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


class Block(nn.Module):
    """GPT-2's layer, (B, T, C) -> (B, T, C). linear: maps {"ln_1" | "attn" | "ln_2" | "mlp": (C, C)} in place of these parts."""

    def __init__(self, s):
        super().__init__()
        self.ln_1, self.attn = layer_norm(s), Attention(s)
        self.ln_2, self.mlp = layer_norm(s), MLP(s)

    def forward(self, x, linear={}):
        def part(name, x):
            return x @ linear[name] if name in linear else getattr(self, name)(x)

        x = x + part("attn", part("ln_1", x))
        return x + part("mlp", part("ln_2", x))


class GPT(nn.Module):
    """GPT-2."""

    def __init__(self, s):
        super().__init__()
        self.block_size, self.dropout = s.block_size, s.dropout
        self.wte = nn.Embedding(s.vocab_size, s.n_embd)  # also the output head
        self.wpe = nn.Embedding(s.block_size, s.n_embd)
        self.h = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.ln_f = layer_norm(s)
        init_weights(self, s)

    def states(self, idx):
        """Token ids (B, T) -> h_0, .., h_L: the residual stream (B, T, C) after the embedding and after every layer, before ln_f."""
        x = [self.embed(idx)]
        for block in self.h:
            x.append(block(x[-1]))
        return x

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab) and, with targets (B, T), the mean cross-entropy in nats."""
        return self.read_out(self.states(idx)[-1], targets)

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
    """The same model: jumps change nothing in it."""
    return GPT(s)


class Decoder:
    """Generation with a cache in which tokens leave the model early: model.generate(idx, n, next_logits=Decoder(model, ..)).

    maps: from fit, or None for the logit lens. layers: after which tokens may leave. lam: they do with a confidence above
    threshold(lam), which -inf makes "always". kv: a skipped layer j gets keys and values from the state h_l where the token left ("copy",
    as in CALM) or from what the maps say of its own input, h_l A_lj ("mat"). The cache is for rows sequences of up to block_size tokens.
    A prompt goes through all layers. Beyond block_size nothing is cached and no token leaves.
    """

    def __init__(self, model, maps=None, layers=(), lam=-math.inf, kv="copy", rows=1):
        C, H, like = model.wte.embedding_dim, model.h[0].attn.n_head, model.wte.weight.detach()
        self.model, self.maps, self.layers, self.lam, self.kv = model, maps, layers, lam, kv
        self.cache = like.new_zeros(len(model.h), 2, rows, H, model.block_size, C // H)
        self.length, self.through = 0, []

    @torch.no_grad()
    def run(self, idx, start=0, leave=True):
        """Tokens (B, n) at positions start, start+1, .. -> logits (B, n, vocab) and how many layers each one went through, (B, n).

        n = 1 goes on from the cache; start = 0 takes a whole text at once, with the same result as token by token: a layer needs
        nothing of earlier tokens but that layer's keys and values, and a token that leaves fills those in at once.
        """
        model, L, stop = self.model, len(self.model.h), start + idx.size(1)
        assert start == 0 or idx.size(1) == 1
        x = model.wte(idx) + model.wpe.weight[start:stop]  # (B, n, C): h_l, and of tokens that left the state where they did
        bar = threshold(self.lam, torch.arange(start, stop, device=idx.device), (model.block_size + 1) / 2)
        heads = lambda y: y.unflatten(-1, (model.h[0].attn.n_head, -1)).transpose(1, 2)
        through, stays, staying, logits = torch.full_like(idx, L), None, idx.numel(), None
        for l, block in enumerate(model.h):
            if leave and staying and l in self.layers:
                reading = model.read_out(jump(x, self.maps, l, L))[0]
                leaving = (through == L) & (confidence(reading) > bar)
                through = torch.where(leaving, l, through)
                logits = reading if logits is None else torch.where(leaving[..., None], reading, logits)
                stays = through == L
                staying = stays.sum().item()
            h = x  # what layer l sees
            if staying < idx.numel() and self.kv == "mat":
                for e in set(through.flatten().tolist()) - {L}:
                    h = torch.where((through == e)[..., None], jump(x, self.maps, e, l), h)
            a = block.ln_1(h)
            k, v = self.cache[l, :, :, :, :stop]                                                 # (B, H, stop, D)
            k[:, :, start:], v[:, :, start:] = heads(block.attn.c_k(a)), heads(block.attn.c_v(a))
            if staying:  # else keys and values are all that is needed of this layer
                h = h + block.attn.merge(F.scaled_dot_product_attention(heads(block.attn.c_q(a)), k, v, is_causal=start == 0))
                h = h + block.mlp(block.ln_2(h))
                x = h if staying == idx.numel() else torch.where(stays[..., None], h, x)
        if staying:
            full = model.read_out(x)[0]
            logits = full if staying == idx.numel() else torch.where(stays[..., None], full, logits)
        return logits, through

    def __call__(self, idx):
        """Token ids (B, T) -> logits (B, vocab) of token T+1. The first call takes a prompt, each later one the text and one more token."""
        start, self.length = self.length, idx.size(1)
        if self.length > self.model.block_size:
            with torch.no_grad():
                logits, through = self.model(idx[:, -self.model.block_size:])[0], torch.full_like(idx, len(self.model.h))
        else:
            assert start == 0 or self.length == start + 1, "one more token each time: a new text takes a new Decoder"
            logits, through = self.run(idx[:, start:], start, leave=start > 0)
        self.through.append(through[:, -1])
        return logits[:, -1]


PUBLISHED = ("gpt2", "gpt2-medium")  # on the Hugging Face hub


def from_transformers(load, source):
    """What load, a from_pretrained of the package transformers, makes of a published name or of a folder."""
    try:
        import transformers
    except ModuleNotFoundError:  # an extra
        raise UserError(f"--init_from {source} needs the package transformers: pip install transformers")
    transformers.logging.set_verbosity_error()
    try:
        return getattr(transformers, load).from_pretrained(source)
    except Exception as e:  # without a network, for a folder of another kind, for a broken file: it raises almost anything
        raise UserError(f"--init_from {source}: transformers finds no GPT-2 there ({type(e).__name__}: {' '.join(str(e).split())[:120]}); "
                        + ("connect to the network once, or name a folder that holds it" if source in PUBLISHED
                           else "name a folder that GPT2LMHeadModel.save_pretrained wrote"))


SIZE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout", "dataset")  # what a model brings along


def model_settings(source):
    """Those settings of the model that --init_from names."""
    if source not in PUBLISHED and not Path(source).is_dir():
        return {name: saved_model(source)["settings"][name] for name in SIZE}
    c = from_transformers("AutoConfig", source)
    ours = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                add_cross_attention=False, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
    for name, value in ours.items():
        if getattr(c, name, value) != value:
            raise UserError(f"--init_from {source} is not GPT-2: its config has {name} {getattr(c, name)}, not {value}")
    if c.n_inner not in (None, 4 * c.n_embd):
        raise UserError(f"--init_from {source} is not GPT-2: its config has n_inner {c.n_inner}, not {4 * c.n_embd}")
    dataset = "shakespeare" if c.vocab_size == 50257 else "auto"
    return dict(zip(SIZE, (c.n_layer, c.n_head, c.n_embd, c.n_positions, True, c.vocab_size, 0.0, dataset)))


def saved_model(source):
    """The content of a checkpoint of this script."""
    try:
        saved = torch.load(source, map_location="cpu", weights_only=True)
        script = saved["script"]
    except FileNotFoundError:
        raise UserError(f"--init_from {source}: there is no such file; use scratch, gpt2, gpt2-medium, a checkpoint or a folder")
    except Exception as e:  # a file that is no checkpoint can make torch.load raise almost anything
        raise UserError(f"--init_from {source} is not a checkpoint of {SCRIPT}.py ({type(e).__name__})")
    if script != SCRIPT:
        raise UserError(f"--init_from {source} is a checkpoint of {script}.py, not of {SCRIPT}.py")
    return saved


def model_weights(source):
    """The state_dict of the model that --init_from names. transformers keeps matrices as (in, out), and queries, keys and values in one."""
    if source not in PUBLISHED and not Path(source).is_dir():
        return saved_model(source)["model"]
    state = from_transformers("GPT2LMHeadModel", source).transformer.state_dict()
    state = {name: w.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else w for name, w in state.items()
             if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # the mask, in older versions
    for name in [name for name in state if ".c_attn." in name]:
        state.update(zip((name.replace("c_attn", f"c_{x}") for x in "qkv"), state.pop(name).chunk(3)))
    return {name: w.float() for name, w in state.items()}


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

ARMS = ("technique",)  # the model is never changed: --compare adds rows to its evaluation, an affine map, a tuned lens and bigrams


def build(arm, s):
    return dense_twin(s)


def flops_per_token(s, arm):
    """Training FLOPs for a token, forward and backward: 6 for each weight in a matrix product (the tied head is one, the embedding is
    not) and 12 for each channel of each score in every layer, the square in full, although a fused causal kernel leaves half of it out."""
    return 6 * (12 * s.n_layer * s.n_embd ** 2 + s.vocab_size * s.n_embd) + 12 * s.n_layer * s.n_embd * s.block_size


def load_data(s, device):
    """What start() makes Run.data of. Weights of --init_from are read here, before an earlier run, which may hold them, is moved aside."""
    data = Data(s, device)
    data.weights = None
    if s.init_from != "scratch" and not (s.resume or s.eval_only):
        if data.vocab_size != s.vocab_size:
            raise UserError(f"--init_from {s.init_from} has a vocabulary of {s.vocab_size}, {data.name} one of {data.vocab_size}: "
                            "use another --dataset")
        data.weights = model_weights(s.init_from)
    states = len(data.windows("train")) * positions(s)
    if states < unknowns(s):
        raise UserError(f"--fit_positions {s.fit_positions} finds {states} states in {data.name} to fit {unknowns(s)} unknowns: "
                        "use --fit_positions all, or more text")
    if len(data.windows("val", s.eval_tokens)) < 2:
        raise UserError(f"{data.name} is too short to pick lambda on one part and report on another: use a smaller --block_size, "
                        "or more --eval_tokens")
    return data


def positions(s):
    """How many positions of a window are fitted to."""
    return s.block_size if s.fit_positions == "all" else 1


def unknowns(s):
    """In a column of a map."""
    return s.n_embd + (s.affine or s.compare)


def train_arm(run, arm, model):
    s = run.settings
    if s.init_from != "scratch" and not (run.out / arm / "ckpt.pt").exists():
        model.load_state_dict(run.data.weights or model_weights(s.init_from))
        run.data.weights = None
    return train(run, arm, model)


def batches(run, split, starts):
    """Inputs and targets (rows, T) of these windows, at most batch_size, and so few that states and logits are 2^24 numbers each, or one."""
    s = run.settings
    rows = max(1, min(s.batch_size, 2**24 // (s.block_size * max(s.vocab_size, 1 + (s.n_layer + 1) * s.n_embd))))
    for at in range(0, len(starts), rows):
        yield run.data.rows(split, starts[at:at + rows])


def fit_batches(run):
    """Inputs (rows, T) of drawn windows of the training text, and which positions to fit to, (rows, T): --fit_tokens in all."""
    s = run.settings
    g = torch.Generator().manual_seed(key(s.seed, "fit"))
    starts = run.data.windows("train")
    starts = starts[torch.randperm(len(starts), generator=g)[:-(-s.fit_tokens // positions(s))].numpy()]
    remaining = s.fit_tokens
    for x, _ in batches(run, "train", starts):
        used = torch.ones(x.shape, dtype=torch.bool)
        if s.fit_positions == "one":
            used = F.one_hot(torch.randint(s.block_size, x.shape[:1], generator=g), s.block_size).bool()
        used &= used.flatten().cumsum(0).view(x.shape) <= remaining
        remaining -= used.sum().item()
        yield x, used.to(x.device)


@torch.no_grad()
def moments(run, model, stream):
    """S of add_moments, over a stream of inputs (rows, T) and which positions of them to use (rows, T)."""
    width = 1 + (len(model.h) + 1) * model.wte.embedding_dim
    S = torch.zeros(width, width, dtype=torch.float64, device="cpu" if run.device.type == "mps" else run.device)
    for x, used in stream:
        add_moments(S, [h[used] for h in model.states(x)])
    return S


PARTS = {"attention": ("attn",), "feed-forward": ("mlp",), "both LayerNorms": ("ln_1", "ln_2")}


@torch.no_grad()
def fit_parts(run, model, stream):
    """The best linear maps of every layer's ln_1, attn, ln_2 and mlp, from what goes in to what comes out: [{name: (C, C)}] * L."""
    C, device = model.wte.embedding_dim, "cpu" if run.device.type == "mps" else run.device
    names = ("ln_1", "attn", "ln_2", "mlp")
    found = [{name: torch.zeros(2, C, C, dtype=torch.float64, device=device) for name in names} for _ in model.h]
    for idx, used in stream:
        x = model.embed(idx)
        for block, sums in zip(model.h, found):
            a = block.ln_1(x)
            b = block.attn(a)
            c = block.ln_2(x + b)
            d = block.mlp(c)
            for name, before, after in (("ln_1", x, a), ("attn", a, b), ("ln_2", x + b, c), ("mlp", c, d)):
                before, after = (z[used].to(device).double() for z in (before, after))
                sums[name][0].addmm_(before.T, before)
                sums[name][1].addmm_(before.T, after)
            x = x + b + d
    return [{name: least_squares(G, XY, run.settings.ridge).float().to(run.device) for name, (G, XY) in sums.items()}
            for sums in found]


METRICS = ("p1", "p5", "p10", "surprisal", "kl", "gold_loss", "confidence")


def against(logits, full, targets):
    """What the paper measures of a reading, token by token. logits (.., V); full: the full model's log-probabilities (n, V), the
    reference, never the true token. Returns METRICS (7, n): is the reading's first choice among the full model's first 1, 5, 10; its
    surprisal -ln p_full(choice); KL(full || reading); the reading's loss on the targets; its confidence. Nats."""
    z = logits.flatten(0, -2).float().log_softmax(-1)
    p = full.gather(-1, z.argmax(-1, keepdim=True))                                              # (n, 1): ln p_full(choice)
    rank = (full > p).sum(-1)
    KL = (full.exp() * (full - z)).sum(-1)
    return torch.stack([rank < 1, rank < 5, rank < 10, -p[:, 0], KL, -z.gather(-1, targets.reshape(-1, 1))[:, 0], confidence(z)])


@torch.no_grad()
def measure(run, model, starts, lenses, parts=()):
    """Readings of all layers on these windows of the validation split.

    lenses: {name: f(idx, h, l) -> logits}, parts: from fit_parts. Returns the means of what against() measures, {lens: (L+1, 7)} and
    {part: (L, 7)}, and of the lenses p1 and confidence token by token, {lens: (2, L+1, tokens)}.
    """
    L = len(model.h)
    means = {name: torch.zeros(L + 1, 7, dtype=torch.float64) for name in lenses}
    means |= {name: torch.zeros(L, 7, dtype=torch.float64) for name in (PARTS if parts else ())}
    kept = {name: [] for name in lenses}
    for x, y in batches(run, "val", starts):
        states = model.states(x)
        full = model.read_out(states[-1])[0].flatten(0, 1).float().log_softmax(-1)               # (n, V)
        for name, lens in lenses.items():
            found = torch.stack([against(lens(x, h, l), full, y) for l, h in enumerate(states)])  # (L+1, 7, n)
            means[name] += found.sum(-1).cpu()
            kept[name].append(found[:, [METRICS.index("p1"), METRICS.index("confidence")]].transpose(0, 1).cpu())
        for name in PARTS if parts else ():
            for l, h in enumerate(states[:-1]):  # layers up to l are real, in those above the part is a map, at all positions
                for block, maps in zip(model.h[l:], parts[l:]):
                    h = block(h, {part: maps[part] for part in PARTS[name]})
                means[name][l] += against(model.read_out(h)[0], full, y).sum(-1).cpu()
    n = len(starts) * run.settings.block_size
    return {name: m / n for name, m in means.items()}, {name: torch.cat(k, -1) for name, k in kept.items()}


def frontier(same, sure, t, lams, N, layers=None):
    """Early exit with exact context, as the paper measures it: earlier tokens went through all layers whatever they could have done.

    same, sure: (L+1, n), whether a layer's first choice is the full model's, and its confidence; t: positions (n,); N as in threshold;
    layers: after which a token may leave, all from 1 to L-1 unless given. Yields for each lambda how many layers each token goes through
    (n,), 1 to L, and whether its choice is the same (n,), 0 or 1.
    """
    L = len(same) - 1
    for lam in lams:
        through, hit, bar = torch.full_like(t, L), same[L], threshold(lam, t, N)
        for l in [l for l in range(L - 1, 0, -1) if layers is None or l in layers]:  # downwards: the first layer has the last word
            leaves = sure[l] > bar
            through, hit = torch.where(leaves, l, through), torch.where(leaves, same[l], hit)
        yield through, hit


def saved_flops(s, through, mapped):
    """Share of a forward pass's FLOPs that leaving saves: a layer has 24 C^2 + 4 C T (the square in full), a head 2 V C, a map 2 C^2.
    Charged are a map and a head at every layer that the token could have left after, from 1 to L-1, and the keys and values that it
    owes to each skipped layer, 4 C^2 (by copy). through: layers gone through (n,)."""
    C, L, l = s.n_embd, s.n_layer, through.double()
    layer, head = 24 * C ** 2 + 4 * C * s.block_size, 2 * s.vocab_size * C
    spent = l * layer + (L - l) * 4 * C ** 2 + l.clamp(max=L - 1) * (head + 2 * C ** 2 * mapped) + (l == L) * head
    return 1 - spent.mean().item() / (L * layer + head)


TARGETS = (0.95, 0.98, 0.99)


def exits(s, kept):
    """The curve of layers against agreement, and what is saved at the agreement wanted: of 402 lambdas the one with the fewest layers
    among those that agree often enough on the first half of the windows; what it gives on the second. kept: of measure."""
    L, T, N = s.n_layer, s.block_size, (s.block_size + 1) / 2
    found = dict(curve={}, at={str(target): {} for target in TARGETS})
    for name in ("id", "mat"):
        same, sure = kept[name]
        t = torch.arange(T).repeat(same.size(1) // T)
        half = same.size(1) // T // 2 * T
        first, second = (same[:, :half], sure[:, :half], t[:half]), (same[:, half:], sure[:, half:], t[half:])

        def points(text, lams):
            return [(lam, through.double().mean().item(), hit.double().mean().item())
                    for lam, (through, hit) in zip(lams, frontier(*text, lams, N))]

        found["curve"][name] = [dict(threshold=lam, layers=layers, agreement=agreement)
                                for lam, layers, agreement in points(second, [-NEVER, *(i / 10 for i in range(11)), NEVER])]
        bounds = ((first[1][1:L] - threshold(0.0, first[2], N)) / 0.9).flatten().sort().values   # a lambda below it lets the token go
        lams = bounds[torch.linspace(0, len(bounds) - 1, 401, dtype=torch.float64).long()].tolist() if L > 1 else []
        tried = points(first, [*lams, NEVER])
        for target in TARGETS:
            lam = min((layers, -agreement, lam) for lam, layers, agreement in tried if agreement >= target)[-1]
            through, hit = next(frontier(*second, [lam], N))
            found["at"][str(target)][name] = dict(threshold=lam, agreement=hit.double().mean().item(),
                                                  layers_saved=1 - through.double().mean().item() / L,
                                                  flops_saved=saved_flops(s, through, name == "mat"))
    return found


@torch.no_grad()
def generation(run, model, maps, starts, kept):
    """Generation with early exits, one row for each way: tokens/s of one sequence within the context, without the prompt; and how
    often its first choice is the full model's where true text is read, with the cache that generation has and with exact context."""
    s, L, T = run.settings, len(model.h), run.settings.block_size
    fixed, lam, every = s.exit_layer if 0 < s.exit_layer < L else max(1, 2 * L // 3), s.exit_threshold, range(1, L)
    ways = [("full", "", "", None, (), NEVER)]  # method, when tokens leave, keys and values; maps, layers and lambda for Decoder
    for when, layers, bar in (f"after layer {fixed}", (fixed,), -math.inf), (f"lambda {lam:g}", every, lam):
        ways += [("id", when, "copy", None, layers, bar), ("mat", when, "copy", maps, layers, bar), ("mat", when, "mat", maps, layers, bar)]
    ways += [("mat", f"lambda {lam:g}, layer {fixed} only", "mat", maps, (fixed,), lam), ("mat", "never", "mat", maps, every, NEVER)]

    some = slice(len(starts) // 2, len(starts) // 2 + max(1, 2**14 // T))
    idx = run.data.rows("val", starts[some][:1])[0][:, :max(min(2, T - 1), T // 8)]
    speed = timed([lambda way=way: Decoder(model, *way[3:], kv=way[2]) for way in ways], idx, min(T - idx.size(1), 64))
    found = []
    for (method, when, kv, jumps, layers, bar), (rate, depth) in zip(ways, speed):
        agree, through = [], []
        for x, _ in batches(run, "val", starts[some]):
            logits, gone = Decoder(model, jumps, layers, bar, kv, rows=len(x)).run(x)
            agree.append(logits.argmax(-1) == model(x)[0].argmax(-1))
            through.append(gone)
        same, sure = kept["id" if method == "full" else method][:, :, some.start * T:some.stop * T]
        _, exact = next(frontier(same, sure, torch.arange(T).repeat(same.size(1) // T), [bar], (T + 1) / 2, layers))
        found.append(dict(method=method, exit=when, kv=kv, tokens_per_second=rate, speedup=rate / speed[0][0], layers=depth,
                          layers_true_text=torch.cat(through).float().mean().item(), agreement=torch.cat(agree).float().mean().item(),
                          agreement_exact_context=exact.mean().item()))
    return found


def timed(decoders, idx, n):
    """[(tokens/s, mean layers of a token)] of greedy generation with each of these makers of decoders: medians, in turns."""
    seconds, layers = [[] for _ in decoders], [0.0] * len(decoders)
    for turn in range(4):
        for i, new in enumerate(decoders):
            decoder = new()
            decoder.run(idx[:, :-1], leave=False)[1].sum().item()  # the prompt; waits for the device
            decoder.length, clock = idx.size(1) - 1, time.perf_counter()
            decoder.model.generate(idx, n, temperature=0, next_logits=decoder)
            layers[i] = torch.cat(decoder.through).float().mean().item()
            if turn:  # the first is not counted
                seconds[i].append(time.perf_counter() - clock)
    return [(n / statistics.median(times), mean) for times, mean in zip(seconds, layers)]


TUNED_LR = 1e-2  # the best of 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, on training text


def tuned_lens(run, model):
    """The tuned lens (arXiv 2303.08112): h + (h W + b) for the smallest KL(full || reading), trained from 0 on the text that the maps are
    fitted to, once, some 2,048 tokens a step. Returns an nn.Linear for each layer below the last."""
    s = run.settings
    lens = nn.ModuleList(nn.Linear(s.n_embd, s.n_embd) for _ in range(s.n_layer)).to(run.device)
    for p in lens.parameters():
        nn.init.zeros_(p)
    rows = max(1, 2048 // s.block_size)
    steps = [pair for x, used in fit_batches(run) for pair in zip(x.split(rows), used.split(rows))]
    optimizer = torch.optim.Adam(lens.parameters(), lr=TUNED_LR)
    for step, (x, used) in enumerate(steps):
        with torch.no_grad():
            states = model.states(x)
            full = model.read_out(states[-1][used])[0].float().log_softmax(-1)
        for h, translator in zip(states, lens):
            reading = model.read_out(h[used] + translator(h[used]))[0].float().log_softmax(-1)
            (full.exp() * (full - reading)).sum(-1).mean().backward(inputs=list(translator.parameters()))
        optimizer.param_groups[0]["lr"] = TUNED_LR * (1 - step / len(steps))
        optimizer.step()
        optimizer.zero_grad()
    return lens


def bigrams(run):
    """ln P(next | token) as counted in the training text, (V, V), 0.1 added to every count; None where the vocabulary is too large."""
    V = run.data.vocab_size
    if V > 4096:
        return None
    ids = run.data.train[:2**27]
    ids = torch.as_tensor(ids.astype(np.int64)) if isinstance(ids, np.memmap) else ids.long().cpu()
    counts = torch.bincount(ids[:-1] * V + ids[1:], minlength=V * V).view(V, V) + 0.1
    return (counts / counts.sum(1, keepdim=True)).log().float().to(run.device)


@torch.no_grad()
def first_choices(run, model, maps, start):
    """What every layer would say next along the end of a window of the validation split: {text, id, mat: a list of tokens for each layer}."""
    n = 24 if run.data.alphabet else 10
    x, L = run.data.rows("val", [start])[0], len(model.h)
    show = lambda ids: [repr(run.data.decode([i]))[1:-1].replace(" ", "_") for i in ids[-n:]]
    readings = {name: [show(model.read_out(jump(h, m, l, L))[0][0].argmax(-1).tolist()) for l, h in enumerate(model.states(x))]
                for name, m in (("id", None), ("mat", maps))}
    return dict(text=show(x[0].tolist()), **readings)


def evaluate_arm(run, arm, model):
    s, C, L = run.settings, run.settings.n_embd, run.settings.n_layer
    torch.set_float32_matmul_precision("highest")  # states in float32, from here on
    model.eval()
    clock = time.perf_counter()
    S = moments(run, model, fit_batches(run))
    on_device = lambda maps: {pair: (A.to(run.device), a.to(run.device)) for pair, (A, a) in maps.items()}
    maps, states = on_device(fit(S, C, s.ridge, s.affine)), round(S[0, 0].item())
    seconds = time.perf_counter() - clock
    affine = on_device(fit(S, C, s.ridge, True)) if s.compare else None
    del S  # one such matrix at a time: that of GPT-2 takes 0.8 GB, of GPT-2 medium 5.2 GB
    write(run.out / arm / "maps.pt", {f"{i} {j}": [A.cpu(), a.cpu()] for (i, j), (A, a) in maps.items()})
    parts = fit_parts(run, model, fit_batches(run))

    starts = run.data.windows("val", s.eval_tokens)
    V = moments(run, model, ((x, torch.ones_like(x, dtype=torch.bool)) for x, _ in batches(run, "val", starts)))
    same = torch.eye(C), torch.zeros(C)
    r2 = {name: [[explained(V, C, i, j, *(m[i, j] if m else same)) if i < j else (None, None) for j in range(L + 1)] for i in range(L + 1)]
          for name, m in (("id", None), ("mat", maps), *([("affine", affine)] if affine else []))}
    del V

    lenses = dict(id=lambda x, h, l: model.read_out(h)[0], mat=lambda x, h, l: model.read_out(jump(h, maps, l, L))[0])
    if s.compare:
        lens, pairs = tuned_lens(run, model), bigrams(run)
        lenses.update(affine=lambda x, h, l: model.read_out(jump(h, affine, l, L))[0],
                      tuned=lambda x, h, l: model.read_out(h + lens[l](h) if l < L else h)[0])
        if pairs is not None:
            lenses.update(bigrams=lambda x, h, l: pairs[x])  # the same for all layers
    means, kept = measure(run, model, starts, lenses, parts)
    by_layer = lambda name, metric: means[name][:1 if name == "bigrams" else None, METRICS.index(metric)].tolist()
    precision = lambda name: {k: by_layer(name, f"p{k}") for k in ("1", "5", "10")}
    early = exits(s, kept)
    return dict(fit=dict(states=states, seconds=seconds, positions=s.fit_positions, ridge=s.ridge, affine=s.affine),
                r2={name: [[pair[0] for pair in row] for row in rows] for name, rows in r2.items()},
                r2_global={name: [[pair[1] for pair in row] for row in rows] for name, rows in r2.items()},
                precision={name: precision(name) for name in lenses},
                **{metric: {name: by_layer(name, metric) for name in lenses} for metric in ("surprisal", "kl", "gold_loss")},
                layers_saved={target: {name: e["layers_saved"] for name, e in row.items()} for target, row in early["at"].items()},
                exit=early, submodules={name: dict(precision=precision(name), surprisal=by_layer(name, "surprisal")) for name in PARTS},
                generation=generation(run, model, maps, starts, kept) if L > 1 else [],
                first_choices=first_choices(run, model, maps, starts[len(starts) // 2]))


def report(run, arms, model):
    """The tables, pictures where matplotlib is installed, and a sample whose tokens leave early."""
    s, e, L = run.settings, arms["technique"]["evaluation"], run.settings.n_layer
    percent = lambda v: f"{100 * v:.1f}"
    for name, what in ("id", "the identity"), ("mat", "the maps" + ", with a bias" * e["fit"]["affine"]):
        cells = [["" if v is None else ".." if v < 0 else f"{100 * v:.0f}" for v in row[1:]] for row in e["r2"][name][:-1]]
        print(f"\nr^2 of {what} from a layer (down) to another (across), in hundredths, .. below 0; held out:",
              table([[name, *map(str, range(1, L + 1))], *([str(i), *row] for i, row in enumerate(cells))]), sep="\n")
    columns = {f"P@{k}": {name: list(map(percent, found[k])) for name, found in e["precision"].items()} for k in ("1", "5", "10")}
    columns |= {head: {name: [f"{v:.3f}" for v in values] for name, values in e[metric].items()}
                for head, metric in (("surprisal", "surprisal"), ("KL", "kl"), ("loss", "gold_loss"))}
    print("\nThe last layer, read from each layer; P@k in %, nats; the reference is the full model, for the loss the text:")
    for lenses in ("id", "mat"), ("affine", "tuned"):
        if lenses[0] in e["precision"]:
            print(table([["layer", *(f"{head} {name}" for head in columns for name in lenses)],
                         *([str(l), *(found[name][l] for found in columns.values() for name in lenses)] for l in range(L + 1))]), "", sep="\n")
    if "bigrams" in e["precision"]:
        print("bigrams of the training text:", ", ".join(f"{head} {found['bigrams'][0]}" for head, found in columns.items()))
    rows = [["agreement wanted, %", *(f"{head} {name}" for head in ("agreement", "layers saved", "FLOPs saved") for name in ("id", "mat"))]]
    rows += [[percent(float(target)), *(percent(found[name][k]) for k in ("agreement", "layers_saved", "flops_saved") for name in ("id", "mat"))]
             for target, found in e["exit"]["at"].items()]
    print("Early exit with exact context, lambda from the other half of the text, % (FLOPs: with all that leaving costs):", table(rows), sep="\n")
    rows = [["real layers", "whole blocks (mat)", *PARTS]]
    rows += [[str(l), percent(e["precision"]["mat"]["1"][l]), *(percent(e["submodules"][name]["precision"]["1"][l]) for name in PARTS)]
             for l in range(L)]
    print("\nP@1 with a part of all layers above made linear, %:", table(rows), sep="\n")
    if e["generation"]:
        rows = [["generation, float32", "leaves", "keys, values", "tokens/s", "speed", "layers", "agreement on text, %", "with exact context"]]
        rows += [[g["method"], g["exit"], g["kv"], g["tokens_per_second"], f"{g['speedup']:.2f}x", f"{g['layers']:.2f}",
                  percent(g["agreement"]), percent(g["agreement_exact_context"])] for g in e["generation"]]
        print("\n" + table(rows))
    first = e["first_choices"]
    rows = [["after", *first["text"]], *([f"{l} {name}", *first[name][l]] for name in ("id", "mat") for l in range(L)),
            ["full model", *first["mat"][L]]]
    print("\nThe next token, as each layer would have it:", table(rows), sep="\n")
    picture(run, e)
    saved = torch.load(run.out / "technique" / "maps.pt", map_location=run.device, weights_only=True)
    maps = {tuple(map(int, pair.split())): m for pair, m in saved.items()}
    layers, lam = (range(1, L), s.exit_threshold) if s.exit_layer < 0 else ((s.exit_layer,), -math.inf)
    decoder = Decoder(model, maps, layers, lam, s.kv)
    prompt = sample(run, model, next_logits=decoder).size(1) - s.sample_tokens
    if through := decoder.through[1:max(1, s.block_size - prompt + 1)]:  # the first is the prompt
        print(f"\nWithin the context its tokens went through {torch.cat(through).float().mean():.2f} of {L} layers.")


def picture(run, e):
    """out/jump.png: r^2 of all pairs (below 0 as 0), Precision@1 by layer, early exit with exact context; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # an extra
        return
    figure, n = Figure(figsize=(13, 3.2), layout="constrained"), len(e["r2"]["id"])
    *maps, precision, curve = figure.subplots(1, 4)
    for name, axes in zip(("id", "mat"), maps):
        shown = axes.imshow([[math.nan if v is None else v for v in row[1:]] for row in e["r2"][name][:-1]], vmin=0, vmax=1,
                            extent=(0.5, n - 0.5, n - 1.5, -0.5))
        axes.set(title=f"r² of {name}", xlabel="to layer", ylabel="from layer")
        curve.plot(*zip(*((point["layers"], point["agreement"]) for point in e["exit"]["curve"][name])), ".-", label=name)
    figure.colorbar(shown, ax=maps)
    for name, row in e["precision"].items():
        if name != "bigrams":
            precision.plot(row["1"], "--" if name == "affine" else "-", label=name)
    precision.set(title="Precision@1", xlabel="layer", ylim=(0, 1))
    curve.set(title="early exit", xlabel="layers gone through", ylabel="agreement with the full model")
    precision.legend(), curve.legend()
    figure.savefig(run.out / "jump.png", dpi=100)


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
