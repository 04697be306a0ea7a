// Included by paths_kernel.cpp, inside its namespace, where AVX2 is on.

#include "rans_avx2_lanes.h"

// Two entries for each of four lanes: 0 1 and 4 5 of `at`. Loads one by one: the gathering
// instruction is slower, by far on some machines.
inline __m256 pairs(const uint64_t* tables, const uint32_t* at) {
    const auto two = [&](int i) { return _mm_loadh_pd(_mm_load_sd(reinterpret_cast<const double*>(tables + at[i])), reinterpret_cast<const double*>(tables + at[i + 1])); };
    return _mm256_castpd_ps(_mm256_insertf128_pd(_mm256_castpd128_pd256(two(0)), two(4), 1));
}

// One symbol off each state.
inline __m256i take(__m256i& x, const uint32_t* tables, __m256i level, __m256i grid) {
    const __m256i bucket = _mm256_and_si256(_mm256_srli_epi32(x, kCellBits), _mm256_set1_epi32(kSymbols - 1));
    alignas(32) uint32_t at[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm256_or_si256(_mm256_slli_epi32(_mm256_add_epi32(_mm256_add_epi32(level, level), grid), 4), bucket));
    const uint64_t* entries = reinterpret_cast<const uint64_t*>(tables);
    const __m256 even = pairs(entries, at), odd = pairs(entries, at + 2);
    const __m256i primary = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0x88)), alias = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0xDD));
    const __m256i entry = advance<kCellBits>(x, primary, alias);
    return _mm256_and_si256(_mm256_srli_epi32(entry, kSymbolShift), _mm256_set1_epi32(kSymbols - 1));
}

inline void store8(float* out, __m256i bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits); }
inline void store8(uint16_t* out, __m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
template <class Out> inline void store_first(Out* out, size_t count, __m256i bits) {
    Out values[8];
    store8(values, bits);
    std::memcpy(out, values, count * sizeof(Out));
}

// A NaN that carries the grid where it will be once rounded to what is stored.
template <class Out> inline __m256i with_escapes(__m256i values, __m256i escaped, __m256i grid) {
    if (__builtin_expect(_mm256_testz_si256(escaped, escaped), 1)) return values;
    const __m256i carried = sizeof(Out) == 4 ? grid : _mm256_slli_epi32(grid, 16);
    return _mm256_blendv_epi8(values, _mm256_or_si256(carried, _mm256_set1_epi32(0x7FC00000)), escaped);
}

template <bool Shifted, class Out> void decode_by_group(uint32_t* states, const uint8_t*& cursor, const Row& row, Out* out) {
    const Block& block = row.block;
    const Model& model = *block.model;
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1), all = _mm256_set1_epi32(-1);
    const __m256i feedback = _mm256_set1_epi32(int(model.code.feedback)), input = _mm256_set1_epi32(int(model.code.input));
    const __m256i counted = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 scale = _mm256_set1_ps(row.scale);
    const uint8_t* at = cursor;
    for (size_t first = 0; first < block.cols; first += kGroup) {
        const size_t left = block.cols - first;
        __m256i x[2], lanes[2], symbol[2], shift[2];
        for (int i = 0; i < 2; ++i) {
            const size_t col = first + 8 * size_t(i);
            lanes[i] = left >= kGroup ? all : _mm256_cmpgt_epi32(_mm256_set1_epi32(int(left) - 8 * i), counted);
            x[i] = load(states + (col & (block.lanes - 1)));
            const __m128i columns = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(model.columns + block.col + col));
            const __m256i level = _mm256_add_epi32(_mm256_cvtepu8_epi32(columns), _mm256_set1_epi32(int(row.level)));
            symbol[i] = take(x[i], block.tables, level, _mm256_and_si256(load(block.machine + col), one));
            if constexpr (Shifted) {
                const __m256i octaves = _mm256_sra_epi32(_mm256_add_epi32(level, _mm256_set1_epi32(model.widening)), _mm_cvtsi32_si128(int(model.precision)));
                shift[i] = _mm256_max_epi32(octaves, zero);
                const __m256i hard = _mm256_and_si256(_mm256_cmpgt_epi32(shift[i], _mm256_set1_epi32(kEasyShift)), lanes[i]);
                x[i] = refill(x[i], _mm256_and_si256(below_lower(x[i]), hard), at);
            }
        }
        for (int i = 0; i < 2; ++i) {
            const size_t col = first + 8 * size_t(i);
            const __m256i machine = load(block.machine + col), grid = _mm256_and_si256(machine, one);
            const __m256i some = _mm256_cmpgt_epi32(symbol[i], zero), raw = x[i];
            __m256i size = symbol[i], bits = _mm256_and_si256(some, one);
            if constexpr (Shifted) {
                const __m256i low = _mm256_andnot_si256(_mm256_sllv_epi32(all, shift[i]), _mm256_srli_epi32(raw, 1));
                const __m256i base = _mm256_sllv_epi32(_mm256_sub_epi32(symbol[i], one), shift[i]);
                size = _mm256_and_si256(some, _mm256_add_epi32(_mm256_add_epi32(base, low), one));
                bits = _mm256_and_si256(some, _mm256_add_epi32(shift[i], one));
            }
            x[i] = _mm256_srlv_epi32(x[i], bits);
            x[i] = refill(x[i], _mm256_and_si256(below_lower(x[i]), lanes[i]), at);
            // Whole, as what is stored under a mask is slow to come back.
            uint32_t* state = states + (col & (block.lanes - 1));
            _mm256_store_si256(reinterpret_cast<__m256i*>(state), left >= kGroup ? x[i] : _mm256_blendv_epi8(load(state), x[i], lanes[i]));
            const __m256i fed = _mm256_and_si256(feedback, _mm256_sub_epi32(zero, grid));
            const __m256i driven = _mm256_and_si256(input, _mm256_sub_epi32(zero, _mm256_and_si256(size, one)));
            const __m256i next = _mm256_xor_si256(_mm256_srli_epi32(machine, 1), _mm256_xor_si256(fed, driven));
            _mm256_store_si256(reinterpret_cast<__m256i*>(block.machine + col), next);
            const __m256 points = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(size, size), grid));
            const __m256 sized = _mm256_mul_ps(_mm256_mul_ps(points, _mm256_loadu_ps(block.unit + block.col + col)), scale);
            const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(raw, 31), some);
            const __m256i escaped = _mm256_cmpgt_epi32(symbol[i], _mm256_set1_epi32(kEscape - 1));
            const __m256i values = with_escapes<Out>(_mm256_xor_si256(_mm256_castps_si256(sized), sign), escaped, grid);
            if (left >= kGroup) store8(out + col, values);
            else if (left > 8 * size_t(i)) store_first(out + col, smaller(8, left - 8 * size_t(i)), values);
        }
    }
    cursor = at;
}
