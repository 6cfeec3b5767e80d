# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken", "tqdm", "pytest"]
# ///
"""
Mixture-of-Modules (MoM)

    "Mixture-of-Modules: Reinventing Transformers as Dynamic Assemblies of Modules"
    Gong, Lv, Guan, Yan, Wu, Zhang, Huang, Zhao and Yan, EMNLP 2024, https://arxiv.org/abs/2407.06677

A transformer sends every token through the same layers in the same order. Why? Take the layers apart: their attentions and
their feed-forwards, each with its own LayerNorm, become a set of modules, and SKIP, which does nothing, joins them. Then let
every token choose. In each of H rounds a router picks K attention modules for the token, a second router K feed-forward
modules, and what they return is added to the residual stream. A module may be used in many rounds, in one, or in none:
depth is no longer the number of layers.

      vanilla, depth 6                MoM, depth 9 of the same weights: the path of one token (K = 1)

      layer 5   attention   FFN       layer 5   attention   FFN          modules: A0 A1 A2 A3, SKIP
      layer 4          A3   F3        round 7          A1   F3                    F0 F1 F2 F3, SKIP
      layer 3          A2   F2          ...           ...   ...
      layer 2          A1   F1        round 2          A1   SKIP         the lowest and the highest layer
      layer 1          A0   F0        round 1          A3   F0           stay as they are (--bottom, --top)
      layer 0   attention   FFN       layer 0   attention   FFN

    router          s' = GRU(x, s)     p = softmax((W s' + b) / tau)     S = the K most probable     g_i = p_i for i in S
    attention       [q, k, v]_t = sum_{i in S_t} W_i^QKV LN_i(x_t)       a_t = softmax(q_t k^T / sqrt(D) + causal) v
                    y_t = sum_{i in S_t} g_i W_i^O a_t
    feed-forward    y_t = sum_{i in S_t} g_i FFN_i(LN_i(x_t))

One attention runs over all tokens; only its projections are those of each token's modules. Each router has a state s that
goes from round to round of one token, so that it can remember the token's way. Training has two phases. The first trains a
vanilla model, so that modules become different; the second takes it apart and trains modules and routers together, with

    loss = cross-entropy + 0.01 sum over both routers of E sum_e f_e P_e

where f_e is the share of the picks that fell on candidate e, one of E (SKIP among them), and P_e its mean probability. It is
1 when all are used alike and E when one takes all: it keeps a router from using one candidate for everything.

A token pays for the matrices of the modules it chose, and of no other: tokens are sorted by module, multiplied and put back.
Routers, and attention's scores, it pays for in every round. With --bottom 0 --top 0 some relatives are special cases:
vanilla (--router fixed --rounds 6), shared layers as in a Universal Transformer without halting (--attn_modules 1
--ffn_modules 1 --skip off), one layer of a mixture of experts (--attn_modules 1 --rounds 1 --skip off).

    python nano_mom.py                          # both phases, evaluation, sample; within 3 minutes on 2 CPU cores
    python nano_mom.py --compare                # beside vanilla, a fixed order without routers, and a shallow assembly
    python nano_mom.py --route_k 2 --gate renorm

What we found. Tiny Shakespeare, 6 layers of 96, T = 64; 750 steps of phase 1, 750 of phase 2; 3 seeds, mean ± standard
deviation, nats per character; x86-64 CPU, 1 thread, float32, torch 2.13.0 (README has the whole table and the sweep):

    python tests/evidence.py nano_mom -- --max_iters 1500 --eval_interval 375

                                 MoM, deeper         vanilla        fixed order      MoM, shallow
    graph depth, of 6 layers          9                 6                9                2
    validation loss            1.6465 ± 0.0101  1.5795 ± 0.0078  1.5783 ± 0.0072  1.7997 ± 0.0177
    minus vanilla's            0.0670 ± 0.0061                  -0.0011 ± 0.0029  0.2202 ± 0.0142
    training FLOPs a token          6.67M             4.46M            6.67M            2.76M
    keys and values, bytes          6,912             4,608            6,912            1,536
    SKIP: attention, FFN          21%, 23%                                            18%, 13%
    the trained model on a part of the validation split, less some modules, not trained again:
      all modules              1.5692 ± 0.0136                                    1.7252 ± 0.0188
      without half the attention    1.5696                                            3.3013
      without a quarter of the FFN  1.6056                                            1.7474
      without all attention modules 1.5697
      without all FFN modules       1.8457

  - The paper's gain is not reproduced, at a scale far below the paper's and with choices of ours (3, 4, 8): choosing is
    behind vanilla, and behind the same depth in a fixed order. Going through the same layers again gains nothing here
    either. A vanilla model of two layers does as well as MoM's nine (1.651 ± 0.007) with 1.51M FLOPs.
  - Routed attention is hardly used: in round 1, 93% of it goes to the 20% of tokens that skip, whose keys and values are 0.
    Without SKIP it is used more, and the loss is the same (1.648 ± 0.011). Untrained routers have 1.655 ± 0.014.
  - Shallow, attention is needed, and 62% of vanilla's FLOPs cost 0.22 nats.

What it costs. python tests/bench.py mom, forward and backward of 2,048 tokens, K = 1, Intel Xeon at 2.5 GHz, 2 threads:

                                      N = 2      N = 4      N = 8     every module on every token, N = 4     dense twin
    feed-forward, width 384          79.2 ms    79.2 ms    89.4 ms                 272.3 ms                   67.4 ms
    model, 6 rounds of width 384      814 ms     843 ms     905 ms                  2432 ms                    634 ms
    model, 6 rounds of width 96       155 ms     167 ms     179 ms                   348 ms                     79 ms

  Nothing was measured on a GPU yet.

What is the paper's, what is its code's, and what is ours. Written from the abstract, summaries, and the authors' code
(github.com/gzhch/Mixture-of-Modules); the paper's own equations were not at hand.
 1. The paper's: modules, SKIP, two routers, H rounds, top-K, and the two phases.
 2. Its code's: GRU routers that read the residual stream without LayerNorm; the unweighted sum of queries, keys and values,
    with gates on the output projections; a temperature of 0.2; bottom and top layers; the weight 0.01 and Switch's form of
    the balance loss.
 3. Gates. The code divides p by its sum over the picks. With K = 1 that is 1, whatever the router does, and the
    cross-entropy gives the router no gradient: this is refused here. The default is p itself, as in Switch.
 4. Balance. The code takes the softmax of its probabilities once more and counts the first pick only. Here p is taken as it
    is and all K picks count, pooled over rounds. As in the code SKIP is a candidate, so it is pushed to 1/(N+1), too.
 5. A token that skips attention keeps a key and a value of zeros, as in the code: a sink, with a score of 0 and no content.
    Here it comes to take nearly all of the routed attention (attention_to_skip in the results).
 6. Phase 2 starts from all of phase 1's weights; the code leaves out the final LayerNorm. Dropout is on what a sublayer
    adds; the code has none in its feed-forward modules.
 7. One set of modules and two routers; the code can stack several (chunks), each followed by a plain layer. A router has a
    state of 32 numbers instead of 256, and one output per candidate.
 8. Which depths and K the paper's models had is not known to us. Beside GPT-2's 36 layers one has a graph more than 38%
    deeper, one more than 60% less deep; ours are 50% deeper (9) and 67% less deep (2). Shallow's K = 2 is ours.
 9. The dense arm is vanilla with phase 1, and then a new optimizer and schedule, as all arms: this costs it 0.026 (one seed,
    1.546 without). Muon trains the modules, AdamW the routers.
"""
import argparse
import contextlib
import copy
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
    attn_modules: int = flag(-1, "N_A: attention modules, from the first layers between bottom and top (-1: all)", least=-1)
    ffn_modules: int = flag(-1, "N_F: feed-forward modules, likewise", least=-1)
    rounds: int = flag(-1, "H: rounds of assembly (-1: a graph at least 38% deeper than vanilla)", least=-1)
    route_k: int = flag(1, "K: modules that a token picks in a round, SKIP among them", least=1)
    router: str = flag("gru", "who picks: a GRU, the same GRU untrained, or nobody (modules take turns)",
                       choices=("gru", "fixed", "random"))
    router_dim: int = flag(32, "R: width of a router's state", least=1)
    gate: str = flag("prob", "weight of a picked module: its probability, or that divided by the sum over the picks",
                     choices=("prob", "renorm"))
    route_temperature: float = flag(0.2, "tau: the routers' logits are divided by it", least=1e-3)
    balance: float = flag(0.01, "weight of the loss that spreads the tokens over the modules", least=0.0)
    skip: bool = flag(True, "SKIP, which does nothing, is among the modules")
    phase1: float = flag(0.5, "first share of the steps, which trains the vanilla model that the modules are taken from",
                         least=0.0, most=1.0)
    bottom: int = flag(1, "plain layers below the rounds", least=0)
    top: int = flag(1, "plain layers above the rounds", least=0)

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
        free = self.n_layer - self.bottom - self.top
        if free == self.attn_modules == self.ffn_modules == self.rounds == 0:  # the vanilla model
            return
        if free <= 0:
            raise UserError(f"--bottom {self.bottom} and --top {self.top} leave none of --n_layer {self.n_layer} layers to take "
                            "apart: use more layers, or a smaller --bottom and --top")
        if self.rounds == 0:
            raise UserError("--rounds must be at least 1 (-1: as many as make the graph at least 38% deeper)")
        if self.rounds == -1:
            self.rounds = max(1, math.ceil(1.38 * self.n_layer) - self.bottom - self.top)
        for name in ("attn_modules", "ffn_modules"):
            n = getattr(self, name)
            if n == 0 or n > free:
                raise UserError(f"--{name} {n}: modules are layers that phase 1 trained; of --n_layer {self.n_layer}, less "
                                f"--bottom {self.bottom} and --top {self.top}, {free} are left: use 1 to {free}, -1 for all")
            n = free if n == -1 else n
            setattr(self, name, min(n, self.rounds) if self.router == "fixed" else n)  # as many as get a turn
            if self.router != "fixed" and self.route_k > n + self.skip > 1:
                raise UserError(f"--route_k {self.route_k} is more than there are: --{name} {n}{' and SKIP' * self.skip}")
        if self.router == "fixed" and self.route_k > 1:
            raise UserError(f"--router fixed takes one module a round: use --route_k 1, not {self.route_k}")
        if self.router == "gru" and self.gate == "renorm" and self.route_k == 1:
            raise UserError("--gate renorm with --route_k 1 makes every gate 1, and no gradient of the language model would "
                            "reach the routers: use --gate prob, or --route_k 2")


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
# The technique: tokens assemble their own path from a set of modules
# ---------------------------------------------------------------------------------------------------------------------

