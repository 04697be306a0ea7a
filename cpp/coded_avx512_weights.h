// Included by coded_avx512.h: fields to weights, and products with them.

// A panel's units; levels of odd vectors come 256 times too large.
struct Units {
    __m512 of[8];
    explicit Units(const float* units) {
        for (int v = 0; v < 8; ++v) of[v] = _mm512_mul_ps(_mm512_loadu_ps(units + 16 * v), _mm512_set1_ps(v % 2 ? 0x1p-8f : 1.0f));
    }
};

__attribute__((noinline)) void wide_levels(const uint8_t* fields, unsigned shift, const uint8_t* raw, __m512* out) {
    for (int v = 0; v < 8; ++v) {
        const __m512i packed = _mm512_srl_epi32(_mm512_loadu_si512(fields + v / 4 * 64), _mm_cvtsi32_si128(v % 4 * 8));
        __m512i q = _mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(packed, 1), _mm512_set1_epi32(15)), _mm512_set1_epi32(kSymbols / 2));
        for (unsigned b = shift; b-- > 0;) {
            uint64_t plane;
            std::memcpy(&plane, raw + b * kPlaneNbytes + v / 4 * 8, 8);
            const __mmask16 ones = __mmask16(_pext_u64(plane, uint64_t(0x1111111111111111) << (v % 4)));
            q = _mm512_add_epi32(q, q);
            q = _mm512_mask_add_epi32(q, ones, q, _mm512_set1_epi32(1));
        }
        const __m512i level = _mm512_or_si512(_mm512_add_epi32(q, q), _mm512_and_si512(packed, _mm512_set1_epi32(1)));
        out[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(level), _mm512_set1_ps(v % 2 ? 256.0f : 1.0f));
    }
}

// A row's levels, those of odd vectors times 256.
inline void levels_of(const uint8_t* fields, unsigned shift, const uint8_t* raw, __m512* out) {
    if (__builtin_expect(shift == 0, 1)) {
        const Levels4 bytes(31, 16);
        for (int half = 0; half < 2; ++half) bytes.floats(_mm512_loadu_si512(fields + 64 * half), out + 4 * half);
    } else if (shift <= kNarrow) {
        const Levels4 bytes(255, 128);
        for (int half = 0; half < 2; ++half) bytes.floats(narrow(_mm512_loadu_si512(fields + 64 * half), shift, raw + 8 * half), out + 4 * half);
    } else {
        wide_levels(fields, shift, raw, out);
    }
}

// use(row, weights by vectors, not yet rounded) for each row
template <class Use> inline __attribute__((always_inline)) void each_row(const Levels& levels, Use use) {
    const Tile& tile = levels.tile;
    const Units units(levels.units);
    const uint8_t* raw = tile.raw;
    for (size_t row = 0; row < tile.rows; ++row) {
        const unsigned shift = levels.raw ? tile.shift(row) : 0;
        __m512 w[8];
        levels_of(tile.fields + row * kLanes, shift, raw, w);
        raw += shift * kPlaneNbytes;
        WATERFILL_UNROLL
        for (int v = 0; v < 8; ++v) {
            w[v] = _mm512_mul_ps(w[v], units.of[v]);
            if (tile.matrix->scaled) w[v] = _mm512_mul_ps(w[v], _mm512_set1_ps(levels.scales[row]));
        }
        use(row, w);
    }
}

inline __m512 rounded(__m512 value, Float dtype) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7FFF));
    if (dtype == Float::bf16) return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xFFFF0000))));
    if (dtype == Float::f16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return value;
}

// out (rows, kLanes)
void fill(const Levels& levels, float* out) {
    const Float dtype = levels.tile.matrix->dtype;
    each_row(levels, [&](size_t row, const __m512* w) {
        for (int v = 0; v < 8; ++v) _mm512_store_ps(out + row * kLanes + 16 * v, rounded(w[v], dtype));
    });
}

constexpr unsigned kSums = 16;  // partial sums of a row

// Some tokens at a time, so that weights are fetched once for them.
template <unsigned kTokens> void add_some(const float* weights, size_t rows, const float* x, float* sums) {
    __m512 factor[kTokens][8];
    for (unsigned t = 0; t < kTokens; ++t)
        for (int v = 0; v < 8; ++v) factor[t][v] = _mm512_loadu_ps(x + t * kLanes + 16 * v);
    for (size_t row = 0; row < rows; ++row) {
        __m512 a[kTokens], b[kTokens];
        WATERFILL_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) a[t] = _mm512_load_ps(sums + (t * kTile + row) * kSums), b[t] = _mm512_setzero_ps();
        WATERFILL_UNROLL
        for (int v = 0; v < 8; v += 2) {
            const __m512 first = _mm512_load_ps(weights + row * kLanes + 16 * v), second = _mm512_load_ps(weights + row * kLanes + 16 * v + 16);
            WATERFILL_UNROLL
            for (unsigned t = 0; t < kTokens; ++t) {
                a[t] = _mm512_fmadd_ps(first, factor[t][v], a[t]);
                b[t] = _mm512_fmadd_ps(second, factor[t][v + 1], b[t]);
            }
        }
        WATERFILL_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) _mm512_store_ps(sums + (t * kTile + row) * kSums, _mm512_add_ps(a[t], b[t]));
    }
}

