"""weights/lora.py: stored merges, the formula under every name, undo,
and one line for whatever does not fit.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.goldens import load_golden, read_shapes, relative_error
from tests.helpers.parity_cases import lora_outputs
from tests.helpers.seeded_nets import seeded_lora
from tests.helpers.seeded_weights import seeded_tensor
from weights.files import WeightsError
from weights.lora import METADATA_KEY, Lora, is_lora, left_out, merge_loras, read_lora

Base = dict[str, dict[str, Tensor]]

# The base of most tests: one module of each kind.
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT_LAYER = "text_model.encoder.layers.0"
SHAPES = {
    "unet": {
        f"{ATTENTION}.attn1.to_q": (6, 5),
        f"{ATTENTION}.attn1.to_out.0": (6, 6),
        "mid_block.attentions.0.proj_in": (6, 5, 1, 1),
        "up_blocks.1.resnets.0.conv1": (4, 6, 3, 3),
        "time_embedding.linear_1": (7, 3),
    },
    "text_encoder": {f"{TEXT_LAYER}.self_attn.q_proj": (6, 6), f"{TEXT_LAYER}.mlp.fc1": (8, 6)},
}
MODULES = [(part, path) for part, shapes in SHAPES.items() for path in shapes]

ROLES = {"down": "A", "up": "B"}
# How a down or up matrix of a module is called: by kohya, and by diffusers and PEFT over the years.
SPELLINGS: dict[str, Callable[[str, str, str], str]] = {
    "kohya": lambda part, path, role: f"{kohya(part, path)}.lora_{role}.weight",
    "kohya te1": lambda part, path, role: f"{kohya(part, path).replace('_te_', '_te1_')}.lora_{role}.weight",
    "peft": lambda part, path, role: f"{part}.{path}.lora_{ROLES[role]}.weight",
    "peft, adapter named": lambda part, path, role: f"{part}.{path}.lora_{ROLES[role]}.default_0.weight",
    "peft, wrapped": lambda part, path, role: f"base_model.model.{path}.lora_{ROLES[role]}.weight",
    "peft, wrapped inside": lambda part, path, role: f"{part}.base_model.model.{path}.lora_{ROLES[role]}.weight",
    "transformers 5": lambda part, path, role: f"{part}.{path.removeprefix('text_model.')}.lora_{ROLES[role]}.weight",
    "diffusers": lambda part, path, role: f"{part}.{path}.lora.{role}.weight",
    "diffusers, linear layer": lambda part, path, role: f"{part}.{path}.lora_linear_layer.{role}.weight",
    "diffusers, no prefix": lambda part, path, role: f"{path}.lora.{role}.weight",
    "mixed": lambda part, path, role: f"{part}.{path}.lora_{role}.weight",
}  # fmt: skip


def kohya(part: str, path: str) -> str:
    return f"lora_{'unet' if part == 'unet' else 'te'}_{path.replace('.', '_')}"


def tensor(name: str, *shape: int) -> Tensor:
    """Seeded normal numbers, float32."""
    return seeded_tensor(name, (1, *shape), seed=3)[0]


def make_base(dtype: torch.dtype = torch.float32) -> Base:
    base = {
        part: {f"{path}.weight": tensor(path, *shape).to(dtype) for path, shape in shapes.items()}
        for part, shapes in SHAPES.items()
    }
    base["unet"]["conv_norm_out.weight"] = torch.ones(6, dtype=dtype)
    base["unet"]["time_embedding.linear_1.bias"] = torch.ones(7, dtype=dtype)
    return base


def factors(shape: tuple[int, ...], rank: int, tucker: bool = False, tag: str = "") -> dict[str, Tensor]:
    """down and up (and mid) for a weight of that shape, as trainers store them."""
    out, inner, *kernel = shape
    point = [1] * len(kernel)
    made = {"up": tensor(f"{tag}up", out, rank, *point), "down": tensor(f"{tag}down", rank, inner, *kernel)}
    if tucker:
        made["down"] = tensor(f"{tag}down", rank, inner, 1, 1)
        made["mid"] = tensor(f"{tag}mid", rank, rank, *kernel)
    return made


def named(
    part: str, path: str, pieces: Mapping[str, Tensor], alpha: float | None = None
) -> dict[str, Tensor]:
    """One layer in kohya's names."""
    state = {SPELLINGS["kohya"](part, path, role): value for role, value in pieces.items()}
    return state if alpha is None else state | {f"{kohya(part, path)}.alpha": torch.tensor(alpha)}


def whole_lora(
    rank: int = 2, alpha: float | None = None, tag: str = "", spelling: str = "kohya"
) -> dict[str, Tensor]:
    """A layer for every module of the base."""
    state = {}
    for part, path in MODULES:
        for role, value in factors(SHAPES[part][path], rank, tag=tag + path).items():
            state[SPELLINGS[spelling](part, path, role)] = value
        if alpha is not None:
            state[f"{kohya(part, path)}.alpha"] = torch.tensor(alpha)
    return state


