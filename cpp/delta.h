// What the delta kernels and their callers share. Plain data and constants only, as in rans.h.
//
// The bitstream itself is described in docs/format/delta.md.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill::delta {

constexpr size_t kBlock = size_t(1) << 20;
constexpr unsigned kGroup = 64;
constexpr unsigned kDirect = 16;
constexpr unsigned kGapSymbols = 48;
constexpr unsigned kMaxContexts = 32;
// To choose contexts one run of elements in up to so many is counted; a small tensor is counted whole.
constexpr size_t kMostEvery = 16, kCounted = size_t(1) << 16, kRun = 1024;

// How a dtype's bits are ordered, and where its exponent lies.
struct Words {
    unsigned width;
    bool has_sign;
    unsigned shift;
    uint32_t mask;
    uint32_t offset;

    constexpr unsigned size_symbols() const { return kDirect + 2 * (8 * width - 4); }
};

// Contexts are runs of exponents: `first[k]` begins context k + 1.
struct Contexts {
    const uint8_t* first;
    unsigned count;  // of contexts, one more than there are firsts
};

struct Change {
    uint64_t size;     // steps in zigzag, less one
    uint32_t gap;      // elements of its context between it and the change before
    uint32_t context;
};

// Elements before the next change where there is none: more than a block has, and no sign bit.
constexpr uint32_t kNever = 1u << 30;

// The changes of one context, in order; `end` is one too, whose gap is kNever.
struct Run {
    const Change* at;
    const Change* end;
};

struct Kernels {
    // Adds to elements[256] and sizes[256][size_symbols] what one run in `every` of a block has.
    void (*survey)(const Words&, const uint8_t* old, const uint8_t* now, size_t n, size_t every, int64_t* elements, int64_t* sizes);
    // Writes the changes of one block to `out`, which has room for n; those of a context in order.
    size_t (*find)(const Words&, const Contexts&, const uint8_t* old, const uint8_t* now, size_t n, Change* out);
    // False where a change lies beyond the block. `out` may be `old`.
    bool (*apply)(const Words&, const Contexts&, const uint8_t* old, uint8_t* out, size_t n, Run* runs);
};

}  // namespace waterfill::delta

namespace waterfill::scalar { const delta::Kernels& delta_kernels(); }
namespace waterfill::avx2 { const delta::Kernels& delta_kernels(); }
namespace waterfill::avx512 { const delta::Kernels& delta_kernels(); }
