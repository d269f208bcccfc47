"""A worker that rests gives memory back, and one that works does not look for it."""

from __future__ import annotations

from workers.capacity import Lanes
from workers.services.resting import GROWN, Resting


class Heap:
    """What the process has, of which `free` can be given back."""

    def __init__(self) -> None:
        self.has, self.free, self.asked = 0, 0, 0

    def resident(self) -> int:
        return self.has

    def give_back(self) -> bool:
        self.asked += 1
        self.has, self.free = self.has - self.free, 0
        return True

    def take(self, amount: int) -> None:
        self.has, self.free = self.has + amount, self.free + amount


def resting() -> tuple[Resting, Lanes, Heap]:
    lanes, heap = Lanes(), Heap()
    lanes.configure({"embed": 2}, {"embed": []})
    return Resting(lanes, heap.resident, heap.give_back), lanes, heap


def test_what_a_worker_has_grown_by_is_given_back_when_it_rests() -> None:
    rest, lanes, heap = resting()
    heap.take(GROWN)
    lanes.enter("embed")
    rest.round()
    assert heap.asked == 0, "a job is held"
    lanes.leave("embed")
    rest.round()
    assert (heap.asked, heap.has) == (1, 0)


def test_a_worker_that_has_hardly_grown_does_not_look_for_free_memory() -> None:
    rest, _, heap = resting()
    heap.take(GROWN)
    heap.free = 0
    rest.round()
    for _ in range(3):
        rest.round()
    heap.take(GROWN - 1)
    rest.round()
    assert heap.asked == 1, "what it keeps for good counts once"
    heap.take(1)
    rest.round()
    assert heap.asked == 2


def test_a_job_of_any_lane_is_work_and_room_for_one_is_none() -> None:
    lanes, heap = Lanes(), Heap()
    lanes.configure({"embed": 2, "generate": 2}, {"embed": [], "generate": []})
    rest = Resting(lanes, heap.resident, heap.give_back)
    heap.take(GROWN)
    lanes.enter("generate")
    rest.round()
    assert heap.asked == 0
    lanes.leave("generate")
    rest.round()
    assert heap.asked == 1
