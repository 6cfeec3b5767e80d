"""A script over several seeds, beside its twin: writes the tables of tests/results/<script>.md, below
what a reader should believe of them, which is written by hand.

    python tests/evidence.py ssa                # five seeds at the default size
    python tests/evidence.py ssa --seeds 1 2

Every run is the script's own --compare, in out/evidence/. A run that was interrupted goes on, a
finished one is read. tests/controls.py measures the same checkpoints further.
"""
import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import controls  # noqa: E402

# of each script: (title, share of the training text, flags)
RUNS = {"ssa": [("The whole training text", 1.0, []),
                ("Its first 3%", 0.03, ["--eval_interval", "100"])],
        "reuse": [("The whole training text", 1.0, [])],
        "mom": [("The whole training text", 1.0, [])],
        "transevolve": [("A decoder", 1.0, []), ("Encoder and decoder", 1.0, ["--task", "encdec"]),
                        ("An encoder, on ListOps", 1.0, ["--task", "listops"])],
        "jump": [("The whole training text", 1.0, [])]}
# further arms of the first, each a run of its own: the technique with other flags
VARIANTS = {"transevolve": {"random matrices": ["--ffn", "random"], "1 block": ["--blocks", "1"]},
            "mom": {"fixed path": ["--candidates", "own", "--no-skip"],
                    "random start": ["--head_start", "0"],
                    "3 rounds, K = 2": ["--rounds", "3", "--route_k", "2"],
                    "phase 1 half": ["--phase1", "0.5"]}}
ROWS = {"val_loss": "validation loss, last", "best_val_loss": "validation loss, best",
        "train_loss": "training loss, last",
        "parameters": "parameters", "flops_per_token": "FLOPs a token, forward",
        "cache_bytes_per_token": "cache, bytes a token", "phase1_loss": "phase 1 ends",
        "phase2_loss": "phase 2 starts", "skipped": "picks that are SKIP",
        "distinct_paths": "different paths of 8,192 tokens"}
