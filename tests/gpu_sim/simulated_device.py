"""A simulated accelerator: tensors that say they are on ``gpu:0``, compute on the CPU, and reject what CUDA rejects.

``install`` registers PyTorch's device type for other accelerators under the name ``gpu``. A tensor on it is a wrapper
around a CPU tensor. Operations reach ``_run``, which

* raises ``MixedDevicesError`` where CUDA would raise for tensors on different devices,
* counts the operations at which the host would wait for the device, by the line of code that asks for them (``SYNCS``):
  every transfer in either direction, unless it is ``non_blocking``, and results whose size depends on values,
* computes on the CPU and wraps the result.

Under ``torch.autocast("gpu")`` operations are cast as CUDA's lists say, as far as a transformer uses them; a CPU's
lists differ. What is not simulated: speed, memory, kernels and their rounding, streams.

All of this can be set up once per process, and changes global state (autocast's registrations, methods of tensors).
Tests therefore use it in a process of its own (``case_server.py``).

Private parts of PyTorch are used throughout, because PyTorch has no public interface for a device written in Python.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

NAME = "gpu"
DEVICE = "gpu:0"
_MEMORY = 141_000_000_000

SYNCS: collections.Counter[str] = collections.Counter()
"""Number of times that the host waited since the counter was cleared, by ``file:line`` of the calling library code."""

aten = torch.ops.aten

_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# CUDA accepts CPU tensors next to its own here: copies, and indices.
_ACCEPT_CPU = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, *_INDEXING}
# The size of their result depends on values, so that CUDA waits for them.
_VALUE_DEPENDENT = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
# As in PyTorch's documentation of CUDA's autocast.
_HALF_OPERATIONS = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "conv2d",
    "scaled_dot_product_attention",
)  # fmt: skip
_FLOAT_OPERATIONS = (
    "layer_norm", "native_layer_norm", "group_norm", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "prod",
    "cumsum", "rsqrt", "exp", "log", "norm.Scalar", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList",
    "nll_loss",
)  # fmt: skip
_LIBRARIES = ("llavar_peft/", "transformers/", "accelerate/", "peft/", "bitsandbytes/", "torch/optim", "torch/amp")
_registered: list[torch.library.Library] = []


class MixedDevicesError(RuntimeError):
    """An operation got tensors of the simulated device and of the CPU."""


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device. ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> SimulatedTensor:
        made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(DEVICE),
            requires_grad=requires_grad,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.host})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = SimulatedTensor(self.host.detach().clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a CPU tensor, as a CUDA tensor that is loaded with ``map_location="cpu"``."""
        _count_sync()
        return self.host.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        _count_sync()
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        """Return the CPU tensor's storage, whose address and size stand for those of device memory."""
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()


def install() -> None:
    """Set the simulated device up; once per process, before transformers and accelerate are imported."""
    registration._setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())  # type: ignore[arg-type]
    _prepare_thread()
    plain = torch.Tensor.data

    def set_data(self: SimulatedTensor, value: SimulatedTensor) -> None:
        self.host = value.host
        plain.__set__(self, value)  # type: ignore[attr-defined]

    SimulatedTensor.data = property(plain.__get__, set_data)  # type: ignore[assignment,attr-defined]
    _register_autocast()
    _enter_mode_in_threads()
    # PyTorch cannot make a view of a tensor that was made in Python while inference mode is on.
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]


def _prepare_thread() -> None:
    """Let ``torch.tensor`` make a CPU tensor that a mode then moves to the device; the setting is the thread's."""
    torch._C._set_only_lift_cpu_tensors(True)


def _enter_mode_in_threads() -> None:
    """Let every thread use the device: a mode belongs to the thread that entered it."""
    run = threading.Thread.run

    def run_with_mode(self: threading.Thread) -> None:
        _prepare_thread()
        with _FactoryMode():
            run(self)

    threading.Thread.run = run_with_mode  # type: ignore[method-assign]


@contextlib.contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """Return a context in which new tensors may be put on the simulated device, and tensors moved to it and back."""
    with _FactoryMode():
        yield torch.device(DEVICE)


