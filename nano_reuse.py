# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm", "pytest"]
# ///
"""
Reuse Transformer

    "Leveraging redundancy in attention with Reuse Transformers"
    Bhojanapalli, Chakrabarti, Veit, Lukasik, Jain, Liu, Chang and Kumar, 2021, https://arxiv.org/abs/2110.06821

A transformer computes its attention maps anew in every layer, and the paper finds that many come out much like those of the
layer below. So compute them once, and let the next layers use them again. Such a layer keeps its own values and its own
output projection, so it still does something of its own with the tokens it looks at; where to look is decided below. It has
no query and key weights, no scores, no softmax, and in generation no keys in the cache:

    a layer of its own   A = softmax(Q K^T / sqrt(D) + causal)             o_h = A_h V_h     for all heads h
    a reusing layer      A = [A_new, A_below[:K]], H-K new heads first     o_h = A_h V_h

      layer 5   Q K V   own maps                  P = 3 layers reuse (--reuse_layers), all heads of them (--reuse_heads -1),
      layer 4   Q K V   own maps                  from layer 1 on (--first_reuse_layer): the paper's choice, P half the depth.
      layer 3       V   <---+
      layer 2       V   <---+                     A layer has 12 C^2 weights, of them 2 C^2 in Q and K. So reuse in 6 layers
      layer 1       V   <---+                     pays for one more layer: 6 dense layers and 7, of which 6 reuse, have equally
      layer 0   Q K V   ----+                     many weights (LayerNorms aside); the paper compares 12 and 13, and 24 and 26.

Maps are handed up after the softmax and before dropout, and gradients flow down: Q and K of layer 0 learn from P + 1 layers.

Two implementations of this one function. probs hands up the maps, as the authors' code does, and really skips the scores. qk
hands up the queries and keys that determine them, and fused attention computes them again. For a token and head that keeps 2 D
numbers instead of T: a map is the larger one beyond T = 2 D, 128 for heads of 64. And 16-bit maps cost D operations a byte to
compute again, while an H100 does 295 in the time of moving one (989e12 and 3.35e12 a second by its data sheet): by this count,
without softmax and not measured, to compute again is cheaper there. So training and prompts use qk. Generation is where literal reuse pays: one row of a
map is small, and the keys of reused heads need not be read, or kept.

    python nano_reuse.py                        # train, evaluate, sample; within 3 minutes on 2 CPU cores
    python nano_reuse.py --compare              # beside the dense twin, the deeper model, and a dense one with as few weights
    python nano_reuse.py --reuse_heads 2 --reuse_layers 4       # partial reuse

What we found. Tiny Shakespeare, 6 layers of 96, T = 64, P = 3; 3 seeds, mean ± standard deviation, nats per character; x86-64
CPU, 1 thread, float32, torch 2.13.0 (README has the whole table and the sweep of the rates):

    python tests/evidence.py nano_reuse -- --muon_lr 0.06 --max_iters 600 --eval_interval 300 --similarity_windows 256

                                       reuse           dense twin      deeper: 6 of 7    narrow: thinner MLPs
    parameters                       621,888         677,184         677,376           621,888
    validation loss, last = best   1.665 ± 0.004   1.676 ± 0.002   1.649 ± 0.006     1.681 ± 0.006
    minus the dense twin's        -0.011 ± 0.003                  -0.027 ± 0.005     0.005 ± 0.004

    maps of the dense twin:    trained          another sequence   random Q, K      before training
    like the layer below     0.325 ± 0.004      0.245 ± 0.006    0.134 ± 0.005      0.980 ± 0.000
    like those further below 0.309 ± 0.013      0.254 ± 0.008    0.121 ± 0.011      0.980 ± 0.000

  - Reuse is ahead in this short run, slightly behind in a longer one with its 8% fewer weights, and level with as many: after
    1,500 steps the dense twin has 1.547 ± 0.005, reuse 1.557 ± 0.002, the deeper model 1.548 ± 0.004 (commands in README).
  - The maps that are replaced were not alike: layers 1, 2, 3 have a similarity of 0.27, 0.26, 0.25 to layer 0, no more than maps
    of another sequence. The table is about layers 3 to 5: a third, hardly more to the layer below than to those further below.
  - Without training for it, copied maps cost 0.02 to 0.08 nats in one layer and 0.27 in the three that reuse (0.22 with each
    head's best match).

What it costs. python tests/bench.py reuse, forward and backward of 6 layers of 128 with 2 heads of 64, P = 3, Intel Xeon
at 2.5 GHz, 2 threads:

    T = 1024            time      kept for backward     T = 4096            time      kept for backward
    eager dense        1338 ms        415 MB            eager dense        4510 ms       1113 MB
    eager reuse         830 ms        298 MB            eager reuse        2705 ms        647 MB
    fused dense         425 ms        207 MB            fused dense         704 ms        207 MB
    fused reuse         415 ms        195 MB            fused reuse         677 ms        195 MB

  Eager reuse is probs, fused reuse qk. One step of decoding 8 sequences at context 4096 (6 layers of 384) takes 43.8 ms dense,
  42.7 ms dense with fused attention, 32.5 ms with P = 3 and 24.6 ms with P = 5; the cache holds 18,432, 13,824 and 10,752 bytes a
  token. Nothing was measured on a GPU yet.

What is the paper's and what is ours. Written from the abstract, the results table and the authors' TensorFlow code
(tensorflow/models, official/nlp/modeling/layers/reuse_attention.py and reuse_transformer.py):
 1. Theirs: what is reused (after softmax and mask, before dropout, no stop-gradient), the first K heads by index, new heads
    first in what is handed up, so that for H/2 < K < H old maps age out; layer 0 computes, the next P reuse, the rest computes.
 2. Theirs: K = H with P = half the depth, or K = H/2 with P = all layers but two; and deeper models of as many weights. Of
    their 13 layers 6 reuse. At 6 layers our deeper arm has to reuse in 6 of 7, so that all its maps come from the embeddings
    alone: it is no copy of their experiment.
 3. Among the results we know none is of a decoder-only language model: this one is an extrapolation.
 4. The order in which values meet the maps is ours (new heads first as well); they keep two groups of values and add the
    outputs up. It is the same function, since every layer learns its own values and output projection.
 5. qk, the cached generation, first_reuse_layer and the narrow arm are ours.
 6. Similarity by total variation is the paper's, as others report it. Best match over heads, averaged over heads, sequences
    and queries, is our reading of it; leaving out the first queries, and all controls, are ours.
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
    reuse_layers: int = flag(-1, "P: how many layers reuse the maps from below (-1: half of them)", least=-1)
    reuse_heads: int = flag(-1, "K: how many heads of such a layer reuse, the others are its own (-1: all)", least=-1)
    first_reuse_layer: int = flag(1, "the lowest of these P layers", least=1)
    reuse_impl: str = flag("qk", "hand up queries and keys, for fused attention, or the maps themselves: one function",
                           choices=("qk", "probs"), free=True)
    similarity_windows: int = flag(64, "validation windows on which maps are compared", least=2, free=True)

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
        room = self.n_layer - self.first_reuse_layer
        if room < 1 < self.n_layer:
            raise UserError(f"--first_reuse_layer {self.first_reuse_layer} is not one of the layers 1 to {self.n_layer - 1}")
        self.reuse_layers = min(self.n_layer // 2, room) if self.reuse_layers < 0 else self.reuse_layers
        self.reuse_heads = self.n_head if self.reuse_heads < 0 else self.reuse_heads
        if self.reuse_layers > room:
            raise UserError(f"--reuse_layers {self.reuse_layers} is too much: of {self.n_layer} layers {room} are left from "
                            f"--first_reuse_layer {self.first_reuse_layer} on")
        if self.reuse_heads > self.n_head:
            raise UserError(f"--reuse_heads {self.reuse_heads} is more than --n_head {self.n_head}")
        if self.compare and (self.n_layer < 6 or not self.reuse_layers * self.reuse_heads):
            raise UserError("--compare needs --n_layer 6 or more, since one of its arms pays for a layer with reuse in 6, and "
                            "--reuse_layers and --reuse_heads above 0")


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
# The technique: attention with maps from below
# ---------------------------------------------------------------------------------------------------------------------

def reused_heads(s, layer):
    """K where this layer reuses, else 0."""
    return s.reuse_heads if 0 <= layer - s.first_reuse_layer < s.reuse_layers else 0


def causal_maps(q, k):
    """Attention maps A = softmax(q k^T / sqrt(D)), the future masked: twice (B, H, T, D) -> (B, H, T, T)."""
    T, D = q.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return (q * D ** -0.5 @ k.transpose(-1, -2)).masked_fill(future, -math.inf).softmax(-1).to(q.dtype)


def join(new, handed):
    """The H heads of a layer, in dim 1: H-K new ones first, then the first K of the H that were handed up (None: K = 0)."""
    K = 0 if handed is None else handed.size(1) - new.size(1)
    return new if K == 0 else handed if new.size(1) == 0 else torch.cat([new, handed[:, :K]], 1)


def attend(q, k, v, handed, impl="qk", dropout=0.0):
    """One layer's attention, with new heads and reused ones:  o = dropout([A_new, A_handed[:K]]) v

    q, k: (B, H-K, T, D), of the new heads; v: (B, H, T, D); handed: what the layer below handed up, None in layer 0.
    Returns o (B, H, T, D) and what is handed up: the maps (B, H, T, T), before dropout, or with impl "qk" the queries and
    keys (2 x (B, H, T, D)) that determine them: the same o, and with fused attention no map in memory (for 0 < K < H they are
    copied side by side, which saves no memory over dense attention). Gradients flow through all that is handed up.
    """
    if impl == "qk":
        q, k = (join(new, below) for new, below in zip((q, k), handed or (None, None)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout), (q, k)
    maps = join(causal_maps(q, k), handed) if q.size(1) else handed                              # (B, H, T, T)
    return F.dropout(maps, dropout) @ v, maps


# ---------------------------------------------------------------------------------------------------------------------
# The model: GPT-2's blocks, and layers without queries and keys
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


class ReuseAttention(Attention):
    """Attention that takes the maps of K heads from the layer below: those have no query and key weights. K = 0 is dense."""

    def __init__(self, s, layer):
        super().__init__(s)
        self.impl, self.n_reused = s.reuse_impl, reused_heads(s, layer)
        if self.n_reused:
            new = (s.n_head - self.n_reused) * s.n_embd // s.n_head
            self.c_q, self.c_k = (nn.Linear(s.n_embd, new, bias=s.bias) if new else None for _ in range(2))

    def heads(self, x):
        """(B, T, C) -> new queries and keys, each (B, H-K, T, D), and values (B, H, T, D)."""
        if self.n_reused < self.n_head:
            return super().heads(x)
        v = self.c_v(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        return v[:, :0], v[:, :0], v

    def forward(self, x, handed):  # (B, T, C), from the layer below -> (B, T, C), for the layer above
        q, k, v = self.heads(x)
        y, handed = attend(q, k, v, handed, self.impl, self.dropout * self.training)
        return self.merge(y), handed


class Block(nn.Module):
    def __init__(self, s, layer):
        super().__init__()
        self.ln_1, self.attn = layer_norm(s), ReuseAttention(s, layer)
        self.ln_2, self.mlp = layer_norm(s), MLP(s)

    def forward(self, x, handed):
        y, handed = self.attn(self.ln_1(x), handed)
        x = x + y
        return x + self.mlp(self.ln_2(x)), handed


class GPT(nn.Module):
    """GPT-2 in which layers first_reuse_layer .. first_reuse_layer + reuse_layers - 1 reuse attention maps."""

    def __init__(self, s):
        super().__init__()
        self.block_size, self.dropout = s.block_size, s.dropout
        self.wte = nn.Embedding(s.vocab_size, s.n_embd)  # also the output head
        self.wpe = nn.Embedding(s.block_size, s.n_embd)
        self.h = nn.ModuleList(Block(s, layer) for layer in range(s.n_layer))
        self.ln_f = layer_norm(s)
        init_weights(self, s)

    def states(self, idx):
        """Token ids (B, T) -> the residual stream (B, T, C) after the embedding and after every layer, before ln_f."""
        x, handed = [self.embed(idx)], None
        for block in self.h:
            y, handed = block(x[-1], handed)
            x.append(y)
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
    """The same model in which every layer computes its own maps, with fused attention."""
    return build("dense", s)


class Decoder:
    """Next-token logits (B, vocab) from a cache: model.generate(idx, n, next_logits=Decoder(model, len(idx))).

    A reused head has no keys, so none are cached for it: its row of the map, one number for each token, comes from the
    layer below. dtype: of the cache, by default the weights'. The first call takes the whole prompt, each later one the
    same text and one more token. Positions are absolute: beyond block_size tokens nothing in the cache is valid any more,
    and the model runs over the last block_size tokens.
    """

    def __init__(self, model, rows, dtype=None):
        C, H, like = model.wte.embedding_dim, model.h[0].attn.n_head, model.wte.weight.detach()
        self.model, self.length = model, 0
        self.keys, self.values = ([like.new_zeros(rows, heads, model.block_size, C // H, dtype=dtype) for heads in counts]
                                  for counts in ([H - block.attn.n_reused for block in model.h], [H] * len(model.h)))

    def bytes_per_token(self):
        """Of the cache, for one sequence."""
        return sum(x[0, :, 0].numel() * x.element_size() for x in (*self.keys, *self.values))

    @torch.no_grad()
    def __call__(self, idx):
        """Token ids (B, T) -> logits (B, vocab) of token T+1."""
        model, start, T = self.model, self.length, idx.size(1)
        if T > model.block_size:
            return model(idx[:, -model.block_size:])[0][:, -1]
        assert start == 0 or T == start + 1, "one more token each time: a new text takes a new Decoder"
        x, handed = model.wte(idx[:, start:]) + model.wpe.weight[start:T], None                  # (B, T or 1, C)
        for block, K, V in zip(model.h, self.keys, self.values):
            q, k, v = block.attn.heads(block.ln_1(x))
            K[:, :, start:T], V[:, :, start:T] = k, v
            if start == 0:
                y, handed = attend(q, k, v, handed, block.attn.impl)
            else:
                row = (q * q.size(-1) ** -0.5 @ K[:, :, :T].transpose(-1, -2)).softmax(-1)       # (B, H-K, 1, T)
                handed = join(row.to(v.dtype), handed)
                y = handed @ V[:, :, :T]                                                         # (B, H, 1, D)
            x = x + block.attn.merge(y)
            x = x + block.mlp(block.ln_2(x))
        self.length = T
        return model.read_out(x[:, -1])[0]


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

ARMS = ("technique", "dense", "deeper", "narrow")  # the first is trained always, the others with --compare


def settings_of(arm, s):
    """The settings of an arm's model. deeper: reuse in 6 layers pays for one more (a layer has 12 C^2 weights, Q and K 2 C^2)."""
    if arm == "technique":
        return s
    if arm == "deeper":
        more = max(1, s.n_layer // 12)
        return dataclasses.replace(s, n_layer=s.n_layer + more, reuse_layers=6 * more, reuse_heads=s.n_head, first_reuse_layer=1)
    return dataclasses.replace(s, reuse_layers=0, reuse_impl="qk", compare=False)  # dense attention is always the fused one


def hidden_sizes(arm, s):
    """Width of each MLP. narrow: dense, with as many weights (biases aside) taken from the MLPs as reuse takes from attention."""
    away = s.reuse_layers * s.reuse_heads * s.n_embd // s.n_head if arm == "narrow" else 0  # 2 C weights each
    layers = settings_of(arm, s).n_layer
    return [4 * s.n_embd - away // layers - (layer < away % layers) for layer in range(layers)]


def build(arm, s):
    model = GPT(settings_of(arm, s))
    if arm == "narrow":
        for block, hidden in zip(model.h, hidden_sizes(arm, s)):
            block.mlp = MLP(s, hidden)
        init_weights(model, s)
    return model


def flops_per_token(s, arm):
    """Training FLOPs for a token, forward and backward. 6 for each weight in a matrix product (the tied head is one, the
    embedding is not), and 6 for each channel of each entry of a map for q.k and for its use on v: the square in full, although a
    fused causal kernel leaves half of it out. With qk a reused map is computed again, with probs it is not."""
    C, hidden, s = s.n_embd, hidden_sizes(arm, s), settings_of(arm, s)
    reused = [reused_heads(s, layer) / s.n_head for layer in range(s.n_layer)]
    weights = sum(4 * C * C - 2 * C * C * share + 2 * C * h for share, h in zip(reused, hidden))
    products = sum(2 - share * (s.reuse_impl == "probs") for share in reused)
    return 6 * (weights + s.vocab_size * C) + 6 * s.block_size * C * products


def attention_flops(s, arm):
    """Forward FLOPs of attention for a token where reused maps are not computed again (probs): projections, q.k of the new maps,
    maps on v."""
    C, s = s.n_embd, settings_of(arm, s)
    reused = [reused_heads(s, layer) / s.n_head for layer in range(s.n_layer)]
    return sum(8 * C * C - 4 * C * C * share + 2 * s.block_size * C * (2 - share) for share in reused)


def load_data(s, device):
    """What start() makes Run.data of."""
    data = Data(s, device)
    if len(data.windows("val")) < 2:
        raise UserError(f"{data.folder / 'val.bin'} is too short to compare two sequences: use a smaller --block_size")
    return data


def train_arm(run, arm, model):
    return train(run, arm, model)


def walk(model, idx, change=lambda layer, maps, below: maps):
    """Token ids (B, T) -> the last residual stream (B, T, C), and the maps (B, H, T, T) that every layer used.
    change(layer, its maps, those used in the layers below) -> those it is to use."""
    x, used = model.embed(idx), []
    for layer, block in enumerate(model.h):
        q, k, v = block.attn.heads(block.ln_1(x))
        maps = join(causal_maps(q, k), used[-1] if used else None)
        used.append(change(layer, maps, used))
        x = x + block.attn.merge(used[-1] @ v)
        x = x + block.mlp(block.ln_2(x))
    return x, used


def copied(similar, layers, match):
    """For walk: all heads of these layers use the maps of the layer below the first of them, as they come or, with match,
    each the one that it is most similar to. similar: (L, H, L, H)."""
    source = layers[0] - 1

    def change(layer, maps, below):
        if layer not in layers:
            return maps
        return below[source][:, similar[layer, :, source].argmax(-1)] if match else below[source]
    return change


def head_similarity(a, b):
    """Maps (B, n, queries, T) and (B, m, queries, T) -> (n, m): 1 - total variation, averaged over sequences and queries,

        1 - 1/2 sum_j |a_ij - b_ij|       1: the same, 0: disjoint
    """
    return 1 - torch.cdist(a.flatten(2), b.flatten(2), p=1).mean(0) / 2 / a.size(2)


def layer_similarity(similar):
    """(L, H, L, H) -> (L, L): for every head of a layer (row) its best match among the heads of another, averaged."""
    return similar.amax(3).mean(1)


def random_maps(s, model, idx):
    """The maps (L of (B, H, T, T)) that random queries and keys give, projections of what each layer reads, where the scores of
    each head and sequence have the standard deviation that the trained head's have: they look at something, for no reason."""
    found = []
    causal = torch.ones(idx.size(1), idx.size(1), device=idx.device).tril()

    def spread(scores):  # (B, H, T, T) -> (B, H, 1, 1): within the rows, whose mean does not matter to a softmax
        centred = (scores - (scores * causal).sum(-1, keepdim=True) / causal.sum(-1, keepdim=True)) * causal
        return (centred ** 2).mean((2, 3), keepdim=True).sqrt()

    for layer, (block, x) in enumerate(zip(model.h, model.states(idx))):
        g = torch.Generator().manual_seed(key(s.seed, "random maps", layer))
        x = block.ln_1(x)
        q, k, _ = block.attn.heads(x)
        rq, rk = (x[:, None] @ torch.randn(q.size(1), x.size(-1), q.size(3), generator=g).to(x) for _ in range(2))
        rq = rq * spread(q @ k.transpose(-1, -2)) / spread(rq @ rk.transpose(-1, -2))
        found.append(join(causal_maps(rq, rk), found[-1] if found else None))
    return found


@torch.no_grad()
def redundancy(run, arm, model, budget=2**26):
    """How alike the maps of a model's layers are, over windows from all of the validation split and over at most 64 queries of
    each, the first 32 left out: they see so few sources that all maps are alike. Beside it two controls,

    random           random_maps
    other_sequence   maps of one sequence against those of another: what position alone explains

    and, for reference, the maps before training: nearly uniform, hence nearly the same. For the dense twin also the loss on
    these windows when layers use the maps of another layer without having been trained for it. budget: numbers in the maps
    of one chunk of windows.
    """
    s, L, H, T = run.settings, len(model.h), run.settings.n_head, run.settings.block_size
    spaced = lambda first, last, most: np.linspace(first, last, min(most, last - first + 1)).astype(int)
    starts = run.data.windows("val")
    starts = starts[spaced(0, len(starts) - 1, s.similarity_windows)]
    queries = spaced(min(32, T // 2), T - 1, 64)
    rows = max(1, budget // (L * H * T * T))
    torch.manual_seed(key(s.seed, "weights"))
    untrained = build(arm, s).to(run.device).eval()
    similar = {}

    def add(name, a, b):
        similar[name] = similar.get(name, 0) + head_similarity(a, b).view(L, H, L, H) * len(a) / len(starts)

    def flat(maps):  # L of (B, H, T, T) -> (B, L H, queries, T)
        return torch.cat([m[:, :, queries] for m in maps], 1)

    for at in range(0, len(starts), rows):
        x, other = (run.data.rows("val", part[at:at + rows])[0] for part in (starts, np.roll(starts, 1)))
        own = flat(walk(model, x)[1])
        add("trained", own, own)
        add("other_sequence", own, flat(walk(model, other)[1]))
        own = flat(random_maps(s, model, x))
        add("random", own, own)
        own = flat(walk(untrained, x)[1])
        add("untrained", own, own)

    def loss(*copying):
        total = 0.0
        for at in range(0, len(starts), rows):
            x, y = run.data.rows("val", starts[at:at + rows])
            h = walk(model, x, *copying)[0]
            total += model.read_out(h, y)[1].item() * len(x) / len(starts)
        return total

    def mean(m, further):  # of layers 3 and up, with the one below or those further below, layer 0 aside
        rows = [sum(m[i][1:i - 1]) / (i - 2) if further else m[i][i - 1] for i in range(3, L)]
        return sum(rows) / len(rows) if rows else None

    by_layer = {name: layer_similarity(m).tolist() for name, m in similar.items()}
    found = dict(similarity=by_layer["trained"], similarity_of=arm,
                 similarity_control={name: m for name, m in by_layer.items() if name != "trained"},
                 similarity_below={name: mean(m, False) for name, m in by_layer.items()},
                 similarity_further={name: mean(m, True) for name, m in by_layer.items()})
    if arm == "dense":
        reusing = [layer for layer in range(L) if reused_heads(s, layer)]
        found["copied_maps"] = dict(none=loss())
        for name, match in ("identity", False), ("best_match", True):
            found["copied_maps"][name] = [loss(copied(similar["trained"], [layer], match)) for layer in range(1, L)]
            found["copied_maps"][f"all_{name}"] = loss(copied(similar["trained"], reusing, match))
    return found


@torch.no_grad()
def decoding(run, context=4096, rows=8, tokens=20):
    """Bytes of the cache for a token, and tokens a second of a decoding step at a long context, of the dense twin and of the
    technique: models of this run's size with untrained weights and caches full of zeros, in turns, medians."""
    s = dataclasses.replace(run.settings, block_size=context, compare=False)
    torch.manual_seed(key(s.seed, "decoding"))
    decoders = {name: Decoder(build(arm, s).to(run.device, run.dtype).eval(), rows)
                for name, arm in (("dense", "dense"), ("reuse", "technique"))}
    seconds = {name: [] for name in decoders}
    idx = torch.zeros(rows, context, dtype=torch.long, device=run.device)
    for turn in range(tokens):
        for name, decoder in decoders.items():
            decoder.length = context - tokens + turn
            start = time.perf_counter()
            decoder(idx[:, :decoder.length + 1]).argmax(-1)[0].item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return dict(kv_cache_bytes_per_token={name: d.bytes_per_token() for name, d in decoders.items()}, decode_context=context,
                decode_tokens_per_second={name: rows / statistics.median(t) for name, t in seconds.items()})


def evaluate_arm(run, arm, model):
    s = run.settings
    found = redundancy(run, arm, model.eval()) if arm == ("dense" if s.compare else "technique") else {}
    if arm == "technique":
        found.update(decoding(run), attention_flops_ratio=attention_flops(s, arm) / attention_flops(s, "dense"))
    return found


def report(run, arms, model):
    """The tables, the map of similarities as a picture where matplotlib is installed, and a sample."""
    e = arms["technique"]["evaluation"]
    if "dense" in arms:  # the claim is about a model whose layers were free to have maps of their own
        e.update(arms["dense"]["evaluation"])
    similarity, whose = e.get("similarity", []), {"dense": "the dense twin"}.get(e.get("similarity_of"), "this model")
    layers = [f"layer {i}" for i in range(len(similarity))]
    if similarity:
        print(f"\nHow alike the attention maps of two layers are, in {whose}: 1 - total variation, each head of the layer on the left",
              "with its best match in the other." + (" --compare measures the dense twin." if "copied_maps" not in e else ""),
              table([["", *layers], *([name, *(f"{v:.2f}" for v in row)] for name, row in zip(layers, similarity))]), sep="\n")
    if "copied_maps" in e:
        rows = [["mean over layers 3 and up", "and the layer below", "and those further below, without layer 0"]]
        for name, label in (("trained", "trained"), ("random", "random queries and keys"), ("other_sequence", "of another sequence"),
                            ("untrained", "before training")):
            rows.append([label, e["similarity_below"][name], e["similarity_further"][name]])
        c = e["copied_maps"]
        more = [["loss with copied maps, not trained for it", "heads as they come", "each head its best match"], ["none", c["none"], c["none"]]]
        more += [[f"{name}, from the layer below", *pair] for name, *pair in zip(layers[1:], c["identity"], c["best_match"])]
        more += [["all heads of all layers that reuse", c["all_identity"], c["all_best_match"]]]
        print("\n" + table(rows), table(more), sep="\n\n")
    print("\n" + table([["", "dense", "reuse"], ["cache, bytes a token", *e["kv_cache_bytes_per_token"].values()],
                        [f"decoding at context {e['decode_context']:,}, tokens/s", *e["decode_tokens_per_second"].values()],
                        ["attention FLOPs, reused maps not computed", 1.0, e["attention_flops_ratio"]]]))
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # an extra
        Figure = None
    if Figure and similarity:
        figure = Figure(figsize=(4, 3.4), layout="constrained")
        axes = figure.subplots()
        figure.colorbar(axes.imshow(similarity, vmin=0, vmax=1), label="1 - total variation")
        axes.set(xlabel="layer with the best match", ylabel="layer whose heads are matched", xticks=range(len(layers)), yticks=range(len(layers)),
                 title=f"attention maps of {whose}")
        figure.savefig(run.out / "similarity.png", dpi=120)
    sample(run, model, next_logits=Decoder(model, 1, run.dtype))


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
