// A matrix of small integers as vectors multiply it. Plain data only: this header is compiled once
// per instruction set. docs/packed.md has the layout.
#pragma once
#include <cstddef>
#include <cstdint>

#include "floats.h"

namespace waterfill::packed {

constexpr size_t kRows = 16;     // rows side by side in a block
constexpr size_t kColumns = 32;  // columns of a tile
constexpr size_t kVector = 64;   // bytes: a dword for each row of the block
constexpr size_t kChunkTiles = 4;  // at most, of a chunk
constexpr size_t kEntries = 16;  // of a table
constexpr size_t kMaxBatch = 16;
constexpr size_t kMaxSegments = 8;

// A correction is a dword, [column : 18][row of the block : 4][difference + 512 : 10]; those of a block
// are in rising order.
constexpr unsigned kDifferenceBits = 10, kColumnShift = 14;
constexpr int32_t kDifferenceZero = 512;

// Activations are levels up to 127, or two such numbers to the base 255.
constexpr int32_t kLargest = 127, kBase = 255;

// Consecutive tiles of one width.
struct Segment {
    unsigned bits;   // 2 to 8
    size_t first;    // tile
    size_t tiles;
    size_t offset;   // bytes from the start of a block
};

struct Matrix {
    size_t m, n;
    size_t blocks;        // of rows
    size_t tiles;         // of a block
    size_t chunks;        // runs of tiles, each within a segment, that share a scale of the activations
    size_t group_tiles;   // that share a scale of each row
    size_t chunk_tiles;   // divides group_tiles, or there is but one group
    size_t groups;
    size_t n_segments;
    Segment segments[kMaxSegments];
    size_t block_nbytes;
    const uint8_t* codes;      // (blocks, block_nbytes): level + 2^(bits - 1)
    const int8_t* table;       // (16) levels that 4-bit codes of the only segment stand for instead; or null
    const void* scales;        // (blocks, groups, 16)
    Float scale_type;          // f32 or f16
    const int32_t* order;      // (n) column of each place; null where they are the same
    const float* steps;        // (n) what a place's levels are multiplied by first; null for ones
    const int64_t* starts;     // (blocks + 1) of the block's corrections; null where there are none
    const uint32_t* corrections;
};

// Activations as integers. Tokens go through a kernel some at a time, a pass; its planes (one a
// token, or two for 15 bits) are interleaved dword by dword.
struct Activations {
    size_t batch;
    unsigned planes;
    int8_t* levels;  // by pass: (places / 4, planes of the pass, 4)
    int32_t* sums;   // by pass: (chunks, planes of the pass) sum of the chunk's levels
    float* scales;   // by pass: (chunks, tokens of the pass)
    float* values;   // (n, batch) before rounding, in the order of places; written where there are corrections
};

// Rows of floats in `type`, contiguous.
struct Reader {
    const void* at;
    Float type;
};
struct Writer {
    void* at;
    Float type;
};

// Source of `pack`: one block of rows.
struct Levels {
    const void* at;  // (m, n) int8, int16 or int32
    unsigned width;  // bytes of one
};

struct Kernels {
    // x (batch, n) -> integers with a scale for each chunk.
    void (*quantise)(const Matrix&, const Reader& x, const Activations&);
    // y (batch, m), the rows of blocks first .. last - 1.
    void (*multiply)(const Matrix&, const Activations&, size_t first, size_t last, const Writer& y);
    // Weights of `count` rows of one block into out (.., n), f32 or bf16, rows out[i] apart by n.
    void (*rows)(const Matrix&, size_t block, const uint8_t* rows, size_t count, void* const* out, Float type, uint8_t* scratch);
    // Codes of one block; corrections, or SIZE_MAX for more than `room` of them.
    size_t (*pack)(const Matrix&, const Levels&, size_t block, uint8_t* codes, uint32_t* corrections, size_t room);
    // Touches every byte, as fast as memory gives them.
    uint64_t (*read)(const uint8_t* bytes, size_t count);
};

}  // namespace waterfill::packed

namespace waterfill::scalar { const packed::Kernels& packed_kernels(); }
namespace waterfill::avx2 { const packed::Kernels& packed_kernels(); }
namespace waterfill::avx512 { const packed::Kernels& packed_kernels(); }
