"""libvips, imported when a file needs it.

Copying  this file stands alone: pyvips
"""

import logging
import os
from typing import Any

_process: int | None = None  # that which uses it


def vips() -> Any:
    """The module pyvips.

    ImportError where it is missing, and in a process that was forked from one which has used it: there
    libvips, whose threads are not forked, hangs at times.
    """
    global _process
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise ImportError(
            "pictures of more than 8 bits, TIFF, AVIF and profiles with tables are read by libvips, which is missing: "
            f"pip install 'pyvips[binary]'; or save the picture as a PNG or JPEG of 8 bits in sRGB ({error})"
        ) from error
    if _process is None:
        _process = os.getpid()
        pyvips.cache_set_max(0)  # a picture is read once
        logging.getLogger("pyvips").setLevel(logging.CRITICAL)
    elif _process != os.getpid():
        raise ImportError(
            "libvips was used before this process was forked, and would hang here; start workers by spawn "
            '(DataLoader: multiprocessing_context="spawn")'
        )
    # What an earlier file left: pyvips fails, at any later call, over text that is not UTF-8.
    pyvips.vips_lib.vips_error_clear()
    return pyvips
