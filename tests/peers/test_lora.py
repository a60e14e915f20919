"""Forty-odd LoRA files as trainers write them, each against its formula written out in float64.

The kinds are those of peft 0.18, kohya's sd-scripts, LyCORIS 3, OneTrainer and ComfyUI; the numbers are ours.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nets.unet import UNet
from tests.helpers.goldens import relative_error
from tests.helpers.seeded_weights import seeded_tensor
from tests.helpers.tiny_bundle import UNET
from weights.ldm import map_to
from weights.lora import METADATA_KEY, left_out, merge_loras, read_lora

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "mid_block.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"
TIME = "time_embedding.linear_1"
NORM = "down_blocks.0.resnets.0.norm1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {
    "unet": {Q: (12, 8), OUT: (6, 6), CONV: (8, 6, 3, 3), POINT: (6, 4, 1, 1), TIME: (7, 3), NORM: (6,)},
    "text_encoder": {TEXT: (6, 6)},
}


def tensor(name: str, *shape: int) -> Tensor:
    """Seeded normal numbers, float32."""
    return seeded_tensor(name, (1, *shape), seed=5)[0]


BASE = {
    part: {f"{path}.weight": tensor(path, *shape) for path, shape in shapes.items()}
    | {f"{path}.bias": tensor(path + "b", shape[0]) for path, shape in shapes.items()}
    for part, shapes in SHAPES.items()
}
PARTS = {path: part for part, shapes in SHAPES.items() for path in shapes}

State = dict[str, Tensor]
Changed = dict[str, Tensor]  # key of the base -> what it is to be, float64
File = tuple[State, dict[str, Any], Changed]  # tensors, PEFT's settings, the result at weight 0.7
WEIGHT = 0.7


def base(key: str) -> Tensor:
    return BASE[PARTS[key.rpartition(".")[0]]][key].double()


def added(path: str, change: Tensor, weight: float = WEIGHT) -> Changed:
    """W + weight * change."""
    key = f"{path}.weight"
    return {key: base(key) + weight * change.reshape(base(key).shape)}


def kohya(path: str) -> str:
    return f"lora_{'unet' if PARTS[path] == 'unet' else 'te'}_{path.replace('.', '_')}"


def peft(path: str) -> str:
    return f"{PARTS[path]}.{path}"


def pair(path: str, rank: int) -> tuple[Tensor, Tensor]:
    """up and down of a LoRA of that module."""
    out, inner, *kernel = SHAPES[PARTS[path]][path]
    return tensor(path + "up", out, rank, *([1] * len(kernel))), tensor(path + "down", rank, inner, *kernel)


def product(up: Tensor, down: Tensor) -> Tensor:
    return up.double().flatten(1) @ down.double().flatten(1)


def in_kohya(path: str, rank: int, alpha: float | None, **extra: Tensor) -> State:
    up, down = pair(path, rank)
    state = {f"{kohya(path)}.lora_up.weight": up, f"{kohya(path)}.lora_down.weight": down}
    state |= {} if alpha is None else {f"{kohya(path)}.alpha": torch.tensor(alpha)}
    return state | {f"{kohya(path)}.{name}": value for name, value in extra.items()}


def in_peft(path: str, rank: int) -> State:
    up, down = pair(path, rank)
    return {f"{peft(path)}.lora_A.weight": down, f"{peft(path)}.lora_B.weight": up}


# ---- LoRA, LoCon -------------------------------------------------------------------------------------------


def lora(path: str, rank: int, alpha: float | None) -> File:
    scale = 1.0 if alpha is None else alpha / rank
    return in_kohya(path, rank, alpha), {}, added(path, scale * product(*pair(path, rank)))


def locon_tucker() -> File:
    up, down, mid = tensor("u", 8, 2, 1, 1), tensor("d", 2, 6, 1, 1), tensor("m", 2, 2, 3, 3)
    name = kohya(CONV)
    state = {
        f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.alpha": torch.tensor(1.0)
    }  # fmt: skip
    change = torch.einsum("oa,abhw,bi->oihw", up.double()[..., 0, 0], mid.double(), down.double()[..., 0, 0])
    return state, {}, added(CONV, 0.5 * change)


def mixed_ranks() -> File:
    """Kohya's file with another rank and alpha in each module."""
    state, wanted = {}, {}
    for path, rank, alpha in ((Q, 1, 1.0), (OUT, 4, 2.0), (TEXT, 3, 6.0), (CONV, 2, 0.5)):
        state |= in_kohya(path, rank, alpha)
        wanted |= added(path, alpha / rank * product(*pair(path, rank)))
    return state, {}, wanted


