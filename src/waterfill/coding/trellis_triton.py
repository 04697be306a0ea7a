"""The Viterbi algorithm of a trellis as one Triton kernel, for tensors on a GPU.

A path is sequential, so a program takes one segment of one column and keeps the cost of every state
in registers. Imported where triton is; cpp/trellis_viterbi.h explains the machine.
"""

import torch
import triton
import triton.language as tl

from waterfill.coding.trellis import CODES, SEGMENT


def viterbi(price: torch.Tensor, states: int) -> torch.Tensor:
    """Cheapest path: float32 (4, columns, rows) -> uint8 (columns, rows); as the twin in torch."""
    _, columns, rows = price.shape
    segments = triton.cdiv(rows, SEGMENT)
    words = triton.cdiv(SEGMENT, 32)
    shape = (columns, segments, words, states)
    decisions = torch.empty(shape, dtype=torch.int32, device=price.device)
    path = torch.empty((columns, rows), dtype=torch.uint8, device=price.device)
    feedback, source = CODES[states]
    # One warp: states then travel by shuffles, and a segment never waits for another. No fused
    # multiplication: costs are to be those of the other implementations.
    _kernel[(segments, columns)](
        price.contiguous(),
        decisions,
        path,
        rows,
        SEGMENT=SEGMENT,
        STATES=states,
        FEEDBACK=feedback,
        INPUT=source,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return path


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    price,  # float32 (4, columns, rows), [grid << 1 | parity]
    decisions,  # int32 (columns, segments, words, states): bit r of a word is row r of 32
    path,  # uint8 (columns, rows)
    rows,
    SEGMENT: tl.constexpr,
    STATES: tl.constexpr,
    FEEDBACK: tl.constexpr,
    INPUT: tl.constexpr,
):
    segment, column = tl.program_id(0), tl.program_id(1)
    plane = tl.num_programs(1).to(tl.int64) * rows
    first = column.to(tl.int64) * rows + segment * SEGMENT
    length = tl.minimum(rows - segment * SEGMENT, SEGMENT)
    chunks = tl.cdiv(length, 32)
    program = column.to(tl.int64) * tl.num_programs(0) + segment

    state = tl.arange(0, STATES)
    words = decisions + program * tl.cdiv(SEGMENT, 32) * STATES + state
    grid = state // (STATES // 2)
    source = (state ^ (grid * FEEDBACK)) << 1 | grid
    from_even = source & (STATES - 1)
    from_odd = (source ^ (INPUT << 1)) & (STATES - 1)
    here = price + first + 2 * grid * plane
    cost = tl.where(state == 0, 0.0, 1e30)
    for chunk in range(chunks):
        # A lane keeps its own bits of 32 rows: packing them takes no other lane.
        bits = tl.zeros([STATES], tl.int32)
        for r in range(tl.minimum(length - chunk * 32, 32)):
            at = here + chunk * 32 + r
            even = tl.gather(cost, from_even, 0) + tl.load(at)
            odd = tl.gather(cost, from_odd, 0) + tl.load(at + plane)
            second = odd < even
            cost = tl.where(second, odd, even)
            bits |= second.to(tl.int32) << r
        tl.store(words + chunk * STATES, bits)
        if (chunk % 2 == 1) & (chunk * 32 + 32 <= length):
            cost -= tl.min(cost, 0)  # float32 goes on telling neighbours apart

    tl.debug_barrier()  # the words may come back to other lanes than stored them
    # The state on the path, the same in every lane: looking up its bit is then a shuffle, where a
    # scalar would wait for memory in every row.
    now = tl.zeros([STATES], tl.int32) + tl.argmin(cost, 0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        bits = tl.load(words + chunk * STATES)
        many = tl.minimum(length - chunk * 32, 32)
        for step in range(many):
            r = many - 1 - step
            parity = (tl.gather(bits, now, 0) >> r) & 1
            grid_now = now // (STATES // 2)
            row = path + first + chunk * 32 + r + 0 * state
            tl.store(row, (grid_now * 2 + parity).to(tl.uint8), mask=state == 0)
            before = (now ^ (grid_now * FEEDBACK) ^ (parity * INPUT)) << 1 | grid_now
            now = before & (STATES - 1)
