"""A CUDA device that computes nothing: it counts kernels, FLOPs, copies and waits, and simulates its memory."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.fake_card.device.allocator import CachingAllocator
from tests.fake_card.device.tensor import CPU, CUDA, FakeTensor, find_tensors, to_meta

LARGEST_KERNEL = 1 << 31  # elements: many kernels count them in 32 bits
SCALAR_BYTES = 4096  # smaller copies can block: a timestep, sizes, indices of columns
CUBLAS = {"mm", "addmm", "bmm", "baddbmm"}
WORKSPACE_BYTES = 32 << 20  # allocated by torch for cuBLAS on compute capability 9.0, and never freed
PACKAGE = "linfusion_cli"
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
COPIES = {"copy_", "_to_copy"}
# Elementwise operations of normalization can mix dtypes: fp32 statistics and half-precision maps.
PROMOTING = {"addcmul", "add", "mul", "sub", "div", "lerp"}
MATRIX_OPERATIONS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm", "native_group_norm"}


@dataclass(frozen=True)
class Operation:
    """Properties of an operator, from its schema."""

    name: str
    is_kernel: bool
    is_view: bool
    written: tuple[int | str, ...]  # arguments that are written and returned
    flops: Callable | None


@cache
def describe_operation(func: Any) -> Operation:
    """Return the properties of an operator."""
    schema = func._schema
    name = schema.name.split("::")[1]
    returns_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
    is_factory = name.startswith(("empty", "new_empty")) or name in {"detach", "alias", "_unsafe_view", "lift_fresh"}
    written = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and schema.returns
    )
    is_kernel = not returns_view and not is_factory and func.namespace == "aten"
    return Operation(name, is_kernel, returns_view, written, flop_registry.get(func.overloadpacket))


@dataclass
class Counts:
    """Counts since the last reset; sites are "file:function" in the package."""

    kernels: int = 0
    flops: int = 0
    copied_bytes: int = 0  # between host and device, in blocks larger than a scalar
    weights_bytes: int = 0  # of parameters that moved between host and device
    syncs: Counter = field(default_factory=Counter)
    blocking: Counter = field(default_factory=Counter)  # copies from or to pageable or strided host memory
    mixed: Counter = field(default_factory=Counter)  # operations on several devices or dtypes
    large: Counter = field(default_factory=Counter)  # kernels with too many elements

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class FakeCard(TorchDispatchMode):
    """Runs all operations on "cuda" without values. Single values can be read only at the sites in `scalars`.

    Both kinds of allocators simulate every allocation. An allocation at the first of the sites in `fails` raises
    torch.OutOfMemoryError and removes this site from the list.
    """

    active: FakeCard | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip a slow check: nothing is compiled here."""
        return False

    def __init__(self, scalars: dict[str, Any]):
        super().__init__()
        self.scalars, self.counts = scalars, Counts()
        self.expandable, self.native = CachingAllocator(True), CachingAllocator(False)
        self.stream = "main"
        self.pinned: dict[int, int] = {}  # ranges of registered host memory: start -> end
        self.peak_pinned = 0
        self.fails: list[str] = []
        self._storages: dict[int, weakref.ref] = {}
        self._has_workspace = False

    def __enter__(self) -> FakeCard:
        FakeCard.active = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        FakeCard.active = None
        super().__exit__(*error)

    def reset(self) -> None:
        """Reset counts and peaks."""
        self.counts = Counts()
        for allocator in (self.expandable, self.native):
            allocator.reset_peaks()
        self.peak_pinned = self.pinned_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(end - begin for begin, end in self.pinned.items())

    def pin(self, address: int, size: int) -> None:
        """Register host memory as pinned."""
        self.pinned[address] = address + size
        self.peak_pinned = max(self.peak_pinned, self.pinned_bytes)

    def unpin(self, address: int) -> None:
        """Unregister pinned host memory."""
        self.pinned.pop(address, None)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether the tensor is in pinned host memory."""
        address = tensor.untyped_storage().data_ptr()
        return any(begin <= address < end for begin, end in self.pinned.items())

    def count_sync(self, operation: str) -> None:
        """Count a synchronization of host and device."""
        self.counts.syncs[f"{operation} {find_site()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        on_card = device is not None and torch.device(device).type == "cuda"
        inputs = list(find_tensors((*args, *kwargs.values())))
        if not on_card and not any(type(each) is FakeTensor for each in inputs):
            return func(*args, **kwargs)
        operation = describe_operation(func)
        if operation.name in SYNCHRONIZING:
            return self._read(operation.name, inputs)
        if operation.name in COPIES and is_transfer(operation.name, inputs, kwargs):
            return self._transfer(operation.name, inputs, func, args, kwargs)
        device = CUDA if on_card else self._find_device(operation, inputs)
        return self._run(operation, func, device, inputs, args, kwargs)

    def _run(self, operation: Operation, func, device: torch.device, inputs: list[Tensor], args, kwargs) -> Any:
        """Return the result of `func`; tensors that it writes to are returned unchanged."""
        flops = 0
        if operation.written:
            outputs = [args[key] if isinstance(key, int) else kwargs.get(key) for key in operation.written]
            result = outputs[0] if len(outputs) == 1 else tuple(outputs)
        elif operation.is_kernel:
            out, flops = SHAPES.compute(operation, func, args, kwargs)
            result = self._wrap(out, device)
        else:
            out = run_on_meta(func, args, kwargs)
            is_view = operation.is_view and isinstance(out, Tensor)
            result = FakeTensor(out, device) if is_view else self._wrap(out, device)
        if device.type == "cuda" and operation.is_kernel:
            self.counts.flops += flops
            self._count(operation, inputs, list(find_tensors([result])))
        return result

    def _wrap(self, out: Any, device: torch.device) -> Any:
        if isinstance(out, Tensor):
            if device.type == "cuda":
                self._allocate(out)
            return FakeTensor(out, device)
        if isinstance(out, (list, tuple)):
            return type(out)(self._wrap(each, device) for each in out)
        return out

    def _allocate(self, meta: Tensor) -> None:
        """Allocate the storage of `meta` in both allocators, unless it is allocated already."""
        storage = meta.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        if self.fails and find_site() == self.fails[0]:
            del self.fails[0]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate on a fake card")
        blocks = [(each, each.allocate(storage.nbytes(), self.stream)) for each in (self.expandable, self.native)]

        def release(_: object) -> None:
            del self._storages[key]
            for allocator, block in blocks:
                allocator.free(block)

        self._storages[key] = weakref.ref(storage, release)

    def _find_device(self, operation: Operation, inputs: Iterable[Tensor]) -> torch.device:
        """Return the device of an operation; operands on the CPU can be scalars of an operation on the card."""
        devices = {each.device.type for each in inputs if each.ndim or type(each) is FakeTensor}
        if len(devices) > 1 and any(each.ndim and each.device.type == "cpu" for each in inputs):
            self.counts.mixed[f"{operation.name} on {', '.join(sorted(devices))} {find_site()}"] += 1
        return CUDA if "cuda" in devices else CPU

    def _count(self, operation: Operation, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        counts = self.counts
        counts.kernels += 1
        if operation.name in CUBLAS and not self._has_workspace:
            self._has_workspace = True
            for allocator in (self.expandable, self.native):
                allocator.allocate(WORKSPACE_BYTES, self.stream)
        for each in (*inputs, *outputs):
            if each.numel() >= LARGEST_KERNEL:
                counts.large[f"{operation.name} {tuple(each.shape)} {find_site()}"] += 1
        dtypes = {each.dtype for each in inputs if each.is_floating_point() and each.ndim}
        if len(dtypes) > 1 and operation.name not in PROMOTING | COPIES:
            counts.mixed[f"{operation.name} in {', '.join(sorted(map(str, dtypes)))} {find_site()}"] += 1

    def _read(self, name: str, inputs: list[Tensor]) -> Any:
        """Return the value of a synchronizing read."""
        site = find_site()
        self.counts.syncs[f"{name} {site}"] += 1
        if name != "_local_scalar_dense" or site not in self.scalars:
            raise AssertionError(f"{name} of a tensor on the card in {site}")
        return self.scalars[site]

    def _transfer(self, name: str, inputs: list[Tensor], func, args, kwargs) -> Tensor:
        """Copy between host and device. On the host, weights are fake tensors and all others are real."""
        source = inputs[1] if name == "copy_" else inputs[0]
        to_card = (inputs[0].device if name == "copy_" else torch.device(kwargs["device"])).type == "cuda"
        target = inputs[0] if name == "copy_" else self._make_target(source, to_card, kwargs)
        if type(source if to_card else target) is FakeTensor:
            self.counts.weights_bytes += source.numel() * source.itemsize
            return target
        self._count_copy(source, target, to_card)
        if not to_card and target.dtype == torch.bool:
            target.fill_(True)  # as if all values were finite
        elif not to_card and not self.is_pinned(target):
            target.zero_()  # defined values
        return target

    def _make_target(self, source: Tensor, to_card: bool, kwargs: dict[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        meta = torch.ops.aten._to_copy(to_meta(source), dtype=dtype, memory_format=kwargs.get("memory_format"))
        if to_card:
            self._allocate(meta)
            return FakeTensor(meta, CUDA)
        if is_parameter(source):
            return FakeTensor(meta, CPU)
        return torch.empty_strided(meta.shape, meta.stride(), dtype=dtype)

    def _count_copy(self, source: Tensor, target: Tensor, to_card: bool) -> None:
        host, size = (source if to_card else target), source.numel() * source.itemsize
        self.counts.kernels += 1
        if size <= SCALAR_BYTES:
            return
        self.counts.copied_bytes += size
        kind = "" if self.is_pinned(host) else "pageable "
        kind += "" if host.is_contiguous() else "strided "
        if kind:
            self.counts.blocking[f"{kind}{'upload' if to_card else 'download'} {find_site()}"] += 1


class Shapes:
    """Cached output shapes and FLOPs of kernels, computed by torch's meta kernels, many of which are slow."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, int]] = {}

    def compute(self, operation: Operation, func, args, kwargs) -> tuple[Any, int]:
        """Return new meta tensors with the shapes of the result of `func`, and its FLOPs."""
        key = func, describe(args), describe(tuple(kwargs.items()))
        if key not in self._known:
            out = run_on_meta(func, args, kwargs)
            if operation.name == "convolution":
                out = apply_cudnn_layout(out, args)
            flops = 0
            if operation.flops is not None:
                flops = operation.flops(*map(to_meta, args), **kwargs, out_val=out)
            self._known[key] = describe(out), flops
        description, flops = self._known[key]
        return rebuild(description), flops


