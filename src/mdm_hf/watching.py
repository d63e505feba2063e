"""A denoising loop watched from outside: what its callback sees of the samples, as an iterator."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

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
    """What `draw(show)` shows, one at a time; it runs in a thread, and only while the next is waited for."""
    shown: queue.SimpleQueue = queue.SimpleQueue()  # of (item, error, whether it is the last)
    asked: queue.SimpleQueue = queue.SimpleQueue()

    def show(item) -> None:
        shown.put((item, None, False))
        if not asked.get():
            raise GeneratorExit

    def work() -> None:
        try:
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
