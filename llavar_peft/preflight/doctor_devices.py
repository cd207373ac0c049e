"""Checks of the compute devices: torch's build, GPUs, flash-attention and bitsandbytes."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import psutil

from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.preflight.doctor_findings import DoctorFinding, fault_finding, note_finding, ok_finding

_GIB = 2**30
_WHEELS = "see https://pytorch.org/get-started/locally for the build that fits your driver"


def check_devices() -> Iterator[DoctorFinding]:
    """Check torch, each GPU or the CPU, and the libraries of kernels."""
    try:
        import torch
    except ImportError as error:
        yield fault_finding("torch", f"cannot be imported ({error})", "pip install torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.cuda.is_available():
        yield ok_finding("torch's build", build)
        yield from _gpus()
    elif torch.backends.mps.is_available():
        yield ok_finding("torch's build", "MPS")
    elif shutil.which("nvidia-smi") and torch.version.cuda:
        yield fault_finding(
            "torch's build", f"{build}, but no GPU is usable", f"update the NVIDIA driver, or {_WHEELS}"
        )
    elif shutil.which("nvidia-smi"):
        yield fault_finding("torch's build", "is for the CPU only, but this machine has an NVIDIA driver", _WHEELS)
    else:
        yield ok_finding("torch's build", build)
        memory = psutil.virtual_memory()
        cores = usable_cores()
        yield note_finding(
            "GPU", f"none; {cores} cores, {memory.available / _GIB:.0f} of {memory.total / _GIB:.0f} GiB free",
            "use a machine with a GPU to train 7B or 13B models; this one can train a tiny model",
        )  # fmt: skip
    yield _attention(torch.cuda.is_available())
    yield _four_bits()


def _gpus() -> Iterator[DoctorFinding]:
    import torch

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            yield fault_finding(
                f"GPU {index}", f"{about.name} does not respond ({str(error).splitlines()[0]})", "restart the machine"
            )
            continue
        what = f"{about.name} ({about.major}.{about.minor}), {free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
        if about.major >= 8:
            yield ok_finding(f"GPU {index}", f"{what}, bf16")
        elif about.major == 7:
            yield ok_finding(f"GPU {index}", f"{what}, no bf16: 'auto' is fp16 with loss scaling")
        else:
            yield note_finding(f"GPU {index}", f"{what}, no bf16: 'auto' is fp32", "use a GPU with tensor cores")
        if free < total / 2:
            fix = "find the processes that use it with nvidia-smi"
            yield note_finding(f"GPU {index}", "more than half of its memory is in use", fix)


def _attention(gpu: bool) -> DoctorFinding:
    if importlib.util.find_spec("flash_attn") is None:
        if gpu:
            return note_finding(
                "flash-attn", "is not installed; torch's attention is used", "pip install 'llavar-peft[cuda]'"
            )
        return ok_finding("flash-attn", "is for GPUs only; torch's attention is used")
    try:
        import flash_attn
    except ImportError as error:
        fix = "install the wheel that matches torch and Python, or uninstall it"
        return fault_finding("flash-attn", f"cannot be imported ({error})", fix)
    return ok_finding("flash-attn", str(flash_attn.__version__))


def _four_bits() -> DoctorFinding:
    """Quantize and dequantize numbers: a library that imports may still lack kernels for this GPU."""
    import torch

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        quantized, state = quantize_4bit(numbers, quant_type="nf4")
        error = float((dequantize_4bit(quantized, state) - numbers).abs().max())
    except Exception as problem:  # noqa: BLE001 - any failure means that it is unusable
        what = f"does not work ({type(problem).__name__}: {str(problem).splitlines()[0][:120]})"
        return fault_finding(
            "4 bits", what, "run python -m bitsandbytes for details; reinstall bitsandbytes for this CUDA version"
        )
    if error > 0.2:
        return fault_finding(
            "4 bits", f"bitsandbytes gives wrong results on {device} (error {error:.2f})", "reinstall bitsandbytes"
        )
    return ok_finding("4 bits", f"bitsandbytes quantizes and dequantizes nf4 on {device}")
