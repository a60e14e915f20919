"""Fine-tuning a base: whole and low-rank, beside a plain loop; the LoRA file it gives;
the LoRA between two bases.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from msbd.train.base import BaseObjective, extract_lora, lora_state, low_rank, unet_state
from msbd.train.config import TrainConfig
from msbd.train.loop import Trainer, checkpoint_activations, trainable
from msbd.train.objective import Inputs
from nets.unet import ResnetBlock, Transformer, UNet
from tests.helpers.seeded_weights import load_seeded, seeded_tensor
from tests.helpers.tiny import ALPHAS
from tests.helpers.tiny_training import UNET, feed, numbered
from weights.lora import merge_loras, read_lora

CONFIG = TrainConfig(steps=8, batch=2, learning_rate=1e-3, clip=0.3)
WAYS = [None, 3]  # ranks: the whole U-Net, and a LoRA
State = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def base_unet(**changes: Any) -> UNet:
    """The base, the same each time."""
    return load_seeded(UNet(dataclasses.replace(UNET, **changes)), seed=9).eval()  # type: ignore[return-value]


def weight_of(net: nn.Module, path: str) -> Tensor:
    """The weight that a layer works with."""
    weight = net.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


def make(rank: int | None, dtype: torch.dtype = torch.float64, **options: Any) -> BaseObjective:
    return BaseObjective(base_unet().to(dtype), ALPHAS, CONFIG, rank=rank, **options)


def moved(objective: BaseObjective) -> dict[str, Tensor]:
    """The trained tensors after something was learned: none of them is zero any more."""
    trained = trainable(objective)
    for name, parameter in trained.items():
        change = seeded_tensor(name, (1, *parameter.shape), seed=3)[0]
        parameter.data += 0.1 * change.to(parameter)
    return {name: parameter.detach() for name, parameter in trained.items()}


def predict(unet: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    inputs = numbered([0, 1], dtype)
    with torch.no_grad():
        return unet(inputs.noise, inputs.t, inputs.context)


def loaded(state: State) -> UNet:
    net = base_unet().double()
    net.load_state_dict(state, strict=True)
    return net


def merged(state: State, lora: State, part: str = "unet") -> dict[str, Tensor]:
    """`state` with a LoRA file's tensors added by the project's own reader."""
    return {**state, **merge_loras({part: state}, [(read_lora(lora), 1.0)])[part]}


# ---- what is trained ---------------------------------------------------------------------------------------


def test_low_rank_changes_are_those_of_every_dense_layer_in_the_transformers() -> None:
    objective = make(2)
    layers = {
        f"{path}.{name}"
        for path, transformer in base_unet().named_modules()
        if isinstance(transformer, Transformer)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert set(objective.changed) == layers and len(layers) == 4 * 12
    expected = {f"unet.{path}.parametrizations.weight.0.{role}" for path in layers for role in ("down", "up")}
    assert trainable(objective).keys() == expected


def test_a_whole_fine_tune_trains_everything() -> None:
    assert trainable(make(None)).keys() == {f"unet.{name}" for name in base_unet().state_dict()}


@pytest.mark.parametrize("rank", WAYS)
def test_training_starts_at_the_base(rank: int | None) -> None:
    objective, base = make(rank), base_unet().double()
    for path in objective.changed:
        assert torch.equal(weight_of(objective.unet, path), weight_of(base, path)), path
    torch.testing.assert_close(predict(objective.unet), predict(base), rtol=0, atol=1e-13)


def test_down_is_drawn_from_the_seed_and_up_is_zero() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        objective = BaseObjective(base_unet(), ALPHAS, TrainConfig(seed=seed), rank=3)
        return {name: parameter.detach() for name, parameter in trainable(objective).items()}

    first, again, other = start(1), start(1), start(2)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("up"):
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            bound = tensor.shape[1] ** -0.5
            assert 0.5 * bound < tensor.abs().max() <= bound


# ---- training ----------------------------------------------------------------------------------------------


def changed_weights(base: State, trained: State, scale: float) -> dict[str, Tensor]:
    """W + scale * up @ down of every layer that has an up among `trained`."""
    change, weights = ".parametrizations.weight.0.", {}
    for path in {name.split(change)[0] for name in trained}:
        product = trained[f"{path}{change}up"] @ trained[f"{path}{change}down"]
        weights[f"{path}.weight"] = base[f"{path}.weight"] + scale * product.view_as(base[f"{path}.weight"])
    return weights


def plain_loop(rank: int | None, alpha: float, kind: str, start: State) -> dict[str, Tensor]:
    """Two updates by torch alone, from `start`: the trained tensors, by the objective's names."""
    unet = base_unet().double()
    base = dict(unet.state_dict())
    trained = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=CONFIG.learning_rate)
    for step in range(2):
        inputs = numbered([2 * step, 2 * step + 1], torch.float64)
        a = ALPHAS[inputs.t].view(-1, 1, 1, 1)
        weights = {name.removeprefix("unet."): tensor for name, tensor in trained.items()}
        if rank is not None:
            weights = changed_weights(base, weights, alpha / rank)
        x = a.sqrt() * inputs.z + (1 - a).sqrt() * inputs.noise
        eps = functional_call(unet, base | weights, (x, inputs.t, inputs.context))
        velocity = a.sqrt() * inputs.noise - (1 - a).sqrt() * inputs.z
        target = {"epsilon": inputs.noise, "v_prediction": velocity, "sample": inputs.z}[kind]
        optimizer.zero_grad()
        (eps - target).square().mean().backward()
        norm = (
            torch.stack([t.grad.square().sum() for t in trained.values() if t.grad is not None]).sum().sqrt()
        )
        for tensor in trained.values():
            assert tensor.grad is not None
            tensor.grad *= min(1.0, CONFIG.clip / (norm.item() + 1e-6))
        optimizer.step()
    return {name: tensor.detach() for name, tensor in trained.items()}


