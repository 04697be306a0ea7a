// Trellis (dependent) quantisation inside successive rounding, and the walk that undoes it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill {

// One block of `columns` consecutive input columns of a weight matrix, stored column by column
// (each column's `rows` values are contiguous). Columns are processed last to first.
struct TrellisBlock {
    size_t rows, columns, segment;  // a path restarts every `segment` rows
    int states;                     // 1 or 4
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
    void (*walk)(const int32_t* index, size_t rows, size_t columns, size_t segment, int states,
                 const float* step, float* out);
};

namespace scalar { TrellisKernels trellis_kernels(); }
namespace avx2 { TrellisKernels trellis_kernels(); }
namespace avx512 { TrellisKernels trellis_kernels(); }

}  // namespace waterfill
