"""Memory that torch takes, counted tensor by tensor."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside and not yet gone."""

    bytes = 0

    def __enter__(self) -> Peak:
        self._there: dict[int, int] = {}
        return super().__enter__()  # type: ignore[no-any-return]

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in self._there:
                    self._there[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self._there.pop, storage.data_ptr(), None)
        self.bytes = max(self.bytes, sum(self._there.values()))
        return made