def merge_one(weight: Tensor, lora: Lora, multiplier: float = 1.0, **how: Any) -> Tensor:
    """`lora` for the module conv_in of a U-Net, merged into `weight`."""
    return merge_loras({"unet": {"conv_in.weight": weight}}, [(lora, multiplier)], **how)["unet"][
        "conv_in.weight"
    ]


def expected(weight: Tensor, pieces: Mapping[str, Tensor], scale: float) -> Tensor:
    """W + scale * up . down, in float64."""
    change = pieces["up"].double().flatten(1) @ pieces["down"].double().flatten(1)
    return weight.double() + scale * change.reshape(weight.shape)


def flat(state: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], Tensor]:
    return {(part, key): value for part, tensors in state.items() for key, value in tensors.items()}


def same(first: Mapping[str, Mapping[str, Tensor]], second: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Bit for bit."""
    one, two = flat(first), flat(second)
    return one.keys() == two.keys() and all(
        value.dtype == two[key].dtype and torch.equal(value, two[key]) for key, value in one.items()
    )


def clone(base: Mapping[str, Mapping[str, Tensor]]) -> Base:
    return {part: {key: value.clone() for key, value in tensors.items()} for part, tensors in base.items()}


# --- stored reference merges --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["diffusers_kohya_r4", "diffusers_kohya_r4_conv3", "pasd_convert_lora_r4"])
@torch.no_grad()
def test_merges_equal_the_references(case: str) -> None:
    """Of diffusers with peft, and of PASD's code, which ignores alpha."""
    golden = load_golden("lora", case)
    nets = seeded_lora(golden.meta)
    unet = nets[1].get_submodule("0").state_dict()  # with the LoRA at the first multiplier
    stored = [name for name in golden.tensors if name.startswith("merged.")]
    assert len(stored) == 4
    for name in stored:
        assert (unet[name.removeprefix("merged.")] - golden[name]).abs().max() <= 1e-6, name
    out = lora_outputs(nets, golden)
    assert {f"out.{name}" for name in out} == {name for name in golden.tensors if name.startswith("out.")}
    for name, tensor in out.items():
        assert relative_error(tensor, golden[f"out.{name}"]) <= 1e-5, name


def test_alpha_is_one_of_two() -> None:
    wrong: Any = "ignored"
    with pytest.raises(ValueError, match="alpha is 'ignored': expected 'honour' or 'ignore'"):
        merge_loras({}, [], alpha=wrong)


# --- the formula, under every name --------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_formula(spelling: str) -> None:
    base = make_base()
    merged = merge_loras(base, [(read_lora(whole_lora(spelling=spelling)), 0.7)])
    assert flat(merged).keys() == {(part, f"{path}.weight") for part, path in MODULES}
    for part, path in MODULES:
        wanted = expected(base[part][f"{path}.weight"], factors(SHAPES[part][path], 2, tag=path), 0.7)
        assert relative_error(merged[part][f"{path}.weight"], wanted) <= 1e-6, path


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (2.0, 0.5), (0.0, 0.0), (16, 4.0)])
@pytest.mark.parametrize(
    "shape, tucker", [((7, 5), False), ((7, 5, 1, 1), False), ((7, 5, 3, 3), False), ((7, 5, 3, 3), True)]
)
def test_a_merged_layer_does_what_it_and_its_lora_do(
    shape: tuple[int, ...], tucker: bool, alpha: float | None, scale: float
) -> None:
    """The oracle is the net that training sees: the base's layer,
    and the factors one after the other beside it.
    """
    pieces, weight = factors(shape, 4, tucker), tensor("weight", *shape).double()
    lora = read_lora(named("unet", "conv_in", pieces, alpha))
    x = tensor("x", 3, 5, 6, 4).double() if len(shape) == 4 else tensor("x", 3, 5).double()

    def layer(inputs: Tensor, matrix: Tensor) -> Tensor:
        if matrix.ndim == 2:
            return F.linear(inputs, matrix.double())
        return F.conv2d(inputs, matrix.double(), padding=matrix.shape[-1] // 2)

    beside = x
    for role in ("down", "mid", "up"):
        beside = layer(beside, pieces[role]) if role in pieces else beside
    for how, factor in (("honour", 0.6 * scale), ("ignore", 0.6)):
        merged = merge_one(weight, lora, 0.6, alpha=how)
        assert merged.dtype == torch.float64
        torch.testing.assert_close(
            layer(x, merged), layer(x, weight) + factor * beside, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "path, key",
    [
        (f"{ATTENTION}.attn1.to_q", f"unet.{ATTENTION}.attn1.processor.to_q_lora"),
        (f"{ATTENTION}.attn1.to_out.0", f"unet.{ATTENTION}.attn1.processor.to_out_lora"),
        (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn1.processor.to_q_lora"),
        (f"{ATTENTION}.attn1.to_out.0", f"{ATTENTION}.attn1.to_out_lora"),
        (f"{TEXT_LAYER}.self_attn.q_proj", f"text_encoder.{TEXT_LAYER}.self_attn.to_q_lora"),
        (f"{TEXT_LAYER}.self_attn.out_proj", f"text_encoder.{TEXT_LAYER}.self_attn.to_out_lora"),
    ],
)
def test_names_of_the_old_attention_processors(path: str, key: str) -> None:
    part = "text_encoder" if path.startswith("text") else "unet"
    base = {part: {f"{path}.weight": tensor("w", 6, 5)}}
    pieces = factors((6, 5), 2)
    lora = read_lora({f"{key}.down.weight": pieces["down"], f"{key}.up.weight": pieces["up"], f"{key}.alpha": torch.tensor(1.0)})  # fmt: skip
    merged = merge_loras(base, [(lora, 1.0)])[part][f"{path}.weight"]
    assert relative_error(merged, expected(base[part][f"{path}.weight"], pieces, 0.5)) <= 1e-6


@pytest.mark.parametrize("ending", [".alpha", ".lora.alpha", ".lora_linear_layer.alpha"])
def test_names_of_alpha(ending: str) -> None:
    state = whole_lora(rank=4, spelling="diffusers")
    state[f"unet.{ATTENTION}.attn1.to_q{ending}"] = torch.tensor([3.0], dtype=torch.float16)
    alphas = {layer.module: layer.alpha for layer in read_lora(state).layers}
    name = f"{ATTENTION}.attn1.to_q".replace(".", "_")
    assert alphas.pop(name) == 3.0 and set(alphas.values()) == {4.0}


def test_a_1x1_convolution_and_a_linear_layer_are_the_same() -> None:
    """U-Nets store the projections around a transformer as either; files made for one fit the other."""
    lora, linear = read_lora(named("unet", "conv_in", factors((6, 5), 2))), tensor("w", 6, 5)
    merged = merge_one(linear[:, :, None, None], lora)
    assert merged.shape == (6, 5, 1, 1) and torch.equal(merged[:, :, 0, 0], merge_one(linear, lora))


def test_flattened_names_are_unambiguous() -> None:
    for manifest in ("sd15_unet_diffusers", "pasd_unet", "pasd_light_unet", "clip_text_vitl14_hf"):
        names = read_shapes(manifest)
        assert len({name.replace(".", "_") for name in names}) == len(names) >= 196


@given(data=st.data())
def test_kohya_and_other_names_merge_bit_equal(data: st.DataObject) -> None:
    modules = data.draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    in_kohya, in_others = {}, {}
    for part, path in modules:
        rank, alpha = data.draw(st.integers(1, 3)), data.draw(st.none() | st.floats(-4, 4, width=16))
        spelling = data.draw(st.sampled_from(sorted(SPELLINGS)))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
        pieces = {
            role: value.to(dtype) for role, value in factors(SHAPES[part][path], rank, tag=path).items()
        }
        in_kohya |= named(part, path, pieces, alpha)
        in_others |= {SPELLINGS[spelling](part, path, role): value for role, value in pieces.items()}
        if alpha is not None:
            in_others[f"{part}.{path}.alpha"] = torch.tensor(alpha)
    weight, base = data.draw(st.floats(-2, 2)), make_base()
    alpha_mode: Any = data.draw(st.sampled_from(["honour", "ignore"]))
    first, second = (
        merge_loras(base, [(read_lora(state), weight)], alpha=alpha_mode) for state in (in_kohya, in_others)
    )
    assert same(first, second)
    assert flat(first).keys() == {(part, f"{path}.weight") for part, path in modules}


# --- several, undo, what is left alone ----------------------------------------------------------------------


def test_several_loras_add_up() -> None:
    base, path = make_base(), "time_embedding.linear_1"
    loras = [whole_lora(2, 1.0, "a"), whole_lora(3, 6.0, "b"), named("unet", path, factors((7, 3), 1))]
    merged = merge_loras(base, list(zip(map(read_lora, loras), (0.5, -1.5, 2.0), strict=True)))
    sums = {
        (part, path): expected(
            expected(base[part][f"{path}.weight"], factors(SHAPES[part][path], 2, tag="a" + path), 0.5 * 1 / 2),
            factors(SHAPES[part][path], 3, tag="b" + path), -1.5 * 6 / 3,
        )
        for part, path in MODULES
    }  # fmt: skip
    sums["unet", path] = expected(sums["unet", path], factors((7, 3), 1), 2.0)
    for (part, path), wanted in sums.items():
        assert relative_error(merged[part][f"{path}.weight"], wanted) <= 1e-6, path


def test_the_sum_is_rounded_once() -> None:
    """Two changes of 0.4 steps each, in float16 around 1: one step together,
    none if each were rounded alone.
    """
    step = 2**-10
    base = {"unet": {"conv_in.weight": torch.ones(1, 1, dtype=torch.float16)}}
    pieces = {"down": torch.full((1, 1), 0.4 * step), "up": torch.ones(1, 1)}
    lora = read_lora(named("unet", "conv_in", pieces))
    for times, wanted in ((1, 1), (2, 1 + step)):
        assert merge_loras(base, [(lora, 1.0)] * times)["unet"]["conv_in.weight"].item() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_undo_is_bit_equal_and_inputs_stay(dtype: torch.dtype) -> None:
    base, state = make_base(dtype), whole_lora(alpha=1.5)
    before, net = clone({**base, "lora": state}), clone(base)
    merged = merge_loras(base, [(read_lora(state), 0.8)])
    for (part, key), value in flat(merged).items():
        assert value.dtype == dtype and not torch.equal(value, base[part][key])
        net[part][key].copy_(value)
    assert same({**base, "lora": state}, before)
    for part, key in flat(merged):  # the undo
        net[part][key].copy_(base[part][key])
    assert same(net, base)


def test_a_weight_that_is_a_view_is_merged_and_left() -> None:
    turned, pieces = tensor("w", 5, 6).T, factors((6, 5), 2)
    before = turned.clone()
    merged = merge_one(turned, read_lora(named("unet", "conv_in", pieces)))
    assert relative_error(merged, expected(before, pieces, 1.0)) <= 1e-6 and torch.equal(turned, before)


def test_a_part_that_the_base_has_not_is_skipped() -> None:
    lora, base = read_lora(whole_lora()), make_base()
    assert lora.count() == {"unet": 5, "text_encoder": 2}
    everything = merge_loras(base, [(lora, 1.0)])
    assert same(merge_loras({"unet": base["unet"]}, [(lora, 1.0)]), {"unet": everything["unet"]})
    assert merge_loras({"vae": {}}, [(lora, 1.0)]) == {} == merge_loras(base, [])


def test_describe() -> None:
    state = named("unet", "conv_in", factors((6, 5), 2), 1.0)
    assert read_lora(state).describe() == "1 layer of the U-Net, rank 2 (alpha 1)"
    for path, alpha in (("text_model.x", None), ("y", 0.5)):
        state |= named("text_encoder", path, factors((6, 5), 4), alpha)
    counts = "1 layer of the U-Net, 2 layers of the text encoder"
    assert read_lora(state).describe() == f"{counts}, rank 2 to 4 (alpha 0.5 to 4)"


def test_describe_names_other_kinds() -> None:
    state = loha() | {f"{kohya('unet', 'conv_in')}.diff": torch.ones(6, 5)}
    assert read_lora(state).describe() == "LoHa, whole difference: 2 layers of the U-Net, rank 2 (alpha 2)"
    state = named("unet", "conv_in", factors((6, 5), 2)) | {
        f"{kohya('unet', 'conv_in')}.dora_scale": torch.ones(6)
    }
    assert read_lora(state).describe().startswith("DoRA: 1 layer")


def test_is_lora() -> None:
    for spelling in SPELLINGS:
        assert is_lora(whole_lora(spelling=spelling)), spelling
    assert is_lora([f"{ATTENTION}.attn1.processor.to_q_lora.down.weight"])
    assert is_lora(["lora_unet_x.hada_w1_a"]) and is_lora(["unet.x.lokr_w1"])
    for manifest in ("sd15_unet_diffusers", "sd15_vae_diffusers", "clip_vitl14_hf", "rrdbnet_x4plus"):
        assert not is_lora(read_shapes(manifest))
    assert not is_lora([])


# --- alpha from the metadata --------------------------------------------------------------------------------


def settings(**values: Any) -> dict[str, str]:
    return {METADATA_KEY: json.dumps({name.replace("__", "."): value for name, value in values.items()})}


def test_alpha_from_the_metadata_where_there_is_no_tensor() -> None:
    state = whole_lora(rank=4, spelling="peft")
    state[f"unet.{ATTENTION}.attn1.to_q.alpha"] = torch.tensor(1.0)
    metadata = settings(unet__lora_alpha=8, unet__r=4, unet__alpha_pattern={}, unet__use_rslora=False)
    lora = read_lora(state, metadata=metadata)
    assert [layer.alpha for layer in lora.layers] == [1.0, 8.0, 8.0, 8.0, 8.0, 4.0, 4.0]
    lora = read_lora(state, metadata=settings(lora_alpha=2.5))
    assert [layer.alpha for layer in lora.layers] == [1.0] + [2.5] * 6
    assert {layer.alpha for layer in read_lora(state, metadata={"format": "pt"}).layers} == {1.0, 4.0}


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({METADATA_KEY: "{"}, "not a JSON table"),
        ({METADATA_KEY: "[" * 100_000}, "not a JSON table"),
        ({METADATA_KEY: "[1]"}, "not a JSON table"),
        (settings(unet__lora_alpha="4"), "lora_alpha '4'"),
        (settings(lora_alpha=True), "lora_alpha True"),
        ({METADATA_KEY: '{"lora_alpha": NaN}'}, "lora_alpha nan"),
        ({METADATA_KEY: '{"lora_alpha": 1' + "0" * 400 + "}"}, "lora_alpha 10000"),
        (settings(unet__use_rslora="yes"), "use_rslora 'yes'"),
        (settings(alpha_pattern=[3]), "alpha_pattern"),
        (settings(text_encoder__alpha_pattern={"q_proj": "3"}), "alpha_pattern '3'"),
        (settings(alpha_pattern={"(a+)+": 3}), r"alpha_pattern has '\(a\+\)\+'"),
        (settings(alpha_pattern={"(q": 3}), r"alpha_pattern has '\(q'"),
        (settings(alpha_pattern={"": 3}), "alpha_pattern has ''"),
    ],
)
def test_settings_that_make_no_sense_are_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read_lora(whole_lora(spelling="peft"), metadata=metadata)
    check_line(caught.value)


