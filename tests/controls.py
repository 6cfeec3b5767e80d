"""Control experiments on the checkpoints of a finished run, for tests/results/ alone. Each function
takes a script as a module, a run's folder and its results, and returns {table: {row: {column: x}}}."""
import math

import numpy as np
import torch


def load(nano, out, arm):
    """The best weights of an arm, ready to be evaluated: (config, run, model)."""
    saved = torch.load(out / arm / "best.pt", map_location="cpu", weights_only=True)
    config = nano.Config(**{**saved["config"], "device": "auto"})
    run = nano.Run(config)
    model = nano.GPT(config).to(run.device)
    model.load_state_dict(saved["model"])
    return config, run, model.eval()


@torch.no_grad()
def ssa(nano, out, results, tokens=2**13, members=16):
    """Is an ensemble better for what its members know, or because averaging makes predictions less
    sure? Then a temperature, fitted on training text, gives dense mode as much, and right first
    choices (top-1) do not change. And does the dense twin gain by being subsampled, too?"""
    rows = {}
    titles = {"technique": "trained with SSA", "dense": "dense twin"}
    for arm in results["arms"]:
        title = titles[arm]
        config, run, model = load(nano, out, arm)
        T = config.block_size

        def log_p(x, k=None):
            draw = None if k is None else run.data.put(nano.draw_paths(config, T, "draw", k))
            return model(x, paths=draw)[0].float().log_softmax(-1)

        def score(name, log_p, y, sums):
            loss = -log_p.gather(-1, y[..., None]).double().mean().item()
            top1 = (log_p.argmax(-1) == y).double().mean().item()
            sums.setdefault(name, []).append((loss, top1))

        fit = run.data.windows("train", tokens)
        heats = [2 ** (n / 8) for n in range(-8, 9)]
        losses = dict.fromkeys(heats, 0.0)
        for starts in fit:
            x, y = run.data.rows("train", starts)
            dense = log_p(x)
            for heat in heats:
                tempered = (dense / heat).log_softmax(-1)
                losses[heat] -= tempered.gather(-1, y[..., None]).double().sum().item()
        heat = min(losses, key=losses.get)

        sums = {}
        for starts in run.data.windows("val", tokens):
            x, y = run.data.rows("val", starts)
            score("dense mode", log_p(x), y, sums)
            score("dense mode, best temperature on training text", (log_p(x) / heat).log_softmax(-1), y, sums)
            log_sum = torch.tensor(-math.inf, device=run.device)
            for k in range(1, members + 1):
                member = log_p(x, k)
                score("one draw, mean of 16", member, y, sums)
                log_sum = torch.logaddexp(log_sum, member)
                if k in (2, 4, 8, 16):
                    score(f"ensemble of {k}", log_sum - math.log(k), y, sums)
        for name, found in sums.items():
            loss, top1 = (sum(numbers) / len(found) for numbers in zip(*found))
            rows.setdefault(name, {}).update({f"{title}: loss": loss, f"{title}: top-1": top1})
    return {f"best weights, first {tokens:,} validation tokens": rows}


@torch.no_grad()
def reuse(nano, out, results, windows=64):
    """Are maps of neighbouring layers alike because they do the same, or because all causal maps are
    somewhat alike? Then those of two different texts are, too."""
    config, run, model = load(nano, out, "dense")
    T, L = config.block_size, config.n_layer
    starts = np.concatenate(run.data.windows("val", config.eval_tokens))
    starts = starts[::math.ceil(len(starts) / windows)]
    maps = []  # of each text, (L, H, T/2 T)
    for start in starts:
        idx, _ = run.data.rows("val", np.array([start]))
        x, below, layers = model.wte(idx) + model.wpe.weight, None, []
        for block in model.h:
            x, below = block(x, below, nano.attend)
            layers.append(below[0, :, T // 2:].flatten(1))
        maps.append(torch.stack(layers))

    def alike(a, b):  # (H, .) each: every head's best match
        return (1 - torch.cdist(a, b, p=1) / 2 / (T - T // 2)).amax(1).mean().item()

    rows = {}
    for layer in range(1, L):
        same = [alike(m[layer], m[layer - 1]) for m in maps]
        other = [alike(m[layer], n[layer - 1]) for m, n in zip(maps, maps[1:] + maps[:1])]
        rows[f"layers {layer} and {layer - 1}"] = {"the same text": sum(same) / len(same),
                                                   "two texts": sum(other) / len(other)}
    return {"how alike the dense twin's maps are (best match)": rows}


def mom(nano, out, results):
    """Do the rounds beyond vanilla's path do anything, and does choosing? The trained model with
    fewer rounds, and with routers that pick vanilla's path whatever they learned."""
    config, run, model = load(nano, out, "technique")
    rows = {"as trained": {"loss": nano.evaluate(config, run, model)}}
    model.rounds = config.n_layer
    rows["without the further rounds"] = {"loss": nano.evaluate(config, run, model)}
    model.rounds = 0
    rows["its modules as vanilla's layers"] = {"loss": nano.evaluate(config, run, model)}
    return {"best weights, validation": rows}


def transevolve(nano, out, results):
    """What each script's evaluation says of its arms: with parts set to 0, and between layers."""
    rows = {"validation loss": {}}
    for arm, result in results["arms"].items():
        for title, row in result["evaluation"].items():
            if "maps" in title and arm == "technique":
                rows.setdefault("change of maps from layer to layer", {})[title] = row
            for name in row.keys() & {"loss", "accuracy"}:
                rows["validation loss"].setdefault(f"{title}: {name}", {})[arm] = row[name]
    return rows


def jump(nano, out, results):
    """The evaluation of nano_jump.py, in numbers."""
    found = results["arms"]["technique"]
    rows = {layer: {name: float(x.rstrip("%")) / 100 if isinstance(x, str) else x
                    for name, x in row.items()} for layer, row in found["evaluation"].items()}
    exits = {name: {column: float(x.rstrip("%")) / 100 if isinstance(x, str) else x
                    for column, x in row.items()} for name, row in found["exits"].items()}
    return {"from each layer": rows, "early exit": exits}


CONTROLS = {"ssa": ssa, "reuse": reuse, "mom": mom, "transevolve": transevolve, "jump": jump}
