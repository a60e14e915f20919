"""Training PASD: the losses, what a sample draws, what is trained and what is not, one update."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msbd.loading.nets import start_pasd_nets
from msbd.train.config import OFFICIAL, PAPER, TrainConfig
from msbd.train.data import Batch
from msbd.train.loop import (
    DivergedError,
    Trainer,
    World,
    checkpoint_activations,
    learning_rate_factor,
    trainable,
)
from msbd.train.objective import (
    Draws,
    Encoder,
    Inputs,
    PASDObjective,
    colourfulness_loss,
    draw_samples,
    removal_loss,
)
from nets.unet import ResnetBlock, Transformer, UNet, UNetConfig
from samplers.schedule import q_sample, velocity
from tests.helpers.goldens import load_golden
from tests.helpers.seeded_weights import seeded_input
from tests.helpers.tiny import ALPHAS, count_letters, letters_as_context, tiny_vae
from tests.helpers.tiny_training import (
    LATENT,
    VARIANTS,
    base_unet,
    difference,
    feed,
    gradients,
    numbered,
    objective,
    spoil,
    trained,
)
from weights.merge import PASD_KEYS

CONFIG = TrainConfig(steps=8, batch=2, learning_rate=1e-3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def configured(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


# ---- losses ------------------------------------------------------------------------------------------------


def official_colour(pictures: Tensor) -> Tensor:
    """The official code adds up over the pictures of a batch."""
    return torch.stack([colourfulness_loss(picture[None]) for picture in pictures]).sum()


def test_losses_equal_the_official_codes() -> None:
    golden = load_golden("pasd_helpers", "train_loss_a")
    heads, clean = [golden[f"in.rgb{i}"] for i in range(3)], golden["in.pixel_values"]
    mse = F.mse_loss(golden["in.model_pred"], golden["in.target"])
    realisr = mse + OFFICIAL.gamma * removal_loss(heads, clean, antialias=OFFICIAL.antialias)
    colour = torch.stack([official_colour(head) for head in heads]).sum()
    found = {
        "mse_only": mse,
        "colorful_rgb0": official_colour(heads[0]),
        "loss_realisr": realisr,
        "loss_grayscale": realisr + 0.003 * colour,  # 0.001 for each of three heads
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(golden[f"out.{name}"].item(), rel=1e-6), name


def test_removal_loss_is_zero_for_the_pictures_themselves_and_grows_with_the_error() -> None:
    clean = seeded_input("clean", (2, 3, 32, 48), seed=1).tanh()
    sizes = ((16, 24), (8, 12), (4, 6))
    pyramid = [F.interpolate(clean, size, mode="bilinear", antialias=True) for size in sizes]
    assert removal_loss(pyramid, clean).item() == 0
    assert removal_loss([level + 0.25 for level in pyramid], clean).item() == pytest.approx(0.75, rel=1e-5)
    assert removal_loss([], clean).item() == 0


def test_only_an_antialiased_pyramid_forgets_details_too_fine_for_a_level() -> None:
    grey = [torch.zeros(1, 3, 8, 8)]
    blocks = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0]).repeat(8).expand(1, 3, 64, 64)
    assert removal_loss(grey, blocks, antialias=False).item() == pytest.approx(1)  # sees two of eight
    assert removal_loss(grey, blocks, antialias=True).item() < 0.6  # their mean is 0.5


def test_colourfulness_is_least_for_grey_and_most_for_vivid_colours() -> None:
    grey = seeded_input("grey", (1, 1, 16, 16), seed=1).tanh().expand(1, 3, 16, 16)
    tinted = grey + 0.1 * seeded_input("tint", (1, 3, 16, 16), seed=1)
    vivid = seeded_input("vivid", (1, 3, 16, 16), seed=1).sign()
    losses = [colourfulness_loss(picture).item() for picture in (grey, tinted, vivid)]
    assert losses[0] == pytest.approx(1, abs=1e-6)
    assert losses[0] > losses[1] > losses[2]


def test_colourfulness_by_its_formula() -> None:
    picture = torch.tensor([[0.8, -0.2], [0.1, 0.4], [-0.5, 0.3]]).view(1, 3, 1, 2)  # R, G, B of two pixels
    rg, yb = (0.7, 0.6), (0.95, 0.2)  # |R - G|, |(R + G) / 2 - B|
    variance = (0.1**2 + 0.75**2) / 2  # of two values: half the squared difference
    offset = math.hypot(sum(rg) / 2, sum(yb) / 2)
    assert colourfulness_loss(picture).item() == pytest.approx(1 - math.sqrt(variance) - 0.3 * offset)


# ---- what a sample draws -----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.integers(-(2**40), 2**62),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_draws_depend_on_the_seed_and_the_number_alone(seed: int, index: list[int], share: float) -> None:
    together = draw_samples(seed, index, LATENT, null_prompts=share)
    torch.randn(3)  # the global stream does not matter
    for place, n in enumerate(index):
        alone = draw_samples(seed, [n], LATENT, null_prompts=share)
        for one, all_ in zip(alone[:3], together[:3], strict=True):
            assert torch.equal(one[0], all_[place])
        assert alone.null[0] == together.null[place]
    assert together.noise.shape == together.posterior.shape == (len(index), *LATENT)
    assert together.noise.dtype == torch.float32


@pytest.fixture(scope="module")
def many() -> Draws:
    return draw_samples(3, range(8_000), (1, 1, 2), null_prompts=0.3)


def test_timesteps_are_uniform(many: Draws) -> None:
    assert set(range(1000)) >= set(many.t.tolist())
    for bins in (10, 500):
        counts = torch.bincount(many.t * bins // 1000, minlength=bins).double()
        expected = len(many.t) / bins
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < bins - 1 + 4 * math.sqrt(2 * (bins - 1))
    assert draw_samples(0, range(200), LATENT, null_prompts=0, timesteps=7).t.unique().tolist() == [*range(7)]


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 60))
def test_timesteps_of_any_consecutive_samples_are_spread_evenly(seed: int, first: int, count: int) -> None:
    """Discrepancy: no part of the schedule has more than 2 more or less than its share."""
    t = draw_samples(seed, range(first, first + count), (1, 1, 1), null_prompts=0).t
    for below in range(100, 1000, 100):
        assert abs(int((t < below).sum()) - count * below / 1000) <= 2


def test_timesteps_are_spread_for_seeds_of_any_size() -> None:
    assert len(draw_samples(2**62 + 1, range(100), (1, 1, 1), null_prompts=0).t.unique()) > 50


def test_what_a_sample_draws_is_independent(many: Draws) -> None:
    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])

    bound = 4 / math.sqrt(len(many.t))
    null = torch.tensor(many.null)
    assert abs(correlation(many.t, null)) < bound
    assert abs(correlation(null[1:], null[:-1])) < bound
    assert abs(correlation(many.t, many.noise[:, 0, 0, 0])) < bound
    assert abs(correlation(null, many.noise[:, 0, 0, 0])) < bound
    assert abs(correlation(many.noise[1:], many.noise[:-1])) < bound
    assert abs(correlation(many.noise, many.posterior)) < bound
    for drawn in (many.noise, many.posterior):
        assert abs(drawn.mean().item()) < bound
        assert abs(drawn.var().item() - 1) < 2 * bound


def test_the_share_of_captions_that_is_left_out(many: Draws) -> None:
    deviation = math.sqrt(0.3 * 0.7 / len(many.null))
    assert abs(sum(many.null) / len(many.null) - 0.3) < 4 * deviation
    for share, expected in ((0.0, False), (1.0, True)):
        assert set(draw_samples(3, range(500), LATENT, null_prompts=share).null) == {expected}


def test_what_is_drawn_does_not_depend_on_the_share_of_null_prompts() -> None:
    some, none = (draw_samples(1, range(9), LATENT, null_prompts=share) for share in (0.5, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(some[:3], none[:3], strict=True))


def test_other_seeds_and_numbers_draw_otherwise() -> None:
    noises = [
        draw_samples(seed, range(50), LATENT, null_prompts=0.5).noise for seed in (0, 1, 2, -1, 1_000_003)
    ]
    flat = torch.cat(noises).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


# ---- encoder -----------------------------------------------------------------------------------------------


def batch_of(index: Sequence[int]) -> Batch:
    """Pictures and captions by their numbers."""
    clean, control = (
        torch.stack([seeded_input(f"{name}{n}", (3, 32, 32), seed=2).tanh() for n in index])
        for name in ("clean", "control")
    )
    return Batch(clean, control / 2 + 0.5, ["x" * (n + 1) for n in index], list(index))


def tiny_encoder() -> Encoder:
    text: Any = letters_as_context
    return Encoder(tiny_vae(), text, lambda captions: count_letters(list(captions)))


def test_encoder_samples_the_posterior_and_leaves_captions_out() -> None:
    encoder, batch = tiny_encoder(), batch_of([4, 7])

    def draw(index: Sequence[int], shape: tuple[int, ...]) -> Draws:
        draws = draw_samples(0, index, shape, null_prompts=0.0)
        return draws._replace(null=[False, True])

    found, expected = encoder(batch, draw), draw([4, 7], LATENT)
    posterior = encoder.vae.encode(batch.clean)
    z = posterior.mean + (posterior.logvar / 2).exp() * expected.posterior
    assert torch.allclose(found.z, z * encoder.vae.config.scaling_factor, atol=1e-6)
    assert torch.equal(found.t, expected.t) and torch.equal(found.noise, expected.noise)
    assert found.context[:, 0, 0].tolist() == pytest.approx([0.05, 0])  # 0.01 for each letter of the caption
    assert torch.equal(found.clean, batch.clean) and torch.equal(found.control, batch.control)
    assert not any(field.requires_grad for field in found)


def test_on_a_cpu_attention_is_wide_where_the_rest_is_not() -> None:
    q = torch.ones(1, 1, 2, 4)
    for changes, expected in (({}, torch.float32), ({"checkpointing": True}, torch.bfloat16)):
        config = configured(precision="bf16", **changes)
        with Trainer(objective(config), config).autocast():
            assert F.scaled_dot_product_attention(q, q, q).dtype == expected
            assert F.linear(q, q[0, 0]).dtype == torch.bfloat16


def test_the_frozen_encoder_works_in_its_own_precision() -> None:
    """A VAE in float16 overflows: DESIGN section 4."""
    config = configured(precision="bf16")
    trainer = Trainer(objective(config), config)
    inside = []

    def recorded() -> Iterator[Inputs]:
        for batch in feed(trainer):
            inside.append(torch.is_autocast_enabled("cpu"))
            yield batch

    trainer.step(recorded())
    assert inside == [False]


# ---- the objective -----------------------------------------------------------------------------------------


def parts_of(found: PASDObjective, batch: Inputs) -> tuple[Tensor, Tensor]:
    """The U-Net's prediction, and L_DR."""
    x = q_sample(batch.z, batch.t, ALPHAS, batch.noise)
    control = found.controlnet(x, batch.t, batch.context, batch.control)
    return found.unet(x, batch.t, batch.context, control), removal_loss(control.to_rgbs, batch.clean)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_loss_is_eq_5_and_gamma_times_the_removal_loss(gamma: float) -> None:
    found, batch = objective(configured(gamma=gamma)), numbered([0, 1])
    with torch.no_grad():
        losses = found(batch)
        prediction, removal = parts_of(found, batch)
    denoising = ((prediction - batch.noise) ** 2).mean()
    assert losses.keys() == {"loss", "denoising", "removal"}
    assert losses["denoising"].item() == pytest.approx(denoising.item(), rel=1e-6)
    assert losses["removal"].item() == pytest.approx(removal.item(), rel=1e-6)
    assert losses["loss"].item() == pytest.approx((denoising + gamma * removal).item(), rel=1e-6)


