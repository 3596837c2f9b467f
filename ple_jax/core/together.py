"""Several processes as one program: process 0 leads, and the others make the calls that it announces.

Process 0 alone runs the loop, as if there were no other process: it reads, scores, decides, writes. A call that all must
make (`together`: build, generate, update ...) it first sends to the others, which wait for such calls and make the same
ones in the same order. So nothing outside a backend knows of processes, no decision can differ between them, and a
process that waits for a slow reward server holds no device in a collective.

A `Control` carries the calls from process 0 to the others: that of `ple_jax.backend.processes` (jax.distributed), or that
of `torch_ascend.sharding` (torchrun).
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import cloudpickle

from ple_jax.core.errors import UserError

T = TypeVar("T")
F = TypeVar("F", bound=Callable)


class Control(Protocol):
    """The connection of this process to the others."""

    rank: int
    size: int

    def tell(self, message: bytes) -> None:
        """Sends a message from process 0 to all others; messages arrive in order."""
        ...

    def told(self) -> bytes:
        """Returns the next message of process 0 in another process, however long it takes to come."""
        ...

    def leaving(self, error: BaseException) -> None:
        """Handles an error that ends process 0 within a call that the others are in, too; returns if its cause is there."""
        ...

    def failed(self, error: BaseException, *, known: bool) -> None:
        """Handles an error of a call in a process other than 0. Returns if process 0 need not be told.

        Args:
            known: whether it is process 0's own error.
        """
        ...


_control: Control | None = None  # of this process; None: it is alone
_busy = False  # whether process 0 is in a call that all make
# objects whose methods are called together; every process makes the same ones in the same order. Process 0 has references
# that keep none of them: what it lets go of the others let go of with the next call
_objects: list[Any] = []
_error: BaseException | None = None  # of process 0, that is raised in all
_functions: list[Callable] = []  # that were told of: a loss is the same object every time, or it would be compiled again


def size() -> int:
    """Returns the number of processes."""
    return 1 if _control is None else _control.size


def rank() -> int:
    """Returns the number of this process: 0 for the one that leads, and for one that is alone."""
    return 0 if _control is None else _control.rank


@contextmanager
def led(control: Control) -> Iterator[bool]:
    """Lets process 0 lead while the context lasts, and yields whether this process leads.

    Process 0 gets True at once. The others make its calls until its context ends, and get False after that.
    """
    global _control, _busy
    _control = control
    try:
        if control.rank:
            _serve(control)
            yield False
        else:
            yield from _leading(control)
    finally:
        _control, _busy = None, False
        _objects.clear()
        _functions.clear()


def _leading(control: Control) -> Iterator[bool]:
    try:
        yield True
    except BaseException as error:
        # where the others are in the same call they are not waiting to be told
        if _busy:
            control.leaving(error)
        else:
            _tell(None)
        raise
    _tell(None)


def _serve(control: Control) -> None:
    """Makes the calls that process 0 sends, until process 0 is done.

    An error that process 0 has too is reported by process 0 alone.
    """
    try:
        while (told := _told()) is not None:
            gone, target, name, args, kwargs = told
            for number in gone:
                _objects[number] = None
            args, kwargs = [_known(x) for x in args], {key: _known(x) for key, x in kwargs.items()}
            function = getattr(_objects[target], name).__wrapped__ if isinstance(target, int) else target.__wrapped__
            function(*((_objects[target],) if isinstance(target, int) else ()), *args, **kwargs)
    except Exception as error:
        control.failed(error, known=error is _error)
        if isinstance(error, UserError):
            sys.exit(2)
        raise


def _tell(call: Any) -> None:
    # cloudpickle: the losses of an algorithm may be closures
    assert _control is not None
    _control.tell(cloudpickle.dumps(call))


class _Function(NamedTuple):
    """A function among the arguments of a call: its number, and its pickled form when it is sent for the first time."""

    number: int
    pickled: bytes | None


def _named(x: Any) -> Any:
    """Encodes an argument to be sent: a function becomes a `_Function`, anything else stays as it is.

    Raises:
        UserError: the function cannot be pickled.
    """
    if not callable(x):
        return x
    number = next((i for i, told in enumerate(_functions) if told is x), None)
    if number is not None:
        return _Function(number, None)
    try:
        pickled = cloudpickle.dumps(x)
    except Exception as error:  # whatever its parts raise
        raise UserError(
            f"a loss cannot be sent to the other processes ({type(error).__name__}: {error}): leave out of the"
            " make_loss of config.algorithm what cannot be pickled (open files, locks, threads ...)"
        ) from error
    _functions.append(x)
    return _Function(len(_functions) - 1, pickled)


def _known(x: Any) -> Any:
    """Decodes an argument that was sent: a `_Function` becomes the function."""
    if not isinstance(x, _Function):
        return x
    if x.pickled is not None:
        _functions.append(cloudpickle.loads(x.pickled))
    return _functions[x.number]


def _told() -> Any:
    assert _control is not None
    return cloudpickle.loads(_control.told())


def together(function: F) -> F:
    """Decorates a function of a module, or a method of a `shared` object: when process 0 calls it, all processes do."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _busy
        if _control is None:
            return function(*args, **kwargs)
        assert not _busy, f"{function.__qualname__} is called inside a call that all processes make already"
        handle = next((i for i, made in enumerate(_objects) if args and made is not None and made() is args[0]), None)
        target, name, own = (call, "", args) if handle is None else (handle, function.__name__, args[1:])
        gone = [i for i, made in enumerate(_objects) if made is not None and made() is None]
        _tell((gone, target, name, [_named(x) for x in own], {key: _named(x) for key, x in kwargs.items()}))
        for number in gone:
            _objects[number] = None
        _busy = True  # and so it stays if the call fails
        result = function(*args, **kwargs)
        _busy = False
        return result

    return cast(F, call)


def busy() -> bool:
    """Says whether a call that all processes make is under way, or has failed."""
    return _busy


def shared(made: T) -> T:
    """Makes the methods of an object callable `together`, and returns it; every process has such an object of its own."""
    if _control is not None:
        _objects.append(made if _control.rank else weakref.ref(made))
    return made


def from_first(make: Callable[[], T]) -> T:
    """Returns, in all processes, what `make` returns in process 0; used within a call that all make.

    A UserError that `make` raises is raised in all processes.
    """
    global _error
    if _control is None:
        return make()
    if _control.rank:
        made = cloudpickle.loads(_control.told())
    else:
        try:
            made = make()
        except UserError as error:
            made = error
        _control.tell(cloudpickle.dumps(made))
    if isinstance(made, UserError):
        _error = made
        raise made
    return cast(T, made)
