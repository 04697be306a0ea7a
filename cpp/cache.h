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

// How blocks hold components.
//   whole    codes of so many bits each; a component is its code - (2^(bits - 1) - 1/2), times the gain
//            of the head's token
//   steps    symbols of an entropy coder (cachegen.h), by column
//   channel  codes on grids: of a channel of a block's keys, of some tokens' values
//   token    codes on grids of a token each, keys as attention gets them
//   plain    numbers of a format, keys as attention gets them
enum class Kind { whole, steps, channel, token, plain };

constexpr size_t kParts = 6;  // of a block, at most
constexpr unsigned kGainBits = 3;  // of a token's gain, of kind `whole`
constexpr size_t kGains = 1 << kGainBits;

// A component's codes: kBlock / 8 * bits bytes from `offset` in a block's part.
struct Component {
    uint32_t row, offset, bits;
};

// Where a component's symbols are: its column, that of its low bits or -1.
struct Column {
    int32_t column, low;
    uint32_t shift;
    float pull;
};

// Keys or values: a head's vector is mean + sum of component * scale * row. Without rows, components
// are the vector.
struct Stream {
    size_t kept, width;
    const uint16_t* mean;         // float16 (heads, width)
    const int8_t* rows;           // (components, width), or null
    const uint16_t* scales;       // float16 (components,)
    const Component* components;  // of one head after another
    const Column* columns;        // of kind `steps`, in the order of components
    const uint32_t* first;        // of each head, and where the last one's end
    size_t base;                  // components listed before its own
    size_t groups;                // of tokens that share a grid, of kind `channel`

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

// Parts of a block, of the first row of the batch, and bytes from there to the next row's.
struct Block {
    const uint8_t* parts[kParts];
    const ptrdiff_t* rows;

    const uint8_t* part(size_t i, size_t row) const { return parts[i] + ptrdiff_t(row) * rows[i]; }
};

// What no symbol stood for: how far a token's component is from its nearest, in units of its low bits.
struct Listed {
    uint32_t component, token;  // components of keys before those of values
    int32_t over;
};

// A block whose entropy coder is undone: symbols (column, kBlock).
struct Symbols {
    const uint8_t* at;
    float step;
    const Listed* listed;
    size_t count;
};

// Keys' synthesis of a head, for the columns that turn. Of codes in integers: column j of a key is
// shift[j] + gain * (middle[j] + scale[j] * sum of (code - 2^(bits - 1)) * entry). Else in floats: shift[j] +
// sum of component * real.
struct Table {
    int32_t* entries;  // (columns / kColumns, component pairs, kColumns), two int16 of a pair of components
    float* reals;      // (columns / kColumns, components, kColumns)
    float *scale, *shift, *middle;  // (columns,)
};

struct Arena {
    Kind kind;
    Stream keys, values;
    Turn turn;
    const Block* blocks;
    const Table* tables;  // of each head
    const float* sizes;   // of a grid's step, by its byte; of a token's gain
    Float format;         // of kind `plain`
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
    const Symbols* symbols;   // of each block, of one row of the batch, where the arena holds such
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
    const size_t row = 4 * padded + kTokens + kept + (arena.values.kept + 15) / 16 * 16 + call.key_width + 5;
    const size_t codes = arena.kind == Kind::whole ? (kept + 1) / 2 * kBlock + (kept + 1) * kBlock / 4 : kept * kBlock;
    return rows * row + 4 * padded + codes + alignment;
}

}  // namespace waterfill::cache

namespace waterfill::scalar { const cache::Kernels& cache_kernels(); }
namespace waterfill::avx2 { const cache::Kernels& cache_kernels(); }
namespace waterfill::avx512 { const cache::Kernels& cache_kernels(); }