@pytest.mark.parametrize("rank", WAYS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_two_updates_equal_a_plain_loop(rank: int | None, kind: str) -> None:
    objective = make(rank, alpha=5.0, prediction_type=kind)
    start = {name: tensor.clone() for name, tensor in moved(objective).items()}
    expected = plain_loop(rank, 5.0, kind, start)
    trainer = Trainer(objective, CONFIG)
    batches = feed(trainer, torch.float64)
    for _ in range(2):
        trainer.step(batches)
    for name, tensor in trainer.kept().items():
        assert (tensor - start[name]).abs().max() > 1e-5, name
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("rank", WAYS)
def test_one_batch_is_learned_and_what_is_frozen_stays_bit_equal(rank: int | None) -> None:
    objective = make(rank, torch.float32)
    config = TrainConfig(steps=30, batch=2, learning_rate=2e-3 if rank is None else 2e-2)
    trainer = Trainer(objective, config)

    def same() -> Iterator[Inputs]:
        while True:
            yield numbered([0, 1])

    batches = same()
    losses = [trainer.step(batches)["loss"] for _ in range(config.steps)]
    assert losses[-1] < 0.8 * losses[0], losses
    after = objective.unet.state_dict()
    for name, tensor in base_unet().state_dict().items():
        path = name.removesuffix(".weight")
        frozen = f"{path}.parametrizations.weight.original" if path in objective.changed else name
        if path in objective.changed:
            assert not torch.equal(weight_of(objective.unet, path), tensor), name
        assert torch.equal(after[frozen], tensor) == (rank is not None), name


def gradients(objective: BaseObjective, run: Any = None, dtype: torch.dtype = torch.float64) -> State:
    (run or objective)(numbered([0, 1], dtype))["loss"].backward()
    return {name: p.grad for name, p in trainable(objective).items() if p.grad is not None}


@pytest.mark.parametrize("rank", WAYS)
def test_gradients_are_the_same_when_distributed_and_when_activations_are_computed_again(
    rank: int | None, tmp_path: Path
) -> None:
    plain, again, spread = make(rank), make(rank), make(rank)
    for objective in (plain, again, spread):
        moved(objective)
    checkpoint_activations(again, (ResnetBlock, Transformer))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        distributed = gradients(spread, DistributedDataParallel(spread))
    finally:
        dist.destroy_process_group()
    expected, recomputed = gradients(plain), gradients(again)
    assert expected.keys() == distributed.keys() == recomputed.keys() == trainable(plain).keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, distributed[name]), name
        torch.testing.assert_close(tensor, recomputed[name], rtol=0, atol=1e-12)