def test_a_v_predicting_base_is_trained_towards_v() -> None:
    found = objective(CONFIG, prediction_type="v_prediction")
    batch = numbered([0, 1])
    with torch.no_grad():
        losses, (prediction, _) = found(batch), parts_of(found, batch)
    target = velocity(batch.z, batch.noise, batch.t, ALPHAS)
    assert losses["denoising"].item() == pytest.approx(F.mse_loss(prediction, target).item(), rel=1e-6)


def test_grayscale_training_adds_the_colour_of_the_heads() -> None:
    config, batch = configured(colour_weight=0.25), numbered([0, 1])
    found = objective(config, grayscale=True)
    with torch.no_grad():
        losses, plain = found(batch), objective(config)(batch)
        heads = found.controlnet(batch.z, batch.t, batch.context, batch.control).to_rgbs
    colour = sum(colourfulness_loss(picture).item() for picture in heads)
    assert losses["colour"].item() == pytest.approx(colour, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(plain["loss"].item() + 0.25 * colour, rel=1e-5)


def test_colour_of_a_batch_is_the_mean_of_its_pictures() -> None:
    heads = seeded_input("heads", (3, 3, 8, 8), seed=1) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    each = official_colour(heads).item() / 3
    assert colourfulness_loss(heads).item() == pytest.approx(each, rel=1e-5)


def test_grayscale_training_too_is_the_same_however_its_samples_are_spread() -> None:
    options: dict[str, Any] = {"grayscale": True, "dtype": torch.float64}
    joint = trained(configured(steps=1, batch=4, colour_weight=1.0), **options)
    split = trained(configured(steps=1, batch=2, accumulate=2, colour_weight=1.0), **options)
    assert difference(joint["gradients"][0], split["gradients"][0]) <= 1e-9


def test_without_heads_there_is_the_denoising_loss_alone() -> None:
    with torch.no_grad():
        losses = objective(CONFIG, to_rgb=False)(numbered([0, 1]))
    assert losses.keys() == {"loss", "denoising"}
    assert losses["loss"] is losses["denoising"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_net_starts_at_the_loss_of_its_base(variant: str) -> None:
    batch = numbered([0, 1, 2])
    found = objective(CONFIG, variant, fresh=True)
    with torch.no_grad():
        x = q_sample(batch.z, batch.t, ALPHAS, batch.noise)
        prediction = base_unet()(x, batch.t, batch.context)
        assert found(batch)["denoising"].item() == F.mse_loss(prediction, batch.noise).item()


@pytest.mark.parametrize("variant", ["full", "light"])
def test_the_official_start_disturbs_the_base(variant: str) -> None:
    batch = numbered([0, 1, 2])
    with torch.no_grad():
        zero, random = (
            objective(CONFIG, variant, fresh=True, zero_init=zero)(batch)["denoising"]
            for zero in (True, False)
        )
    assert abs(zero.item() - random.item()) > 1e-4


def test_new_tensors_depend_on_the_seed_alone() -> None:
    base = base_unet()

    def new(seed: int) -> dict[str, Tensor]:
        nets = start_pasd_nets(base, hint_widths=(4, 6, 8, 10), seed=seed)
        return {f"{i}.{name}": p for i, net in enumerate(nets) for name, p in net.state_dict().items()}

    before = torch.get_rng_state()
    first = new(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert difference(first, new(5)) == 0
    assert difference(first, new(6)) > 0


# ---- what is trained, what is not --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_stays_bit_for_bit_and_everything_else_changes(variant: str) -> None:
    config = configured(steps=4)
    found = objective(config, variant, fresh=True)
    before = {name: p.detach().clone() for name, p in found.named_parameters()}
    base = {f"unet.{name}" for name in base_unet().state_dict()}
    trainer, moved = Trainer(found, config), set()
    batches = feed(trainer)
    assert trainer.parameters.keys() == before.keys() - base
    for _ in range(config.steps):
        trainer.step(batches)
        moved |= {name for name, gradient in gradients(trainer).items() if gradient.any()}
    after = dict(found.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == before.keys() - base
    assert moved == before.keys() - base
    assert all(p.grad is None for name, p in after.items() if name in base)


def test_training_leaves_the_base_that_was_given_alone() -> None:
    unet = base_unet()
    nets = start_pasd_nets(unet, hint_widths=(4, 6, 8, 10))
    trainer = Trainer(PASDObjective(*nets, ALPHAS, CONFIG, added=PASD_KEYS), CONFIG)
    trainer.step(feed(trainer))
    assert difference(unet.state_dict(), base_unet().state_dict()) == 0
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize(
    ("variant", "values"),
    [("full", 361_289_497 + 248_234_560), ("light", 361_289_497 + 28_697_920), ("none", 361_289_497)],
)
def test_number_of_trained_values_on_stable_diffusion(variant: str, values: int) -> None:
    with torch.device("meta"):
        nets = start_pasd_nets(UNet(UNetConfig()), variant=variant)
    found = trainable(PASDObjective(*nets, ALPHAS, CONFIG, added=PASD_KEYS))
    assert sum(parameter.numel() for parameter in found.values()) == values
    assert round(values / 1e6, 1) == {"full": 609.5, "light": 390.0, "none": 361.3}[variant]


def test_marks_of_what_is_added_match_whole_names() -> None:
    nets = start_pasd_nets(base_unet(), variant="light", hint_widths=(4, 6, 8, 10))
    found = trainable(PASDObjective(*nets, ALPHAS, CONFIG, added=PASD_KEYS))
    marks = ("norm2_plus", "attn2_plus", "proj_in_plus")
    assert all(name.startswith("controlnet.") or any(m in name.split(".") for m in marks) for name in found)


# ---- one update --------------------------------------------------------------------------------------------


def test_accumulating_equals_one_larger_batch() -> None:
    joint = trained(configured(steps=2, batch=4))
    for batch, accumulate in ((2, 2), (1, 4)):
        split = trained(configured(steps=2, batch=batch, accumulate=accumulate))
        for a, b in zip(joint["gradients"], split["gradients"], strict=True):
            assert difference(a, b) <= 1e-9
        assert difference(joint["weights"], split["weights"]) <= 1e-9
        for a, b in zip(joint["figures"], split["figures"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
            assert a["gradient"] == pytest.approx(b["gradient"], abs=1e-9)


@settings(max_examples=40)
@given(
    size=st.integers(1, 4),
    batch=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    steps=st.integers(1, 4),
    data=st.data(),
)
def test_processes_and_batches_share_the_samples_of_every_step(
    size: int, batch: int, accumulate: int, steps: int, data: st.DataObject
) -> None:
    config = TrainConfig(steps=steps, batch=batch, accumulate=accumulate)
    done = data.draw(st.integers(0, steps))
    trainer = Trainer(nn.Linear(1, 1), config)
    trainer.done = done
    shares = []
    for rank in range(size):
        trainer.world = World(rank, size)
        shares.append(list(trainer.batches()))
        assert len(shares[rank]) == accumulate * (steps - done)
        assert all(len(numbers) == batch for numbers in shares[rank])
    each = trainer.samples_per_step
    assert each == size * batch * accumulate
    for step in range(done, steps):
        first = (step - done) * accumulate
        numbers = [n for share in shares for part in share[first : first + accumulate] for n in part]
        assert sorted(numbers) == [*range(step * each, (step + 1) * each)]


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_gradients_are_clipped_all_together_after_accumulation(clip: float) -> None:
    config = configured(batch=1, accumulate=3, clip=clip)
    trainer = Trainer(objective(config, dtype=torch.float64), config)
    plain = Trainer(objective(config, dtype=torch.float64), config)
    for batch in [numbered([n], torch.float64) for n in range(3)]:
        (plain.objective(batch)["loss"] / 3).backward()
    norm = torch.cat([g.flatten() for g in gradients(plain).values()]).norm().item()
    assert 0.01 < norm < 1e9
    assert trainer.step(feed(trainer, torch.float64))["gradient"] == pytest.approx(norm, rel=1e-9)
    clipped = torch.cat([g.flatten() for g in gradients(trainer).values()]).norm().item()
    assert clipped == pytest.approx(min(norm, clip), rel=1e-3)  # torch adds 1e-6 to the norm
    factor = min(1.0, clip / norm)
    for name, gradient in gradients(plain).items():
        assert torch.allclose(gradients(trainer)[name], gradient * factor, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adam", 0.1), ("adamw", 0.0), ("adamw", 0.1)])
def test_first_update_by_the_formula_of_the_optimizer(name: Any, decay: float) -> None:
    """From Kingma & Ba's algorithm 1 the first step is g / (|g| + eps); decay is in g,
    or beside it (AdamW).
    """
    config = configured(optimizer=name, weight_decay=decay, clip=1e9, warmup=1)
    rate = 0.5e-3  # of the first of the two steps up
    trainer = Trainer(objective(config, dtype=torch.float64), config)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.step(feed(trainer, torch.float64))
    for key, gradient in gradients(trainer).items():
        theta = before[key]
        g = gradient + decay * theta if name == "adam" else gradient
        start = theta * (1 - rate * decay) if name == "adamw" else theta
        assert torch.allclose(trainer.parameters[key], start - rate * g / (g.abs() + 1e-8), atol=1e-12), key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1]),
        ({"schedule": "cosine"}, [1, 0.8535533906, 0.5, 0.1464466094]),
        ({"schedule": "cosine", "warmup": 1}, [0.5, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_learning_rate_by_step(changes: dict[str, Any], expected: list[float]) -> None:
    config = configured(steps=4, batch=1, **changes)
    assert [learning_rate_factor(step, config) for step in range(4)] == pytest.approx(expected)
    figures = trained(config)["figures"]
    assert [f["rate"] for f in figures] == pytest.approx([1e-3 * share for share in expected])


def test_average_by_hand() -> None:
    """The mean of what each update gave, the one i updates ago weighted by decay^i;
    the start does not count.
    """
    config = configured(ema=0.75)
    trainer = Trainer(objective(config, dtype=torch.float64), config)
    batches, each = feed(trainer, torch.float64), []
    for count in range(1, 4):
        trainer.step(batches)
        each.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
        weights = [0.75 ** (count - 1 - i) for i in range(count)]
        for name, kept in trainer.kept().items():
            parts = [w * theta[name] for w, theta in zip(weights, each, strict=True)]
            mean = torch.stack(parts).sum(0) / sum(weights)
            assert torch.allclose(kept, mean, rtol=0, atol=1e-14), name
    assert difference(trainer.kept(), trainer.state()["weights"]) > 1e-5


def test_without_an_average_the_weights_themselves_are_kept() -> None:
    trainer = Trainer(objective(CONFIG), CONFIG)
    trainer.step(feed(trainer))
    assert trainer.average is None
    assert difference(trainer.kept(), trainer.state()["weights"]) == 0


# ---- gradients that are not finite -------------------------------------------------------------------------


def spoilt(config: TrainConfig, calls: Sequence[int]) -> PASDObjective:
    found = objective(config)
    spoil(found, calls)
    return found


def snapshot(trainer: Trainer) -> list[Tensor]:
    """Everything that an update changes."""
    state = trainer.state()
    moments = [value for one in state["optimizer"]["state"].values() for value in one.values()]
    return [t.clone() for t in (*state["weights"].values(), *trainer.kept().values(), *moments)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_that_is_not_finite_is_left_out_and_counted(accumulate: int) -> None:
    config = configured(batch=1, accumulate=accumulate, ema=0.9)
    bad = [accumulate, 4 * accumulate - 1]  # batches of the second and of the fourth update
    trainer = Trainer(spoilt(config, bad), config)
    batches = feed(trainer)
    changed, counted = [], []
    for _ in range(5):
        before = snapshot(trainer)
        counted.append(trainer.step(batches)["skipped"])
        after = snapshot(trainer)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        changed.append(not same)
    assert changed == [True, False, True, False, True]
    assert counted == [0, 1, 1, 2, 2] and trainer.done == 5


def test_after_too_many_in_a_row_the_run_stops_and_says_what_to_do() -> None:
    config = configured(batch=1, nan_limit=2, steps=20)
    trainer = Trainer(spoilt(config, [0, 1, 3, 4, 6, 7, 8]), config)
    batches = feed(trainer)
    for _ in range(8):
        trainer.step(batches)
    with pytest.raises(DivergedError, match="3 updates in a row .* lower learning rate") as raised:
        trainer.step(batches)
    assert "\n" not in str(raised.value)


def test_divergence_names_its_step() -> None:
    config = configured(batch=1, nan_limit=1)
    trainer = Trainer(spoilt(config, [1, 2]), config)
    batches = feed(trainer)
    trainer.step(batches)
    trainer.step(batches)
    with pytest.raises(DivergedError, match="^step 3:"):
        trainer.step(batches)


def test_float16_overflows_are_left_out_until_the_scale_fits() -> None:
    config = configured(precision="fp16", ema=0.9, batch=1, steps=20)
    trainer = Trainer(objective(config), config)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    batches, changed, scales = feed(trainer), [], []
    for _ in range(20):
        before = snapshot(trainer)
        scales.append(trainer.scaler.get_scale())
        trainer.step(batches)
        after = snapshot(trainer)
        changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
        if changed[-1]:
            break
    assert changed[-1] and not any(changed[:-1]) and trainer.skipped == len(changed) - 1 >= 2
    assert scales == [2.0 ** (22 - n) for n in range(len(scales))]
    assert trainer.scaler.get_scale() == scales[-1]
    state = trainer.state()["weights"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_float16_clips_the_true_gradient() -> None:
    config = configured(batch=1, accumulate=2, clip=0.01)
    half = dataclasses.replace(config, precision="fp16")
    exact, scaled = (Trainer(objective(c), c) for c in (config, half))
    norms = [trainer.step(feed(trainer))["gradient"] for trainer in (exact, scaled)]
    # Float16's own rounding in this net is 4 %; a loss scale that was not taken out would be a factor of
    # 65,536.
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    assert torch.cat([g.flatten() for g in gradients(scaled).values()]).norm().item() <= 0.0101


# ---- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_train_on_weights_of_32(precision: Any) -> None:
    config = configured(precision=precision, steps=8, ema=0.5, learning_rate=5e-3)
    trainer = Trainer(objective(config), config)
    one = numbered([0, 1])
    losses = [trainer.step(iter([one]))["loss"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    kinds = {t.dtype for t in (*trainer.parameters.values(), *trainer.kept().values(), *snapshot(trainer))}
    assert kinds == {torch.float32}
    full = Trainer(objective(CONFIG), CONFIG).step(iter([one]))["loss"]
    assert losses[0] == pytest.approx(full, rel=0.05) and losses[0] != full


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu_is_that_on_the_cpu(precision: Any) -> None:
    config = configured(precision=precision)
    cpu, gpu = Trainer(objective(CONFIG), CONFIG), Trainer(objective(config).cuda(), config)
    batches = (Inputs(*(field.cuda() for field in batch)) for batch in feed(gpu))
    tolerance = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}[precision]
    expected = feed(cpu)
    for _ in range(4):
        assert gpu.step(batches)["loss"] == pytest.approx(cpu.step(expected)["loss"], rel=tolerance)
    assert all(p.dtype == torch.float32 for p in gpu.parameters.values())


@pytest.mark.parametrize("variant", ["full", "light"])
def test_activations_made_again_change_nothing(variant: str) -> None:
    plain, thrifty = (objective(CONFIG, variant, dtype=torch.float64) for _ in range(2))
    checkpoint_activations(thrifty, (ResnetBlock, Transformer))
    runs = []
    for found in (plain, thrifty):
        calls = count_calls(found)
        trainer = Trainer(found, CONFIG)
        loss = trainer.step(feed(trainer, torch.float64))["loss"]
        runs.append((loss, gradients(trainer), calls()))
    assert runs[0][0] == runs[1][0]
    assert difference(runs[0][1], runs[1][1]) == 0
    assert runs[1][2] > runs[0][2]


def count_calls(found: PASDObjective) -> Any:
    """How often convolutions of residual blocks are computed."""
    calls = []
    for module in found.modules():
        if isinstance(module, ResnetBlock):
            module.conv1.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "at least 1"),
        ("batch", -1, "at least 1"),
        ("accumulate", 0, "at least 1"),
        ("nan_limit", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("validate_every", -1, "at least 0"),
        ("warmup", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("gamma", math.nan, "at least 0"),
        ("colour_weight", -1.0, "at least 0"),
        ("learning_rate", 0.0, "more than 0"),
        ("learning_rate", math.nan, "more than 0"),
        ("clip", 0.0, "more than 0"),
        ("null_prompts", 1.5, "from 0 to 1"),
        ("null_prompts", math.nan, "from 0 to 1"),
        ("ema", 1.0, "below 1"),
        ("ema", -0.1, "below 1"),
        ("optimizer", "sgd", "one of adam, adamw"),
        ("schedule", "linear", "one of constant, cosine"),
        ("precision", "fp8", "one of fp32, bf16, fp16"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as raised:
        configured(**{name: value})
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{name} is ") and str(value) in message and expected in message


def test_presets_are_the_published_recipes() -> None:
    paper = {"optimizer": "adam", "learning_rate": 5e-5, "batch": 4, "gamma": 1.0, "steps": 500_000}
    official = {
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 1e-2,
        "accumulate": 2,
        "clip": 1.0,
    }
    for preset, values in ((PAPER, paper), (OFFICIAL, official)):
        assert {name: getattr(preset, name) for name in values} == values
        assert preset.null_prompts == 0.5 and preset.schedule == "constant" and preset.ema == 0
    assert not OFFICIAL.antialias and OFFICIAL.colour_weight == pytest.approx(3 * 4 * PAPER.colour_weight)