# --- refusals -----------------------------------------------------------------------------------------------


def check_line(error: WeightsError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 300, str(error)


def altered(ending: str, value: Tensor | None) -> dict[str, Tensor]:
    """A whole LoRA whose first key with this ending has another value, or none."""
    state = whole_lora(alpha=1.0)
    key = next(key for key in state if key.endswith(ending))
    if value is None:
        del state[key]
        return state
    return state | {key: value}


Q = kohya("unet", f"{ATTENTION}.attn1.to_q")
REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "empty": (dict, "no tensors"),
    "a model": (lambda: make_base()["unet"], "no LoRA key"),
    "half a LoHa": (lambda: {f"{Q}.hada_w1_a": torch.ones(2, 2)}, "has hada_w1_a but no hada_w1_b and no hada_w2_a"),
    "LoHa of unlike halves": (lambda: loha(hada_w2_b=torch.ones(2, 4)), "both halves of a LoHa are alike"),
    "LoHa of unlike ranks": (lambda: loha(hada_w2_a=torch.ones(6, 3), hada_w2_b=torch.ones(3, 5)), "ranks 2 and 3"),
    "LoHa of an absurd rank": (lambda: loha(hada_w1_a=torch.ones(6, 25), hada_w1_b=torch.ones(25, 5)), "at most 4 times"),
    "LoHa with one middle": (lambda: loha(hada_t1=torch.ones(2, 2, 3, 3)), "expected"),
    "LoHa beside a LoRA": (lambda: loha() | whole_lora(), "has a LoRA and a LoHa; expected one change"),
    "half a LoKr": (lambda: {f"{Q}.lokr_w1": torch.ones(2, 2)}, "has lokr_w1 but no lokr_w2_a and no lokr_w2_b"),
    "LoKr twice": (lambda: lokr(lokr_w1_a=torch.ones(2, 1), lokr_w1_b=torch.ones(1, 5)), "lokr_w1 whole and in factors"),
    "LoKr of two ranks": (lambda: lokr(
        lokr_w1=None, lokr_w1_a=torch.ones(2, 1), lokr_w1_b=torch.ones(1, 5), lokr_w2=None,
        lokr_w2_a=torch.ones(3, 2), lokr_w2_b=torch.ones(2, 1)), "ranks 1 and 2; a LoKr has one rank"),
    "LoKr of a vector": (lambda: lokr(lokr_w1=torch.ones(2)), "expected matrices"),
    "LoKr, kernel first": (lambda: lokr(lokr_w1=torch.ones(2, 5, 3, 3)), "expected matrices"),
    "DoRA alone": (lambda: {f"{Q}.dora_scale": torch.ones(6, 1)}, "has dora_scale but no down and no up"),
    "DoRA of a difference": (lambda: {f"{Q}.dora_scale": torch.ones(6, 1), f"{Q}.diff": torch.ones(6, 5)}, "without one change"),
    "DoRA, a matrix": (lambda: whole_lora() | {f"{Q}.dora_scale": torch.ones(6, 2)}, "expected one row"),
    "DoRA, nothing": (lambda: whole_lora() | {f"{Q}.dora_scale": torch.ones(0)}, "expected one row"),
    "DoRA twice": (lambda: whole_lora() | {f"{Q}.dora_scale": torch.ones(6), f"{Q}.lora_magnitude_vector": torch.ones(6)}, "magnitude and dora_scale"),
    "DoRA not a number": (lambda: whole_lora() | {f"{Q}.dora_scale": torch.full((6,), torch.nan)}, "not finite"),
    "scalar not finite": (lambda: whole_lora() | {f"{Q}.scalar": torch.tensor(torch.inf)}, "inf, expected one number"),
    "scalar a list": (lambda: whole_lora() | {f"{Q}.scalar": torch.ones(2)}, "expected one number"),
    "scalar alone": (lambda: {f"{Q}.scalar": torch.ones(1)}, "has scalar but no down and no up"),
    "a difference of five axes": (lambda: {f"{Q}.diff": torch.ones(1, 1, 1, 1, 1)}, "expected a weight's"),
    "a bias of two axes": (lambda: {f"{Q}.diff_b": torch.ones(6, 1)}, r"diff_b \(6, 1\): expected \(out,\)"),
    "two biases": (lambda: whole_lora() | {f"{Q}.diff_b": torch.ones(6), f"{Q}.b_norm": torch.ones(6)}, "diff_b and b_norm"),
    "OFT": (lambda: {f"{Q}.oft_blocks": torch.ones(2, 2)}, "OFT"),
    "a difference beside a LoRA": (lambda: whole_lora() | {f"{Q}.diff": torch.ones(6, 5)}, "a LoRA and a whole difference"),
    "GLoRA": (lambda: {f"{Q}.a1.weight": torch.ones(6, 5), f"{Q}.b1.weight": torch.ones(6, 5)}, "GLoRA"),
    "(IA)^3": (lambda: {f"{Q}.weight": torch.ones(6), f"{Q}.on_input": torch.ones(1)}, "IA"),
    "embeddings": (lambda: whole_lora() | {"text_encoder.x.lora_embedding_A": torch.ones(2, 2)}, "embeddings"),
    "SDXL's second text encoder": (lambda: whole_lora() | {"lora_te2_x.lora_up.weight": torch.ones(6, 2)}, "SDXL"),
    "the same in diffusers": (lambda: {"text_encoder_2.x.lora_A.weight": torch.ones(6, 2)}, "SDXL"),
    "SDXL's U-Net, by its width": (lambda: {f"{Q.replace('attn1_to_q', 'attn2_to_k')}.lora_down.weight": torch.ones(2, 2048)}, "SDXL"),
    "SDXL's U-Net, by its depth": (lambda: {f"{Q.replace('blocks_0_attn1', 'blocks_1_attn1')}.lora_down.weight": torch.ones(2, 5)}, "SDXL"),
    "Stable Diffusion 2": (lambda: {f"unet.{ATTENTION}.attn2.to_v.lora_A.weight": torch.ones(2, 1024)}, "Stable Diffusion 2"),
    "embeddings alone": (lambda: {"bundle_emb.cat.string_to_param": torch.ones(2, 8), "lora_x.y": torch.ones(1)}, "no LoRA key"),
    "FLUX": (lambda: {"transformer.single_transformer_blocks.0.x.lora_A.weight": torch.ones(6, 2)}, "FLUX"),
    "unknown net": (lambda: {"lora_vae_x.lora_up.weight": torch.ones(6, 2)}, "no LoRA key"),
    "unknown role": (lambda: whole_lora() | {f"{Q}.lora_down.bias": torch.ones(6)}, "no LoRA key"),
    "unmerged checkpoint": (lambda: {"unet.conv_in.base_layer.weight": torch.ones(6, 2)}, "no LoRA key"),
    "up alone": (lambda: altered("lora_down.weight", None), "has up and alpha but no down"),
    "down alone": (lambda: altered("lora_up.weight", None), "has down and alpha but no up"),
    "alpha alone": (lambda: {f"{Q}.alpha": torch.tensor(1.0)}, "has alpha but no down and no up"),
    "twice": (lambda: whole_lora() | whole_lora(spelling="peft"), "a second time"),
    "two adapters": (lambda: whole_lora(spelling="peft") | whole_lora(spelling="peft, adapter named"), "a second time"),
    "ranks differ": (lambda: altered("lora_down.weight", torch.ones(3, 5)), r"down \(3, 5\), up \(6, 2\): expected"),
    "rank 0": (lambda: named("unet", "conv_in", {"down": torch.ones(0, 5), "up": torch.ones(6, 0)}), "expected"),
    "no inputs": (lambda: named("unet", "conv_in", {"down": torch.ones(2, 0), "up": torch.ones(6, 2)}), "expected"),
    "absurd rank": (lambda: named("unet", "conv_in", factors((2, 3), 13)), "at most 4 times"),
    "down is a vector": (lambda: altered("lora_down.weight", torch.ones(5)), "expected"),
    "down is a number": (lambda: altered("lora_down.weight", torch.tensor(1.0)), "expected"),
    "up with a kernel": (lambda: altered("lora_up.weight", torch.ones(6, 2, 3, 3)), "expected"),
    "mid of another rank": (lambda: whole_lora() | {f"{Q}.lora_mid.weight": torch.ones(3, 2, 3, 3)}, "mid"),
    "mid flat": (lambda: whole_lora() | {f"{Q}.lora_mid.weight": torch.ones(2, 2)}, "mid"),
    "mid and a kernel": (lambda: {
        f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3), f"{Q}.lora_down.weight": torch.ones(2, 5, 3, 3),
        f"{Q}.lora_up.weight": torch.ones(6, 2, 1, 1)}, "mid"),
    "not a number": (lambda: altered("lora_up.weight", torch.full((6, 2), torch.nan)), "not finite"),
    "infinite": (lambda: altered("lora_up.weight", torch.full((6, 2), torch.inf)), "not finite"),
    "integers": (lambda: altered("lora_up.weight", torch.ones(6, 2, dtype=torch.int8)), "int8, expected floating"),
    "alpha not a number": (lambda: altered("alpha", torch.tensor(torch.nan)), "nan, expected one number"),
    "alpha infinite": (lambda: altered("alpha", torch.tensor(-torch.inf)), "inf, expected one number"),
    "alpha absurd": (lambda: altered("alpha", torch.tensor(2**60)), "expected one number"),
    "alpha a list": (lambda: altered("alpha", torch.ones(2)), "expected one number"),
    "alpha a flag": (lambda: altered("alpha", torch.tensor(True)), "bool"),
}  # fmt: skip