// sums[token][row][kSums] += products of `rows` rows of weights with a panel's activations
void add_products(const float* weights, size_t rows, const float* x, unsigned batch, float* sums) {
    unsigned token = 0;
    for (; token + 2 <= batch; token += 2) add_some<2>(weights, rows, x + token * kLanes, sums + token * kTile * kSums);
    for (; token < batch; ++token) add_some<1>(weights, rows, x + token * kLanes, sums + token * kTile * kSums);
}

// y[row] = the sum of its kSums partial sums, sixteen rows at a time.
void totals(const float* sums, size_t rows, float* y) {
    for (size_t first = 0; first < rows; first += 16, sums += 16 * kSums) {
        __m512 part[16];
        _Pragma("GCC unroll 16")
        for (int i = 0; i < 16; ++i) part[i] = _mm512_load_ps(sums + i * kSums);
        WATERFILL_UNROLL
        for (int i = 0; i < 8; ++i) part[i] = _mm512_add_ps(_mm512_shuffle_f32x4(part[i], part[i + 8], 0x44), _mm512_shuffle_f32x4(part[i], part[i + 8], 0xEE));
        WATERFILL_UNROLL
        for (int i = 0; i < 4; ++i) part[i] = _mm512_add_ps(_mm512_shuffle_f32x4(part[i], part[i + 4], 0x88), _mm512_shuffle_f32x4(part[i], part[i + 4], 0xDD));
        WATERFILL_UNROLL
        for (int i = 0; i < 2; ++i) part[i] = _mm512_add_ps(_mm512_unpacklo_ps(part[i], part[i + 2]), _mm512_unpackhi_ps(part[i], part[i + 2]));
        const __m512 all = _mm512_add_ps(_mm512_unpacklo_ps(part[0], part[1]), _mm512_unpackhi_ps(part[0], part[1]));
        const __mmask16 there = rows - first < 16 ? __mmask16((1u << (rows - first)) - 1) : __mmask16(0xFFFF);
        _mm512_mask_storeu_ps(y + first, there, _mm512_shuffle_f32x4(all, all, 0xD8));
    }
}

// The same with instructions for bfloat16, which take subnormal numbers for zero.
#define WATERFILL_BF16 __attribute__((target("avx512bf16")))

WATERFILL_BF16 void fill_bf16(const Levels& levels, uint16_t* out) {
    each_row(levels, [&](size_t row, const __m512* w) WATERFILL_BF16 {
        WATERFILL_UNROLL
        for (int v = 0; v < 8; v += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh(w[v + 1], w[v]);
            _mm512_store_si512(out + row * kLanes + 16 * v, reinterpret_cast<const __m512i&>(both));
        }
    });
}

inline __m512bh halves(const uint16_t* at) {
    const __m512i bits = _mm512_loadu_si512(at);
    return reinterpret_cast<const __m512bh&>(bits);
}

template <unsigned kTokens> WATERFILL_BF16 void add_some_bf16(const uint16_t* weights, size_t rows, const uint16_t* x, float* sums) {
    __m512bh factor[kTokens][4];
    for (unsigned t = 0; t < kTokens; ++t)
        for (int v = 0; v < 4; ++v) factor[t][v] = halves(x + t * kLanes + 32 * v);
    for (size_t row = 0; row < rows; ++row) {
        __m512 sum[kTokens];
        WATERFILL_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) sum[t] = _mm512_load_ps(sums + (t * kTile + row) * kSums);
        WATERFILL_UNROLL
        for (int v = 0; v < 4; ++v) {
            const __m512bh some = halves(weights + row * kLanes + 32 * v);
            WATERFILL_UNROLL
            for (unsigned t = 0; t < kTokens; ++t) sum[t] = _mm512_dpbf16_ps(sum[t], some, factor[t][v]);
        }
        WATERFILL_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) _mm512_store_ps(sums + (t * kTile + row) * kSums, sum[t]);
    }
}

WATERFILL_BF16 void add_products_bf16(const uint16_t* weights, size_t rows, const uint16_t* x, unsigned batch, float* sums) {
    unsigned token = 0;
    for (; token + 4 <= batch; token += 4) add_some_bf16<4>(weights, rows, x + token * kLanes, sums + token * kTile * kSums);
    for (; token < batch; ++token) add_some_bf16<1>(weights, rows, x + token * kLanes, sums + token * kTile * kSums);
}

bool has_bf16() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
}

bool takes_bf16(const Matrix& matrix) { return matrix.dtype == Float::bf16 && !matrix.tiny && has_bf16(); }