class Router(nn.Module):
    """Picks modules for each token. What it remembers goes from round to round, not from token to token:

        s' = GRU(x, s)      p = softmax((W s' + b) / tau)      S = the K most probable of N modules and SKIP
        gates   g_i = p_i   or, renorm,   g_i = p_i / sum_{j in S} p_j,   i in S

    The choice has no gradient; the router learns through the gates, and from the balance loss. In float32 also under
    autocast, where bfloat16 could not tell close candidates apart.
    """
    adamw = True  # Muon is for the hidden matrices of the model

    def __init__(self, s, n):
        super().__init__()
        self.route_k, self.gate, self.temperature = s.route_k, s.gate, s.route_temperature
        self.cell = nn.GRUCell(s.n_embd, s.router_dim)
        self.out = nn.Linear(s.router_dim, n + s.skip)
        self.requires_grad_(s.router != "random")

    def forward(self, x, state=None):
        """Tokens (M, C), their router states (M, R) or None for zeros -> picks (M, K), gates (M, K), p (M, N+1), new
        states. Pick i < N is module i, N is SKIP."""
        with torch.autocast(x.device.type, enabled=False):
            state = self.cell(x.to(self.out.weight.dtype), state)
            p = F.softmax(self.out(state) / self.temperature, -1)
        gates, picks = p.topk(self.route_k)
        if self.gate == "renorm":
            gates = gates / gates.sum(-1, keepdim=True)
        return picks, gates, p, state


grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # its name before it became public


def use_grouped_mm(x):
    """Grouped matrix products exist for bfloat16 on CUDA, with rows that are multiples of 16 bytes."""
    bf16 = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
    return x.is_cuda and bf16 and x.size(-1) % 8 == 0


class Dispatch:
    """The picks of one round as rows sorted by module: each module multiplies one block of rows, and SKIP has none.

    A row is a token and one of its K slots. The same order serves all products of a sublayer. On a CPU there are R rows,
    those with a module. With grouped, for CUDA, R = M K, so that nothing waits for the counts: SKIP's rows come last.
    """

    def __init__(self, picks, gates, n, grouped):
        module, slot = picks.flatten().sort(stable=True)                                         # (M K,), by module
        counts = (module[:, None] == torch.arange(n, device=picks.device)).sum(0)                # (N,)
        if grouped:
            self.ends, self.used = counts.cumsum(0, dtype=torch.int32), (counts > 0)[:, None, None]
            self.real, module = (module < n)[:, None], module.clamp(max=n - 1)
        else:
            self.sizes = counts.tolist()
            module, slot = module[:sum(self.sizes)], slot[:sum(self.sizes)]
        self.tokens, self.module, self.token = len(picks), module, slot // picks.size(1)         # (R,)
        self.gate = gates.flatten()[slot, None]                                                  # (R, 1)

    def gather(self, x):
        """(B, T, C) -> rows (R, C)."""
        return x.flatten(0, 1).index_select(0, self.token)

    def scatter(self, rows):
        """(R, C) -> (M, C): what a token's picks returned, summed."""
        return rows.new_zeros(self.tokens, rows.size(-1)).index_add(0, self.token, rows)


