// Trellis (dependent) quantisation inside successive rounding, and the walk that undoes it.
// Plain data only: this header is compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill {

// The machine that says which of two reconstruction grids comes next:
//     grid = state & 1
//     next = (state >> 1) ^ (grid ? feedback : 0) ^ (k odd ? input : 0)
// a rate-1/2 convolutional code in observer form. The top bit of `feedback` is that of the state,
// `input` has it clear, so both ways into a state come from the same grid.
struct TrellisCode {
    unsigned states, feedback, input;
};

// Ungerboeck's codes for amplitude modulation (1982, table I), which a search confirmed: see
// docs/flagship.md. One state is plain rounding.
constexpr TrellisCode kTrellisCodes[] = {
    {1, 0, 0},     {4, 2, 1},     {8, 5, 2},      {16, 9, 2},
    {32, 18, 4},   {64, 33, 10},  {128, 78, 43},  {256, 166, 121},
};

// One block of `columns` consecutive input columns of a weight matrix, stored column by column
// (each column's `rows` values are contiguous). Columns are processed last to first.
struct TrellisBlock {
    TrellisCode code;
    size_t rows, columns, segment;  // a path restarts every `segment` rows
    const float* weight;            // (columns, rows) what the columns should become
    float* target;                  // (columns, rows) weight + carry from later blocks; updated in place
    const float* carry;             // (columns, columns) carry[k][j] = L[k][j] / L[j][j], used for k > j
    const float* step;              // (columns) reconstruction steps
    int32_t* index;                 // (columns, rows) out
    float* error;                   // (columns, rows) out: weight - reconstruction
};

struct TrellisKernels {
    void (*quantise)(const TrellisBlock& block, size_t first_row, size_t last_row);
    // index (rows, columns) -> values in units of the step, as float, same layout.
    void (*walk)(const TrellisCode& code, const int32_t* index, size_t rows, size_t columns, size_t segment,
                 const float* step, float* out);
};

namespace scalar { TrellisKernels trellis_kernels(); }
namespace avx2 { TrellisKernels trellis_kernels(); }
namespace avx512 { TrellisKernels trellis_kernels(); }

}  // namespace waterfill
