// Included by paths_kernel.cpp, inside its namespace, where AVX-512 (F, BW, DQ, VL, VBMI, VBMI2) is on.

#include "rans_avx512_lanes.h"

// Two entries for each of eight lanes: 0 1, 4 5, 8 9 and 12 13 of `at`. Loads one by one: the
// gathering instruction is slower, by far on some machines.
inline __m512 pairs(const uint64_t* tables, const uint32_t* at) {
    const auto two = [&](int i) { return _mm_loadh_pd(_mm_load_sd(reinterpret_cast<const double*>(tables + at[i])), reinterpret_cast<const double*>(tables + at[i + 1])); };
    const __m256d low = _mm256_insertf128_pd(_mm256_castpd128_pd256(two(0)), two(4), 1);
    const __m256d high = _mm256_insertf128_pd(_mm256_castpd128_pd256(two(8)), two(12), 1);
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1));
}

// One symbol off each state; returns the chosen entries.
inline __m512i take(__m512i& x, const uint32_t* tables, __m512i level, __m512i grid) {
    const __m512i bucket = _mm512_and_si512(_mm512_srli_epi32(x, kCellBits), _mm512_set1_epi32(kSymbols - 1));
    alignas(64) uint32_t at[kGroup];
    _mm512_store_si512(at, _mm512_or_si512(_mm512_slli_epi32(_mm512_add_epi32(_mm512_add_epi32(level, level), grid), 4), bucket));
    const uint64_t* entries = reinterpret_cast<const uint64_t*>(tables);
    const __m512 even = pairs(entries, at), odd = pairs(entries, at + 2);
    const __m512i primary = _mm512_castps_si512(_mm512_shuffle_ps(even, odd, 0x88)), alias = _mm512_castps_si512(_mm512_shuffle_ps(even, odd, 0xDD));
    return advance<kCellBits>(x, primary, alias);
}

inline void store16(float* out, __m512i bits) { _mm512_storeu_si512(out, bits); }
inline void store16(uint16_t* out, __m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
template <class Out> inline void store_first(Out* out, size_t count, __m512i bits) {
    Out values[kGroup];
    store16(values, bits);
    std::memcpy(out, values, count * sizeof(Out));
}

// A NaN that carries the grid where it will be once rounded to what is stored.
template <class Out> inline __m512i with_escapes(__m512i values, __mmask16 escaped, __m512i grid) {
    if (__builtin_expect(escaped == 0, 1)) return values;
    const __m512i carried = sizeof(Out) == 4 ? grid : _mm512_slli_epi32(grid, 16);
    return _mm512_mask_or_epi32(values, escaped, carried, _mm512_set1_epi32(0x7FC00000));
}

template <bool Shifted, class Out> void decode_by_group(uint32_t* states, const uint8_t*& cursor, const Row& row, Out* out) {
    const Block& block = row.block;
    const Model& model = *block.model;
    const __m512i one = _mm512_set1_epi32(1), feedback = _mm512_set1_epi32(int(model.code.feedback)), input = _mm512_set1_epi32(int(model.code.input));
    const __m512 scale = _mm512_set1_ps(row.scale);
    const uint8_t* at = cursor;
    for (size_t first = 0; first < block.cols; first += kGroup) {
        const size_t left = block.cols - first;
        const __mmask16 lanes = __mmask16(left < kGroup ? (1u << left) - 1 : 0xFFFF);
        uint32_t* state = states + (first & (block.lanes - 1));
        int32_t* to_machine = block.machine + first;
        const __m128i columns = _mm_loadu_si128(reinterpret_cast<const __m128i*>(model.columns + block.col + first));
        const __m512i level = _mm512_add_epi32(_mm512_cvtepu8_epi32(columns), _mm512_set1_epi32(int(row.level)));
        __m512i x = _mm512_load_si512(state), machine = _mm512_load_si512(to_machine);
        const __m512i grid = _mm512_and_si512(machine, one), entry = take(x, block.tables, level, grid);
        const __m512i symbol = _mm512_and_si512(_mm512_srli_epi32(entry, kSymbolShift), _mm512_set1_epi32(kSymbols - 1));
        const __mmask16 some = _mm512_test_epi32_mask(symbol, symbol);
        __m512i size = symbol, raw = x;
        if constexpr (Shifted) {
            const __m512i octaves = _mm512_sra_epi32(_mm512_add_epi32(level, _mm512_set1_epi32(model.widening)), _mm_cvtsi32_si128(int(model.precision)));
            const __m512i shift = _mm512_max_epi32(octaves, _mm512_setzero_si512());
            x = refill(x, _mm512_mask_cmpgt_epi32_mask(lanes, shift, _mm512_set1_epi32(kEasyShift)), at);
            raw = x;
            const __m512i low = _mm512_andnot_si512(_mm512_sllv_epi32(_mm512_set1_epi32(-1), shift), _mm512_srli_epi32(raw, 1));
            const __m512i base = _mm512_sllv_epi32(_mm512_sub_epi32(symbol, one), shift);
            size = _mm512_maskz_add_epi32(some, _mm512_add_epi32(base, low), one);
            x = _mm512_mask_srlv_epi32(x, some, x, shift);
        }
        x = refill(_mm512_mask_srli_epi32(x, some, x, 1), lanes, at);
        // Whole, as what is stored under a mask is slow to come back.
        _mm512_store_si512(state, _mm512_mask_mov_epi32(_mm512_load_si512(state), lanes, x));
        const __mmask16 odd = _mm512_test_epi32_mask(size, one), on_odd = _mm512_test_epi32_mask(machine, one);
        machine = _mm512_srli_epi32(machine, 1);
        machine = _mm512_mask_xor_epi32(machine, on_odd, machine, feedback);
        _mm512_store_si512(to_machine, _mm512_mask_xor_epi32(machine, odd, machine, input));
        const __m512 points = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(size, size), grid));
        const __m512 sized = _mm512_mul_ps(_mm512_mul_ps(points, _mm512_loadu_ps(block.unit + block.col + first)), scale);
        const __m512i values = _mm512_xor_si512(_mm512_castps_si512(sized), _mm512_maskz_slli_epi32(some, raw, 31));
        const __mmask16 escaped = _mm512_cmpge_epi32_mask(symbol, _mm512_set1_epi32(kEscape));
        if (left >= kGroup) store16(out + first, with_escapes<Out>(values, escaped, grid));
        else store_first(out + first, left, with_escapes<Out>(values, escaped, grid));
    }
    cursor = at;
}
