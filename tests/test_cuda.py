"""On a CUDA GPU, and skipped without one: the one file to run when a GPU is at hand. First what is
wrong at once (numbers), then short runs of every script, whose speeds are printed with -s."""
import importlib

import pytest
import torch
from conftest import SCRIPTS
from test_device import CALLS, char, length

import nano_jump
import nano_mom

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)
DTYPE = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def both(nano, config, inputs):
    """[(loss, gradients)] in float32 on the CPU and by autocast on the GPU, of the same weights."""
    torch.manual_seed(0)
    model, results = nano.GPT(config), []
    x = torch.randint(1, 65, (4, length(nano, config) + 1))
    for device in ("cpu", "cuda"):
        model.to(device)
        given = {name: value.to(device) for name, value in inputs(config, 0).items()}
        with torch.autocast("cuda", DTYPE, enabled=device == "cuda"):
            loss = model(x[:, :-1].to(device), x[:, 1:].to(device), **given)[1]
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        results.append((loss.item(), [g.float().cpu() for g in found]))
    return results


@pytest.mark.parametrize("nano, changes, inputs", CALLS.values(), ids=CALLS)
def test_a_step_is_close_to_the_cpus(nano, changes, inputs):
    config = char(nano, n_layer=2, n_embd=64, n_head=2, block_size=64, dropout=0.0, **changes)
    (exact, gradients), (rough, others) = both(nano, config, inputs)
    assert rough == pytest.approx(exact, abs=0.02)
    for a, b in zip(gradients, others):
        assert (a - b).norm() <= 0.1 * a.norm() + 1e-5


@pytest.mark.parametrize("K", [1, 2])
def test_routing_is_close_to_the_cpus_and_skipped_tokens_leave_no_garbage(K):
    config = char(nano_mom, n_layer=2, n_embd=64, n_head=2, block_size=64, dropout=0.0, rounds=4,
                  route_k=K)
    (exact, gradients), (rough, others) = both(nano_mom, config, lambda config, step: dict())
    assert rough == pytest.approx(exact, abs=0.02)
    assert all(g.isfinite().all() for g in others)
    assert sum(g.norm() for g in others) == pytest.approx(sum(g.norm() for g in gradients), rel=0.2)


def test_early_exit_is_that_of_the_full_model():
    torch.manual_seed(0)
    config = char(nano_jump, n_layer=4, n_embd=64, n_head=2, block_size=64, dropout=0.0)
    model = nano_jump.GPT(config).cuda().eval()
    idx = torch.randint(65, (1, 64), device="cuda")
    texts = [torch.randint(65, (64, 64), device="cuda")]
    maps = nano_jump.fit(nano_jump.moments(model, texts)[2])
    with torch.no_grad():
        states = model.states(idx)
        for layers, lam, depth in (((), 0.0, 4), (range(1, 4), -1.2, 1)):
            decoder = nano_jump.Decoder(model, maps, layers, lam)
            for t in range(1, 65):
                h = states[depth][:, t - 1] if depth == 4 else states[1][:, t - 1] @ maps[1, 4]
                torch.testing.assert_close(decoder(idx[:, :t]), model.read_out(h), atol=1e-3, rtol=1e-3)


RUNS = [(name, []) for name in SCRIPTS] + [("nano_transevolve", ["--task", "encdec"]),
                                           ("nano_transevolve", ["--task", "listops"])]


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("name, flags", RUNS)
def test_every_script_learns_at_char(name, flags, compiled, corpus, tmp_path):
    nano = importlib.import_module(name)
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    argv = ["--device", "cuda", "--size", "char", "--max_iters", "50", "--eval_interval", "25",
            "--eval_tokens", "65536", "--compile", compiled, "--out_dir", str(tmp_path / "out")]
    data = [] if "listops" in flags else ["--dataset", str(corpus)]
    arm = nano.main([*argv, *data, *flags])["arms"]["technique"]
    print(f"\n{name} {flags} compile {compiled}: {arm['tokens_per_second']:,} tokens/s, "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, loss {arm['val_loss']:.3f}")
    assert arm["val_loss"] < 3.0
