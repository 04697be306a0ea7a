// Included by rans_kernel.cpp, inside its namespace, where AVX-512 (F, BW, DQ, VL, VBMI, VBMI2) is on.

#define WATERFILL_UNROLL _Pragma("GCC unroll 8")

#include "rans_avx512_lanes.h"

// Two vectors that hold the even and the odd ones of 32 lanes take their words with one expansion:
// word 2 i of the expanded vector is for lane i of the first, word 2 i + 1 for lane i of the other.
inline void refill_pair(__m512i& even, __m512i& odd, const uint8_t*& at) {
    const __mmask16 low0 = _mm512_cmplt_epu32_mask(even, _mm512_set1_epi32(kLower));
    const __mmask16 low1 = _mm512_cmplt_epu32_mask(odd, _mm512_set1_epi32(kLower));
    const uint32_t low = _pdep_u32(low0, 0x55555555) | _pdep_u32(low1, 0xAAAAAAAA);
    const __m512i words = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(at));
    at += 2 * size_t(__builtin_popcount(low));
    even = _mm512_ternarylogic_epi32(_mm512_mask_slli_epi32(even, low0, even, 16), words, _mm512_set1_epi32(0xFFFF), 0xF8);
    odd = _mm512_mask_shldi_epi32(odd, low1, odd, words, 16);
}

inline __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }

// Packing leaves lane i of vector g in byte g of dword i; this puts each in its place.
struct LaneOrder {
    alignas(64) uint8_t from[64];
    constexpr explicit LaneOrder(bool paired) : from() {
        for (unsigned i = 0; i < 64; ++i)
            from[i] = uint8_t(paired ? 4 * (i % 32 / 2) + i / 32 * 2 + i % 2 : 4 * (i % 16) + i / 16);
    }
};
constexpr LaneOrder kInTurn{false}, kInPairs{true};

// Two vectors of 32 successive lanes <-> one of the even and one of the odd lanes.
inline void to_pair(__m512i& first, __m512i& second) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i even = _mm512_permutex2var_epi32(first, evens, second);
    second = _mm512_permutex2var_epi32(first, odds, second);
    first = even;
}

inline void from_pair(__m512i& even, __m512i& odd) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512i first = _mm512_permutex2var_epi32(even, low, odd);
    odd = _mm512_permutex2var_epi32(even, high, odd);
    even = first;
}

inline __m512i symbols_of(__m512i entry, int byte) {
    return byte == 0 ? _mm512_srli_epi32(entry, kSymbolShift)
           : byte == 1 ? _mm512_srli_epi32(entry, kSymbolShift - 8)
           : byte == 2 ? _mm512_slli_epi32(entry, 16 - kSymbolShift)
                       : _mm512_slli_epi32(entry, 24 - kSymbolShift);
}

// One class, whole rows of 16 * G lanes: states and both tables stay in registers, and the
// independent vectors of states hide the latency of each other's chains. With eight of them the
// shuffles are what is scarce, and lanes take their words in pairs of vectors.
template <int G>
size_t rows_in_registers(uint32_t* states, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    const uint32_t* table = tables.buckets + size_t(panel.uniform) * kBucketDwords;
    const __m512i primary0 = _mm512_loadu_si512(table), primary1 = _mm512_loadu_si512(table + 16);
    const __m512i alias0 = _mm512_loadu_si512(table + 32), alias1 = _mm512_loadu_si512(table + 48);
    const __m512i lut = _mm512_load_si512(tables.lut);
    constexpr bool kPaired = G == 8;
    const __m512i order = _mm512_load_si512((kPaired ? kInPairs : kInTurn).from);
    __m512i x[G];
    WATERFILL_UNROLL
    for (int g = 0; g < G; ++g) x[g] = _mm512_load_si512(states + 16 * g);
    WATERFILL_UNROLL
    for (int g = 0; kPaired && g < G; g += 2) to_pair(x[g], x[g + 1]);
    const uint8_t* at = cursor.at;
    uint8_t* out = panel.out;
    size_t row = 0;
    for (; row < panel.rows && at <= cursor.limit; ++row, out += panel.stride) {
        WATERFILL_UNROLL
        for (int first = 0; first < G; first += 4) {
            // Packed as soon as four are there: more entries in flight would not fit in registers.
            constexpr int kTogether = G < 4 ? G : 4;
            __m512i entry[kTogether];
            WATERFILL_UNROLL
            for (int j = 0; j < kTogether; ++j) {
                __m512i& state = x[first + j];
                const __m512i bucket = _mm512_srli_epi32(state, kBucketBits);
                entry[j] = advance(state, _mm512_permutex2var_epi32(primary0, bucket, primary1),
                                   _mm512_permutex2var_epi32(alias0, bucket, alias1));
                if (!kPaired)
                    state = refill(state, 0xFFFF, at);
                else if (j % 2)
                    refill_pair(x[first + j - 1], state, at);
            }
            __m512i packed = select(_mm512_set1_epi32(0xFF), symbols_of(entry[0], 0), symbols_of(entry[1], 1));
            if constexpr (G >= 4)
                packed = select(_mm512_set1_epi32(0xFFFF), packed,
                                select(_mm512_set1_epi32(0xFF0000), symbols_of(entry[2], 2), symbols_of(entry[3], 3)));
            packed = _mm512_and_si512(packed, _mm512_set1_epi32(0x1F1F1F1F));
            packed = _mm512_permutexvar_epi8(_mm512_permutexvar_epi8(order, packed), lut);
            if constexpr (G >= 4)
                _mm512_storeu_si512(out + 16 * first, packed);
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(packed));
        }
    }
    WATERFILL_UNROLL
    for (int g = 0; kPaired && g < G; g += 2) from_pair(x[g], x[g + 1]);
    WATERFILL_UNROLL
    for (int g = 0; g < G; ++g) _mm512_store_si512(states + 16 * g, x[g]);
    cursor.at = at;
    return row;
}