def loha(**other: Tensor) -> dict[str, Tensor]:
    """A LoHa of to_q, with `other` tensors in it."""
    pieces = {"hada_w1_a": torch.ones(6, 2), "hada_w1_b": torch.ones(2, 5)}
    pieces |= {name.replace("w1", "w2"): value for name, value in pieces.items()}
    return {f"{Q}.{name}": value for name, value in (pieces | other).items()}


def lokr(**other: Tensor | None) -> dict[str, Tensor]:
    """A LoKr of to_q, with `other` tensors in it, or without those that are None."""
    pieces = {"lokr_w1": torch.ones(2, 5), "lokr_w2": torch.ones(3, 1)} | other
    return {f"{Q}.{name}": value for name, value in pieces.items() if value is not None}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_and_damaged_ones_give_one_line(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(WeightsError, match=message) as caught:
        read_lora(make(), "some.safetensors")
    assert str(caught.value).startswith("some.safetensors: ")
    check_line(caught.value)


def test_layers_that_do_not_fit_the_base_are_counted() -> None:
    lora, base = read_lora(whole_lora(), "some"), make_base()
    del base["unet"][f"{ATTENTION}.attn1.to_q.weight"]
    base["text_encoder"][f"{TEXT_LAYER}.mlp.fc1.weight"] = torch.ones(8, 7)
    first = r"the first, '.*_mlp_fc1' of the text encoder, changes a weight of .*\(8, 6, 1, 1\), the base's is \(8, 7\)"
    with pytest.raises(WeightsError, match=f"^some: 2 of 7 layers do not fit the base; {first}") as caught:
        merge_loras(base, [(lora, 1.0)])
    check_line(caught.value)
    with pytest.raises(WeightsError, match="some: 1 of 2 layers") as caught:
        merge_loras({"text_encoder": base["text_encoder"]}, [(lora, 1.0)])
    check_line(caught.value)


def test_modules_that_the_base_has_not_are_told_of_up_to_half_of_a_file() -> None:
    lora, base = read_lora(whole_lora(), "some"), make_base()
    missing = [path for part, path in MODULES if part == "unet"][:4]
    for number, path in enumerate(missing, 1):
        del base["unet"][f"{path}.weight"]
        if number <= 3:
            merged = flat(merge_loras(base, [(lora, 1.0)]))
            assert len(merged) == 7 - number
            (line,) = left_out(lora, base)
            assert line.startswith(
                f"some: {number} of 7 modules left out, which the base has not; first 'down_"
            )
    with pytest.raises(WeightsError, match="4 of 7 layers .*is no module of the base") as caught:
        merge_loras(base, [(lora, 1.0)])
    check_line(caught.value)
    assert left_out(lora, make_base()) == left_out(lora, {}) == []


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (f"{Q}.dora_scale", torch.ones(7, 1), r"has 7 lengths for a weight of \(6, 5\)"),
        (f"{Q}.dora_scale", torch.ones(1, 6), r"has 6 lengths for a weight of \(6, 5\)"),
        (f"{Q}.lora_magnitude_vector", torch.ones(5), r"has 5 lengths for a weight of \(6, 5\)"),
        (f"{Q}.diff_b", torch.ones(6), "a bias of shape \\(6,\\), the base's has none"),
        (f"{kohya('unet', 'time_embedding.linear_1')}.diff_b", torch.ones(6), "the base's is of \\(7,\\)"),
    ],
)  # fmt: skip
def test_lengths_and_biases_that_do_not_fit_the_base(name: str, tensor: Tensor, message: str) -> None:
    lora = read_lora(whole_lora() | {name: tensor})
    with pytest.raises(WeightsError, match=message) as caught:
        merge_loras(make_base(), [(lora, 1.0)])
    check_line(caught.value)