class Layers:
    """A linear layer of each of N modules, or several that read the same, after its LayerNorm or none: (R, in) -> (R, out).

    On a CPU the modules take their blocks of rows in turn. With grouped, one grouped matrix product takes all. For it the
    weights are stacked, once per forward, and a LayerNorm's gain and shift move into them:

        W (gamma * n + beta) + b = (W gamma) n + (W beta + b)
    """

    def __init__(self, layers, norms, grouped):
        self.layers, self.norms, self.grouped = layers, norms, grouped
        if not grouped:
            return
        W = torch.stack([torch.cat([layer.weight for layer in module]) for module in layers])    # (N, out, in)
        b = W.new_zeros(W.shape[:2])                                                             # (N, out)
        if layers[0][0].bias is not None:
            b = b + torch.stack([torch.cat([layer.bias for layer in module]) for module in layers])
            if norms:
                b = b + torch.stack([w @ norm.bias for w, norm in zip(W, norms)])
        if norms:
            W = W * torch.stack([norm.weight for norm in norms])[:, None]
        device = W.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
        self.W, self.b = W.to(dtype).transpose(1, 2), b.to(dtype)

    def __call__(self, rows, d):
        if self.grouped:
            if self.norms:
                rows = F.layer_norm(rows, rows.shape[-1:], eps=1e-5)
            # The kernel leaves garbage in SKIP's rows, in y and in the gradient of its input, and may leave some in the
            # gradient of weights that no row met (pytorch issues 154557, 172439): nothing of it gets past these three.
            rows, W = torch.where(d.real, rows, 0).to(self.W.dtype), torch.where(d.used, self.W, 0)
            return torch.where(d.real, grouped_mm(rows, W, offs=d.ends) + self.b[d.module], 0)
        blocks = rows.split(d.sizes)
        if self.norms:
            blocks = [norm(block) for norm, block in zip(self.norms, blocks)]
        found = [[layer(block) for layer in module] for module, block in zip(self.layers, blocks)]
        return torch.cat([y[0] if len(y) == 1 else torch.cat(y, -1) for y in found])


def assembled_heads(x, d, qkv, n_head):
    """(B, T, C) -> queries, keys, values, each (B, heads, T, D): sums over what a token picked, without gates."""
    B, T, C = x.shape
    return d.scatter(qkv(d.gather(x), d)).view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)


def assembled_attention(x, picks, gates, qkv, out, n_head, dropout=0.0):
    """One attention over all tokens, whose projections are those of the modules that each token picked.

        [q, k, v]_t = sum_{i in S_t} W_i^QKV LN_i(x_t)
        a = softmax(q k^T / sqrt(D) + causal) v
        y_t = sum_{i in S_t} g_i W_i^O a_t

    x: (B, T, C); picks, gates: (B T, K); qkv, out: Layers of the modules. Returns (B, T, C). A query of one module meets
    keys of others, head by head. A token that picked nothing but SKIP has q = k = v = 0 and y = 0, but others see its key:
    a score of 0, and no content.
    """
    (B, T, C), d = x.shape, Dispatch(picks, gates, len(qkv.layers), qkv.grouped)
    q, k, v = assembled_heads(x, d, qkv, n_head)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    rows = out(d.gather(a.transpose(1, 2).flatten(2)), d)                                        # (R, C)
    return d.scatter(rows * d.gate).view(B, T, C)  # gates and their sums are in float32


def assembled_mlp(x, picks, gates, fc, proj):
    """y_t = sum_{i in S_t} g_i FFN_i(LN_i(x_t)). x: (B, T, C); picks, gates: (B T, K). Returns (B, T, C)."""
    d = Dispatch(picks, gates, len(fc.layers), fc.grouped)
    rows = proj(F.gelu(fc(d.gather(x), d), approximate="tanh"), d)                               # (R, 4C), then (R, C)
    return d.scatter(rows * d.gate).view(x.shape)


