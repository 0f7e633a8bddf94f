"""One thread for all that is done with a model, whoever asks for it."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from nexusquant_cache.serving.errors import BusyError

_Post = TypeVar("_Post")
_Result = TypeVar("_Result")


class ModelThread:
    """Does one thing after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        """Start nothing yet: the thread comes with the first work."""
        self._pool = ThreadPoolExecutor(1, "nexusquant-model")
        self._is_over = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether work that runs has to stop."""
        return self._is_over.is_set()

    def submit(self, work: Callable[[], _Result]) -> "Future[_Result]":
        """Do something when its turn comes.

        Raises:
            BusyError: If the thread was closed.
        """
        try:
            return self._pool.submit(work)
        except RuntimeError as error:
            msg = "the program is about to stop"
            raise BusyError(msg) from error

    def stream(self, work: Callable[[Callable[[_Post], None]], None]) -> Iterator[_Post]:
        """Do something, and yield what it posts: the newest each time, and the last in any case.

        Args:
            work: Called with what it is to post with.

        Raises:
            BusyError: If the thread was closed.
            BaseException: What the work raises.
        """
        posts: queue.SimpleQueue[Any] = queue.SimpleQueue()
        end = object()

        def run() -> None:
            try:
                work(posts.put)
            finally:
                posts.put(end)

        future = self.submit(run)
        newest: Any = None
        while newest is not end:
            waiting = [posts.get()]
            while not posts.empty():
                waiting.append(posts.get())
            newest = waiting.pop()
            if newest is not end:
                yield newest
            elif waiting:
                yield waiting[-1]
        future.result()

    def stop(self) -> None:
        """Have running work stop."""
        self._is_over.set()

    def close(self) -> None:
        """Stop, and wait until all work has."""
        self.stop()
        self._pool.shutdown()
