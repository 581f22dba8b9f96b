"""Stages run beside each other, in order, and fail loudly."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from efficient_dl.comm import Pipeline
from efficient_dl.errors import EdlError

CPU = torch.device("cpu")


class Job:
    def __init__(self, number: int) -> None:
        self.number = number


@pytest.fixture
def pipelines() -> Iterator[Callable[..., Pipeline[Job]]]:
    made: list[Pipeline[Job]] = []

    def make(*stages: Callable[[Job], None]) -> Pipeline[Job]:
        made.append(Pipeline("test", stages, CPU))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def test_every_stage_takes_the_jobs_in_the_order_of_submission(
    pipelines: Callable[..., Pipeline[Job]],
) -> None:
    seen: list[tuple[str, int]] = []

    def first(job: Job) -> None:
        time.sleep(0.01 if job.number % 2 else 0.0)
        seen.append(("first", job.number))

    pipeline = pipelines(first, lambda job: seen.append(("second", job.number)))
    futures = [pipeline.submit(Job(number)) for number in range(6)]
    assert [future.result(100).number for future in futures] == list(range(6))
    for stage in ("first", "second"):
        assert [number for name, number in seen if name == stage] == list(range(6))


def test_stages_overlap(pipelines: Callable[..., Pipeline[Job]]) -> None:
    """Both stages meet at a barrier, which only works if they run at the same time."""
    barrier = threading.Barrier(2, timeout=100)

    def first(job: Job) -> None:
        if job.number == 1:
            barrier.wait()

    def second(job: Job) -> None:
        if job.number == 0:
            barrier.wait()

    pipeline = pipelines(first, second)
    for future in [pipeline.submit(Job(0)), pipeline.submit(Job(1))]:
        future.result(100)


def test_submitting_does_not_wait(pipelines: Callable[..., Pipeline[Job]]) -> None:
    release = threading.Event()
    pipeline = pipelines(lambda job: release.wait(200) and None)
    future = pipeline.submit(Job(0))
    assert not future.done()
    release.set()
    future.result(100)


def test_an_exception_ends_its_job_and_all_behind_it(pipelines: Callable[..., Pipeline[Job]]) -> None:
    ran: list[int] = []

    def failing(job: Job) -> None:
        if job.number == 1:
            raise ValueError("broken")
        ran.append(job.number)

    pipeline = pipelines(lambda job: None, failing, lambda job: time.sleep(0.01))
    first = pipeline.submit(Job(0))
    first.result(100)
    behind = [pipeline.submit(Job(number)) for number in (1, 2, 3)]
    for future in behind:
        with pytest.raises(ValueError, match="broken"):
            future.result(100)
    assert ran == [0]


def test_a_stage_that_closes_its_own_pipeline_does_not_wait_for_itself(
    pipelines: Callable[..., Pipeline[Job]],
) -> None:
    """As the garbage collector does where it comes by in a stage's thread."""
    made: list[Pipeline[Job]] = []
    made.append(pipelines(lambda job: made[0].close(100) and None, lambda job: None))
    made[0].submit(Job(0)).result(100)
    assert made[0].close(100)


def test_close_finishes_what_is_queued_and_refuses_more(pipelines: Callable[..., Pipeline[Job]]) -> None:
    pipeline = pipelines(lambda job: time.sleep(0.02), lambda job: None)
    futures = [pipeline.submit(Job(number)) for number in range(3)]
    assert pipeline.close(100)
    assert all(future.done() for future in futures)
    with pytest.raises(EdlError, match=r"after close\(\)"):
        pipeline.submit(Job(9))


def test_close_gives_up_on_a_stuck_stage(pipelines: Callable[..., Pipeline[Job]]) -> None:
    release = threading.Event()
    pipeline = pipelines(lambda job: release.wait(200) and None)
    pipeline.submit(Job(0))
    assert not pipeline.close(0.2)
    release.set()


def test_an_idle_pipeline_keeps_no_job_alive(pipelines: Callable[..., Pipeline[Job]]) -> None:
    pipeline = pipelines(lambda job: None, lambda job: None)
    job = Job(0)
    alive = weakref.ref(job)
    pipeline.submit(job).result(100)
    del job
    deadline = time.monotonic() + 30
    while alive() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert alive() is None