def balance_loss(routes):
    """E sum_e f_e P_e of one router: f_e is the share of all picks that fell on candidate e, P_e its mean probability, over
    all tokens and rounds; SKIP is one of the E candidates. 1 when all are used alike, E when one takes all.
    routes: [(picks (M, K), p (M, E)) of every round]."""
    picks, p = (torch.stack(x) for x in zip(*routes))
    E = p.size(-1)
    f = (picks[..., None] == torch.arange(E, device=p.device)).to(p.dtype).mean((0, 1, 2))
    return E * (f * p.mean((0, 1))).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The model: GPT-2's blocks, plain or taken apart into modules
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
    """A layer of GPT-2. Between bottom and top it only keeps an attention and a feed-forward module, or one of them."""

    def __init__(self, s, attn=True, mlp=True):
        super().__init__()
        self.ln_1, self.attn = (layer_norm(s), Attention(s)) if attn else (None, None)
        self.ln_2, self.mlp = (layer_norm(s), MLP(s)) if mlp else (None, None)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 whose layers between bottom and top are taken apart: its weights, under its names, and two routers."""

    def __init__(self, s):
        super().__init__()
        self.block_size, self.dropout, self.n_head = s.block_size, s.dropout, s.n_head
        self.rounds, self.balance = s.rounds, s.balance if s.router == "gru" else 0.0
        self.wte = nn.Embedding(s.vocab_size, s.n_embd)  # also the output head
        self.wpe = nn.Embedding(s.block_size, s.n_embd)
        inner, end = range(s.bottom, s.n_layer - s.top), s.n_layer - s.top
        self.h = nn.ModuleList(Block(s, attn=i not in inner[s.attn_modules:], mlp=i not in inner[s.ffn_modules:])
                               for i in range(s.n_layer))
        self.ln_f = layer_norm(s)
        init_weights(self, s)
        self.bottom, self.attns, self.mlps, self.top = (
            range(0, s.bottom), inner[:s.attn_modules], inner[:s.ffn_modules], range(end, s.n_layer))  # places in h
        routed = lambda n: s.router != "fixed" and n and n + s.skip > 1  # there is something to choose
        self.attn_router = Router(s, s.attn_modules) if routed(s.attn_modules) else None
        self.mlp_router = Router(s, s.ffn_modules) if routed(s.ffn_modules) else None

    def states(self, idx, routes=None):
        """Token ids (B, T) -> the residual stream (B, T, C) after the embedding and every layer and round, before ln_f.
        routes: two lists, for attention and feed-forward; every round appends (picks, p), p None where modules take turns."""
        x = [self.embed(idx)]
        routes = ([], []) if routes is None else routes
        for i in self.bottom:
            x.append(self.h[i](x[-1]))
        grouped, attns, mlps = use_grouped_mm(x[-1]), [self.h[i] for i in self.attns], [self.h[i] for i in self.mlps]
        attend, feed = assembled_attention, assembled_mlp
        if not grouped:  # rows of other shapes in every step: compiling these would not end
            attend, feed = torch.compiler.disable(attend), torch.compiler.disable(feed)
        if self.attn_router:
            qkv = Layers([(m.attn.c_q, m.attn.c_k, m.attn.c_v) for m in attns], [m.ln_1 for m in attns], grouped)
            out = Layers([(m.attn.c_proj,) for m in attns], None, grouped)
        if self.mlp_router:
            fc = Layers([(m.mlp.c_fc,) for m in mlps], [m.ln_2 for m in mlps], grouped)
            proj = Layers([(m.mlp.c_proj,) for m in mlps], None, grouped)
        attn_state = mlp_state = None
        for r in range(self.rounds):
            y = x[-1]
            if self.attn_router:
                picks, gates, p, attn_state = self.attn_router(y.flatten(0, 1), attn_state)
                z = attend(y, picks, gates, qkv, out, self.n_head, self.dropout * self.training)
                y = y + F.dropout(z, self.dropout, self.training)
            else:  # modules take turns
                m, picks, p = attns[r % len(attns)], torch.full((y.size(0) * y.size(1), 1), r % len(attns)), None
                y = y + m.attn(m.ln_1(y))
            routes[0].append((picks, p))
            if self.mlp_router:
                picks, gates, p, mlp_state = self.mlp_router(y.flatten(0, 1), mlp_state)
                z = feed(y, picks, gates, fc, proj)
                y = y + F.dropout(z, self.dropout, self.training)
            else:
                m, picks, p = mlps[r % len(mlps)], torch.full((y.size(0) * y.size(1), 1), r % len(mlps)), None
                y = y + m.mlp(m.ln_2(y))
            routes[1].append((picks, p))
            x.append(y)
        for i in self.top:
            x.append(self.h[i](x[-1]))
        return x

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab) and, with targets (B, T), the mean cross-entropy in nats; in training mode
        (so also in the progress bar and in log.jsonl's train_loss) plus --balance times both routers' balance losses."""
        routes = [], []
        logits, loss = self.read_out(self.states(idx, routes)[-1], targets)
        if loss is not None and self.training and self.balance:
            loss = loss + self.balance * sum(balance_loss(route) for route, router in
                                             zip(routes, (self.attn_router, self.mlp_router)) if router)
        return logits, loss

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
    """The vanilla model: phase 1 trains it, and the modules are its layers."""
    return GPT(settings_of("dense", s))


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

