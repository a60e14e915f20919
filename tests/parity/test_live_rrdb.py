"""RRDBNet beside spandrel's: it must recognise our keys as an official file's, and compute the same."""

import pytest

from nets.rrdb import RRDBConfig, RRDBNet
from tests.helpers.goldens import relative_error
from tests.helpers.places import Place
from tests.helpers.seeded_weights import load_seeded, seeded_input

spandrel = pytest.importorskip("spandrel")


@pytest.mark.parametrize(
    ("scale", "size"), [(4, (12, 16)), (4, (13, 7)), (4, (1, 1)), (2, (6, 10)), (1, (4, 12))]
)
def test_rrdb_equals_spandrel(scale: int, size: tuple[int, int], place: Place) -> None:
    """Other way round than its neighbours: spandrel renames what it loads. It knows num_grow_ch 32 alone."""
    net = RRDBNet(RRDBConfig(scale=scale, num_feat=16, num_block=2)).eval()
    load_seeded(net, seed=51)
    oracle = spandrel.ModelLoader().load_from_state_dict({"params_ema": net.state_dict()})
    assert (oracle.architecture.id, oracle.scale) == ("ESRGAN", scale)
    assert (oracle.input_channels, oracle.output_channels) == (3, 3)
    x = seeded_input("live.x", (2, 3, *size), seed=52, scale=0.3, shift=0.5).to(place.oracle)
    expected = oracle.model.to(place.oracle)(x)
    out = net.to(place.device, place.dtype)(x.to(place.device, place.dtype))
    assert relative_error(out, expected) <= place.tolerance
