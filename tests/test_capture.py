"""CUDA graphs around a step: what they refuse, and that a replay is the step."""

import pytest
import torch

from fastrecycle.capture import Graphs, capture, optimiser_state, set_rate

gpu = pytest.mark.gpu


def test_rejects_tensors_off_the_device():
    with pytest.raises(ValueError, match="input 0 is on cpu; CUDA graphs need a CUDA device"):
        capture(lambda x: x, torch.ones(2))
    with pytest.raises(ValueError, match="state 0 is on cpu"):
        capture(lambda: None, state=[torch.ones(2)])


def test_rejects_optimisers_that_read_the_host():
    optimiser = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match="capturable=True"):
        optimiser_state(optimiser)


def test_rates_are_set_as_numbers_or_in_place():
    parameter = torch.ones(2, requires_grad=True)
    plain = torch.optim.Adam([parameter], lr=0.1)
    set_rate(plain, 0.5)
    assert plain.param_groups[0]["lr"] == 0.5
    rate = torch.tensor(0.1)
    read = torch.optim.Adam([parameter], lr=rate, foreach=False)
    set_rate(read, 0.5)
    assert read.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def training(device):
    """A regression step with Adam, its parameters and its optimiser."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4).to(device)
    optimiser = torch.optim.Adam(
        layer.parameters(), lr=torch.tensor(0.05, device=device), capturable=True
    )

    def step(x, y):
        loss = (layer(x) - y).square().mean()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        for parameter, gradient in zip(layer.parameters(), gradients):
            parameter.grad = gradient
        optimiser.step()
        return {"loss": loss.detach()}

    return step, layer, optimiser


@gpu
def test_replays_are_the_step_and_recording_changes_nothing():
    batches = [
        (torch.randn(16, 8, device="cuda"), torch.randn(16, 4, device="cuda")) for _ in "abcd"
    ]
    step, layer, optimiser = training("cuda")
    expected = [step(*batch)["loss"].item() for batch in batches]
    after = [p.detach().clone() for p in layer.parameters()]
    step, layer, optimiser = training("cuda")
    state = [*layer.parameters(), *optimiser_state(optimiser)]
    recorded = capture(step, *batches[0], state=state)
    got = [recorded(*batch)["loss"].item() for batch in batches]
    assert got == pytest.approx(expected, rel=1e-6)
    for one, other in zip(layer.parameters(), after):
        torch.testing.assert_close(one, other)


@gpu
def test_a_replay_refuses_other_shapes():
    recorded = capture(lambda x: x * 2, torch.ones(3, device="cuda"))
    assert recorded(torch.full((3,), 4.0, device="cuda")).tolist() == [8.0] * 3
    with pytest.raises(ValueError, match=r"input 0 was recorded as \(\(3,\), torch.float32"):
        recorded(torch.ones(4, device="cuda"))
    with pytest.raises(ValueError, match=r"input 0 was recorded as \(\(3,\), torch.float32"):
        recorded(torch.ones(3, device="cuda", dtype=torch.float16))
    with pytest.raises(ValueError, match="expected 1 inputs, got 0"):
        recorded()


def test_graphs_keep_at_least_one():
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        Graphs(lambda x: x, most=0)


@gpu
def test_graphs_record_each_shape_once_and_forget_the_oldest():
    calls = []

    def double(x):
        calls.append(len(x))
        return 2 * x

    graphs = Graphs(double, most=2)
    for count in (3, 4, 3, 5, 3, 4):  # 5 drives out 4, which then drives out 5
        x = torch.arange(count, device="cuda", dtype=torch.float32)
        assert torch.equal(graphs(x), 2 * x)
    assert len(graphs) == 2
    assert list(dict.fromkeys(calls)) == [3, 4, 5]
    assert len(calls) == 4 * 4  # three warm-ups and the recording, of 3, 4, 5 and again 4