def test_a_product_that_the_base_cannot_hold_is_refused_before_it_is_made() -> None:
    """Two small factors of which a terabyte would come."""
    side = 2**10
    claims = [
        lokr(lokr_w1=torch.ones(side, side), lokr_w2=torch.ones(side, side)),
        loha(**{f"hada_w{n}_{end}": torch.ones(shape) for n in (1, 2) for end, shape in (("a", (2**20, 1)), ("b", (1, 2**20)))}),
    ]  # fmt: skip
    for state in claims:
        with pytest.raises(WeightsError, match="changes a weight of shape") as caught:
            merge_loras(make_base(), [(read_lora(state), 1.0)])
        check_line(caught.value)


def test_what_is_no_lora_of_a_net_here_is_left_out_with_a_note() -> None:
    embedding = {"bundle_emb.cat.clip_l": torch.ones(2, 6), "bundle_emb.dog.clip_l": torch.ones(2, 6)}
    lora = read_lora(whole_lora() | embedding | {"lora_vae_x.lora_up.weight": torch.ones(6, 2)}, "some")
    assert len(lora.layers) == 7
    assert lora.notes == (
        "some: 1 of 8 modules left out, of no net here; first 'lora_vae_x'",
        "some: 2 bundled embeddings left out ('cat', 'dog'): it is the LoRA that is read",
    )


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(6), r"the base's is \(6,\)"),
        (torch.ones(6, 5, 1), "the base's is"),
        (torch.ones(6, 5, 1, 1, 3), "the base's is"),
        (torch.ones(6, 5, 3, 3), "the base's is"),
        (torch.ones(6, 5, dtype=torch.int32), "int32"),
    ],
)
def test_weights_that_no_lora_fits(weight: Tensor, message: str) -> None:
    lora = read_lora(named("unet", "conv_in", factors((6, 5), 2)))
    with pytest.raises(WeightsError, match=message) as caught:
        merge_one(weight, lora)
    check_line(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_beyond_the_dtype_is_refused(dtype: torch.dtype) -> None:
    huge = read_lora(
        named("unet", "conv_in", {"down": torch.full((1, 5), 1e30), "up": torch.full((6, 1), 1e30)})
    )
    plain = read_lora(named("unet", "conv_in", factors((6, 5), 1)))
    for lora, multiplier in ((huge, 1.0), (plain, float("nan"))):
        with pytest.raises(WeightsError, match="'conv_in.weight' .*not finite in torch.float") as caught:
            merge_one(torch.ones(6, 5, dtype=dtype), lora, multiplier)
        check_line(caught.value)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=400)
