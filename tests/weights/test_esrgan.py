"""weights/esrgan.py: both older namings, of any number of blocks, there and back."""

import pytest
import torch

from nets.rrdb import RRDBConfig, RRDBNet
from tests.helpers.goldens import read_shapes
from weights.esrgan import esrgan_map

# One key of each kind, as the published files have them (ESRGAN x 4: 23 blocks).
FIRST = {
    "model.0.weight": "conv_first.weight",
    "model.1.sub.0.RDB1.conv1.0.weight": "body.0.rdb1.conv1.weight",
    "model.1.sub.22.RDB3.conv5.0.bias": "body.22.rdb3.conv5.bias",
    "model.1.sub.23.weight": "conv_body.weight",
    "model.3.bias": "conv_up1.bias",
    "model.6.weight": "conv_up2.weight",
    "model.8.weight": "conv_hr.weight",
    "model.10.bias": "conv_last.bias",
}
SECOND = {
    "conv_first.weight": "conv_first.weight",
    "RRDB_trunk.0.RDB1.conv1.weight": "body.0.rdb1.conv1.weight",
    "RRDB_trunk.22.RDB3.conv5.bias": "body.22.rdb3.conv5.bias",
    "trunk_conv.weight": "conv_body.weight",
    "upconv1.bias": "conv_up1.bias",
    "upconv2.weight": "conv_up2.weight",
    "HRconv.weight": "conv_hr.weight",
    "conv_last.bias": "conv_last.bias",
}
MARKS = {"first": "model.1.sub.{}.RDB1.conv1.0.weight", "second": "RRDB_trunk.{}.RDB1.conv1.weight"}


def marks(naming: str, blocks: int) -> list[str]:
    return [MARKS[naming].format(number) for number in range(blocks)]


@pytest.mark.parametrize(("naming", "names"), [("first", FIRST), ("second", SECOND)])
def test_the_published_names(naming: str, names: dict[str, str]) -> None:
    known = esrgan_map([*marks(naming, 23), *names])
    assert known and known.there(names).renamed == names
    assert known.back(names.values()).renamed == {new: old for old, new in names.items()}


@pytest.mark.parametrize("naming", MARKS)
def test_every_tensor_of_the_official_net_has_a_name(naming: str) -> None:
    keys = read_shapes("rrdbnet_x4plus")
    known = esrgan_map(marks(naming, 23))
    assert known
    old = known.back(keys)
    assert len(old.renamed) == 702 and not old.unknown
    again = esrgan_map(old.renamed.values())
    assert again and again.pairs == known.pairs
    assert again.there(old.renamed.values()).renamed == {theirs: ours for ours, theirs in old.renamed.items()}


@pytest.mark.parametrize("naming", MARKS)
@pytest.mark.parametrize("blocks", [1, 6, 11])
def test_any_number_of_blocks(naming: str, blocks: int) -> None:
    with torch.device("meta"):
        keys = RRDBNet(RRDBConfig(num_feat=4, num_block=blocks, num_grow_ch=2)).state_dict()
    known = esrgan_map(marks(naming, blocks))
    assert known and not known.back(keys).unknown
    assert known.back(["body.0.rdb1.conv1.bias"]).renamed.keys() == {"body.0.rdb1.conv1.bias"}
    assert known.back([f"body.{blocks}.rdb1.conv1.bias"]).unknown


def test_todays_names_and_other_nets_need_no_map() -> None:
    for keys in (["body.0.rdb1.conv1.weight", "conv_first.weight"], ["model.1.sub.weight"], ["RRDB_trunk.1.RDB1.x"], []):  # fmt: skip
        assert esrgan_map(iter(keys)) is None
