"""The official weights that ncnn's files hold, in our RRDBNet and in spandrel's."""

import numpy as np
import pytest
import torch
from PIL import Image

from nets.rrdb import RRDBConfig, RRDBNet
from tests.helpers.goldens import GOLDEN, relative_error
from tests.helpers.ncnn_files import REAL, installed
from weights.ncnn import read_ncnn

spandrel = pytest.importorskip("spandrel")


@pytest.mark.parametrize("case", REAL)
def test_the_official_weights_equal_spandrels(case: str) -> None:
    param = installed(*REAL[case]) or pytest.skip(f"no {REAL[case][0]} installed")
    state = read_ncnn(param)
    oracle = spandrel.ModelLoader().load_from_state_dict(dict(state))  # renames what it loads
    assert (oracle.architecture.id, oracle.scale) == ("ESRGAN", 4)
    with torch.device("meta"):
        net = RRDBNet(RRDBConfig(num_block=(len(state) // 2 - 6) // 15))
    net.load_state_dict(state, strict=True, assign=True)
    picture = Image.open(GOLDEN.parents[1] / "examples" / "chelsea.jpg").convert("RGB")
    crop = torch.from_numpy(np.asarray(picture.crop((112, 84, 144, 116))).copy())
    x = crop.permute(2, 0, 1)[None] / 255
    assert relative_error(net(x), oracle.model.eval()(x)) <= 1e-5
