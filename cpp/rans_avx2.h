// Included by rans_kernel.cpp, inside its namespace, where AVX2 is on.

#include "rans_avx2_lanes.h"

// 32 dwords looked up by the low five bits of `index`; bits 3 and 4 arrive as signs.
inline __m256i lookup(const uint32_t* table, __m256i index, __m256i bit3, __m256i bit4) {
    const auto part = [&](int i) { return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(load(table + 8 * i), index)); };
    const __m256 b3 = _mm256_castsi256_ps(bit3), b4 = _mm256_castsi256_ps(bit4);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_blendv_ps(part(0), part(1), b3),
                                                _mm256_blendv_ps(part(2), part(3), b3), b4));
}

inline __m256i one_class(__m256i& x, const uint32_t* table) {
    const __m256i bucket = _mm256_srli_epi32(x, kBucketBits);
    const __m256i bit3 = _mm256_slli_epi32(x, 31 - kBucketBits - 3), bit4 = _mm256_slli_epi32(x, 31 - kBucketBits - 4);
    return advance(x, lookup(table, bucket, bit3, bit4), lookup(table + kBuckets, bucket, bit3, bit4));
}

// Bytes of a 32-entry table chosen by 32 indices.
inline __m256i translate(__m256i index, __m256i low, __m256i high) {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index), _mm256_slli_epi16(index, 3));
}

// One class, rows of a multiple of 32 lanes.
size_t rows_of_one_class(uint32_t* states, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    const uint32_t* table = tables.buckets + size_t(panel.uniform) * kBucketDwords;
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables.lut)));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables.lut + 16)));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const uint8_t* at = cursor.at;
    size_t row = 0;
    for (; row < panel.rows && at <= cursor.limit; ++row) {
        uint8_t* out = panel.out + row * panel.stride;
        for (unsigned i = 0; i < panel.width; i += 32) {
            __m256i symbols[4];
            _Pragma("GCC unroll 4")
            for (unsigned j = 0; j < 4; ++j) {
                __m256i x = load(states + i + 8 * j);
                symbols[j] = symbols_of(one_class(x, table));
                x = refill(x, below_lower(x), at);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(states + i + 8 * j), x);
            }
            const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(symbols[0], symbols[1]),
                                                       _mm256_packus_epi32(symbols[2], symbols[3]));
            const __m256i ordered = _mm256_permutevar8x32_epi32(packed, order);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), translate(ordered, low, high));
        }
    }
    cursor.at = at;
    return row;
}

// Any widths and classes: eight lanes at a time.
size_t rows_by_group(uint32_t* states, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    alignas(32) uint32_t base[kMaxLanes] = {}, active[kMaxLanes] = {};
    bool same[kMaxLanes / 8];
    const unsigned groups = (panel.width + 7) / 8;
    const size_t pitch = tables.slots ? kTotal : kBucketDwords;
    for (unsigned i = 0; i < panel.width; ++i) {
        base[i] = uint32_t(class_of(panel, i) * pitch);
        active[i] = ~0u;
    }
    for (unsigned g = 0; g < groups; ++g) {
        same[g] = true;
        for (unsigned i = 8 * g; i < 8 * g + 8 && i < panel.width; ++i) same[g] &= base[i] == base[8 * g];
    }
    const uint8_t* at = cursor.at;
    size_t row = 0;
    for (; row < panel.rows && at <= cursor.limit; ++row) {
        uint8_t* out = panel.out + row * panel.stride;
        for (unsigned g = 0; g < groups; ++g) {
            __m256i x = load(states + 8 * g), symbols;
            if (tables.slots) {
                const __m256i low12 = _mm256_set1_epi32(0xFFF), quotient = _mm256_srli_epi32(x, kScaleBits);
                const __m256i index = _mm256_add_epi32(_mm256_and_si256(x, low12), load(base + 8 * g));
                const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(tables.slots), index, 4);
                const __m256i product = _mm256_mullo_epi32(_mm256_and_si256(entry, low12), quotient);
                const __m256i bias = _mm256_and_si256(_mm256_srli_epi32(entry, 12), low12);
                x = _mm256_add_epi32(_mm256_add_epi32(product, quotient), bias);
                symbols = _mm256_srli_epi32(entry, 24);
            } else if (same[g]) {
                symbols = symbols_of(one_class(x, tables.buckets + base[8 * g]));
            } else {
                const __m256i bucket = _mm256_and_si256(_mm256_srli_epi32(x, kBucketBits), _mm256_set1_epi32(kBuckets - 1));
                const __m256i index = _mm256_add_epi32(bucket, load(base + 8 * g));
                const int* table = reinterpret_cast<const int*>(tables.buckets);
                symbols = symbols_of(advance(x, _mm256_i32gather_epi32(table, index, 4),
                                             _mm256_i32gather_epi32(table + kBuckets, index, 4)));
            }
            // A lane beyond the panel's width keeps its state for the end check.
            const __m256i lanes = load(active + 8 * g);
            x = refill(x, _mm256_and_si256(below_lower(x), lanes), at);
            _mm256_maskstore_epi32(reinterpret_cast<int*>(states + 8 * g), lanes, x);
            const __m256i pairs = _mm256_packus_epi32(symbols, symbols);
            const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(pairs, pairs), _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
            const uint64_t eight = uint64_t(_mm_cvtsi128_si64(_mm256_castsi256_si128(bytes)));
            const unsigned width = panel.width - 8 * g < 8 ? panel.width - 8 * g : 8;
            if (width == 8) {
                std::memcpy(out + 8 * g, &eight, 8);
            } else {
                for (unsigned i = 0; i < width; ++i) out[8 * g + i] = uint8_t(eight >> (8 * i));
            }
        }
        if (tables.buckets && !tables.identity)
            for (unsigned i = 0; i < panel.width; ++i) out[i] = tables.lut[out[i]];
    }
    cursor.at = at;
    return row;
}

size_t decode_rows(uint32_t* x, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    if (tables.buckets && !panel.classes && panel.width % 32 == 0) return rows_of_one_class(x, cursor, panel, tables);
    return rows_by_group(x, cursor, panel, tables);
}
