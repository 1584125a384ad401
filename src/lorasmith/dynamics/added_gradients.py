"""Gradients of parameters that rules have added, averaged over processes.

``DistributedDataParallel`` knows only the parameters that it was made with. The others' gradients
are averaged at the end of each backward pass in which it averages its own: clipping,
``GradScaler`` and all else before the step then find the same numbers everywhere. Without that
wrapper they are averaged when the step begins.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lorasmith.dynamics.context import Context
from lorasmith.dynamics.processes import distributed

__all__ = ["AddedGradients"]


class AddedGradients:
    """Gradients of what rules have added to the optimiser, and whether they are averages now.

    Args:
        context: Knows the added parameters.
        device: Where processes count which of them have a gradient.
    """

    def __init__(self, context: Context, device: torch.device) -> None:
        self.context = context
        self._device = device
        #: Whether the backward pass of the last forward pass ends with an average over processes.
        self._syncs = False
        #: Whether such an average has been asked for in the backward pass under way, and whether
        #: the gradients of added parameters are averages now.
        self._asked = self._averaged = False

    def before_forward(self) -> None:
        """A forward pass begins."""
        if torch.is_grad_enabled():
            self._syncs, self._asked = _ddp_syncs(), False

    def note(self) -> None:
        """One of the gradients has come."""
        self._averaged = False
        if self._syncs and not self._asked:
            # DDP waits for its own averages in such a callback, queued before: the order is the
            # same on all processes.
            self._asked = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._asked = False
        self.share()
        self._averaged = True

    def before_step(self) -> None:
        """Averages what no backward pass has averaged."""
        if not self._averaged:
            self.share()
        self._averaged = False

    def share(self) -> None:
        """Averages the gradients over all processes."""
        if not (distributed() and self.context.added):
            return
        parameters = list(self.context.added.values())
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        used = used.to(self._device)
        dist.all_reduce(used)
        world = dist.get_world_size()
        for parameter, count in zip(parameters, used.tolist(), strict=True):
            if count == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world)


def _ddp_syncs() -> bool:
    """Whether the forward pass under way is one of DDP that averages gradients afterwards.

    Outside of DDP, and in a micro-batch that is only accumulated, it is not.
    """
    if not distributed():
        return False
    active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return active is not None and bool(active.require_backward_grad_sync)