SHAPES = Shapes()  # shared by all cards


def run_on_meta(func, args, kwargs) -> Any:
    """Run `func` on meta tensors."""
    more = {name: to_meta(value) for name, value in kwargs.items()}
    if "device" in more:
        more["device"] = torch.device("meta")
    return func(*map(to_meta, args), **more)


@dataclass(frozen=True)
class TensorDescription:
    """Shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def describe(value: Any) -> Any:
    """Return `value` with a TensorDescription in place of each tensor, so that it is hashable."""
    if isinstance(value, Tensor):
        return TensorDescription(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(describe, value)) if isinstance(value, (list, tuple)) else value


def rebuild(value: Any) -> Any:
    """Return `value` with a new meta tensor in place of each TensorDescription."""
    if isinstance(value, TensorDescription):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return tuple(map(rebuild, value)) if isinstance(value, tuple) else value


def is_transfer(name: str, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation copies between host and device."""
    if name == "copy_":
        return inputs[0].device.type != inputs[1].device.type
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != inputs[0].device.type


def is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def apply_cudnn_layout(out: Tensor, args: Sequence[Any]) -> Tensor:
    """Return the result of a convolution, in channels-last layout if its input or its weights are."""
    image, weight = args[:2]
    last = torch.channels_last
    if image.is_contiguous(memory_format=last) or (
        weight.is_contiguous(memory_format=last) and weight.shape[2:].numel() > 1
    ):
        return torch.empty(out.shape, dtype=out.dtype, device="meta", memory_format=last)
    return out


def find_site() -> str:
    """Return the innermost running function of the package: "folder/file.py:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parts:
            relative = path.parts[path.parts.index(PACKAGE) + 1 :]
            return f"{'/'.join(relative)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"