beginnings = [
    "lora_unet_",
    "lora_te_",
    "lora_te2_",
    "unet.",
    "text_encoder.",
    "base_model.model.",
    "down_blocks.",
    Q,
    "",
]
endings = [
    ".hada_w1_a",
    ".lokr_w1",
    ".dora_scale",
    ".diff",
    ".diff_b",
    ".scalar",
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_mid.weight",
    ".lora_A.x.weight",
    ".alpha",
    "_lora.up.weight",
    "",
]
keys = st.tuples(st.sampled_from(beginnings), names, st.sampled_from(endings)).map("".join)
numbers = st.sampled_from([torch.nan, torch.inf, 3e38, 0.0, -1.0])
dtypes = st.sampled_from(
    [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]
)
shapes = st.lists(st.integers(0, 7), max_size=6)


def damage(data: st.DataObject, state: dict[str, Tensor]) -> None:
    key, other = (data.draw(st.sampled_from(sorted(state))) for _ in range(2))
    value = state[key]
    match data.draw(st.sampled_from(["drop", "rename", "add", "reshape", "fill", "cast", "swap"])):
        case "drop":
            del state[key]
        case "rename":
            state[data.draw(keys)] = state.pop(key)
        case "add":
            state[data.draw(keys)] = value
        case "reshape":
            state[key] = torch.ones(data.draw(shapes))
        case "fill":
            state[key] = torch.full(value.shape, data.draw(numbers))
        case "cast":
            state[key] = torch.ones(value.shape).to(data.draw(dtypes))
        case _:
            state[key], state[other] = state[other], value


@given(data=st.data())
def test_damaged_dictionaries_never_raise_anything_else(data: st.DataObject) -> None:
    spelling = data.draw(st.sampled_from(sorted(SPELLINGS)))
    state = whole_lora(alpha=1.0 if spelling == "kohya" else None, spelling=spelling)
    for _ in range(data.draw(st.integers(1, 3))):
        if state:
            damage(data, state)
    try:
        is_lora(state)
        lora = read_lora(state)
        assert 0 < len(lora.layers) <= len(state) and lora.describe()
        merged = merge_loras(make_base(torch.float16), [(lora, 0.5)])
        assert all(value.isfinite().all() for value in flat(merged).values())
    except WeightsError as error:
        check_line(error)
