// Attention of few queries over a cache: tokens as they were, and blocks of coded components. Plain data
// only: this header is compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace waterfill::cache {

constexpr size_t kBlock = 32;    // tokens that are coded together
constexpr size_t kChunk = 8;     // blocks whose softmax is taken together; results depend on it
constexpr size_t kSpans = 32;    // of an arena, about; results depend on it
constexpr size_t kColumns = 8;   // of a key that are decoded together
constexpr size_t kTokens = kChunk * kBlock;

// A component's codes: kBlock / 8 * bits bytes from `offset` in a block.
struct Component {
    uint32_t row, offset, bits;
};

// Keys or values: a head's vector is mean + sum of component * scale * row, where a component is its
// code - (2^(bits - 1) - 1/2).
struct Stream {
    size_t kept, width;
    const uint16_t* mean;         // float16 (heads, width)
    const int8_t* rows;           // (components, width)
    const uint16_t* scales;       // float16 (components,)
    const Component* components;  // of one head after another
    const uint32_t* first;        // of each head, and where the last one's end

    size_t count(size_t head) const { return first[head + 1] - first[head]; }
};

// Pairs of columns turn by their frequency for each token; the others stand still.
struct Turn {
    size_t pairs, padded;  // a multiple of kColumns / 2
    const int64_t *first, *second;
    const float *cos, *sin;        // (padded, kBlock), of the tokens of a block
    const double *ahead_cos, *ahead_sin;  // (padded,), from one block to the next
    bool still;  // whether there are others

    size_t columns() const { return 2 * padded; }
};

struct Block {
    const uint8_t *keys, *values;      // of the first row of the batch
    ptrdiff_t key_row, value_row;      // bytes between rows
};

// Keys' synthesis of a head in integers, for the columns that turn: column j of a key is
// shift[j] + scale[j] * sum of (code - 2^(bits - 1)) * entry.
struct Table {
    int32_t* entries;  // (columns / kColumns, component pairs, kColumns), two int16 of a pair of components
    float *scale, *shift;  // (columns,)
};

struct Arena {
    Stream keys, values;
    Turn turn;
    const Block* blocks;
    const Table* tables;  // of each head
};

// Consecutive blocks of an arena, at consecutive positions.
struct Span {
    const Arena* arena;
    size_t first, count;  // blocks
    size_t hidden;        // tokens at the beginning that nobody sees
    ptrdiff_t key;        // index of the first token in the mask, if it has one
    bool masked;
    const double *cos, *sin;  // (rows, padded) of the first token's position
    size_t phase_rows;        // of the batch, or one for all
};

// Shapes, queries and mask are the call's; its keys and values are not used.
struct Kernels {
    void (*prepare)(const Arena&, size_t head, const Table&);
    // As attention's `attend`, of a span instead of a chunk.
    void (*attend)(const attention::Call&, const Span&, size_t group, float* scratch, float* partial);
};

// Floats that `attend` needs beside its result.
inline size_t scratch_floats(const attention::Call& call, const Arena& arena) {
    const size_t rows = call.rows(), padded = arena.turn.padded, kept = arena.keys.kept, alignment = 16 * 16;
    const size_t row = 4 * padded + kTokens + kept + (arena.values.kept + 15) / 16 * 16 + call.key_width + 3;
    return rows * row + 4 * padded + (kept + 1) / 2 * kBlock + (kept + 1) * kBlock / 4 + alignment;
}

}  // namespace waterfill::cache

namespace waterfill::scalar { const cache::Kernels& cache_kernels(); }
namespace waterfill::avx2 { const cache::Kernels& cache_kernels(); }
namespace waterfill::avx512 { const cache::Kernels& cache_kernels(); }
