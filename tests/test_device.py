"""What can be known of a GPU without one: no tensor stays on the CPU, nothing waits for the device,
one graph for any number of draws, and bfloat16 is close to float32."""
import contextlib
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import nano_jump
import nano_mom
import nano_reuse
import nano_ssa
import nano_transevolve

META = torch.device("meta")


def char(nano, **changes):
    """The size that a GPU trains by default."""
    sizes = {f.name: f.metadata["sizes"]["char"] for f in dataclasses.fields(nano.Config)
             if "char" in f.metadata.get("sizes", ())}
    return nano.Config(**{**sizes, "vocab_size": 65, **changes})


def length(nano, config):
    """Of what the model reads: an encoder and a decoder read 2 T - 1 tokens."""
    return nano.context(config) if hasattr(nano, "context") else config.block_size


def ssa_inputs(config, step):
    return dict(paths=nano_ssa.draw_paths(config, config.block_size, step, 0))


def no_inputs(config, step):
    return dict()


# how the model is called in training: no further inputs, or the technique's
CALLS = {"ssa-dense": (nano_ssa, dict(), no_inputs), "ssa-local": (nano_ssa, dict(), ssa_inputs),
         "ssa-unbiased": (nano_ssa, dict(ssa="unbiased"), ssa_inputs),
         "reuse": (nano_reuse, dict(reuse_heads=1), no_inputs),
         "reuse-maps": (nano_reuse, dict(reuse_heads=1, reuse_impl="probs"), no_inputs),
         "jump": (nano_jump, dict(bias=True), no_inputs),
         "mom-phase-1": (nano_mom, dict(rounds=0), no_inputs),
         "transevolve": (nano_transevolve, dict(), no_inputs),
         "transevolve-encdec": (nano_transevolve, dict(task="encdec", ffn="random"), no_inputs),
         "transevolve-listops": (nano_transevolve, dict(task="listops"), no_inputs)}
each_call = pytest.mark.parametrize("nano, changes, inputs", CALLS.values(), ids=CALLS)


def training_step(nano, config, device, inputs):
    """Forward, loss, backward, and a step of both optimizers; the model."""
    with torch.device(device):
        model = nano.GPT(config)
    adamw, muon = nano.configure_optimizers(model, config)
    for group in adamw.param_groups:
        group["fused"] = device != META  # which has no such kernels
    x = torch.ones(config.batch_size, length(nano, config), dtype=torch.long, device=device)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    loss = model(x, x, **inputs)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    muon.step()
    assert all(p.grad.device == device for p in model.parameters() if p.grad is not None)
    return model


@each_call
def test_a_training_step_on_a_device_that_cannot_be_waited_for(nano, changes, inputs, monkeypatch):
    """On meta a tensor of the CPU, .item(), .tolist() and a shape that depends on data raise."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    config = char(nano, **changes)
    model = training_step(nano, config, META, inputs(config, 0))
    idx = torch.zeros(2, 300, dtype=torch.long, device=META)
    assert model.generate(idx, 10).shape == (2, 310)


@each_call
def test_one_graph_serves_all_steps_and_draws(nano, changes, inputs):
    config = char(nano, n_layer=4, n_embd=32, n_head=2, block_size=32, **changes)
    torch.compiler.reset()
    counter, T = CompileCounter(), length(nano, config)
    fast = torch.compile(nano.GPT(config), backend=counter, fullgraph=True)
    for step in range(3):
        fast(torch.randint(65, (2, T)), torch.randint(65, (2, T)), **inputs(config, step))
    assert counter.frame_count == 1


@pytest.mark.parametrize("nano, inputs", [(nano_ssa, ssa_inputs), (nano_mom, no_inputs)])
def test_the_compiled_step_has_the_same_gradients(nano, inputs):
    """That of nano_mom.py around dispatch, which is not compiled."""
    config = char(nano, n_layer=2, n_embd=32, n_head=2, block_size=32, dropout=0.0)
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x, results = nano.GPT(config), torch.randint(65, (2, 32)), []
    for net in (model, torch.compile(model, backend="aot_eager", fullgraph=nano is nano_ssa)):
        loss = net(x, x, **inputs(config, 0))[1]
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        results.append([loss, *found])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("K", [1, 2])
def test_routing_waits_for_the_device_in_dispatch_only(monkeypatch, K):
    """The sizes of the modules' parts are all that it reads back: here made up."""
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    monkeypatch.setattr(torch.Tensor, "tolist", lambda ends: asked.append(len(ends)) or [5, 5, 9])
    config = char(nano_mom, n_layer=3, rounds=4, route_k=K)
    training_step(nano_mom, config, META, dict())
    assert asked == [3] * 8


@each_call
def test_bfloat16_is_close_to_float32(nano, changes, inputs):
    config = char(nano, n_layer=2, n_embd=64, n_head=2, block_size=64, dropout=0.0, **changes)
    torch.manual_seed(0)
    model, x = nano.GPT(config), torch.randint(65, (4, length(nano, config) + 1))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, loss = model(x[:, :-1], x[:, 1:], **inputs(config, 0))
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), abs=0.01)
    for exact, rough in zip(results[0][1], results[1][1]):
        assert (exact - rough).norm() <= 0.05 * exact.norm() + 1e-5