// Any widths and classes: sixteen lanes at a time, states in memory. Sixteen lanes of one class
// still find their tables by permutation; lanes of several classes gather from them.
size_t rows_by_group(uint32_t* states, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    constexpr unsigned kGroups = kMaxLanes / 16;
    const unsigned groups = (panel.width + 15) / 16;
    alignas(64) uint32_t base[kMaxLanes] = {};
    bool same[kGroups];
    __mmask16 lanes[kGroups];
    const size_t pitch = tables.slots ? kTotal : kBucketDwords;
    for (unsigned i = 0; i < panel.width; ++i) base[i] = uint32_t(class_of(panel, i) * pitch);
    for (unsigned g = 0; g < groups; ++g) {
        const unsigned width = panel.width - 16 * g < 16 ? panel.width - 16 * g : 16;
        lanes[g] = __mmask16((1u << width) - 1);
        same[g] = true;
        for (unsigned i = 1; i < width; ++i) same[g] &= base[16 * g + i] == base[16 * g];
    }
    const __m256i lut = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.lut));
    const uint8_t* at = cursor.at;
    size_t row = 0;
    for (; row < panel.rows && at <= cursor.limit; ++row) {
        uint8_t* out = panel.out + row * panel.stride;
        for (unsigned g = 0; g < groups; ++g) {
            __m512i x = _mm512_load_si512(states + 16 * g);
            __m128i symbols;
            if (tables.slots) {
                const __m512i slot = _mm512_and_si512(x, _mm512_set1_epi32(kTotal - 1));
                const __m512i index = _mm512_add_epi32(slot, _mm512_load_si512(base + 16 * g));
                const __m512i entry = _mm512_i32gather_epi32(index, tables.slots, 4);
                const __m512i low12 = _mm512_set1_epi32(0xFFF);
                const __m512i quotient = _mm512_srli_epi32(x, kScaleBits);
                const __m512i product = _mm512_mullo_epi32(_mm512_and_si512(entry, low12), quotient);
                const __m512i bias = _mm512_and_si512(_mm512_srli_epi32(entry, 12), low12);
                x = _mm512_add_epi32(_mm512_add_epi32(product, quotient), bias);
                symbols = _mm512_cvtepi32_epi8(_mm512_srli_epi32(entry, 24));
            } else {
                __m512i bucket = _mm512_srli_epi32(x, kBucketBits), primary, alias;
                if (same[g]) {
                    const uint32_t* table = tables.buckets + base[16 * g];
                    primary = _mm512_permutex2var_epi32(_mm512_loadu_si512(table), bucket, _mm512_loadu_si512(table + 16));
                    alias = _mm512_permutex2var_epi32(_mm512_loadu_si512(table + 32), bucket, _mm512_loadu_si512(table + 48));
                } else {
                    bucket = _mm512_and_si512(bucket, _mm512_set1_epi32(kBuckets - 1));
                    const __m512i index = _mm512_add_epi32(bucket, _mm512_load_si512(base + 16 * g));
                    primary = _mm512_i32gather_epi32(index, tables.buckets, 4);
                    alias = _mm512_i32gather_epi32(index, tables.buckets + kBuckets, 4);
                }
                const __m512i entry = advance(x, primary, alias);
                const __m512i symbol = _mm512_and_si512(_mm512_srli_epi32(entry, kSymbolShift), _mm512_set1_epi32(kBuckets - 1));
                symbols = _mm256_castsi256_si128(
                    _mm256_permutexvar_epi8(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(symbol)), lut));
            }
            _mm512_mask_store_epi32(states + 16 * g, lanes[g], refill(x, lanes[g], at));
            _mm_mask_storeu_epi8(out + 16 * g, lanes[g], symbols);
        }
    }
    cursor.at = at;
    return row;
}

size_t decode_rows(uint32_t* x, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    if (tables.buckets && !panel.classes) {
        if (panel.width == 128) return rows_in_registers<8>(x, cursor, panel, tables);
        if (panel.width == 64) return rows_in_registers<4>(x, cursor, panel, tables);
        if (panel.width == 32) return rows_in_registers<2>(x, cursor, panel, tables);
    }
    return rows_by_group(x, cursor, panel, tables);
}
