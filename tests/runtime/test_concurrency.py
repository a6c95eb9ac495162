"""What happens at the same time: closing, cancelling, ending a stream from where it is being made."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecap.runtime import Bundle, Captioner, UsageError, load_model

from .graphs import SIZE, photo
from .models import Watched


@pytest.fixture(scope="module")
def photos() -> list:
    return [photo(seed, (SIZE + seed, 2 * SIZE)) for seed in range(4)]


def watched(bundle: Path, before: Callable[[int], None]) -> tuple[Captioner, Watched]:
    model = Watched(load_model(Bundle.open(bundle), threads=1), before)
    return Captioner.load(bundle, model=model), model


def in_time(work: Callable[[], object]) -> None:
    """Do it in a thread that may hang without stopping the tests."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for itself"
    if failed:
        raise failed[0]


@pytest.mark.parametrize("beam", [1, 3])
def test_a_stream_closed_from_within_its_own_step(bundle_path, photos, beam):
    """As a signal's handler does, which runs in the thread that makes the step, or a finalizer."""

    def work() -> None:
        captioner, model = watched(bundle_path, lambda step: stream.close() if step == 2 else None)
        stream = captioner.stream(photos[0], beam=beam, min_length=9, max_length=9)
        pieces = list(stream)
        assert model.steps == 2 and len(pieces) == (2 if beam == 1 else 0)
        assert list(stream) == []
        with pytest.raises(UsageError, match="closed before its end"):
            _ = stream.caption

    in_time(work)


def test_closing_a_beam_waits_for_one_step_only(bundle_path, photos):
    going, go_on = threading.Event(), threading.Event()

    def before(step: int) -> None:
        going.set()
        go_on.wait(5)

    captioner, model = watched(bundle_path, before)
    stream = captioner.stream(photos[0], beam=3, min_length=9, max_length=9)
    pieces: list[str] = []
    asking = threading.Thread(target=lambda: pieces.extend(stream))
    asking.start()
    assert going.wait(5)
    closing = threading.Thread(target=stream.close)
    closing.start()
    time.sleep(0.05)
    go_on.set()
    closing.join(5)
    asking.join(5)
    assert model.steps == 1 and pieces == []
    with pytest.raises(UsageError, match="closed before its end"):
        _ = stream.caption


def test_closing_a_stream_that_has_ended_keeps_its_caption(captioner, photos):
    for beam in (1, 3):
        stream = captioner.stream(photos[0], beam=beam)
        text = "".join(stream)
        stream.close()
        assert stream.caption.text == text and list(stream) == []


def test_closing_between_the_look_and_the_use(bundle_path, photos):
    """`close` in another thread, at the worst moment: one clear line, or a caption."""

    class Closing(Captioner):
        looks = 0

        @property
        def _model(self):
            self.looks += 1
            return self.held if self.looks % 2 else None

        @_model.setter
        def _model(self, model):
            self.held = model

    captioner = Closing.load(bundle_path, threads=1, verify="sizes")
    assert captioner(photos[0]).text


def test_close_lets_go_of_the_engine(bundle_path, photos):
    captioner = Captioner.load(bundle_path, threads=1, verify="sizes")
    captioner([photos[0], photos[1]], beam=3)
    stream = captioner.stream(photos[0], min_length=5)
    next(stream)
    with pytest.raises(UsageError):
        captioner(photos[0], beam=0)
    gc.disable()  # no cycles hold it
    try:
        engine = weakref.ref(captioner._model)
        captioner.close()
        assert engine() is not None and "".join(stream)
        del stream
        assert engine() is None
    finally:
        gc.enable()


def test_two_captioners_of_one_bundle(bundle_path, photos):
    """Each closes its own."""
    first, second = (Captioner.load(bundle_path, threads=1, verify="sizes") for _ in range(2))
    expected = [first(each, beam=3) for each in photos]
    wrong: list[object] = []

    def work(captioner: Captioner) -> None:
        for _ in range(5):
            found = [captioner(each, beam=3) for each in photos]
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(each,)) for each in (first, second)]
    for each in threads:
        each.start()
    threads[0].join()
    first.close()
    threads[1].join()
    assert wrong == [] and [second(each, beam=3) for each in photos] == expected