def peft_settings(alphas: dict[str, float], **settings: Any) -> File:
    """A PEFT file of rank 2 whose settings give its modules these scales."""
    state, wanted = {}, {}
    for path, scale in alphas.items():
        state |= in_peft(path, 2)
        wanted |= added(path, scale * product(*pair(path, 2)))
    return state, settings, wanted


def peft_bias() -> File:
    """PEFT's lora_bias: the up matrix has a bias, scaled like the change."""
    state, bias = in_peft(TIME, 2), tensor("bias", 7)
    state[f"{peft(TIME)}.lora_B.bias"] = bias
    wanted = added(TIME, 4 * product(*pair(TIME, 2)))
    return (
        state,
        {"lora_alpha": 8},
        wanted | {f"{TIME}.bias": base(f"{TIME}.bias") + WEIGHT * 4 * bias.double()},
    )


def scalar(value: float) -> File:
    state = in_kohya(Q, 2, 1.0, scalar=torch.tensor(value))
    return state, {}, added(Q, value * 0.5 * product(*pair(Q, 2)))


def in_float8() -> File:
    state = {key: value.to(torch.float8_e4m3fn) for key, value in in_kohya(Q, 2, None).items()}
    up, down = (state[f"{kohya(Q)}.lora_{role}.weight"].double() for role in ("up", "down"))
    return state, {}, added(Q, product(up, down))


def with_strangers(**strange: Tensor) -> File:
    """A good file with other things in it, which are left out."""
    state, settings, wanted = mixed_ranks()
    return state | {name.replace("__", "."): value for name, value in strange.items()}, settings, wanted


def not_in_the_base() -> File:
    state, settings, wanted = mixed_ranks()
    ends = ("lora_up.weight", "lora_down.weight")
    return state | {f"lora_unet_down_blocks_9_x.{end}": torch.ones(2, 2) for end in ends}, settings, wanted


# ---- LoHa, LoKr --------------------------------------------------------------------------------------------


def loha(path: str, alpha: float | None, *, peft_names: bool = False) -> File:
    out, inner, *kernel = SHAPES["unet"][path]
    columns = inner * math.prod(kernel)
    a, b = (
        [tensor(f"h{n}{end}", *shape) for n in (1, 2)]
        for end, shape in (("a", (out, 2)), ("b", (2, columns)))
    )
    name = peft(path) if peft_names else kohya(path)
    state = {f"{name}.hada_w{n + 1}_{end}": half[n] for end, half in (("a", a), ("b", b)) for n in (0, 1)}
    settings = {}
    if peft_names:
        settings = {"peft_type": "LOHA", "r": 2, "alpha": alpha}
    elif alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha)
    change = product(a[0], b[0]) * product(a[1], b[1]) * (1.0 if alpha is None else alpha / 2)
    return state, settings, added(path, change)


def loha_tucker() -> File:
    a, b, t = (
        [tensor(f"t{n}{end}", *shape) for n in (1, 2)]
        for end, shape in (("a", (2, 8)), ("b", (2, 6)), ("t", (2, 2, 3, 3)))
    )
    state = {f"{kohya(CONV)}.hada_{letter}{n + 1}{end}": half[n] for letter, end, half in (("w", "_a", a), ("w", "_b", b), ("t", "", t)) for n in (0, 1)}  # fmt: skip
    halves = [torch.einsum("ijkl,jr,ip->prkl", t[n].double(), b[n].double(), a[n].double()) for n in (0, 1)]
    return state | {f"{kohya(CONV)}.alpha": torch.tensor(1.0)}, {}, added(CONV, 0.5 * halves[0] * halves[1])