def test_autocast_rounds_the_changed_weight_once() -> None:
    objective = make(2, torch.float32)
    moved(objective)
    path = objective.changed[0]
    exact = weight_of(objective.unet, path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_of(objective.unet, path), exact)
        loss = objective(numbered([0, 1]))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(objective(numbered([0, 1]))["loss"].item(), rel=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable(objective).values())


@pytest.mark.parametrize("rank", [-1, 0, 9])
def test_a_rank_that_no_low_rank_is_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}; expected 1 to 8"):
        make(rank)


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("alpha", [None, 1.0, 7.0])
def test_the_lora_file_merged_gives_what_was_trained(alpha: float | None, linear: bool) -> None:
    base = base_unet(use_linear_projection=linear).double()
    objective = BaseObjective(
        base_unet(use_linear_projection=linear).double(), ALPHAS, CONFIG, rank=3, alpha=alpha
    )
    weights = moved(objective)
    state = lora_state(objective, weights)
    lora = read_lora(state)
    assert lora.describe() == f"48 layers of the U-Net, rank 3 (alpha {alpha or 3:g})"
    plain = predict(base)
    base.load_state_dict(merged(base.state_dict(), state), strict=True)
    eps = predict(objective.unet)
    assert (eps - plain).abs().max() > 0.01
    torch.testing.assert_close(predict(base), eps, rtol=0, atol=1e-12)


def test_the_kept_weights_are_what_is_written() -> None:
    low, whole = make(2), make(None)
    averaged = {name: torch.full_like(tensor, 0.5) for name, tensor in moved(low).items()}
    assert {float(tensor.unique()) for tensor in lora_state(low, averaged).values()} == {
        0.5,
        2.0,
    }  # and alpha
    averaged = {name: torch.full_like(tensor, 0.5) for name, tensor in moved(whole).items()}
    assert {float(tensor.unique()) for tensor in unet_state(whole, averaged).values()} == {0.5}


def test_a_whole_fine_tune_is_a_u_net_of_the_same_keys() -> None:
    objective = make(None)
    state = unet_state(objective, moved(objective))
    assert list(state) == list(base_unet().state_dict())
    torch.testing.assert_close(predict(loaded(state)), predict(objective.unet), rtol=0, atol=1e-13)


def test_what_was_not_trained_is_not_written() -> None:
    with pytest.raises(ValueError, match="the whole U-Net was trained"):
        lora_state(make(None), {})
    with pytest.raises(ValueError, match="only low-rank changes"):
        unet_state(make(1), {})


# ---- the difference of two bases ---------------------------------------------------------------------------

