"""A denoising loop watched from outside: what its callback sees of the samples, as an iterator."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from .input_checks import check_callback


def watched(
    draw: Callable[[Callable], list[dict]], results_of: Callable[[Any], list[dict]], callback: Callable | None = None
) -> Iterator[list[dict]]:
    """What `draw(look)` returns, at last; before it, what `look`, its callback after a step, sees forming.

    Args:
        draw: Draws samples, and calls its argument after each step as `callback_on_step_end`.
        results_of: Of what the callback's `decode()` returns, the samples as `draw` returns them.
        callback: Another callback, which runs before.

    Raises:
        ValueError: `callback` cannot be called.
    """
    check_callback(callback)

    def run(show: Callable[[list[dict]], None]) -> None:
        def look(model, step, timesteps, tensors):
            changed = None if callback is None else callback(model, step, timesteps, tensors)
            if any(timesteps):  # all are 0 when the samples are done
                show(results_of(tensors["decode"]()))
            return changed

        show(draw(look))

    return _shown(run)


def _shown(draw: Callable[[Callable], None]) -> Iterator:
    """What `draw(show)` shows, one at a time; it runs in a thread, and only while the next is waited for.

    The thread computes as the one that asks for the first item would: with its autocast, for instance.
    """
    modes = _modes()
    shown: queue.SimpleQueue = queue.SimpleQueue()  # of (item, error, whether it is the last)
    asked: queue.SimpleQueue = queue.SimpleQueue()

    def show(item) -> None:
        shown.put((item, None, False))
        if not asked.get():
            raise GeneratorExit

    def work() -> None:
        try:
            with ExitStack() as entered:
                for mode in modes:
                    entered.enter_context(mode())
                draw(show)
            shown.put((None, None, True))
        except BaseException as error:
            shown.put((None, error, True))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error, is_last = shown.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item
            asked.put(True)
    finally:
        asked.put(False)
        thread.join()


def _modes() -> list[Callable[[], AbstractContextManager]]:
    """How PyTorch computes in this thread, to be entered in another, which inherits nothing of it."""
    modes: list[Callable[[], AbstractContextManager]] = []
    if torch.is_inference_mode_enabled():
        modes.append(torch.inference_mode)
    modes.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    for kind in ["cpu"] if accelerator is None else ["cpu", accelerator.type]:
        if torch.is_autocast_enabled(kind):
            modes.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind)))
    if torch.cuda.is_initialized():
        modes.append(partial(torch.cuda.device, torch.cuda.current_device()))
    return modes
