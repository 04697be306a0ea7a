// Trellis paths under rANS: every index is coded by the model of its scale (its column's level plus
// its row's) and of the grid its column's machine is on. Plain data only.
#pragma once
#include <cstddef>
#include <cstdint>

#include "rans.h"
#include "trellis.h"

namespace waterfill::paths {

constexpr unsigned kGroup = 16;  // lanes that take all words after their symbols before any after raw bits

// Symbol 0 stands for k = 0, symbols 1 .. 13 for |k| = ((symbol - 1) << shift) + low + 1; 14 and 15
// for any other k, one for each parity. All but 0 are followed by raw bits: the sign, then `low`.
constexpr unsigned kSymbols = 16;
constexpr unsigned kEscape = 14;
constexpr unsigned kCellBits = 8;  // log2 of the slots of an alias bucket
constexpr uint32_t kCellSlots = 1u << kCellBits;
constexpr unsigned kEasyShift = 3;  // one word refills a lane after a symbol and so many bits

// Alias entries as in rans.h, for 16 buckets of 256 slots, side by side: a vector fetches a lane's
// two at once. [level][grid][bucket][primary, alias]
constexpr unsigned kLevelDwords = 4 * kSymbols;

struct Model {
    const uint8_t* columns;  // level of each column, read up to a whole group
    const uint8_t* rows;     // of each row
    int32_t widening;        // a level has the shift max(0, (level + widening) >> precision)
    unsigned precision;
    TrellisCode code;
    size_t segment;  // rows after which the machine starts again
};

// An escaped index is decoded as a NaN that carries the grid: 0x7FC00000 + grid, 0x7FC0 + grid.
struct Block {
    const uint32_t* tables;  // [level][kLevelDwords]
    const uint8_t* states;
    unsigned n_states;
    const uint8_t* words;
    size_t n_words;
    const Model* model;
    bool shifted;        // whether any level has a shift
    const float* unit;   // of each column, read up to a whole group
    const float* scale;  // of each row
    float* out;          // exactly one of these two
    uint16_t* out_bf16;
    size_t stride;
    size_t row, col, rows, cols;  // the block's place in the matrix
    unsigned lanes;
    int32_t* machine;  // room for the states of its columns, up to a whole group
    uint8_t* tail;     // room for tail_nbytes(cols)
};

// Words that a row of a block may take or look at.
inline constexpr size_t row_words(size_t cols) { return 2 * (cols + 2 * kGroup); }
inline constexpr size_t tail_nbytes(size_t cols) { return 4 * row_words(cols) + 64; }

// What stands for each index: symbol, grid << 4, sign << 5.
struct Codes {
    const Model* model;
    const uint16_t* frequencies;  // [2 * level + grid][kSymbols]
    const int32_t* index;         // (rows, cols)
    size_t rows, cols;
    int32_t* machine;
    uint8_t* codes;
};

struct EncodeBlock {
    const rans::EncodeTables* tables;
    const Model* model;
    const uint8_t* codes;  // of the block's first column
    const int32_t* index;
    size_t stride;
    size_t row, col, rows, cols;
    unsigned lanes;
    uint32_t* states;     // `lanes` of them, written
    uint16_t* words_end;  // words are written downwards from here
};

// Occurrences of min(|k|, reach) by the level of the other axis and the grid:
// counts[column][row level][grid][reach + 1], or counts[row][column level][grid][reach + 1].
struct Tally {
    const uint8_t* columns;
    const uint8_t* row_levels;
    TrellisCode code;
    size_t segment;
    unsigned reach;
    const int32_t* index;
    size_t rows, cols;
    unsigned levels;  // of the other axis
    bool by_row;
    int32_t* machine;
    uint32_t* counts;
};

struct Kernels {
    rans::Status (*decode_block)(const Block&);
    void (*codes)(const Codes&);
    size_t (*encode_block)(const EncodeBlock&);  // number of words written
    void (*tally)(const Tally&);
};

}  // namespace waterfill::paths

namespace waterfill::scalar { const paths::Kernels& paths_kernels(); }
namespace waterfill::avx2 { const paths::Kernels& paths_kernels(); }
namespace waterfill::avx512 { const paths::Kernels& paths_kernels(); }