def machine():
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def part_of(folder, share):
    """A corpus with the first part of another's training split, and its validation split."""
    if share == 1:
        return folder
    part = folder.with_name(f"{folder.name}_{share:g}")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["train_tokens"] = int(share * meta["train_tokens"])
    part.mkdir(exist_ok=True)
    (part / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (part / "val.bin").write_bytes((folder / "val.bin").read_bytes())
    np.fromfile(folder / "train.bin", dtype="<u2")[:meta["train_tokens"]].tofile(part / "train.bin")
    return part


def run(script, folder, out, seed, flags):
    """results.json of a finished run."""
    command = [sys.executable, ROOT / f"nano_{script}.py", "--seed", str(seed),
               "--dataset", folder, "--out_dir", out, *flags]
    arms = 2 if "--compare" in flags else 1
    if (out / "results.json").exists():
        command.append("--resume")
        results = json.loads((out / "results.json").read_text())
        finished = ["sample" in arm for arm in results["arms"].values()]
        if len(finished) >= arms and all(finished):
            return results
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return json.loads((out / "results.json").read_text())


def mean(numbers):
    """Mean ± standard deviation over the seeds, as text."""
    if len(set(numbers)) == 1:
        return f"{numbers[0]:,.4f}" if isinstance(numbers[0], float) else f"{numbers[0]:,}"
    places = ".0f" if isinstance(numbers[0], int) or abs(statistics.mean(numbers)) > 100 else ".4f"
    return f"{statistics.mean(numbers):,{places}} ± {statistics.stdev(numbers):{places}}"


def table(title, rows):
    """Markdown of {row: {column: text}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(row.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def training(results):
    """Of every arm what results.json says of training, and by how much it is behind the technique."""
    arms = results[0]["arms"]
    rows = {"seeds": {arm: str(sum(arm in r["arms"] for r in results)) for arm in arms}}
    for r in results:
        for arm in r["arms"].values():
            for line in arm["log"]:
                if "routed_loss" in line:  # where nano_mom.py's phase 2 starts, and before
                    arm.update(phase1_loss=line["val_loss"], phase2_loss=line["routed_loss"])
    for key, name in ROWS.items():
        rows[name] = {arm: mean([r["arms"][arm][key] for r in results if arm in r["arms"]])
                      for arm in arms if key in arms[arm]}
        if key.endswith("val_loss"):
            rows[f"{name}: minus the technique's, of the same seeds"] = {
                arm: mean([r["arms"][arm][key] - r["arms"]["technique"][key]
                           for r in results if arm in r["arms"]]) for arm in list(arms)[1:]}
        if key == "best_val_loss" and rows[name] == rows[ROWS["val_loss"]]:  # say it once
            rows = {row: cells for row, cells in rows.items() if not row.startswith(name)}
    return {name: row for name, row in rows.items() if row}


def heat(axes, values, labels, most, form="{:.2f}"):
    """A heat map with its numbers."""
    axes.imshow(values, vmin=0, vmax=most, cmap="viridis", aspect="auto")
    for (row, column), x in np.ndenumerate(values):
        if not np.isnan(x):
            axes.text(column, row, form.format(x), ha="center", va="center", fontsize=8,
                      color="white" if x < 0.6 * most else "black")
    axes.set(xticks=range(len(labels[1])), xticklabels=labels[1],
             yticks=range(len(labels[0])), yticklabels=labels[0])


def written(target, start):
    """Numbers of the first table's rows in tests/results/ that begin so: {row: [(mean, deviation)]}."""
    found = {}
    for line in target.with_suffix(".md").read_text(encoding="utf-8").splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name.startswith(start) and cells:
            found.setdefault(name, [[float(x) for x in cell.split("±")] for cell in cells])
    return found


def picture_ssa(plt, results, target):
    """A draw of each kind, and the loss over the number of an ensemble's members."""
    import nano_ssa
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    for axes, kind in ((left, "unbiased"), (middle, "local")):
        config = nano_ssa.Config(n_layer=1, block_size=32, ssa=kind)
        path = nano_ssa.draw_paths(config, 32, "picture")[0]                       # (N, w)
        seen = np.eye(32)
        for i in range(32):
            sources = path[i * len(path) // 32].numpy()
            seen[i, sources[sources < i]] = 0.6
        axes.imshow(seen, cmap="Blues", vmin=0, vmax=1)
        axes.set(title=f"{kind}: one draw", xlabel="source (dark: the query itself)", ylabel="query")
    rows, dense = written(target, "ensemble of"), written(target, "dense mode")["dense mode"]
    members = [int(name.split()[-1]) for name in rows]
    for column, color, name in ((0, "C0", "trained with SSA"), (2, "C1", "dense twin")):
        numbers = [row[column] for row in rows.values()]
        right.errorbar(members, *zip(*numbers), marker="o", color=color, label=f"{name}: ensemble")
        right.axhline(dense[column][0], color=color, linestyle="--", label=f"{name}: dense mode")
    right.set(title="whole text: one dense pass, or K draws", xlabel="members K of the ensemble",
              ylabel="loss, first 8,192 validation tokens", xticks=members)
    right.legend(fontsize=8)
    return figure


def picture_reuse(plt, results, target):
    """How alike the maps of two layers are, in the dense twin; and of one layer and the next, on one text
    and on two: means over the seeds."""
    found = [r["arms"]["dense"]["evaluation"] for r in results]
    alike = np.mean([[list(row.values()) for row in f.values()] for f in found], 0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    heat(left, alike, [range(len(alike))] * 2, 1)
    left.set(title="how alike two layers' maps are, on one text", xlabel="best match among the heads of layer",
             ylabel="head of layer")
    rows = list(written(target, "layers ").values())
    for column, name in enumerate(("on the same text", "on two different texts")):
        right.errorbar(range(len(rows)), *zip(*[row[column] for row in rows]), marker="o", label=name)
    right.set(title="neighbouring layers: is it the text?", ylabel="alike (1: the same map)", ylim=(0, 1),
              xticks=range(len(rows)), xticklabels=[f"{l}, {l + 1}" for l in range(len(rows))], xlabel="layers")
    right.legend()
    return figure


def picture_mom(plt, results, target):
    """Who goes where: share of each module in the picks of each round, mean over the seeds."""
    found = [r["arms"]["technique"]["evaluation"] for r in results]
    figure, both = plt.subplots(1, 2, figsize=(9, 3.8))
    for axes, kind, title in zip(both, "AF", ("attention", "feed-forward")):
        rows = [name for name in found[0] if name.endswith(kind)]
        columns = [name for name in found[0][rows[0]] if name.isdigit() or name == "SKIP"]
        share = np.mean([[[float(f[row][column].rstrip("%")) for column in columns] for row in rows]
                         for f in found], 0)
        heat(axes, share, (range(len(rows)), columns), 100, "{:.0f}")
        axes.set(title=f"{title}: % of a round's picks", xlabel="module", ylabel="round")
    return figure


def picture_transevolve(plt, results, target):
    """The bias of keys through depth, of one head and one line of text."""
    import nano_transevolve
    out = ROOT / "out" / "evidence" / f"transevolve-shakespeare_char-{results[0]['config']['seed']}"
    config, run, model = controls.load(nano_transevolve, out, "technique")
    idx, _ = run.data.rows("val", np.array([20]))
    biases = []
    for block in model.h:
        block.attn.register_forward_hook(lambda m, x, out: biases.append(out[1][:, 0, -1, 0]))
    with torch.no_grad():
        model(idx)
    b = torch.cat(biases)[:, :48].cpu().numpy()
    figure, axes = plt.subplots(figsize=(10, 2.6))
    most = abs(b).max()
    figure.colorbar(axes.imshow(b, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto"), label="b")
    axes.axhline(len(biases[0]) - 0.5, color="black")
    axes.set(title="b, added to all queries' scores of a key, in the last head; a line parts the blocks",
             ylabel="layer", xlabel="key",
             xticks=range(b.shape[1]), xticklabels=[repr(run.data.decode([i]))[1:-1] for i in idx[0, :48].tolist()])
    return figure


def picture_jump(plt, results, target):
    """r^2 of the maps from layer to layer, and P@1 of a jump from each layer: means over the seeds."""
    found = [r["arms"]["technique"] for r in results]
    L = results[0]["config"]["n_layer"]
    r2 = np.full((L, L), np.nan)
    for i in range(L):
        for j in range(i, L):
            r2[i, j] = np.mean([f["r2"]["mat"][f"{i} {j + 1}"] for f in found])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.6))
    heat(left, r2, (range(L), range(1, L + 1)), 1)
    left.set(title="r² of linear maps from layer to layer", xlabel="to layer", ylabel="from layer")
    titles = {"id": "its state as it is (id)", "mat": "its state, a linear map (mat)"}
    names = [name for name in found[0]["evaluation"]["layer 0"] if name.startswith("P@1")]
    for name in names:
        shares = [[float(f["evaluation"][f"layer {l}"][name].rstrip("%")) for l in range(L + 1)] for f in found]
        right.plot(np.mean(shares, 0), marker="o",
                   label=titles.get(name[4:], f"layers above, {name[4:]} linear"))
    right.set(title="first choices that are the full model's, %", xlabel="from layer")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


PICTURES = {"ssa": picture_ssa, "reuse": picture_reuse, "mom": picture_mom,
            "transevolve": picture_transevolve, "jump": picture_jump}


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams["figure.constrained_layout.use"] = True
    return plt


def draw(script, results):
    target = ROOT / "tests" / "results" / f"{script}.png"
    figure = PICTURES[script](pyplot(), results, target)
    figure.savefig(target, dpi=100, bbox_inches="tight", facecolor="white")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=RUNS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    nano = importlib.import_module(f"nano_{args.script}")
    corpus = nano.find_data(nano.Config(dataset="shakespeare_char"))
    target = ROOT / "tests" / "results" / f"{args.script}.md"
    text, first = [f"# nano_{args.script}.py: results"], None
    if target.exists():  # what a reader should believe stays
        text = [target.read_text(encoding="utf-8").split("\n## ")[0]]
    for title, share, flags in RUNS[args.script]:
        folder, results, found = part_of(corpus, share), [], []
        three = args.seeds[:3]  # for all but the pair that the first table is about
        for seed in three if flags else args.seeds:
            name = "-".join([args.script, folder.name, *flags, str(seed)]).replace("--", "")
            out, compare = ROOT / "out" / "evidence" / name, ["--compare"] * (args.script != "jump")
            results.append(run(args.script, folder, out, seed, compare + flags))
            variants = VARIANTS.get(args.script, {}) if seed in three and not flags else {}
            for name, other in variants.items():
                variant = out.with_name(f"{out.name}-{name.replace(' ', '_')}")
                variant = run(args.script, folder, variant, seed, [*flags, *other])
                results[-1]["arms"][name] = variant["arms"]["technique"]
            found.append(controls.CONTROLS[args.script](nano, out, results[-1]))
        text += [f"## {title}", table("training", training(results))]
        first = first or results
        for caption in found[0]:
            rows = {row: {column: mean([f[caption][row][column] for f in found if column in f[caption][row]])
                          for column in cells} for row, cells in found[0][caption].items()}
            text.append(table(caption, rows))
    command = "python tests/evidence.py " + " ".join(sys.argv[1:])
    text.append(f"Mean ± standard deviation over the seeds. `{command}`; {machine()}, "
                f"torch {torch.__version__}, {results[0]['device']}.")
    text.append(f"![{args.script}]({args.script}.png)")
    target.write_text("\n\n".join(part.strip() for part in text if part.strip()) + "\n", "utf-8")
    draw(args.script, first)
    print(target.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