class _DeviceModule(registration._DummyBackendModule):
    """The functions of ``torch.cuda`` that libraries call on any accelerator's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def set_device(self, device: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    # Memory is not simulated: there is as much as on an H200, and none of it is used.

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return _MEMORY, _MEMORY

    def get_device_properties(self, device: Any = None) -> Any:
        return SimpleNamespace(name=NAME, total_memory=_MEMORY)

    def get_device_name(self, device: Any = None) -> str:
        return NAME

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"invalid fraction {fraction}")

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def max_memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_reserved(self, device: Any = None) -> int:
        return 0


class _FactoryMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU and put its result where it belongs."""
    tensors: list[Tensor] = []
    on_host = [_unwrap(one, tensors) for one in args]
    named = {name: _unwrap(one, tensors) for name, one in kwargs.items()}
    here = any(isinstance(one, SimulatedTensor) for one in tensors)
    device = kwargs.get("device")
    on_device = here if device is None else torch.device(device).type == NAME
    if not (here or on_device):
        return func(*args, **kwargs)  # under the other modes, such as that of fake tensors
    if here and func not in _ACCEPT_CPU:
        _check_devices(func, tensors)
    _count_if_host_waits(func, args, kwargs, on_device=on_device)
    if device is not None and on_device:
        named["device"] = torch.device("cpu")
    with _disable_current_modes():
        result = func(*on_host, **named)
    if func._schema.is_mutable and not func.is_view:
        return _return_arguments(func, args, kwargs, result)
    return _wrap(result) if on_device else result


def _unwrap(value: Any, tensors: list[Tensor]) -> Any:
    """Return an argument with CPU tensors in place of simulated ones, and note its tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.host if isinstance(value, SimulatedTensor) else value
    if type(value) in (list, tuple):
        return type(value)(_unwrap(one, tensors) for one in value)
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, SimulatedTensor) else SimulatedTensor(value)
    return type(value)(map(_wrap, value)) if type(value) in (list, tuple) else value


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    # A CPU tensor without dimensions counts as a number.
    others = [tuple(one.shape) for one in tensors if not isinstance(one, SimulatedTensor) and one.dim()]
    if others:
        raise MixedDevicesError(f"{func}: expected all tensors on gpu:0 (got CPU tensors of shapes {others})")


def _count_if_host_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, on_device: bool) -> None:
    if func is aten._to_copy.default:
        waits = isinstance(args[0], SimulatedTensor) != on_device and not kwargs.get("non_blocking")
    elif func is aten.copy_.default:
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        waits = isinstance(args[0], SimulatedTensor) != isinstance(args[1], SimulatedTensor) and not non_blocking
    elif func in _INDEXING and isinstance(args[0], SimulatedTensor):
        # A mask's number of elements, or the copy of an index to the device.
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        waits = any(not isinstance(index, SimulatedTensor) or index.dtype == torch.bool for index in indices)
    else:
        simulated = any(isinstance(one, SimulatedTensor) for one in args)
        waits = simulated and (func is aten._local_scalar_dense.default or func in _VALUE_DEPENDENT)
    if waits:
        _count_sync()


def _count_sync() -> None:
    """Count a transfer under the innermost line of a library, skipping PyTorch itself."""
    frame: Any = sys._getframe(1)
    place = "elsewhere"
    while frame is not None:
        file = frame.f_code.co_filename
        if any(library in file for library in _LIBRARIES):
            short = file.rpartition("site-packages/")[2].rpartition("/llavar_peft/")
            place = f"{(short[1].lstrip('/') + short[2])}:{frame.f_lineno}"
            break
        frame = frame.f_back
    SYNCS[place] += 1


def _return_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return the very arguments that an operation wrote to."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = number < len(args) and not argument.kwarg_only
            written.append(args[number] if given else kwargs.get(argument.name))
    if isinstance(result, Tensor):
        return written[0]
    if isinstance(result, tuple) and len(written) >= len(result):
        return tuple(written[: len(result)])
    return _wrap(result)


def _register_autocast() -> None:
    library = torch.library.Library("aten", "IMPL")
    for name in _HALF_OPERATIONS:
        library.impl(name, _autocast(name, lambda: torch.get_autocast_dtype(NAME)), "AutocastPrivateUse1")
    for name in _FLOAT_OPERATIONS:
        library.impl(name, _autocast(name, lambda: torch.float32), "AutocastPrivateUse1")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _registered.extend((library, fallback))  # a registration ends with its library


def _autocast(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        castable = isinstance(value, Tensor) and value.device.type == NAME and value.is_floating_point()
        return value.to(dtype()) if castable and value.dtype not in (dtype(), torch.float64) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call
