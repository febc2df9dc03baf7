"""Networks that compute in bfloat16 and remember in float32."""
import pytest
import torch
from helpers.arrays import tiny

from runtime import compute
from runtime.checkpoints import Checkpoints
from runtime.flags import Settings, Training
from runtime.nf4 import NF4, pack
from runtime.optimizer import make_optimizer
from runtime.run import Run

TOKENS = torch.randint(1, 13, (4, 8), generator=torch.Generator().manual_seed(1))


def placed(*models):
    device = compute.Compute(Settings(device="cpu", precision="bfloat16", micro_batch=1))
    device.cfg.checkpoint_blocks = False
    device.place(*models)
    return device


def network(head="lm"):
    return tiny(head).float()


def test_an_answer_has_the_same_log_probabilities_with_gradients_and_without():
    """Or PPO's first ratios would not be 1: an operation that depends on the gradients rounds differently."""
    model = network().bfloat16()
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    with torch.no_grad():
        before = model.logprobs(TOKENS, mask)
    assert torch.equal(model.logprobs(TOKENS, mask), before)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_while_it_computes_a_network_is_in_bfloat16_and_else_in_float32(head):
    model, plain = network(head), network(head)
    plain.load_state_dict(model.state_dict())
    device, before = placed(model), dict(model.named_parameters())
    plain.bfloat16()
    if head == "scalar":
        plain.head.float()
        plain.head.load_state_dict(model.head.state_dict())
    with device.computing():
        for name, p in model.named_parameters():
            exact = head == "scalar" and name.startswith("head.")
            assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(model(TOKENS), plain(TOKENS))
    assert all(p is before[name] and p.dtype == torch.float32 for name, p in model.named_parameters())


def test_what_fails_while_a_network_computes_leaves_it_as_it_was():
    model = network()
    device, before = placed(model), dict(model.named_parameters())
    with pytest.raises(KeyError):
        device.map(lambda rows: {}["no"], [0], [3])
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("how", ["break", "raise", "return", "inner", "to the end"])
def test_however_a_loop_over_micro_batches_ends_a_network_is_what_it_was(how):
    model = network()
    device, before = placed(model), dict(model.named_parameters())

    def loop():
        for rows, share in device.micro_batches(range(4), [1] * 4, [8] * 4):
            (share * model.logprobs(TOKENS[rows], TOKENS[rows].bool()).float().mean()).backward()
            assert model.token_embedding.weight.dtype == torch.bfloat16
            if how == "break":
                break
            if how == "return":
                return
            if how == "raise":
                raise KeyError
            if how == "inner":                      # it computes on after what is computed in between
                device.map(lambda rows: {"y": model(TOKENS[rows])[:, -1]}, range(4), [8] * 4)
                assert model.token_embedding.weight.dtype == torch.bfloat16
    caught = None
    try:
        loop()
    except KeyError as e:
        caught = e                                  # its traceback holds the loop's frame
    assert (caught is not None) == (how == "raise") and device.depth == 0
    assert all(p is before[name] and p.dtype == torch.float32 for name, p in model.named_parameters())


def test_a_loop_left_half_way_whose_generator_somebody_holds_is_noticed_before_a_step(tmp_path):
    model = network()
    run = Run(Training(device="cpu", precision="bfloat16", micro_batch=1, out=str(tmp_path)), 1)
    run.place(model)
    optimizer = make_optimizer(model, 0.1)
    held = run.micro_batches(range(4), [1] * 4, [8] * 4)
    next(held)
    with pytest.raises(RuntimeError, match="inside a loop over micro-batches"):
        run.optimizer_step(optimizer, 0.1, 0.0, "rows")
    held.close()
    run.optimizer_step(optimizer, 0.1, 0.0, "rows")


def test_gradients_of_micro_batches_add_up_in_float32():
    model = network()
    device = placed(model)

    for rows, share in device.micro_batches(range(4), [1] * 4, [8] * 4):
        (share * model.logprobs(TOKENS[rows], TOKENS[rows].bool()).float().mean()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    twin = network().bfloat16()
    twin.load_state_dict(model.state_dict())
    for row in range(4):
        (twin.logprobs(TOKENS[[row]], TOKENS[[row]].bool()).float().mean() / 4).backward()
        for name, p in twin.named_parameters():
            expected[name] += p.grad.float()
            p.grad = None
    for name in found:
        assert torch.equal(found[name], expected[name]) and found[name].dtype == torch.float32, name
    # In bfloat16 the sum would be a multiple of its steps.
    assert not torch.equal(found["norm.weight"], found["norm.weight"].bfloat16().float())


def test_the_copies_follow_the_weights(tmp_path):
    """After a step of the optimiser, and after a checkpoint has been read."""
    model, checkpoints = network(), Checkpoints(str(tmp_path))
    device, optimizer = placed(model), make_optimizer(model, 0.1)
    checkpoints.save({"model": model}, 1)

    def outputs():
        return device.map(lambda rows: {"y": model(TOKENS[rows])[:, -1]}, range(4), [8] * 4)["y"]
    first = outputs()
    for rows, share in device.micro_batches(range(4), [1] * 4, [8] * 4):
        (share * model(TOKENS[rows]).float().square().mean()).backward()
    optimizer.step()
    second = outputs()
    assert (second - first).abs().max() > 0.05
    checkpoints.load({"model": model})
    assert torch.equal(outputs(), first)


def test_an_update_too_small_for_bfloat16_is_not_lost():
    model = network()
    device, optimizer = placed(model), make_optimizer(model, 1e-5)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    for _ in range(400):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert model.norm.weight.mean().item() == pytest.approx(1 - 400e-5, abs=1e-4)
    with device.computing():
        assert (model.norm.weight < 1).all()


def test_what_is_frozen_is_kept_in_bfloat16_alone_but_for_what_must_be_exact():
    reward, base = network("scalar").requires_grad_(False), network()
    base.add_adapters(2, 4.0, ("q", "down"))
    pack(base)
    device = placed(reward, base)
    for name, p in reward.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("head.") else torch.bfloat16), name
    for module in base.modules():
        if isinstance(module, NF4):
            assert {p.dtype for p in module.parameters()} == {torch.uint8, torch.float32}
    assert {name for _, name, _, _ in device.copies} == {"A", "B"}
    assert base.token_embedding.weight.dtype == torch.bfloat16
