"""A GPU that is not there: tensors that say they are on cuda:0 and are computed on the CPU,
to test where things lie.

Refused, as CUDA refuses them: tensors of both devices in one call (a number on the CPU may meet a tensor on
the GPU, indices may lie on the CPU, `copy_` may cross), `numpy()`, a generator of the other device, an
operator without a CUDA kernel. `tensor.device`, autocast, GradScaler and fused Adam go the way that they go
on CUDA, with real values and with the backward pass. With `memory` given, torch.OutOfMemoryError comes where
the tensors alive exceed that many bytes. Not seen: times, workspaces, the rounding of other algorithms, NCCL,
other threads and processes, and what happens inside of one call of torch.

    with pretend_cuda(memory=12 * 2**30) as gpu:
        load_edit_pipeline("mini", device="cuda", dtype=torch.float16)(...)
    gpu.memory.peak, gpu.crossings

The tests marked `cuda` run on it by `python -m pytest -p tests.helpers.pretend_cuda -m "cuda and not full"`.
"""

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOTAL_MEMORY = 141 * 10**9  # bytes that a GPU without a limit says it has

# What a tensor of the GPU says of itself.
_SAYS = {"device": GPU, "is_cuda": True, "is_cpu": False}
# Calls that take a tensor from one device to the other.
_MOVE = ("to", "cpu", "cuda", "copy_", "as_tensor", "tensor", "type_as")
# Calls in which tensors of both devices may meet.
_FREE = (*_MOVE, "__set__", "__get__", "_has_compatible_shallow_copy_type")
# Calls whose result the CPU waits for.
_WAIT = ("item", "tolist", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__", "bincount")
_WAIT = (*_WAIT, "masked_select")
# Calls that refuse even a number on the CPU beside a tensor on the GPU.
_STRICT = ("cat", "stack", "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "conv2d", "embedding")
_STRICT = (*_STRICT, "index_select", "gather")
# Where an operator's kernel may be registered for CUDA to have it.
_COMPOSITE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_KERNELS = ("CUDA", *_COMPOSITE, "CompositeImplicitAutograd")


class OnGPU(Tensor):
    """A tensor on the CPU (`held`) that says it is on cuda:0."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), **like, device=GPU)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU came past the mode, or outlived it")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = OnGPU(self.held.detach().clone().requires_grad_(self.held.requires_grad))
        # What makes a tensor a parameter lies in its __dict__.
        vars(copied).update({name: value for name, value in vars(self).items() if name != "held"})
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file of it loads on the CPU."""
        return self.held.__reduce_ex__(protocol)


class _Memory(TorchDispatchMode):
    """Below torch's functions: which operators the GPU carries out, and the bytes of what they give.

    `limit` bytes may be alive (None: any number); `live` are, and `peak` were at most.
    """

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit, self.live, self.peak = limit, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _has_kernel(func.name()):
            raise NotImplementedError(f"{func.name()} has no CUDA kernel")
        return _changed(func(*args, **(kwargs or {})), Tensor, self.hold)

    def hold(self, tensor: Tensor) -> Tensor:
        """`tensor`, whose storage counts from now on until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known and tensor.device == CPU:
            if self.limit is not None and self.live + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory (pretended): {size:,} bytes beside {self.live:,}"
                )
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known.add(key)
            weakref.finalize(storage, self._free, key, size)
        return tensor

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.remove(key)


@functools.cache
def _has_kernel(name: str) -> bool:
    """Whether CUDA has a kernel of an operator, or is never asked for it."""
    if not name.startswith("aten::") or "cpu" in name or "mkldnn" in name:
        return True
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _KERNELS)


def _changed(value: Any, kinds: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` done to what it has of `kinds`, in containers too. It is done at every operation,
    and torch's own for this takes three times as long.
    """
    if isinstance(value, kinds):
        return change(value)
    if type(value) is dict:
        return {key: _changed(item, kinds, change) for key, item in value.items()}
    if not isinstance(value, (tuple, list)) or isinstance(value, torch.Size):
        return value
    made = [_changed(item, kinds, change) for item in value]
    return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)


class PretendedGPU(TorchFunctionMode):
    """The mode behind `pretend_cuda`, and what it counted.

    `memory.peak` is the most bytes that were alive at once; `crossings` says how often what call crossed the
    bus, or made the CPU wait, and from which line: {(call, "file:line"): times}.
    """

    def __init__(self, memory: int | None) -> None:
        super().__init__()
        self.memory, self.crossings = _Memory(memory), Counter[tuple[str, str]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" and isinstance(args[0], OnGPU) and func.__self__.__name__ in _SAYS:
            return _SAYS[func.__self__.__name__]
        tensors: list[Tensor] = []
        _changed((args, kwargs), Tensor, tensors.append)
        ours = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
        there = _result_on_gpu(name, args, kwargs, bool(ours))
        if not ours and not there:
            return func(*args, **kwargs)
        if name in ("numpy", "__array__"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first."
            )
        generator = kwargs.get("generator")
        if generator is not None and there != (generator.device.type == "cuda"):
            raise RuntimeError(
                f"Expected a 'cuda' device type for generator but found {generator.device} ({name})"
            )
        if ours and name not in _FREE:
            _refuse_strangers(name, args, tensors)
        crosses = name in _MOVE and isinstance(args[1] if name == "copy_" else args[0], OnGPU) != there
        if crosses or (ours and name in _WAIT):
            self.crossings[name + ", to GPU" * (crosses and there), _caller()] += 1
        args, kwargs = _changed((args, kwargs), (slice, OnGPU, torch.device, str), _on_cpu)
        func, args = (Tensor.cpu, args[:1]) if func is Tensor.cuda else (func, args)
        # CUDA's autocast widens the norms; the CPU's, which runs in its place, does not.
        if func in (F.group_norm, F.layer_norm) and torch.is_autocast_enabled("cpu"):
            args, kwargs = _changed((args, kwargs), Tensor, Tensor.float)
        with self.memory:
            result = func(*args, **kwargs)
            held = (*tensors, *(tensor.held for tensor in ours.values()))
            if crosses and name != "copy_" and any(result is tensor for tensor in held):
                result = result.clone()
        if not there:
            return result

        def wrap(tensor: Tensor) -> Tensor:
            return ours[id(tensor)] if id(tensor) in ours else OnGPU(self.memory.hold(tensor))

        return _changed(result, Tensor, wrap)


def _caller() -> str:
    """The nearest line outside of torch and of this file, as "file:line"."""
    frame: Any = sys._getframe(1)
    while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _on_cpu(value: Any) -> Any:
    """The CPU's tensor, device or word for the GPU's."""
    if isinstance(value, slice):
        ends = (value.start, value.stop, value.step)
        return slice(*(int(end.held) if isinstance(end, OnGPU) else end for end in ends))
    if isinstance(value, OnGPU):
        return value.held
    return type(value)("cpu") if str(value).startswith("cuda") else value


def _result_on_gpu(name: str, args: Any, kwargs: Any, given: bool) -> bool:
    """Whether a call's result lies on the GPU; `given` says that a tensor among its arguments does."""
    if name in ("cuda", "cpu", "copy_"):
        return name == "cuda" or (name == "copy_" and isinstance(args[0], OnGPU))
    named = [*args[1:], kwargs.get("other")] if name in ("to", "type_as") else []
    if other := [isinstance(value, OnGPU) for value in named if isinstance(value, Tensor)]:
        return other[0]
    asked = kwargs.get("device") or next(
        (value for value in named if isinstance(value, (str, torch.device))), None
    )
    return given if asked is None else torch.device(asked).type == "cuda"


def _refuse_strangers(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError where CUDA would refuse these tensors together."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
    if name in ("__getitem__", "__setitem__", "index_put_") and isinstance(args[0], OnGPU):
        # Indices may lie anywhere; what is written may not.
        written = [tensor for tensor in args[2:] if isinstance(tensor, Tensor)]
        strangers = [tensor for tensor in written if not isinstance(tensor, OnGPU)]
    in_place = name.endswith("_") and not name.endswith("__") and strangers and strangers[0] is args[0]
    if any(tensor.dim() or in_place or name in _STRICT for tensor in strangers):
        met = ", ".join(
            f"{tuple(t.shape)} on the {'GPU' if isinstance(t, OnGPU) else 'CPU'}" for t in tensors
        )
        raise RuntimeError(f"Expected all tensors to be on the same device ({name}: {met})")


@contextmanager
def pretend_cuda(memory: int | None = None) -> Iterator[PretendedGPU]:
    """Within it torch has one GPU, of `memory` bytes (None: without an end, though it says 141 GB)."""
    gpu, total = PretendedGPU(memory), memory or TOTAL_MEMORY
    known: dict[str, Any] = {"is_available": True, "device_count": 1, "current_device": 0}
    known |= {"is_bf16_supported": True, "get_device_name": "a pretended GPU"}
    without_result = ("_lazy_init", "empty_cache", "synchronize", "set_device", "reset_peak_memory_stats")
    known |= dict.fromkeys((*without_result, "is_current_stream_capturing"))
    asked: dict[str, Any] = {name: lambda *_, value=value, **__: value for name, value in known.items()}
    asked |= {name: lambda *_: gpu.memory.live for name in ("memory_allocated", "memory_reserved")}
    asked |= {"mem_get_info": lambda *_: (total - gpu.memory.live, total)}
    asked |= {"max_memory_allocated": lambda *_: gpu.memory.peak}
    enter = torch.autocast.__init__

    def autocast(self: Any, kind: str, *args: Any, **kwargs: Any) -> None:
        enter(self, kind.replace("cuda", "cpu"), *args, **kwargs)

    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensor does where there is no driver
    swap = torch.__future__
    before = swap.get_swap_module_params_on_conversion()
    swap.set_swap_module_params_on_conversion(True)  # so that Module.to() takes a subclass
    try:
        with (
            patch.multiple(torch.cuda, **asked),
            patch.object(torch.autocast, "__init__", autocast),
            patch.object(Tensor, "pin_memory", lambda self, *_: self),
            gpu,
        ):
            yield gpu
    finally:
        swap.set_swap_module_params_on_conversion(before)


_SESSION: list[Any] = []


def pytest_collection(session: Any) -> None:
    """As a pytest plugin: the GPU is there before conftest.py asks for one."""
    _SESSION.append(pretend_cuda())
    _SESSION[-1].__enter__()


def pytest_sessionfinish(session: Any) -> None:
    """As a pytest plugin: the GPU goes."""
    _SESSION.pop().__exit__(None, None, None)
