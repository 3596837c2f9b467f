"""One leads and the others follow, with threads in the place of processes and queues in that of a network."""

import gc
import queue
import threading
import weakref

import pytest
from patience import LAST_RESORT

from ple_jax.core import together
from ple_jax.core.errors import UserError


def test_alone_nothing_is_told():
    @together.together
    def double(x):
        return 2 * x

    assert double(3) == 6 and together.size() == 1 and together.rank() == 0 and not together.busy()
    assert together.from_first(lambda: 5) == 5 and together.shared([1]) == [1]


class Control:
    """Process 0; what it tells is kept."""

    rank, size = 0, 2

    def __init__(self):
        self.messages: queue.Queue[bytes] = queue.Queue()
        self.left: list[BaseException] = []

    def tell(self, message):
        self.messages.put(message)

    def told(self):
        raise AssertionError("process 0 tells")

    def leaving(self, error):
        self.left.append(error)

    def failed(self, error, *, known):
        raise AssertionError("it is process 0")


class Follower(Control):
    """Another process, with the messages of a first one."""

    rank = 1

    def __init__(self, first: Control):
        super().__init__()
        self.messages, self.failures = first.messages, []

    def told(self):
        return self.messages.get(timeout=LAST_RESORT)

    def failed(self, error, *, known):
        self.failures.append((error, known))


calls: list = []


@together.together
def add(x, *, function=None):
    calls.append((together.rank(), x, function))
    return x if function is None else function(x)


class Counter:
    alive: "weakref.WeakSet[Counter]" = weakref.WeakSet()

    def __init__(self):
        self.count = 0
        self.alive.add(self)

    @together.together
    def up(self, by):
        self.count += by
        calls.append(("up", self.count))
        return self.count


@together.together
def make():
    return together.shared(Counter())


def test_the_others_make_the_same_calls_in_the_same_order():
    """On objects of their own, and a function is the same one every time."""
    calls.clear()
    first, loss = Control(), lambda x: x + 1
    with together.led(first) as leads:
        assert leads and together.size() == 2
        assert add(1) == 1 and add(2, function=loss) == 3 and add(3, function=loss) == 4
        counter = make()
        assert counter.up(2) == 2 and counter.up(3) == 5
    mine, calls[:] = list(calls), []
    follower = Follower(first)
    with together.led(follower) as leads:
        assert not leads
    theirs = list(calls)
    assert [x[1] for x in mine] == [x[1] for x in theirs] == [1, 2, 3, 2, 5]
    assert theirs[1][2] is theirs[2][2] is not loss and theirs[1][2](1) == 2
    assert {x[0] for x in mine[:3]} == {0} and {x[0] for x in theirs[:3]} == {1}
    assert not follower.failures and first.messages.empty() and together.size() == 1


@together.together
def failing():
    raise UserError("within")


@together.together
def read():
    return together.from_first(lambda: open_file(together.rank()))


def open_file(rank: int) -> str:
    if rank:
        raise AssertionError("process 0 alone reads")
    raise UserError("no such file")


def test_what_process_0_lets_go_of_the_others_let_go_of():
    calls.clear()
    first = Control()
    with together.led(first):
        counter = make()
        counter.up(1)
        del counter
        gc.collect()
        add(7)
        again = make()
        again.up(5)
    calls.clear()

    class Watching(Follower):
        def told(self):
            gc.collect()
            calls.append(("alive", sum(x.count == 1 for x in Counter.alive)))
            return super().told()

    with together.led(Watching(first)):
        pass
    seen = [x[1] for x in calls if x[0] == "alive"]
    assert seen[2] == 1 and seen[-1] == 0 and ("up", 5) in calls


def test_an_error_between_calls_is_told_and_one_within_is_not():
    first = Control()
    with pytest.raises(KeyError):
        with together.led(first):
            add(1)
            raise KeyError("between")
    assert not first.left
    with together.led(Follower(first)) as leads:  # it ends as process 0 has
        assert not leads
    second = Control()
    with pytest.raises(UserError, match="within"):
        with together.led(second):
            failing()
    assert [str(error) for error in second.left] == ["within"] and not together.busy()
    # the other one finds the same by itself, and says so to process 0
    follower = Follower(second)
    with pytest.raises(SystemExit):
        with together.led(follower):
            pass
    ((error, known),) = follower.failures
    assert str(error) == "within" and not known


def test_what_process_0_finds_amiss_is_raised_in_all():
    first = Control()
    with pytest.raises(UserError, match="no such file"):
        with together.led(first):
            read()
    follower = Follower(first)
    with pytest.raises(SystemExit):
        with together.led(follower):
            pass
    ((error, known),) = follower.failures
    assert str(error) == "no such file" and known


def test_a_loss_that_cannot_be_pickled_is_named():
    lock = threading.Lock()
    with pytest.raises(UserError, match="a loss cannot be sent to the other processes .*what cannot be pickled"):
        with together.led(Control()):
            add(1, function=lambda x: (lock, x)[1])
