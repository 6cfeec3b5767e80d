"""What a default run buys: the dense twin and all scripts beside nanoGPT's recipe for a CPU, in turn on
the same cores. Writes tests/results/speed.md and speed.png; and undone.md: the preset with one choice
undone.

    python tests/speed.py ../nanoGPT     # a checkout whose data/shakespeare_char is prepared
    python tests/speed.py --undone       # losses, no times: finished runs are read
"""
import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import evidence  # noqa: E402
import nano_ssa  # noqa: E402

OUT, TARGET = ROOT / "out" / "speed", ROOT / "tests" / "results" / "speed.md"
RECIPE = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
# the dense twin with one choice of the preset undone, after about as many tokens, or (width) seconds
UNDONE = {"as it is": [], "Muon's momentum 0.95": ["--momentum", "0.95"], "4 heads": ["--n_head", "4"],
          "16 windows, 2,300 steps": ["--batch_size", "16", "--max_iters", "2300"],
          "width 96, 700 steps": ["--n_embd", "96", "--n_head", "3", "--max_iters", "700"],
          "Muon's rate 0.02": ["--muon_lr", "0.02"], "AdamW's rate 0.005": ["--learning_rate", "0.005"],
          "no weight decay": ["--weight_decay", "0"], "100 steps of warm-up": ["--warmup_iters", "100"]}
SCRIPTS = ["ssa --ssa off", "ssa", "reuse", "mom", "transevolve", "transevolve --task encdec", "transevolve --task listops",
           "jump"]


def timed(command, cwd):
    """Seconds of a command, and its evaluations as (seconds, validation loss)."""
    start, seen = time.perf_counter(), []
    with subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for line in process.stdout:
            if found := re.match(r"(?:step|technique) \d+: .*(?:val loss|validation) ([\d.]+)", line):
                seen.append((time.perf_counter() - start, float(found[1])))
    if process.returncode:
        sys.exit(f"error: {command} failed")
    return time.perf_counter() - start, seen


def ours(name, *flags):
    """Seconds, loss and parameters of a script, and its evaluations."""
    script, *task = name.split()
    out = OUT / "-".join([script, *task, *map(str, flags)]).replace("--", "")
    seconds, curve = timed([f"nano_{script}.py", *task, "--out_dir", out, *flags], ROOT)
    result = json.loads((out / "results.json").read_text())["arms"]["technique"]
    return (seconds, result["val_loss"], result["parameters"]), curve


@torch.no_grad()
def nanogpts(folder, checkpoint):
    """Loss of its best checkpoint on our windows, the whole validation split, and its parameters."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    data, losses = nano_ssa.Data(nano_ssa.Config(dataset="shakespeare_char"), torch.device("cpu")), []
    for starts in data.windows("val", 2**17):
        x, y = (each.contiguous() for each in data.rows("val", starts))
        losses += [model(x, y)[1].item()] * len(x)
    return float(np.mean(losses)), sum(p.numel() for p in model.parameters())


def undone(seeds):
    """{choice: {loss, and how much worse than the preset's}}; finished runs are read."""
    corpus, rows, whole = nano_ssa.find_data(nano_ssa.Config(dataset="shakespeare_char")), {}, None
    for name, flags in UNDONE.items():
        out = ROOT / "out" / "evidence" / "-".join(["preset", *flags]).replace("--", "")
        losses = [evidence.run("ssa", corpus, Path(f"{out}-{seed}"), seed, ["--ssa", "off", *flags])
                  ["arms"]["technique"]["val_loss"] for seed in seeds]
        whole = whole or losses  # the first is the preset
        rows[name] = {"validation loss": evidence.mean(losses),
                      "minus the preset's": evidence.mean([a - b for a, b in zip(losses, whole)])}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, nargs="?")
    parser.add_argument("--undone", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    if args.undone:
        TARGET.with_name("undone.md").write_text(f"""# The preset `tiny` with one choice undone

{evidence.table("dense twin, 3 seeds", undone(args.seeds))}

What was tried stands in tried.md. `python tests/speed.py --undone`; {evidence.machine()}, torch {torch.__version__}.
""", encoding="utf-8")
        return
    arms, twins, names = {}, {}, ("seconds", "of nanoGPT's", "validation loss", "parameters")
    for seed in args.seeds:
        out = OUT / f"nanogpt-{seed}"
        whole, curve = timed([*RECIPE, f"--out_dir={out}"], args.nanogpt.resolve())
        arms.setdefault("nanoGPT's recipe", []).append((whole, 1.0, *nanogpts(args.nanogpt, out / "ckpt.pt")))
        for name in SCRIPTS:
            (seconds, *rest), twins[name] = ours(name, "--seed", seed)
            arms.setdefault(f"nano_{name}", []).append((seconds, seconds / whole, *rest))
    rows = {arm: {name: evidence.mean(list(x)) for name, x in zip(names, zip(*each))} for arm, each in arms.items()}

    plt = evidence.pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.plot(*zip(*curve), marker="o", label="nanoGPT's recipe, its estimate")
    axes.plot(*zip(*twins[SCRIPTS[0]]), marker="o", label="dense twin, default")
    axes.set(xlabel="seconds, evaluation included", ylabel="validation loss, nats", ylim=(1.5, 2.6))
    axes.legend()
    figure.savefig(TARGET.with_suffix(".png"), dpi=100, facecolor="white")
    TARGET.write_text(f"""# What a default run buys

{evidence.table(f"{len(args.seeds)} seeds", rows)}

In turn, evaluation and sample included. Losses are of the whole validation split in windows of 64 (of other
tasks for encdec and listops); nanoGPT, which has one seed, estimates its own at {curve[-1][1]:.3f}. `--ssa off` is
the dense twin. The default is 1,150 steps; of nano_mom.py, whose routed steps take longer, 900.

![loss over seconds](speed.png)

What was tried stands in tried.md, and what each choice is worth in undone.md. `python tests/speed.py FOLDER`; {evidence.machine()}, torch {torch.__version__}.
""", encoding="utf-8")
    print(TARGET.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
