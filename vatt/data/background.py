"""Draw from an iterator in a thread, a few items ahead."""

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """The items of a generator, made by a thread; what it raises comes out of the iteration."""

    def __init__(self, made: Iterator[T], *, ahead: int) -> None:
        self._made = made
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue(maxsize=ahead)
        self._stop = Event()
        self._thread = Thread(target=self._work, daemon=True, name="background")

    def _work(self) -> None:
        try:
            for item in self._made:
                self._put(item, None)
                if self._stop.is_set():
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put((item, error), timeout=0.1)
            except Full:
                continue
            return

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        close = getattr(self._made, "close", None)
        if close is not None:
            close()  # its worker processes end here
