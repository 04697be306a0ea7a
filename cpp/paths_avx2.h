// Included by paths_kernel.cpp, inside its namespace, where AVX2 is on.

#include "rans_avx2_lanes.h"

// The two alias entries of each lane's bucket, gathered as eight pairs. Lanes are put in the order
// 0 1 4 5 2 3 6 7 first, so that one shuffle sorts primaries and aliases.
inline void gather_pairs(const uint32_t* buckets, __m256i at, __m256i& primary, __m256i& alias) {
    const long long* pairs = reinterpret_cast<const long long*>(buckets);
    const __m256i order = _mm256_permute4x64_epi64(at, 0xD8);
    const __m256i low = _mm256_i32gather_epi64(pairs, _mm256_castsi256_si128(order), 8);
    const __m256i high = _mm256_i32gather_epi64(pairs, _mm256_extracti128_si256(order, 1), 8);
    primary = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0x88));
    alias = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0xDD));
}

inline __m256i by_slot(__m256i& x, const uint32_t* slots, __m256i context) {
    const __m256i low12 = _mm256_set1_epi32(0xFFF), quotient = _mm256_srli_epi32(x, kScaleBits);
    const __m256i index = _mm256_add_epi32(_mm256_and_si256(x, low12), _mm256_slli_epi32(context, kScaleBits));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(slots), index, 4);
    const __m256i product = _mm256_mullo_epi32(_mm256_and_si256(entry, low12), quotient);
    x = _mm256_add_epi32(_mm256_add_epi32(product, quotient), _mm256_and_si256(_mm256_srli_epi32(entry, 12), low12));
    return _mm256_srli_epi32(entry, 24);
}

inline __m256i by_bucket(__m256i& x, const uint32_t* buckets, __m256i context) {
    const __m256i bucket = _mm256_and_si256(_mm256_srli_epi32(x, kBucketBits), _mm256_set1_epi32(kBuckets - 1));
    __m256i primary, alias;
    gather_pairs(buckets, _mm256_or_si256(_mm256_slli_epi32(context, 5), bucket), primary, alias);
    return symbols_of(advance(x, primary, alias));
}
static_assert(kBuckets == 32, "five bits of bucket");

inline void store8(float* out, __m256 values) { _mm256_storeu_ps(out, values); }
inline void store8(uint16_t* out, __m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

// Whole: the panel's width is a multiple of eight, and no lane has to rest.
template <bool Slots, bool Whole, class Out>
size_t rows_of(uint32_t* states, Cursor& cursor, const Panel<Out>& panel) {
    const Block& block = panel.block;
    const Model& model = *block.model;
    // What each lane needs, padded to whole vectors: lanes beyond the panel's width rest.
    alignas(32) int32_t column[kMaxLanes] = {}, active[kMaxLanes] = {};
    alignas(32) float step[kMaxLanes] = {};
    for (unsigned i = 0; i < panel.width; ++i) {
        column[i] = 2 * model.columns[panel.col + i];
        step[i] = block.step[panel.col + i];
        active[i] = -1;
    }
    const __m256i feedback = _mm256_set1_epi32(int(model.code.feedback)), input = _mm256_set1_epi32(int(model.code.input));
    const __m256i reach = _mm256_set1_epi32(int(model.reach)), one = _mm256_set1_epi32(1), zero = _mm256_setzero_si256();
    const uint8_t* at = cursor.at;
    size_t done = 0;
    for (; done < panel.rows && at <= cursor.limit; ++done) {
        const size_t row = panel.row + done;
        if (row % model.segment == 0) std::memset(panel.machine, 0, sizeof(int32_t) * kMaxLanes);
        const __m256i level = _mm256_set1_epi32(2 * model.rows[row]);
        const __m256 scale = _mm256_set1_ps(block.scale[row]);
        Out* out = panel.out + done * block.stride;
        for (unsigned i = 0; i < panel.width; i += 8) {
            __m256i x = load(states + i);
            const __m256i machine = load(panel.machine + i), grid = _mm256_and_si256(machine, one);
            const __m256i context = _mm256_or_si256(_mm256_add_epi32(load(column + i), level), grid);
            const __m256i symbol = Slots ? by_slot(x, block.tables->slots, context) : by_bucket(x, block.tables->buckets, context);
            const __m256i lanes = Whole ? _mm256_set1_epi32(-1) : load(active + i);
            x = refill(x, Whole ? below_lower(x) : _mm256_and_si256(below_lower(x), lanes), at);
            if (Whole) _mm256_store_si256(reinterpret_cast<__m256i*>(states + i), x);
            else _mm256_maskstore_epi32(reinterpret_cast<int*>(states + i), lanes, x);
            const __m256i k = _mm256_sub_epi32(symbol, reach);
            const __m256i fed = _mm256_and_si256(feedback, _mm256_sub_epi32(zero, grid));
            const __m256i driven = _mm256_and_si256(input, _mm256_sub_epi32(zero, _mm256_and_si256(k, one)));
            const __m256i next = _mm256_xor_si256(_mm256_srli_epi32(machine, 1), _mm256_xor_si256(fed, driven));
            _mm256_store_si256(reinterpret_cast<__m256i*>(panel.machine + i), next);
            const __m256i levels = _mm256_sub_epi32(_mm256_add_epi32(k, k), _mm256_sign_epi32(grid, k));
            const __m256 values = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(levels), _mm256_load_ps(step + i)), scale);
            if (Whole || i + 8 <= panel.width) {
                store8(out + i, values);
            } else {
                alignas(32) float rest[8];
                _mm256_store_ps(rest, values);
                for (unsigned j = 0; i + j < panel.width; ++j) store(out + i + j, rest[j], 0, false);
            }
            const unsigned escaped = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(Whole ? _mm256_cmpgt_epi32(k, reach) : _mm256_and_si256(_mm256_cmpgt_epi32(k, reach), lanes))));
            if (__builtin_expect(escaped != 0, 0)) {
                alignas(32) int32_t grids[8];
                _mm256_store_si256(reinterpret_cast<__m256i*>(grids), grid);
                for (unsigned j = 0; j < 8; ++j)
                    if (escaped >> j & 1) store(out + i + j, 0.0f, 0x7FC00000u | uint32_t(grids[j]), true);
            }
        }
    }
    cursor.at = at;
    return done;
}

template <class Out> size_t decode_rows(uint32_t* x, Cursor& cursor, const Panel<Out>& panel) {
    if (panel.block.tables->slots) return rows_of<true, false>(x, cursor, panel);
    return panel.width % 8 ? rows_of<false, false>(x, cursor, panel) : rows_of<false, true>(x, cursor, panel);
}
