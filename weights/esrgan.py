"""The older names of ESRGAN's generator: of its first code (numbers of a Sequential), and of its second
(RRDB_trunk, HRconv).

Paper    Wang et al. 2018, arXiv:1809.00219, and its published models; today's names are basicsr's, as
         Real-ESRGAN's files have them
Copying  this file and keymap.py; standard library
"""

from collections.abc import Iterable

from .keymap import KeyMap, count, expand

# (older, basicsr); block i of n, dense block k, convolution c
_FIRST_ENDS = (
    ("model.0", "conv_first"),
    ("model.1.sub.{n}", "conv_body"),  # the trunk's last convolution is counted like one more block
    ("model.3", "conv_up1"),
    ("model.6", "conv_up2"),
    ("model.8", "conv_hr"),
    ("model.10", "conv_last"),
)
_FIRST_BLOCKS = (("model.1.sub.{i}.RDB{k}.conv{c}.0", "body.{i}.rdb{k}.conv{c}"),)
_SECOND_ENDS = (
    ("conv_first", "conv_first"),
    ("trunk_conv", "conv_body"),
    ("upconv1", "conv_up1"),
    ("upconv2", "conv_up2"),
    ("HRconv", "conv_hr"),
    ("conv_last", "conv_last"),
)
_SECOND_BLOCKS = (("RRDB_trunk.{i}.RDB{k}.conv{c}", "body.{i}.rdb{k}.conv{c}"),)


def esrgan_map(keys: Iterable[str]) -> KeyMap | None:
    """The map to today's names for a generator with these keys; None where they are today's, or no ESRGAN's.

    Only the x 4 models had the first names in this order; of others the map leaves keys unknown.
    """
    keys = list(keys)
    for ends, blocks, mark in (
        (_FIRST_ENDS, _FIRST_BLOCKS, "model.1.sub.{}.RDB1."),
        (_SECOND_ENDS, _SECOND_BLOCKS, "RRDB_trunk.{}.RDB1."),
    ):
        if number := count(keys, mark):
            places = [
                {"i": i, "k": k, "c": c} for i in range(number) for k in range(1, 4) for c in range(1, 6)
            ]
            return KeyMap((*expand(ends, [{"n": number}]), *expand(blocks, places)))
    return None
