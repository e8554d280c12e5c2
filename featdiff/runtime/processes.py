"""Mixed precision and several processes for training, with ``accelerate``; without either, plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

# The others wait for the first process, which reads all images before they do.
_LONGEST_WAIT = timedelta(days=7)


def make_accelerator(mixed_precision: str, device: torch.device) -> Accelerator | None:
    """An accelerator, if one is needed: for reduced precision, or in a process started by ``accelerate launch``.

    Parameters
    ----------
    mixed_precision : {"no", "bf16"}
    device : torch.device

    Returns
    -------
    accelerate.Accelerator or None

    Raises
    ------
    UsageError
        The package is missing, or the device has no such precision.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if mixed_precision == "no" and not launched:
        return None
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError:
        raise UsageError("mixed precision and several GPUs need a package: pip install 'featdiff[pixel]'") from None

    if not launched:  # its settings belong to the whole process, and an earlier training may have had others
        AcceleratorState._reset_state(reset_partial_state=True)
    patience = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    try:
        return Accelerator(
            mixed_precision=mixed_precision,
            cpu=device.type == "cpu",
            device_placement=launched,
            kwargs_handlers=[patience] if launched else [],
        )
    except ValueError as error:
        raise UsageError(
            f"mixed_precision {mixed_precision!r} cannot be had on {device}: {error}", argument="mixed_precision"
        ) from None


class Processes:
    """The processes that train one network.

    Parameters
    ----------
    accelerator : accelerate.Accelerator, optional
        Without one there is this process alone.
    epoch : int
        The epoch at which this process continues.

    Attributes
    ----------
    number : int
        How many processes there are.
    rank : int
        Which one this is, from 0.

    Raises
    ------
    UsageError
        The processes would continue at different epochs.

    Examples
    --------
    >>> Processes(None, epoch=0).number
    1
    """

    def __init__(self, accelerator: Accelerator | None, epoch: int) -> None:
        self.accelerator = accelerator
        self.number = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        if accelerator is not None:
            epochs = accelerator.gather(torch.tensor([epoch], device=accelerator.device))
            if epochs.min() != epochs.max():
                raise UsageError(
                    "the processes resume from different checkpoints: all hosts must share one cache", argument="cache"
                )

    def prepare(self, network: nn.Module, *optimizers: Any) -> list[Any]:
        """The network and its optimizers, wrapped as the accelerator needs them."""
        if self.accelerator is None:
            return [network, *optimizers]
        return [*self.accelerator.prepare(network, *optimizers)]

    def share(self, size: int) -> slice:
        """This process's share of a batch; what is left over of an uneven batch belongs to no process.

        Parameters
        ----------
        size : int
            Number of samples of the batch.

        Returns
        -------
        slice
        """
        return slice(self.rank, size // self.number * self.number, self.number)

    def step(
        self,
        loss: Tensor,
        optimizers: Iterable[Any],
        parameters: Iterable[nn.Parameter] = (),
        clip_norm: float = 0.0,
    ) -> None:
        """One step of all optimizers.

        Parameters
        ----------
        loss : Tensor of shape ()
            What to minimise.
        optimizers : iterable of Optimizer
            As :meth:`prepare` returned them.
        parameters : iterable of nn.Parameter, optional
            Those whose gradients are clipped together.
        clip_norm : float, default 0.0
            Gradients with a larger norm are scaled down to it; 0 leaves them as they are.
        """
        optimizers = list(optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        if clip_norm:
            self.clip(parameters, clip_norm)
        for optimizer in optimizers:
            optimizer.step()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients: of a scaled loss where the precision needs that, averaged over all processes."""
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], norm: float) -> None:
        """Scale gradients down to a total length of at most ``norm``."""
        if self.accelerator is None:
            nn.utils.clip_grad_norm_(parameters, norm)
        else:
            self.accelerator.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes; all get the same number."""
        if self.accelerator is None:
            return value.item()
        return self.accelerator.reduce(value, "mean").item()

    def release(self, network: nn.Module) -> None:
        """Undo :meth:`prepare` on a network."""
        if self.accelerator is not None:
            self.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