ARMS = ("technique", "dense", "fixed", "shallow")  # the first is trained always, the others with --compare


def settings_of(arm, s):
    """dense: vanilla, with the same restart after phase 1. fixed: modules take turns, in as many rounds, without routers.
    shallow: about 60% less deep (2 rounds for 6 layers), all layers are modules, every token picks two in each sublayer."""
    if arm in ("dense", "phase1"):
        return dataclasses.replace(s, bottom=s.n_layer, top=0, attn_modules=0, ffn_modules=0, rounds=0)
    if arm == "fixed":
        return dataclasses.replace(s, router="fixed", route_k=1)
    if arm == "shallow":
        return dataclasses.replace(s, router="gru", route_k=2, gate="renorm", rounds=max(1, round(0.4 * s.n_layer)),
                                   bottom=0, top=0, attn_modules=-1, ffn_modules=-1)
    return s


def build(arm, s):
    return GPT(settings_of(arm, s))


def flops_per_token(s, arm, attn=None, ffn=None):
    """Training FLOPs for a token in phase 2, forward and backward: 6 for each weight in a matrix product that it meets (the
    tied head is one, the embedding is not) and 12 for each channel of each score, in every layer and round, SKIP or not, the
    causal square in full. attn, ffn: modules that a token met in a round, on average; left out: K, as if none were SKIP."""
    s = settings_of(arm, s)
    T, C, R, plain = s.block_size, s.n_embd, s.router_dim, s.bottom + s.top
    weights = s.vocab_size * C + plain * 12 * C * C
    for n, used, size in (s.attn_modules, attn, 4 * C * C), (s.ffn_modules, ffn, 8 * C * C):
        routed = s.router != "fixed" and n + s.skip > 1
        if used is None:
            used = s.route_k if routed else 1
        weights += s.rounds * (size * used + routed * (3 * R * (C + R) + R * (n + s.skip)))
    return 6 * weights + 12 * T * C * (plain + s.rounds)


def load_data(s, device):
    """What start() makes Run.data of."""
    return Data(s, device)


def train_arm(run, arm, model):
    """Phase 1 trains the vanilla model, once for all arms. Phase 2 takes it apart and trains modules and routers together."""
    s = run.settings
    begin, path = round(s.phase1 * s.max_iters), run.out / "phase1" / "ckpt.pt"
    if not path.exists() or read_checkpoint(run, path, "phase1")["step"] < begin:
        torch.manual_seed(key(s.seed, "weights"))
        train(run, "phase1", dense_twin(s).to(run.device), span=(0, begin))
    vanilla = read_checkpoint(run, path, "phase1")
    adopt(model, vanilla["model"])
    phase1 = dict(phase1_seconds=vanilla["now"]["train_seconds"], phase1_val_loss=vanilla["now"]["val_loss"])
    del vanilla  # its optimizers
    return {**train(run, arm, model, span=(begin, s.max_iters)), **phase1}


def adopt(model, vanilla):
    """The weights of the vanilla model, as they are. Layers that became no module are left out; routers keep theirs."""
    own = model.state_dict()
    model.load_state_dict({name: w if "router" in name else vanilla[name] for name, w in own.items()})


