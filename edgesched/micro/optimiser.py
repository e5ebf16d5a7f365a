"""The optimiser of the micro family: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside a network and AdamW for the rest, stepped as one.

    A convolution's weight counts as a matrix of one row an output channel.

    Args:
        matrices: Parameters of two or more dimensions for Muon.
        others: Parameters for AdamW.
        lr: Learning rate of AdamW.
        matrix_lr: Learning rate of Muon, on the scale of AdamW's.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        lr: float,
        matrix_lr: float,
        weight_decay: float = 1e-3,
    ) -> None:
        groups = [{"params": list(others), "lr": lr}]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(list(others), lr=lr, weight_decay=weight_decay)]
        self.matrices = list(matrices)
        # The same memory as the parameters, so that Muon's step in place is theirs.
        self.views = [self._as_matrix(p.detach(), p).requires_grad_() for p in matrices]
        assert all(view.data_ptr() == p.data_ptr() for view, p in zip(self.views, self.matrices, strict=True))
        if matrices:
            groups.append({"params": self.matrices, "lr": matrix_lr})
            muon = torch.optim.Muon(self.views, lr=matrix_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        super().__init__(groups, {})

    @staticmethod
    def _as_matrix(value: Tensor, weight: Tensor) -> Tensor:
        """``value`` (the weight or its gradient) with one row an output channel, columns in the weight's order."""
        if weight.ndim == 4 and not weight.is_contiguous():  # channels-last
            value = value.permute(0, 2, 3, 1)
        return value.reshape(len(value), -1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for view, matrix in zip(self.views, self.matrices, strict=True):
            view.grad = None if matrix.grad is None else self._as_matrix(matrix.grad, matrix)
        for group, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of the groups and of both optimisers."""
        return {"groups": super().state_dict(), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        super().load_state_dict(state_dict["groups"])
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