def kron(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of a matrix and a matrix, or a kernel's matrices, in float64."""
    first, second = first.double(), second.double()
    blocks = torch.einsum("ab,cd...->acbd...", first, second)
    return blocks.reshape(len(first) * len(second), first.shape[1] * second.shape[1], *second.shape[2:])


def lokr(path: str, form: str, alpha: float | None = 1.0, settings: dict[str, Any] | None = None) -> File:
    """`form`: "whole", "w2" or "both" in factors, or "tucker"."""
    small, (c, d, *kernel) = {Q: ((3, 2), (4, 4)), CONV: ((2, 3), (4, 2, 3, 3))}[path]
    name = peft(path) if settings else kohya(path)
    w1, w2 = tensor("k1", *small), tensor("k2", c, d, *kernel)
    state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}
    if form in ("w2", "both"):
        a, b = tensor("k2a", c, 2), tensor("k2b", 2, d * math.prod(kernel))
        state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        w2 = product(a, b).reshape(c, d, *kernel)
    if form == "both":
        a, b = tensor("k1a", small[0], 2), tensor("k1b", 2, small[1])
        state = {f"{name}.lokr_w1_a": a, f"{name}.lokr_w1_b": b} | {
            k: v for k, v in state.items() if "w2" in k
        }
        w1 = product(a, b)
    if form == "tucker":
        a, b, t = tensor("k2a", 2, c), tensor("k2b", 2, d), tensor("k2t", 2, 2, *kernel)
        state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b, f"{name}.lokr_t2": t}
        w2 = torch.einsum("ijkl,ip,jr->prkl", t.double(), a.double(), b.double())
    scale = 1.0
    if settings:
        scale = settings["alpha"] / settings["r"]
    elif alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if form == "whole" else alpha / 2
    return state, settings or {}, added(path, scale * kron(w1, w2))


# ---- whole differences, norms ------------------------------------------------------------------------------


def whole() -> File:
    diff, bias, norm = tensor("diff", 8, 6, 3, 3), tensor("diff_b", 8), tensor("w_norm", 6)
    state = {
        f"{kohya(CONV)}.diff": diff, f"{kohya(CONV)}.diff_b": bias,
        f"{kohya(NORM)}.w_norm": norm, f"{kohya(NORM)}.b_norm": norm * 2,
    }  # fmt: skip
    wanted = added(CONV, diff.double()) | added(NORM, norm.double())
    for path, change in ((CONV, bias), (NORM, norm * 2)):
        wanted[f"{path}.bias"] = base(f"{path}.bias") + WEIGHT * change.double()
    return state, {}, wanted


def bias_alone() -> File:
    bias = tensor("b", 7)
    return (
        {f"{kohya(TIME)}.diff_b": bias},
        {},
        {f"{TIME}.bias": base(f"{TIME}.bias") + WEIGHT * bias.double()},
    )


# ---- DoRA --------------------------------------------------------------------------------------------------


def rescaled(path: str, change: Tensor, lengths: Tensor, rows: bool) -> Changed:
    """W + weight * (m (W + change) / |W + change| - W), lengths of rows or of inputs."""
    weight = base(f"{path}.weight")
    whole = weight + change.reshape(weight.shape)
    others = [axis for axis in range(weight.ndim) if axis != (0 if rows else 1)]
    norm = whole.pow(2).sum(others, keepdim=True).sqrt()
    return added(path, whole * lengths.double().reshape(norm.shape) / norm - weight)


def dora_peft(path: str, *, alpha: float = 4.0, ending: str = "") -> File:
    out, _, *kernel = SHAPES[PARTS[path]][path]
    lengths = tensor("m", *((1, out, 1, 1) if kernel else (out,))).abs() + 1
    state = in_peft(path, 2) | {f"{peft(path)}.lora_magnitude_vector{ending}": lengths}
    wanted = rescaled(path, alpha / 2 * product(*pair(path, 2)), lengths, rows=True)
    return state, {"lora_alpha": alpha, "use_dora": True}, wanted


def dora_lycoris(path: str, *, rows: bool, kind: str = "lora") -> File:
    out, inner, *kernel = SHAPES["unet"][path]
    lengths = tensor("m", *((out, 1) if rows else (1, inner)), *([1] * len(kernel))).abs() + 1
    if kind == "lora":
        state, change = in_kohya(path, 2, 1.0), 0.5 * product(*pair(path, 2))
    else:
        state, _, summed = loha(path, 1.0) if kind == "loha" else lokr(path, "w2")
        change = (summed[f"{path}.weight"] - base(f"{path}.weight")) / WEIGHT
    return state | {f"{kohya(path)}.dora_scale": lengths}, {}, rescaled(path, change, lengths, rows)


