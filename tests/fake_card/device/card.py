"""A CUDA device that computes nothing: it counts what a real one would be asked to do, and what memory that takes."""

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
from tests.fake_card.device.tensor import CPU, CUDA, FakeTensor, tensors_in, to_meta

LARGEST_KERNEL = 1 << 31  # elements: many kernels count them in 32 bits
SCALAR_BYTES = 4096  # copies up to this size may block: a timestep, sizes, indices of columns
CUBLAS = {"mm", "addmm", "bmm", "baddbmm"}
WORKSPACE_BYTES = 32 << 20  # that torch gives cuBLAS on a card of compute capability 9.0, and never takes back
PACKAGE = "linfusion_cli"
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
COPIES = {"copy_", "_to_copy"}
# Floating dtypes may differ in the elementwise operations that normalise: fp32 statistics, half-precision maps.
PROMOTING = {"addcmul", "add", "mul", "sub", "div", "lerp"}
MATRIX_OPERATIONS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm", "native_group_norm"}


@dataclass(frozen=True)
class Operation:
    """What is known of an operator from its schema: whether it is a kernel, and which arguments it returns."""

    name: str
    is_kernel: bool
    is_view: bool
    written: tuple[int | str, ...]  # arguments that it writes to and returns
    flops: Callable | None


@cache
def operation_of(func: Any) -> Operation:
    schema = func._schema
    name = schema.name.split("::")[1]
    returns_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
    makes = name.startswith(("empty", "new_empty")) or name in {"detach", "alias", "_unsafe_view", "lift_fresh"}
    written = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and schema.returns
    )
    is_kernel = not returns_view and not makes and func.namespace == "aten"
    return Operation(name, is_kernel, returns_view, written, flop_registry.get(func.overloadpacket))