SHAPES = [(5, 9), (9, 5), (6, 6), (4, 3, 3, 3), (12, 2, 1, 1), (1, 7), (7, 1)]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 6), st.integers(0, 2**31))
def test_low_rank_leaves_the_tail_of_the_singular_values(
    shape: tuple[int, ...], rank: int, seed: int
) -> None:
    difference = draw(shape, seed)
    up, down = low_rank(difference, rank)
    values = torch.linalg.svdvals(difference.flatten(1))
    assert up.shape == (shape[0], rank) and down.shape == (rank, math.prod(shape[1:]))
    lost = (difference.flatten(1) - up @ down).square().sum()
    torch.testing.assert_close(lost, values[rank:].square().sum(), rtol=1e-9, atol=1e-12)
    roots = F.pad(values, (0, rank))[
        :rank
    ].sqrt()  # the two factors are of one size, so that float16 holds both
    torch.testing.assert_close(up.norm(dim=0), roots, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(down.norm(dim=1), roots, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_low_rank_is_exact_for_a_difference_of_that_rank(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype
) -> None:
    exact = (draw((shape[0], rank), 1) @ draw((rank, math.prod(shape[1:])), 2)).reshape(shape)
    difference = exact.to(dtype)
    up, down = low_rank(difference, 3)
    assert up.dtype == down.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    found = (up.double() @ down.double()).reshape(shape)
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


def tuned(rank: int, dtype: torch.dtype = torch.float64) -> tuple[State, dict[str, Tensor]]:
    """A base, and what a change of `rank` of every dense layer and convolution makes of it."""
    base = {name: tensor.to(dtype) for name, tensor in base_unet().state_dict().items()}
    changed = dict(base)
    for n, (name, tensor) in enumerate(base.items()):
        if tensor.ndim > 1:
            change = draw((len(tensor), rank), n) @ draw((rank, tensor[0].numel()), n + 1000)
            changed[name] = tensor + 0.01 * change.reshape(tensor.shape).to(dtype)
    return base, changed


def test_an_extracted_lora_gives_the_tuned_base() -> None:
    base, changed = tuned(2)
    state, share = extract_lora(base, changed, 2)
    lora = read_lora(state)
    assert {(layer.rank, layer.alpha) for layer in lora.layers} == {(2, 2.0)}
    assert len(lora.layers) == sum(tensor.ndim > 1 for tensor in base.values())
    assert share == pytest.approx(1, abs=1e-12)
    result = merged(base, state)
    for name, tensor in changed.items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-6, msg=name)  # stored in float32
    assert (predict(loaded(changed)) - predict(loaded(base))).abs().max() > 0.05
    torch.testing.assert_close(predict(loaded(result)), predict(loaded(changed)), rtol=0, atol=1e-5)


def test_the_share_that_a_lora_keeps_is_of_the_whole_difference() -> None:
    base, changed = tuned(6)
    changed["conv_in.bias"] = base["conv_in.bias"] + 0.5
    state, share = extract_lora(base, changed, 3)
    result = merged(base, state)
    total = sum((changed[name] - base[name]).square().sum().item() for name in base)
    lost = sum((changed[name] - result[name]).square().sum().item() for name in base)
    assert 0.2 < share < 0.95
    assert share == pytest.approx(1 - lost / total, rel=1e-6)


def test_only_layers_that_differ_are_extracted() -> None:
    base, _ = tuned(1)
    tall = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    half = {name: tensor.half() for name, tensor in base.items()}
    state, share = extract_lora(half, half | {tall: half[tall] + 1}, 4)
    assert {key.split(".")[0] for key in state} == {f"lora_unet_{tall[:-7].replace('.', '_')}"}
    assert share > 0.99


def test_bases_of_two_kinds_or_without_a_difference_are_refused() -> None:
    base, changed = tuned(1)
    with pytest.raises(ValueError, match="other names or shapes"):
        extract_lora(base, changed | {"conv_in.weight": torch.zeros(1, 1)}, 2)
    with pytest.raises(ValueError, match="the same weights"):
        extract_lora(base, dict(base), 2)
    with pytest.raises(ValueError, match="rank is 0; expected at least 1"):
        extract_lora(base, changed, 0)


def test_narrow_layers_have_the_rank_of_all_and_lose_nothing() -> None:
    base, changed = tuned(9)
    state, _ = extract_lora(base, changed, 9)
    assert {layer.rank for layer in read_lora(state).layers} == {9}
    narrow = "conv_out.weight"  # (4, 8, 3, 3)
    assert base[narrow].shape[0] == 4
    torch.testing.assert_close(merged(base, state)[narrow], changed[narrow], rtol=0, atol=1e-6)