FILES: dict[str, Callable[[], File]] = {
    "kohya, no alpha": lambda: lora(Q, 4, None),
    "kohya, alpha": lambda: lora(Q, 4, 1.0),
    "kohya, text": lambda: lora(TEXT, 4, 8.0),
    "kohya, 3 x 3": lambda: lora(CONV, 3, 1.5),
    "kohya, 1 x 1": lambda: lora(POINT, 2, 1.0),
    "kohya, time embedding": lambda: lora(TIME, 2, 1.0),
    "kohya, alpha 0": lambda: lora(Q, 2, 0.0),
    "kohya, negative alpha": lambda: lora(OUT, 2, -3.0),
    "kohya, mixed ranks": mixed_ranks,
    "LoCon, Tucker": locon_tucker,
    "LyCORIS, scalar 1": lambda: scalar(1.0),
    "LyCORIS, scalar 0.25": lambda: scalar(0.25),
    "float8": in_float8,
    "PEFT, no settings": lambda: peft_settings({Q: 1, OUT: 1, CONV: 1, TEXT: 1}),
    "PEFT, lora_alpha": lambda: peft_settings({Q: 4, CONV: 4}, r=2, lora_alpha=8),
    "PEFT, by part": lambda: peft_settings(
        {Q: 3, TEXT: 0.5}, **{"unet.lora_alpha": 6, "text_encoder.lora_alpha": 1}
    ),
    "PEFT, alpha_pattern of an ending": lambda: peft_settings(
        {Q: 8, OUT: 2}, lora_alpha=4, alpha_pattern={"to_q": 16}
    ),
    "PEFT, alpha_pattern of a path": lambda: peft_settings(
        {Q: 1.5, OUT: 2}, **{"unet.lora_alpha": 4, "unet.alpha_pattern": {Q: 3}, "unet.rank_pattern": {Q: 2}}
    ),
    "PEFT, alpha_pattern of an expression": lambda: peft_settings(
        {Q: 2.5, OUT: 2.5, TIME: 0.5},
        lora_alpha=1,
        alpha_pattern={r"attn1\.to_(q|out\.\d+)": 5},
    ),
    "PEFT, alpha_pattern that is no ending": lambda: peft_settings({Q: 2}, lora_alpha=4, alpha_pattern={"o_q": 16}),
    "PEFT, rsLoRA": lambda: peft_settings({Q: 4 / math.sqrt(2), CONV: 4 / math.sqrt(2)}, lora_alpha=4, use_rslora=True),
    "PEFT, rsLoRA and alpha_pattern": lambda: peft_settings(
        {Q: 16 / math.sqrt(2), OUT: 4 / math.sqrt(2)}, lora_alpha=4, use_rslora=True, alpha_pattern={"to_q": 16}
    ),
    "PEFT, rsLoRA without alpha": lambda: peft_settings({Q: 1}, use_rslora=True),
    "PEFT, lora_bias": peft_bias,
    "DoRA, PEFT": lambda: dora_peft(Q),
    "DoRA, PEFT, 3 x 3": lambda: dora_peft(CONV),
    "DoRA, PEFT, text": lambda: dora_peft(TEXT, ending=".weight"),
    "DoRA, PEFT, adapter named": lambda: dora_peft(OUT, ending=".default.weight"),
    "DoRA, LyCORIS, of rows": lambda: dora_lycoris(Q, rows=True),
    "DoRA, LyCORIS, of inputs": lambda: dora_lycoris(Q, rows=False),
    "DoRA, LyCORIS, square": lambda: dora_lycoris(OUT, rows=False),
    "DoRA, LyCORIS, 3 x 3": lambda: dora_lycoris(CONV, rows=False),
    "DoRA, LyCORIS, 3 x 3, of rows": lambda: dora_lycoris(CONV, rows=True),
    "DoRA of a LoHa": lambda: dora_lycoris(Q, rows=True, kind="loha"),
    "DoRA of a LoKr": lambda: dora_lycoris(Q, rows=False, kind="lokr"),
    "LoHa": lambda: loha(Q, 1.0),
    "LoHa, no alpha": lambda: loha(Q, None),
    "LoHa, 3 x 3": lambda: loha(CONV, 1.0),
    "LoHa, 1 x 1": lambda: loha(POINT, 4.0),
    "LoHa, Tucker": loha_tucker,
    "LoHa, PEFT": lambda: loha(Q, 8.0, peft_names=True),
    "LoKr, whole": lambda: lokr(Q, "whole"),
    "LoKr, second factored": lambda: lokr(Q, "w2"),
    "LoKr, both factored": lambda: lokr(Q, "both"),
    "LoKr, 3 x 3, whole": lambda: lokr(CONV, "whole"),
    "LoKr, 3 x 3, factored": lambda: lokr(CONV, "w2"),
    "LoKr, 3 x 3, Tucker": lambda: lokr(CONV, "tucker"),
    "LoKr, no alpha": lambda: lokr(Q, "w2", None),
    "LoKr, PEFT, whole": lambda: lokr(Q, "whole", settings={"r": 4, "alpha": 8}),
    "LoKr, PEFT, factored": lambda: lokr(Q, "w2", settings={"r": 2, "alpha": 8}),
    "whole differences and norms": whole,
    "a bias alone": bias_alone,
    "OneTrainer, bundled embedding": lambda: with_strangers(bundle_emb__cat__string_to_param=tensor("e", 2, 8)),
    "one module of no net here": lambda: with_strangers(lora_vae_x__lora_up__weight=torch.ones(2, 2)),
    "one module that the base has not": not_in_the_base,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_file_does_what_its_formula_says(name: str) -> None:
    state, settings, wanted = FILES[name]()
    metadata = {METADATA_KEY: json.dumps(settings)} if settings else {}
    read = read_lora(state, name, metadata)
    merged = merge_loras(BASE, [(read, WEIGHT)])
    got = {key: value for tensors in merged.values() for key, value in tensors.items()}
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert relative_error(got[key], value) <= 1e-6, key
    told = len(read.notes) + len(left_out(read, BASE))
    assert told == ("bundled" in name or "one module" in name), read.notes


def test_there_are_at_least_forty() -> None:
    assert len(FILES) >= 40


def test_several_kinds_add_up_in_any_order() -> None:
    files = [FILES[name]() for name in ("DoRA, PEFT", "LoHa", "LoKr, second factored", "kohya, alpha")]
    loras = [
        (read_lora(state, metadata={METADATA_KEY: json.dumps(settings)}), WEIGHT)
        for state, settings, _ in files
    ]
    key = f"{Q}.weight"
    wanted = base(key) + sum(result[key] - base(key) for _, _, result in files)
    for order in (loras, loras[::-1]):
        assert relative_error(merge_loras(BASE, order)["unet"][key], wanted) <= 1e-6


@pytest.mark.parametrize("name", ["DoRA, PEFT", "DoRA, LyCORIS, of inputs"])
def test_a_dora_of_weight_0_leaves_the_base(name: str) -> None:
    state, settings, wanted = FILES[name]()
    read = read_lora(state, metadata={METADATA_KEY: json.dumps(settings)})
    merged = merge_loras(BASE, [(read, 0.0)])["unet"]
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(value, BASE["unet"][key]) for key, value in merged.items())