def loss_on(run, model, starts):
    """Mean cross-entropy over windows of the validation split; picks (tokens, rounds, K) of attention and feed-forward."""
    total, picked = 0.0, ([], [])
    model.eval()
    with torch.no_grad():
        for at in range(0, len(starts), run.settings.batch_size):
            x, y = run.data.rows("val", starts[at:at + run.settings.batch_size])
            routes = [], []
            with run.autocast():
                total += model.read_out(model.states(x, routes)[-1], y)[1].item() * len(x)
            for found, route in zip(picked, routes):
                found.append(torch.stack([picks.cpu() for picks, p in route], 1) if route else torch.empty(x.numel(), 0, 1))
    return total / len(starts), [torch.cat(found).sort(-1).values for found in picked]


def without(model, attn=(), mlp=()):
    """A copy of the model in which the routers never pick these modules: the others share their probability."""
    model = copy.deepcopy(model)
    for router, closed in (model.attn_router, attn), (model.mlp_router, mlp):
        if closed:
            router.out.bias.data[list(closed)] = -math.inf
    return model


def take_away(run, s, model, load):
    """The loss without some modules, not trained for it, on 16,384 tokens of the validation split: without the less used half
    of attention, the least used quarter of feed-forward, both, all of a kind, and each alone. Returns {case: loss} and {case:
    names of modules}; cases that leave a router fewer than K candidates are left out."""
    routers, sizes = (model.attn_router, model.mlp_router), (s.attn_modules, s.ffn_modules)
    attns, mlps = (sorted(range(n), key=lambda e: sum(x[e] for x in rows)) if router else []  # the least used first
                   for router, n, rows in zip(routers, sizes, load))
    half, quarter = attns[:len(attns) // 2], mlps[:len(mlps) // 4]
    cases = dict(half_attention=(half, []), quarter_ffn=([], quarter), both=(half, quarter) if half and quarter else ([], []),
                 all_attention=(attns, []), all_ffn=([], mlps),
                 **{f"A{e}": ([e], []) for e in sorted(attns)}, **{f"F{e}": ([], [e]) for e in sorted(mlps)})
    cases = {name: case for name, case in cases.items() if any(case) and all(
             n - len(closed) + s.skip >= s.route_k for n, closed in zip(sizes, case) if closed)}
    starts = run.data.windows("val", min(run.settings.eval_tokens or 2**14, 2**14))
    losses = {name: loss_on(run, without(model, *case), starts)[0] for name, case in {"none": ([], []), **cases}.items()}
    return losses if cases else {}, {name: [f"A{e}" for e in sorted(attn)] + [f"F{e}" for e in sorted(mlp)]
                                     for name, (attn, mlp) in cases.items()}


@torch.no_grad()
def attention_to_skip(run, s, model):
    """For every round, how many tokens picked nothing but SKIP, so that their keys and values are 0, and how much of all
    attention goes to them: means over heads and queries, on 4,096 tokens of the validation split."""
    x, _ = run.data.rows("val", run.data.windows("val", min(run.settings.eval_tokens or 2**12, 2**12)))
    routes, found = ([], []), []
    states, layers = model.states(x, routes), [model.h[i] for i in model.attns]
    qkv = Layers([(m.attn.c_q, m.attn.c_k, m.attn.c_v) for m in layers], [m.ln_1 for m in layers], False)
    for y, (picks, p) in zip(states[s.bottom:], routes[0]):
        q, k, v = assembled_heads(y, Dispatch(picks, torch.ones_like(picks), len(layers), False), qkv, s.n_head)
        hidden = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        maps = (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).masked_fill(hidden, -math.inf).softmax(-1)
        skipped = (picks == len(layers)).all(-1).view(x.shape).to(maps.dtype)
        found.append(dict(attention=(maps * skipped[:, None, None]).sum(-1).mean().item(), tokens=skipped.mean().item()))
    return found


def evaluate_arm(run, arm, model):
    """Where the tokens went, what that costs, and what modules are worth: the loss without some, not trained for it."""
    s, t = settings_of(arm, run.settings), run.settings.eval_tokens
    starts = run.data.windows("val", min(t, 2**17) if t else 2**17)
    loss, picked = loss_on(run, model, starts)
    n = s.attn_modules, s.ffn_modules
    load = [[[(picks[:, r] == e).float().mean().item() for e in range(n + s.skip)] for r in range(s.rounds)]
            for picks, n in zip(picked, n)]
    real = [(picks < n).sum((1, 2)).float().mean().item() / max(1, s.rounds) for picks, n in zip(picked, n)]  # a round
    skips = [1 - used / picks.size(2) if s.rounds else 0.0 for used, picks in zip(real, picked)]
    found = dict(tokens=len(starts) * s.block_size, loss=loss, graph_depth=s.bottom + s.top + s.rounds,
                 parameter_depth=s.bottom + s.top + max(n),
                 skip_rate=sum(skips) / 2, skip_rate_attention=skips[0], skip_rate_ffn=skips[1],
                 load=dict(attention=load[0], ffn=load[1]),
                 distinct_paths=len(set(map(bytes, torch.cat([picks.flatten(1) for picks in picked], 1).tolist()))),
                 flops_per_token=flops_per_token(run.settings, arm, *real))
    found["kv_bytes_per_token"] = 2 * found["graph_depth"] * s.n_embd * run.dtype.itemsize
    found["attention_to_skip"] = attention_to_skip(run, s, model) if model.attn_router and s.skip else []
    found["loss_without_modules"], found["removed"] = take_away(run, s, model, load)
    return found


def report(run, arms, model):
    """Tables of the arms and of the technique's modules, a sample, and its first tokens with their paths."""
    names = dict(graph_depth="graph depth", parameter_depth="of layers", skip_rate="SKIP", flops_per_token="FLOPs/token, "
                 "real picks", kv_bytes_per_token="KV bytes/token", distinct_paths="paths", tokens="of tokens")
    rows = [[arm, *(found["evaluation"].get(name) for name in names)] for arm, found in arms.items()]
    print("\nWhat was assembled (validation split):", table([["arm", *names.values()], *rows]), sep="\n")
    s, e, arm = run.settings, arms["technique"]["evaluation"], arms["technique"]
    print(f"\nPhase 1, which all arms share: {round(s.phase1 * s.max_iters):,} steps, {arm['phase1_seconds']:.0f} seconds, "
          f"val loss {arm['phase1_val_loss']:.4f}. Steps and times of the arms are those of phase 2.")
    if s.rounds:
        ids = [f"{x}{i}" for x, n in (("A", s.attn_modules), ("F", s.ffn_modules)) for i in [*range(n), *["-skip"] * s.skip]]
        rows = [[f"round {r + 1}", *(f"{100 * x:.0f}" for x in a + f)]
                for r, (a, f) in enumerate(zip(e["load"]["attention"], e["load"]["ffn"]))]
        for row, x in zip(rows, e["attention_to_skip"]):
            row.append(f"{100 * x['attention']:.0f}")
        print("\nWhich module each round uses, in % of the picks (A: attention, F: feed-forward); % of attention to tokens that skip:",
              table([["", *ids, *["to skip"] * bool(e["attention_to_skip"])], *rows]), sep="\n")
    if e["loss_without_modules"]:
        rows = [[" ".join(["without", *e["removed"][name]]) if name in e["removed"] else "all modules", f"{x:.4f}"]
                for name, x in e["loss_without_modules"].items()]
        print("\nThe trained model when modules are taken away: the less used half of attention, the least used quarter of "
              "feed-forward, both,\nall of a kind, and each alone (on a part of the validation split):",
              table([["", "loss"], *rows]), sep="\n")
    idx = sample(run, model)[:, :s.block_size]
    if s.rounds:
        routes = [], []
        with torch.no_grad(), run.autocast():
            model.states(idx, routes)
        print("\nIts first tokens and the modules they picked, round by round (. is SKIP):", paths(run, idx[0], routes),
              sep="\n")


def paths(run, ids, routes, width=100):
    """Text with the picks of every token below it: a column for each token (T,), two lines for each round."""
    s, digits = run.settings, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    text = [run.data.decode([t]) for t in ids.tolist()]
    lines = [["", *("".join(c if c.isprintable() else "¶" for c in token)[:12] for token in text)]]
    for r, both in enumerate(zip(*routes)):
        for kind, n, (picks, p) in zip("AF", (s.attn_modules, s.ffn_modules), both):
            ids = ("".join("." if i == n else digits[i % 62] for i in sorted(token)) for token in picks.tolist())
            lines.append([f"{r + 1} {kind}  ", *ids])
    widths = [max(map(len, column)) for column in zip(*lines)]
    fits = sum(sum(widths[:i + 1]) <= width for i in range(len(widths)))
    return "\n".join("".join(c.ljust(w) for c, w in zip(line[:fits], widths)) for line in lines)


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
