// Decoding of coded matrices and products with them, compiled once per instruction set. See coded.h,
// and docs/coded.md for the layout.
#include <cstring>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "coded.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the strings are read as they lie");

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace coded;

#include "coded_reader.h"

// Some rows of one panel: what decodes them, and the fields that come out, by lane: the lower five
// bits of each are 2 s + grid.
struct Tile {
    uint8_t* fields;   // (rows, kLanes)
    uint8_t* machine;  // (kLanes)
    const Matrix* matrix;
    const uint8_t* choice;      // of the panel, by the level of the row
    const uint8_t* row_levels;  // of each row
    const uint8_t* raw;         // planes, row after row
    size_t rows;

    size_t table(size_t row) const { return choice[row_levels[row]]; }
    const uint8_t* entries(size_t row) const { return matrix->tables + table(row) * kTableNbytes; }
    unsigned shift(size_t row) const { return matrix->shifts[table(row)]; }

    void advance(size_t done, const uint8_t* raw_left) {
        rows -= done;
        fields += done * kLanes;
        row_levels += done;
        raw = raw_left;
    }
};

// What turns fields into weights.
struct Levels {
    const Tile& tile;
    const float* units;   // (kLanes)
    const float* scales;  // of each row
    bool raw;             // whether any row has raw bits
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// To nearest, ties to even; weights are finite.
inline uint32_t rounded_bits(uint32_t bits, unsigned dropped) {
    return (bits + ((1u << (dropped - 1)) - 1) + (bits >> dropped & 1)) >> dropped << dropped;
}

inline float to_half(float value) {
    const uint32_t sign = bits_of(value) & 0x80000000u;
    const float size = float_of(bits_of(value) ^ sign);
    // Adding one half leaves the subnormal halves their 24 places after the point.
    const float small = (size + 0.5f) - 0.5f, normal = float_of(rounded_bits(bits_of(size), 13));
    const float half = size < 0x1p-14f ? small : size >= 65520.0f ? float_of(0x7F800000u) : normal;
    return float_of(bits_of(half) | sign);
}

inline float rounded(float value, Float dtype) {
    if (dtype == Float::bf16) return float_of(rounded_bits(bits_of(value), 16));
    return dtype == Float::f16 ? to_half(value) : value;
}

#if defined(WATERFILL_ISA_avx512)
#include "coded_avx512.h"
#include "coded_avx512_weights.h"
#elif defined(WATERFILL_ISA_avx2)
#include "coded_avx2.h"
#include "coded_avx2_weights.h"
#else
#include "coded_lanes.h"
#include "coded_weights.h"
#endif

#include "coded_walk.h"

const Kernels kTable{multiply, store, takes_bf16};

}  // namespace

const coded::Kernels& coded_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
