"""Of a launch under Triton's interpreter only the last programs: what reaches far from an array's start, in no time."""

from contextlib import contextmanager
from unittest import mock


@contextmanager
def last_programs_only():
    """Within it a launch runs, along its longest axis, the last program alone, which knows the whole grid."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    call, program_id = GridExecutor.__call__, InterpreterBuilder.create_get_program_id

    def call_last(executor, *args, **kwargs):
        grid = executor.grid
        longest = grid.index(max(grid))
        executor.grid = tuple(1 if axis == longest else extent for axis, extent in enumerate(grid))

        def last_id(builder, axis):
            return handle(grid[axis] - 1) if axis == longest else program_id(builder, axis)

        def whole_grid(builder, axis):
            return handle(grid[axis] if axis < len(grid) else 1)

        with (
            mock.patch.object(InterpreterBuilder, "create_get_program_id", last_id),
            mock.patch.object(InterpreterBuilder, "create_get_num_programs", whole_grid),
        ):
            return call(executor, *args, **kwargs)

    def handle(value):
        return TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    with mock.patch.object(GridExecutor, "__call__", call_last):
        yield
