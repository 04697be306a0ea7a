// Rows of keys and values on their way to a file and back: formats, rotation, whole steps. Plain data
// only: this header is compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "floats.h"

namespace waterfill::cachegen {

// Pairs of dimensions that turn together; `run` where each of the two lists counts up by one.
struct Pairs {
    const int32_t *first, *second;
    size_t count;
    bool run;
};

// How the components of a head become symbols.
struct Head {
    size_t count;
    const float* offset;                 // what is taken from each before it is counted in steps
    const uint8_t* shift;                // bits that have a column of their own
    const int32_t *first, *last;         // symbols that its model has
    const float *scale, *pull;           // of decoding: 2^shift, and part of a step towards zero
};

constexpr int kMiddle = 16;
constexpr float kReach = 1073741824.0f;  // steps; beyond, nothing is coded

struct Kernels {
    // A row to float, then turned by these cosines and sines (null: not).
    void (*read)(const void* from, Float format, size_t width, const Pairs& pairs, const float* cos, const float* sin, float* to);
    // A row plus a mean, turned, in a format: to nearest, ties to even.
    void (*write)(const float* from, const float* mean, size_t width, const Pairs& pairs, const float* cos, const float* sin, float* scratch, Float format, void* to);
    // Components in whole steps: what is above the low bits and of it the nearest symbol, and the low bits.
    // Bit 0 of the result: some have no symbol of their own; bit 1: some are too far from zero, or no numbers.
    int (*quantise)(const float* z, const Head& head, float inverse, int32_t* high, uint8_t* symbols, uint8_t* low);
    // Symbols, less the middle one, by their scale.
    void (*widen)(const uint8_t* symbols, const Head& head, float* steps);
    // Whole steps to components.
    void (*finish)(const Head& head, float step, float* steps);
};

}  // namespace waterfill::cachegen

namespace waterfill::scalar { const cachegen::Kernels& cachegen_kernels(); }
namespace waterfill::avx2 { const cachegen::Kernels& cachegen_kernels(); }
namespace waterfill::avx512 { const cachegen::Kernels& cachegen_kernels(); }
