from __future__ import annotations

import gc
import threading

import numpy as np
import torch

from ltd.data.buffers import Buffers

DTYPE = np.dtype(np.int16)


def test_an_array_is_used_again_only_when_nothing_refers_to_it() -> None:
    buffers = Buffers()
    array = buffers.take((4, 5), DTYPE)
    place = array.ctypes.data
    array[:] = 7
    tensor = torch.from_numpy(array)[1:].view(torch.bfloat16)
    del array
    other = buffers.take((4, 5), DTYPE)
    assert other.ctypes.data != place
    other[:] = 9
    assert tensor.view(torch.int16).eq(7).all()
    view = tensor.view(torch.int16).numpy()
    del tensor
    assert buffers.take((4, 5), DTYPE).ctypes.data != place
    assert (view == 7).all()
    del view
    gc.collect()
    assert buffers.take((4, 5), DTYPE).ctypes.data == place
    assert buffers.take((5, 4), DTYPE).shape == (5, 4)


def test_no_more_is_kept_than_allowed() -> None:
    buffers = Buffers(max_bytes=1000)
    held = [buffers.take((100,), DTYPE) for _ in range(20)]
    assert sum(array.nbytes for array in buffers._kept) <= 1000
    assert len({array.ctypes.data for array in held}) == 20


def test_threads_never_share_an_array() -> None:
    buffers, problems = Buffers(), []

    def work(number: int) -> None:
        for _ in range(300):
            array = buffers.take((50,), DTYPE)
            array[:] = number
            tensor = torch.from_numpy(array)
            del array
            if not tensor.eq(number).all():
                problems.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