@pytest.mark.parametrize("dotted", [False, True])
def test_modules_of_the_original_code(dotted: bool) -> None:
    """input_blocks_1_1_..., as LyCORIS and ComfyUI write them, change what the canonical names change."""
    unet = UNet(UNET).state_dict()
    paths = [key.removesuffix(".weight") for key in unet if key.endswith(".weight") and unet[key].ndim > 1]
    theirs = map_to("unet", unet).back(paths).renamed
    canonical, original = {}, {}
    for path in paths:
        weight = unet[f"{path}.weight"].flatten(1)
        for role, short, value in (
            ("up", "B", torch.ones(len(weight), 1)),
            ("down", "A", torch.ones(1, *unet[f"{path}.weight"].shape[1:])),
        ):
            value = value[..., None, None] if role == "up" and unet[f"{path}.weight"].ndim == 4 else value
            canonical[f"unet.{path}.lora_{short}.weight"] = value
            name = f"lora_unet_{theirs[path].replace('.', '_')}.lora_{role}.weight"
            original[f"diffusion_model.{theirs[path]}.lora_{short}.weight" if dotted else name] = value
    assert "input_blocks" in "".join(original) and "middle_block" in "".join(original)
    one, two = (
        merge_loras({"unet": unet}, [(read_lora(state), 0.5)])["unet"] for state in (canonical, original)
    )
    assert one.keys() == two.keys() == {f"{path}.weight" for path in paths}
    assert all(torch.equal(one[key], two[key]) for key in one)
