// Trellis paths under rANS: every index is coded by the model of its scale (its column's level plus
// its row's) and of the grid its column's machine is on. Plain data only.
#pragma once
#include <cstddef>
#include <cstdint>

#include "rans.h"
#include "trellis.h"

namespace waterfill::paths {

// Symbol s stands for the index s - reach; the last two of the alphabet for any other index, one
// for each parity (the machine must know it). Context 2 * (column level + row level) + grid.
struct Model {
    const uint8_t* columns;  // level of each column
    const uint8_t* rows;     // of each row
    TrellisCode code;
    size_t segment;  // rows after which the machine starts again
    unsigned reach;
};

// An escaped index is decoded as a NaN that carries the grid: 0x7FC00000 + grid, 0x7FC0 + grid.
struct Block {
    const rans::DecodeTables* tables;
    const uint8_t* states;
    unsigned n_states;
    const uint8_t* words;
    size_t n_words;
    const Model* model;
    const float* step;   // of each column
    const float* scale;  // of each row
    float* out;          // exactly one of these two
    uint16_t* out_bf16;
    size_t stride;
    size_t row, col, rows, cols;  // the block's place in the matrix
    unsigned lanes;
};

// Context and symbol of every index; `escaped` where the model does not know it.
struct Contexts {
    const Model* model;
    const uint16_t* frequencies;  // [context][2 * reach + 3]
    const int32_t* index;         // (rows, cols)
    size_t rows, cols;
    uint8_t* contexts;
    uint8_t* symbols;
    uint8_t* escaped;
};

// Occurrences of min(|k|, reach) by the level of the other axis and the grid:
// counts[column][row level][grid][reach + 1], or counts[row][column level][grid][reach + 1].
struct Tally {
    const Model* model;
    const int32_t* index;
    size_t rows, cols;
    unsigned levels;  // of the other axis
    bool by_row;
    uint32_t* counts;
};

struct Kernels {
    rans::Status (*decode_block)(const Block&);
    void (*contexts)(const Contexts&);
    void (*tally)(const Tally&);
};

}  // namespace waterfill::paths

namespace waterfill::scalar { const paths::Kernels& paths_kernels(); }
namespace waterfill::avx2 { const paths::Kernels& paths_kernels(); }
namespace waterfill::avx512 { const paths::Kernels& paths_kernels(); }
