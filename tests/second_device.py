"""A second device made of CPU memory, for tests of code that should run on any.

Tensors there say that they are on ``second:0``. Their operations are done by the CPU, but an operation that mixes them
with CPU tensors fails as it does between a CPU and a GPU: code that builds an index, a constant or a buffer on the
wrong device is found without a GPU. It says nothing of speed, nor of compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXED = (torch.ops.aten.index.Tensor,)  # CPU indices into a tensor elsewhere are allowed
_INDEXED_PUT = (torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Elsewhere(Tensor):
    """A tensor of the second device; ``inner`` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        """Wrap a CPU tensor."""
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        wrapper.inner = inner
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Values and device."""
        return f"Elsewhere({self.inner!r})"

    def tolist(self) -> Any:
        """Values, as of any tensor."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation that such a tensor takes part in."""
        return _run(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While this is entered, tensors can be made on and moved to ``second``."""

    registered = False

    def __enter__(self) -> SecondDevice:
        """Register the device, once a process."""
        if not SecondDevice.registered:
            _setup_privateuseone_for_python_backend(NAME)
            SecondDevice.registered = True
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave everything as it was."""
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten._has_compatible_shallow_copy_type.default:  # asked when a module's weights move
        return False
    here: list[Tensor] = []
    away: list[Elsewhere] = []
    asked: list[torch.device] = []

    def inside(x: Any) -> Any:
        """The same argument on the CPU."""
        if isinstance(x, Elsewhere):
            away.append(x)
            return x.inner
        if isinstance(x, Tensor):
            if x.dim() > 0:
                here.append(x)
            return x
        if isinstance(x, torch.device):
            asked.append(x)
            return torch.device("cpu")
        if isinstance(x, (list, tuple)):
            return type(x)([inside(y) for y in x])
        return x

    inner_args = [inside(x) for x in args]
    inner_kwargs = {name: inside(x) for name, x in kwargs.items()}
    if func in _INDEXED:
        mixed = bool(away) and not isinstance(args[0], Elsewhere)
    elif func in _INDEXED_PUT:
        mixed = bool(away) and any(not isinstance(x, Elsewhere) and x.dim() > 0 for x in (args[0], args[2]))
    else:
        mixed = bool(away and here) and func not in _COPIES
    if mixed:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {shapes} on the CPU")
    found = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    to_second = asked[0].type == NAME if asked else bool(away)
    known = {id(x.inner): x for x in away}

    def outside(x: Any) -> Any:
        """The same result where it belongs; an argument changed in place is that argument."""
        if isinstance(x, Tensor):
            if to_second:
                return known[id(x)] if id(x) in known else Elsewhere(x)
            return x.clone() if id(x) in known else x
        return type(x)([outside(y) for y in x]) if isinstance(x, (list, tuple)) else x

    return outside(found)
