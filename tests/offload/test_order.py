"""Which saved tensors are read ahead: those before in forward, later those that followed in the step before."""

import threading
import time

import torch

from memkernels.offload.order import Order, Tape
from memkernels.offload.store import Stored


def taped(order, count):
    tape, records = Tape(order), [Stored(1, torch.device("cpu")) for _ in range(count)]
    assert [tape.append(record) for record in records] == list(range(count))
    return tape, records


def walk(tape, records, positions, count=2):
    return [[records.index(r) for r in tape.upcoming(position, count)] for position in positions]


def test_the_first_backward_goes_back():
    tape, records = taped(Order(), 4)
    assert walk(tape, records, [3, 2, 1, 0]) == [[2, 1], [1, 0], [0], []]


def test_the_next_follows_what_the_first_did():
    order = Order()
    walk(*taped(order, 4), [2, 3, 0, 1])
    assert walk(*taped(order, 4), [2, 3, 0, 1]) == [[3, 0], [0, 1], [1], [0]]


def test_each_backward_is_learned_from_the_one_before():
    order = Order()
    walk(*taped(order, 3), [0, 1, 2])
    walk(*taped(order, 3), [2, 1, 0])
    assert walk(*taped(order, 3), [2, 1, 0], count=1) == [[1], [0], []]


def test_what_was_not_seen_is_taken_to_go_back():
    order = Order()
    walk(*taped(order, 4), [2, 3])
    assert walk(*taped(order, 4), [2, 3, 1], count=1) == [[3], [2], [0]]


def test_orders_of_other_lengths_are_kept_apart_and_few():
    order = Order()
    walk(*taped(order, 3), [0, 1, 2])
    assert walk(*taped(order, 4), [3], count=3) == [[2, 1, 0]]
    for length in range(5, 40):
        walk(*taped(order, length), [0, 1])
    assert walk(*taped(order, 3), [2], count=2) == [[1, 0]]


def test_freed_tensors_and_the_one_in_use_are_passed_over():
    tape, records = taped(Order(), 4)
    tape.append(records[1])  # saved a second time
    kept = records[0], records[1], records[3]
    del records
    assert tape.upcoming(4, 2) == [kept[2], kept[0]]
    assert tape.alive
    del kept
    assert not tape.alive and tape.upcoming(3, 2) == []


def test_threads_share_an_order():
    class Slow(dict):
        def __delitem__(self, key):
            time.sleep(0.05)
            super().__delitem__(key)

    order, failed = Order(), []
    order._learned = Slow()
    for length in range(16):
        order.exchange(length, {})

    def exchange(length):
        try:
            order.exchange(length, {})
        except KeyError as error:
            failed.append(error)

    threads = [threading.Thread(target=exchange, args=(16 + i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and list(order._learned) == list(range(3, 19))
