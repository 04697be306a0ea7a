// Rows of keys and values on their way to a file and back: formats, rotation, whole steps. Plain data
// only: this header is compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "floats.h"

namespace waterfill::cachegen {

// Pairs of dimensions that turn together.
struct Pairs {
    const int32_t *first, *second;
    size_t count;
};

// Of each pair: an angle, its cosine and its sine.
struct Angle { const double *angle, *cos, *sin; };

// How a component becomes symbols. Tokens of a column lie `together` side by side, `stride` bytes from
// one such group to the next.
struct Component {
    float offset;         // what is taken from it before it is counted in steps
    unsigned shift;       // bits that have a column of their own
    int32_t first, last;  // symbols that its model has
    float pull;           // part of a step towards zero that decoded points are moved
    size_t together, stride;
};

constexpr int kMiddle = 16;
constexpr size_t kTogether = 32;  // or one
constexpr float kReach = 1073741824.0f;  // steps; beyond, nothing is coded

// Where number i of 32 rows is: of the first n at a + i * a_step, of the others at b + i * b_step, in bytes,
// one row after another. Steps are no less than 32 numbers take. `free`: what follows the others, up to 32
// numbers, may be written to.
struct Sides {
    char *a, *b;
    int64_t a_step, b_step;
    size_t n;
    bool free;
};

// At most 32 rows of a head, side by side: number i of row r of a group is at i * 32 + r.
struct Kernels {
    // Rows of words to a group of floats; zeros where there is no row.
    void (*gather)(const void* const* rows, size_t count, Float format, size_t width, float* group);
    // A group to rows of words: to nearest, ties to even.
    void (*scatter)(const float* group, size_t count, Float format, size_t width, void* const* rows);
    // As these two of 32 rows whose number i lies side by side.
    void (*gather_sides)(const Sides& from, Float format, size_t width, char* spare, float* group);
    void (*scatter_sides)(const float* group, Float format, size_t width, const Sides& to);
    // Cosines and sines of a position's angles, each a base and some more and what these are missing.
    void (*add_angles)(const Angle& base, const Angle& more, const double* frequencies, double position, size_t pairs, float* cos, float* sin);
    // A group's rows turned by [pair][32] cosines and sines.
    void (*turn)(float* group, const Pairs& pairs, const float* cos, const float* sin);
    // A group of n numbers to one of m: number j is start[j] (null: 0) plus the sum over i, in order, of matrix[j * n + i] times number i.
    void (*transform)(const float* from, size_t n, const float* matrix, const float* start, size_t m, float* to);
    // A component of all tokens in whole steps: what is above the low bits, the nearest symbols, the low bits
    // (null: it has none). Bit 0 of the result: some have no symbol of their own; bit 1: some are too far from
    // zero, or no numbers.
    int (*quantise)(const float* z, size_t tokens, const Component& component, float inverse, int32_t* high, uint8_t* symbols, uint8_t* low);
    // As `quantise` of n components of 32 tokens that lie together, one's after another's: symbols of component i go
    // to `to` + columns[i], low bits to `to` + lows[i] (below 0: it has none). others[i] says whether some of it have
    // no symbol of their own, or are too far, and the result whether any has.
    bool (*quantise_sides)(const float* z, const Component* components, size_t n, float inverse, uint8_t* to, const int64_t* columns, const int64_t* lows, bool* others);
    // Symbols, and low bits (null: none), to a component of all tokens.
    void (*dequantise)(const uint8_t* symbols, const uint8_t* low, size_t tokens, const Component& component, float step, float* z);
};

}  // namespace waterfill::cachegen

namespace waterfill::scalar { const cachegen::Kernels& cachegen_kernels(); }
namespace waterfill::avx2 { const cachegen::Kernels& cachegen_kernels(); }
namespace waterfill::avx512 { const cachegen::Kernels& cachegen_kernels(); }
