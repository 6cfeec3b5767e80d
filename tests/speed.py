"""What a default run buys: the dense twin beside nanoGPT's recipe for a CPU, in turn on the same cores,
and what each setting of the preset is worth. Writes tests/results/speed.md and speed.png.

    python tests/speed.py ../nanoGPT     # a checkout whose data/shakespeare_char is prepared
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
# one setting changed; with steps for about the same time where a step takes another
SETTINGS = {"as it is": "", "width 96, 4 heads": "--n_embd 96 --n_head 4 --max_iters 600",
            "4 heads": "--n_head 4 --max_iters 950", "16 windows": "--batch_size 16 --max_iters 1650",
            "T = 128": "--block_size 128 --batch_size 16 --max_iters 900",
            "momentum 0.95": "--momentum 0.95", "Muon 0.02": "--muon_lr 0.02",
            "AdamW 0.01": "--learning_rate 0.01", "no weight decay": "--weight_decay 0",
            "1,400 steps": "--max_iters 1400"}


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


def twin(name, *flags):
    """Seconds, loss and parameters of the dense twin; a finished run is read."""
    out, seconds = OUT / name.replace(" ", "_"), 0.0
    if not (out / "results.json").exists():
        seconds, _ = timed(["nano_ssa.py", "--ssa", "off", "--out_dir", out, *flags], ROOT)
    result = json.loads((out / "results.json").read_text())["arms"]["technique"]
    return seconds, result["val_loss"], result["parameters"]


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


def in_turn(folder, seeds):
    """The table of both, and nanoGPT's evaluations."""
    arms = {}
    for seed in seeds:
        out = OUT / f"nanogpt-{seed}"
        seconds, curve = timed([*RECIPE, f"--out_dir={out}"], folder)
        arms.setdefault("nanoGPT's recipe", []).append((seconds, 1.0, *nanogpts(folder, out / "ckpt.pt")))
        for steps in (1000, 1400):
            ours, *rest = twin(f"twin {steps} {seed}", "--seed", seed, "--max_iters", steps)
            arms.setdefault(f"dense twin, {steps:,} steps", []).append((ours, ours / seconds, *rest))
    names = "seconds", "of nanoGPT's", "validation loss", "parameters"
    return {arm: {name: evidence.mean(list(x)) for name, x in zip(names, zip(*runs))}
            for arm, runs in arms.items()}, curve


def held_out():
    """The training text, whose last tenth is held out."""
    corpus, folder = nano_ssa.find_data(nano_ssa.Config(dataset="shakespeare_char")), OUT / "text"
    ids, meta = np.fromfile(corpus / "train.bin", dtype="<u2"), json.loads((corpus / "meta.json").read_text())
    n = int(0.9 * len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    ids[:n].tofile(folder / "train.bin")
    ids[n:].tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({**meta, "train_tokens": n, "val_tokens": len(ids) - n}))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    rows, curve = in_turn(args.nanogpt.resolve(), args.seeds)
    _, ours = timed(["nano_ssa.py", "--ssa", "off", "--eval_interval", "100", "--out_dir", OUT / "curve"], ROOT)
    changed, text = {}, held_out()
    for name, flags in SETTINGS.items():
        found = [twin(f"{name} {seed}", "--dataset", text, "--seed", seed, *flags.split())[1]
                 for seed in args.seeds[:2]]
        changed[name] = {"flags": flags, "loss": evidence.mean(found)}

    plt = evidence.pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.plot(*zip(*curve), marker="o", label="nanoGPT's recipe, its estimate")
    axes.plot(*zip(*ours), marker="o", label="dense twin")
    axes.set(xlabel="seconds, evaluation included", ylabel="validation loss, nats", ylim=(1.5, 2.6))
    axes.legend()
    figure.savefig(TARGET.with_suffix(".png"), dpi=100, facecolor="white")
    TARGET.write_text(f"""# What a default run buys

{evidence.table(f"{len(args.seeds)} runs", rows)}

The whole validation split in windows of 64, for both; nanoGPT, which has one seed, estimates its own
loss at {curve[-1][1]:.3f}. The last row of the twin is another schedule, not a longer run of the first.

![loss over seconds](speed.png)

## One setting at a time

{evidence.table("last tenth of the training text, 2 seeds", changed)}

What else was tried stands in tried.md. `python tests/speed.py FOLDER`; {evidence.machine()}, torch {torch.__version__}.
""", encoding="utf-8")
    print(TARGET.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