@dataclass
class Counts:
    """What the card was asked to do since the counts were reset; sites are "file:function" in the package."""

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
    """Runs all operations on "cuda" without numbers. `scalars` are the only reads of single values that are allowed.

    Both kinds of allocators see every allocation. An allocation at the
    first of the sites in `fails` raises torch.OutOfMemoryError, which takes that site off the list.
    """

    present: FakeCard | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to say so in each call takes time."""
        return False

    def __init__(self, scalars: dict[str, Any]):
        super().__init__()
        self.scalars, self.counts = scalars, Counts()
        self.expandable, self.native = CachingAllocator(True), CachingAllocator(False)
        self.stream = "main"
        self.pinned: dict[int, int] = {}  # ranges of registered host memory: begin -> end
        self.peak_pinned = 0
        self.fails: list[str] = []
        self._storages: dict[int, weakref.ref] = {}
        self._has_workspace = False

    def __enter__(self) -> FakeCard:
        FakeCard.present = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        FakeCard.present = None
        super().__exit__(*error)

    def reset(self) -> None:
        """Count from here on."""
        self.counts = Counts()
        for allocator in (self.expandable, self.native):
            allocator.reset_peaks()
        self.peak_pinned = self.pinned_bytes

    @property
    def pinned_bytes(self) -> int:
        return sum(end - begin for begin, end in self.pinned.items())

    def pin(self, address: int, size: int) -> None:
        self.pinned[address] = address + size
        self.peak_pinned = max(self.peak_pinned, self.pinned_bytes)

    def unpin(self, address: int) -> None:
        self.pinned.pop(address, None)

    def is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(begin <= address < end for begin, end in self.pinned.items())

    def synced(self, what: str) -> None:
        self.counts.syncs[f"{what} {site()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        on_card = device is not None and torch.device(device).type == "cuda"
        inputs = list(tensors_in((*args, *kwargs.values())))
        if not on_card and not any(type(each) is FakeTensor for each in inputs):
            return func(*args, **kwargs)
        operation = operation_of(func)
        if operation.name in SYNCHRONIZING:
            return self._read(operation.name, inputs)
        if operation.name in COPIES and is_transfer(operation.name, inputs, kwargs):
            return self._transfer(operation.name, inputs, func, args, kwargs)
        device = CUDA if on_card else self._device_of(operation, inputs)
        return self._run(operation, func, device, inputs, args, kwargs)

    def _run(self, operation: Operation, func, device: torch.device, inputs: list[Tensor], args, kwargs) -> Any:
        """What `func` gives: tensors that it writes to are returned as they were given."""
        flops = 0
        if operation.written:
            found = [args[key] if isinstance(key, int) else kwargs.get(key) for key in operation.written]
            result = found[0] if len(found) == 1 else tuple(found)
        elif operation.is_kernel:
            made, flops = SHAPES.result_of(operation, func, args, kwargs)
            result = self._wrapped(made, device)
        else:
            made = computed(func, args, kwargs)
            result = (
                FakeTensor(made, device)
                if operation.is_view and isinstance(made, Tensor)
                else self._wrapped(made, device)
            )
        if device.type == "cuda" and operation.is_kernel:
            self.counts.flops += flops
            self._count(operation, inputs, list(tensors_in([result])))
        return result

    def _wrapped(self, out: Any, device: torch.device) -> Any:
        if isinstance(out, Tensor):
            if device.type == "cuda":
                self._allocated(out)
            return FakeTensor(out, device)
        if isinstance(out, (list, tuple)):
            return type(out)(self._wrapped(each, device) for each in out)
        return out

    def _allocated(self, meta: Tensor) -> None:
        """Let both allocators see the storage of `meta`, unless it is there already."""
        storage = meta.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        if self.fails and site() == self.fails[0]:
            del self.fails[0]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate on a fake card")
        blocks = [(each, each.allocate(storage.nbytes(), self.stream)) for each in (self.expandable, self.native)]

        def forget(_: object) -> None:
            del self._storages[key]
            for allocator, block in blocks:
                allocator.free(block)

        self._storages[key] = weakref.ref(storage, forget)

    def _device_of(self, operation: Operation, inputs: Iterable[Tensor]) -> torch.device:
        """Where the operation runs: single numbers on the CPU may take part in one on the card."""
        devices = {each.device.type for each in inputs if each.ndim or type(each) is FakeTensor}
        if len(devices) > 1 and any(each.ndim and each.device.type == "cpu" for each in inputs):
            self.counts.mixed[f"{operation.name} on {', '.join(sorted(devices))} {site()}"] += 1
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
                counts.large[f"{operation.name} {tuple(each.shape)} {site()}"] += 1
        dtypes = {each.dtype for each in inputs if each.is_floating_point() and each.ndim}
        if len(dtypes) > 1 and operation.name not in PROMOTING | COPIES:
            counts.mixed[f"{operation.name} in {', '.join(sorted(map(str, dtypes)))} {site()}"] += 1

    def _read(self, name: str, inputs: list[Tensor]) -> Any:
        """A value that the host waits for."""
        where = site()
        self.counts.syncs[f"{name} {where}"] += 1
        if name != "_local_scalar_dense" or where not in self.scalars:
            raise AssertionError(f"{name} of a tensor on the card in {where}")
        return self.scalars[where]

    def _transfer(self, name: str, inputs: list[Tensor], func, args, kwargs) -> Tensor:
        """A copy between host and device. Weights are fake on the host too; all else is real there."""
        source = inputs[1] if name == "copy_" else inputs[0]
        to_card = (inputs[0].device if name == "copy_" else torch.device(kwargs["device"])).type == "cuda"
        target = inputs[0] if name == "copy_" else self._transferred(source, to_card, kwargs)
        if type(source if to_card else target) is FakeTensor:
            self.counts.weights_bytes += source.numel() * source.itemsize
            return target
        self._count_copy(source, target, to_card)
        if not to_card and target.dtype == torch.bool:
            target.fill_(True)  # all is finite
        elif not to_card and not self.is_pinned(target):
            target.zero_()  # there must be numbers
        return target

    def _transferred(self, source: Tensor, to_card: bool, kwargs: dict[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        meta = torch.ops.aten._to_copy(to_meta(source), dtype=dtype, memory_format=kwargs.get("memory_format"))
        if to_card:
            self._allocated(meta)
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
            self.counts.blocking[f"{kind}{'upload' if to_card else 'download'} {site()}"] += 1


class Shapes:
    """What kernels make of given shapes, computed once by torch's own meta kernels, many of which are slow."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, int]] = {}

    def result_of(self, operation: Operation, func, args, kwargs) -> tuple[Any, int]:
        """New meta tensors as `func` gives them, and its FLOPs."""
        key = func, described(args), described(tuple(kwargs.items()))
        if key not in self._known:
            out = computed(func, args, kwargs)
            if operation.name == "convolution":
                out = as_laid_out_by_cudnn(out, args)
            flops = 0
            if operation.flops is not None:
                flops = operation.flops(*map(to_meta, args), **kwargs, out_val=out)
            self._known[key] = described(out), flops
        made, flops = self._known[key]
        return renewed(made), flops


SHAPES = Shapes()  # of all cards


def computed(func, args, kwargs) -> Any:
    """`func` on meta tensors."""
    more = {name: to_meta(value) for name, value in kwargs.items()}
    if "device" in more:
        more["device"] = torch.device("meta")
    return func(*map(to_meta, args), **more)


@dataclass(frozen=True)
class Described:
    """What a new tensor is made from."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def described(value: Any) -> Any:
    """`value`, hashable, with a Described in the place of each tensor."""
    if isinstance(value, Tensor):
        return Described(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(described, value)) if isinstance(value, (list, tuple)) else value


def renewed(value: Any) -> Any:
    """The opposite of `described`: new meta tensors."""
    if isinstance(value, Described):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return tuple(map(renewed, value)) if isinstance(value, tuple) else value


def is_transfer(name: str, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether a copy is one between host and device."""
    if name == "copy_":
        return inputs[0].device.type != inputs[1].device.type
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != inputs[0].device.type


def is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def as_laid_out_by_cudnn(out: Tensor, args: Sequence[Any]) -> Tensor:
    """A convolution's result in channels-last, where its input or its weights are."""
    image, weight = args[:2]
    last = torch.channels_last
    if image.is_contiguous(memory_format=last) or (
        weight.is_contiguous(memory_format=last) and weight.shape[2:].numel() > 1
    ):
        return torch.empty(out.shape, dtype=out.dtype, device="meta", memory_format=last)
    return out


def site() -> str:
    """The innermost function of the package that is running: "folder/file.py:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parts:
            inside = path.parts[path.parts.index(PACKAGE) + 1 :]
            return f"{'/'.join(inside)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"
